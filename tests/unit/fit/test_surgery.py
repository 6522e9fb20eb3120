"""Surgery keeps what it says it keeps: dense losses, MoE functions, weights that combinations reproduce; and `megatron-samoe edit` as
users run it, all the way round from a trained dense model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_samoe.cli import edit
from megatron_samoe.config import MoEConfig
from megatron_samoe.config.cli import from_mapping
from megatron_samoe.convert.fold import fold_shared
from megatron_samoe.convert.opener import open_folder
from megatron_samoe.dist_checkpointing.global_tensors import GlobalTensors, write_checkpoint
from megatron_samoe.fit.matching_by_weights import match_experts
from megatron_samoe.fit.surgery.pool import pool_moe
from megatron_samoe.fit.surgery.select import select_samoe
from megatron_samoe.fit.surgery.upcycle import UpcycleOptions, upcycle_dense
from megatron_samoe.parallel_state.state import single_process_state
from megatron_samoe.runtime.load import load_model
from tests.harness.program import arguments, contents, start
from tests.harness.tables import table
from tests.harness.tiny import tiny_config
from tests.unit.convert.memory_source import MemorySource, load, logits, loss, new_source

TABLE = table(__file__)
STYLES = ("gpt3", "llama")


def upcycled(source: MemorySource, **options: Any) -> MemorySource:
    edited = upcycle_dense(source, UpcycleOptions(**options))
    return MemorySource({name: edited.read(name) for name in edited.tensors}, edited.config, edited.train_state)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("options", "tolerance"), TABLE["upcycled"], ids=str)
def test_an_upcycled_model_starts_with_the_dense_loss(style: str, options: dict[str, Any], tolerance: float) -> None:
    dense = new_source(tiny_config("dense", style=style))
    assert loss(upcycled(dense, moe=MoEConfig(**options))) == pytest.approx(loss(dense), abs=tolerance)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("layout", "banks"), [("moe", 2), ("samoe", 2), ("samoe", 1)])
def test_a_dense_mlp_kept_as_shared_expert_is_exact(style: str, layout: str, banks: int) -> None:
    dense = new_source(tiny_config("dense", style=style))
    moe = MoEConfig(layout, num_experts=4, num_expert_banks=banks, moe_ffn_hidden_size=24)
    sparse = upcycled(dense, moe=moe, dense_mlp="shared-expert")
    torch.testing.assert_close(logits(sparse), logits(dense), rtol=1e-5, atol=1e-5)
    w1 = next(t for name, t in sparse.weights.items() if name.endswith((".experts.w1", "bank.w1")))
    assert w1.std() > 0.01 and w1.shape[-2] == 24


def test_noise_sets_copies_apart_by_its_share_of_the_spread() -> None:
    dense = new_source(tiny_config("dense"))
    w1 = upcycled(dense, moe=MoEConfig("moe", num_experts=3), noise=0.1).weights["layers.1.moe.experts.w1"]
    mlp = dense.weights["layers.1.mlp.fc1.weight"]
    difference = (w1 - mlp).flatten(1)
    assert difference.std(dim=1) / mlp.std() == pytest.approx(0.1, rel=0.1)
    assert not torch.equal(w1[0], w1[1])


def test_fewer_banks_than_layers_are_the_nearest_and_lose_what_is_reported() -> None:
    dense = new_source(tiny_config("dense"))
    moe = MoEConfig("samoe", num_experts=3, moe_router_topk=1, num_expert_banks=2)
    edited = upcycle_dense(dense, UpcycleOptions(moe))
    folded = fold_shared(edited)
    # The one expert of three that an undecided router chooses has a weight of 1/3: outputs are three times as large.
    for column, (number, factor) in enumerate(((1, 1), (2, 3)), start=1):
        mlps, experts = [], []
        for layer in (f"layers.{i}." for i in range(4)):
            mlp = [dense.weights[f"{layer}mlp.fc{number}.{part}"].flatten() for part in ("weight", "bias")]
            expert = [folded.read(f"{layer}moe.experts.{part}{number}")[0].flatten() for part in "wb"]
            mlps.append(np.concatenate(mlp))
            experts.append(np.concatenate(expert) / factor)
        u, s, vt = np.linalg.svd(mlps, full_matrices=False)
        nearest = (u[:, :2] * s[:2]) @ vt[:2]
        np.testing.assert_allclose(experts, nearest, atol=1e-5)
        lost = np.linalg.norm(nearest - mlps, axis=1) / np.linalg.norm(mlps, axis=1)
        assert [float(line.split()[column]) for line in edited.report[2:6]] == pytest.approx(lost, abs=0.001)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("granularity", ["layer", "expert"])
@pytest.mark.parametrize("normalization", ["none", "l2", "softmax"])
def test_folding_computes_the_same_to_the_last_bit(style: str, granularity: str, normalization: str) -> None:
    config = tiny_config(
        "samoe", style=style, samoe_granularity=granularity, samoe_normalization=normalization, moe_layer_freq="0111"
    )
    source = new_source(config)
    folded = fold_shared(source)
    assert from_mapping(folded.config, "test").moe.expert_layout == "moe"
    assert_folded_as_computed(folded, source, torch.float32)
    torch.testing.assert_close(logits(folded), logits(source), rtol=1e-5, atol=1e-6)


def assert_folded_as_computed(folded: GlobalTensors, source: MemorySource, dtype: torch.dtype) -> None:
    model = load(source, dtype)
    with torch.no_grad():
        model.begin_step()
    for number, layer in enumerate(model.moe_layers()):
        (lender,) = model.lender.lenders.values()
        for kind, weight in lender._weights.items():
            assert torch.equal(folded.read(f"layers.{layer.index}.moe.experts.{kind}"), weight[number])


def test_folding_a_bf16_model_gives_the_weights_it_computes_with() -> None:
    source = new_source(tiny_config("samoe"), dtype=torch.bfloat16)
    assert source.weights["expert_pool.bank.w1"].dtype == torch.float32
    folded = fold_shared(source)
    assert folded.read("layers.0.moe.experts.w1").dtype == torch.bfloat16
    assert_folded_as_computed(folded, source, torch.bfloat16)


def shuffled(source: MemorySource, seed: int = 3) -> MemorySource:
    """Renumbers the experts of each layer, which changes nothing."""
    generator, weights = torch.Generator().manual_seed(seed), dict(source.weights)
    for layer in range(8):
        order = torch.randperm(64, generator=generator)
        for name in source.weights:
            if name.startswith((f"layers.{layer}.moe.experts.", f"layers.{layer}.moe.router.")):
                own = order[order < len(weights[name])]
                weights[name] = weights[name][own]
    return replace(source, weights=weights)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("banks", "granularity"), [(1, "layer"), (2, "layer"), (3, "layer"), (2, "expert")])
def test_a_moe_of_combinations_is_recovered(style: str, banks: int, granularity: str) -> None:
    config = tiny_config(
        "samoe", style=style, num_layers=6, num_experts=8, num_expert_banks=banks, samoe_granularity=granularity
    )
    samoe = new_source(config)
    generator = torch.Generator().manual_seed(1)
    for name in samoe.weights:
        if name.endswith(".combination"):
            samoe.weights[name] = torch.randn(samoe.weights[name].shape, generator=generator)
    folded = fold_shared(samoe)
    moe = shuffled(MemorySource({n: folded.read(n) for n in folded.tensors}, folded.config, folded.train_state))
    pooled = pool_moe(moe, banks, granularity)
    again = fold_shared(pooled)
    for layer in range(6):
        for name in ("w1", "w2"):
            stored = f"layers.{layer}.moe.experts.{name}"
            old, new = moe.weights[stored], again.read(stored)
            distance_EE = torch.cdist(old.flatten(1), new.flatten(1))
            # The experts' numbers may differ; each is there, once.
            assert sorted(distance_EE.argmin(1).tolist()) == list(range(8))
            assert float(distance_EE.min(1).values.max() / old[0].norm()) < 1e-5
    torch.testing.assert_close(logits(pooled), logits(moe), rtol=1e-3, atol=1e-3)
    assert loss(pooled) == pytest.approx(loss(samoe), abs=1e-4)


@pytest.mark.parametrize("seed", [9, 14])
def test_projections_with_coefficients_of_their_own_are_matched_together(seed: int) -> None:
    """w1 and w2 of a role each span P directions, not P together: 8 layers leave little over for 4 banks."""
    generator = torch.Generator().manual_seed(seed)
    banks = torch.randn(2, 4, 32, 100, generator=generator, dtype=torch.float64)
    a_2LP = torch.randn(2, 8, 4, generator=generator, dtype=torch.float64)
    roles_LE = torch.stack([torch.randperm(32, generator=generator) for _ in range(8)])
    weights = [torch.einsum("lp,pen->len", a, t) for a, t in zip(a_2LP, banks, strict=True)]
    weights = [torch.stack([w[roles] for w, roles in zip(each, roles_LE, strict=True)]) for each in weights]
    order_LE = match_experts([torch.einsum("len,mfn->lemf", w, w) for w in weights], 4)
    found_LE = roles_LE.gather(1, order_LE)
    assert torch.equal(found_LE, found_LE[:1].expand(8, -1))


@pytest.mark.parametrize("scale", ["keep", "one"])
@pytest.mark.parametrize("granularity", ["layer", "expert"])
def test_selecting_changes_weights_least_and_as_reported(scale: str, granularity: str) -> None:
    source = new_source(tiny_config("samoe", num_expert_banks=3, samoe_granularity=granularity), spread=0.3)
    selected = select_samoe(source, scale)
    before, after = fold_shared(source), fold_shared(selected)
    for layer in range(4):
        a_2GP = selected.read(f"layers.{layer}.moe.combination")
        assert ((a_2GP != 0).sum(-1) == 1).all()
        if scale == "one":
            assert set(a_2GP.unique().tolist()) == {0.0, 1.0}
        old, new = (s.read(f"layers.{layer}.moe.experts.w2") for s in (before, after))
        change = float((old - new).norm() / old.norm())
        assert selected.report[2 + layer].split()[-1] == f"{change:.2e}" or change == pytest.approx(
            float(selected.report[2 + layer].split()[-1]), rel=0.1
        )
        for bank in range(3) if granularity == "layer" else ():
            other = source.read("expert_pool.bank.w2")[bank]
            factor = float(source.read(f"layers.{layer}.moe.combination")[1, 0, bank]) if scale == "keep" else 1.0
            assert change <= float((old - factor * other).norm() / old.norm()) * 1.02


def run_edit(capsys: pytest.CaptureFixture, words: str, load: Path, save: Path) -> tuple[int, str]:
    action, *options = words.split()
    folders = [str(word) for word in ("--load-dir", load, "--save-dir", save)]
    status = edit.main([action, *folders, *(str(load) if word == "LOAD" else word for word in options)])
    output = capsys.readouterr()
    return status, output.out + output.err


def test_the_tool_goes_all_the_way_round(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = {"expert_layout": "dense", "num_experts": None, "num_expert_banks": None, "num_layers": 4}
    first = {"run_dir": tmp_path / "dense", "train_iters": 2, "eval_interval": 2, **options}
    start(arguments(mock_data=True, split=None, **first), tmp_path).succeed()
    dense = tmp_path / "dense/checkpoints"
    upcycle = "upcycle --expert-layout moe --num-experts 4 --moe-router-topk 2 --noise 0.01"
    before = contents(dense)
    status, output = run_edit(capsys, f"{upcycle} --dry-run", dense, tmp_path / "moe")
    assert status == 0 and "Nothing is written" in output and not (tmp_path / "moe").exists()
    status, output = run_edit(capsys, upcycle, dense, tmp_path / "moe")
    assert status == 0 and "tensors of optimizer state are dropped" in output
    assert contents(dense) == before
    steps = {
        "pooled": ("moe", "pool --num-expert-banks 2"),
        "selected": ("pooled", "select --scale one"),
        "folded": ("selected", "fold"),
        "scaled": ("moe", "tie --expert-sharing scaled --num-expert-sets 2 --sets-from 1,2"),
        "tied": ("scaled", "select --to tied --scale one"),
        "student": ("tied", "student --keep-layers 0,1,3"),
        "thin": ("student", "fold"),
    }
    for name, (source, words) in steps.items():
        status, output = run_edit(capsys, words, tmp_path / source, tmp_path / name)
        assert status == 0 and f"{words.split()[0]}: " in output, output
        model = load_model(open_folder(tmp_path / name), single_process_state())
        assert model.config.model.num_layers == (3 if name in ("student", "thin") else 4)
    for name in ("pooled", "thin"):
        given = {
            "run_dir": tmp_path / "run" / name,
            "pretrained_checkpoint": tmp_path / name,
            "use_checkpoint_args": True,
        }
        train = arguments(model=False, mock_data=True, split=None, train_iters=1, eval_interval=1, **given)
        start(train, tmp_path / "output").succeed()


@pytest.mark.parametrize("layout", ["dense", "moe"])
def test_bad_input_is_one_paragraph(layout: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_checkpoint(tmp_path / layout, 7, new_source(tiny_config(layout)))
    for words, message in TABLE[layout]:
        status, output = run_edit(capsys, words, tmp_path / layout, tmp_path / "new")
        assert status != 0 and message in output and output.count("\n") == 1, output
    assert not (tmp_path / "new").exists()
