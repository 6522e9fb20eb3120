"""Measures steps whose exchanges run beside products, the same ones after them, and the products alone.

`torchrun ... -m tests.hosts.overlap ROUNDS`: one rank on each of two hosts. Rank 0 prints the median seconds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megatron_samoe.config.cli import parse_pretrain_args
from megatron_samoe.config.parallel import ParallelConfig
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.parallel_state import backend, single_process_state
from megatron_samoe.training.setup import TrainSetup, build_setup, initial_state
from megatron_samoe.training.train_step import train_step
from tests.harness.program import arguments
from tools.benchmarks.harness import medians_of
from tools.benchmarks.ranks import VOCAB_SIZE, batches_of, make_setup, together

#: One micro-batch of 1,024 tokens a rank.
BASE: dict[str, Any] = {"num_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "seq_length": 256}
BASE |= {"micro_batch_size": 4, "global_batch_size": 8, "num_expert_banks": None}
MODEL = {**BASE, "expert_layout": "moe", "num_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 512}
SHARED_EXPERT = {"moe_shared_expert_intermediate_size": 512}
DENSE = {**BASE, "expert_layout": "dense", "num_experts": None}
#: By model: its options, those of two ranks, those of overlap, and those of one rank that has the same products.
MODELS: dict[str, tuple[Mapping[str, Any], ...]] = {
    "chunks": (MODEL, {"expert_model_parallel_size": 2}, {"moe_dispatch_chunks": 2}, {"num_experts": 4}),
    "shared expert": (
        {**MODEL, **SHARED_EXPERT},
        {"expert_model_parallel_size": 2},
        {"moe_shared_expert_overlap": True},
        {"num_experts": 4},
    ),
    "gradients": ({**DENSE, "ddp_bucket_size": 500_000}, {}, {"overlap_grad_reduce": True}, {}),
}


def config_of(*options: Mapping[str, Any]) -> PretrainConfig:
    """Returns the configuration of options, later ones over earlier ones."""
    merged: dict[str, Any] = {}
    for more in options:
        merged |= more
    return parse_pretrain_args(arguments(data_path="unread", **merged))


def main(argv: Sequence[str]) -> int:
    """Measures, and prints one line of JSON on rank 0."""
    torch.set_num_threads(1)
    backend.keep_freed_memory()
    backend.initialize_distributed(ParallelConfig(), torch.device("cpu"))
    setups: dict[str, TrainSetup] = {}
    for name, (model, split, overlap, alone) in MODELS.items():
        setups[f"{name}, after"] = make_setup(config_of(model, split))
        setups[f"{name}, beside"] = make_setup(config_of(model, split, overlap))
        one = config_of(model, alone, {"global_batch_size": 4})
        setups[f"{name}, alone"] = build_setup(one, VOCAB_SIZE, single_process_state())
    runs = {name: partial(train_step, setup, initial_state(setup), batches_of(setup)) for name, setup in setups.items()}
    medians = medians_of(together(runs, int(argv[0])))
    if dist.get_rank() == 0:
        print(f"medians {json.dumps(medians)}", flush=True)
    dist.barrier()
    backend.leave_distributed()
    return 0
