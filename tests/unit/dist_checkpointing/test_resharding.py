"""A run saved in one layout goes on in another as if nothing had happened."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_samoe.config import CheckpointConfig, PretrainConfig
from megatron_samoe.dist_checkpointing import saving, store
from megatron_samoe.dist_checkpointing.sharded_state import replicated
from megatron_samoe.errors import CheckpointError
from megatron_samoe.parallel_state import initialize_model_parallel, single_process_state
from megatron_samoe.training.checkpointing import find_run, load_run, model_state, optimizer_state, save_run
from megatron_samoe.training.setup import build_setup, initial_state
from megatron_samoe.training.train_step import train_step
from tests.harness.pairs import first_by_day
from tests.harness.ranks import run_ranks
from tests.harness.tiny import VOCAB_SIZE, gather_global, micro_batches, tiny_config, with_layout, with_options

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2 ep2": (4, {"tp": 2, "ep": 2}),
    "ep2": (2, {"ep": 2}),
    "tp2 etp1": (2, {"tp": 2, "etp": 1}),
    "pp2 zero": (4, {"pp": 2, "zero": True}),
}
MODELS: dict[str, dict[str, Any]] = {
    "samoe": {"layout": "samoe"},
    "moe bf16": {"layout": "moe", "style": "llama", "bf16": True},
    "samoe per expert": {"layout": "samoe", "samoe_granularity": "expert", "samoe_normalization": "softmax"},
}


def whole(setup: Any) -> dict[str, torch.Tensor]:
    """Returns weights, masters and moments of a run, put together from all ranks."""
    return gather_global({**model_state(setup.model), **optimizer_state(setup)}, setup.parallel)


def go(config: PretrainConfig, steps: int, load: bool, save: bool) -> dict[str, Any]:
    parallel = initialize_model_parallel(config.parallel)
    setup = build_setup(config, VOCAB_SIZE, parallel)
    state = initial_state(setup)
    if load:
        found = find_run(setup)
        assert found is not None
        with torch.no_grad():
            for parts in (*model_state(setup.model).values(), *optimizer_state(setup).values()):
                for part in parts:
                    part.local.fill_(float("nan"))
        state = load_run(setup, state, found)
    begun = whole(setup)
    losses = []
    for _ in range(steps):
        result, state = train_step(setup, state, micro_batches(setup, state.iteration))
        losses.append(result.lm_loss)
    if save:
        save_run(setup, state)
    return {
        "begun": begun, "ended": whole(setup), "losses": losses, "iteration": state.iteration,
        "fractions": state.expert_fractions_LE, "num_steps": setup.optimizer.num_steps,
    }  # fmt: skip


def configuration(model: str, layout: str, folder: Path) -> PretrainConfig:
    config = with_layout(tiny_config(**MODELS[model]), **LAYOUTS[layout][1])
    return with_options(config, save=str(folder), load=str(folder))


def run(model: str, layout: str, folder: Path, **options: Any) -> dict[str, Any]:
    job = partial(go, configuration(model, layout, folder), **options)
    return run_ranks(job, LAYOUTS[layout][0])[0] if LAYOUTS[layout][0] > 1 else job()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("model", "saved_by", "loaded_by"),
    first_by_day(
        [
            ("moe bf16", "tp2 etp1", ["one", "ep2"]),
            ("samoe", "tp2 ep2", ["one", "ep2", "pp2 zero"]),
            ("samoe", "pp2 zero", ["one"]),
            ("samoe per expert", "ep2", ["tp2 etp1"]),
        ]
    ),
)
def test_weights_masters_moments_and_progress_survive_a_change_of_layout(
    model: str, saved_by: str, loaded_by: list[str], tmp_path: Path
) -> None:
    first = run(model, saved_by, tmp_path, steps=2, load=False, save=True)
    uninterrupted = run(model, saved_by, tmp_path, steps=2, load=True, save=False)
    for layout in loaded_by:
        second = run(model, layout, tmp_path, steps=2, load=True, save=False)
        assert second["begun"].keys() == first["ended"].keys()
        for name, t in first["ended"].items():
            assert torch.equal(second["begun"][name], t), f"{name} in {layout}"
        assert second["iteration"] == 4 and second["num_steps"] == 4
        tolerance = 2e-2 if "bf16" in model else 1e-5
        assert second["losses"] == pytest.approx(uninterrupted["losses"], rel=tolerance)


@pytest.mark.distributed
def test_the_same_layout_goes_on_bit_for_bit(tmp_path: Path) -> None:
    straight = run("samoe", "ep2", tmp_path / "a", steps=4, load=False, save=False)
    run("samoe", "ep2", tmp_path / "b", steps=2, load=False, save=True)
    resumed = run("samoe", "ep2", tmp_path / "b", steps=2, load=True, save=False)
    assert resumed["losses"] == straight["losses"][2:]
    assert torch.equal(resumed["fractions"], straight["fractions"])
    for name, t in straight["ended"].items():
        assert torch.equal(resumed["ended"][name], t), name


def fail_on_rank_1(config: PretrainConfig, place: str) -> str:
    parallel = initialize_model_parallel(config.parallel)
    setup = build_setup(config, VOCAB_SIZE, parallel)
    if place == "save" and parallel.rank == 1:
        real = saving.write_sharded

        def write(*args: Any) -> None:
            real(*args)
            raise OSError(28, "No space left on device")

        saving.write_sharded = write
    try:
        save_run(setup, initial_state(setup))
        found = find_run(setup)
        assert found is not None
        if parallel.rank == 0:
            next(found.glob("__1_*.distcp")).write_bytes(b"")
        parallel.world.barrier()
        find_run(setup)
    except CheckpointError as error:
        return str(error)
    return "nothing"


@pytest.mark.distributed
def test_trouble_of_one_rank_stops_all_with_the_same_words(tmp_path: Path) -> None:
    config = configuration("samoe", "ep2", tmp_path)
    for place, said in (("save", "No space left on device"), ("load", "is damaged")):
        first, second = run_ranks(fail_on_rank_1, 2, config, place)
        assert said in first and said in second
    assert store.whole_iterations(tmp_path) == [0]


def _loaded_by(rank_without: int, folder: str) -> str:
    parallel = initialize_model_parallel(PretrainConfig().parallel)
    here = Path(folder if parallel.rank != rank_without else f"{folder}/nothing")
    with pytest.raises(CheckpointError) as caught:
        store.load_checkpoint(here, {"a": replicated(torch.zeros(3, 4), parallel)}, parallel)
    assert caught.value.collective
    return str(caught.value)


@pytest.mark.distributed
def test_a_file_that_one_rank_cannot_read_ends_all_with_its_sentence(tmp_path: Path) -> None:
    one = single_process_state()
    state = {"a": replicated(torch.ones(3, 4), one)}
    saved = saving.save_checkpoint(CheckpointConfig(save=str(tmp_path)), 1, state, {}, {}, one)
    first, second = run_ranks(_loaded_by, 2, 1, str(saved))
    assert first == second and f"{saved}/nothing/.metadata cannot be read" in first
