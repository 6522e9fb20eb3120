"""Experts in groups, of which a token uses the best: groups stay together in every model that compression makes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_samoe.dist_checkpointing.global_tensors import write_checkpoint
from megatron_samoe.errors import ConfigError
from megatron_samoe.fit.assignment import assigned_in_groups
from megatron_samoe.fit.compress.baselines import experts_in_budget, pruned_model
from megatron_samoe.fit.compress.compressible import expert_bytes
from megatron_samoe.fit.compress.options import CompressOptions
from megatron_samoe.fit.compress.pipeline import Compression
from tests.harness.program import write_corpus
from tests.harness.tiny import tiny_config
from tests.unit.convert.memory_source import MemorySource, logits, new_source
from tests.unit.fit.test_matching import layers_of

#: As DeepSeek-V3 routes: two experts of the best of two groups, by sigmoid scores and biases.
GROUPS = {"moe_router_num_groups": 2, "moe_router_group_topk": 1}
PLAIN = {"moe_router_topk": 2, "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
GROUPED = tiny_config("moe", num_experts=8, mock_data=True, **PLAIN, **GROUPS)


def shuffled_source() -> MemorySource:
    """Returns a model whose layers have layer 0's experts, groups swapped and experts shuffled within them."""
    source = new_source(GROUPED)
    generator = torch.Generator().manual_seed(2)
    for layer in range(1, 4):
        order_E = torch.cat([4 * g + torch.randperm(4, generator=generator) for g in ((1, 0) if layer % 2 else (0, 1))])
        for name in [n for n in source.weights if n.startswith("layers.0.moe.experts.")]:
            source.weights[name.replace("layers.0", f"layers.{layer}")].copy_(source.weights[name][order_E])
    return source


def test_groups_are_assigned_as_wholes() -> None:
    order = torch.tensor([5, 4, 7, 6, 1, 3, 0, 2])
    score = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    score[torch.arange(8), order] += 2.0
    assert torch.equal(assigned_in_groups(score, 2), order)
    across = torch.arange(8).roll(1)  # which no groups allow
    score[torch.arange(8), across] += 9.0
    found = assigned_in_groups(score, 2)
    assert sorted(found.tolist()) == list(range(8)) and all(
        len({int(e) // 4 for e in half}) == 1 for half in found.view(2, 4)
    )


@pytest.mark.parametrize("sharing", ["tied", "combined"])
def test_a_grouped_moe_is_compressed_and_what_is_alike_is_found(sharing: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "moe", 0, shuffled_source())
    write_corpus(tmp_path / "text", vocab_size=103)
    folders = [str(tmp_path / name) for name in ("moe", "out", "text")]
    sizes = {"calibration_tokens": 2048, "judge_tokens": 512, "num_samples": 16, "budget": 0.25}
    compression = Compression(CompressOptions(*folders, sharing=sharing, **sizes))
    verdicts = {v.model: v for v in compression.judge({})}
    assert verdicts["matched"].divergence < 1e-6
    assert verdicts["fitted"].divergence < 1e-4  # one set holds all four layers
    assert ("blind" in verdicts) == (sharing == "tied")  # edit pool keeps no groups


def test_pruning_keeps_as_many_of_each_group() -> None:
    source = new_source(GROUPED)
    calibrations = [layer.calibration for layer in layers_of(source)]
    pruned = pruned_model(source, calibrations, 4)
    for layer, calibration in enumerate(calibrations):
        kept = torch.cat(
            [4 * g + s.topk(2).indices.sort().values for g, s in enumerate(calibration.mean_saliency_E.view(2, 4))]
        )
        name = f"layers.{layer}.moe.router.weight"
        assert torch.equal(pruned.read(name), source.weights[name][kept])
    assert logits(pruned).isfinite().all()
    assert experts_in_budget(source, expert_bytes(source) * 5 // 8) == 4
    with pytest.raises(ConfigError, match="leaves 1 experts a group; a token chooses 2"):
        experts_in_budget(source, expert_bytes(source) * 3 // 8)
    plain = new_source(tiny_config("moe", num_experts=8, **PLAIN))
    assert experts_in_budget(plain, expert_bytes(source) * 3 // 8) == 3
