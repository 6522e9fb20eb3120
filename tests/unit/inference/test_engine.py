"""The engine's own decisions: which runner runs, and what is left of a step that failed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from megatron_samoe.errors import ConfigError
from megatron_samoe.inference.engine import Engine, check_cuda_limits, takes_single_runner
from megatron_samoe.inference.kv_cache import StepBatch
from megatron_samoe.inference.request import Request, TokenEvent
from megatron_samoe.inference.sampling import SamplingOptions
from megatron_samoe.language_model import LanguageModel
from megatron_samoe.ops import extension
from tests.harness.tiny import tiny_config
from tests.unit.inference.tiny_models import loaded_tiny


@pytest.mark.parametrize(
    ("device", "ranks", "dtype", "kernels", "expected"),
    [
        ("cpu", 1, "fp32", False, True),
        ("cpu", 2, "fp32", False, False),
        ("cuda", 1, "bf16", False, False),
        ("cuda", 1, "int8", False, True),
        ("cuda", 1, "bf16", True, True),
        ("cuda", 2, "bf16", True, False),
    ],
)
def test_who_runs_the_model(device: str, ranks: int, dtype: str, kernels: bool, expected: bool) -> None:
    with extension.trusting(["decoding"] if kernels else []):
        assert takes_single_runner(device, ranks, dtype) is expected  # type: ignore[arg-type]


def test_models_beyond_the_cuda_kernels_are_refused_at_start() -> None:
    many = tiny_config("samoe", num_expert_banks=65)
    check_cuda_limits(many, "folded")
    with pytest.raises(ConfigError, match="serving = 'on-the-fly': combines 65 banks, and may 64 on a GPU"):
        check_cuda_limits(many, "on-the-fly")
    with pytest.raises(ConfigError, match="kv_channels = 272: may be 256 on a GPU; MEGATRON_SAMOE_CUDA_KERNELS=0"):
        check_cuda_limits(tiny_config("moe", kv_channels=272), "folded")


def events(engine: Engine, fail_at: tuple[int, ...]) -> Iterator[TokenEvent]:
    """Yields the tokens of an engine, of which some steps fail in the middle."""
    run, outcomes = engine._runner.run, (step in fail_at for step in itertools.count())

    def failing(batch: StepBatch) -> torch.Tensor:
        if next(outcomes):
            raise RuntimeError("no memory")
        return run(batch)

    engine._runner.run = failing  # type: ignore[method-assign]
    failed = 0
    for _ in range(20):
        try:
            yield from engine.step()
        except RuntimeError:
            failed += 1
    assert not engine.has_work and failed == len(fail_at)


def test_prompts_longer_than_a_step_are_scored_beside_others() -> None:
    """A step scores SCORED_ROWS tokens at most, so these prompts take several, and one of them fails."""
    loaded = loaded_tiny("samoe", seq_length=200)
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(loaded.model.vocab_size, (n,), generator=generator).tolist() for n in (150, 1, 90, 7)]
    engine = Engine(loaded, max_batch=4, max_step_tokens=100)
    options = SamplingOptions(max_new_tokens=2, temperature=0.0, ignore_eod=True)
    for ids in prompts:
        engine.submit(Request(ids, options, logprobs=2, scores_prompt=True))
    told: dict[int, list] = {number: [] for number in range(4)}
    grown = [list(ids) for ids in prompts]
    for event in events(engine, fail_at=(1,)):
        grown[event.request_id].append(event.token_id)
        told[event.request_id] += [*event.prompt_scores, event.score]
    model = LanguageModel(loaded)
    for number, ids in enumerate(grown):
        expected = model.logits(ids[:-1]).double().log_softmax(-1)
        assert [score.token_id for score in told[number]] == ids[1:]
        logprobs = [score.logprob for score in told[number]]
        assert logprobs == pytest.approx(expected[range(len(ids) - 1), ids[1:]].tolist(), rel=1e-4, abs=1e-4)
        best = [score.top[0][1] for score in told[number]]
        assert best == pytest.approx(expected.max(-1).values.tolist(), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(("room", "scored"), [(24, False), (24, True), (70, True)])
def test_requests_that_generate_get_a_token_in_every_step_of_a_long_prompt(room: int, scored: bool) -> None:
    """Whether they came before or after it: what a step has room for beyond their tokens goes to the prompt."""
    engine = Engine(loaded_tiny("moe", seq_length=300), max_batch=4, max_step_tokens=room)
    run, sizes = engine._runner.run, []
    engine._runner.run = lambda batch: sizes.append(len(batch.tokens_T)) or run(batch)  # type: ignore[method-assign,assignment,func-returns-value]
    options = SamplingOptions(max_new_tokens=40, ignore_eod=True)
    short = [engine.submit(Request([i, i + 1], options)) for i in range(2)]
    engine.step()
    long = engine.submit(Request([7] * 250, options, *((1, True) if scored else ())))
    got: list[list[int]] = []
    while not got or long not in got[-1]:
        got.append([event.request_id for event in engine.step()])
    assert all(set(short) <= set(ids) for ids in got), "a step of the prompt gave a request that generates no token"
    assert max(sizes) <= room and len(got) >= 250 / room


@pytest.mark.parametrize(
    ("logprobs", "problem"), [(21, "from 0 to 20"), (True, "from 0 to 20"), (None, "needs logprobs")]
)
def test_wrong_wishes_for_scores_are_named(logprobs: int | None, problem: str) -> None:
    engine = Engine(loaded_tiny("moe"), max_batch=1)
    with pytest.raises(ConfigError, match=problem):
        engine.submit(Request([1], SamplingOptions(), logprobs, scores_prompt=True))


def test_a_step_that_failed_is_done_again() -> None:
    request = Request([5, 9, 11], SamplingOptions(max_new_tokens=4, temperature=0.0))

    def answer(fail_at: tuple[int, ...]) -> list[int]:
        engine = Engine(loaded_tiny("moe"), max_batch=2)
        engine.submit(request)
        return [event.token_id for event in events(engine, fail_at)]

    assert len(answer(())) == 4
    assert answer((0, 2)) == answer(())
