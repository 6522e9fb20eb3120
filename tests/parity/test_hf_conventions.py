"""What programs rely on holds for our own class: those that rebuild transformers' models, as vLLM's Transformers back end, and those
that put weights in place around a module's forward: adapters (peft), offloading (accelerate). And uses of it in transformers, as
`class_uses` lists them: by day with the installed version, at night with the oldest and the newest that this package supports."""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from megatron_samoe.config.model import ModelConfig
from megatron_samoe.convert.hf.families.samoe import _RARE_MODEL_ENTRIES, _older_parts
from megatron_samoe.convert.hf.remote_code.configuration_samoe import DEFAULTS, SamoeConfig
from megatron_samoe.convert.hf.source import HFSource
from tests.harness.other_programs import with_packages
from tests.harness.tables import table
from tests.parity import class_uses
from tests.parity.hf_models import sent, some_ids, their_logits, theirs, transformers

pytestmark = pytest.mark.parity
TABLE = table(__file__)

#: Models whose experts vLLM computes, others, and those whose layers share experts, in every form of their parameters.
PACKED, UNLIKE, SHARED = TABLE["packed"], TABLE["unlike"], TABLE["shared"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An export of each case."""
    root, made = tmp_path_factory.mktemp("conventions"), {}
    for name, (layout, options) in (PACKED | UNLIKE | SHARED | TABLE["other"]).items():
        _, made[name] = sent(root / name, layout, options, "--hf-model-type", "samoe")
    return made


def load(folder: Path, **options: Any) -> Any:
    return transformers.AutoModel.from_pretrained(folder, trust_remote_code=True, **options).eval()


def test_automodel_gives_the_base_model(folders: dict[str, Path]) -> None:
    model, ids_BS = theirs(folders["tied"]), some_ids()
    base = load(folders["tied"])
    assert type(base).__name__ == "SamoeModel" and base.is_backend_compatible()
    states = base(input_ids=ids_BS, use_cache=False, return_dict=False)
    assert isinstance(states, tuple) and len(states) == 1
    head = model.lm_head if hasattr(model, "lm_head") else base.embed_tokens
    logits = nn.functional.linear(states[0], head.weight)
    assert torch.equal(logits, their_logits(model, ids_BS))


@pytest.mark.parametrize("case", ["own", "gelu"])
def test_attention_goes_through_the_interface_with_its_keywords(case: str, folders: dict[str, Path]) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    seen: list[Any] = []

    def counting(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        seen.append((module.layer_idx, query.shape[1], key.shape[1], kwargs.pop("marker")))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)

    model, ids_BS = theirs(folders[case]), some_ids()
    expected = their_logits(model, ids_BS)
    ALL_ATTENTION_FUNCTIONS.register("counting", counting)
    model.set_attn_implementation("counting")
    assert torch.equal(model(input_ids=ids_BS, marker=7).logits, expected)
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    assert seen == [(layer, heads, kv_heads, 7) for layer in range(4)]


class StandIn(nn.Module):
    """Packed experts as vLLM computes them: gated SiLU of three-dimensional matrices, and nothing else."""

    def __init__(self, experts: nn.Module):
        super().__init__()
        self.up, self.down, self.num_calls = experts.gate_up_proj, experts.down_proj, 0

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        self.num_calls += 1
        assert top_k_index.min() >= 0 and top_k_index.shape == top_k_weights.shape
        gate, up = torch.einsum("th,tkfh->tkf", hidden_states, self.up[top_k_index]).chunk(2, -1)
        y_TKH = torch.einsum("tkf,tkhf->tkh", nn.functional.silu(gate) * up, self.down[top_k_index])
        return (y_TKH * top_k_weights[..., None]).sum(1)


def replace_packed(module: nn.Module) -> list[StandIn]:
    """Puts stand-ins in place of the modules that vLLM would take; returns each once."""
    made = []
    for name, child in list(module.named_children()):
        parameters = list(child.parameters())
        if name == "experts" and parameters and all(p.ndim == 3 for p in parameters):
            setattr(module, name, StandIn(child))
            made.append(getattr(module, name))
        else:
            made += replace_packed(child)
    return made


@pytest.mark.parametrize("case", PACKED)
def test_packed_experts_can_be_replaced_and_sets_are_there_once(case: str, folders: dict[str, Path]) -> None:
    model, ids_BS = theirs(folders[case]), some_ids()
    expected = their_logits(model, ids_BS)
    made = replace_packed(model)
    assert len(made) == {"own": 4, "tied": 2, "scaled": 1, "relu": 1}[case]
    torch.testing.assert_close(their_logits(model, ids_BS), expected, rtol=1e-4, atol=1e-4)
    assert sum(stand_in.num_calls for stand_in in made) == 4


@pytest.mark.parametrize("case", ["own", "combined", "biases"])
def test_experts_under_a_compiler_compute_the_same(
    case: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids_BS = theirs(folders[case]), some_ids()
    expected = their_logits(model, ids_BS)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(their_logits(model, ids_BS), expected, rtol=1e-4, atol=1e-4)


def test_every_linear_layer_has_its_place_in_the_tensor_parallel_plan(folders: dict[str, Path]) -> None:
    model = load(folders["combined"])
    plan = {name.replace("layers.*.", "") for name in model.config.base_model_tp_plan}
    linear = [name.split(".", 2)[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert linear and set(linear) <= plan


def test_forwards_have_the_names_that_others_pass(folders: dict[str, Path]) -> None:
    experts = inspect.signature(type(load(folders["own"]).layers[0].mlp.experts).forward).parameters
    assert list(experts)[1:4] == ["hidden_states", "top_k_index", "top_k_weights"]


def test_training_reaches_banks_and_coefficients(folders: dict[str, Path]) -> None:
    model, ids_BS = theirs(folders["combined"]).train(), some_ids()
    model(ids_BS, labels=ids_BS).loss.backward()
    shared = [p for name, p in model.named_parameters() if "expert_pool" in name or name.endswith("combination")]
    assert len(shared) == 6 and all(p.grad is not None and p.grad.any() for p in shared)


def test_routers_and_the_pool_stay_in_fp32_and_a_new_model_has_first_values(folders: dict[str, Path]) -> None:
    model = theirs(folders["combined"], dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        full = any(word in name for word in ("router", "combination", "expert_pool"))
        assert parameter.dtype == (torch.float32 if full else torch.bfloat16), name
    fresh = transformers.AutoModelForCausalLM.from_config(model.config, trust_remote_code=True).eval()
    for made in (model, fresh):
        assert their_logits(made, some_ids()).isfinite().all()
    assert fresh.num_parameters() == model.num_parameters()


def test_results_that_are_asked_for_and_what_the_class_does_not_do(folders: dict[str, Path]) -> None:
    model, ids_BS = theirs(folders["combined"]), some_ids()
    with pytest.raises(ValueError, match="output_attentions is not supported"):
        model(ids_BS, output_attentions=True)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match=r"has learned \d+ positions; the sequence needs 401"):
        theirs(folders["banks_with_biases"])(ids_BS.repeat(1, 11)[:, :401])
    states = model(ids_BS, output_hidden_states=True).hidden_states
    assert len(states) == 5 and states[0].shape == (2, 40, 32)
    last_BSV = model(ids_BS, logits_to_keep=1).logits
    torch.testing.assert_close(last_BSV, their_logits(model, ids_BS)[:, -1:], rtol=1e-4, atol=1e-5)
    model.resize_token_embeddings(300)
    assert model(ids_BS).logits.shape[-1] == 300


def test_its_defaults_are_ours() -> None:
    """An entry that is not written is at our default."""
    ours = {name: getattr(ModelConfig, name) for name in _RARE_MODEL_ENTRIES}
    assert {name: DEFAULTS[name] for name in _RARE_MODEL_ENTRIES} == ours


@pytest.mark.parametrize(("options", "is_whole"), TABLE["attention in plans"])
def test_plans_leave_out_attention_that_no_rank_can_have_a_part_of(options: dict[str, Any], is_whole: bool) -> None:
    config = SamoeConfig(**options)
    names = {name.split(".")[2] for name in config.base_model_tp_plan}
    assert names == ({"mlp"} if is_whole else {"mlp", "self_attn"}) and config.has_whole_attention == is_whole


@pytest.mark.parametrize("case", ["tied", "gelu", "combined", "banks_with_biases"])
def test_folders_of_earlier_versions_are_read(case: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """With the names of version 0.1; or with banks of a dim for banks and one for experts."""
    source = HFSource(folders[case])
    if case == "banks_with_biases":
        stored = load_file(folders[case] / "model.safetensors").items()
        older = {name: t.unflatten(0, (2, -1)) if ".bank." in name else t for name, t in stored}
    else:
        older = {part.name: part.take(source.read(part.native)).contiguous() for part in _older_parts(source.native)}
        assert not set(older) & set(source.folder.tensors) - {"lm_head.weight"}
    for path in folders[case].glob("*.json"):
        shutil.copy(path, tmp_path)
    save_file(older, tmp_path / "model.safetensors")
    again = HFSource(tmp_path)
    for name in source.native.tensors:
        assert torch.equal(again.read(name), source.read(name)), name


@pytest.mark.parametrize("case", SHARED)
def test_what_layers_share_can_be_kept_on_disk(case: str, folders: dict[str, Path]) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed (extra finetune)")
    assert class_uses.outcome(class_uses.on_disk, theirs(folders[case])) is None


#: Stock classes, which say what a version of transformers can do; models of our class, each with one of these.
STOCK: dict[str, dict[str, Any]] = TABLE["stock"]
MODELS: dict[str, tuple[str, dict[str, Any], str]] = TABLE["uses"]
PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def export(root: Path, name: str) -> Path:
    """Returns the folder of a model, exported with its own class or a stock one."""
    layout, options, _ = MODELS.get(name, ("dense", {"style": "llama", **STOCK.get(name, {})}, ""))
    words = ("--hf-model-type", "samoe") if name in MODELS else ()
    return sent(root / name, layout, options, *words)[1]


def test_uses_with_the_installed_version(tmp_path: Path) -> None:
    """A model with most of what can go wrong: windows in some layers, a pool, biases of routers."""
    folders = [str(export(tmp_path, name)) for name in ("some_windows", "stock_window")]
    assert not list(class_uses.faults(*folders))


@pytest.mark.night
@pytest.mark.parametrize("which", ["oldest", "newest"])
def test_uses_with_every_supported_version(which: str, tmp_path: Path) -> None:
    oldest = re.search(r"transformers>=([\d.]+)", PYPROJECT.read_text())
    assert oldest is not None
    wanted = f"transformers=={oldest[1]}.*" if which == "oldest" else "transformers"
    environment = with_packages(tmp_path, [wanted], ["--no-deps", "accelerate"])
    folders = {name: str(export(tmp_path, name)) for name in (*MODELS, *STOCK)}
    paths = [folders[name] for model, (*_, stock) in MODELS.items() for name in (model, stock)]
    done = subprocess.run(
        [sys.executable, class_uses.__file__, *paths], capture_output=True, text=True, env=environment
    )
    print(done.stdout)
    assert done.returncode == 0 and "on_disk" not in done.stdout, done.stdout + done.stderr[-2000:]
    if which == "oldest":
        assert f"transformers {oldest[1]}." in done.stdout
