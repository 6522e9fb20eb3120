"""Our own class for transformers computes every option that imported families have, and layers that share experts with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_samoe.config.model import ModelConfig
from megatron_samoe.convert.hf.families.samoe import _RARE_MODEL_ENTRIES
from megatron_samoe.convert.hf.remote_code.configuration_samoe import DEFAULTS, SamoeConfig
from megatron_samoe.convert.opener import open_folder
from tests.harness.pairs import first_by_day
from tests.harness.tables import table
from tests.parity.hf_models import converted, exported, native, some_ids, their_logits, theirs

pytestmark = pytest.mark.parity

CASES: dict[str, dict[str, Any]] = table(__file__)["models"]


@pytest.mark.parametrize("case", first_by_day(CASES, 5))
def test_it_gives_our_logits_and_text_and_its_config_tells_the_model(case: str, tmp_path: Path) -> None:
    """Logits of whole texts, greedy text with a cache, and the folder alone, without megatron_samoe.json, as a checkpoint."""
    ours, folder, model = exported("moe", CASES[case], tmp_path, "--to", "hf", tolerance=1e-4)
    assert type(model).__name__ == "SamoeForCausalLM" and model.model.expert_pool is not None
    (folder / "megatron_samoe.json").unlink()
    reader = open_folder(converted(folder, tmp_path / "back")).tensors
    options = {name: value for name, value in CASES[case].items() if hasattr(ModelConfig, name)}
    assert {name: reader.config["model"][name] for name in options} == options
    again = native(tmp_path / "again", reader)
    assert (again.logits(some_ids()) - ours.logits(some_ids())).abs().max() < 1e-5
    # What transformers saves again is the same model.
    model.save_pretrained(tmp_path / "saved")
    assert (their_logits(theirs(tmp_path / "saved"), some_ids()) == their_logits(model, some_ids())).all()


def test_its_defaults_are_ours() -> None:
    """An entry that is not written is at our default."""
    assert {name: DEFAULTS[name] for name in _RARE_MODEL_ENTRIES} == {
        name: getattr(ModelConfig, name) for name in _RARE_MODEL_ENTRIES
    }


@pytest.mark.parametrize(
    ("options", "is_whole"),
    [
        ({"sliding_window": 3}, False),
        ({"qk_layernorm": True, "qk_layernorm_scope": "all"}, True),
        ({"multi_latent_attention": True, "head_dim": 192}, True),
    ],
)
def test_tensor_parallel_plans_leave_out_attention_that_no_rank_can_have_a_part_of(
    options: dict[str, Any], is_whole: bool
) -> None:
    config = SamoeConfig(**options)
    names = {name.split(".")[2] for name in config.base_model_tp_plan}
    assert names == ({"mlp"} if is_whole else {"mlp", "self_attn"}) and config.has_whole_attention == is_whole
