"""Tiny models and batches for tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_samoe.config import ModelConfig, MoEConfig, ParallelConfig, PretrainConfig, TrainingConfig
from megatron_samoe.dist_checkpointing.sharded_state import ShardedTensor
from megatron_samoe.parallel_state import Group, ParallelState, RankGrid, single_process_state
from megatron_samoe.parallel_state.rank_grid import GROUPS
from megatron_samoe.training.setup import TrainSetup, build_setup, initial_state
from megatron_samoe.training.state import TrainState
from megatron_samoe.training.train_step import StepResult, train_step
from tests.harness.tables import table

TABLE = table(__file__)
VOCAB_SIZE = 103
#: Options of layouts by the names that tests give them.
SHORT_NAMES: dict[str, str] = TABLE["short names"]

GPT3_STYLE = ModelConfig(
    num_layers=4, hidden_size=32, num_attention_heads=4, seq_length=16, make_vocab_size_divisible_by=8
)
LLAMA_STYLE = replace(GPT3_STYLE, **TABLE["llama style"])


def tiny_config(layout: str = "samoe", **options: Any) -> PretrainConfig:
    """Returns a small configuration; options are field names of any group, `style` picks GPT-3's or LLaMA's."""
    model = LLAMA_STYLE if options.pop("style", "gpt3") == "llama" else GPT3_STYLE
    moe = MoEConfig(expert_layout=layout, num_experts=4, num_expert_banks=2)
    config = PretrainConfig(
        model=model,
        moe=moe if layout == "dense" else replace(moe, moe_router_topk=1),
        training=TrainingConfig(micro_batch_size=2, global_batch_size=8, train_iters=10, eval_iters=1),
    )
    return with_options(config, **options)


def with_options(config: PretrainConfig, **options: Any) -> PretrainConfig:
    """Returns the configuration with fields replaced, whichever group they are in."""
    for name, value in options.items():
        group = next(g for g, v in vars(config).items() if hasattr(v, name) and name in v.__dataclass_fields__)
        config = replace(config, **{group: replace(getattr(config, group), **{name: value})})
    return config


def with_layout(config: PretrainConfig, **sizes: Any) -> PretrainConfig:
    """Returns the configuration with a parallel layout: tp, cp, comm (of cp), pp, vpp (layers per virtual stage), ep, etp, sp, zero,
    of which a dense model leaves out ep and etp; the parts and the transport of tokens; and the placement of a pool, if it has one."""
    unused = {"pool"} if config.moe.expert_layout != "dense" else {"pool", "ep", "etp", "chunks", "rows"}
    parallel = ParallelConfig(**{SHORT_NAMES[k]: v for k, v in sizes.items() if k not in unused})
    if config.moe.shares_experts and "pool" in sizes:
        config = with_options(config, samoe_pool_placement=sizes["pool"])
    return replace(config, parallel=parallel)


def state_of(grid: RankGrid, rank: int, sequence_parallel: bool = False) -> ParallelState:
    """Returns a rank's state without process groups: making weights needs no communication."""
    groups = {}
    for name in GROUPS:
        (ranks,) = (ranks for ranks in grid.groups(name) if rank in ranks)
        groups[name] = Group(name, ranks, ranks.index(rank))
    return ParallelState(grid, rank, torch.device("cpu"), sequence_parallel=sequence_parallel, **groups)


def global_batch(config: PretrainConfig, step: int, batch_size: int = 8) -> dict[str, Tensor]:
    """Returns a step's whole batch, the same in every layout."""
    generator = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(0, VOCAB_SIZE, (batch_size, config.model.seq_length + 1), generator=generator)
    return {
        "tokens": ids[:, :-1].contiguous(),
        "labels": ids[:, 1:].contiguous(),
        "loss_mask": torch.ones(batch_size, config.model.seq_length),
    }


def micro_batches(setup: TrainSetup, step: int, batch_size: int | None = None) -> list[dict[str, Tensor]]:
    """Returns this rank's micro-batches of a step on its device, dealt out as the sampler does."""
    batch_size = batch_size or setup.batch_size
    batch = global_batch(setup.config, step, batch_size)
    whole = {name: t.to(setup.parallel.device) for name, t in batch.items()}
    size, dp = setup.config.training.micro_batch_size, setup.parallel.dp
    starts = range(dp.rank * size, batch_size, size * dp.size)
    return [{name: t[start : start + size] for name, t in whole.items()} for start in starts]


def started(
    config: PretrainConfig, dtype: torch.dtype | None = None, parallel: ParallelState | None = None
) -> tuple[TrainSetup, TrainState]:
    """Returns a run before its first step, in one process or on the ranks of a state."""
    setup = build_setup(config, VOCAB_SIZE, parallel or single_process_state(), dtype)
    return setup, initial_state(setup)


def steps(setup: TrainSetup, state: TrainState, count: int) -> Iterator[tuple[StepResult, TrainState]]:
    """Takes optimizer steps from where a run is, and yields what each gave and the state after it."""
    for _ in range(count):
        result, state = train_step(setup, state, micro_batches(setup, state.iteration))
        yield result, state


class RandomBatches:
    """Data of random tokens, as the trainer asks for them; counts the steps that were begun."""

    valid = test = epoch_samples = None

    def __init__(self, setup: TrainSetup):
        self.setup, self.steps = setup, 0

    def train_batches(self, consumed_samples: int) -> Iterator[list[dict[str, Tensor]]]:
        """Yields the micro-batches of each step from where a run is."""
        while True:
            size, self.steps = self.setup.batch_size_after(consumed_samples), self.steps + 1
            yield micro_batches(self.setup, consumed_samples // self.setup.batch_size, size)
            consumed_samples += size


def gather_global(parts: dict[str, list[ShardedTensor]], parallel: ParallelState) -> dict[str, Tensor]:
    """Returns whole tensors on the CPU, put together from all ranks' parts; every copy must agree. Ranks but the first get none."""
    # Of a view, the buffer that it shares with all others would be sent.
    own = [(name, t.global_shape, t.offsets, t.local.cpu().clone()) for name, ts in parts.items() for t in ts]
    of_ranks = [own]
    if parallel.world.size > 1:
        of_ranks = [own] * parallel.world.size if parallel.rank == 0 else []
        dist.gather_object(own, of_ranks or None, dst=0)
    whole: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    for ranks_parts in of_ranks:
        for name, shape, offsets, part in ranks_parts:
            target = whole.setdefault(name, torch.zeros(shape, dtype=part.dtype))
            filled = seen.setdefault(name, torch.zeros(shape, dtype=torch.bool))
            place = tuple(slice(o, o + n) for o, n in zip(offsets, part.shape, strict=True))
            if filled[place].all() and part.numel():
                torch.testing.assert_close(target[place], part, rtol=1e-5, atol=1e-8, msg=f"replicas of {name} differ")
            target[place] = part
            filled[place] = True
    assert all(f.all() for f in seen.values())
    return whole
