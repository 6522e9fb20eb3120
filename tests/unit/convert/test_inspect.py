"""Inspection tells what is there, what differs and what is wrong, in checkpoints of every family."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_samoe.config import PretrainConfig
from megatron_samoe.convert.hf.export import plan_export as plan_hf
from megatron_samoe.convert.hf.export import write_export as write_hf
from megatron_samoe.convert.inspect.health import InitialValues, check_health
from megatron_samoe.convert.inspect.numbers import difference, statistics
from megatron_samoe.dist_checkpointing import store
from megatron_samoe.dist_checkpointing.global_tensors import CheckpointReader, write_checkpoint
from megatron_samoe.training.checkpointing import save_run
from tests.harness.megatron_files import write_rank_files
from tests.harness.program import call, flip_bit
from tests.harness.tables import table
from tests.harness.tiny import started, steps, tiny_config, with_options
from tests.unit.convert.memory_source import MemorySource, new_source


def look(*words: object) -> tuple[int, str]:
    done = call("megatron_samoe.cli.inspect_checkpoint", *map(str, words))
    return done.returncode, done.stdout + done.stderr


def look_json(*words: object) -> tuple[int, dict[str, Any]]:
    status, output = look(*words, "--json")
    return status, json.loads(output, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def write(source: MemorySource, root: Path, iteration: int = 7) -> Path:
    return write_checkpoint(root, iteration, source)


def test_numbers_over_runs_are_those_of_the_whole() -> None:
    t = torch.randn(1 << 21, generator=torch.Generator().manual_seed(0))[: (1 << 20) + 77]
    t[5], t[1 << 20] = 0.0, 30.0
    s = statistics(t)
    expected = [float(v) for v in (t.min(), t.max(), t.double().mean(), t.double().std(correction=0))]
    assert [s.minimum, s.maximum, s.mean, s.std] == pytest.approx(expected)
    assert s.zeros == pytest.approx(1 / t.numel()) and s.is_finite
    t[0], t[1], t[-1] = torch.nan, torch.inf, -torch.inf
    assert (statistics(t).nan, statistics(t).inf, statistics(t).is_finite) == (1, 2, False)
    d = difference(t, t)
    assert (d.largest, d.relative, d.num_different) == (0, 0, 0), "NaN is NaN"
    other = t.clone()
    other[7] += 0.5
    d = difference(t, other)
    assert d.largest == pytest.approx(0.5) and d.num_different == 1
    assert d.relative == pytest.approx(0.5 / float(other[other.isfinite()].norm()), rel=1e-4)
    assert difference(torch.zeros(3), torch.tensor([0.0, torch.nan, 0.0])).largest == float("inf")
    assert statistics(torch.zeros(0)).is_finite


def test_list_tells_names_shapes_and_sizes(tmp_path: Path) -> None:
    source = new_source(tiny_config("samoe"), dtype=torch.bfloat16)
    write(source, tmp_path)
    status, values = look_json("list", tmp_path)
    assert status == 0 and values["kind"] == "native" and values["train_state"]["iteration"] == 7
    assert values["tensors"].keys() == source.weights.keys()
    model = {name: t for name, t in source.weights.items() if not name.startswith("optimizer.")}
    assert values["model_elements"] == sum(t.numel() for t in model.values())
    assert values["bytes"] == sum(t.nbytes for t in source.weights.values())
    assert values["tensors"]["expert_pool.bank.w1"] == {"shape": [2, 4, 128, 32], "dtype": "float32", "bytes": 131072}
    _, text = look("list", tmp_path, "--match", r"bank\.w", "--model-only")
    assert "expert_pool.bank.w2" in text and "2 tensors, 65,536 elements" in text and "router" not in text


def test_stat_finds_what_is_not_finite(tmp_path: Path) -> None:
    source = new_source(tiny_config("dense"))
    write(source, tmp_path / "good")
    assert look("stat", tmp_path / "good")[0] == 0
    source.weights["layers.1.mlp.fc1.weight"][3, 4] = torch.nan
    write(source, tmp_path / "bad")
    status, values = look_json("stat", tmp_path / "bad", "--match", "fc1.weight")
    assert status == 1 and values["tensors"]["layers.1.mlp.fc1.weight"]["nan"] == 1
    assert sum(t["nan"] for t in values["tensors"].values()) == 1
    status, text = look("check", tmp_path / "bad")
    assert status == 1 and "NOT FINITE layers.1.mlp.fc1.weight: 1 NaN, 0 Inf" in text


def test_diff_names_what_changed_and_by_how_much(tmp_path: Path) -> None:
    source = new_source(tiny_config("moe"))
    write(source, tmp_path / "a")
    status, text = look("diff", tmp_path / "a", tmp_path / "a")
    assert status == 0 and "0 different" in text
    changed = replace(source, weights=dict(source.weights))
    name = "layers.2.moe.experts.w1"
    changed.weights[name] = source.weights[name].clone()
    changed.weights[name][1, 2, 3] += 0.25
    del changed.weights["final_norm.bias"]
    changed.weights["layers.0.attention_norm.bias"] = torch.zeros(31)
    write(changed, tmp_path / "b")
    status, values = look_json("diff", tmp_path / "a", tmp_path / "b")
    assert status == 1 and values["only_in_first"] == ["final_norm.bias"] and values["only_in_second"] == []
    assert values["other_shape"] == ["layers.0.attention_norm.bias"] and values["beyond_tolerance"] == [name]
    d = values["tensors"][name]
    assert d["largest"] == pytest.approx(0.25) and d["num_different"] == 1
    assert d["relative"] == pytest.approx(0.25 / float(changed.weights[name].norm()), rel=1e-5)
    match = ("--match", "experts.w1")
    assert look("diff", tmp_path / "a", tmp_path / "b", *match)[0] == 1
    assert look("diff", tmp_path / "a", tmp_path / "b", *match, "--atol", 0.26)[0] == 0
    assert look("diff", tmp_path / "a", tmp_path / "b", *match, "--rtol", 0.1)[0] == 0


def test_families_are_compared_under_our_names(tmp_path: Path) -> None:
    source = new_source(tiny_config("moe", style="llama", moe_router_topk=2))
    write(source, tmp_path / "native")
    write_rank_files(source, tmp_path / "megatron", 2, 2, 2)
    write_hf(plan_hf(source), tmp_path / "hf")
    for other in ("megatron", "hf"):
        status, text = look("diff", tmp_path / "native", tmp_path / other)
        assert status == 0 and "0 different, 0 beyond" in text, text
        assert look("verify", tmp_path / other)[0] == 0
        status, values = look_json("list", tmp_path / other)
        assert values["kind"] == other and "layers.3.moe.experts.w2" in values["tensors"]
        status, values = look_json("list", tmp_path / other, "--raw")
        in_ranks = "mp_rank_01_001_000/model.decoder.layers.1.mlp.experts.linear_fc1.weight1"
        assert (in_ranks if other == "megatron" else "lm_head.weight") in values["tensors"]
    status, values = look_json("stat", tmp_path / "megatron", "--raw", "--match", "final_layernorm")
    w = source.weights["final_norm.weight"]
    assert {t["maximum"] for t in values["tensors"].values()} == {float(w.max())}


def test_a_family_that_is_not_ours_is_looked_at_raw(tmp_path: Path) -> None:
    write_hf(plan_hf(new_source(tiny_config("dense", style="llama"))), tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    status, text = look("list", tmp_path / "hf")
    assert status == 2 and "--raw looks at the tensors as they are" in text
    assert look("stat", tmp_path / "hf", "--raw")[0] == 0 and look("verify", tmp_path / "hf")[0] == 0


def test_verify_finds_every_damage(tmp_path: Path) -> None:
    source = new_source(tiny_config("moe", style="llama", moe_router_topk=2))
    first, second = write(source, tmp_path / "native", 7), write(source, tmp_path / "native", 8)
    status, text = look("verify", tmp_path / "native")
    assert status == 0 and text.count(": whole (digests of 3 files, names and shapes)") == 2
    (file,) = second.glob("*.distcp")
    flip_bit(file)
    status, values = look_json("verify", tmp_path / "native")
    assert status == 1
    assert [c["problems"] for c in values["checkpoints"]] == [[], [f"{file.name} differs from what was written"]]
    assert look("verify", tmp_path / "native", "--ckpt-step", 7)[0] == 0
    assert look("verify", first)[0] == 0
    (second / "config.yaml").write_text("model: {}")
    status, text = look("verify", tmp_path / "native")
    assert status == 1 and "config.yaml differs from what was written" in text

    path = write_rank_files(source, tmp_path / "megatron", 2) / "mp_rank_01"
    (file,) = path.iterdir()
    flip_bit(file)
    status, text = look("verify", tmp_path / "megatron")
    assert status == 1 and "mp_rank_01/model_optim_rng.pt differs from what was written" in text
    shutil.rmtree(path)
    status, text = look("verify", tmp_path / "megatron")
    assert status == 1 and "incomplete: mp_rank_01 missing" in text

    write_hf(plan_hf(source), tmp_path / "hf")
    weights = tmp_path / "hf" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    status, text = look("verify", tmp_path / "hf")
    assert status == 1 and "is damaged, or is cut off" in text


def without_file(state: dict[str, Any], name: str) -> None:
    del state["digests"][name]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda state: state.pop("digest"), "train_state.json is damaged: it has no digest."),
        (lambda state: state.pop("digests"), "train_state.json is damaged: it has no digests."),
        (lambda state: [state.pop(n) for n in ("digest", "digests")], "it has no digests, digest."),
        (lambda state: state.pop("iteration"), "train_state.json differs from what was written"),
        (lambda state: without_file(state, ".metadata"), ".metadata has no digest in train_state.json"),
        (lambda state: without_file(state, "config.yaml"), "config.yaml has no digest in train_state.json"),
        (lambda state: without_file(state, "__0_0.distcp"), "__0_0.distcp has no digest in train_state.json"),
    ],
)
def test_a_checkpoint_whose_digests_were_taken_away_is_not_called_whole(
    change: Callable[[dict[str, Any]], Any], problem: str, tmp_path: Path
) -> None:
    folder = write(new_source(tiny_config("moe")), tmp_path)
    path = folder / "train_state.json"
    state = json.loads(path.read_text())
    change(state)
    if "has no digest in" in problem:  # whoever takes an entry away can make the description's own digest anew
        del state["digest"]
        state["digest"] = store.digest_of_values(state)
    path.write_text(json.dumps(state))
    status, text = look("verify", tmp_path)
    assert status == 1 and problem in text and "DAMAGED" in text


def test_verify_says_which_files_it_has_not_looked_at(tmp_path: Path) -> None:
    folder = write(new_source(tiny_config("moe")), tmp_path)
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").write_text("mine")
    status, text = look("verify", tmp_path)
    assert status == 0 and "not a part of it: 'notes/mine.txt'" in text


def test_verify_knows_what_a_model_is_made_of(tmp_path: Path) -> None:
    source = new_source(tiny_config("dense"))
    source.weights["layers.9.mlp.fc1.weight"] = torch.zeros(2)
    source.weights["final_norm.weight"] = torch.zeros(33)
    del source.weights["layers.0.mlp.fc2.bias"]
    write(source, tmp_path)
    status, values = look_json("verify", tmp_path)
    assert status == 1 and values["checkpoints"][0]["problems"] == [
        "layers.0.mlp.fc2.bias is missing",
        "layers.9.mlp.fc1.weight does not belong to the model of its config.yaml",
        "final_norm.weight is [33], its config.yaml says [32]",
    ]


def trained(config: PretrainConfig, root: Path, count: int) -> tuple[Path, Path]:
    """Trains a few steps; returns the checkpoints before and after."""
    config = with_options(config, save=str(root))
    setup, state = started(config)
    save_run(setup, state)
    *_, (_, state) = steps(setup, state, count)
    save_run(setup, state)
    return root / "iter_0000000", root / f"iter_{count:07d}"


class Without:
    """A checkpoint without its optimizer state."""

    def __init__(self, reader: CheckpointReader):
        self.config, self.train_state, self.read = reader.config, reader.train_state, reader.read
        self.tensors = {name: t for name, t in reader.tensors.items() if not name.startswith("optimizer.")}


@pytest.mark.parametrize(("bf16", "optimizer"), [(False, "adam"), (True, "adam"), (False, "muon")])
def test_three_kinds_of_evidence_find_the_same_experts(bf16: bool, optimizer: str, tmp_path: Path) -> None:
    # Weight decay shrinks what no gradient reaches, so that weights alone do change.
    rates = {"weight_decay": 0.1, "lr": 1e-2, "min_lr": 1e-2, "lr_warmup_iters": 0, "optimizer": optimizer}
    sizes = {"num_experts": 32, "num_layers": 2, "global_batch_size": 2, "micro_batch_size": 2}
    config = tiny_config("moe", bf16=bf16, **rates, **sizes)
    first, last = (CheckpointReader(path) for path in trained(config, tmp_path, 2))
    counts = torch.zeros(2, 32)
    by_moments, by_start, by_seed = (check_health(last), check_health(last, start=first), check_health(Without(last)))
    assert [h.evidence for h in (by_moments, by_start, by_seed)] == ["moments", "start", "seed"]
    assert 0 < len(by_moments.stale_experts) < counts.numel() / 2 and not by_moments.is_sound
    assert by_start.stale_experts == by_seed.stale_experts == by_moments.stale_experts
    name = by_moments.stale_experts[0]
    layer, expert = int(name.split()[0].split(".")[1]), int(name.split()[-1])
    now, before = (r.read(f"layers.{layer}.moe.experts.w1")[expert] for r in (last, first))
    assert not torch.equal(now, before) or bf16
    assert all(expert in idle for layer, idle in [(layer, by_moments.idle_experts[layer])])


def test_the_seed_draws_the_first_weights_again(tmp_path: Path) -> None:
    config = tiny_config("samoe", style="llama", samoe_granularity="expert", samoe_init="uniform", num_expert_banks=3)
    first = CheckpointReader(trained(config, tmp_path, 1)[0])
    initial = InitialValues(config, first)
    for name in initial.tensors:
        assert torch.equal(initial.draw(name), first.read(name)), name


def test_a_trained_pool_is_sound_and_a_bank_without_use_is_found(tmp_path: Path) -> None:
    config = tiny_config("samoe", num_expert_banks=3, num_layers=2, lr=1e-2, lr_warmup_iters=0)
    _, last = trained(config, tmp_path / "a", 2)
    status, values = look_json("check", last)
    # Two layers start on banks 0 and 1 each; the third begins with no use, and its coefficients learn at once.
    assert status == 0 and values["sound"] and values["dead_banks"] == [] and len(values["bank_weights"]["1"][0]) == 3
    reader = CheckpointReader(last)
    weights = {name: reader.read(name) for name in reader.tensors}
    for layer in (0, 1):
        weights[f"layers.{layer}.moe.combination"][..., 1] = 1e-5
    weights["optimizer.exp_avg_sq.layers.1.moe.combination"].zero_()
    weights["optimizer.exp_avg_sq.expert_pool.bank.w1"][2, 3] = 0
    weights["optimizer.exp_avg_sq.expert_pool.bank.w2"][2, 2:] = 0
    write_checkpoint(tmp_path / "b", 2, MemorySource(weights, reader.config, reader.train_state))
    status, values = look_json("check", tmp_path / "b")
    assert status == 1 and values["dead_banks"] == [1] and values["layers_without_coefficient_gradient"] == [1]
    assert values["never_updated_experts"] == ["bank 2 expert 3"] and values["evidence_of_updates"] == "moments"
    _, text = look("check", tmp_path / "b")
    assert "DEAD BANKS: no layer uses 1" in text and "NEVER UPDATED (told by no gradient" in text
    assert look_json("check", tmp_path / "b", "--dead-below", 1e-6)[1]["dead_banks"] == []


def test_bad_input_is_one_paragraph(tmp_path: Path) -> None:
    write(new_source(tiny_config("dense")), tmp_path / "good")
    write_hf(plan_hf(new_source(tiny_config("dense", style="llama"))), tmp_path / "hf")
    write(new_source(tiny_config("moe")), tmp_path / "moe")
    write(new_source(tiny_config("moe")), tmp_path / "run" / "checkpoints")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("x")
    for words, message in table(__file__)["refused"]:
        status, output = look(*(word.format(root=tmp_path) for word in words.split()))
        assert status == 2 and message in output and output.count("\n") == 1, output


def test_sharing_tells_the_map_its_users_and_sizes(tmp_path: Path) -> None:
    config = tiny_config("moe", num_layers=6, moe_layer_freq="011111", expert_sharing="own,combined*2,0*2")
    source = new_source(config)
    write(source, tmp_path)
    status, values = look_json("sharing", tmp_path)
    expert = 2 * 32 * 128 + 32 + 128
    assert status == 0 and values["expert_sharing"] == "own,combined*2,0*2"
    found = [(s["name"], s["layers"], s["num_experts"], s["elements"]) for s in values["stores"]]
    assert found == [
        ("own of layer 1", [1], 4, 4 * expert),
        ("pool of 2 banks", [2, 3], 4, 8 * expert),
        ("set 0 (tied)", [4, 5], 4, 4 * expert),
    ]
    _, text = look("sharing", tmp_path)
    assert "layers 4, 5" in text and text.rstrip().endswith(
        f"{12 * expert:,} of them shared; {20 * expert:,} if no layers shared."
    )
    write(new_source(tiny_config("dense")), tmp_path / "dense")
    assert "No layer has experts." in look("sharing", tmp_path / "dense")[1]


def test_check_knows_sets_and_numbers_of_experts_by_layer(tmp_path: Path) -> None:
    config = tiny_config("moe", expert_sharing="scaled:own,0,0,1", num_experts=(2, 4, 4, 3))
    source = new_source(config)
    source.weights["optimizer.exp_avg_sq.expert_pool.set.0.w1"] = torch.ones(1, 4, 128, 32)
    source.weights["optimizer.exp_avg_sq.expert_pool.set.0.w2"] = torch.ones(1, 4, 32, 128)
    for kind in ("w1", "w2"):
        source.weights[f"optimizer.exp_avg_sq.expert_pool.set.0.{kind}"][0, 2] = 0
    source.weights["training.expert_fractions"] = torch.tensor(
        [[1.0, 0, 0, 0], [0.25] * 4, [0.25] * 4, [0.5, 0.5, 0, 0]]
    )
    write(source, tmp_path)
    status, text = look("check", tmp_path)
    assert status == 1 and "NEVER UPDATED" in text and "set 0 expert 2" in text and "set 0 expert 1" not in text
    assert "layers.0: no token of the last step went to expert 1." in text
    assert "layers.3: no token of the last step went to expert 2." in text and "factors on sets, of w1" in text


def test_a_model_with_parts_from_outside_is_verified_by_digests(tmp_path: Path) -> None:
    source = new_source(tiny_config("moe"))
    source.weights["layers.0.moe.router.other"] = torch.ones(3)
    source.train_state = {**source.train_state, "parts": {"router": "elsewhere.Router"}}
    folder = write(source, tmp_path)
    status, text = look("verify", tmp_path)
    assert status == 0 and "whole (digests of 3 files; names and shapes cannot be checked" in text
    flip_bit(next(folder.glob("*.distcp")), 500)
    status, text = look("verify", tmp_path)
    assert status == 1 and "DAMAGED" in text and "differs from what was written" in text
