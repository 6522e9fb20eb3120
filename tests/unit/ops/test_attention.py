"""Attention by blocks, by documents and by pieces against its reference, which computes the whole square: results and all gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_samoe.ops import attention as blocks
from megatron_samoe.ops import document_attention as document_blocks
from megatron_samoe.ops import reference
from megatron_samoe.ops.attention import ScoreRule, attention, band
from megatron_samoe.ops.attention_pieces import attention_piece, attention_piece_backward, merge
from megatron_samoe.ops.document_attention import Documents, document_attention
from tests.harness.live_memory import LiveMemory

B, A, D = 2, 4, 6
SINKS = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64)
RULES = {
    "plain": ScoreRule(),
    "window 1": ScoreRule(window=1),
    "window": ScoreRule(window=5),
    "wide window": ScoreRule(window=100),
    "cap": ScoreRule(softcap=0.7),
    "sinks": ScoreRule(sinks_A=SINKS),
    "scale": ScoreRule(scale=0.7),
    "all": ScoreRule(window=7, softcap=2.0, sinks_A=SINKS, scale=0.3),
}


def ids_of(rows: list[list[int]]) -> Tensor:
    return torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows])


def drawn(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def rule_and_inputs(rule: str, queries: int, keys: int, groups: int) -> tuple[ScoreRule, list[Tensor]]:
    """Returns a rule, and all that has gradients: queries, keys, values, and its sinks."""
    inputs = [drawn(B, A, queries, D, seed=1), drawn(B, groups, keys, D, seed=2), drawn(B, groups, keys, D, seed=3)]
    sinks = RULES[rule].sinks_A
    if sinks is None:
        return RULES[rule], inputs
    inputs.append(sinks.clone().requires_grad_())
    return replace(RULES[rule], sinks_A=inputs[-1]), inputs


def assert_same(y: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    """Compares results and the gradients of all inputs."""
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    dy = drawn(*y.shape, seed=4).detach()
    for got, right in zip(*(torch.autograd.grad(t, inputs, dy) for t in (y, expected)), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("block", [3, 8, 512])
@pytest.mark.parametrize(("queries", "keys"), [(17, 17), (1, 17), (6, 17), (1, 1)])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("rule", RULES)
def test_blocks_equal_the_whole_square(
    rule: str, groups: int, queries: int, keys: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK", block)
    chosen, asked = rule_and_inputs(rule, queries, keys, groups)
    assert_same(attention(*asked[:3], chosen), reference.attention(*asked[:3], chosen), asked)


@pytest.mark.parametrize("rule", RULES)
def test_a_mask_keeps_documents_apart(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 4)
    ids = ids_of([[2, 4, 5], [7, 1, 1, 2]])
    mask = (ids[:, :, None] == ids[:, None, :])[:, None] & band(11, 11, None, torch.device("cpu"))
    chosen, asked = rule_and_inputs(rule, 11, 11, 2)
    assert_same(attention(*asked[:3], chosen, mask), reference.attention(*asked[:3], chosen, mask), asked)


@pytest.mark.parametrize("rule", ["window", "cap", "all"])
def test_no_tensor_is_a_sequence_squared(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    length = 1024
    monkeypatch.setattr(blocks, "BLOCK", 64)
    q, k, v = (torch.randn(1, 1, length, 8, requires_grad=True) for _ in range(3))
    chosen = RULES[rule] if RULES[rule].sinks_A is None else ScoreRule(RULES[rule].window, 2.0, torch.zeros(1))
    with LiveMemory("cpu") as memory:
        attention(q, k, v, chosen).sum().backward()
    assert memory.largest_elements < length * length / 8


@pytest.mark.parametrize("rule", [ScoreRule(), ScoreRule(window=300)])
def test_no_tensor_of_documents_is_a_sequence_squared(rule: str) -> None:
    q, k, v = (torch.randn(1, 1, 6144, 4, requires_grad=True) for _ in range(3))
    documents = Documents(ids_of([[4000, *[16] * 100, 144, 400]]))
    with LiveMemory("cpu") as seen:
        document_attention(q, k, v, rule, documents).sum().backward()
    # Of a block of queries with the keys of its window at most; the square has 37 million.
    assert seen.largest_elements <= 2 * document_blocks.BLOCK * (document_blocks.BLOCK + 300)


def test_half_precision_scores_are_computed_in_fp32() -> None:
    q, k, v = (drawn(1, 2, 9, 8, seed=i).detach().bfloat16() for i in range(3))
    rule = ScoreRule(softcap=1.0, sinks_A=torch.zeros(2))
    y = attention(q, k, v, rule)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(
        y.double(), reference.attention(q.double(), k.double(), v.double(), rule), rtol=0.02, atol=0.02
    )


ROWS = {
    "one each": [[24], [24]],
    "cut alike": [[5, 3, 16], [5, 3, 16]],
    "unlike": [[1] * 24, [20, 4]],
    "short and long": [[2, 2, 12, 3, 5], [24]],
}


@pytest.mark.parametrize("block", [1, 8, 100])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("rule", ["plain", "window", "all"])
def test_pieces_are_the_twin_with_all_gradients(
    block: int, rows: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document_blocks, "BLOCK", block)
    chosen, asked = rule_and_inputs(rule, 24, 24, 2)
    documents = Documents(ids_of(ROWS[rows]))
    y = document_attention(*asked[:3], chosen, documents)
    assert_same(y, reference.attention(*asked[:3], chosen, documents.mask()), asked)


def test_lengths_and_ends() -> None:
    documents = Documents(ids_of([[3, 1, 2], [6]]))
    assert documents.lengths == ((3, 1, 2), (6,))
    ends, longest = documents.ends
    assert ends.tolist() == [0, 3, 4, 6, 12] and ends.dtype == torch.int32 and longest == 6


SCALE = 0.3


def piece_inputs(dtype: torch.dtype, queries: int = 10, keys: int = 10, groups: int = 2) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 4, queries, 6), (2, groups, keys, 6), (2, groups, keys, 6), (2, 4, queries, 6))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("keys", "is_causal"), [(10, True), (10, False), (7, False), (16, False)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_a_piece_is_its_twin_with_all_gradients(
    groups: int, keys: int, is_causal: bool, dtype: torch.dtype, tolerance: float
) -> None:
    q, k, v, dy = piece_inputs(dtype, keys=keys, groups=groups)
    y, lse = attention_piece(q, k, v, is_causal, SCALE)
    wide = [t.double() for t in (q, k, v)]
    y_twin, lse_twin = reference.attention_piece(*wide, is_causal, SCALE)
    torch.testing.assert_close(y.double(), y_twin, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), lse_twin, rtol=max(tolerance, 1e-6), atol=max(tolerance, 1e-6))
    # More keys elsewhere have raised the sum of the whole.
    raised = lse + 0.5
    found = attention_piece_backward(dy, q, k, v, y, raised, is_causal, SCALE)
    expected = reference.attention_piece_backward(dy.double(), *wide, y.double(), raised.double(), is_causal, SCALE)
    for got, right in zip(found, expected, strict=True):
        assert got.dtype == dtype and got.shape == right.shape
        torch.testing.assert_close(got.double(), right, rtol=10 * tolerance, atol=10 * tolerance)


def test_the_twin_is_attention_and_its_gradients_are_autograds() -> None:
    q, k, v, dy = piece_inputs(torch.float64)
    wanted = [t.requires_grad_() for t in (q, k, v)]
    whole = reference.attention(q, k, v, ScoreRule(scale=SCALE))
    y, lse = reference.attention_piece(q, k, v, True, SCALE)
    torch.testing.assert_close(y, whole, rtol=1e-12, atol=1e-12)
    found = reference.attention_piece_backward(dy, q, k, v, y, lse, True, SCALE)
    for got, right in zip(found, torch.autograd.grad(whole, wanted, dy), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("offset", [0.0, 200.0, -200.0])
def test_pieces_add_up(offset: float) -> None:
    q, k, v, _ = piece_inputs(torch.float64, keys=12)
    k[:, :, 5:] += offset  # where one piece has all the weight nothing overflows
    y, lse = reference.attention_piece(q, k[:, :, :5], v[:, :, :5], False, SCALE)
    merge(y, lse, *reference.attention_piece(q, k[:, :, 5:], v[:, :, 5:], False, SCALE))
    whole, whole_lse = reference.attention_piece(q, k, v, False, SCALE)
    torch.testing.assert_close(y, whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-12, atol=1e-12)
