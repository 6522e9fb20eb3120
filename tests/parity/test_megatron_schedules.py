"""Rates, decays and batches of steps under megatron-core's own schedulers; norms, clipping and updates as torch's."""

from __future__ import annotations

import random
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_samoe.config import OptimizerConfig, TrainingConfig
from megatron_samoe.config.derived import batch_size_after
from megatron_samoe.optimizer.schedule import rate_of_step
from megatron_samoe.parallel_state import single_process_state
from megatron_samoe.training.setup import build_setup, initial_state
from megatron_samoe.training.train_step import train_step
from tests.harness.tables import table
from tests.harness.tiny import VOCAB_SIZE, micro_batches, tiny_config, with_options

pytestmark = pytest.mark.parity

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler


def scheduler(groups: list[dict[str, Any]], config: OptimizerConfig, decay: int, warmup: int, wsd: int) -> Any:
    """Returns Megatron's, as Megatron-LM makes it; the lengths are samples."""
    rates = (0.0, config.lr, config.min_lr, warmup, decay, config.lr_decay_style)
    decays = (config.weight_decay, config.weight_decay, decay, "constant")
    style = {"wsd_decay_steps": wsd, "lr_wsd_decay_style": "linear"}
    return OptimizerParamScheduler(SimpleNamespace(param_groups=groups), *rates, *decays, **style)


def as_of(theirs: OptimizerParamScheduler, done: int, step: int) -> int:
    """Returns where Megatron's schedule is read for a step: in the warm-up at its end, since ours begins above 0."""
    warmup = theirs.lr_warmup_steps
    return min(done + step, warmup) if done < warmup else done


@pytest.mark.parametrize("unit", ["iters", "samples"])
@pytest.mark.parametrize("style", ["cosine", "linear", "constant", "WSD"])
def test_rates_are_those_of_megatrons_scheduler(style: Any, unit: str) -> None:
    """Also where the decay is shorter or longer than training, and batches are no divisors of any length."""
    draw = random.Random(style + unit)
    for _ in range(40):
        length, decay, batch = draw.randint(17, 90), draw.choice([None, 16, 48, 80, 112]), draw.randint(1, 7)
        until, share = decay or length, draw.randint(0, 15) / 16
        by_share = (share * until).is_integer() and draw.random() < 0.8  # else the two round it differently
        warmup = int(share * until) if by_share else draw.randint(0, 15)
        wsd = draw.randint(1, until - warmup)  # theirs begins to fall a step later where it would have in the warm-up
        lengths: dict[str, Any] = {f"lr_decay_{unit}": decay, f"lr_wsd_decay_{unit}": wsd}
        lengths |= {"lr_warmup_fraction": share} if by_share else {f"lr_warmup_{unit}": warmup}
        config = OptimizerConfig(lr=1e-3, min_lr=draw.choice([0.0, 1e-5, 7e-4]), lr_decay_style=style, **lengths)
        training = TrainingConfig(**{"train_iters" if unit == "iters" else "train_samples": length})
        scale = batch if unit == "iters" else 1
        theirs = scheduler([], config, *(scale * n for n in (until, warmup, wsd)))
        for iteration in range(-(-scale * (length + 40) // batch)):
            theirs.num_steps = as_of(theirs, iteration * batch, batch)
            found = rate_of_step(config, training, iteration, iteration * batch, batch)
            assert found == pytest.approx(theirs.get_lr({}), rel=1e-9, abs=1e-15), (iteration, batch, config)


@settings(deadline=None, max_examples=200)
@given(start=st.integers(1, 9), increment=st.integers(1, 5), increments=st.integers(1, 6), samples=st.integers(1, 120))
def test_batches_grow_as_megatrons(start: int, increment: int, increments: int, samples: int) -> None:
    full = start + increment * increments
    ramp = {"global_batch_size": full, "micro_batch_size": 1, "rampup_batch_size": (start, increment, samples)}
    config = tiny_config(**ramp, train_samples=300)
    theirs = RampupBatchsizeNumMicroBatchesCalculator(full, 1, 1, False, 1, start, increment, samples)
    for consumed in range(samples + 20):
        theirs.update(consumed, consistency_check=True)
        assert batch_size_after(config, 1, consumed) == theirs.get_current_running_global_batch_size(), consumed


@pytest.mark.parametrize(("options", "frozen", "rates", "decays"), table(__file__)["trained"])
def test_a_runs_steps_are_those_of_torch_under_megatrons_scheduler(
    options: dict[str, Any], frozen: str, rates: dict[str, float], decays: dict[str, float]
) -> None:
    """From the gradients of each step: norm and clipping are of what is trained, and AdamW makes the weights of it."""
    schedule = {"lr": 0.02, "min_lr": 0.004, "lr_decay_style": "WSD", "lr_warmup_iters": 2, "lr_wsd_decay_iters": 3}
    other = {"train_iters": 6, "weight_decay": 0.3, "moe_router_lr_mult": 1.0, "clip_grad": 0.05}
    config = with_options(tiny_config("samoe", style="llama", num_layers=2), **schedule | other | options)
    setup = build_setup(config, VOCAB_SIZE, single_process_state())
    named, state, optim = setup.model.global_parameters(), initial_state(setup), config.optimizer

    def factor(name: str, factors: dict[str, float]) -> float:
        return torch.tensor([f for word, f in factors.items() if word in name]).prod().item()

    twins = {n: p.detach().clone().requires_grad_() for n, p in named.items() if not frozen or frozen not in n}
    groups = []
    for name, twin in twins.items():
        decay = 0.0 if twin.dim() == 1 or name.endswith(".combination") else factor(name, decays)
        of_lr = {f"{end}_lr": factor(name, rates) * rate for end, rate in (("max", optim.lr), ("min", optim.min_lr))}
        groups.append({"params": [twin], "wd_mult": decay, **of_lr})
    adamw = torch.optim.AdamW(groups, betas=(optim.adam_beta1, optim.adam_beta2), eps=optim.adam_eps)
    theirs = scheduler(adamw.param_groups, optim, 6 * 8, 2 * 8, 3 * 8)
    begun: dict[str, Tensor] = {name: p.detach().clone() for name, p in named.items()}

    def take_gradients(_: float) -> None:
        for name, twin in twins.items():
            twin.grad = named[name].main_grad.clone()  # type: ignore[attr-defined]

    for iteration in range(6):
        result, state = train_step(setup, state, micro_batches(setup, iteration), pre_optim_step=take_gradients)
        norm = torch.nn.utils.clip_grad_norm_(twins.values(), optim.clip_grad or float("inf"))
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-5)
        theirs.num_steps = as_of(theirs, 8 * iteration, 8)
        theirs.step(0)
        adamw.step()
        for name, p in named.items():
            expected = twins.get(name, begun[name])
            torch.testing.assert_close(
                p, expected, rtol=2e-5, atol=2e-6, msg=lambda m, i=iteration, n=name: f"{i} {n}: {m}"
            )
    for name, twin in twins.items():
        for moment, value in setup.optimizer.moments(name).items():
            torch.testing.assert_close(value, adamw.state[twin][moment], rtol=1e-4, atol=1e-7)
