"""torch's own checks of what ops say of themselves (schema, aliasing, shapes without storage), on real arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_samoe.ops import extension, schemas
from megatron_samoe.parallel_state.state import Group
from megatron_samoe.row_exchange import all_to_all
from megatron_samoe.row_exchange.all_to_all import all_to_all_rows
from tests.harness import emulated_cuda
from tests.harness.well_formed_calls import CALLS

pytestmark = pytest.mark.skipif(not extension.available(), reason="the compiled extension is not built")
NAMES = list(schemas.SCHEMAS)


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


def test_the_exchange_of_rows_is_what_it_says() -> None:
    group = Group("ep", (0, 1), 0, exchange=_Echo())  # type: ignore[arg-type]
    x = torch.randn(5, 3, requires_grad=True)
    all_to_all_rows(x, [2, 3], [2, 3], group)  # registers the op
    arguments = (x, [2, 3], [2, 3], all_to_all._key(group))
    checks = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.megatron_samoe.all_to_all_rows.default, arguments, test_utils=checks)
