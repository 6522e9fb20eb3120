"""Models made and saved by transformers give the same logits here, whatever their class, file format and shards; and every family
with experts is compressed, and leaves as a smaller folder."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_samoe.convert.hf.families import families
from megatron_samoe.convert.opener import open_folder
from megatron_samoe.fit.compress.options import CompressOptions
from megatron_samoe.fit.compress.pipeline import Compression
from tests.harness.pairs import first_by_day
from tests.harness.program import write_corpus
from tests.harness.tables import table
from tests.parity.hf_models import converted, our_logits, run, sent, their_logits, theirs, transformers
from tests.unit.convert.memory_source import gradients

pytestmark = pytest.mark.parity
TABLE = table(__file__, tuples=False)

VOCABULARY = 99
SIZES: dict[str, Any] = TABLE["sizes"]
CASES: dict[str, tuple[str, dict[str, Any]]] = TABLE["models"]
#: A case of each class whose sizes are drawn; those whose heads may be of any size; what GPT-2 calls sizes.
DRAWN, FREE_HEADS, GPT2_NAMES = (TABLE[name] for name in ("drawn", "free heads", "names of GPT-2"))


def made(case: str, **changes: Any) -> Any:
    """Returns a random model of transformers."""
    name, options = CASES[case]
    own = dict(options) if name == "GPT2" else {**SIZES, **options}
    config = getattr(transformers, f"{name}Config")(**{**own, **changes})
    torch.manual_seed(5)
    # Products of all experts together want rows of 16 bytes.
    eager = {"experts_implementation": "eager"} if hasattr(config, "num_experts_per_tok") else {}
    model = transformers.AutoModelForCausalLM.from_config(config, **eager).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)  # norms and biases count too
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.2)
    return model


def random_ids() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, 50), generator=torch.Generator().manual_seed(1))


def assert_comes_back(model: Any, root: Path, folder: Path) -> None:
    """An import is exported to the same class with the same numbers."""
    again = theirs(converted(root, folder, "--to", "hf", "--hf-model-type", model.config.model_type))
    assert type(again) is type(model)
    state = again.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name].to(tensor.dtype), tensor), name


@pytest.mark.parametrize("case", CASES)
def test_random_models_give_their_logits(case: str, tmp_path: Path) -> None:
    model = made(case)
    model.save_pretrained(tmp_path / "hf", max_shard_size="40KB")
    root = converted(tmp_path / "hf", tmp_path / "native")
    expected = their_logits(model, random_ids())
    assert expected.std() > 0.1
    torch.testing.assert_close(our_logits(root, random_ids()), expected, rtol=1e-4, atol=1e-4)
    assert_comes_back(model, root, tmp_path / "back")


def drawn(seed: int) -> tuple[str, dict[str, Any], torch.dtype]:
    """Returns a case, sizes and switches of its class, and the weights' type."""
    case, draw = DRAWN[seed % len(DRAWN)], random.Random(seed)
    kind = getattr(transformers, f"{CASES[case][0]}Config").model_type
    table = next(family.entries.table for family in families() if family.name == kind)
    heads, head_dim, layers = draw.choice((1, 2, 3, 5, 6)), 2 * draw.randint(2, 5), draw.randint(1, 3)
    groups = draw.choice([g for g in range(1, heads + 1) if heads % g == 0])
    latent = {"num_key_value_heads": heads, "head_dim": CASES[case][1].get("qk_rope_head_dim")}
    sizes: dict[str, Any] = {
        **{name: draw.random() < 0.5 for name, default in table.items() if type(default) is bool},
        **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), draw.choice((3, 4, 7))),
        "vocab_size": draw.randint(61, 131),
        "hidden_size": heads * (draw.randint(5, 11) if case in FREE_HEADS else head_dim),
        "intermediate_size": draw.randint(9, 41),
        "moe_intermediate_size": draw.randint(9, 41),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "max_position_embeddings": 40,
        "num_experts_per_tok": draw.randint(2, 3),
        "shared_expert_intermediate_size": draw.randint(5, 21),
        "decoder_sparse_step": draw.randint(1, min(layers, 2)),
        "first_k_dense_replace": layers - 1,
        "q_lora_rank": draw.choice((None, 7)),
        **(latent if "kv_lora_rank" in table else {}),
    }
    if sizes["decoder_sparse_step"] > 1:
        sizes["mlp_only_layers"] = []  # or no layer with experts may be left
    if case == "gpt2":
        sizes = {GPT2_NAMES.get(name, name): value for name, value in sizes.items()}
    dtype = torch.bfloat16 if draw.random() < 0.3 else torch.float32
    return case, {name: value for name, value in sizes.items() if name in table}, dtype


@torch.no_grad()
@pytest.mark.parametrize("seed", first_by_day(range(65), len(DRAWN)))
def test_a_model_of_drawn_sizes_gives_its_logits_and_comes_back(seed: int, tmp_path: Path) -> None:
    """Heads and widths are odd, embeddings tied or not, files sharded, weights in fp32 or bf16."""
    case, sizes, dtype = drawn(seed)
    model = made(case, **sizes).to(dtype)
    model.save_pretrained(tmp_path / "hf", max_shard_size="9KB")
    root = converted(tmp_path / "hf", tmp_path / "native")
    if dtype == torch.float32:
        ids_BS = torch.randint(0, sizes["vocab_size"], (2, 30))
        expected = their_logits(model, ids_BS)
        assert (our_logits(root, ids_BS) - expected).abs().max() < 1e-5 * expected.abs().max(), (case, sizes)
    assert_comes_back(model, root, tmp_path / "back")


@pytest.mark.parametrize("case", first_by_day(TABLE["gradients"], 2))
def test_gradients_are_theirs(case: str, tmp_path: Path) -> None:
    """Their gradients are saved as weights, and come in under our names and in our order."""
    model = made(case, router_aux_loss_coef=0.0)
    model.save_pretrained(tmp_path / "hf")
    ids_BS = torch.randint(0, VOCABULARY, (2, SIZES["max_position_embeddings"] + 1))
    batch = {"tokens": ids_BS[:, :-1], "labels": ids_BS[:, 1:]}
    source = open_folder(converted(tmp_path / "hf", tmp_path / "native")).tensors
    found = gradients(source, {**batch, "loss_mask": torch.ones(batch["labels"].shape)})
    logits_BSV = model(input_ids=batch["tokens"]).logits
    torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), batch["labels"].flatten()).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    model.save_pretrained(tmp_path / "gradients")
    expected = open_folder(converted(tmp_path / "gradients", tmp_path / "imported")).tensors
    assert len(found) > 20
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected.read(name), rtol=1e-3, atol=1e-5, msg=name)


def test_files_of_torch_save_are_read(tmp_path: Path) -> None:
    model = made("llama")
    model.config.save_pretrained(tmp_path / "hf")
    state = model.state_dict() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    named = list(state.items())
    halves = dict(named[: len(named) // 2]), dict(named[len(named) // 2 :])
    parts = {f"pytorch_model-{number:05d}-of-00002.bin": part for number, part in enumerate(halves, 1)}
    for file, part in parts.items():
        torch.save(part, tmp_path / "hf" / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (tmp_path / "hf" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    root = converted(tmp_path / "hf", tmp_path / "native")
    torch.testing.assert_close(our_logits(root, random_ids()), their_logits(model, random_ids()), rtol=1e-4, atol=1e-4)


def test_an_imported_model_goes_through_megatrons_files_and_back(tmp_path: Path) -> None:
    model = made("mixtral")
    model.save_pretrained(tmp_path / "hf")
    files = converted(tmp_path / "hf", tmp_path / "megatron", "--to", "torch_dist")
    again = theirs(converted(files, tmp_path / "back", "--to", "hf"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize(("case", "changes", "message"), TABLE["refused"])
def test_what_ours_cannot_compute_is_refused(case: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    name, options = CASES[case]
    own = {**(options if name == "GPT2" else {**SIZES, **options}), **changes}
    config = getattr(transformers, f"{name}Config")(**own)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "hf")
    status, _, err = run("--load-dir", tmp_path / "hf", "--save-dir", tmp_path / "native")
    assert status == 2 and message in err and err.count("\n") == 1
    assert err.startswith(f"error: {tmp_path}/hf/config.json: ")
    assert not (tmp_path / "native").exists()


@pytest.mark.parametrize("case", TABLE["switched off"])
def test_what_published_files_switch_off_or_repeat_changes_nothing(case: str, tmp_path: Path) -> None:
    """The oracle is what transformers makes of the same folder."""
    made(case).save_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, **TABLE["switched off"][case]}))
    ours = our_logits(converted(tmp_path / "hf", tmp_path / "native"), random_ids())
    torch.testing.assert_close(ours, their_logits(theirs(tmp_path / "hf"), random_ids()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("has_model", [True, False])
def test_an_adapter_is_not_passed_over(has_model: bool, tmp_path: Path) -> None:
    """transformers with peft would add it."""
    (tmp_path / "hf").mkdir()
    if has_model:
        made("llama").save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "hf" / "adapter_model.safetensors").write_bytes(b"")
    status, _, err = run("--load-dir", tmp_path / "hf", "--save-dir", tmp_path / "native")
    assert status != 0 and "adapter" in err and "merge_and_unload" in err and err.count("\n") == 1
    assert not (tmp_path / "native").exists()


def test_a_gate_that_ours_lacks_is_refused(tmp_path: Path) -> None:
    """A model without gates, exported, given gates by others, and imported as what it was."""
    options = {"style": "llama", "moe_router_topk": 2, "moe_shared_expert_intermediate_size": 20}
    _, folder = sent(tmp_path, "moe", options)
    model = theirs(folder)
    torch.nn.init.normal_(model.model.layers[1].mlp.shared_expert_gate.weight)
    model.save_pretrained(folder)
    status, _, err = run("--load-dir", folder, "--save-dir", tmp_path / "native")
    assert status == 1 and "our shared expert has no gate" in err
    (folder / "megatron_samoe.json").unlink()
    root = converted(folder, tmp_path / "native")
    torch.testing.assert_close(our_logits(root, random_ids()), their_logits(model, random_ids()), rtol=1e-4, atol=1e-4)


#: Cases of imports, a family each, and what makes three layers with experts of them.
COMPRESSED: dict[str, dict[str, Any]] = TABLE["compressed"]


def test_no_family_with_experts_is_left_out() -> None:
    words = ("moe", "deepseek", "mixtral")
    has_experts = {family.name for family in families() if any(word in family.name for word in words)}
    assert has_experts - {"samoe"} == {made(case).config.model_type for case in COMPRESSED}


@pytest.mark.parametrize("case", first_by_day(COMPRESSED, 3))
def test_a_folder_becomes_a_smaller_folder(case: str, tmp_path: Path) -> None:
    options = COMPRESSED[case]
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
