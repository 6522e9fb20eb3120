"""What a run records: its progress while batches grow (samples, tokens, speeds, use of the GPUs, by hand), and its machine."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_samoe.parallel_state import single_process_state
from megatron_samoe.parallel_state.rank_grid import RankGrid
from megatron_samoe.training import metrics, train_step
from megatron_samoe.training.hook import Hook, Record, Training
from megatron_samoe.training.hooks.loggers import MetricsFile
from megatron_samoe.training.machine import machine_facts
from megatron_samoe.training.train_step import compute_gradients
from megatron_samoe.training.trainer import Trainer
from tests.harness.program import PRETRAIN, arguments, call, write_corpus
from tests.harness.tiny import RandomBatches, micro_batches, started, tiny_config

#: Steps of 2, 2, 2, 2, 2, 4, 4, 4, 6, 6, 8, 8, 8 sequences of 16 tokens.
RAMP: dict[str, Any] = {"global_batch_size": 8, "micro_batch_size": 1, "rampup_batch_size": (2, 2, 30)}
RAMP |= {"train_samples": 60, "eval_iters": 0}
#: Multiply-adds of a token in the layer's matrices and the padded output matrix, and in two products with half the sequence.
PRODUCTS = 32 * (3 * 32 + 32 + 2 * 128 + 104) + 2 * 32 * 8


class TenSeconds(Hook):
    """A clock that goes on by ten seconds in each step, and what was recorded."""

    now = 5000.0

    def __init__(self) -> None:
        self.records: list[Record] = []

    def pre_optim_step(self, run: Training, grad_norm: float) -> None:
        self.now += 10

    def record(self, run: Training, record: Record) -> None:
        self.records.append(record)


@pytest.mark.parametrize("world_size", [1, 4])
def test_records_of_a_run_whose_batches_grow(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state says how many ranks there are, each with a GPU of 1 MFLOP/s."""
    monkeypatch.setattr(metrics, "peak_flops", lambda _: 1e6)
    config = tiny_config("dense", num_layers=1, train_iters=13, log_interval=3, lr_decay_style="linear", **RAMP)
    setup, _ = started(config, parallel=replace(single_process_state(), grid=RankGrid(world_size)))
    hook = TenSeconds()
    monkeypatch.setattr(train_step, "time", SimpleNamespace(perf_counter=lambda: hook.now))
    state = Trainer(setup, RandomBatches(setup), [hook]).run()  # type: ignore[arg-type]
    assert (state.iteration, state.consumed_samples, state.consumed_tokens) == (13, 58, 58 * 16)
    done, before = ((3, 6, 2), (6, 14, 4), (9, 28, 6), (12, 50, 8), (13, 58, 8)), (0, 0)
    for record, (iteration, samples, size) in zip(hook.records, done, strict=True):
        rate = (samples - before[1]) * 16 / (10 * (iteration - before[0]))
        counts = {"iteration": iteration, "consumed_samples": samples, "consumed_tokens": 16 * samples}
        wanted = {**counts, "global_batch_size": size, "step_time_s": 10, "tokens_per_s": rate}
        wanted["learning_rate"] = 1e-3 * (1 - (samples - size) / 60)
        wanted["mfu"] = 6 * PRODUCTS * rate / (1e6 * world_size)
        assert {name: record[name] for name in wanted} == pytest.approx(wanted), iteration
        before = (iteration, samples)


def test_a_step_of_a_growing_batch_is_one_of_its_size() -> None:
    """Sums over tokens and sequences are divided by those of the step, in gradients and in what is recorded."""
    options = {"moe_router_topk": 2, "moe_aux_loss_coeff": 0.5, "moe_z_loss_coeff": 0.1, "eod_mask_loss": False}
    found = []
    for batches in (RAMP, {**RAMP, "global_batch_size": 4, "rampup_batch_size": None}):
        setup, state = started(tiny_config("moe", **options, **batches), torch.float64)
        state = replace(state, iteration=5, consumed_samples=10)
        loss, num_tokens, _, routing = compute_gradients(setup, state, micro_batches(setup, 0, 4))
        assert num_tokens == 4 * 16
        found.append((loss, routing, {n: p.main_grad.clone() for n, p in setup.model.global_parameters().items()}))
    assert found[0][0] == found[1][0] and found[0][1].z_loss == found[1][1].z_loss
    assert found[0][1].load_balance_loss == found[1][1].load_balance_loss
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-12, atol=1e-15)


def test_a_model_without_a_preference_has_losses_by_hand() -> None:
    """All scores are 0: of 103 words and of four experts, whose log-sum-exp is log 4 and whose balance is perfect."""
    setup, state = started(tiny_config("moe", **RAMP), torch.float64)
    for name, p in setup.model.global_parameters().items():
        if ".router." in name or name.startswith("final_norm."):
            p.data.zero_()
    state = replace(state, consumed_samples=10)
    loss, _, _, routing = compute_gradients(setup, state, micro_batches(setup, 0, 4))
    assert routing is not None
    assert (loss, routing.load_balance_loss) == pytest.approx((math.log(103), 1.0))
    assert routing.z_loss == pytest.approx(math.log(4) ** 2)


def test_a_bar_shows_the_share_of_the_corpus(tmp_path: Path) -> None:
    """90% of 40 documents of 150 tokens; six steps of eight sequences of 64 tokens."""
    data = {"data_path": write_corpus(tmp_path / "corpus"), "data_cache_path": tmp_path / "cache"}
    ended = call(PRETRAIN, *arguments(**data, seq_length=64, eval_iters=0, log_progress=True))
    assert ended.returncode == 0, ended.stderr
    assert re.findall(r"epoch=([0-9.]+)", ended.stderr)[-1:] == [f"{6 * 8 * 64 / (0.9 * 40 * 150):.2f}"]


def run_at(iteration: int) -> Any:
    setup = SimpleNamespace(parallel=single_process_state())
    return SimpleNamespace(setup=setup, state=SimpleNamespace(iteration=iteration))


def test_the_machine_is_written_beside_the_metrics(tmp_path: Path) -> None:
    facts = machine_facts(single_process_state())
    hook = MetricsFile(str(tmp_path / "run" / "metrics.jsonl"))
    hook.start(run_at(0))
    hook.close(run_at(0))
    found = json.loads((tmp_path / "run" / "machine.json").read_text())
    assert found == facts and found["device"] == "cpu" and found["ranks"] == 1 and found["device_name"]
    assert found["layout"] == {"tensor": 1, "context": 1, "pipeline": 1, "expert": 1, "expert_tensor": 1, "data": 1}


def test_an_evaluation_of_a_killed_run_has_a_line_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1}\n{"iterat')
    (tmp_path / "machine.json").write_text("{}")
    hook = MetricsFile(str(path), trains=False)
    hook.start(run_at(1))
    hook.evaluated(run_at(1), {"iteration": 1, "validation_loss": 2.0})
    hook.close(run_at(1))
    assert path.read_text() == '{"iteration": 1}\n{"iteration": 1, "validation_loss": 2.0}\n'
    assert (tmp_path / "machine.json").read_text() == "{}", "which training wrote"
