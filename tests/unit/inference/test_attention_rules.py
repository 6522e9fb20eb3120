"""Decoding with windows, sinks, soft caps, norms over all heads and stretched positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_samoe.errors import ConfigError
from megatron_samoe.inference.decode_bytes import step_bytes
from megatron_samoe.inference.decode_layers import make_decode_model, options_of_training_alone
from megatron_samoe.inference.engine import Engine
from megatron_samoe.inference.kv_cache import PAGE, PageTable, pages_for, window_pages
from megatron_samoe.inference.rank_runner import RankRunner
from megatron_samoe.inference.request import Request
from megatron_samoe.inference.sampling import SamplingOptions
from megatron_samoe.inference.single_runner import SingleRunner
from tests.harness.pairs import first_by_day
from tests.harness.tables import table
from tests.harness.tiny import tiny_config
from tests.unit.inference.tiny_models import VOCAB, forward_logits, loaded_tiny, step_logits

TABLE = table(__file__)
LATENT: dict[str, Any] = TABLE["latent"]
MODELS: dict[str, tuple[str, dict[str, Any]]] = TABLE["models"]
IDS = [int(i) for i in torch.randint(0, VOCAB, (96,), generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize("kind", ["single", "ranks"])
@pytest.mark.parametrize("model", MODELS)
def test_a_sequence_in_parts_has_the_forwards_logits(model: str, kind: str) -> None:
    layout, options = MODELS[model]
    loaded = loaded_tiny(layout, **options)
    if kind == "single" and options_of_training_alone(loaded.config.model):
        pytest.skip("the training model decodes it")
    num_pages = 2 * pages_for(48)
    runner: Any = RankRunner(loaded, num_pages, "folded")
    if kind == "single":
        runner = SingleRunner(make_decode_model(loaded.model, "folded", "fp32", num_pages), 64, 64, 0)
    pages = PageTable(2, num_pages, pages_for(48))
    one, two = IDS[:40], IDS[40:70]
    slots = pages.reserve(len(one)), pages.reserve(len(two))
    found: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    at = [0, 0]
    for parts in ((20, 1), (1, 1), (1, 17), (18, 11)):
        rows = [
            (slots[i], at[i], ids[at[i] : at[i] + n]) for i, (ids, n) in enumerate(zip((one, two), parts, strict=True))
        ]
        for mine, logits in zip(found, step_logits(runner, pages, rows), strict=True):
            mine.append(logits)
        at = [a + n for a, n in zip(at, parts, strict=True)]
    for ids, mine in zip((one, two), found, strict=True):
        torch.testing.assert_close(torch.cat(mine), forward_logits(loaded, ids)[:, :VOCAB], rtol=1e-4, atol=1e-4)


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


def generated(engine: Engine, prompts: list[list[int]], count: int, temperature: float = 0.0) -> list[list[int]]:
    sampling = SamplingOptions(count, temperature=temperature, seed=5, ignore_eod=True)
    found: dict[int, list[int]] = {engine.submit(Request(p, sampling)): [] for p in prompts}
    while engine.has_work:
        for event in engine.step():
            found[event.request_id].append(event.token_id)
    return list(found.values())


def test_a_latent_is_all_that_is_cached() -> None:
    loaded = loaded_tiny("dense", **LATENT)
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


def test_pages_go_round() -> None:
    pages = PageTable(2, 7, 10, most_pages=3)
    assert pages.fits(10 * PAGE)
    slot = pages.reserve(9 * PAGE + 1)
    row = pages.table[slot].tolist()
    assert row[:3] == row[3:6] == row[6:9] and row[9] == row[0] and len(set(row)) == 3
    assert pages.num_free_pages == 4
    pages.release(slot)
    assert pages.num_free_pages == 7


def test_only_the_window_is_read() -> None:
    long = {"seq_length": 512, "max_position_embeddings": 512}
    read = {
        window: step_bytes(tiny_config("dense", sliding_window=window, **long), VOCAB, 4, 400.0, "folded", "fp32").cache
        for window in (None, 100)
    }
    assert read[100] == read[None] / 4
