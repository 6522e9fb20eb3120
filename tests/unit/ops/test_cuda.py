"""The CUDA ops without a GPU: which tensors go to them, a model's steps by their own sources, emulated, and what is refused."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_samoe.errors import ConfigError
from megatron_samoe.log import _said
from megatron_samoe.ops import extension, schemas
from megatron_samoe.ops.combine import combine_banks
from megatron_samoe.ops.permute import Permutation, gather_rows, permute, unpermute
from megatron_samoe.ops.topk_gate import topk_gate
from megatron_samoe.parallel_state import initialize_model_parallel
from tests.harness import emulated_cuda
from tests.harness.host_waits import as_if_asynchronous
from tests.harness.raw_calls import wrong_values
from tests.harness.tiny import started, steps, tiny_config
from tests.harness.well_formed_calls import CALLS
from tools.benchmarks.gpu_budget import LaunchCounter

needs_library = pytest.mark.skipif(not extension.available(), reason="the compiled extension is not built")


def _train(num_steps: int, **options: Any) -> tuple[list[float], dict[str, Tensor]]:
    """Returns the losses of a tiny model's first steps, and its weights after them."""
    config = tiny_config("samoe", **options)
    setup, state = started(config, parallel=initialize_model_parallel(config.parallel))
    losses = [result.lm_loss for result, _ in steps(setup, state, num_steps)]
    return losses, {name: p.detach().clone() for name, p in setup.model.global_parameters().items()}


@needs_library
@pytest.mark.parametrize(
    "options", [{}, {"style": "llama", "moe_expert_capacity_factor": 0.5}], ids=["gelu", "dropped"]
)
def test_a_models_training_steps(options: dict[str, Any], library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a GPU's algorithms with the kernels, where rows of dropped slots stay; against the CPU's."""
    losses, weights = _train(1, **options)
    monkeypatch.setattr(torch.ops, "megatron_samoe", library)
    trusted = extension.trusting(extension.TRAINING_KERNELS)
    with as_if_asynchronous(), trusted, torch.profiler.profile() as profile:
        emulated_losses, emulated_weights = _train(1, **options)
    seen = {event.key for event in profile.key_averages()}
    wanted = [name for name in emulated_cuda.TRAINING_OPS if options or not name.startswith("swiglu")]
    assert not {f"{emulated_cuda.NAMESPACE}::{name}" for name in wanted} - seen
    assert emulated_losses == pytest.approx(losses, rel=1e-5)
    for name, weight in weights.items():
        # Adam makes a step of up to lr of a gradient that is nearly 0, and so of its rounding.
        torch.testing.assert_close(emulated_weights[name], weight, rtol=1e-4, atol=5e-5)


#: Wrong values of tests/harness/raw_calls.py. Left out are those that make an index name nothing, which a kernel finds later.
KINDS = re.compile(r"as |of (?!0 in|\[)|off|with a dim|without|transposed|(0|-1)$")


def refusal_of(op: Callable[..., Any], arguments: Sequence[Any]) -> str:
    try:
        op(*arguments)
    except RuntimeError as error:
        return str(error)
    return ""


@needs_library
@pytest.mark.parametrize("op", emulated_cuda.TRAINING_OPS)
def test_both_backends_refuse_in_the_same_words(op: str, library: Any) -> None:
    """One argument at a time: a tensor of another kind, size or layout, or an integer below 1."""
    refusals = 0
    for build in CALLS[op]:
        good = build()
        for position, argument in enumerate(good):
            for what, make in wrong_values(argument, ""):
                if KINDS.match(what):
                    arguments = (*good[:position], make(), *good[position + 1 :])
                    ours, theirs = (
                        refusal_of(getattr(ops, op), arguments) for ops in (torch.ops.megatron_samoe, library)
                    )
                    assert ours == theirs, f"argument {position} {what}"
                    refusals += ours != ""
    assert refusals > 10


VARIABLE = extension.CUDA_ENVIRONMENT_VARIABLE


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    """The variable is read again, in the test and after it."""
    extension._asked_for.cache_clear()
    yield
    extension._asked_for.cache_clear()
    extension.trust(())


@needs_library
def test_the_kernels_are_asked_for(
    fresh_choice: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(extension, "has_cuda_kernels", lambda: True)
    assert extension.cuda_kernels_are_chosen() and not extension.cuda_kernels_in_use(), "nobody has compared them"
    extension.trust(["rows", "gate"])
    assert extension.cuda_kernels_in_use() == ["gate", "rows"]
    for value, used in (("0", []), ("1", [*extension.TRAINING_KERNELS, "decoding"])):
        extension._asked_for.cache_clear()
        monkeypatch.setenv(VARIABLE, value)
        assert extension.cuda_kernels_in_use() == used and not extension.cuda_kernels_are_chosen()
    monkeypatch.setattr(extension, "has_cuda_kernels", lambda: False)
    # What earlier tests in this process left at the logger would show a message twice, or write to their output.
    monkeypatch.setattr(logging.getLogger("megatron_samoe"), "handlers", [])
    monkeypatch.setattr(logging.getLogger("megatron_samoe"), "propagate", True)
    _said.clear()
    for _ in range(2):
        extension._asked_for.cache_clear()
        assert not extension.cuda_kernels_in_use()
    assert caplog.text.count(f"{VARIABLE}=1 has no effect") == 1 and "MEGATRON_SAMOE_BUILD=cuda" in caplog.text


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_another_value_is_refused_even_on_a_cpu(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(extension.ENVIRONMENT_VARIABLE, mode)
    monkeypatch.setenv(VARIABLE, "yes")
    with pytest.raises(ConfigError, match=f"{VARIABLE}.*yes.*one of auto, 0, 1"):
        extension.load.__wrapped__()


@needs_library
@pytest.mark.parametrize("used", [False, True])
def test_which_tensors_are_served(used: bool) -> None:
    with FakeTensorMode(), extension.trusting(["gate"] if used else []):
        ours, theirs = torch.empty(3), torch.empty(3, device="cuda")
        other, half = torch.empty(3, device="cuda:1"), torch.empty(3, device="cuda", dtype=torch.half)
        ids, meta = torch.empty(3, device="cuda", dtype=torch.int64), torch.empty(3, device="meta")
        assert extension.serves(ours) and extension.serves(ours, cuda="gate")
        assert extension.serves(theirs, None, ids, cuda="gate") == used
        assert not extension.serves(theirs, ids), "an op without a CUDA kernel"
        assert not extension.serves(theirs, cuda="rows"), "a kernel that is not trusted"
        assert not any(extension.serves(theirs, t, cuda="gate") for t in (ours, other, half, meta))
        assert not extension.serves(meta, cuda="gate")


@needs_library
def test_cuda_tensors_reach_the_ops() -> None:
    """Each op is called as the compiled one; results have its shapes, on the device."""
    trusted = extension.trusting(extension.TRAINING_KERNELS)
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad(), trusted:
        x_TH, index_R = torch.empty(6, 4), torch.empty(12, dtype=torch.int64)
        counts_E, ends_E = (torch.empty(3, dtype=dtype) for dtype in (torch.int64, torch.int32))
        permutation = Permutation(index_R, index_R.view(6, 2), counts_E, ends_E)
        with LaunchCounter() as counter:
            gate = topk_gate(torch.empty(6, 3), 2)
            rows_NH = permute(x_TH, permutation)
            y_NH = gather_rows(rows_NH, index_R, index_R)
            results = [
                *(gate.probs_TK, gate.ids_TK, rows_NH, y_NH),
                unpermute(y_NH, gate.probs_TK, permutation),
                combine_banks(torch.empty(2, 1, 3), torch.empty(3, 1, 7)),
            ]
    assert all(t.device.type == "cuda" for t in results)
    assert results[4].shape == (6, 4)
    ops = [row["op"] for row in counter.rows if row["op"] in schemas.SCHEMAS]
    assert ops == ["topk_gate", "permute", "permute", "unpermute", "combine_banks"]
