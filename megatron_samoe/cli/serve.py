"""Serves a checkpoint with OpenAI's completions API: `megatron-samoe serve --load runs/x/checkpoints`."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Annotated

import tyro

from megatron_samoe.cli.model_arguments import EngineOptions, ModelOptions, rank_program
from megatron_samoe.cli.program import Count
from megatron_samoe.config.option import flag
from megatron_samoe.convert.opener import format_of
from megatron_samoe.dist_checkpointing.store import LoadWords
from megatron_samoe.errors import CommunicationError, ConfigError
from megatron_samoe.inference.engine import Engine
from megatron_samoe.inference.server.models import NamedModel, check_names
from megatron_samoe.inference.server.run import (
    KEY_VARIABLE,
    LOOPBACK_NAMES,
    Server,
    ServerOptions,
    check_installed,
    check_processes,
    listen,
    read_api_key,
)
from megatron_samoe.inference.server.worker import follow
from megatron_samoe.log import logger
from megatron_samoe.parallel_state import ParallelState, backend, launcher
from megatron_samoe.runtime.load import LoadedModel

Names = tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]]


@dataclass(frozen=True, kw_only=True)
class ServedModel(ModelOptions):
    """A checkpoint, those served with it, and the ranks over which a model is spread."""

    num_threads: Count = None
    """CPU threads of a rank; its share of the cores if not given"""
    beside: Annotated[Names, tyro.conf.arg(metavar="DIR [DIR ...]")] = ()
    """folders of more models to serve: clients name the one they ask, and the page asks all and shows them side by side; one
    process only. --serving and --cache-experts are for those with a pool, other flags for each"""

    @property
    def folders(self) -> list[str]:
        """All folders of models."""
        return [self.load, *chain.from_iterable(self.beside)]


def _run_name(load: str) -> str:
    folder = Path(load).absolute()
    run = folder.parent if folder.name == "checkpoints" else folder
    # One of several seeds has no name of its own.
    return f"{run.parent.name}/{run.name}" if re.fullmatch(r"seed[-_]?\d+", run.name) else run.name or "model"


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Serves a checkpoint with OpenAI's completions API.

    Under torchrun it spreads the model over the ranks, whichever layout saved the checkpoint, and rank 0 answers. It listens
    on this machine only unless --host says otherwise. docs/serving.md has the API, the limits and how to end it.
    """

    model: ServedModel
    engine: EngineOptions
    server: ServerOptions
    served_model_name: Annotated[Names, tyro.conf.arg(metavar="NAME [NAME ...]")] = ()
    """as clients call the model, and each of --beside; the runs' names if not given"""
    api_key_file: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """holds the token that clients must send; without it the variable MEGATRON_SAMOE_API_KEY counts"""
    no_api_key: bool = False
    """asks for no token also where --host lets others than this machine reach the server"""
    show_experts: bool = False
    """the page shows which experts and banks each token uses; keeps the model as it was trained in memory, too"""

    def run(self) -> int:
        """Serves; the status is 0 after SIGTERM or SIGINT, 1 where the engine failed."""
        check_installed()
        server_options = replace(self.server, api_key=read_api_key(self.api_key_file))
        self._refuse_strangers(server_options)
        folders = self._names()
        # Before the model, so that a port in use is said at once.
        listener = listen(server_options.host, server_options.port) if launcher.rank() == 0 else None
        parallel = self.model.join(self.model.num_threads)
        check_processes(parallel.world, list(folders), self.show_experts)
        if listener is None:
            return self._follow(parallel)
        models: list[NamedModel] = []
        for name, folder in folders.items():
            engine, loaded = self._loaded_engine(parallel, folder, [model.engine for model in models])
            models.append(NamedModel(name, engine, loaded.model if self.show_experts else None))
            del engine, loaded
        server = Server(models, parallel.world, server_options, listener)

        def ready() -> None:
            logger.info("serving %s at %s", ", ".join(folders), server.url)
            sys.stdout.flush()

        return server.run(ready)

    def _refuse_strangers(self, options: ServerOptions) -> None:
        """Raises ConfigError where others could use the server and nobody has said that they may."""
        if self.no_api_key and options.api_key is not None:
            raise ConfigError(
                "--no-api-key", True, f"a token is given, by --api-key-file or {KEY_VARIABLE}: take one away"
            )
        if options.host not in LOOPBACK_NAMES and options.api_key is None and not self.no_api_key:
            raise ConfigError(
                "--host",
                options.host,
                f"lets others use the server: give --api-key-file (or {KEY_VARIABLE}), or "
                "--no-api-key, with which whoever reaches it is answered",
            )

    def _names(self) -> dict[str, str]:
        """Returns the models' folders by the names that clients call them."""
        folders = self.model.folders
        names = list(chain.from_iterable(self.served_model_name)) or [_run_name(folder) for folder in folders]
        if len(names) != len(folders):
            told = f"gives {len(names)} name(s) to {len(folders)} model(s)"
            raise ConfigError("--served-model-name", " ".join(names), told)
        check_names(names)
        for name in ("ckpt_step", "tokenizer_model"):
            value = getattr(self.model, name)
            if self.model.beside and value is not None:
                raise ConfigError(flag(name), value, "is for one model; leave out --beside")
        for folder in folders:  # all, before the first is loaded
            format_of(folder, LoadWords())
        return dict(zip(names, folders, strict=True))

    def _loaded_engine(
        self, parallel: ParallelState, folder: str, beside: Collection[Engine] = ()
    ) -> tuple[Engine, LoadedModel]:
        """Returns the engine of a folder's model, and the model."""
        loaded = self.model.loaded(parallel, folder, self.model.ckpt_step)
        options = vars(self.engine)
        if self.model.beside and not loaded.config.moe.has_pool:
            options = {**options, "serving": "auto", "cache_experts": None}
        engine = Engine(loaded, beside=beside, **options)
        logger.info("loaded %s: %s", loaded.directory, engine.summary)
        return engine, loaded

    def _follow(self, parallel: ParallelState) -> int:
        engine, _ = self._loaded_engine(parallel, self.model.load)
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


main = rank_program(Serve)

if __name__ == "__main__":
    sys.exit(main())
