"""Plans of whole steps: the bits of the blocks, whatever the threads and the batch, and clear errors."""

from __future__ import annotations

import pytest
import torch

from megatron_samoe.inference.decode_layers import make_decode_model
from megatron_samoe.inference.kv_cache import Span, make_batch
from megatron_samoe.inference.single_runner import SingleRunner
from megatron_samoe.ops import extension
from megatron_samoe.ops.decode_parts import Places
from megatron_samoe.runtime.load import LoadedModel
from tests.harness.op_checks import threads_of_torch
from tests.unit.inference.test_runners import IDS, TABLE, make, tables
from tests.unit.inference.tiny_models import VOCAB, loaded_tiny, step_logits

pytestmark = pytest.mark.skipif(not extension.available(), reason="the compiled extension is not built")
# A gated shared expert has no plan: it is weighed between blocks.
PLANNED = [name for name in TABLE["models"] if name != "gate"]
WAYS = [*((name, "folded") for name in PLANNED), ("samoe gpt3", "selected"), ("samoe llama", "selected")]
#: (slot, first position, tokens) of steps: a prompt, single tokens, both.
STEPS = [[(0, 0, 20)], [(1, 0, 3), (2, 0, 18)], [(2, 18, 1), (0, 20, 1), (1, 3, 1)], [(0, 21, 15), (1, 4, 1)]]


def run(loaded: LoadedModel, serving: str, dtype: str, blocks: bool = False, steps: list = STEPS) -> torch.Tensor:
    """Returns the logits after every token of some steps, by the plan or by blocks."""
    pages = tables([len(ids) for ids in IDS])
    runner = SingleRunner(make_decode_model(loaded.model, serving, dtype, pages.num_pages), 64, 64, 0)
    assert runner._plan is not None
    if blocks:
        runner._plan = None
    rows = [
        step_logits(runner, pages, [(slot, first, IDS[slot][first : first + n]) for slot, first, n in step])
        for step in steps
    ]
    return torch.cat([logits for step in rows for logits in step])


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize(("name", "serving"), WAYS)
def test_a_plan_has_the_bits_of_the_blocks(name: str, serving: str, dtype: str) -> None:
    loaded = make(name, serving)
    assert torch.equal(run(loaded, serving, dtype), run(loaded, serving, dtype, blocks=True))


def test_a_shared_expert_waits_for_the_routed_ones_of_other_threads() -> None:
    loaded = loaded_tiny("moe", hidden_size=256, moe_shared_expert_intermediate_size=1024)
    steps = [[(0, first, 13)] for first in (0, 13)] * 12
    with threads_of_torch(1):
        alone = run(loaded, "folded", "fp32", steps=steps)
    with threads_of_torch(3):
        assert torch.equal(run(loaded, "folded", "fp32", steps=steps), alone)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_bits_depend_neither_on_threads_nor_on_the_batch(dtype: str) -> None:
    # Large enough that a step takes all threads.
    loaded = loaded_tiny("moe", hidden_size=256, style="llama", moe_router_topk=2, ffn_hidden_size=256)
    with threads_of_torch(1):
        alone = run(loaded, "folded", dtype)
    with threads_of_torch(3):
        assert torch.equal(run(loaded, "folded", dtype), alone)
        assert torch.equal(run(loaded, "folded", dtype, blocks=True), alone)
    single = [[(slot, i, 1)] for slot, count in ((0, 36), (1, 5), (2, 19)) for i in range(count)]
    one_by_one = run(loaded, "folded", dtype, steps=single)
    order = [(slot, first + i) for step in STEPS for slot, first, n in step for i in range(n)]
    place = {(slot, first): row for row, [(slot, first, _)] in enumerate(single)}
    assert torch.equal(one_by_one[[place[token] for token in order]], alone)


def test_more_tokens_than_a_plan_is_for_are_refused() -> None:
    pages = tables([40])
    model = make_decode_model(make("moe", "folded").model, "folded", "fp32", pages.num_pages)
    plan = SingleRunner(model, 8, 2, 0)._plan
    assert plan is not None
    step = make_batch([Span(0, 0, 9)], IDS[0][:9], pages.table, [8], torch.device("cpu"))
    places = Places(step.positions_T, step.slots_T, step.pages)
    with pytest.raises(RuntimeError, match="9 tokens and 1 logits; the plan is for 8 and 2"):
        plan.step(step.tokens_T, places, torch.tensor([8]), torch.empty(1, VOCAB))


def test_a_plan_ends_with_its_object() -> None:
    loaded = make("moe", "folded")
    runner = SingleRunner(make_decode_model(loaded.model, "folded", "fp32", 3), 8, 2, 0)
    assert runner._plan is not None
    number = runner._plan._number
    del runner
    with pytest.raises(RuntimeError, match=f"there is no plan {number}"):
        empty = torch.empty(0, dtype=torch.int64)
        places = (empty.int(), empty.int(), torch.zeros(1, 1, dtype=torch.int32))
        torch.ops.megatron_samoe.decode_plan_step(number, empty, *places, empty, torch.empty(0, VOCAB))
