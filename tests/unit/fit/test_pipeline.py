"""Whole compressions of tiny models: what comes out, going on after a stage, what is refused; groups of experts stay together."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.cluster.hierarchy import fcluster, linkage

from megatron_samoe.cli.compress import main as compress_main
from megatron_samoe.config import PretrainConfig
from megatron_samoe.config.cli import from_mapping
from megatron_samoe.config.derived import sharing_map
from megatron_samoe.convert.edited_model import FRACTIONS
from megatron_samoe.convert.fold import fold_shared
from megatron_samoe.convert.layer_experts import LayerExperts
from megatron_samoe.convert.opener import open_folder
from megatron_samoe.dist_checkpointing.global_tensors import write_checkpoint
from megatron_samoe.errors import CheckpointError, ConfigError, MegatronSamoeError
from megatron_samoe.fit.assignment import assigned_in_groups
from megatron_samoe.fit.compress import baselines
from megatron_samoe.fit.compress.baselines import experts_in_budget, pruned_model
from megatron_samoe.fit.compress.compressible import expert_bytes, require_compressible
from megatron_samoe.fit.compress.options import CompressOptions
from megatron_samoe.fit.compress.pipeline import Compression
from tests.harness.pairs import first_by_day
from tests.harness.program import write_corpus
from tests.harness.tables import table
from tests.harness.tiny import tiny_config
from tests.unit.convert.memory_source import MemorySource, logits, new_source
from tests.unit.fit.test_matching import layers_of

TABLE = table(__file__, tuples=False)
VOCAB = 103


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with a corpus and the checkpoint of a MoE of four layers."""
    root = tmp_path_factory.mktemp("compress")
    write_corpus(root / "text", vocab_size=VOCAB)
    write_checkpoint(root / "moe", 7, new_source(tiny_config("moe", moe_router_topk=2, mock_data=True)))
    return root


def options(folder: Path, save: str, **more: Any) -> CompressOptions:
    given = {"calibration_tokens": 2048, "judge_tokens": 512, "num_samples": 16, "budget": 0.5} | more
    return CompressOptions(str(folder / "moe"), str(folder / save), str(folder / "text"), **given)


@pytest.mark.parametrize(("name", "more", "ways"), TABLE["compressions"])
def test_a_compression_shares_and_is_judged(folder: Path, name: str, more: dict, ways: list[str]) -> None:
    compression = Compression(options(folder, name, **more))
    verdicts = {v.model: v for v in compression.judge({})}
    assert set(verdicts) == {"original", "matched", "fitted", "blind", "pruned", "merged"}
    original, fitted = verdicts["original"], verdicts["fitted"]
    assert original.divergence == 0 and verdicts["matched"].divergence < 1e-6
    assert verdicts["matched"].loss == pytest.approx(original.loss, abs=1e-5)
    assert {s.way.name for s in sharing_map(from_mapping(compression.fitted().model.config, ""))} <= set(ways)
    if name != "map":
        assert 0.49 < fitted.expert_bytes / original.expert_bytes < 0.51
    for other in ("blind", "pruned", "merged"):
        assert verdicts[other].expert_bytes <= fitted.expert_bytes
    assert 0 < fitted.divergence < verdicts["blind"].divergence
    lost, pairs = compression.errors()
    assert all(0 <= x < 1 for both in lost.values() for x in both) and (pairs is not None) == ("choose_map" in more)


def test_a_planted_pool_comes_back_whole(folder: Path, tmp_path: Path) -> None:
    """A SaMoE that was folded is compressed to what it was, and its function with it."""
    pool = fold_shared(new_source(tiny_config("samoe", num_expert_banks=2, moe_router_topk=2, mock_data=True)))
    write_checkpoint(tmp_path / "moe", 0, pool)
    write_corpus(tmp_path / "text", vocab_size=VOCAB)
    for no_refit in (False, True):
        compression = Compression(options(tmp_path, f"out-{no_refit}", no_refit=no_refit))
        again = compression.fitted().model
        assert expert_bytes(again) < 0.51 * expert_bytes(compression.source)
        torch.testing.assert_close(logits(again), logits(pool), rtol=1e-3, atol=1e-3)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("stage", first_by_day(["fitted", "calibration", "matched", "judged-fitted"]))
def test_a_compression_goes_on_after_any_stage(
    folder: Path, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A run is cut off where a stage's last file would be written, and its rest is the same as of one that was not."""
    from megatron_samoe.fit.compress.stage_folder import StageFolder

    whole = Compression(options(folder, "uncut")).judge({})
    write, work = StageFolder._write, []

    def cut(self: StageFolder, name: str, content: Any) -> None:
        if name == stage:
            raise Stopped
        write(self, name, content)

    with monkeypatch.context() as patched:
        patched.setattr(StageFolder, "_write", cut)
        with pytest.raises(Stopped):
            Compression(options(folder, f"cut-{stage}")).judge({})

    def noted(self: StageFolder, name: str, content: Any) -> None:
        work.append(name)
        write(self, name, content)

    monkeypatch.setattr(StageFolder, "_write", noted)
    again = Compression(options(folder, f"cut-{stage}")).judge({})
    assert again == whole and work[0] == stage
    done: list[str] = list(work)
    assert Compression(options(folder, f"cut-{stage}")).judge({}) == whole and work == done


def test_other_options_than_those_of_a_stage_are_refused(folder: Path) -> None:
    Compression(options(folder, "kept")).fitted()
    for more, flag in (
        ({"num_samples": 3}, "--num-samples"),
        ({"budget": 0.25}, "--budget"),
        ({"no_refit": True}, "--no-refit"),
    ):
        with pytest.raises(ConfigError, match=f"{flag}.*another --save-dir"):
            Compression(options(folder, "kept", **more)).fitted()
    (folder / "foreign").mkdir()
    (folder / "foreign" / "thesis.tex").write_text("mine")
    with pytest.raises(CheckpointError, match="not made by compress"):
        Compression(options(folder, "foreign"))
    assert [p.name for p in (folder / "foreign").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(("layout", "more", "what"), TABLE["models"])
def test_models_that_cannot_be_compressed_are_named(layout: str, more: dict, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        require_compressible(new_source(tiny_config(layout, **more)))


@pytest.mark.parametrize(("more", "what"), TABLE["refused"])
def test_what_cannot_be_done_is_refused_before_anything_is_written(folder: Path, more: dict, what: str) -> None:
    given = {**vars(options(folder, "never")), **more}
    with pytest.raises(MegatronSamoeError, match=what):
        Compression(CompressOptions(**given))
    assert not (folder / "never").exists()


def test_equal_experts_merge_without_loss() -> None:
    """Experts 0 and 3 of each layer are one, their neurons in another order; merging them changes no logit."""
    source = new_source(tiny_config("moe", moe_router_topk=2))
    order = torch.randperm(
        source.weights["layers.0.moe.experts.w2"].shape[2], generator=torch.Generator().manual_seed(0)
    )
    for name, t in source.weights.items():
        if ".moe.experts." in name:
            t[3] = t[0] if name.endswith("b2") else t[0].index_select(-2 if name.endswith("w1") else -1, order)
    calibrations = [layer.calibration for layer in layers_of(source)]
    merged = baselines.merged_model(source, calibrations, 3)
    torch.testing.assert_close(logits(merged), logits(source), rtol=1e-4, atol=1e-4)
    assert merged.read(FRACTIONS).shape == (len(calibrations), 4)
    experts = LayerExperts(source)
    weights = experts.weights(experts.layers[0])
    two = baselines.merge(weights, calibrations[0], 2, experts.activation)
    assert len({tuple(row) for row in two.w1.flatten(1).tolist()}) == 2


def test_clusters_are_scipys_of_mean_outputs() -> None:
    layer = layers_of(new_source(tiny_config("moe", num_experts=8, moe_router_topk=2)))[0]
    w, x_NH = layer.weights, torch.cat([layer.calibration.samples(e)[0] for e in range(8)])
    hidden_ENF = F.gelu(torch.einsum("nh,efh->enf", x_NH, w.w1) + w.b1[:, None], approximate="tanh")
    means_EH = (torch.einsum("enf,ehf->enh", hidden_ENF, w.w2) + w.b2[:, None]).mean(1)
    labels_E = fcluster(linkage(means_EH.double(), "average"), 4, "maxclust")
    merged_E = baselines.merge(w, layer.calibration, 4, "gelu").w1.flatten(1)
    assert ((torch.cdist(merged_E, merged_E) == 0).numpy() == (labels_E[:, None] == labels_E)).all()


def test_merging_weighs_by_loads() -> None:
    source = new_source(tiny_config("moe"))
    layer = layers_of(source)[0]
    layer.calibration.tokens_E[:] = torch.tensor([3.0, 1.0, 0.0, 0.0])
    merged = baselines.merge(layer.weights, layer.calibration, 1, "gelu")
    b2 = layer.weights.b2
    assert b2 is not None and merged.b2 is not None
    share = torch.tensor([3.0, 1.0, 1.0, 1.0]) / 6
    torch.testing.assert_close(merged.b2[2], share @ b2)


@pytest.mark.night
def test_the_command_heals_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Banks alone, then banks and routers, learn from the original; what is frozen stays; the same command does nothing twice."""
    # Never in this process: the trainer lets glibc keep freed memory, which tests of memory would meet.
    train = (
        "--num-layers 3 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --num-experts 4 --expert-layout moe "
    )
    train += f"--micro-batch-size 2 --global-batch-size 4 --train-iters 2 --eval-iters 0 --mock-data --run-dir {tmp_path}/run"
    command = [sys.executable, "-m", "megatron_samoe", "pretrain", "--tokenizer-type", "ByteTokenizer", *train.split()]
    subprocess.run(command, check=True, capture_output=True)
    write_corpus(tmp_path / "text")
    words = (
        f"--load-dir {tmp_path}/run --save-dir {tmp_path}/out --data-path {tmp_path}/text "
        "--calibration-tokens 512 --judge-tokens 256 --num-expert-banks 2 --heal-lr 0.01 --heal-iters 4 3"
    ).split()
    capsys.readouterr()
    assert compress_main(words) == 0, capsys.readouterr().err
    first = json.loads((tmp_path / "out" / "verdicts.json").read_text())
    healed = "healed-banks healed-routers original-longer blind-healed pruned-healed".split()
    assert [v["model"] for v in first["verdicts"]][-5:] == healed
    assert len({v["loss"] for v in first["verdicts"]}) >= 9  # matched and original may agree to the last bit
    page = (tmp_path / "out" / "report.html").read_text()
    assert "of the expert bytes" in page and all(
        f'<h2 id="{s}">' in page for s in ("verdicts", "bytes", "healing", "layers")
    )
    fitted, pruned = (open_folder(tmp_path / "out" / name).tensors for name in ("fitted", "pruned"))
    banks, routers, longer, pruned_healed = (
        open_folder(tmp_path / "out" / name / "checkpoints").tensors for name in healed if name != "blind-healed"
    )
    for before, after, trained in (
        (fitted, banks, ("expert_pool.",)),
        (banks, routers, ("expert_pool.", ".router.", ".combination")),
        (pruned, pruned_healed, (".experts.", ".router.")),
        (open_folder(tmp_path / "run").tensors, longer, ("",)),
    ):
        for name in before.tensors:
            if not name.startswith(("optimizer.", "training.")):
                is_same = torch.equal(before.read(name), after.read(name))
                assert is_same != any(part in name for part in trained), name
    assert compress_main([*words, "--beside", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "verdicts.json").read_text()) == first
    last = ["--heal-iters", "4", "3", "2", "--no-heal-others"]
    assert compress_main([*words, *last]) == 0, capsys.readouterr().err
    all_healed = open_folder(tmp_path / "out" / "healed-all/checkpoints").tensors
    changed = [n for n in routers.tensors if "." in n and not n.startswith(("optimizer.", "training."))]
    assert not any(torch.equal(routers.read(n), all_healed.read(n)) for n in changed)
    losses = {v["model"]: v["loss"] for v in first["verdicts"]}
    assert losses["fitted"] < losses["healed-banks"]
    capsys.readouterr()
    assert compress_main([*words, "--heal-iters", "4", "--no-heal-others"]) == 0
    assert "the model of the lowest loss, fitted, is in" in capsys.readouterr().out
    for more, what in (
        (["--teacher", "nowhere"], "nowhere"),
        (["--heal-lr", "0.5"], "differs from"),
        (["--heal-iters", "0"], "--heal-lr = 0.01: needs --heal-iters"),
        (["--beside", str(tmp_path / "text")], "file of verdicts"),
    ):
        assert compress_main([*words, *more]) != 0
        assert re.search(what, capsys.readouterr().err)
    # Trained again with another rate, a stage has a verdict of its own, and no later one that began with the former.
    again = [*words, "--heal-iters", "4", "--heal-lr", "0.5", "--no-heal-others"]
    for name, later in (("healed-banks", "healed-routers"), ("healed-routers", "healed-all"), ("healed-all", "")):
        (tmp_path / "out" / f"{name}.yaml").unlink()
        shutil.rmtree(tmp_path / "out" / name)
        assert (compress_main(again) != 0) == bool(later), capsys.readouterr().err
        assert f"delete {tmp_path / 'out' / later}" in capsys.readouterr().err or not later
    verdicts = json.loads((tmp_path / "out" / "verdicts.json").read_text())["verdicts"]
    assert next(v["loss"] for v in verdicts if v["model"] == "healed-banks") != losses["healed-banks"]


def test_a_teacher_of_another_tokenizer_is_refused(folder: Path) -> None:
    compression = Compression(options(folder, "taught"))
    compression.require_teacher(str(folder / "moe"))
    other = new_source(tiny_config("moe"))
    state = {**other.train_state, "vocab_size": 96}
    tensors = {n: t[:96] if n == "embedding.word.weight" else t for n, t in other.weights.items()}
    write_checkpoint(folder / "other-teacher", 0, MemorySource(tensors, other.config, state))
    with pytest.raises(ConfigError, match="another tokenizer"):
        compression.require_teacher(str(folder / "other-teacher"))


#: As DeepSeek-V3 routes: two experts of the best of two groups, by sigmoid scores and biases.
GROUPS = {"moe_router_num_groups": 2, "moe_router_group_topk": 1}
PLAIN = {"moe_router_topk": 2, "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
GROUPED = tiny_config("moe", num_experts=8, mock_data=True, **PLAIN, **GROUPS)


def shuffled_source() -> MemorySource:
    """Returns a model whose layers have layer 0's experts, groups swapped and experts shuffled within them."""
    source = new_source(GROUPED)
    generator = torch.Generator().manual_seed(2)
    for layer in range(1, 4):
        order_E = torch.cat([4 * g + torch.randperm(4, generator=generator) for g in ((1, 0) if layer % 2 else (0, 1))])
        for name in [n for n in source.weights if n.startswith("layers.0.moe.experts.")]:
            source.weights[name.replace("layers.0", f"layers.{layer}")].copy_(source.weights[name][order_E])
    return source


def test_groups_are_assigned_as_wholes() -> None:
    order = torch.tensor([5, 4, 7, 6, 1, 3, 0, 2])
    score = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    score[torch.arange(8), order] += 2.0
    assert torch.equal(assigned_in_groups(score, 2), order)
    across = torch.arange(8).roll(1)  # which no groups allow
    score[torch.arange(8), across] += 9.0
    found = assigned_in_groups(score, 2)
    assert sorted(found.tolist()) == list(range(8)) and all(
        len({int(e) // 4 for e in half}) == 1 for half in found.view(2, 4)
    )


@pytest.mark.parametrize("sharing", ["tied", "combined"])
def test_a_grouped_moe_is_compressed_and_what_is_alike_is_found(sharing: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "moe", 0, shuffled_source())
    write_corpus(tmp_path / "text", vocab_size=103)
    folders = [str(tmp_path / name) for name in ("moe", "out", "text")]
    sizes = {"calibration_tokens": 2048, "judge_tokens": 512, "num_samples": 16, "budget": 0.25}
    compression = Compression(CompressOptions(*folders, sharing=sharing, **sizes))
    verdicts = {v.model: v for v in compression.judge({})}
    assert verdicts["matched"].divergence < 1e-6
    assert verdicts["fitted"].divergence < 1e-4  # one set holds all four layers
    assert ("blind" in verdicts) == (sharing == "tied")  # edit pool keeps no groups


@pytest.mark.parametrize(("config", "count"), [(tiny_config("moe", moe_router_topk=2), 3), (GROUPED, 4)])
def test_pruning_keeps_the_most_salient_of_each_group(config: PretrainConfig, count: int) -> None:
    source, groups = new_source(config), config.moe.moe_router_num_groups or 1
    calibrations = [layer.calibration for layer in layers_of(source)]
    loads_LE = torch.arange(1.0, 1 + config.moe.num_experts).repeat(len(calibrations), 1)
    source.weights[FRACTIONS] = loads_LE
    pruned = pruned_model(source, calibrations, count)
    assert logits(pruned).isfinite().all()
    for layer, calibration in enumerate(calibrations):
        saliency_GE = calibration.mean_saliency_E.view(groups, -1)
        best_GK = saliency_GE.topk(count // groups).indices.sort().values
        kept = (best_GK + saliency_GE.shape[1] * torch.arange(groups)[:, None]).flatten()
        for name in ("router.weight", "experts.w1", "experts.b2"):
            whole = source.weights[f"layers.{layer}.moe.{name}"]
            assert torch.equal(pruned.read(f"layers.{layer}.moe.{name}"), whole[kept])
        loads_E = loads_LE[layer, kept]  # with which a run goes on from it
        torch.testing.assert_close(pruned.read(FRACTIONS)[layer], loads_E / loads_E.sum())


def test_a_budget_leaves_as_many_experts_as_a_token_chooses() -> None:
    whole, grouped, plain = (
        new_source(config)
        for config in (tiny_config("moe", moe_router_topk=2), GROUPED, tiny_config("moe", num_experts=8, **PLAIN))
    )
    assert experts_in_budget(grouped, expert_bytes(grouped) * 5 // 8) == 4
    assert experts_in_budget(plain, expert_bytes(grouped) * 3 // 8) == 3
    with pytest.raises(ConfigError, match="leaves 1 experts"):
        experts_in_budget(whole, expert_bytes(whole) // 4)
    with pytest.raises(ConfigError, match="leaves 1 experts a group; a token chooses 2"):
        experts_in_budget(grouped, expert_bytes(grouped) * 3 // 8)
