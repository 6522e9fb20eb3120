"""The engine's own decisions: which runner runs, what is left of a step that failed, and the pages that it needs."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_samoe.errors import ConfigError
from megatron_samoe.inference.engine import Engine, check_cuda_limits, takes_single_runner
from megatron_samoe.inference.kv_cache import StepBatch, pages_for, window_pages
from megatron_samoe.inference.request import Request
from megatron_samoe.inference.sampling import SamplingOptions
from megatron_samoe.inference.serving import Serving
from megatron_samoe.language_model import LanguageModel
from megatron_samoe.ops import extension
from tests.harness.pairs import first_by_day
from tests.harness.tables import table
from tests.harness.tiny import tiny_config
from tests.unit.inference.test_runners import MODELS, make
from tests.unit.inference.tiny_models import VOCAB, forward_logits, generated, loaded_tiny

TABLE = table(__file__)

IDS = [int(i) for i in torch.randint(0, VOCAB, (96,), generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize(("device", "ranks", "dtype", "kernels", "expected"), TABLE["runners"])
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


def test_prompts_longer_than_a_step_are_scored_beside_others() -> None:
    """A step scores SCORED_ROWS tokens at most, so these prompts take several, and one of them fails."""
    loaded = loaded_tiny("samoe", seq_length=200)
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(loaded.model.vocab_size, (n,), generator=generator).tolist() for n in (150, 1, 90, 7)]
    engine = Engine(loaded, max_batch=4, max_step_tokens=100)
    options = SamplingOptions(max_new_tokens=2, temperature=0.0, ignore_eod=True)
    for ids in prompts:
        engine.submit(Request(ids, options, logprobs=2, scores_prompt=True))
    run, outcomes = engine._runner.run, (step == 1 for step in itertools.count())

    def failing(batch: StepBatch) -> torch.Tensor:
        if next(outcomes):
            raise RuntimeError("no memory")
        return run(batch)

    engine._runner.run = failing  # type: ignore[method-assign]
    told: dict[int, list] = {number: [] for number in range(4)}
    grown = [list(ids) for ids in prompts]
    failed = 0
    for _ in range(20):
        try:
            for event in engine.step():
                grown[event.request_id].append(event.token_id)
                told[event.request_id] += [*event.prompt_scores, event.score]
        except RuntimeError:
            failed += 1
    assert not engine.has_work and failed == 1
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


@pytest.mark.parametrize(
    ("name", "serving"), [("dense llama", "folded"), ("moe", "folded"), ("samoe gpt3", "on-the-fly")]
)
def test_a_request_gets_the_same_tokens_in_any_company(name: str, serving: Serving) -> None:
    loaded = make(name, serving)
    prompts = [IDS[:37], IDS[37:42], IDS[42:62]]
    alone = [generated(Engine(loaded, max_batch=1, serving=serving), [ids], 12)[0] for ids in prompts]
    assert [len(tokens) for tokens in alone] == [12, 12, 12]
    crowd = Engine(loaded, max_batch=3, serving=serving, max_step_tokens=7)
    assert generated(crowd, [*prompts, *prompts[::-1]], 12) == [*alone, *alone[::-1]]


@pytest.mark.parametrize("dtype", first_by_day(["int8", "fp32", "bf16"]))
def test_a_window_needs_few_pages_and_gives_the_same_text(dtype: Any) -> None:
    options = {"sliding_window": 9, "seq_length": 512, "position_embedding_type": "rope"}
    loaded = loaded_tiny("dense", **options)
    engine = Engine(loaded, max_batch=2, max_step_tokens=16, dtype=dtype)
    most = window_pages(9, 16)
    assert most is not None and engine._pages.num_pages == 2 * most < pages_for(512)
    assert engine.max_tokens >= 512
    roomy = Engine(loaded_tiny("dense", **options), max_batch=2, max_step_tokens=16, dtype=dtype)
    roomy._pages = type(roomy._pages)(2, 2 * pages_for(512), pages_for(512))
    roomy._runner = roomy._make_runner(loaded_tiny("dense", **options), 2 * pages_for(512), 16, 0)
    roomy._scheduler._pages = roomy._pages
    texts = [generated(e, [IDS[:50], IDS[50:53]], 200, temperature=1.0) for e in (engine, roomy)]
    assert texts[0] == texts[1] and len(set(texts[0][0])) > 50
    assert engine._pages.num_free_pages == engine._pages.num_pages


def test_a_latent_is_all_that_is_cached() -> None:
    loaded = loaded_tiny("dense", **MODELS["latent scale"][1])
    engine = Engine(loaded, max_batch=2)
    assert "training model" in engine.summary
    runner: Any = engine._runner
    kept = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for tensors in (runner._cache._keys, runner._cache._values)
        for t in tensors.values()
    }
    assert sum(kept.values()) == 4 * engine.max_tokens * (10 + 4) * loaded.config.model.num_layers
    with pytest.raises(ConfigError, match="fp32 or bf16 with --multi-latent-attention"):
        Engine(loaded, dtype="int8")
    greedy = generated(engine, [IDS[:9]], 12)[0]
    ids = [*IDS[:9]]
    for token in greedy:
        logits = forward_logits(loaded, ids)[-1, :VOCAB]
        assert logits[token] > logits.max() - 1e-4
        ids.append(token)


def test_the_training_model_decodes_what_the_ops_lack(tmp_path: Path) -> None:
    loaded = loaded_tiny("dense", use_parallel_residual=True, exact_gelu=True)
    assert "training model" in Engine(loaded, max_batch=2).summary
    with pytest.raises(ConfigError, match="fp32 or bf16 with --exact-gelu, --use-parallel-residual"):
        Engine(loaded, dtype="int8")
    with pytest.raises(ConfigError, match="without --exact-gelu, --use-parallel-residual"):
        Engine(loaded, weights_folder=tmp_path)
