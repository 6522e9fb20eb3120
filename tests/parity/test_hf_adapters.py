"""Our own class under programs that put weights in place around a module's forward: adapters (peft), offloading (accelerate)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from megatron_samoe.convert.hf.source import HFSource
from tests.parity.hf_models import converted, native, random_source, some_ids, their_logits, theirs

pytestmark = pytest.mark.parity

LLAMA: dict[str, Any] = {"style": "llama", "moe_router_topk": 2, "moe_ffn_hidden_size": 24}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "banks": ("samoe", {**LLAMA, "samoe_granularity": "expert"}),
    "banks_with_biases": ("samoe", {}),
    "set_with_biases": ("moe", {"expert_sharing": "scaled"}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    made = {}
    for name, (layout, options) in CASES.items():
        ours = native(root / name / "native", random_source(layout, **options))
        made[name] = converted(ours.root, root / name / "hf", "--to", "hf", "--hf-model-type", "samoe")
    return made


def expert_parameters(model: Any) -> list[str]:
    return [name for name, _ in model.named_parameters() if "expert_pool" in name and not name.endswith("bias")]


@pytest.mark.parametrize("case", CASES)
def test_weights_are_used_within_their_modules_forward_alone(case: str, folders: dict[str, Path]) -> None:
    """As accelerate keeps them on disk: at other times they are on meta, and arguments are moved to a module's device."""
    model, ids_BS = theirs(folders[case]), some_ids()
    expected = their_logits(model, ids_BS)

    def offload(module: nn.Module) -> None:
        kept = dict(module.named_parameters(recurse=False))

        def fetch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            assert not any(isinstance(value, nn.Module) for value in (*args, *kwargs.values()))
            module._parameters.update(kept)

        def drop(module: nn.Module, *_: Any) -> None:
            module._parameters.update({name: nn.Parameter(p.to("meta"), False) for name, p in kept.items()})

        drop(module)
        module.register_forward_pre_hook(fetch, with_kwargs=True)
        module.register_forward_hook(drop)

    for module in model.modules():
        if dict(module.named_parameters(recurse=False)) and not isinstance(module, nn.Embedding):
            offload(module)
    assert all(model.get_parameter(name).is_meta for name in expert_parameters(model))
    assert torch.equal(their_logits(model, ids_BS), expected)


@pytest.mark.parametrize("case", CASES)
def test_lora_of_what_layers_share(case: str, folders: dict[str, Path]) -> None:
    """Each parameter of experts has the three dims that adapters know; with peft an adapter counts, trains and is merged."""
    model, ids_BS = theirs(folders[case]), some_ids()
    names = expert_parameters(model)
    assert len(names) == 2 and all(model.get_parameter(name).dim() == 3 for name in names)
    peft = pytest.importorskip("peft")
    expected = their_logits(model, ids_BS)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[], target_parameters=names))
    assert torch.equal(their_logits(adapted, ids_BS), expected)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    adapted(input_ids=ids_BS, labels=ids_BS).loss.backward()
    assert all(p.grad is not None and p.grad.any() for n, p in adapted.named_parameters() if "lora_" in n)
    changed = their_logits(adapted, ids_BS)
    assert (changed - expected).abs().max() > 0.1
    torch.testing.assert_close(their_logits(adapted.merge_and_unload(), ids_BS), changed, rtol=1e-4, atol=1e-4)


def test_banks_of_earlier_exports_are_read(folders: dict[str, Path], tmp_path: Path) -> None:
    """They have a dim for banks and one for experts."""
    tensors = load_file(folders["banks_with_biases"] / "model.safetensors")
    for name in [name for name in tensors if ".bank." in name]:
        tensors[name] = tensors[name].unflatten(0, (2, -1))
    for name in ("config.json", "megatron_samoe.json"):
        (tmp_path / name).write_bytes((folders["banks_with_biases"] / name).read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    older, newer = HFSource(tmp_path), HFSource(folders["banks_with_biases"])
    for name in newer.native.tensors:
        assert torch.equal(older.read(name), newer.read(name)), name
