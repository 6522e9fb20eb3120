"""Exports fine-tuned by TRL and peft (`finetune_uses`), and what comes back of them: nothing is lost on the way."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_samoe.convert.opener import open_folder
from tests.harness.other_programs import with_packages
from tests.harness.pairs import first_by_day
from tests.harness.program import REPOSITORY
from tests.harness.tables import table
from tests.parity import class_uses
from tests.parity.hf_models import (
    Native,
    converted,
    loaded,
    our_logits,
    sent,
    some_ids,
    their_logits,
    theirs,
)
from tests.parity.hf_models import transformers as hf

pytestmark = pytest.mark.parity

TABLE = table(__file__)
#: Layout, options, and the class that a model is exported to.
MODELS: dict[str, tuple[str, dict[str, Any], str]] = TABLE["models"]
#: What stock classes get wrong: Mixtral's balance loss has no gradient where layers are computed again with reentry.
THEIRS = {("stock_mixtral", "sft_balanced_with_checkpointing_True")}
#: Uses by day; the others take minutes.
BY_DAY: dict[str, tuple[str, ...]] = TABLE["by day"]
NEEDS_TRL = "TRL and peft are not installed (extra finetune)"


def export(root: Path, name: str) -> tuple[Native, Path]:
    """Returns a model, and the folder of its export."""
    layout, options, target = MODELS[name]
    return sent(root, layout, options, "--hf-model-type", target)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns what gives a model's export."""
    root = tmp_path_factory.mktemp("finetune")
    return functools.cache(lambda name: export(root / name, name)[1])


@pytest.mark.parametrize(
    ("name", "uses"), first_by_day([*BY_DAY.items(), *((name, None) for name in MODELS)], len(BY_DAY))
)
def test_uses(name: str, uses: tuple[str, ...] | None, folder_of: Callable[[str], Path]) -> None:
    """Some by day, and every one at night."""
    pytest.importorskip("trl", reason=NEEDS_TRL)
    from tests.parity.finetune_uses import USES

    model = class_uses.load(folder_of(name))
    wrong = {use: class_uses.outcome(USES[use], model) for use in uses or USES if (name, use) not in THEIRS}
    assert not {use: fault for use, fault in wrong.items() if fault is not None}


@pytest.mark.night
def test_the_oldest_versions(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    declared = (REPOSITORY / "pyproject.toml").read_text()
    names = ("transformers", "trl", "peft", "accelerate")
    oldest = {name: re.search(rf"{name}>=([0-9.]+)", declared) for name in names}
    wanted = [f"{name}=={found[1]}.*" for name, found in oldest.items() if found]
    assert len(wanted) == len(names)
    environment = with_packages(tmp_path, [*wanted, "datasets"])
    paths = [str(folder_of(name)) for name in ("pool", "own_experts", "learned_positions", "stock_llama")]
    command = [sys.executable, "-m", "tests.parity.finetune_uses", *paths]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert all(words.removesuffix(".*").replace("==", " ") in done.stdout for words in wanted), done.stdout


@pytest.mark.night
@pytest.mark.parametrize("name", ["pool", "own_experts"])
def test_two_processes_of_accelerate_take_the_step_of_one(name: str, folder_of: Callable[[str], Path]) -> None:
    pytest.importorskip("trl", reason=NEEDS_TRL)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "tests.parity.finetune_uses", "--ranks", str(folder_of(name))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=environment)
    assert sorted(re.findall(r"rank \d of 2: None", done.stdout)) == ["rank 0 of 2: None", "rank 1 of 2: None"], (
        done.stdout + done.stderr[-3000:]
    )


@pytest.mark.parametrize("name", ["pool", "stock_mixtral"])
@pytest.mark.parametrize("same_folder", [False, True])
def test_a_token_that_was_added_comes_back(name: str, same_folder: bool, tmp_path: Path) -> None:
    """The embedding has grown, and the tokenizer: our model computes the same and knows the token, and exports it again."""
    _, folder = export(tmp_path, name)
    tuned = folder if same_folder else tmp_path / "tuned"
    model, tokenizer = theirs(folder), hf.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]}) == 1
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tuned)
    tokenizer.save_pretrained(tuned)
    ids_BS = torch.cat((some_ids(), torch.full((2, 1), 257)), 1)
    expected = their_logits(model, ids_BS)

    back = converted(tuned, tmp_path / "back")
    words = loaded(back).tokenizer
    assert words.encode("ab<|end|>") == [97, 98, 257] and words.decode([257]) == "<|end|>"
    assert (our_logits(back, ids_BS) - expected).abs().max() < 1e-4
    again = converted(back, tmp_path / "again", "--to", "hf", "--hf-model-type", MODELS[name][2])
    assert (their_logits(theirs(again), ids_BS) - expected).abs().max() < 1e-5
    assert hf.AutoTokenizer.from_pretrained(again, trust_remote_code=True)("ab<|end|>").input_ids == [97, 98, 257]
    assert content(again / "tokenizer.json") == content(tuned / "tokenizer.json")


def content(path: Path) -> Any:
    return json.loads(path.read_text())


def test_how_a_model_talks_comes_back(tmp_path: Path) -> None:
    """Its template, and what `generate` does by default; a template that is not of the run brings the folder's tokenizer."""
    _, folder = export(tmp_path, "pool")
    model, tokenizer = theirs(folder), hf.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"
    model.generation_config.update(do_sample=True, temperature=0.7, eos_token_id=[256, 10])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    back = converted(folder, tmp_path / "back")
    assert loaded(back).tokenizer.encode("a<|endoftext|>") == [97, 256]
    again = converted(back, tmp_path / "again", "--to", "hf", "--hf-model-type", "samoe")
    assert (again / "chat_template.jinja").read_text() == tokenizer.chat_template
    for name in ("generation_config.json", "tokenizer_config.json"):
        assert content(again / name) == content(folder / name)


def test_a_tokenizer_that_a_folder_did_not_change_stays_the_runs_own(tmp_path: Path) -> None:
    """A class saves it anew in other words, with the same tokens."""
    ours, folder = export(tmp_path, "pool")
    hf.AutoTokenizer.from_pretrained(folder, trust_remote_code=True).save_pretrained(folder)
    back = loaded(converted(folder, tmp_path / "back"))
    assert back.config.data.tokenizer_type == ours.loaded.config.data.tokenizer_type == "ByteTokenizer"


@pytest.mark.parametrize(("layout", "options"), TABLE["without a balance loss"])
def test_routers_that_the_balance_loss_does_not_know_are_refused_it(
    layout: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = theirs(sent(tmp_path, layout, options, "--hf-model-type", "samoe")[1])
    assert not hasattr(model.config, "output_router_logits")  # by which trainers know
    with pytest.raises(ValueError, match="balance loss of transformers, which knows softmax routers"):
        model(input_ids=some_ids(), output_router_logits=True)


def test_the_weight_of_the_balance_loss_travels_and_earlier_exports_keep_theirs(tmp_path: Path) -> None:
    ours, folder = sent(tmp_path, "samoe", {**MODELS["pool"][1], "moe_aux_loss_coeff": 0.02})
    assert theirs(folder).config.router_aux_loss_coef == 0.02
    config = json.loads((folder / "config.json").read_text())
    for change in ({}, {"router_aux_loss_coef": None}, {"router_aux_loss_coef": 0.3}):
        given = {name: value for name, value in {**config, **change}.items() if value is not None or name not in change}
        (folder / "config.json").write_text(json.dumps(given))
        back = open_folder(converted(folder, tmp_path / f"back{len(list(tmp_path.iterdir()))}")).tensors.config
        assert back["moe"]["moe_aux_loss_coeff"] == (change.get("router_aux_loss_coef") or 0.02)
        remembers_all = back["training"] == ours.source.config["training"]
        assert remembers_all == (change.get("router_aux_loss_coef") is None)
