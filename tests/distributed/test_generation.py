"""A checkpoint of one layout gives the same next-token logits and text in any other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_samoe.config import CheckpointConfig, DataConfig, PretrainConfig
from megatron_samoe.convert.opener import open_folder
from megatron_samoe.inference.kv_cache import PageTable, Span, make_batch, pages_for
from megatron_samoe.inference.rank_runner import RankRunner
from megatron_samoe.language_model import LanguageModel
from megatron_samoe.parallel_state import initialize_model_parallel
from megatron_samoe.runtime.load import LoadedModel, load_model
from megatron_samoe.training.checkpointing import save_run
from megatron_samoe.training.setup import build_setup, initial_state
from tests.harness.pairs import first_by_day
from tests.harness.ranks import run_ranks
from tests.harness.tables import table
from tests.harness.tiny import tiny_config, with_layout

pytestmark = pytest.mark.distributed
TABLE = table(__file__)

PROMPT = [5, 17, 200, 3, 88]
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tp": 2}),
    "ep2": (2, {"ep": 2}),
    "pp2": (2, {"pp": 2}),
    "tp2 etp1 ep2 pp2": (4, {"tp": 2, "etp": 1, "ep": 2, "pp": 2}),
}


def save(config: PretrainConfig) -> None:
    setup = build_setup(config, 257, initialize_model_parallel(config.parallel))
    save_run(setup, initial_state(setup))


def next_token_logits(loaded: LoadedModel, ids: list[int]) -> torch.Tensor:
    """Returns logits_V of the training model."""
    num_pages = pages_for(len(ids))
    runner = RankRunner(loaded, num_pages, "folded")
    pages = PageTable(1, num_pages, num_pages, runner.device)
    span = Span(pages.reserve(len(ids)), 0, len(ids))
    return runner.run(make_batch([span], ids, pages.table, [len(ids) - 1], runner.device))[0]


def run(folder: str, config: PretrainConfig) -> tuple[torch.Tensor, list[int], list[int]]:
    parallel = initialize_model_parallel(config.parallel)
    loaded = load_model(open_folder(folder), parallel, config.parallel)
    logits_V = next_token_logits(loaded, PROMPT)
    greedy = LanguageModel(loaded).generate_ids(PROMPT, 20, temperature=0.0)
    return logits_V, greedy, LanguageModel(loaded).generate_ids(PROMPT, 8, temperature=1.0, top_k=20, seed=3)


MODELS: dict[str, dict[str, Any]] = TABLE["models"]


@pytest.mark.parametrize("model", first_by_day(sorted(MODELS, key=("samoe", "pool").__contains__, reverse=True)))
def test_every_layout_generates_the_same(tmp_path: Path, model: str) -> None:
    options = {"layout": "moe", "style": "llama", "make_vocab_size_divisible_by": 8, **MODELS[model]}
    base = tiny_config(**options)
    base = replace(
        base,
        data=DataConfig(mock_data=True, tokenizer_type="ByteTokenizer"),
        checkpoint=CheckpointConfig(save=str(tmp_path)),
    )
    run_ranks(save, 2, with_layout(base, ep=2))
    expected = run_ranks(run, 1, str(tmp_path), with_layout(base))[0]
    for world_size, sizes in LAYOUTS.values():
        for logits_V, greedy, sampled in run_ranks(run, world_size, str(tmp_path), with_layout(base, **sizes)):
            torch.testing.assert_close(logits_V, expected[0], rtol=1e-4, atol=1e-6)
            assert (greedy, sampled) == expected[1:]
    # The context has 16 places, and after the last one more token can be chosen.
    assert len(expected[1]) == 12 and expected[0].shape == (257,)
