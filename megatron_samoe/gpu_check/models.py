"""The models of the check: a dense GPT, a MoE and a SaMoE of equal active size, and their steps on random tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from megatron_samoe.config.cli import parse_pretrain_args
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.parallel_state.state import single_process_state
from megatron_samoe.training.setup import build_setup, initial_state
from megatron_samoe.training.train_step import train_step

#: `full` has about 100 M active parameters; `tiny` is for a dry run on a CPU.
SIZES = {
    "full": "--num-layers 12 --hidden-size 768 --num-attention-heads 12 --seq-length 1024 --micro-batch-size 16 "
    "--global-batch-size 64 --bf16",
    "tiny": "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --micro-batch-size 2 "
    "--global-batch-size 4",
}
EXPERTS = {"full": "--num-experts 32", "tiny": "--num-experts 4"}
BANKS = {"full": "--num-expert-banks 3", "tiny": "--num-expert-banks 2"}
#: Tokens of a vocabulary that is not a multiple of 64, as GPT-2's.
VOCAB_SIZE = {"full": 50257, "tiny": 251}


def configs(size: str) -> dict[str, PretrainConfig]:
    """Returns the configuration of each model."""
    arms = {"dense": "", "moe": EXPERTS[size], "samoe": f"{EXPERTS[size]} {BANKS[size]}"}
    common = f"{SIZES[size]} --train-iters 100000 --lr-decay-style constant --lr 6e-4 --lr-warmup-iters 200"
    return {
        name: parse_pretrain_args(f"{common} --expert-layout {name} {flags}".split()) for name, flags in arms.items()
    }


def training_step(config: PretrainConfig, size: str, device: torch.device) -> Callable[[], None]:
    """Returns a function that makes the next training step, on random tokens, all of which count."""
    training, vocab_size = config.training, VOCAB_SIZE[size]
    assert training.global_batch_size is not None
    num_batches, shape = (
        training.global_batch_size // training.micro_batch_size,
        (training.micro_batch_size, config.model.seq_length),
    )
    generator, mask = torch.Generator().manual_seed(1), torch.ones(shape, device=device)
    setup = build_setup(config, vocab_size, single_process_state(device))
    state = initial_state(setup)

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        for _ in range(num_batches):
            ids = torch.randint(0, vocab_size, (shape[0], shape[1] + 1), generator=generator).to(device)
            yield {"tokens": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous(), "loss_mask": mask}

    def step() -> None:
        nonlocal state
        _, state = train_step(setup, state, list(batches()))

    return step
