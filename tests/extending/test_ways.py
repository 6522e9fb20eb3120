"""A way of sharing from another package is decoded, exported, planned and reported as the package's own are; that it trains in
every layout is tested in test_extensions.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_samoe.cli.diagnose import main as diagnose_main
from megatron_samoe.cli.generate import main as generate_main
from megatron_samoe.cli.pretrain import main as pretrain_main
from megatron_samoe.config.derived import sharing_map
from megatron_samoe.config.sharing_map import GROUP, ways, written_map
from megatron_samoe.convert.fold import fold_shared
from megatron_samoe.convert.inspect.sharing import described_sharing
from megatron_samoe.convert.opener import open_folder
from megatron_samoe.errors import ConfigError
from megatron_samoe.evaluation.run_summary import sharing_text
from megatron_samoe.fit.surgery.pool import pool_moe
from megatron_samoe.inference.decode_layers import make_decode_model
from megatron_samoe.inference.engine import Engine
from megatron_samoe.inference.kv_cache import PageTable
from megatron_samoe.inference.serving import Serving
from megatron_samoe.inference.single_runner import SingleRunner
from megatron_samoe.parallel_state import single_process_state
from megatron_samoe.planning.accounting import count_parameters
from megatron_samoe.planning.memory import rank_memory
from megatron_samoe.training.hooks.moe_diagnostics import gathered_coefficients
from megatron_samoe.training.setup import build_setup
from tests.extending.near_banks import WINDOW
from tests.harness.near_package import install, near_installed  # noqa: F401
from tests.harness.tiny import VOCAB_SIZE, tiny_config
from tests.parity.hf_models import converted, native, random_source, some_ids, their_logits, theirs
from tests.unit.inference.tiny_models import forward_logits, loaded_tiny, step_logits

OPTIONS: dict[str, Any] = {"expert_sharing": "near", "num_expert_banks": 3, "moe_router_topk": 2, "style": "llama"}


@pytest.mark.parametrize("serving", ["folded", "on-the-fly"])
def test_it_decodes_as_it_trains(serving: Serving) -> None:
    loaded, ids = loaded_tiny("moe", **OPTIONS), list(range(40, 70))
    pages = PageTable(1, 2, 2)
    pages.reserve(len(ids))
    runner = SingleRunner(make_decode_model(loaded.model, serving, "fp32", pages.num_pages), 64, 64, 4)
    expected = forward_logits(loaded, ids)
    assert expected.std() > 0.1
    got = torch.cat([step_logits(runner, pages, [(0, i, ids[i : i + 10])])[0] for i in (0, 10, 20)])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert Engine(loaded, serving=serving).serving == serving


def source() -> Any:
    """Returns a random model, whose coefficients are 0 outside their windows, as all that were trained."""
    made = random_source("moe", **OPTIONS)
    layers = [name for name in made.weights if name.endswith(".combination")]
    for place, name in enumerate(layers):
        made.weights[name][..., 0 if place == len(layers) - 1 else WINDOW] = 0.0
    return made


def test_it_goes_to_transformers_and_back(tmp_path: Path) -> None:
    ours = native(tmp_path / "native", source())
    folder = converted(ours.root, tmp_path / "hf", "--to", "hf")
    model = theirs(folder)
    assert model.model.expert_pool.near.down_proj.shape[0] == 3 * 4
    assert (their_logits(model, some_ids()) - ours.logits(some_ids())).abs().max() < 1e-4
    (folder / "megatron_samoe.json").unlink()
    again = native(tmp_path / "again", open_folder(converted(folder, tmp_path / "back")).tensors)
    assert (again.logits(some_ids()) - ours.logits(some_ids())).abs().max() < 1e-5


def test_it_is_folded_and_is_not_made_by_a_fit(tmp_path: Path) -> None:
    ours = native(tmp_path / "native", source())
    folded = native(tmp_path / "folded", fold_shared(open_folder(ours.root).tensors))
    assert (folded.logits(some_ids()) - ours.logits(some_ids())).abs().max() < 1e-4
    with pytest.raises(ConfigError, match="must not have near, which is of another package"):
        pool_moe(open_folder(folded.root).tensors, 3, sharing="near")


def test_it_is_planned_and_reported(tmp_path: Path) -> None:
    config, pool = tiny_config("moe", **OPTIONS), tiny_config("samoe", **{**OPTIONS, "expert_sharing": None})
    assert count_parameters(config, VOCAB_SIZE) == count_parameters(pool, VOCAB_SIZE)
    assert rank_memory(config, VOCAB_SIZE, 1) == rank_memory(pool, VOCAB_SIZE, 1)
    assert sharing_text(config) == "near (3 banks)" and written_map(sharing_map(config)) == "near"
    text, stores = described_sharing(source())
    assert text == "near" and [(s.name, len(s.layers)) for s in stores] == [("pool of 3 banks", 4)]
    beside = tiny_config("moe", **{**OPTIONS, "expert_sharing": "own,near*2,own"})
    assert [s.way.name for s in sharing_map(beside)] == ["own", "near", "near", "own"]


def test_one_whose_experts_are_no_mixtures_trains_and_is_not_decoded(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = ["--num-layers", "2", "--hidden-size", "16", "--num-attention-heads", "2", "--seq-length", "16"]
    experts = ["--num-experts", "4", "--expert-sharing", "low_rank", "--num-expert-banks", "2"]
    run = "--mock-data --tokenizer-type ByteTokenizer --micro-batch-size 2 --train-iters 3 --lr 0.1".split()
    logs = ["--log-interval", "1", "--moe-per-layer-logging", "--run-dir", str(tmp_path)]
    assert pretrain_main([*model, *experts, *run, *logs]) == 0
    assert generate_main(["--load", str(tmp_path), "--prompt", "a"]) != 0
    assert "trains and is not decoded" in capfd.readouterr().err
    assert diagnose_main(["--load", str(tmp_path), "--batches", "2"]) == 0
    assert "no gradients to compare" in capfd.readouterr().out


def test_coefficients_of_mixtures_are_logged_after_layers_that_are_not() -> None:
    options = {"expert_sharing": "low_rank*2,combined*2", "samoe_init": "uniform", "samoe_normalization": "l2"}
    setup = build_setup(tiny_config("moe", **options, num_expert_banks=3), VOCAB_SIZE, single_process_state())
    found, raw = gathered_coefficients(setup), setup.model.global_parameters()
    for layer in range(4):
        expected = torch.nn.functional.normalize(raw[f"layers.{layer}.moe.combination"].detach().double(), dim=-1)
        torch.testing.assert_close(found[layer], expected * (layer > 1), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("tests.extending.near_banks:NOTHING", "cannot be loaded"),
        ("tests.extending.near_banks:WINDOW", "must name a Way"),
        ("tests.extending.near_banks:NEAR", "is the name of another way, too"),
    ],
)
def test_a_wrong_entry_point_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, problem: str
) -> None:
    monkeypatch.syspath_prepend(install(tmp_path, GROUP, "this", value))
    with pytest.raises(ConfigError, match=rf"{GROUP}: .*{problem}"):
        ways()


def test_without_the_package_the_way_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    ways.cache_clear()
    with pytest.raises(ConfigError, match="must be one of own, combined, tied, scaled, pool, neighbours, or an"):
        sharing_map(tiny_config("moe", **OPTIONS))
