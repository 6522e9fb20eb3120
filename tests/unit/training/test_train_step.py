"""One optimizer step, evaluation and the whole state of a run."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_samoe.dist_checkpointing import store
from megatron_samoe.errors import CheckpointError
from megatron_samoe.moe.types import ForwardContext
from megatron_samoe.optimizer.mixed_precision import LossScale
from megatron_samoe.training import resume as starting
from megatron_samoe.training.checkpointing import load_run, save_run
from megatron_samoe.training.evaluate import evaluate
from megatron_samoe.training.setup import TrainSetup
from megatron_samoe.training.state import TrainState
from megatron_samoe.training.train_step import compute_gradients, train_step
from tests.harness.tiny import micro_batches, started, steps, tiny_config, with_options


def start(dtype: torch.dtype | None = None, **options: Any) -> tuple[TrainSetup, TrainState]:
    return started(tiny_config(**options), dtype)


def test_a_batch_without_predicted_tokens_changes_nothing_but_decay() -> None:
    setup, state = start(layout="dense", eod_mask_loss=True, weight_decay=0.0)
    batches = [{**batch, "loss_mask": torch.zeros(2, 16)} for batch in micro_batches(setup, 0)]
    before = {n: p.detach().clone() for n, p in setup.model.global_parameters().items()}
    result, state = train_step(setup, state, batches)
    assert result.lm_loss == 0.0 and state.iteration == 1
    assert all(torch.equal(p, before[n]) for n, p in setup.model.global_parameters().items())


def test_routing_of_a_step_describes_the_global_batch() -> None:
    options = {"moe_router_topk": 2, "moe_expert_capacity_factor": 0.5, "moe_router_init_method_std": 0.02}
    setup, state = start(layout="moe", moe_z_loss_coeff=0.1, **options)
    result, after = train_step(setup, state, micro_batches(setup, 0))
    routing = result.routing
    assert routing is not None
    assert routing.counts_LE.shape == (4, 4)
    assert routing.counts_LE.sum(1).tolist() == [8 * 16 * 2] * 4
    assert 0.05 < routing.health.dropped_fraction < 0.6
    assert 0.9 < routing.load_balance_loss < 2.0 and routing.z_loss == pytest.approx(math.log(4) ** 2, rel=0.2)
    shares = (routing.counts_LE / routing.counts_LE.sum(1, keepdim=True)).tolist()
    entropies = [-sum(f * math.log(f) for f in row if f) / math.log(4) for row in shares]
    assert routing.health.load_entropy == pytest.approx(entropies, rel=1e-12)
    assert routing.health.least_load_entropy == min(routing.health.load_entropy)
    assert routing.health.largest_expert_share == pytest.approx(2 * max(map(max, shares)), rel=1e-12)
    assert routing.health.idle_experts == sum(f == 0 for row in shares for f in row)
    assert after.expert_fractions_LE is not None
    torch.testing.assert_close(after.expert_fractions_LE.sum(1), torch.ones(4))
    torch.testing.assert_close(after.expert_fractions_LE, (routing.counts_LE / 256).float())


def test_no_gradient_is_weighted_by_the_loads_of_an_earlier_step() -> None:
    setup, state = start(torch.float64, layout="moe", moe_aux_loss_coeff=1.0)
    lopsided = torch.tensor([0.7, 0.1, 0.1, 0.1]).expand(4, -1).clone()
    gradients = []
    for fractions in (state.expert_fractions_LE, lopsided):
        compute_gradients(setup, replace(state, expert_fractions_LE=fractions), micro_batches(setup, 0))
        gradients.append(setup.model.global_parameters()["layers.3.moe.router.weight"].main_grad.clone())
    assert torch.equal(*gradients)


def test_overflow_in_half_precision_skips_the_update_and_lowers_the_scale() -> None:
    setup, state = start(torch.float32, layout="dense", num_layers=1)
    fp16 = replace(setup, config=with_options(setup.config, fp16=True))
    state = replace(state, loss_scale=LossScale(2.0**120, growth_interval=1000))
    before = {n: p.detach().clone() for n, p in setup.model.global_parameters().items()}
    setup.model.global_parameters()["final_norm.weight"].register_hook(lambda g: g * 2.0**20)
    result, after = train_step(fp16, state, micro_batches(setup, 0))
    assert result.skipped and result.is_finite and math.isfinite(result.lm_loss)
    assert after.loss_scale.value == 2.0**119 and after.iteration == 1
    assert all(torch.equal(p, before[n]) for n, p in setup.model.global_parameters().items())


def test_loss_scale_does_not_change_the_update() -> None:
    weights = []
    for scale in (1.0, 2.0**12):
        setup, state = start(torch.float64, layout="samoe", moe_z_loss_coeff=0.1, moe_aux_loss_coeff=0.1)
        result, _ = train_step(setup, replace(state, loss_scale=LossScale(scale)), micro_batches(setup, 0))
        weights.append((result.grad_norm, {n: p.detach() for n, p in setup.model.global_parameters().items()}))
    assert weights[0][0] == pytest.approx(weights[1][0], rel=1e-9)
    for name, p in weights[0][1].items():
        torch.testing.assert_close(p, weights[1][1][name], rtol=1e-9, atol=1e-10)


def test_evaluation_is_the_mean_loss_without_noise_or_dropped_tokens() -> None:
    noise: dict[str, Any] = {"hidden_dropout": 0.5, "attention_dropout": 0.5, "moe_input_jitter_eps": 0.5}
    setup, _ = start(torch.float64, layout="samoe", moe_expert_capacity_factor=0.3, **noise)
    plain, _ = start(torch.float64, layout="samoe")
    batches = micro_batches(setup, 0)
    batches[0]["loss_mask"] = torch.zeros(2, 16)
    first = evaluate(setup, batches)
    assert first == evaluate(setup, batches) == evaluate(plain, batches)
    tokens, labels = (torch.cat([b[name] for b in batches[1:]]) for name in ("tokens", "labels"))
    logits, _ = plain.model(tokens, ForwardContext(6))
    assert first.mean == pytest.approx(F.cross_entropy(logits, labels.flatten()).item(), rel=1e-10)


def saved(folder: Path, **options: Any) -> tuple[TrainSetup, TrainState]:
    setup, state = start(save=str(folder), load=str(folder), **options)
    *_, (_, state) = steps(setup, state, 2)
    save_run(setup, state)
    return setup, state


def resume(folder: Path, **options: Any) -> tuple[TrainSetup, TrainState]:
    setup, state = start(save=str(folder), load=str(folder), **options)
    return setup, load_run(setup, state, store.iteration_dir(folder, 2))


def test_finetuning_takes_weights_only(tmp_path: Path) -> None:
    trained, _ = saved(tmp_path)
    setup, state = resume(tmp_path, finetune=True)
    assert state.iteration == 0 and state.consumed_samples == 0 and setup.optimizer.num_steps == 0
    for name, p in trained.model.global_parameters().items():
        assert torch.equal(p, setup.model.global_parameters()[name])
    assert all(not t.any() for name in setup.optimizer.pieces for t in setup.optimizer.moments(name).values())


def test_a_run_may_go_on_without_its_optimizer_state(tmp_path: Path) -> None:
    trained, state = saved(tmp_path, bf16=True, no_save_optim=True)
    with pytest.raises(CheckpointError, match="has no optimizer state; give --no-load-optim or --finetune"):
        resume(tmp_path, bf16=True)
    setup, again = resume(tmp_path, bf16=True, no_load_optim=True)
    assert again.iteration == state.iteration and setup.optimizer.num_steps == 0
    name = "layers.0.attention.qkv.weight"
    weight = setup.model.global_parameters()[name]
    assert torch.equal(weight, trained.model.global_parameters()[name])
    assert torch.equal(setup.optimizer.masters[name].flatten(), weight.float().flatten())


def test_a_folder_of_another_model_is_not_saved_to(tmp_path: Path) -> None:
    saved(tmp_path)
    for options, is_refused in (({"num_layers": 2}, True), ({"lr": 0.1}, False)):
        run = start(save=str(tmp_path), **options)
        with pytest.raises(CheckpointError, match="another --save") if is_refused else nullcontext():
            starting.resume(*run)


def test_options_that_make_the_model_may_not_change_and_others_may(tmp_path: Path) -> None:
    saved(tmp_path)
    routing = {
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_expert_capacity_factor": 2.0,
        "moe_z_loss_coeff": 0.1,
    }
    others = {"samoe_combine": "layer", "hidden_dropout": 0.1, "micro_batch_size": 4, "lr": 0.1}
    assert resume(tmp_path, **routing, **others)[1].iteration == 2
    with pytest.raises(CheckpointError, match="samoe_normalization is 'none' there and 'l2' here"):
        resume(tmp_path, samoe_normalization="l2")
