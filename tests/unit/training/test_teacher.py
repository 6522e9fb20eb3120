"""What a teacher adds to a step, when it is let go, and which cannot teach."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_samoe.config import PretrainConfig
from megatron_samoe.config.derived import parse_stage_layout
from megatron_samoe.config.teacher import on_ranks_of
from megatron_samoe.convert.opener import open_folder
from megatron_samoe.dist_checkpointing.teacher import find_teacher
from megatron_samoe.log import logger
from megatron_samoe.moe.types import ForwardContext
from megatron_samoe.parallel_state import single_process_state
from megatron_samoe.parallel_state.rank_grid import RankGrid
from megatron_samoe.planning.accounting import train_flops_per_token
from megatron_samoe.planning.layout_cost import Cluster
from megatron_samoe.planning.layout_planner import plan_layouts
from megatron_samoe.planning.memory import rank_memory
from megatron_samoe.runtime.load import load_model
from megatron_samoe.tensor_parallel.layers import padded_vocab_size
from megatron_samoe.training import metrics
from megatron_samoe.training.checkpointing import save_run
from megatron_samoe.training.evaluate import evaluate
from megatron_samoe.training.hook import Hook, Record, Training
from megatron_samoe.training.micro_batches import Batch
from megatron_samoe.training.setup import TrainSetup, build_setup, initial_state
from megatron_samoe.training.teacher import load_teacher
from megatron_samoe.training.train_step import StepTime, compute_gradients
from megatron_samoe.training.trainer import Trainer
from tests.harness.tiny import (
    VOCAB_SIZE,
    RandomBatches,
    micro_batches,
    started,
    steps,
    tiny_config,
    with_layout,
    with_options,
)

STATE = single_process_state()
NOISE: dict[str, Any] = {"hidden_dropout": 0.3, "moe_input_jitter_eps": 0.1, "moe_expert_capacity_factor": 0.5}
TEACHER = tiny_config("moe", num_layers=3, hidden_size=40, num_experts=6, init_method_std=0.2, mock_data=True, **NOISE)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    save_run(*started(with_options(TEACHER, save=str(folder))))
    return folder


def student(teacher: Path, **options: Any) -> PretrainConfig:
    return with_options(tiny_config("samoe", style="llama"), teacher=str(teacher), **options)


def taught_setup(config: PretrainConfig, dtype: torch.dtype | None = None) -> TrainSetup:
    setup = build_setup(config, VOCAB_SIZE, STATE, dtype)
    return replace(setup, teacher=load_teacher(config, setup.model))


def test_the_loss_and_its_gradient_are_those_of_the_formula(teacher: Path) -> None:
    """CE + weight * T^2 * KL(teacher || student), means over the predicted tokens; the teacher has no noise and drops none."""
    teaching = {"teacher_temperature": 2.0, "teacher_weight": 0.7}
    config = student(teacher, eod_mask_loss=True, moe_aux_loss_coeff=0.0, samoe_combine="layer", **teaching)
    setup = taught_setup(config, torch.float64)
    batches = micro_batches(setup, 0)
    for number, batch in enumerate(batches):
        batch["loss_mask"] = (torch.rand(2, 16, generator=torch.Generator().manual_seed(number)) < 0.3).float()
    tokens, labels, mask = (torch.cat([b[name] for b in batches]) for name in ("tokens", "labels", "loss_mask"))
    lm_loss, num_tokens, kl_loss, _ = compute_gradients(setup, initial_state(setup), batches)
    setup.model.begin_step()
    logits = setup.model(tokens, ForwardContext(8))[0].detach().requires_grad_()
    loaded = load_model(open_folder(teacher), STATE).model.double()
    loaded.dtype = torch.float64
    assert setup.teacher is not None
    theirs = setup.teacher.forward(tokens, 8, None, None, 0)
    torch.testing.assert_close(theirs, loaded(tokens, ForwardContext(8))[0], rtol=1e-9, atol=1e-9)
    assert not theirs.requires_grad and all(p.grad is None for p in setup.teacher.model.parameters())
    q, p = ((x[:, :VOCAB_SIZE] / 2.0).log_softmax(1) for x in (logits, theirs))  # without padding
    kl_T = F.kl_div(q, p, log_target=True, reduction="none").sum(1)
    mean = lambda t: (t * mask.flatten()).sum() / mask.sum()  # noqa: E731
    ce = mean(F.cross_entropy(logits, labels.flatten(), reduction="none"))
    assert num_tokens == int(mask.sum())
    assert lm_loss == pytest.approx(ce.item(), rel=1e-12)
    assert kl_loss == pytest.approx(mean(kl_T).item(), rel=1e-11) and kl_loss > 0.1
    (dlogits,) = torch.autograd.grad(ce + 0.7 * 2.0**2 * mean(kl_T), logits)
    stage, seen = setup.model.chunks[0], []
    with stage.final_norm.register_forward_hook(lambda _module, _inputs, x_TH: seen.append(x_TH.detach())):
        setup.model(tokens, ForwardContext(8))
    expected = dlogits.t() @ seen[0]
    torch.testing.assert_close(stage.output.weight.main_grad[: len(expected)], expected, rtol=1e-9, atol=1e-12)


def test_a_teacher_computes_in_the_precision_of_its_student(teacher: Path) -> None:
    batches, losses = [], {}
    for name, options in (("fp32", {}), ("bf16", {"bf16": True})):
        setup = taught_setup(student(teacher, **options))
        batches = batches or micro_batches(setup, 0)
        assert setup.teacher is not None and setup.teacher.model.dtype == setup.model.dtype
        _, _, losses[name], _ = compute_gradients(setup, initial_state(setup), batches)
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=2e-2)


def test_evaluation_knows_no_teacher(teacher: Path) -> None:
    setup = taught_setup(student(teacher))
    batches = micro_batches(setup, 3)
    assert evaluate(setup, batches) == evaluate(replace(setup, teacher=None), batches)


class Witness(Hook):
    """Whether there is a teacher before each step, and what steps recorded of it."""

    def __init__(self) -> None:
        self.taught: dict[int, bool] = {}
        self.kl: dict[int, float | None] = {}
        self.lm: dict[int, float] = {}
        self.alive: weakref.ref[Any] | None = None

    def pre_step(self, run: Training, batches: Sequence[Batch]) -> None:
        number, found = run.state.iteration + 1, run.setup.teacher
        self.taught[number] = found is not None
        if found is not None:
            self.alive = weakref.ref(found.model)
        elif self.alive is not None:
            gc.collect()
            assert self.alive() is None, "the teacher's memory is free before the first step without it"

    def record(self, run: Training, record: Record) -> None:
        self.kl[run.state.iteration], self.lm[run.state.iteration] = record.get("kl_loss"), record["lm_loss"]


def run(config: PretrainConfig, folder: Path, **options: Any) -> tuple[dict[str, Tensor], Witness]:
    """Trains in a folder, from what is there, and returns the last weights and optimizer state."""
    config = with_options(
        config, train_iters=6, log_interval=1, eval_iters=0, save=str(folder), load=str(folder), **options
    )
    setup, witness = build_setup(config, VOCAB_SIZE, STATE), Witness()
    Trainer(setup, RandomBatches(setup), [witness]).run()  # type: ignore[arg-type]
    tensors = dict(setup.model.global_parameters()) | {
        f"{kind} {name}": t for name in setup.optimizer.masters for kind, t in setup.optimizer.moments(name).items()
    }
    return {name: t.detach().clone() for name, t in tensors.items()}, witness


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(actual[name], expected[name])]


def test_the_teacher_leaves_inside_a_run_and_resumes_are_exact(teacher: Path, tmp_path: Path) -> None:
    lent = tmp_path / "lent"
    shutil.copytree(teacher, lent)
    config = student(lent, teacher_until=3, **NOISE)
    whole, witness = run(config, tmp_path / "whole")
    assert witness.taught == {1: True, 2: True, 3: True, 4: False, 5: False, 6: False}
    assert [witness.kl[i] is None for i in range(1, 7)] == [False, False, False, True, True, True]
    _, before = run(config, tmp_path / "parts", exit_interval=2)
    _, across = run(config, tmp_path / "parts", exit_interval=4)
    assert across.taught == {3: True, 4: False}
    shutil.rmtree(lent)  # it is not looked for any more
    parts, after = run(config, tmp_path / "parts")
    assert after.taught == {5: False, 6: False}
    assert before.kl | across.kl | after.kl == witness.kl and before.lm | across.lm | after.lm == witness.lm
    assert_same(parts, whole)


def test_a_run_without_an_end_of_teaching_is_taught_to_its_last_step(teacher: Path, tmp_path: Path) -> None:
    _, witness = run(student(teacher), tmp_path / "run")
    assert all(witness.taught.values()) and None not in witness.kl.values()
    # All is done: nothing is loaded to train nothing.
    _, again = run(student(tmp_path / "nowhere"), tmp_path / "run")
    assert not again.taught


def test_mfu_counts_forward_passes_of_the_teacher(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "peak_flops", lambda _device: 1e9)
    taught = taught_setup(student(teacher))
    ((result, state),) = steps(taught, initial_state(taught), 1)
    timed = StepTime(2.0, 2.0, taught.tokens_after(0) / 2.0)
    saved = find_teacher(str(teacher)).trained
    more = train_flops_per_token(with_options(saved, seq_length=16), VOCAB_SIZE) / 3
    for world_size in (1, 4):
        among = replace(taught, parallel=replace(STATE, grid=RankGrid(world_size)))
        counts = [
            metrics.make_record(s, state, result, timed, None)["mfu"] for s in (among, replace(among, teacher=None))
        ]
        assert counts[0] - counts[1] == pytest.approx(more * 8 * 16 / 2.0 / (1e9 * world_size))


def test_layers_are_spread_over_the_students_stages() -> None:
    teacher = tiny_config("dense", num_layers=7)
    config = with_layout(tiny_config("moe"), pp=2, vpp=1)
    layout = on_ranks_of(config, teacher, 2).parallel.pipeline_model_parallel_layout
    assert layout is not None and parse_stage_layout(layout) == (2, 2, 2, 1)
    few = on_ranks_of(config, with_options(teacher, num_layers=2), 2).parallel.pipeline_model_parallel_layout
    assert few is not None and parse_stage_layout(few) == (0, 1, 1, 0)


def test_what_training_alone_asks_of_a_teacher_is_left_out() -> None:
    """Options of the teacher's own training need not be legal in the student's layout."""
    balance = {"moe_router_load_balancing_type": "aux_loss", "moe_balance_scope": "layer", "moe_aux_loss_group_size": 3}
    teacher = tiny_config("moe", expert_sharing="pool", num_experts=8, pool_lock_step=90, train_iters=200, **balance)
    settled = on_ranks_of(tiny_config("dense"), with_options(teacher, recompute_granularity="full"), 1)
    assert settled.moe.pool_lock_step == 90 and settled.moe.moe_aux_loss_group_size is None
    assert settled.training.recompute_granularity is None
    chooses = tiny_config("moe", moe_router_expert_choice=True, moe_router_load_balancing_type="none")
    assert on_ranks_of(tiny_config("dense"), chooses, 1).moe.moe_router_expert_choice


def test_the_planner_counts_a_teachers_weights_and_time(teacher: Path) -> None:
    config = student(teacher, global_batch_size=8)
    setup = taught_setup(config)
    assert setup.teacher is not None
    weights = sum(p.numel() * p.element_size() for p in setup.teacher.model.parameters())
    logits = 2 * 16 * padded_vocab_size(VOCAB_SIZE, config.model.make_vocab_size_divisible_by) * 4
    held = weights + 2 * logits  # with their gradient
    planned, plain = rank_memory(config, VOCAB_SIZE, 1), rank_memory(with_options(config, teacher=None), VOCAB_SIZE, 1)
    assert planned.teacher == held and plain.teacher == 0 and planned.total == plain.total + held
    split = [rank_memory(with_layout(config, pp=2), VOCAB_SIZE, 2, rank) for rank in (0, 1)]
    messages = 2 * 2 * 2 * 16 * 40 * 4, 2 * 2 * 16 * 40 * 4  # received and sent, of two passes in flight and of one
    # Either end of the pipeline holds the words.
    assert sum(s.teacher for s in split) == held + sum(messages) + 104 * 40 * 4
    assert planned.parts()["teacher"] == held and "teacher" not in plain.parts()
    cluster = Cluster(4, gpus_per_node=4, memory_bytes=1e9, flops=1e12, intra_bandwidth=1e11, inter_bandwidth=1e10)
    with_teacher = {x.name(): x for x in plan_layouts(config, VOCAB_SIZE, cluster)}
    without = {x.name(): x for x in plan_layouts(with_options(config, teacher=None), VOCAB_SIZE, cluster)}
    assert any(" ep4" in name for name in without) and not any(" ep4" in name for name in with_teacher), "6 experts"
    assert all(x.memory.teacher and x.tokens_per_s < without[name].tokens_per_s for name, x in with_teacher.items())


def test_another_course_of_teaching_is_remarked_upon(
    teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level("INFO", logger.name)
    config = student(teacher, teacher_until=4)
    run(config, tmp_path / "run", exit_interval=2)
    run(config, tmp_path / "run", exit_interval=3)
    assert "Teaching continues otherwise" not in caplog.text
    run(config, tmp_path / "run", teacher_weight=3.0, exit_interval=5)
    assert "--teacher-weight 1.0 there, 3.0 here" in caplog.text
    run(config, tmp_path / "run", teacher=None, teacher_until=None)
    # A message may be caught by several handlers, of which other tests leave some.
    remarks = {message for message in caplog.messages if "Teaching continues otherwise" in message}
    assert len(remarks) == 1, "the teacher has left in either"
