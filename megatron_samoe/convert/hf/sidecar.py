"""megatron_samoe.json: what an export remembers of the run, so that importing it gives the same checkpoint back.

config.json is the truth about the model. The remembered configuration adds what transformers has no entry for
(regularisation, tokenizer, the vocabulary's multiple), and counts only while it describes the same model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_samoe.config.cli import from_mapping
from megatron_samoe.config.saved import upgrade
from megatron_samoe.config.validate import refuse_excess
from megatron_samoe.convert.hf.folder import read_json
from megatron_samoe.convert.native import NativeModel
from megatron_samoe.dist_checkpointing.store import refuse_wrong_values
from megatron_samoe.errors import CheckpointError, ConfigError
from megatron_samoe.parsing import finite_float

SIDECAR = "megatron_samoe.json"
VERSION = 1
#: Plain values of a checkpoint that belong to its optimizer or to its files.
_DROPPED = ("format_version", "digests", "digest", "optimizer_steps")


@dataclass(frozen=True)
class Remembered:
    """A native configuration and training state from an export."""

    config: Mapping[str, Any]
    train_state: Mapping[str, Any]
    expert_fractions: list[list[float]] | None

    @property
    def native(self) -> NativeModel:
        """The model that they describe."""
        return NativeModel(from_mapping(self.config, SIDECAR), self.train_state["vocab_size"])


def write_sidecar(path: Path, remembered: Remembered) -> None:
    """Writes the file."""
    train_state = {k: v for k, v in remembered.train_state.items() if k not in _DROPPED}
    content = {"version": VERSION, **vars(remembered), "train_state": train_state}
    path.write_text(json.dumps(content, indent=1))


def read_sidecar(path: Path) -> Remembered | None:
    """Returns what the file holds; None where it is not there or not understood, since config.json suffices."""
    if not path.is_file():
        return None
    content = read_json(path)
    config, train_state = content.get("config"), content.get("train_state")
    if content.get("version") != VERSION or not isinstance(config, dict) or not isinstance(train_state, dict):
        return None
    if not isinstance(train_state.get("vocab_size"), int):
        return None
    fractions = content.get("expert_fractions")
    try:
        refuse_wrong_values(train_state, SIDECAR)
        config = upgrade(config)
        refuse_excess(from_mapping(config, SIDECAR))
    except (ConfigError, CheckpointError):
        return None
    return Remembered(config, train_state, fractions if _are_shares(fractions) else None)


def _are_shares(rows: object) -> bool:
    """Whether a value is experts' shares, a row for each layer."""
    if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) == len(rows[0]) for row in rows):
        return False
    shares = [None if isinstance(share, str) else finite_float(share) for row in rows for share in row]
    return all(share is not None and 0 <= share <= 1 for share in shares)
