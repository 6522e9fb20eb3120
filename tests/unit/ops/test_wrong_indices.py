"""What an op cannot take is an error of the op that is given it, forward and backward, and ends no process.

An index that names nothing is refused on a CPU; a CUDA kernel stops at it by an assertion, in the emulation as on a
device. Other arguments are refused before anything runs.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
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
from tests.harness import emulated_cuda
from tests.harness.op_checks import expert_weights
from tests.unit.ops.test_decode import Routing, make_attention, make_experts, make_norm, normal

needs_library = pytest.mark.skipif(not extension.available(), reason="the compiled extension is not built")
FAR = (1 << 40, -(1 << 40), (1 << 63) - 1, -(1 << 63))


def _i(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def _ops() -> Any:
    """Returns the compiled ops, or what is in their place."""
    return torch.ops.megatron_samoe


def _gate_backward(sigmoid: bool, pre_softmax: bool) -> Callable[[Tensor], Any]:
    f = torch.ones
    gradients = f(3, 2), f(1, 4), f(())
    return lambda ids: _ops().topk_gate_backward(
        f(3, 4), f(3), f(3, 2), ids.view(3, 2), *gradients, sigmoid, pre_softmax, 1
    )


def _unpermute_backward(slots: Tensor, rows: Tensor) -> Any:
    f = torch.ones
    return _ops().unpermute_backward(f(2, 2), f(4, 2), f(2, 2), slots, rows.view(2, 2))


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
    "make_permutation": (lambda i: _ops().make_permutation(i.view(2, 2), 3), _i(0, 2, -1, 1), -1, 3),
    "permute": (lambda i: _ops().permute(torch.ones(4, 2), i, 1), _i(3, 0), 0, 4),
    "permute, top-2": (lambda i: _ops().permute(torch.ones(4, 2), i, 2), _i(7, 0), 0, 8),
    "unpermute": (lambda i: _ops().unpermute(torch.ones(4, 2), None, i.view(2, 2)), _i(3, -1, 0, 1), -1, 4),
    "unpermute_backward, rows": (lambda i: _unpermute_backward(_i(0, 1, 2, 3), i), _i(0, 1, 2, -1), -1, 4),
    "unpermute_backward, slots": (lambda i: _unpermute_backward(i, _i(0, 1, 2, 3)), _i(0, 1, 2, 3), 0, 4),
    "decoding, first weights": (lambda i: _experts(i, _i(0, 1)), _i(0, 1), 0, 2),
    "decoding, second weights": (lambda i: _experts(_i(0, 1), i), _i(0, 1), 0, 2),
    "decoding, positions": (lambda i: _attention(Places(i.int(), _ZEROS, _ZEROS[None, :1])), _i(0, 1), 0, 16),
    "decoding, slots": (lambda i: _attention(Places(_i(0, 1).int(), i.int(), _ZEROS[None, :1])), _i(0, 0), 0, 1),
    "decoding, pages": (lambda i: _attention(Places(_i(0, 1).int(), _ZEROS, i.int()[None])), _i(0, 1), 0, 2),
}


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


MOST = (1 << 63) - 1
#: Least and most of each integer of the calls in tests/harness/raw_calls.py, whose tensors have the sizes given there.
#: Of others no number that is tried would do.
TAKEN: dict[str, tuple[int, int]] = {
    "topk_gate topk": (1, 4),
    "topk_gate num_groups": (1, 6),
    "make_permutation num_experts": (1, 1 << 20),
    "permute topk": (1, MOST // 3),
    "cross_entropy_parts first_id": (0, MOST - 20),
    "cross_entropy_backward first_id": (0, MOST - 20),
    "adamw step": (1, MOST),
    "decode_route num_groups": (0, 4),
    "decode_route group_topk": (1, 2),
    "decode_moe_block topk": (1, 2),
    "decode_plan max_logits": (0, MOST),
    "decode_plan_mlp num_groups": (0, 2),
    "decode_plan_mlp group_topk": (1, 1),
    "decode_plan_mlp topk": (1, 2),
    "decode_plan_close plan": (-MOST - 1, MOST),
    "newton_schulz num_steps": (0, 1000),
    "newton_schulz steps_at_once": (1, 1000),
    "set_products fp32_tokens": (-MOST - 1, MOST),
    "set_products bf16_tokens": (-MOST - 1, MOST),
    "build_sample_index seq_length": (1, 4),
    "gather_samples dtype_code": (1, 8),
    "shuffle_legacy position": (0, 624),
    "all_to_all_finish exchange": (-MOST - 1, MOST),
    "all_to_all_close handle": (-MOST - 1, MOST),
    "shm_create rank": (0, 0),
    "shm_create world": (1, 1),
    "shm_create spins": (0, (1 << 31) - 1),
    "shm_stage_rows divisor": (1, MOST // 3),
}


def _raw_calls(*library: Path) -> list[list[str]]:
    """Makes all calls of tests/harness/raw_calls.py in a process, and in another one those after a call that ended it.

    Returns each call: its number, op, what is wrong, its integer, and how it ended.
    """
    lines: list[str] = []
    for _ in range(20):
        command = [sys.executable, "-m", "tests.harness.raw_calls", str(len(lines)), *map(str, library)]
        result = subprocess.run(command, cwd=emulated_cuda.ROOT, capture_output=True, text=True, timeout=300)
        lines += result.stdout.splitlines()
        if result.returncode == 0:
            break
        assert result.returncode < 0, result.stderr
        lines[-1] += f"ended by signal {-result.returncode}"
    return [line.split("\t") for line in lines]


def _check_raw_calls(*library: Path) -> set[str]:
    """Returns the ops that refuse a well-formed call."""
    calls = _raw_calls(*library)
    assert len(calls) > 8_000
    too_much = [call[4] for call in calls if call[2] == "too much for memory"]
    assert all(outcome.startswith("MemoryError") for outcome in too_much)
    bad = [call for call in calls if call[4].startswith(("ended by", "SystemError"))]
    short = [call for call in calls if "alloc" in call[4] and not call[4].startswith("not made")]
    assert bad == [] and len(short) == len(too_much)
    refused = {op for _, op, what, _, outcome in calls if what.endswith("as it should be") and outcome != "returned"}
    for _, op, what, integer, outcome in calls:
        if integer and op not in refused:
            name, _, value = integer.partition("=")
            low, high = TAKEN.get(f"{op} {name}", (0, -1))
            assert (outcome == "returned") == (low <= int(value) <= high), (op, what, outcome)
    return refused


@needs_library
def test_no_argument_ends_a_process_or_fills_memory() -> None:
    refused = _check_raw_calls()
    assert all(op.startswith("nccl_") for op in refused)


@needs_library
@pytest.mark.night
def test_no_argument_of_a_gpus_ops_does(library_file: Path) -> None:
    """By the bindings that share their checks with those of CPUs, and the emulated kernels."""
    assert _check_raw_calls(library_file) == {"decode_route"}, "a GPU chooses by logits alone"
