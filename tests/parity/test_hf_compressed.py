"""Every family with experts that is imported from Hugging Face is compressed, and leaves as a smaller Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_samoe.convert.hf.families import families
from megatron_samoe.fit.compress.options import CompressOptions
from megatron_samoe.fit.compress.pipeline import Compression
from tests.harness.pairs import first_by_day
from tests.harness.program import write_corpus
from tests.parity.hf_models import converted, our_logits, their_logits, theirs
from tests.parity.test_hf_import import VOCABULARY, made, random_ids

pytestmark = pytest.mark.parity

#: Cases of imports, a family each, and what makes three layers with experts of them.
CASES: dict[str, dict[str, Any]] = {
    **{case: {} for case in ("mixtral_window", "olmoe_clip", "granitemoe", "qwen3_moe_yarn")},
    **{case: {"num_hidden_layers": 4} for case in ("deepseek_v2", "deepseek_v3", "deepseek_v3_yarn")},
    "qwen2_moe": {"num_hidden_layers": 6},
}


def test_no_family_with_experts_is_left_out() -> None:
    words = ("moe", "deepseek", "mixtral")
    has_experts = {family.name for family in families() if any(word in family.name for word in words)}
    assert has_experts - {"samoe"} == {made(case).config.model_type for case in CASES}


@pytest.mark.parametrize("case", first_by_day(CASES, 3))
def test_a_folder_becomes_a_smaller_folder(case: str, tmp_path: Path) -> None:
    options = CASES[case]
    model = made(case, **options)
    model.save_pretrained(tmp_path / "hf")
    root = converted(tmp_path / "hf", tmp_path / "native")
    write_corpus(tmp_path / "text", vocab_size=VOCABULARY)
    sizes = {"calibration_tokens": 1024, "judge_tokens": 128, "num_samples": 16, "num_banks": 2}
    compression = Compression(CompressOptions(str(root), str(tmp_path / "out"), str(tmp_path / "text"), **sizes))
    fitted = compression.fitted().directory
    folder = converted(fitted, tmp_path / "small", "--to", "hf")
    small, ids_BS = theirs(folder), random_ids()
    assert type(small).__name__ == "SamoeForCausalLM" and small.model.expert_pool is not None
    expected = our_logits(fitted, ids_BS)
    torch.testing.assert_close(their_logits(small, ids_BS), expected, rtol=1e-4, atol=1e-4)
    assert (expected - their_logits(model, ids_BS)).abs().max() > 1e-3  # it is another model than the original
    assert small.num_parameters() < model.num_parameters()
