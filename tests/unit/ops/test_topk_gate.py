from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_samoe.ops import extension, reference
from megatron_samoe.ops.topk_gate import expert_choice, threshold_gate, topk_gate
from megatron_samoe.runtime.reference_checks import check_gate
from tests.harness.devices import CPU, EMULATED, GPU, on
from tests.harness.op_checks import threads_of_torch
from tests.harness.tables import table

TABLE = table(__file__)

FLAVOURS = list(itertools.product(("softmax", "sigmoid"), (False, True)))


@on(CPU, EMULATED, GPU)
@pytest.mark.parametrize("score_function, pre_softmax", FLAVOURS)
@pytest.mark.parametrize("num_tokens, topk, num_experts, num_sequences", TABLE["sizes"])
def test_equals_the_reference(device, num_tokens, topk, num_experts, num_sequences, score_function, pre_softmax):
    logits_TE = torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(num_tokens + topk)) * 3
    for logits in (logits_TE, logits_TE.round()):  # of which many are equal
        check_gate(logits, topk, score_function, pre_softmax, num_sequences, device)


@given(
    num_sequences=st.integers(1, 5),
    group_tokens=st.integers(0, 70),
    num_experts=st.integers(1, 70),
    topk=st.integers(1, 9),
    flavour=st.sampled_from(FLAVOURS),
    coarse=st.booleans(),
    has_key=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=60)
def test_equals_the_twin_for_any_shape_and_ties(
    num_sequences, group_tokens, num_experts, topk, flavour, coarse, has_key, seed
):
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(num_sequences * group_tokens, num_experts, generator=generator)
    if coarse:  # few distinct values, so that ties are the rule
        logits_TE = torch.round(logits_TE)
    key_TE = torch.round(2 * torch.randn(logits_TE.shape, generator=generator)) if has_key else None
    if has_key and num_experts > 2:
        key_TE[:, 2] = -torch.inf  # outside the groups that a token may use
    check_gate(logits_TE, min(topk, num_experts), *flavour, num_sequences, key_TE=key_TE)


def test_weights_of_a_choice_by_another_key_do_not_vanish():
    """The chosen experts' exponentials are nothing beside the largest logit's."""
    logits_TE, key_TE = torch.tensor([[200.0, 0.0, 1.0, -1.0]]), torch.tensor([[0.0, 3.0, 2.0, 1.0]])
    result = topk_gate(logits_TE, 2, key_TE=key_TE)
    assert result.ids_TK.tolist() == [[1, 2]]
    torch.testing.assert_close(result.probs_TK, torch.tensor([[0.0, 1.0]]).softmax(-1))
    with pytest.raises(ValueError, match="key_TE must be as logits_TE"):
        topk_gate(logits_TE, 2, key_TE=key_TE[:, :3])


def test_ties_go_to_the_lowest_expert():
    logits_TE = torch.tensor([[0.0, 1.0, 1.0, -0.0, 1.0], [0.0, -0.0, 0.0, -0.0, 0.0]])
    assert topk_gate(logits_TE, 3).ids_TK.tolist() == [[1, 2, 4], [0, 1, 2]]


@pytest.mark.parametrize("score_function, pre_softmax", FLAVOURS)
def test_masked_experts_and_large_logits(score_function, pre_softmax):
    logits_TE = torch.tensor([[-torch.inf, 90.0, -90.0, 0.0], [-torch.inf, -torch.inf, 2.0, 1.0]])
    _ = topk_gate(logits_TE, 2, score_function, pre_softmax)
    assert _.ids_TK.tolist() == [[1, 3], [2, 3]]
    assert torch.isfinite(_.probs_TK).all() and torch.isfinite(_.score_sum_GE).all()
    expected = reference.topk_gate(logits_TE.double(), 2, score_function == "sigmoid", pre_softmax, 1)
    torch.testing.assert_close(_.probs_TK.double(), expected[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("has_key", [False, True])
@pytest.mark.parametrize("pre_softmax", [False, True])
def test_sigmoid_scores_of_low_logits_keep_their_proportions(pre_softmax, has_key):
    """The scores of whole rows, or of all that a bias makes chosen, are less than the smallest number."""
    logits_TE = torch.randn(33, 9, generator=torch.Generator().manual_seed(4)) * 2
    logits_TE[:11] -= 120.0
    logits_TE[11:22] -= 300.0
    key_TE = None
    if has_key:
        logits_TE[22:, 3:] -= 150.0
        key_TE = logits_TE.clone()
        key_TE[:, :3] = -torch.inf
    check_gate(logits_TE, 2, "sigmoid", pre_softmax, 3, key_TE=key_TE)
    logits_TE.requires_grad_()
    gate = topk_gate(logits_TE, 2, "sigmoid", pre_softmax, 3, key_TE)
    weights_TK = torch.linspace(-1.0, 1.0, 66).view(33, 2)
    (gradient,) = torch.autograd.grad((gate.probs_TK * weights_TK).sum() + gate.score_sum_GE[:, 0].sum(), logits_TE)
    assert torch.isfinite(gradient).all()
    if not pre_softmax:
        torch.testing.assert_close(gate.probs_TK.sum(1), torch.ones(33))
        chosen_TK = logits_TE.detach().gather(1, gate.ids_TK)[:22].softmax(1)
        torch.testing.assert_close(gate.probs_TK[:22], chosen_TK, rtol=1e-4, atol=1e-6)
        assert (gradient[:22].abs().sum(1) > 1e-3).all(), "routers of low logits learn nothing"


@pytest.mark.parametrize("score_function, pre_softmax", FLAVOURS)
def test_nan_logits_are_seen_and_do_no_harm(score_function, pre_softmax):
    logits_TE = torch.zeros(5, 6)
    logits_TE[1, 3] = torch.nan
    logits_TE[2] = torch.nan
    logits_TE.requires_grad_()
    result = topk_gate(logits_TE, 2, score_function, pre_softmax)
    assert result.ids_TK[1].tolist() == [3, 0] and result.ids_TK[2].tolist() == [0, 1]
    assert result.probs_TK[1].isnan().any() and result.z_sum.isnan()
    assert not result.probs_TK[0].isnan().any()
    result.probs_TK.sum().backward()
    assert not logits_TE.grad[0].isnan().any()


def test_only_some_outputs_have_gradients():
    logits_TE = torch.randn(9, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    for select in (lambda r: r.probs_TK.sum(), lambda r: r.score_sum_GE[0, 1], lambda r: r.z_sum):
        result = topk_gate(logits_TE, 2)
        gradient = torch.autograd.grad(select(result), logits_TE)[0]
        twin = reference.topk_gate(logits_TE, 2, False, False, 1)
        expected = torch.autograd.grad(select(type(result)(*twin)), logits_TE)[0]
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


def test_the_result_does_not_depend_on_threads():
    logits_TE = torch.randn(4096, 64, generator=torch.Generator().manual_seed(1))
    results = []
    for threads in (1, 2, 3):
        with threads_of_torch(threads):
            results.append(topk_gate(logits_TE, 2, num_sequences=4))
    for result in results[1:]:
        assert torch.equal(result.score_sum_GE, results[0].score_sum_GE) or not extension.available()
        assert torch.equal(result.probs_TK, results[0].probs_TK)


@pytest.mark.parametrize("arguments, message", TABLE["refused"])
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        topk_gate(torch.zeros(4, 8), **arguments)


def test_experts_whose_logits_are_positive():
    logits_TE = torch.tensor([[1.0, -1.0, 0.5], [-1.0, -2.0, -3.0]], requires_grad=True)
    gate = threshold_gate(logits_TE, 1, torch.tensor([2.0]))
    assert gate.ids_TK.tolist() == [[0, -1, 2], [-1, -1, -1]]
    assert gate.probs_TK.tolist() == [[1.0, 0.0, 0.5], [0.0, 0.0, 0.0]]
    assert gate.counts_GE.tolist() == [[1, 0, 1]] and gate.score_sum_GE.tolist() == [[2.0, 0.0, 1.0]]
    gate.probs_TK.sum().backward()
    assert logits_TE.grad.tolist() == [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]


def test_experts_choose_the_tokens_that_score_them_highest():
    logits_TE = torch.randn(12, 4, dtype=torch.float64)
    gate = expert_choice(logits_TE, 2, 2)
    scores_GTE = logits_TE.softmax(-1).view(2, 6, 4)
    for g, e in itertools.product(range(2), range(4)):
        best = set(scores_GTE[g, :, e].topk(3).indices.tolist())
        taken = {t for t in range(6) if e in gate.ids_TK[6 * g + t].tolist()}
        assert taken == best
    assert (gate.counts_GE == 3).all()
    chosen = gate.ids_TK >= 0
    torch.testing.assert_close(gate.probs_TK, logits_TE.softmax(-1) * chosen)
