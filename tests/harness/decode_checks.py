"""Inference's ops against their twins, on any device. The twins run on the CPU."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_samoe.ops import decode, decode_reference
from megatron_samoe.ops.decode import Routed, stored
from megatron_samoe.ops.decode_parts import PAGE, AttentionLayer, ExpertStack, Places, Routing, Weight
from megatron_samoe.ops.topk_gate import ChoiceRule
from tests.unit.ops.test_decode import make_attention, make_experts, make_norm, normal

Device = torch.device | str
TOLERANCE = {"rtol": 5e-5, "atol": 5e-5}
T = TypeVar("T")


def moved(value: T, device: Device) -> T:
    """Returns a copy of a value, its tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    if isinstance(value, tuple):
        return tuple(moved(part, device) for part in value)  # type: ignore[return-value]
    if hasattr(value, "__dataclass_fields__"):
        parts: dict[str, Any] = {f.name: moved(getattr(value, f.name), device) for f in fields(value)}  # type: ignore[arg-type]
        return replace(value, **parts)  # type: ignore[type-var]
    return value


def check_linear(tokens: int, inputs: int, outputs: int, kind: str, device: Device = "cpu") -> None:
    """Compares a product, alone and added; and each token's bits alone and among others."""
    weight, bias, x_TK = stored(normal(1, outputs, inputs), kind), normal(2, outputs), normal(3, tokens, inputs)
    before_TN, (x, w, b) = normal(4, tokens, outputs), moved((x_TK, weight, bias), device)
    exact = x_TK.double() @ weight.dequantized().double().t()
    tolerance = {"rtol": 2e-5, "atol": 2e-5 * max(inputs, 1) ** 0.5}
    out_TN = decode.linear(x, w, None, before_TN.to(device, copy=True))
    torch.testing.assert_close(out_TN.cpu(), exact.float(), **tolerance)
    added = decode.linear(x, w, b, before_TN.to(device, copy=True), accumulate=True)
    torch.testing.assert_close(added.cpu(), (exact + bias + before_TN).float(), **tolerance)
    for t in range(0, tokens, 5):
        alone = decode.linear(x[t : t + 1], w, None, torch.empty(1, outputs, device=device))
        assert torch.equal(alone[0], out_TN[t])


def check_norm(tokens: int, hidden: int, rms: bool, device: Device = "cpu") -> None:
    """Compares a norm."""
    x_TH, parameters = normal(1, tokens, hidden) + 3, make_norm(hidden, rms, not rms)
    expected = decode_reference.norm(x_TH, parameters)
    x, p = moved((x_TH, parameters), device)
    torch.testing.assert_close(decode.norm(x, p, torch.empty_like(x)).cpu(), expected, **TOLERANCE)


def _attention_twin(x_TH: Tensor, layer: AttentionLayer, p: Places) -> Tensor:
    return x_TH + decode_reference.linear(decode_reference.attention(x_TH, layer, p), layer.output, layer.output_bias)


def check_attention(
    groups: int, queries: int, head_dim: int, kind: str, style: str, length: int, device: Device = "cpu"
) -> None:
    """Compares attention over two sequences: prompts, tokens, and parts; `style` as for make_attention."""
    hidden, cache = 48, torch.float32 if kind == "fp32" else torch.bfloat16
    per_slot = -(-(length + 2) // PAGE)
    pages = torch.randperm(2 * per_slot, generator=torch.Generator().manual_seed(1)).view(2, per_slot).int()
    angles = normal(11, per_slot * PAGE, head_dim // 4 * 2)
    tables = (angles.cos(), angles.sin()) if style == "rope" else (None, None)
    slow = make_attention(hidden, groups, queries, head_dim, kind, style, cache, 2 * per_slot)
    fast = moved(slow, device)
    room = decode.attention_scratch(length + 6, fast)
    steps = [
        ([*range(length), *range(5)], [0] * length + [1] * 5),
        ([length, 5], [0, 1]),
        ([length + 1, *range(6, 9)], [0, 1, 1, 1]),
    ]
    for number, (positions, slots) in enumerate(steps):
        places = Places(*(torch.tensor(v, dtype=torch.int32) for v in (positions, slots)), pages, *tables)
        x_TH = normal(20 + number, len(positions), hidden)
        expected = _attention_twin(x_TH, slow, places)
        got = []
        # With scratch for the step alone, and with room beside it for long sequences in parts: the same bits.
        for scratch in (decode.attention_scratch(len(positions), fast), 4 * room):
            x = x_TH.to(device, copy=True)
            decode.attention_block(x, fast, moved(places, device), torch.empty(scratch, device=device))
            got.append(x)
        assert torch.equal(got[0], got[1])
        rounding = TOLERANCE if kind == "fp32" else {"rtol": 2e-2, "atol": 5e-3}
        torch.testing.assert_close(got[0].cpu(), expected, **rounding)
        torch.testing.assert_close(fast.keys.cpu().float(), slow.keys.float(), rtol=1e-2, atol=1e-4)
        torch.testing.assert_close(fast.values.cpu().float(), slow.values.float(), rtol=1e-2, atol=1e-4)


def _experts_twin(x_TH: Tensor, ids_TK: Tensor, probs_TK: Tensor, e: ExpertStack, y_TKH: Tensor) -> Tensor:
    decode_reference.experts(x_TH, ids_TK, e, y_TKH)
    return (y_TKH * probs_TK[..., None]).sum(1)


def check_mlp(
    tokens: int,
    experts: int,
    topk: int,
    kind: str,
    gated: bool,
    device: Device = "cpu",
    hidden: int = 36,
    ffn: int = 52,
) -> None:
    """Compares a block of experts, or of one without a router for topk 0; whole, in two parts, and token by token."""
    stack = make_experts(hidden, ffn, experts + 2, experts, kind, gated, bias=not gated)
    rule = ChoiceRule(topk, "softmax" if gated else "sigmoid", gated)
    routing = Routing(normal(12, experts, hidden), rule) if topk else None
    x_TH, parameters = normal(13, tokens, hidden), make_norm(hidden, gated, not gated)
    on_device = moved((stack, parameters, routing), device)
    scratch = torch.empty(decode.mlp_scratch(tokens, hidden, ffn, max(topk, 1), experts), device=device)
    whole = x_TH.to(device, copy=True)
    decode.mlp_block(whole, on_device[1], on_device[2], on_device[0], scratch)

    normed_TH = decode_reference.norm(x_TH, parameters)
    ids_TK, probs_TK = torch.zeros(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1)
    if routing is not None:
        ids_TK, probs_TK, _ = decode_reference.choose(normed_TH, routing)
    expected = x_TH + _experts_twin(normed_TH, ids_TK, probs_TK, stack, torch.empty(*ids_TK.shape, hidden))
    torch.testing.assert_close(whole.cpu(), expected, **TOLERANCE)

    routed = moved(Routed(torch.empty(tokens, hidden), torch.empty_like(ids_TK), torch.empty_like(probs_TK)), device)
    x = x_TH.to(device, copy=True)
    decode.route(x, on_device[1], on_device[2], routed, scratch)
    assert torch.equal(routed.ids_TK.cpu(), ids_TK)
    torch.testing.assert_close(routed.probs_TK.cpu(), probs_TK, **TOLERANCE)
    y_TKH = torch.empty(*ids_TK.shape, hidden, device=device)
    first_E = torch.arange(experts) % 2 == 0
    for last, kept_E in ((False, first_E), (True, ~first_E)):
        part = [torch.where(kept_E, index_E, -1).to(device) for index_E in (stack.index1_E, stack.index2_E)]
        some = replace(on_device[0], index1_E=part[0], index2_E=part[1])
        decode.experts_block(routed, some, y_TKH, x, scratch, combine=last)
    assert torch.equal(x, whole)

    for t in range(0, tokens, 6):
        alone = x_TH[t : t + 1].to(device, copy=True)
        decode.mlp_block(alone, on_device[1], on_device[2], on_device[0], scratch)
        assert torch.equal(alone[0], whole[t])


def check_combine_rows(rows: int, cols: int, kind: str, coefficients: list[float], device: Device = "cpu") -> None:
    """Compares a weighted sum of matrices; a coefficient of 0 leaves its bank unread."""
    banks = [stored(normal(seed, rows, cols), kind) for seed in range(len(coefficients))]
    out = moved(Weight(torch.empty_like(banks[0].data), None if kind != "int8" else torch.empty(rows)), device)
    exact = sum(bank.dequantized() * c for bank, c in zip(banks, coefficients, strict=True) if c != 0.0)
    exact = exact if isinstance(exact, Tensor) else torch.zeros(rows, cols)
    for bank, c in zip(banks, coefficients, strict=True):
        if c == 0.0 and kind != "int8":
            bank.data.fill_(torch.nan)
    decode.combine_rows(list(moved(tuple(banks), device)), torch.tensor(coefficients, device=device), out)
    if kind == "int8":
        assert out.scale is not None
        error = (out.dequantized().cpu() - exact).abs()
        assert (error <= out.scale.cpu()[:, None] * 0.501 + 1e-6).all()
    else:
        tolerance = 1e-6 if kind == "fp32" else 8e-3
        torch.testing.assert_close(out.data.cpu(), exact.to(out.data.dtype), rtol=tolerance, atol=1e-6)
