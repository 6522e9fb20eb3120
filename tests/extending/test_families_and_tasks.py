"""Families of files and zero-shot tasks from other packages, as docs/extending.md says, through the commands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megatron_samoe.convert.hf import families
from megatron_samoe.errors import ConfigError
from megatron_samoe.language_model import LanguageModel
from tests.extending.starcoder2 import ENTRIES, FAMILY
from tests.harness.near_package import install
from tests.harness.pairs import first_by_day
from tests.parity.hf_models import converted, our_logits, run, their_logits, theirs, transformers
from tests.unit.inference.tiny_models import loaded_tiny

VOCABULARY = 100


@pytest.fixture
def prepended(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """Yields what lets Python find a folder's packages until the test ends."""

    def found(folder: Path) -> None:
        monkeypatch.syspath_prepend(folder)
        families.families.cache_clear()

    yield found
    families.families.cache_clear()


@pytest.mark.parametrize("tied", first_by_day([True, False]))
def test_a_family_of_another_package_goes_in_and_out(
    tmp_path: Path, tied: bool, prepended: Callable[[Path], None]
) -> None:
    torch.manual_seed(1)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8 if tied else None}
    ends = {"max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.Starcoder2Config(**sizes, **heads, **ends, tie_word_embeddings=tied)
    model = transformers.Starcoder2ForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "theirs")
    status, _, error = run("--load-dir", tmp_path / "theirs", "--save-dir", tmp_path / "no")
    assert status == 2 and "starcoder2" in error and "is not a family" in error
    prepended(install(tmp_path / "installed", families.GROUP, "starcoder2", "tests.extending.starcoder2:FAMILY"))
    ours = converted(tmp_path / "theirs", tmp_path / "ours")
    back = theirs(converted(ours, tmp_path / "back", "--to", "hf"))
    assert type(back) is type(model)
    for name, weight in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight), name
    text = torch.randint(VOCABULARY, (2, 40))
    torch.testing.assert_close(our_logits(ours, text), their_logits(model, text), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(their_logits(back, text), their_logits(model, text))


def test_a_task_of_another_folder_is_scored() -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra eval)")
    folder = Path(__file__).parent
    (result,) = LanguageModel(loaded_tiny("samoe")).evaluate(str(folder / "opposites.yaml"), folder)
    assert (result.task, result.num_items, result.best_constant) == ("opposites", 4, 0.5)
    right = [int(max(range(3), key=lambda n: s["filtered_resps"][n][0])) == s["target"] for s in result.samples]
    assert result.metrics["acc"].value == sum(right) / 4


@pytest.mark.parametrize(
    ("value", "problem"),
    first_by_day(
        [
            ("tests.extending.nowhere:FAMILY", "cannot be loaded: No module named"),
            ("tests.extending.starcoder2:TENSORS", "must name a Family, not tuple"),
            ("megatron_samoe.convert.hf.families.llama:LLAMA", "is the name of another family, too"),
        ]
    ),
)
def test_a_wrong_entry_point_is_named(
    tmp_path: Path, value: str, problem: str, prepended: Callable[[Path], None]
) -> None:
    prepended(install(tmp_path, families.GROUP, "starcoder2", value))
    with pytest.raises(ConfigError, match=problem) as caught:
        families.families()
    assert caught.value.field == "megatron_samoe.hf_families: starcoder2 of outside"
    status, _, error = run("--load-dir", tmp_path, "--save-dir", tmp_path / "new")
    assert status == 2 and problem in error and "Traceback" not in error


def test_a_family_of_functions_says_that_it_must_be_tables() -> None:
    with pytest.raises(TypeError, match=r"Family old is not made of tables: .*docs/extending\.md"):
        families.Family("old", "Old", "of functions", (), lambda native: {}, lambda native: (), ENTRIES)


def test_the_family_is_not_one_of_ours() -> None:
    assert FAMILY.name not in {family.name for family in families.families()}
