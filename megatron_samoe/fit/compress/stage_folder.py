"""A folder in which stages leave results, each whole or not at all, so that a compression resumes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_samoe.convert.opener import open_folder
from megatron_samoe.dist_checkpointing.global_tensors import GlobalTensors, write_checkpoint
from megatron_samoe.dist_checkpointing.opened import Opened
from megatron_samoe.dist_checkpointing.saving import fsync_dir
from megatron_samoe.errors import CheckpointError, ConfigError
from megatron_samoe.log import logger
from megatron_samoe.parsing import JsonObject, parse_json

#: The stage that marks a folder as one of a compression.
BEGIN = "compress"
#: The stage that writes a model of another program as a checkpoint.
IMPORTED = "imported"


class StageFolder:
    """Results of stages, `NAME.json` next to a stage's other files; a stage is done when its file is there.

    Raises:
        CheckpointError: the folder holds something else.
    """

    def __init__(self, root: Path):
        self.root = root
        self._told = {BEGIN}
        try:
            root.mkdir(parents=True, exist_ok=True)
            is_foreign = any(root.iterdir()) and not self._file(BEGIN).is_file()
        except OSError as error:
            raise CheckpointError(f"--save-dir {root} cannot be written: {error.strerror or error}.") from None
        if is_foreign:
            raise CheckpointError(f"--save-dir {root} is not empty, and was not made by compress. Give a new folder.")

    def stage(self, name: str, settings: JsonObject, work: Callable[[], JsonObject]) -> JsonObject:
        """Returns a stage's result from its file, or else calls `work` and keeps what it returns.

        Args:
            settings: options that the result depends on, as plain values.

        Raises:
            ConfigError: it was run with other settings.
        """
        settings = json.loads(json.dumps(settings))  # as the file has them: tuples are lists
        if self._file(name).is_file():
            kept = self._read(name)
            for field in {**settings, **kept["settings"]}:
                before, now = kept["settings"].get(field), settings.get(field)
                if before != now:
                    raise ConfigError(
                        f"--{field.replace('_', '-')}",
                        now,
                        f"stage {name} in {self.root} was run with {before}; use that, or another --save-dir",
                    )
            if name not in self._told:
                self._told.add(name)
                logger.info(f"{name}: already done, reused")
            result: JsonObject = kept["result"]
            return result
        result = json.loads(json.dumps(work()))
        self._told.add(name)
        self._write(name, {"settings": settings, "result": result})
        return result

    def result(self, name: str) -> JsonObject:
        """Returns the result of a stage that is done."""
        result: JsonObject = self._read(name)["result"]
        return result

    def forget(self, name: str) -> None:
        """Removes a stage's result, so that the stage is run again."""
        self._file(name).unlink(missing_ok=True)

    def write_tensors(self, name: str, value: Any) -> None:
        """Writes tensors in plain containers as `NAME.pt`."""
        self._whole(self.root / f"{name}.pt", lambda path: torch.save(value, path))

    def read_tensors(self, name: str) -> Any:
        """Returns what `write_tensors` wrote; CheckpointError where it is damaged."""
        path = self.root / f"{name}.pt"
        try:
            return torch.load(path, weights_only=True)
        except Exception as error:  # torch raises several kinds for damaged files
            raise CheckpointError(
                f"{path} cannot be read ({type(error).__name__}); remove it and {self._file(name)}."
            ) from None

    def write_model(self, name: str, model: GlobalTensors) -> None:
        """Writes a model as the checkpoint of a stage; what a killed run left there is removed."""
        shutil.rmtree(self.root / name, ignore_errors=True)
        (self.root / name).mkdir()
        write_checkpoint(self.root / name, int(model.train_state.get("iteration", 0)), model)

    def model(self, name: str) -> Opened:
        """Returns the model of a stage."""
        return open_folder(self.root / name)

    def _file(self, name: str) -> Path:
        return self.root / f"{name}.json"

    def _read(self, name: str) -> JsonObject:
        try:
            kept = parse_json(self._file(name).read_text())
            assert isinstance(kept["settings"], dict) and isinstance(kept["result"], dict)
        except (OSError, ValueError, KeyError, TypeError, AssertionError):
            raise CheckpointError(f"{self._file(name)} is damaged; remove it, and the stage is done again.") from None
        return dict(kept)

    def _write(self, name: str, content: JsonObject) -> None:
        self._whole(self._file(name), lambda path: path.write_text(json.dumps(content, indent=1) + "\n"))

    def _whole(self, path: Path, write: Callable[[Path], object]) -> None:
        partial = path.with_name(f"{path.name}.partial")
        try:
            write(partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
            fsync_dir(path.parent)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be written: {error.strerror or error}.") from None
