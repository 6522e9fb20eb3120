"""Exports to stock classes of transformers compute what our checkpoints compute, and come back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_samoe.convert.opener import open_folder
from megatron_samoe.dist_checkpointing.global_tensors import CheckpointReader
from tests.harness.pairs import first_by_day
from tests.harness.tables import table
from tests.parity.hf_models import (
    PROMPT,
    converted,
    exported,
    native,
    random_source,
    some_ids,
    theirs,
    transformers,
)
from tests.unit.convert.memory_source import router_gradients

pytestmark = pytest.mark.parity

LLAMA: dict[str, Any] = {"style": "llama"}
MOE: dict[str, Any] = {"style": "llama", "moe_router_topk": 2}
#: Ends of names of routers' weights.
ROUTERS = (".gate.weight", ".router.weight", ".router.layer.weight")
#: Layout, options, the class that auto takes, and the class to ask for where it is another.
CASES: dict[str, tuple[str, dict[str, Any], str, str | None]] = table(__file__)["models"]


def assert_same_tensors(reader: CheckpointReader, expected: dict[str, torch.Tensor]) -> None:
    """A checkpoint holds exactly the expected model, bit for bit."""
    assert set(reader.tensors) == {name for name in expected if not name.startswith("optimizer.")}
    for name in reader.tensors:
        tensor = reader.read(name)
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("case", first_by_day(CASES, 9))
def test_stock_classes_give_our_logits_and_text_and_come_back(case: str, tmp_path: Path) -> None:
    layout, options, architecture, asked = CASES[case]
    words = ("--to", "hf", "--hf-model-type", asked or "auto")
    ours, folder, model = exported(layout, options, tmp_path, *words, tolerance=1e-4)
    if asked is not None:
        auto = json.loads((converted(ours.root, tmp_path / "auto", "--to", "hf") / "config.json").read_text())
        assert auto["architectures"] == [architecture]
    assert type(model).__name__ == (architecture if asked is None else "OlmoeForCausalLM")
    back = converted(folder, tmp_path / "back")
    reader = open_folder(back).tensors
    assert_same_tensors(reader, ours.source.weights)
    original = open_folder(ours.root).tensors
    assert reader.config == original.config
    volatile = ("digests", "digest", "optimizer_steps")
    assert {k: v for k, v in reader.train_state.items() if k not in volatile} == {
        k: v for k, v in original.train_state.items() if k not in volatile
    }


@pytest.mark.parametrize(
    ("options", "architecture"),
    [
        ({**MOE, "samoe_granularity": "expert", "samoe_normalization": "l2"}, "MixtralForCausalLM"),
        ({**LLAMA, "moe_layer_freq": "0101"}, "Qwen2MoeForCausalLM"),
        ({**MOE, "qk_layernorm": True}, "Qwen3MoeForCausalLM"),
    ],
    ids=["mixtral", "qwen2_moe", "qwen3_moe"],
)
def test_a_folded_pool_is_a_stock_mixture(options: dict[str, Any], architecture: str, tmp_path: Path) -> None:
    _, _, model = exported("samoe", options, tmp_path, "--fold", tolerance=1e-4, length=20)
    assert type(model).__name__ == architecture


@pytest.mark.parametrize("layout", ["dense", "moe"])
def test_bf16_checkpoints_come_back_bit_for_bit(layout: str, tmp_path: Path) -> None:
    source = random_source(layout, **(MOE if layout == "moe" else LLAMA), bf16=True)
    root = native(tmp_path / "native", source).root
    folder = converted(root, tmp_path / "hf", "--to", "hf", "--max-shard-size", "60KB")
    assert (folder / "model.safetensors.index.json").is_file()
    model = theirs(folder)
    assert model.dtype == torch.bfloat16 and model.config.eos_token_id == 256
    assert_same_tensors(open_folder(converted(folder, tmp_path / "back")).tensors, source.weights)


def test_another_precision_is_that_of_rounding(tmp_path: Path) -> None:
    source = random_source("moe", **MOE)
    root = native(tmp_path / "native", source).root
    folder = converted(root, tmp_path / "hf", "--to", "hf", "--dtype", "bf16")
    state = theirs(folder).state_dict()
    assert all(t.dtype == torch.bfloat16 for t in state.values())
    expected = source.weights["layers.1.attention.output.weight"].bfloat16()
    assert torch.equal(state["model.layers.1.self_attn.o_proj.weight"], expected)
    reader = open_folder(converted(folder, tmp_path / "back", "--dtype", "fp32")).tensors
    assert torch.equal(reader.read("layers.1.attention.output.weight"), expected.float())
    assert not reader.config["training"]["bf16"]


def test_the_folder_is_complete(tmp_path: Path) -> None:
    ours = native(tmp_path / "native", random_source("moe", **MOE))
    folder = converted(ours.root, tmp_path / "hf", "--to", "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer(PROMPT).input_ids == ours.prompt and tokenizer.decode(ours.prompt) == PROMPT
    assert tokenizer.eos_token_id == 256 and tokenizer.model_max_length == 64
    settings = transformers.GenerationConfig.from_pretrained(folder)
    assert settings.eos_token_id == 256 and not settings.do_sample
    card = (folder / "README.md").read_text()
    assert "MixtralForCausalLM" in card and "| experts | 4 in each of 4 layers, 2 per token |" in card


def test_what_transformers_saves_again_comes_back_too(tmp_path: Path) -> None:
    source = random_source("moe", **MOE)
    folder = converted(native(tmp_path / "native", source).root, tmp_path / "hf", "--to", "hf")
    theirs(folder).save_pretrained(tmp_path / "again", max_shard_size="50KB")
    reader = open_folder(converted(tmp_path / "again", tmp_path / "back")).tensors
    for name in source.weights:
        if not name.startswith("training."):
            assert torch.equal(reader.read(name)[:257], source.weights[name][:257]), name


@pytest.mark.parametrize(
    "options",
    [
        {**MOE, "moe_router_load_balancing_type": "none"},
        {**MOE, "moe_aux_loss_coeff": 0.3},
        {**MOE, "moe_aux_loss_coeff": 0.4, "qk_layernorm": True},
        {**MOE, "moe_aux_loss_coeff": 0.2, "moe_router_pre_softmax": True},
        {**MOE, "moe_aux_loss_coeff": 0.3, "qk_layernorm": True, "qk_layernorm_scope": "all"},
        {**MOE, "moe_aux_loss_coeff": 0.3, "residual_multiplier": 1.5},
    ],
    ids=["none", "mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "granitemoe"],
)
def test_transformers_balances_a_layer_as_we_train_it(options: dict[str, Any], tmp_path: Path) -> None:
    """transformers sums over the chosen experts, of which ours is the mean, and over layers it averages first."""
    source = random_source("moe", num_layers=1, **options)
    folder = converted(native(tmp_path / "native", source).root, tmp_path / "hf", "--to", "hf")
    model, ids_BS = theirs(folder), some_ids(1, 65)
    batch = {"tokens": ids_BS[:, :-1], "labels": ids_BS[:, 1:], "loss_mask": torch.ones(1, ids_BS.shape[1] - 1)}
    on, off = (model(batch["tokens"], labels=batch["labels"], output_router_logits=flag) for flag in (True, False))
    (F.cross_entropy(off.logits[0], batch["labels"][0]) + (on.loss - off.loss) / 2).backward()
    expected = [p.grad for name, p in model.named_parameters() if name.endswith(ROUTERS)]
    assert len(expected) == 1
    (folder / "megatron_samoe.json").unlink()  # or an import would take what it remembers
    read = open_folder(converted(folder, tmp_path / "back")).tensors
    for ours in (source, read):
        torch.testing.assert_close(router_gradients(ours, batch), expected, rtol=1e-3, atol=1e-5)
