"""An index that names nothing is an error of the op that takes it, forward and backward, and ends no process.

On a CPU the op refuses it; a CUDA kernel stops by an assertion, in the emulation as on a device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_samoe.ops import decode, extension
from megatron_samoe.ops.asynchronous import taken_for_gpu
from megatron_samoe.ops.decode_parts import Places
from megatron_samoe.ops.grouped_mlp import grouped_mlp
from megatron_samoe.ops.permute import gather_rows, make_permutation
from megatron_samoe.ops.topk_gate import ChoiceRule, described
from tests.harness.op_checks import expert_weights
from tests.unit.ops.test_decode import Routing, make_attention, make_experts, make_norm, normal

needs_library = pytest.mark.skipif(not extension.available(), reason="the compiled extension is not built")
FAR = (1 << 40, -(1 << 40), (1 << 63) - 1, -(1 << 63))


def _i(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def _gate_backward(sigmoid: bool, pre_softmax: bool) -> Callable[[Tensor], Any]:
    f = torch.ones
    return lambda ids: torch.ops.megatron_samoe.topk_gate_backward(
        f(3, 4), f(3), f(3, 2), ids.view(3, 2), f(3, 2), f(1, 4), f(()), sigmoid, pre_softmax, 1
    )


def _attention(places: Places) -> Any:
    layer = make_attention(8, 1, 1, 4, "fp32", "rope", torch.float32, 2)
    return decode.attention_block(normal(1, 2, 8), layer, places, torch.empty(4096))


def _experts(index1: Tensor, index2: Tensor) -> Any:
    stack = replace(make_experts(8, 6, 2, 2, "fp32", True, False), index1_E=index1, index2_E=index2)
    routing = Routing(normal(3, 2, 8), ChoiceRule(2))
    return decode.mlp_block(normal(1, 2, 8), make_norm(8, True, False), routing, stack, torch.empty(4096))


#: Each index of each op: a call, its entries when all is well, and what they lie between.
_ZEROS = _i(0, 0, dtype=torch.int32)
INDICES: dict[str, tuple[Callable[[Tensor], Any], Tensor, int, int]] = {
    **{
        f"topk_gate_backward, sigmoid {s}, pre-softmax {p}": (_gate_backward(s, p), _i(0, 1, 2, 3, 3, 0), 0, 4)
        for s in (False, True)
        for p in (False, True)
    },
    "make_permutation": (lambda i: torch.ops.megatron_samoe.make_permutation(i.view(2, 2), 3), _i(0, 2, -1, 1), -1, 3),
    "permute": (lambda i: torch.ops.megatron_samoe.permute(torch.ones(4, 2), i, 1), _i(3, 0), 0, 4),
    "permute, top-2": (lambda i: torch.ops.megatron_samoe.permute(torch.ones(4, 2), i, 2), _i(7, 0), 0, 8),
    "unpermute": (
        lambda i: torch.ops.megatron_samoe.unpermute(torch.ones(4, 2), None, i.view(2, 2)), _i(3, -1, 0, 1), -1, 4
    ),
    "unpermute_backward, rows": (
        lambda i: torch.ops.megatron_samoe.unpermute_backward(
            torch.ones(2, 2), torch.ones(4, 2), torch.ones(2, 2), _i(0, 1, 2, 3), i.view(2, 2)
        ), _i(0, 1, 2, -1), -1, 4,
    ),
    "unpermute_backward, slots": (
        lambda i: torch.ops.megatron_samoe.unpermute_backward(
            torch.ones(2, 2), torch.ones(4, 2), torch.ones(2, 2), i, _i(0, 1, 2, 3).view(2, 2)
        ), _i(0, 1, 2, 3), 0, 4,
    ),
    "decoding, first weights": (lambda i: _experts(i, _i(0, 1)), _i(0, 1), 0, 2),
    "decoding, second weights": (lambda i: _experts(_i(0, 1), i), _i(0, 1), 0, 2),
    "decoding, positions": (lambda i: _attention(Places(i.int(), _ZEROS, _ZEROS[None, :1])), _i(0, 1), 0, 16),
    "decoding, slots": (lambda i: _attention(Places(_i(0, 1).int(), i.int(), _ZEROS[None, :1])), _i(0, 0), 0, 1),
    "decoding, pages": (lambda i: _attention(Places(_i(0, 1).int(), _ZEROS, i.int()[None])), _i(0, 1), 0, 2),
}  # fmt: skip


def _check(name: str, said: str) -> None:
    call, good, low, end = INDICES[name]
    call(good)
    far = [value if "decoding" not in name or "weights" in name else int(_i(value).int()) for value in FAR]
    for bad in (low - 1, end, *far):
        if low <= bad < end or (bad < 0 and "weights" in name):  # an expert that is left out
            continue
        for place in {0, len(good) - 1}:
            index = good.clone()
            index[place] = bad
            if name == "decoding, pages" and place:
                continue  # a page that no token comes to
            with pytest.raises(RuntimeError, match=said):
                call(index)
    call(good)


@needs_library
@pytest.mark.parametrize("name", INDICES)
def test_a_cpus_op_refuses_it(name: str) -> None:
    _check(name, r"outside|expert| of \d")


@pytest.mark.parametrize("name", [name for name in INDICES if not name.startswith("decoding")])
def test_a_kernel_stops_at_it(name: str, emulated: Any) -> None:
    """Decoding's bindings look at indices themselves where tensors lie on a CPU, so no kernel of theirs meets a wrong one."""
    _check(name, r"a CUDA kernel failed.*device-side assert")


@needs_library
def test_limits_of_a_blend_are_not_negative() -> None:
    short, numbers = torch.zeros(1, dtype=torch.int16), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="limit of dataset 0 is -"):
        torch.ops.megatron_samoe.build_blending_index(torch.ones(1).double(), _i(-(1 << 63)), short, numbers)


@pytest.mark.parametrize("bad", [-2, 3, *FAR])
def test_torchs_ops_of_a_device_stop_at_it(bad: int) -> None:
    """Where no kernel of ours works: what torch asserts on a device it refuses on a CPU."""
    ids_TK, logits_TE = _i(0, bad, 1, -1).view(2, 2), torch.zeros(2, 3)
    with taken_for_gpu("cpu"):
        with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)"):
            make_permutation(ids_TK, 3)
        with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)"):
            described(logits_TE, ids_TK, torch.ones(2, 2), 1)
        with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)"):
            gather_rows(torch.ones(3, 2), _i(0, 1, bad), _i(0, 1, 2))
        make_permutation(ids_TK.clamp(-1, 2), 3), described(logits_TE, ids_TK.clamp(-1, 2), torch.ones(2, 2), 1)


@pytest.mark.parametrize("rows", [[3], [3, 4], [6, -1]])
def test_rows_of_experts_are_all_rows(rows: list[int]) -> None:
    """By the twins' arithmetic too, which has no compiled op for fp64."""
    for dtype in (torch.float32, torch.float64):
        weights = expert_weights(len(rows), 24, 16, "gelu", True, dtype)
        with pytest.raises((ValueError, RuntimeError), match="rows"):
            grouped_mlp(torch.ones(5, 16, dtype=dtype), rows, weights, "gelu")
