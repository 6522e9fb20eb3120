"""Exports to stock classes of transformers and to our own, of every way of sharing experts and every router, compute what our
checkpoints compute, and come back bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_samoe.convert.opener import open_folder
from tests.harness.pairs import first_by_day
from tests.harness.tables import table
from tests.parity.hf_models import (
    PROMPT,
    converted,
    exported,
    native,
    random_source,
    run,
    sent,
    some_ids,
    their_logits,
    theirs,
    transformers,
)
from tests.unit.convert.memory_source import router_gradients

pytestmark = pytest.mark.parity

TABLE = table(__file__)
OWN = "SamoeForCausalLM"
#: Layout, options, the class that auto takes, and where another one is asked for, that.
CASES: dict[str, tuple[Any, ...]] = {
    name: case if len(case) > 2 else (*case, OWN) for name, case in (TABLE["by day"] | TABLE["at night"]).items()
}
LLAMA, MOE = {"style": "llama"}, {"style": "llama", "moe_router_topk": 2}
UNLIKE = {"neighbours_unmasked", "pyramid_residual"}
#: Those whose experts are all gated, without biases, and as many in each layer.
PACKED = {name for name, (_, options, *_) in CASES.items() if "style" in options} - UNLIKE
CHANGING = {"neighbours_unmasked", "pool_locked"}
SHARED = [
    n for n, (layout, o, *_) in CASES.items() if (layout == "samoe" or "expert_sharing" in o) and n not in CHANGING
]
#: Of a training state, what another file of the same model has otherwise.
VOLATILE = ("digests", "digest", "optimizer_steps")


def assert_same_tensors(reader: Any, expected: dict[str, torch.Tensor]) -> None:
    """A checkpoint holds exactly the expected model, bit for bit."""
    assert set(reader.tensors) == {name for name in expected if not name.startswith("optimizer.")}
    for name in reader.tensors:
        tensor = reader.read(name)
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("case", first_by_day(CASES, len(TABLE["by day"])))
def test_an_export_gives_our_logits_and_text_and_comes_back(case: str, tmp_path: Path) -> None:
    layout, options, architecture, *other = CASES[case]
    asked, computed = other[0] if other else ("auto", architecture)
    words, length = ("--hf-model-type", asked), 0 if case == "relu" else 30
    ours, folder, model = exported(layout, options, tmp_path, *words, tolerance=1e-4, length=length)
    assert type(model).__name__ == computed
    if other:
        plan = run("--load-dir", ours.root, "--save-dir", tmp_path / "auto", "--to", "hf", "--dry-run")[1]
        assert f"the Hugging Face class {architecture}" in plan
    reader, original = open_folder(converted(folder, tmp_path / "back")).tensors, open_folder(ours.root).tensors
    assert_same_tensors(reader, ours.source.weights)
    assert reader.config == original.config
    states = (
        {k: v for k, v in state.items() if k not in VOLATILE} for state in (reader.train_state, original.train_state)
    )
    assert next(states) == next(states)
    if architecture == OWN:
        assert_named_as_vllm_looks_for_them(case, ours, model)
        (folder / "megatron_samoe.json").unlink()  # config.json says the model without it
        again = native(tmp_path / "again", open_folder(converted(folder, tmp_path / "told")).tensors)
        torch.testing.assert_close(again.logits(some_ids()), ours.logits(some_ids()), rtol=1e-5, atol=3e-5)


def assert_named_as_vllm_looks_for_them(case: str, ours: Any, model: Any) -> None:
    """Experts of one kind have the name by which vLLM finds them; each set is there once."""
    packed = {name.split(".")[-2] for name, _ in model.named_parameters() if "_proj" in name and "experts." in name}
    assert packed <= {"experts" if case in PACKED else "unlike_experts"}
    sets = {name.split(".")[3] for name, _ in model.named_parameters() if ".sets." in name}
    assert sets == {str(s.number) for s in ours.loaded.model.sources if s.way.in_sets}


@pytest.mark.parametrize("case", first_by_day(SHARED, 12))
def test_folding_by_hand_and_on_export_agree(case: str, tmp_path: Path) -> None:
    layout, options, *_ = CASES[case]
    words = ("--hf-model-type", "samoe")
    ours, folder, kept = exported(layout, options, tmp_path, *words, tolerance=1e-4, length=0)
    folded = theirs(converted(ours.root, tmp_path / "folded", "--hf-model-type", "samoe", "--fold"))
    by_hand = kept.fold_pool()
    by_hand.save_pretrained(tmp_path / "saved")
    assert by_hand.state_dict().keys() == folded.state_dict().keys()
    assert not any("expert_pool" in name or "combination" in name for name in by_hand.state_dict())
    for model in (folded, by_hand, theirs(tmp_path / "saved")):
        assert (their_logits(model, some_ids()) - ours.logits(some_ids())).abs().max() < 1e-4
    assert (folder / "model.safetensors").stat().st_size < (tmp_path / "saved/model.safetensors").stat().st_size


@pytest.mark.parametrize(("layout", "options", "architecture"), TABLE["folded"])
def test_folded_experts_go_into_stock_classes(
    layout: str, options: dict[str, Any], architecture: str, tmp_path: Path
) -> None:
    _, _, model = exported(layout, options, tmp_path, "--fold", tolerance=1e-4, length=20)
    assert type(model).__name__ == architecture


@pytest.mark.parametrize("case", sorted(CHANGING))
def test_candidates_that_change_are_not_folded(case: str, tmp_path: Path) -> None:
    ours = native(tmp_path / "native", random_source("moe", **CASES[case][1]))
    status, _, error = run("--load-dir", ours.root, "--save-dir", tmp_path / "hf", "--fold")
    assert status != 0 and "cannot be kept where experts are shared otherwise" in error
    assert not (tmp_path / "hf").exists()


def test_a_clean_process_loads_the_class_without_this_package(tmp_path: Path) -> None:
    layout, options, _ = CASES["mixed"]
    ours, folder, _ = exported(layout, options, tmp_path, tolerance=1e-4, length=0)
    ids_BS = some_ids(1, 12)
    program = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, dtype='auto', trust_remote_code=True).eval()\n"
        f"torch.save(model(torch.tensor({ids_BS.tolist()})).logits.detach(), {str(tmp_path / 'logits.pt')!r})\n"
        "assert not any(name.startswith('megatron_samoe') for name in sys.modules)\n"
    )
    environment = {"HF_HOME": str(tmp_path), "PATH": ""}
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path, env=environment)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), ours.logits(ids_BS), rtol=1e-5, atol=3e-5)


def test_a_map_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    _, folder = sent(tmp_path, "moe", CASES["tied"][1])
    config = json.loads((folder / "config.json").read_text())
    (folder / "megatron_samoe.json").unlink()
    for entry in ("0,0", "0,0,0,banana", 7):
        (folder / "config.json").write_text(json.dumps({**config, "expert_sharing": entry}))
        status, _, error = run("--load-dir", folder, "--save-dir", tmp_path / "back")
        assert status != 0 and "expert" in error and error.count("\n") == 1, error


@pytest.mark.parametrize("layout", ["dense", "moe"])
def test_bf16_checkpoints_come_back_bit_for_bit(layout: str, tmp_path: Path) -> None:
    options = {**(MOE if layout == "moe" else LLAMA), "bf16": True}
    ours, folder = sent(tmp_path, layout, options, "--max-shard-size", "60KB")
    assert (folder / "model.safetensors.index.json").is_file()
    model = theirs(folder)
    assert model.dtype == torch.bfloat16 and model.config.eos_token_id == 256
    assert_same_tensors(open_folder(converted(folder, tmp_path / "back")).tensors, ours.source.weights)


def test_another_precision_is_that_of_rounding(tmp_path: Path) -> None:
    ours, folder = sent(tmp_path, "moe", MOE, "--dtype", "bf16")
    state = theirs(folder).state_dict()
    assert all(t.dtype == torch.bfloat16 for t in state.values())
    expected = ours.source.weights["layers.1.attention.output.weight"].bfloat16()
    assert torch.equal(state["model.layers.1.self_attn.o_proj.weight"], expected)
    reader = open_folder(converted(folder, tmp_path / "back", "--dtype", "fp32")).tensors
    assert torch.equal(reader.read("layers.1.attention.output.weight"), expected.float())
    assert not reader.config["training"]["bf16"]


def test_the_folder_is_complete(tmp_path: Path) -> None:
    ours, folder = sent(tmp_path, "moe", MOE)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer(PROMPT).input_ids == ours.prompt and tokenizer.decode(ours.prompt) == PROMPT
    assert tokenizer.eos_token_id == 256 and tokenizer.model_max_length == 64
    settings = transformers.GenerationConfig.from_pretrained(folder)
    assert settings.eos_token_id == 256 and not settings.do_sample
    card = (folder / "README.md").read_text()
    assert "MixtralForCausalLM" in card and "| experts | 4 in each of 4 layers, 2 per token |" in card


@pytest.mark.parametrize("case", TABLE["balanced"])
def test_transformers_balances_a_layer_as_we_train_it(case: str, tmp_path: Path) -> None:
    """transformers sums over the chosen experts, of which ours is the mean, and over layers it averages first."""
    ours, folder = sent(tmp_path, "moe", {"num_layers": 1, **TABLE["balanced"][case]})
    model, ids_BS = theirs(folder), some_ids(1, 65)
    batch = {"tokens": ids_BS[:, :-1], "labels": ids_BS[:, 1:], "loss_mask": torch.ones(1, ids_BS.shape[1] - 1)}
    on, off = (model(batch["tokens"], labels=batch["labels"], output_router_logits=flag) for flag in (True, False))
    (F.cross_entropy(off.logits[0], batch["labels"][0]) + (on.loss - off.loss) / 2).backward()
    routers = (".gate.weight", ".router.weight", ".router.layer.weight")
    expected = [p.grad for name, p in model.named_parameters() if name.endswith(routers)]
    assert len(expected) == 1
    (folder / "megatron_samoe.json").unlink()  # or an import would take what it remembers
    read = open_folder(converted(folder, tmp_path / "back")).tensors
    for source in (ours.source, read):
        torch.testing.assert_close(router_gradients(source, batch), expected, rtol=1e-3, atol=1e-5)
