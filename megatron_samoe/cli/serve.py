"""Serves a checkpoint with OpenAI's completions API: `megatron-samoe serve --load runs/x/checkpoints`.

Under torchrun it spreads the model over the ranks, whichever layout saved the checkpoint, and rank 0 answers. It listens
on this machine alone unless --host says otherwise. docs/serving.md has the API, the limits and how to end it.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
from collections.abc import Collection
from pathlib import Path

from megatron_samoe.cli.arguments import Options, Words, adder, text_parser
from megatron_samoe.cli.model_arguments import (
    add_layout_arguments,
    add_model_arguments,
    join,
    load,
    rank_program,
    this_rank,
)
from megatron_samoe.config.checkpoint import CheckpointConfig
from megatron_samoe.dist_checkpointing import store
from megatron_samoe.errors import CommunicationError, ConfigError
from megatron_samoe.inference.engine import PRECISIONS, SERVINGS, Engine
from megatron_samoe.inference.server.models import NamedModel, check_names
from megatron_samoe.inference.server.run import (
    Server,
    ServerOptions,
    check_installed,
    check_processes,
    listen,
    read_api_key,
)
from megatron_samoe.inference.server.worker import follow
from megatron_samoe.log import logger
from megatron_samoe.parallel_state import ParallelState, backend
from megatron_samoe.runtime.load import LoadedModel

#: What the server bears: fields of its options, and what --help says of them.
LIMITS = {
    "max_queue": "answers that may wait beside those being made; more are refused with 429",
    "max_choices": "prompts times n of one request",
    "max_connections": "HTTP requests answered at a time; more are refused with 503",
    "max_body_bytes": "size of a request; more are refused with 413",
    "body_timeout_s": "seconds in which a request's head must have come, and then its body",
    "drain_timeout_s": "seconds that open requests have after SIGTERM",
}


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = text_parser(__doc__)
    model_group = parser.add_argument_group("model")
    add_model_arguments(model_group)
    model = adder(model_group)
    model("--serving", SERVINGS, "how the experts of a shared pool are kept", default=None)
    model("--dtype", PRECISIONS, "of weights", default=None)
    model("--cache-experts", int, "experts combined on the fly that are kept; those "
                       "of two tokens if not given", metavar="N")  # fmt: skip
    model(
        "--weights-folder",
        str,
        "keep weights in a file there, which Linux may drop from memory and read again; so "
        "they may be larger than memory while text is made",
        metavar="DIR",
    )
    model("--num-threads", int, "CPU threads of a rank; its share of the cores if "
                       "not given", metavar="N")  # fmt: skip
    model("--beside", [str], "folders of more models to serve: clients name the one they ask, and the page asks all and shows "
                       "them side by side; one process alone. --serving and --cache-experts are for those with a pool, other "
                       "flags for each", default=[], action="extend", metavar="DIR")  # fmt: skip
    add_layout_arguments(model_group)
    batch = adder(parser.add_argument_group("batch"))
    batch("--max-batch", 8, "answers made at the same time", metavar="N")
    batch("--max-tokens", int, "tokens that the key-value cache holds; enough for "
                       "--max-batch full contexts if not given", metavar="N")  # fmt: skip
    batch("--max-step-tokens", int, "most tokens of one step", metavar="N")
    _add_server_flags(parser.add_argument_group("server"))
    return parser


def _add_server_flags(group: argparse._ArgumentGroup) -> None:
    usual, add = ServerOptions(), adder(group)
    add("--host", usual.host, "address to listen at; 0.0.0.0 for all of the machine's")
    add("--port", usual.port, "0 takes a free one (default: %(default)s)")
    add("--served-model-name", [str], "as clients call the model, and each of --beside; the runs' names if not "
                           "given", default=[], action="extend", metavar="NAME")  # fmt: skip
    add("--api-key-file", Path, "holds the token that clients must send; without "
                       "it the variable MEGATRON_SAMOE_API_KEY counts, and without both no token is asked for", metavar="FILE")  # fmt: skip
    add("--allowed-hosts", [str], "host names to answer under; on a "
                       "loopback address only its own names, else any, if not given", default=(), metavar="NAME")  # fmt: skip
    add("--allowed-origins", [str], "origins of pages that may ask from a browser, as https://NAME; * for all; the server's own "
                           "page alone if not given", default=(), metavar="ORIGIN")  # fmt: skip
    add("--show-experts", bool, "the page shows which experts and banks each token uses; keeps the model as it was trained in "
                                "memory, too")  # fmt: skip
    for name, text in LIMITS.items():
        default = getattr(usual, name)
        flag = "--" + name.removesuffix("_s").replace("_", "-")
        add(flag, default, f"{text} (default: {default:g})", dest=name, metavar="N")  # fmt: skip


def _run_name(load: str) -> str:
    folder = Path(load).absolute()
    run = folder.parent if folder.name == "checkpoints" else folder
    # One of several seeds has no name of its own.
    return f"{run.parent.name}/{run.name}" if re.fullmatch(r"seed[-_]?\d+", run.name) else run.name or "model"


def _names(options: Options) -> dict[str, str]:
    """Returns the models' folders by the names that clients call them."""
    folders = [options.load, *options.beside]
    names = options.served_model_name or [_run_name(folder) for folder in folders]
    if len(names) != len(folders):
        raise ConfigError(
            "--served-model-name", " ".join(names), f"gives {len(names)} name(s) to {len(folders)} model(s)"
        )
    check_names(names)
    for flag in ("ckpt_step", "tokenizer_model"):
        if options.beside and getattr(options, flag) is not None:
            raise ConfigError(
                "--" + flag.replace("_", "-"), getattr(options, flag), "is for one model; leave out --beside"
            )
    for folder in folders:  # all, before the first is loaded
        store.find_checkpoint(CheckpointConfig(load=folder, exit_on_missing_checkpoint=True))
    return dict(zip(names, folders, strict=True))


def _server_options(options: Options) -> ServerOptions:
    return ServerOptions(
        host=options.host, port=options.port,
        api_key=read_api_key(options.api_key_file), allowed_hosts=tuple(options.allowed_hosts),
        allowed_origins=tuple(options.allowed_origins),
        **{name: getattr(options, name) for name in LIMITS},
    )  # fmt: skip


def _engine(
    options: Options, parallel: ParallelState, folder: str, beside: Collection[Engine] = ()
) -> tuple[Engine, LoadedModel]:
    loaded = load(options, parallel, folder=folder)
    names = ["dtype", "max_step_tokens", "weights_folder"]
    if loaded.config.moe.has_pool or not options.beside:
        names += ["serving", "cache_experts"]
    given = {name: getattr(options, name) for name in names}
    engine = Engine(
        loaded, max_batch=options.max_batch, max_tokens=options.max_tokens, beside=beside,
        **{name: value for name, value in given.items() if value is not None},
    )  # fmt: skip
    logger.info("loaded %s: %s", loaded.directory, engine.summary)
    return engine, loaded


def _follow(options: Options, parallel: ParallelState) -> int:
    engine, _ = _engine(options, parallel, options.load)
    # torchrun passes signals to all ranks; the first ends the others when its requests are answered.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    try:
        follow(engine, parallel.world)
    except RuntimeError as error:
        if not backend.is_communication_failure(error):
            raise
        raise CommunicationError(f"rank {parallel.rank} cannot reach the rank that serves: {error}") from error
    return 0


@rank_program
def main(words: Words) -> int:
    """Runs the command and returns its exit status: 0 after SIGTERM or SIGINT, 1 where the engine failed."""
    options = make_parser().parse_args(words)
    check_installed()
    server_options, folders = _server_options(options), _names(options)
    # Before the model, so that a port in use is said at once.
    listener = listen(server_options.host, server_options.port) if this_rank() == 0 else None
    parallel = join(options, options.num_threads)
    check_processes(parallel.world, list(folders), options.show_experts)
    if listener is None:
        return _follow(options, parallel)
    models: list[NamedModel] = []
    for name, folder in folders.items():
        engine, loaded = _engine(options, parallel, folder, [model.engine for model in models])
        models.append(NamedModel(name, engine, loaded.model if options.show_experts else None))
        del engine, loaded
    server = Server(models, parallel.world, server_options, listener)
    if server_options.api_key is None and not server.is_local:
        logger.warning("note: whoever can reach %s can use this server; --api-key-file asks for a token", server.url)

    def ready() -> None:
        logger.info("serving %s at %s", ", ".join(folders), server.url)
        sys.stdout.flush()

    return server.run(ready)


if __name__ == "__main__":
    sys.exit(main())
