"""Every way of sharing experts, and every router, in our own class for transformers; and folded, in stock classes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_samoe.convert.opener import open_folder
from tests.harness.pairs import first_by_day
from tests.harness.tables import table
from tests.parity.hf_models import Native, converted, native, random_source, run, some_ids, their_logits, theirs

pytestmark = pytest.mark.parity

LLAMA: dict[str, Any] = {"style": "llama", "moe_router_topk": 2, "moe_ffn_hidden_size": 24}
CASES: dict[str, dict[str, Any]] = table(__file__)["models"]
#: Those whose experts are all gated, without biases, and as many in each layer.
PACKED = {name for name, options in CASES.items() if "style" in options} - {"neighbours_unmasked", "pyramid_residual"}


def assert_same_logits(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=3e-5)


def exported(options: dict[str, Any], root: Path, *words: object) -> tuple[Native, Path]:
    source = random_source("moe", **options)
    for name, factors_E in source.weights.items():
        if name.endswith(".candidates"):
            factors_E.copy_(torch.tensor([1.0, 0.0, 0.5, 1.0]).repeat(len(factors_E) // 4))
    ours = native(root / "native", source)
    return ours, converted(ours.root, root / "hf", *words)


@pytest.mark.parametrize("case", first_by_day(CASES, 10))
def test_our_class_gives_our_logits_and_comes_back(case: str, tmp_path: Path) -> None:
    ours, folder = exported(CASES[case], tmp_path, "--to", "hf", "--hf-model-type", "samoe")
    model, ids_BS = theirs(folder), some_ids()
    expected = ours.logits(ids_BS)
    assert expected.std() > 0.1
    assert_same_logits(their_logits(model, ids_BS), expected)
    # Experts of one kind have the name by which vLLM finds them; each set is there once.
    packed = {name.split(".")[-2] for name, _ in model.named_parameters() if "_proj" in name and "experts." in name}
    assert packed <= {"experts" if case in PACKED else "unlike_experts"}
    sets = {name.split(".")[3] for name, _ in model.named_parameters() if ".sets." in name}
    assert sets == {str(s.number) for s in ours.loaded.model.sources if s.way.in_sets}
    reader = open_folder(converted(folder, tmp_path / "back")).tensors
    names = {name for name in ours.source.weights if not name.startswith("optimizer.")}
    assert set(reader.tensors) == names
    for name in names:
        assert torch.equal(reader.read(name), ours.source.weights[name]), name
    assert reader.config["moe"] == ours.source.config["moe"]


@pytest.mark.parametrize("case", first_by_day(CASES, 6))
def test_its_config_tells_the_model_without_ours(case: str, tmp_path: Path) -> None:
    ours, folder = exported(CASES[case], tmp_path, "--to", "hf", "--hf-model-type", "samoe")
    (folder / "megatron_samoe.json").unlink()
    back = native(tmp_path / "again", open_folder(converted(folder, tmp_path / "back")).tensors)
    assert_same_logits(back.logits(some_ids()), ours.logits(some_ids()))


CHANGING = {"neighbours_unmasked", "pool_locked"}
SHARED = [name for name, options in CASES.items() if "expert_sharing" in options and name not in CHANGING]


@pytest.mark.parametrize("case", first_by_day(SHARED, 7))
def test_folding_by_hand_and_on_export_agree(case: str, tmp_path: Path) -> None:
    ours, folder = exported(CASES[case], tmp_path, "--to", "hf", "--hf-model-type", "samoe")
    folded = theirs(converted(ours.root, tmp_path / "folded", "--hf-model-type", "samoe", "--fold"))
    by_hand, ids_BS = theirs(folder).fold_pool(), some_ids()
    by_hand.save_pretrained(tmp_path / "saved")
    assert by_hand.state_dict().keys() == folded.state_dict().keys()
    assert not any("expert_pool" in name for name in by_hand.state_dict())
    for model in (folded, by_hand, theirs(tmp_path / "saved")):
        assert_same_logits(their_logits(model, ids_BS), ours.logits(ids_BS))


@pytest.mark.parametrize(
    ("options", "family"),
    [
        ({**LLAMA, "expert_sharing": "tied"}, "MixtralForCausalLM"),
        ({**LLAMA, "expert_sharing": "scaled", "qk_layernorm": True}, "Qwen3MoeForCausalLM"),
        ({**LLAMA, "expert_sharing": "pool", "moe_router_pre_softmax": True}, "Qwen2MoeForCausalLM"),
        ({**LLAMA, "expert_sharing": "own,combined*2,own"}, "MixtralForCausalLM"),
    ],
)
def test_folded_experts_go_into_stock_classes(options: dict[str, Any], family: str, tmp_path: Path) -> None:
    ours, folder = exported(options, tmp_path, "--fold")
    model, ids_BS = theirs(folder), some_ids()
    assert type(model).__name__ == family
    assert_same_logits(their_logits(model, ids_BS), ours.logits(ids_BS))


def test_routers_that_no_stock_class_has_are_refused_by_name(tmp_path: Path) -> None:
    options = {**CASES["bias_groups_scaling"], "moe_residual_mlp": True, "expert_sharing": "tied"}
    ours = native(tmp_path / "native", random_source("moe", **options))
    status, _, error = run("--load-dir", ours.root, "--save-dir", tmp_path / "hf", "--hf-model-type", "mixtral")
    assert status != 0 and not (tmp_path / "hf").exists()
    for name in ("expert-bias", "num-groups", "topk-scaling-factor"):
        assert f"--moe-router-{name}" in error or f"--moe-router-enable-{name}" in error
    assert "--moe-residual-mlp" in error and error.rstrip().endswith("These classes do: samoe")


@pytest.mark.parametrize("case", sorted(CHANGING))
def test_candidates_that_change_are_not_folded(case: str, tmp_path: Path) -> None:
    source = random_source("moe", **CASES[case])
    ours = native(tmp_path / "native", source)
    status, _, error = run("--load-dir", ours.root, "--save-dir", tmp_path / "hf", "--fold")
    assert (
        status != 0 and "cannot be kept where experts are shared otherwise" in error and not (tmp_path / "hf").exists()
    )


def test_a_clean_process_loads_the_class_without_this_package(tmp_path: Path) -> None:
    ours, folder = exported(CASES["mixed"], tmp_path, "--to", "hf")
    ids_BS = some_ids(1, 12)
    program = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, dtype='auto', trust_remote_code=True).eval()\n"
        f"torch.save(model(torch.tensor({ids_BS.tolist()})).logits.detach(), {str(tmp_path / 'logits.pt')!r})\n"
        "assert not any(name.startswith('megatron_samoe') for name in sys.modules)\n"
    )
    subprocess.run(
        [sys.executable, "-c", program], check=True, cwd=tmp_path, env={"HF_HOME": str(tmp_path), "PATH": ""}
    )
    theirs_BSV = torch.load(tmp_path / "logits.pt")
    assert_same_logits(theirs_BSV, ours.logits(ids_BS))


def test_a_map_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    _, folder = exported(CASES["tied"], tmp_path, "--to", "hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "megatron_samoe.json").unlink()
    for entry in ("0,0", "0,0,0,banana", 7):
        (folder / "config.json").write_text(json.dumps({**config, "expert_sharing": entry}))
        status, _, error = run("--load-dir", folder, "--save-dir", tmp_path / "back")
        assert status != 0 and "expert" in error and error.count("\n") == 1, error
