"""Models made by surgery compute what they were made from, in every layout that training and inference use."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_samoe.config import MoEConfig
from megatron_samoe.config.cli import from_mapping
from megatron_samoe.convert.fold import fold_shared
from megatron_samoe.dist_checkpointing import loading, store
from megatron_samoe.dist_checkpointing.global_tensors import write_checkpoint
from megatron_samoe.fit.surgery.pool import pool_moe
from megatron_samoe.fit.surgery.select import select_samoe
from megatron_samoe.fit.surgery.upcycle import UpcycleOptions, upcycle_dense
from megatron_samoe.parallel_state import initialize_model_parallel
from megatron_samoe.training.checkpointing import model_state
from megatron_samoe.training.setup import build_setup
from tests.harness.layout_logits import logits_of
from tests.harness.pairs import first_by_day
from tests.harness.ranks import run_ranks
from tests.harness.tiny import VOCAB_SIZE, tiny_config, with_layout
from tests.unit.convert.memory_source import MemorySource, new_source

pytestmark = pytest.mark.distributed

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "pp2 vpp2 ep2": (4, {"pp": 2, "vpp": 1, "ep": 2}),
    "tp2 sp etp1 ep2 pp2 zero": (4, {"tp": 2, "sp": True, "etp": 1, "ep": 2, "pp": 2, "zero": True}),
}
#: Models and what they were made from.
MADE_FROM = {"folded": "samoe", "selected and folded": "selected", "pooled": "moe"}
MADE_FROM |= dict.fromkeys(("upcycled", "upcycled pool"), "dense")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    samoe = new_source(tiny_config("samoe", style="llama", num_expert_banks=3, samoe_normalization="l2"))
    moe = new_source(tiny_config("moe", moe_router_topk=2, moe_layer_freq="0111"))
    dense = new_source(tiny_config("dense", style="llama"))
    to_moe = MoEConfig("moe", num_experts=4, moe_router_topk=2)
    selected = select_samoe(samoe, "one")
    to_pool = replace(to_moe, expert_layout="samoe", num_expert_banks=4)
    made = {"samoe": samoe, "selected": selected, "moe": moe, "dense": dense, "pooled": pool_moe(moe, 3)}
    made |= {"folded": fold_shared(samoe), "selected and folded": fold_shared(selected)}
    made |= {"upcycled": upcycle_dense(dense, UpcycleOptions(to_moe))}
    made |= {"upcycled pool": upcycle_dense(dense, UpcycleOptions(to_pool))}
    root = tmp_path_factory.mktemp("models")
    return {name: write_checkpoint(root / name, 7, _with_plain_training(source)) for name, source in made.items()}


def _with_plain_training(source: Any) -> MemorySource:
    weights = {name: source.read(name) for name in source.tensors if not name.startswith("optimizer.")}
    return MemorySource(weights, source.config, source.train_state)


def logits_in(layout: dict[str, Any], folders: list[Path]) -> list[Tensor]:
    """Returns each model's logits, computed by this layout's ranks."""
    results = []
    for folder in folders:
        config = with_layout(from_mapping(store.read_config(folder), ""), **layout)
        setup = build_setup(config, VOCAB_SIZE, initialize_model_parallel(config.parallel))
        loading.load_checkpoint(folder, model_state(setup.model), setup.parallel)
        results.append(logits_of(setup))
    return results


@pytest.mark.parametrize("layout", first_by_day(LAYOUTS))
def test_a_model_made_by_surgery_computes_the_same_in_any_layout(layout: str, models: dict[str, Path]) -> None:
    world_size, sizes = LAYOUTS[layout]
    found = dict(zip(models, run_ranks(logits_in, world_size, sizes, list(models.values()))[0], strict=True))
    for made, source in MADE_FROM.items():
        assert found[source].std() > 0.1
        torch.testing.assert_close(found[made], found[source], rtol=1e-5, atol=1e-5, msg=f"{made} in {layout}")
    assert (found["selected"] - found["samoe"]).abs().max() > 0.01, "selecting is no equality"
