"""The CUDA ops without a GPU: the bindings' and kernels' own sources on CPU tensors, emulated, against the slow twins."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_samoe.ops import extension, reference
from megatron_samoe.ops.combine import combine_banks, combine_banks_backward
from megatron_samoe.ops.permute import gather_rows, invert_index
from megatron_samoe.parallel_state import initialize_model_parallel
from megatron_samoe.runtime import reference_checks
from megatron_samoe.training.setup import build_setup, initial_state
from megatron_samoe.training.train_step import train_step
from tests.harness import emulated_cuda
from tests.harness.host_waits import as_if_asynchronous
from tests.harness.raw_calls import wrong_values
from tests.harness.tiny import VOCAB_SIZE, micro_batches, tiny_config
from tests.harness.well_formed_calls import CALLS

needs_library = pytest.mark.skipif(not extension.available(), reason="the compiled extension is not built")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("pre_softmax", [False, True])
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_gate(score_function: str, pre_softmax: bool, emulated: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    for num_tokens, topk, num_experts, num_groups in ((0, 2, 8, 1), (1, 1, 5, 1), (7, 8, 33, 7), (66, 2, 64, 3)):
        logits_TE = torch.randn(num_tokens, num_experts, generator=generator) * 3
        reference_checks.check_gate(logits_TE, topk, score_function, pre_softmax, num_groups)
        reference_checks.check_gate(
            logits_TE.round(), topk, score_function, pre_softmax, num_groups
        )  # ties are the rule


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("drop", [False, True])
def test_permutation_and_rows(drop: bool, dtype: torch.dtype, emulated: Any) -> None:
    for num_tokens, topk, num_experts, hidden in ((0, 2, 8, 17), (1, 1, 4, 1), (7, 8, 9, 100), (513, 2, 64, 64)):
        ids_TK = reference_checks.random_ids(num_tokens, topk, num_experts, drop, num_tokens)
        reference_checks.check_rows(ids_TK, num_experts, hidden, dtype)
    for expert in (0, 3, -1):
        reference_checks.check_rows(torch.full((50, 1), expert), 4, 32, dtype)
    x_RH, index_R = torch.randn(37, 12).to(dtype).requires_grad_(), torch.randperm(37)
    y_RH = gather_rows(x_RH, index_R, invert_index(index_R))
    assert torch.equal(y_RH, x_RH[index_R])
    dy_RH = torch.randn(37, 12).to(dtype)
    assert torch.equal(torch.autograd.grad(y_RH, x_RH, dy_RH)[0][index_R], dy_RH)


def test_combination(emulated: Any) -> None:
    for shape in ((1, 1, 1, 0), (12, 1, 4, 257), (3, 2, 8, 1024), (1, 2, 19, 7), (20, 1, 2, 4100)):
        reference_checks.check_combine(*reference_checks.combine_inputs(*shape))
    # Banks, results and gradients in larger tensors.
    coefficients_LGP, banks_PGN, dW_LGN = reference_checks.combine_inputs(3, 4, 5, 48)
    wide_banks, wide_gradient, out_GLN = torch.zeros(5, 4, 100), torch.zeros(5, 4, 100), torch.zeros(4, 3, 48)
    for start in (20, 21):
        wide_banks[:, :, start : start + 48] = banks_PGN
        banks, gradient = wide_banks[:, :, start : start + 48], wide_gradient.zero_()[:, :, start : start + 48]
        combine_banks(coefficients_LGP, banks, out_LGN=out_GLN.transpose(0, 1))
        expected = reference.combine_banks(coefficients_LGP, banks_PGN, torch.float32)
        torch.testing.assert_close(out_GLN.transpose(0, 1), expected, rtol=1e-5, atol=1e-5)
        strided_dW = dW_LGN.transpose(0, 1).contiguous().transpose(0, 1)
        dcoefficients = combine_banks_backward(coefficients_LGP, banks, strided_dW, gradient)
        dbanks, expected = reference.combine_banks_backward(coefficients_LGP, banks_PGN, dW_LGN)
        torch.testing.assert_close(dcoefficients, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(gradient, dbanks, rtol=1e-5, atol=1e-5)
        assert wide_gradient[:, :, :start].abs().sum() == 0 and wide_gradient[:, :, start + 48 :].abs().sum() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu(dtype: torch.dtype, emulated: Any) -> None:
    for num_rows, width in ((0, 5), (1, 1), (7, 24), (33, 256), (9, 77)):
        reference_checks.check_swiglu(num_rows, width, dtype)


def _train(num_steps: int, **options: Any) -> tuple[list[float], dict[str, Tensor]]:
    """Returns the losses of a tiny model's first steps, and its weights after them."""
    config = tiny_config("samoe", **options)
    setup = build_setup(config, VOCAB_SIZE, initialize_model_parallel(config.parallel))
    state, losses = initial_state(setup), []
    for step in range(num_steps):
        result, state = train_step(setup, state, micro_batches(setup, step))
        losses.append(result.lm_loss)
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


def _said(op: Callable[..., Any], arguments: Sequence[Any]) -> str:
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
                    ours, theirs = (_said(getattr(ops, op), arguments) for ops in (torch.ops.megatron_samoe, library))
                    assert ours == theirs, f"argument {position} {what}"
                    refusals += ours != ""
    assert refusals > 10
