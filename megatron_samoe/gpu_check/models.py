"""The models of the check: a dense GPT, a MoE and a SaMoE of equal active size, and batches of random tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_samoe.config.cli import parse_pretrain_args
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.training.micro_batches import Batch

#: `full` has about 100 M active parameters; `tiny` is for a dry run on a CPU.
SIZES = {
    "full": "--num-layers 12 --hidden-size 768 --num-attention-heads 12 --seq-length 1024 --micro-batch-size 16 "
    "--global-batch-size 64 --bf16 --lr 6e-4 --lr-warmup-iters 200",
    "tiny": "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --micro-batch-size 2 "
    "--global-batch-size 4 --lr 3e-3 --lr-warmup-iters 2",
}
NUM_EXPERTS = {"full": 32, "tiny": 4}
#: A run ends by the clock, not by its steps.
COMMON = "--train-iters 100000 --lr-decay-style constant --log-interval 10 --eval-iters 4 --eval-interval 250"
#: Tokens of a vocabulary that is not a multiple of 64, as GPT-2's.
VOCAB_SIZE = {"full": 50257, "tiny": 251}


def arms(size: str) -> dict[str, list[str]]:
    """Returns the flags of each model."""
    common = f"{SIZES[size]} {COMMON}".split()
    experts = ["--num-experts", str(NUM_EXPERTS[size])]
    banks = "3" if size == "full" else "2"
    return {
        "dense": [*common, "--expert-layout", "dense"],
        "moe": [*common, "--expert-layout", "moe", *experts],
        "samoe": [*common, "--expert-layout", "samoe", *experts, "--num-expert-banks", banks],
    }


def configs(size: str) -> dict[str, PretrainConfig]:
    """Returns the configuration of each model."""
    return {name: parse_pretrain_args(flags) for name, flags in arms(size).items()}


def random_batches(config: PretrainConfig, vocab_size: int, device: torch.device) -> Iterator[list[Batch]]:
    """Yields the micro-batches of one step after the other: random tokens, all of which count."""
    training, generator = config.training, torch.Generator().manual_seed(1)
    assert training.global_batch_size is not None
    shape = (training.micro_batch_size, config.model.seq_length)
    mask = torch.ones(shape, device=device)
    while True:
        step = []
        for _ in range(training.global_batch_size // training.micro_batch_size):
            ids = torch.randint(0, vocab_size, (shape[0], shape[1] + 1), generator=generator).to(device)
            step.append({"tokens": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous(), "loss_mask": mask})
        yield step
