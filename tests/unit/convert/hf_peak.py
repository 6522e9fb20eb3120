"""Run as a program: converts a model of many tensors in all directions and prints how far memory rose each time."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_samoe.cli import convert
from megatron_samoe.config import DataConfig, ModelConfig, MoEConfig, PretrainConfig
from megatron_samoe.config.cli import to_mapping
from megatron_samoe.convert.native import NativeModel
from megatron_samoe.dist_checkpointing.global_tensors import StoredTensor, write_checkpoint

MODEL = ModelConfig(
    num_layers=6, hidden_size=128, ffn_hidden_size=1024, num_attention_heads=4, seq_length=64, swiglu=True,
    normalization="RMSNorm", position_embedding_type="rope", disable_bias_linear=True,
)  # fmt: skip
MOE = MoEConfig(expert_layout="moe", num_experts=8, moe_router_topk=2, num_expert_banks=2)
VOCABULARY = 257


class Random:
    """A source whose tensors are made when they are read."""

    def __init__(self, config: PretrainConfig):
        self.config: Mapping[str, Any] = to_mapping(config)
        self.train_state: Mapping[str, Any] = {"iteration": 1, "vocab_size": VOCABULARY}
        self.attachments: Mapping[str, bytes] = {}
        self.tensors: Mapping[str, StoredTensor] = NativeModel(config, VOCABULARY).tensors

    def read(self, name: str) -> Tensor:
        """Returns a tensor."""
        return torch.rand(self.tensors[name].shape)


def status(field: str) -> int:
    """Returns an entry of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


def rise(arguments: list[str]) -> int:
    """Returns how far a conversion took memory above where it was, at the highest."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = status("VmRSS")
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        assert convert.main(arguments) == 0, out.getvalue()
    return status("VmHWM") - before


def main(root: Path) -> None:
    """Prints sizes and rises as JSON."""
    torch.set_num_threads(1)
    config = PretrainConfig(model=MODEL, moe=MOE, data=DataConfig(mock_data=True))
    source = Random(config)
    write_checkpoint(root / "moe", 1, source)
    samoe = replace(config, moe=replace(MOE, expert_layout="samoe"))
    write_checkpoint(root / "samoe", 1, Random(samoe))
    runs = {
        "native to hf": ["moe", "hf", "--to", "hf", "--max-shard-size", "50MB"],
        "hf to native": ["hf", "back"],
        "native to torch_dist": ["moe", "megatron", "--to", "torch_dist"],
        "samoe to hf": ["samoe", "samoe-hf", "--to", "hf"],
        "samoe folded to hf": ["samoe", "folded", "--fold"],
    }
    rises = {}
    for name, (load, save, *rest) in runs.items():
        rises[name] = rise(["--load-dir", str(root / load), "--save-dir", str(root / save), *rest])
    sizes = [t.num_bytes for t in source.tensors.values()]
    samoe_largest = max(t.num_bytes for t in Random(samoe).tensors.values())
    print(json.dumps({"total": sum(sizes), "largest": max(sizes), "samoe_largest": samoe_largest, "rises": rises}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
