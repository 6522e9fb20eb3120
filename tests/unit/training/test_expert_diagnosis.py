"""Diagnoses: banks' gradients from layers' equal training's own; routes and loads counted by hand; what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_samoe.cli.diagnose import main as diagnose_main
from megatron_samoe.cli.pretrain import main as pretrain_main
from megatron_samoe.config.cli import from_mapping
from megatron_samoe.config.parallel import ParallelConfig
from megatron_samoe.datasets.tokenizer import tokenizer_of
from megatron_samoe.dist_checkpointing import store
from megatron_samoe.errors import ConfigError
from megatron_samoe.parallel_state import single_process_state
from megatron_samoe.training.batches import build_run_data
from megatron_samoe.training.checkpointing import load_run
from megatron_samoe.training.expert_diagnosis import (
    RANKS,
    cosines_without_noise,
    diagnose,
    rank_shares,
    worth_of_layers,
)
from megatron_samoe.training.micro_batches import Batch
from megatron_samoe.training.setup import TrainSetup, build_setup, initial_state
from megatron_samoe.training.state import TrainState
from megatron_samoe.training.train_step import compute_gradients

TINY = (
    "--num-layers 3 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --micro-batch-size 2 "
    "--global-batch-size 4 --train-iters 3 --eval-iters 0 --mock-data --tokenizer-type ByteTokenizer "
    "--lr 0.02"
).split()
EXPERTS = ["--num-experts", "4"]
POOL = ["--expert-layout", "samoe", "--num-expert-banks", "2", "--samoe-init", "uniform"]


def trained(folder: Path, *flags: str) -> str:
    """Trains three steps and returns the run's folder."""
    experts = [] if {"dense", "--num-experts"}.intersection(flags) else EXPERTS
    assert pretrain_main([*TINY, *experts, *flags, "--run-dir", str(folder)]) == 0
    return str(folder)


def resumed(load: str) -> tuple[TrainSetup, TrainState, Iterator[list[Batch]]]:
    """Returns a run after its three steps, and the batches that it would have seen next."""
    directory = store.iteration_dir(Path(load) / "checkpoints", 3)
    config = from_mapping(store.read_config(directory), str(directory))
    config = replace(config, training=replace(config.training, train_iters=5), parallel=ParallelConfig())
    setup = build_setup(config, 257, single_process_state())
    run_data = build_run_data(config, tokenizer_of(config.data), setup.parallel, (3, 12))
    return setup, load_run(setup, initial_state(setup), directory), run_data.train_batches(12)


def shown(folder: Path, load: str) -> dict[str, Any]:
    """Returns what the command writes of a run, having drawn it."""
    files = ["--json", str(folder / "d.json"), "--output", str(folder / "d.png")]
    assert diagnose_main(["--load", load, "--batches", "2", *files]) == 0
    assert (folder / "d.png").read_bytes().startswith(b"\x89PNG")
    [found] = json.loads((folder / "d.json").read_text())
    return found  # type: ignore[no-any-return]


def test_banks_gradients_are_those_of_training(tmp_path: Path) -> None:
    load = trained(tmp_path / "run", *POOL)
    found = diagnose(load, batches=2)
    assert found.banks is not None and found.iteration == 3
    setup, state, following = resumed(load)
    squares, sums = 0.0, None
    for batches in islice(following, 2):
        compute_gradients(setup, state, batches)
        pieces = [p for p in setup.buffers.pieces if p.name.startswith("expert_pool")]
        whole = torch.cat([p.grad.flatten().double() for p in pieces])
        squares, sums = squares + whole.square().sum() / 2, whole / 2 if sums is None else sums + whole / 2
    experts = found.banks.rms_NE.size
    assert np.square(found.banks.rms_NE).sum() / experts == pytest.approx(float(squares) / len(whole), rel=1e-5)
    mean = (np.square(found.banks.rms_NE) * found.banks.alignment_NE).sum() / experts
    assert mean == pytest.approx(float(sums.square().sum()) / len(whole), rel=1e-5)


def test_similarity_overlap_and_plots(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = shown(tmp_path, trained(tmp_path / "run", "--expert-layout", "moe"))
    assert "bank" not in capfd.readouterr().out
    for name in ("similarity_LL", "overlap_LL"):
        matrix = np.array(found[name], dtype=float)
        diagonal = np.diag(matrix)
        assert matrix.shape == (3, 3) and np.allclose(matrix, matrix.T, equal_nan=True)
        assert np.allclose(diagonal[~np.isnan(diagonal)], 1)
    assert np.array(found["rank_shares_LR"]).shape == (3, len(RANKS))
    assert np.all(np.array(found["chance_LL"]) < 1) and found["banks"] is None and found["coefficients_2LP"] is None
    assert np.all(np.array(found["layers"]["alignment_NE"]) <= 1 + 1e-6)


def test_noise_of_batches_neither_hides_what_layers_want_alike_nor_looks_like_it() -> None:
    generator = torch.Generator().manual_seed(0)
    want = torch.nn.functional.normalize(torch.randn(2, 4, 500, generator=generator), dim=2)
    want_LEX = torch.stack([want[0], 0.6 * want[0] + 0.8 * want[1], torch.zeros(4, 500)])
    halves = torch.zeros(2, 3, 4, 500)
    for batch in range(200):
        noise = torch.randn(4, 500, generator=generator) / 20  # of all layers, as long as what they want
        halves[batch % 2] += want_LEX + noise
    whole = torch.nn.functional.normalize(halves.sum(0), dim=2)
    assert float((whole[0] * whole[2]).sum(1).mean()) > 0.05, "noise of one batch looks like a want"
    found = cosines_without_noise([halves])
    assert float(found[0, 1]) == pytest.approx(0.6, abs=0.05) and float(found[0, 0]) == pytest.approx(1)
    assert cosines_without_noise([torch.stack([want_LEX, -want_LEX])])[2].isnan().all()


def test_the_rank_of_what_layers_want_is_told_from_noise() -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    low = random(4, 40, 2) @ random(4, 2, 30)
    full = torch.linalg.qr(random(4, 40, 30))[0]
    nothing = torch.zeros_like(low)
    halves = torch.stack([low, full * 5, nothing]) + random(2, 3, 4, 40, 30) / 4
    found = rank_shares([halves])
    one, two, *_, sixteen = found[0].tolist()
    assert one < 0.85 and two == pytest.approx(1, abs=0.03) and sixteen == pytest.approx(1, abs=0.03)
    assert found[1, 1] < 0.2 and found[1, 4] < 0.75
    noise = random(3, 4, 40, 30)
    assert rank_shares([torch.stack([noise, -noise])]).isnan().all()
    torch.testing.assert_close(rank_shares([halves]), found, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "flags",
    ["4 --expert-sharing 0,0,0", "9 --expert-sharing pool --pool-lock-step 1 --pool-lock-anneal-steps 1", "2 4 4"],
)
def test_layers_without_gradients_to_compare_have_worth_and_choices(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], flags: str
) -> None:
    load = trained(tmp_path / "run", "--expert-layout", "moe", "--num-experts", *flags.split())
    found = shown(tmp_path, load)
    assert "no gradients to compare" in capfd.readouterr().out
    assert np.all(np.array(found["worth_L"]) != 0) and np.array(found["overlap_LL"]).shape == (3, 3)
    assert found["choices_L"] == [2, 2, 2] and found["layers"] is None and found["loss"] > 0


def test_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    dense = trained(tmp_path / "dense", "--expert-layout", "dense")
    with pytest.raises(ConfigError, match="dense model"):
        diagnose(dense, 2)
    assert diagnose_main(["--load", dense, "--batches", "1"]) != 0


def test_a_layer_is_worth_what_its_experts_add(tmp_path: Path) -> None:
    """One whose output projections are 0 is worth nothing."""
    load = trained(tmp_path / "run", "--expert-layout", "moe")
    setup, _, following = resumed(load)
    batches = next(following)
    before = worth_of_layers(setup, batches)
    layer = setup.model.moe_layers()[1].moe
    with torch.no_grad():
        for name, parameter in layer.experts.named_parameters():
            if name.endswith(("w2", "b2")):
                parameter.zero_()
    after = worth_of_layers(setup, batches)
    assert after[1] == 0 and before[1] != 0 and after[0] != 0
    assert diagnose(load, batches=2).worth_L.shape == (3,)
