"""The plug-in for vLLM: what it makes of a pool, and what it says to a vLLM that it does not know.

vLLM itself runs where VLLM_PYTHON, or this interpreter, has it.
"""

from __future__ import annotations

import inspect
import re
import sys
import types
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import tomllib
import torch
from safetensors import safe_open

import megatron_samoe
from megatron_samoe.errors import CheckpointError, MegatronSamoeError
from megatron_samoe.plugins import vllm
from megatron_samoe.plugins.vllm import experts_plan, interface
from megatron_samoe.plugins.vllm.experts_plan import ExpertsPlan, folder_reader, plan_experts, without_combining
from tests.harness import other_programs
from tests.parity.hf_models import Native, converted, native, random_source, theirs, transformers

LLAMA: dict[str, Any] = {"style": "llama", "moe_router_topk": 2, "moe_ffn_hidden_size": 24}
WIDE = {"hidden_size": 128, "num_attention_heads": 4, "group_query_attention": True, "num_query_groups": 2}


def select(source: Any, factor: float = 1.0) -> None:
    """Makes every layer take bank `layer % 2`, times a factor."""
    layer = 0
    for name, tensor in source.weights.items():
        if name.endswith(".combination"):
            tensor.zero_()
            tensor[..., layer % 2] = factor
            layer += 1


def exported(root: Path, layout: str, options: dict[str, Any], factor: float | None = None) -> tuple[Native, Path]:
    source = random_source(layout, **{**LLAMA, **options})
    if factor is not None:
        select(source, factor)
    ours = native(root / "native", source)
    return ours, converted(ours.root, root / "hf", "--to", "hf", "--hf-model-type", "samoe")


def planned(folder: Path) -> tuple[Any, ExpertsPlan]:
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    return config, plan_experts(config, folder_reader(folder))


def bank_of(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if experts_plan.kind_of_bank(name) is not None]
        return {experts_plan.kind_of_bank(name): file.get_tensor(name) for name in names}


@pytest.mark.parametrize(
    "options", [{}, {"samoe_granularity": "expert", "samoe_normalization": "l2"}, {"samoe_normalization": "softmax"}]
)
def test_layers_that_combine_get_their_own_experts(options: dict[str, Any], tmp_path: Path) -> None:
    _, folder = exported(tmp_path, "samoe", options)
    _, plan = planned(folder)
    assert len(plan.coefficients) == 4 and not plan.selections and not plan.entries
    made = {
        name: w
        for kind, bank in bank_of(folder).items()
        for name, w in plan.weights(kind, bank, "experts", torch.float32)
    }
    folded = {n: p for n, p in theirs(folder).fold_pool().named_parameters() if ".mlp.experts." in n}
    assert made.keys() == folded.keys()
    for name, weight in folded.items():
        torch.testing.assert_close(made[name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("granularity", ["layer", "expert"])
def test_layers_that_select_share_one_set_no_larger_than_the_pool(granularity: str, tmp_path: Path) -> None:
    _, folder = exported(tmp_path, "samoe", {"samoe_granularity": granularity}, factor=1.5)
    config, plan = planned(folder)
    assert len(plan.entries) == config.num_expert_banks * config.num_experts < 4 * config.num_experts
    bank = bank_of(folder)
    for kind, tensor in bank.items():
        ((name, shared),) = plan.weights(kind, tensor, "experts", torch.float32)
        assert name == f"selected.experts.{kind}"
        for layer, selection in plan.selections.items():
            assert selection.factors == (1.5, 1.5)
            for expert, place in enumerate(selection.places):
                assert torch.equal(shared[place], tensor[layer % 2 * config.num_experts + expert])


def test_a_layer_that_combines_beside_others_that_select(tmp_path: Path) -> None:
    source = random_source("samoe", **LLAMA)
    select(source)
    source.weights["layers.1.moe.combination"].fill_(0.5)
    ours = native(tmp_path / "native", source)
    _, plan = planned(converted(ours.root, tmp_path / "hf", "--to", "hf"))
    assert set(plan.selections) == {0, 2, 3} and set(plan.coefficients) == {0, 1, 2, 3}


def test_the_configuration_without_combining_builds_the_same_layers(tmp_path: Path) -> None:
    options = {"num_layers": 6, "expert_sharing": "own,combined*2,0*2,own"}
    _, folder = exported(tmp_path, "moe", options)
    config, plan = planned(folder)
    changed = without_combining(config)
    assert list(plan.coefficients) == [1, 2] and config.expert_sources() != changed.expert_sources()
    assert [source.bank for source in changed.expert_sources()] == [None, None, None, "sets.0", "sets.0", None]
    fresh = transformers.AutoModel.from_config(changed, trust_remote_code=True)
    packed = [name for name, module in fresh.named_modules() if name.endswith(".experts")]
    assert len(packed) == 5 and "expert_pool.sets.0.experts" in packed


def test_a_folder_of_an_older_version_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"model.embedding.word.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"names of version 0\.1: convert the model again"):
        folder_reader(tmp_path)("model.layers.0.mlp.combination")


def stub(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Puts modules with what the plug-in needs in vLLM's place; None leaves a name out."""
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(__version__="9.9"))
    for name, (module, needed) in interface._NEEDED.items():
        place = sys.modules.get(module)
        if not isinstance(place, types.SimpleNamespace):
            place = types.SimpleNamespace()
            monkeypatch.setitem(sys.modules, module, place)
        vars(place).pop(name, None)
        thing = changes.get(name, type(name, (), dict.fromkeys(needed)))
        if thing is not None:
            setattr(place, name, thing)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"FusedMoEFactory": None}, "fused_moe has no FusedMoEFactory"),
        ({"FusedMoEFactory": lambda num_experts: None}, "FusedMoEFactory has no top_k"),
        ({"TransformersForCausalLM": type("Other", (), {})}, "TransformersForCausalLM has no recursive_replace"),
    ],
)
def test_a_vllm_of_another_interface_is_refused_by_name(
    changes: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub(monkeypatch)
    assert vars(interface.vllm_interface()).keys() == interface._NEEDED.keys()
    stub(monkeypatch, **changes)
    with pytest.raises(MegatronSamoeError, match=r"does not know the interface of vLLM 9\.9") as raised:
        interface.vllm_interface()
    assert named in str(raised.value) and "--model-impl transformers" in str(raised.value)


def test_experts_in_plain_torch_compute_what_the_class_does(tmp_path: Path) -> None:
    from megatron_samoe.convert.hf.remote_code.configuration_samoe import SamoeConfig
    from megatron_samoe.convert.hf.remote_code.moe_samoe import Experts
    from megatron_samoe.plugins.vllm.plain_experts import PlainExperts

    generator = torch.Generator().manual_seed(5)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    for act, bias in (("gelu_tanh", True), ("gelu_tanh", False), ("swiglu", True)):
        config = SamoeConfig(
            **sizes, hidden_act=act, linear_bias=bias, expert_layout="moe", moe_layers=[True], num_experts=4
        )
        experts = Experts(config, 4)
        for parameter in experts.parameters():
            torch.nn.init.normal_(parameter, generator=generator)
        x_TH = torch.randn(9, 16, generator=generator)
        ids_TK = torch.randint(0, 4, (9, 2), generator=generator)
        weights_TK = torch.rand(9, 2, generator=generator)
        for scale in (None, torch.tensor(0.7)):
            expected = experts(x_TH, ids_TK, weights_TK, scale=scale)
            torch.testing.assert_close(PlainExperts(experts)(x_TH, ids_TK, weights_TK, scale), expected)


def test_attention_is_found_by_the_lines_that_vllm_looks_for() -> None:
    """vLLM reads the source of `forward`: a function of transformers' is looked up in it once, and called with its scaling."""
    from megatron_samoe.convert.hf.remote_code.attention_samoe import Attention, LatentAttention

    for kind in (Attention, LatentAttention):
        source = inspect.getsource(kind.forward)
        (name,) = re.findall(r"(\w+) = ALL_ATTENTION_FUNCTIONS[.[]", source)
        assert source.count(f" {name}(") == 1 and "scaling=self.scaling" in source


def test_the_entry_point_is_declared() -> None:
    project = tomllib.loads((Path(megatron_samoe.__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"megatron_samoe": "megatron_samoe.plugins.vllm:register"}
    for point in entry_points(group="vllm.general_plugins"):
        # An installation from before a module moved has its former name.
        assert point.name != "megatron_samoe" or point.load() is vllm.register


@pytest.mark.skipif(other_programs.VLLM_PYTHON is None, reason=other_programs.NO_VLLM)
@pytest.mark.parametrize("factor", [1.25, None])
def test_vllm_gives_our_greedy_text(factor: float | None, tmp_path: Path) -> None:
    from megatron_samoe.language_model import LanguageModel

    ours, folder = exported(tmp_path, "samoe", WIDE, factor)
    prompts, model = [ours.prompt, ours.prompt[:1], ours.prompt * 2], LanguageModel(ours.loaded)
    for prompt, found in zip(prompts, other_programs.from_vllm(folder, 64, ids=prompts), strict=True):
        expected = model.generate_ids(prompt, other_programs.TOKENS, temperature=0.0)
        assert found[: len(expected)] == expected and len(set(found)) > 3
