"""Serves a checkpoint with OpenAI's completions API: `python tools/serve.py --load runs/x/checkpoints`.

Under torchrun it spreads the model over the ranks, whichever layout saved the checkpoint, and rank 0 answers. It listens
on this machine alone unless --host says otherwise. docs/serving.md has the API, the limits and how to end it.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from megatron_samoe.config.parallel import ParallelConfig
from megatron_samoe.errors import CommunicationError, ConfigError, MegatronSamoeError
from megatron_samoe.inference.engine import PRECISIONS, SERVINGS, Engine
from megatron_samoe.inference.server.run import Server, ServerOptions, check_installed, listen, read_api_key
from megatron_samoe.inference.server.worker import follow
from megatron_samoe.log import configure_logging, logger
from megatron_samoe.parallel_state import ParallelState, backend
from megatron_samoe.runtime.load import load_model
from megatron_samoe.runtime.ranks import join_ranks


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    model = parser.add_argument_group("model")
    model.add_argument("--load", required=True, help="folder of a run or of checkpoints, saved by any layout")
    model.add_argument(
        "--tokenizer-model", metavar="FILE", help="in place of the tokenizer that the checkpoint carries"
    )
    model.add_argument("--ckpt-step", type=int, metavar="N", help="iteration; the newest if not given")
    model.add_argument("--serving", choices=SERVINGS, help="how the experts of a shared pool are kept")
    model.add_argument("--dtype", choices=PRECISIONS, help="of weights")
    model.add_argument("--cache-experts", type=int, metavar="N", help="experts combined on the fly that are kept; those "
                       "of two tokens if not given")  # fmt: skip
    model.add_argument("--num-threads", type=int, metavar="N", help="CPU threads of a rank; its share of the cores if "
                       "not given")  # fmt: skip
    for size in ("tensor", "pipeline", "expert"):
        model.add_argument(f"--{size}-model-parallel-size", type=int, default=1, metavar="N")
    batch = parser.add_argument_group("batch")
    batch.add_argument("--max-batch", type=int, default=8, metavar="N", help="answers made at the same time")
    batch.add_argument("--max-tokens", type=int, metavar="N", help="tokens that the key-value cache holds; enough for "
                       "--max-batch full contexts if not given")  # fmt: skip
    batch.add_argument("--max-step-tokens", type=int, metavar="N", help="most tokens of one step")
    _add_server_flags(parser.add_argument_group("server"))
    return parser


def _add_server_flags(group: argparse._ArgumentGroup) -> None:
    usual = ServerOptions()
    group.add_argument("--host", default=usual.host, help="address to listen at; 0.0.0.0 for all of the machine's")
    group.add_argument("--port", type=int, default=usual.port, help="0 takes a free one (default: %(default)s)")
    group.add_argument(
        "--served-model-name", metavar="NAME", help="as clients call the model; the run's name if not given"
    )
    group.add_argument("--api-key-file", type=Path, metavar="FILE", help="holds the token that clients must send; without "
                       "it the variable MEGATRON_SAMOE_API_KEY counts, and without both no token is asked for")  # fmt: skip
    group.add_argument("--allowed-hosts", nargs="+", default=(), metavar="NAME", help="host names to answer under; on a "
                       "loopback address only its own names, else any, if not given")  # fmt: skip
    for name, text in (
        ("max_queue", "answers that may wait beside those being made; more are refused with 429"),
        ("max_choices", "prompts times n of one request"),
        ("max_connections", "HTTP requests answered at a time; more are refused with 503"),
        ("max_body_bytes", "size of a request; more are refused with 413"),
        ("body_timeout_s", "seconds in which a request's head must have come, and then its body"),
        ("drain_timeout_s", "seconds that open requests have after SIGTERM"),
    ):
        default = getattr(usual, name)
        flag = "--" + name.removesuffix("_s").replace("_", "-")
        group.add_argument(flag, dest=name, type=type(default), default=default, metavar="N",
                           help=f"{text} (default: {default:g})")  # fmt: skip


def _server_options(options: argparse.Namespace) -> ServerOptions:
    folder = Path(options.load).absolute()
    run = folder.parent if folder.name == "checkpoints" else folder
    # One of several seeds has no name of its own.
    run_name = f"{run.parent.name}/{run.name}" if re.fullmatch(r"seed[-_]?\d+", run.name) else run.name
    named = options.served_model_name
    return ServerOptions(
        host=options.host, port=options.port, model_name=(run_name or "model") if named is None else named,
        api_key=read_api_key(options.api_key_file), allowed_hosts=tuple(options.allowed_hosts),
        max_queue=options.max_queue, max_choices=options.max_choices, max_connections=options.max_connections,
        max_body_bytes=options.max_body_bytes, body_timeout_s=options.body_timeout_s,
        drain_timeout_s=options.drain_timeout_s,
    )  # fmt: skip


def _engine(options: argparse.Namespace, layout: ParallelConfig, parallel: ParallelState) -> Engine:
    loaded = load_model(
        options.load, parallel, layout, ckpt_step=options.ckpt_step, tokenizer_model=options.tokenizer_model
    )
    given = {name: getattr(options, name) for name in ("serving", "dtype", "max_step_tokens", "cache_experts")}
    engine = Engine(
        loaded, max_batch=options.max_batch, max_tokens=options.max_tokens,
        **{name: value for name, value in given.items() if value is not None},
    )  # fmt: skip
    logger.info("loaded %s: %s, experts %s", loaded.directory, engine.dtype, engine.serving)
    return engine


def _serve(options: argparse.Namespace) -> int:
    check_installed()
    if options.num_threads is not None and options.num_threads < 1:
        raise ConfigError("--num-threads", options.num_threads, "must be 1 or more")
    server_options = _server_options(options)
    layout = ParallelConfig(
        tensor_model_parallel_size=options.tensor_model_parallel_size,
        pipeline_model_parallel_size=options.pipeline_model_parallel_size,
        expert_model_parallel_size=options.expert_model_parallel_size,
    )
    is_first = os.environ.get("RANK", "0") == "0"
    # Before the model, so that a port in use is said at once.
    listener = listen(server_options.host, server_options.port) if is_first else None
    parallel = join_ranks(layout, options.num_threads)
    if listener is None:
        return _follow(options, layout, parallel)
    server = Server(_engine(options, layout, parallel), parallel.world, server_options, listener)
    if server_options.api_key is None and not server.is_local:
        logger.warning("note: whoever can reach %s can use this server; --api-key-file asks for a token", server.url)

    def ready() -> None:
        logger.info("serving %s at %s", server_options.model_name, server.url)
        sys.stdout.flush()

    return server.run(ready)


def _follow(options: argparse.Namespace, layout: ParallelConfig, parallel: ParallelState) -> int:
    engine = _engine(options, layout, parallel)
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


def main(args: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit status: 0 after SIGTERM or SIGINT, 1 where the engine failed."""
    options = make_parser().parse_args(args)
    rank = int(os.environ.get("RANK", "0"))
    configure_logging(rank)
    try:
        return _serve(options)
    except ConfigError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except MegatronSamoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    finally:
        # Else gloo's threads may be running when the interpreter ends, which aborts the process.
        if dist.is_initialized() and sys.exc_info()[0] is None:
            backend.leave_distributed()


if __name__ == "__main__":
    sys.exit(main())
