"""What an op cannot take is an error of the op that is given it, forward and backward, and ends no process; and torch's own checks of what
ops say of themselves (schema, aliasing, shapes without storage), on real arguments.

An index that names nothing is refused on a CPU; a CUDA kernel stops at it by an assertion, in the emulation as on a
device. Other arguments are refused before anything runs.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_samoe.ops import extension, schemas
from megatron_samoe.ops.asynchronous import taken_for_gpu
from megatron_samoe.ops.combine import combine_banks, combine_banks_backward
from megatron_samoe.ops.cross_entropy import cross_entropy_parts
from megatron_samoe.ops.grouped_mlp import grouped_mlp
from megatron_samoe.ops.kl_divergence import kl_divergence_terms
from megatron_samoe.ops.permute import gather_rows, make_permutation, permute, unpermute
from megatron_samoe.ops.topk_gate import described
from megatron_samoe.parallel_state.state import Group
from megatron_samoe.row_exchange import all_to_all
from megatron_samoe.row_exchange.all_to_all import all_to_all_rows
from megatron_samoe.runtime.reference_checks import combine_inputs
from tests.harness import emulated_cuda
from tests.harness.op_checks import expert_weights
from tests.harness.tables import table
from tests.harness.well_formed_calls import CALLS

needs_library = pytest.mark.skipif(not extension.available(), reason="the compiled extension is not built")
FAR = (1 << 40, -(1 << 40), (1 << 63) - 1, -(1 << 63))


def _i(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


TABLE = table(__file__)
#: Least index and the end of indices, by op and argument; least and most of integers.
INDICES: dict[str, tuple[int, int]] = TABLE["indices"]
TAKEN: dict[str, tuple[int, int]] = TABLE["integers"]
#: What may be changed of single arguments, by op and number of the well-formed call; and what a line of raw calls changes of one.
ACCEPTED: dict[str, dict[str, tuple[str, ...]]] = TABLE["accepted"]
CHANGED = re.compile(
    r"way (?P<way>\d+): (?P<argument>\w+) (?:last )?(?:as (?:torch\.)?(?P<type>\w+)|of \d+ in (?P<dim>dim \d)|"
    r"(?P<gaps>of every second element|transposed in .*)|(?P<none>None)|(?P<empty>without elements))"
)


def _check(name: str, ops: Any, said: str) -> None:
    (op, argument), (low, end) = name.split(), INDICES[name]
    names = [a.name for a in getattr(torch.ops.megatron_samoe, op).default._schema.arguments]
    call = getattr(ops, op)
    for build in CALLS[op]:
        call(*build())
        arguments = build()
        index = arguments[names.index(argument)]
        holds = torch.iinfo(index.dtype)
        for bad in (low - 1, end, holds.min, holds.max, 1 << 40, -(1 << 40)):
            if low <= bad < end or not holds.min <= bad <= holds.max:
                continue
            for place in {0, index.numel() - 1}:
                before = index.view(-1)[place].clone()
                index.view(-1)[place] = bad
                with pytest.raises(RuntimeError, match=said):
                    call(*arguments)
                index.view(-1)[place] = before
        call(*build())


@needs_library
@pytest.mark.parametrize("name", INDICES)
def test_a_cpus_op_refuses_it(name: str) -> None:
    assert extension.load()
    _check(name, torch.ops.megatron_samoe, r"outside|expert| of \d")


@needs_library
@pytest.mark.parametrize("name", [name for name in INDICES if not name.startswith("decode")])
def test_a_kernel_stops_at_it(name: str, library: Any) -> None:
    """Decoding's bindings look at indices themselves where tensors lie on a CPU, so no kernel of theirs meets a wrong one."""
    _check(name, library, r"a CUDA kernel failed.*device-side assert")


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


_ids, _zeros = partial(torch.zeros, dtype=torch.int64), torch.zeros
_three = make_permutation(_ids(3, 1), 2)
_banks = combine_inputs(3, 2, 4, 5)
#: What functions say of arguments that do not fit, with or without a compiled op behind them.
MISFITS: list[tuple[str, Callable[..., object], tuple[Any, ...]]] = [
    ("allowed are -1 to 1", make_permutation, (_i(2)[None], 2)),
    ("allowed are -1 to 1", make_permutation, (_i(-2)[None], 2)),
    ("int64 matrix", make_permutation, (_zeros(3, 1), 2)),
    ("3 tokens", permute, (_zeros(4, 2), _three)),
    ("3 rows", unpermute, (_zeros(4, 2), _zeros(3, 1), _three)),
    ("probs_TK", unpermute, (_zeros(3, 2), _zeros(3, 2), _three)),
    ("one int64 a row", gather_rows, (_zeros(3, 2), _ids(2))),
    ("one int64 a token", cross_entropy_parts, (_zeros(3, 4), _ids(2))),
    ("one int64 a token", cross_entropy_parts, (_zeros(3, 4), _zeros(3))),
    (r"\(3, 4\) and \(3, 5\)", kl_divergence_terms, (_zeros(3, 4), _zeros(3, 5), _zeros(3), _zeros(3), 1.0)),
    (r"\[4, 2, N\] fits", combine_banks, (_banks[0], _banks[1][:3])),
    ("out_LGN", combine_banks, (*_banks[:2], _zeros(3, 2, 6))),
    ("out_dtype", combine_banks, (*_banks, torch.bfloat16)),
    ("dW_LGN", combine_banks_backward, (*_banks[:2], _banks[2][:2], _zeros(4, 2, 5))),
    ("dbanks_PGN", combine_banks_backward, (*_banks, _zeros(4, 2, 6))),
]


@pytest.mark.parametrize(("said", "function", "arguments"), MISFITS)
def test_what_does_not_fit_is_named(said: str, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    with pytest.raises((IndexError, ValueError, RuntimeError), match=said):
        function(*arguments)


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
    assert [outcome for outcome in too_much if not outcome.startswith("MemoryError")] == []
    bad = [call for call in calls if call[4].startswith(("ended by", "SystemError"))]
    short = [call for call in calls if "alloc" in call[4] and not call[4].startswith("not made")]
    assert bad == [] and len(short) == len(too_much)
    refused = {op for _, op, what, _, outcome in calls if what.endswith("as it should be") and outcome != "returned"}
    for _, op, what, integer, outcome in calls:
        if integer and op not in refused:
            name, _, value = integer.partition("=")
            low, high = TAKEN.get(f"{op} {name}", (0, -1))
            assert (outcome == "returned") == (low <= int(value) <= high), (op, what, outcome)
        if op not in refused and outcome == "returned" and (changed := CHANGED.fullmatch(what)):
            kind = (
                changed["type"] or changed["dim"] or next(name for name in ("gaps", "none", "empty") if changed[name])
            )
            assert kind in ACCEPTED.get(f"{op} {changed['way']}", {}).get(changed["argument"], ()), (op, what)
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


NAMES = list(schemas.SCHEMAS)


@needs_library
@pytest.mark.parametrize("name", NAMES[1 : NAMES.index("decode_linear")])
def test_a_training_op_is_what_it_says(name: str) -> None:
    # How many rows a permutation has is in the data, so its fake result cannot be compared.
    checks = ("test_schema",) if name == "make_permutation" else ("test_schema", "test_faketensor")
    for build in CALLS[name]:
        torch.library.opcheck(getattr(torch.ops.megatron_samoe, name).default, build(), test_utils=checks)


@pytest.mark.parametrize("name", emulated_cuda.TRAINING_OPS)
def test_a_gpus_op_writes_what_its_schema_says(name: str, library: Any) -> None:
    torch.library.opcheck(getattr(library, name).default, CALLS[name][0](), test_utils=("test_schema",))


class _Echo:
    """An exchange with ranks that send what they get."""

    def exchange(self, x: Tensor, send_rows: list[int], receive_rows: list[int]) -> Tensor:
        return x.clone()


@needs_library
def test_the_exchange_of_rows_is_what_it_says() -> None:
    group = Group("ep", (0, 1), 0, exchange=_Echo())  # type: ignore[arg-type]
    x = torch.randn(5, 3, requires_grad=True)
    all_to_all_rows(x, [2, 3], [2, 3], group)  # registers the op
    arguments = (x, [2, 3], [2, 3], all_to_all._key(group))
    checks = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.megatron_samoe.all_to_all_rows.default, arguments, test_utils=checks)
