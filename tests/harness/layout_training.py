"""Layouts and models whose training must agree, and the training that is compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_samoe.config import PretrainConfig
from megatron_samoe.config.validate import validate
from megatron_samoe.dist_checkpointing.sharded_state import sharded
from megatron_samoe.errors import ConfigError
from megatron_samoe.optimizer.param_groups import build_param_groups
from megatron_samoe.parallel_state import ParallelState, initialize_model_parallel
from megatron_samoe.parallel_state.rank_grid import GROUPS
from megatron_samoe.pipeline_parallel.p2p_communication import PipelineChannel
from megatron_samoe.row_exchange.exchange import with_exchange
from megatron_samoe.training.checkpointing import model_state
from megatron_samoe.training.hooks.moe_diagnostics import expert_grad_norms
from megatron_samoe.training.setup import Extensions, build_setup, initial_state
from megatron_samoe.training.teacher import load_teacher
from megatron_samoe.training.train_step import train_step
from tests.harness.tables import table
from tests.harness.tiny import VOCAB_SIZE, gather_global, micro_batches, tiny_config, with_layout, with_options

TABLE = table(__file__)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = TABLE["layouts"]
MODELS: dict[str, dict[str, Any]] = TABLE["models"]


def train(
    config: PretrainConfig,
    dtype: torch.dtype = torch.float32,
    steps: int = 5,
    device: torch.device | str = "cpu",
    exchange: Literal["auto", "torch", "extension"] = "torch",
    extensions: Extensions | None = None,
) -> dict[str, Any]:
    """Returns the losses and norms of a few steps, with a teacher the divergences from it, the first step's gradients, the
    last step's norms of each expert's gradient (zeros where none are kept) and the last weights, all whole; and of each weight
    the sum of its rates.

    AdamW trains with an epsilon of 1e-5: it divides a gradient by its own size, so with the usual one, where a gradient is
    rounding alone (the bias of keys has none), the update would be rounding divided by itself.

    Args:
        exchange: what tokens travel through between expert-parallel ranks.
        extensions: what comes from outside the package.
    """
    config = with_options(config, adam_eps=1e-5)
    parallel = initialize_model_parallel(config.parallel, device)
    names = ("ep", "pool_dp") if parallel.device.type == "cpu" else ("ep",)
    with_rows = {n: with_exchange(getattr(parallel, n), parallel.device, backend=exchange) for n in names}
    parallel = replace(parallel, **with_rows)
    setup = build_setup(config, VOCAB_SIZE, parallel, dtype, extensions)
    if config.distillation.teacher is not None:
        setup = replace(setup, teacher=load_teacher(config, setup.model))
    state = initial_state(setup)
    gradients: dict[str, Tensor] = {}
    losses, norms, balance, divergences, rates = [], [], [], [], 0.0
    expert_norms = torch.zeros(())

    def keep_gradients(_norm: float) -> None:
        pieces = {p.name: sharded(p.grad, p.tag.shard, parallel, p.slice) for p in setup.buffers.pieces}
        gradients.update(gather_global(pieces, parallel))

    def observe() -> None:
        nonlocal expert_norms
        kept = expert_grad_norms(setup, state.loss_scale.value) if setup.model.num_moe_layers else None
        expert_norms = expert_norms if kept is None else kept.cpu()

    for step in range(steps):
        watch, keep = observe if step + 1 == steps else None, None if step else keep_gradients
        result, state = train_step(setup, state, micro_batches(setup, step), watch, keep)
        losses.append(result.lm_loss)
        norms.append(result.grad_norm)
        rates += result.learning_rate
        divergences.append(result.kl_loss or 0.0)
        balance.append((result.routing and result.routing.load_balance_loss) or 0.0)
    weights = gather_global(model_state(setup.model), parallel)
    _close_groups(parallel, setup.pipeline.channel)
    groups = build_param_groups(weights, config.optimizer)
    found = {"losses": losses, "norms": norms, "balance": balance, "divergences": divergences}
    found |= {"gradients": gradients, "expert_norms": expert_norms, "weights": weights}
    return {**found, "rates": {name: group.lr_mult * rates for group in groups for name in group.names}}


def train_each(configs: list[PretrainConfig], dtype: torch.dtype, steps: int) -> list[dict[str, Any]] | None:
    """Trains one model after the other on the same processes, over the transport of rows that each names, two steps more
    where a schedule of routing ends by then; the first rank has the results.

    Ranks call it here: a module of tests would make its cases anew in each of them.
    """
    scheduled = [c.moe.pool_lock_step is not None or bool(c.moe.neighbour_unmask_steps) for c in configs]
    results = [
        train(c, dtype, 5 if more else steps, exchange=c.parallel.moe_all_to_all_backend)
        for c, more in zip(configs, scheduled, strict=True)
    ]
    return results if not dist.is_initialized() or dist.get_rank() == 0 else None


def _close_groups(parallel: ParallelState, channel: PipelineChannel | None) -> None:
    """Ends the groups that training opened: each keeps threads, and processes that train many models would crawl."""
    if not dist.is_initialized():
        return
    dist.barrier()
    groups = [getattr(parallel, name) for name in GROUPS]
    for exchange in (group.exchange for group in groups if group.exchange is not None):
        exchange.close()
    handles = {group.handle for group in groups} | set(channel.groups.values() if channel else ())
    for handle in handles - {None, dist.group.WORLD}:
        dist.destroy_process_group(handle)


def layout_config(layout: str, model: str) -> PretrainConfig:
    """Returns the configuration of a model of MODELS in a layout of LAYOUTS."""
    return options_in(layout, MODELS[model])


def options_in(layout: str, options: Mapping[str, Any]) -> PretrainConfig:
    """Returns the configuration of a model's options in a layout of LAYOUTS."""
    num_ranks, given = LAYOUTS[layout]
    sizes, options = dict(given), dict(options)
    # Groups of sequences that lie on several ranks need as many sequences at once in every layout.
    micro_step = options.pop("micro_step", None)
    model_size = sizes.get("tp", 1) * sizes.get("cp", 1) * sizes.get("pp", 1)
    if micro_step is not None:
        options["micro_batch_size"] = micro_step * model_size // num_ranks
    elif "pp" not in sizes and model_size == num_ranks:
        options["micro_batch_size"] = 4  # two micro-batches add up as four do, at half the messages
    return with_layout(tiny_config(**options), **sizes)


def is_legal(layout: str, options: Mapping[str, Any]) -> bool:
    """Returns whether a layout can train a model, as itself: a dense model has no experts to place."""
    num_ranks, sizes = LAYOUTS[layout]
    try:
        config = options_in(layout, options)
        validate(with_options(config, mock_data=True), num_ranks)
    except ConfigError:
        return False
    unused = {"pool"} if config.moe.expert_layout != "dense" else {"pool", "ep", "etp"}
    return config.moe.shares_experts or not unused & sizes.keys()


def assert_same(actual: dict[str, Any], expected: dict[str, Any], rtol: float) -> None:
    """Compares what `train` returned.

    Weights in fp32 may differ by a thousandth of what AdamW can have moved them. An update is Lipschitz in the gradients, with
    a constant of twice the rate over epsilon, so what rounding does to gradients does little to weights: eight times less than
    that, measured. A rate 1 % off, or decay left out, does more.
    """
    for key in ("losses", "norms", "balance", "divergences", "expert_norms"):
        found, wanted = torch.as_tensor(actual[key]), torch.as_tensor(expected[key])
        said = f"{key} are {found.tolist()}, in one process {wanted.tolist()}: "
        most = 10 * rtol if key == "expert_norms" else rtol
        torch.testing.assert_close(found, wanted, rtol=most, atol=0.0, msg=lambda m, said=said: said + m)
    assert actual["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        # A number, or the bias of a norm of keys, which has no gradient but rounding, sums terms as large as its module's other
        # gradients, by which its rounding is measured.
        module = name.rpartition(".")[0] + "."
        siblings = [g for n, g in expected["gradients"].items() if n.startswith(module)]
        scale = max(g.abs().max().item() for g in ([gradient] if gradient.dim() > 1 else siblings))
        found = actual["gradients"][name]
        said = f"gradient of {name}: "
        torch.testing.assert_close(found, gradient, rtol=rtol, atol=rtol * scale, msg=lambda m, said=said: said + m)
    assert expected["weights"].keys() == actual["weights"].keys()
    for name, weight in expected["weights"].items():
        found, said = actual["weights"][name], f"weight {name}: "
        bounds = {"rtol": 2.0**-22, "atol": 1e-3 * expected["rates"].get(name, 0.0)}
        if weight.dtype == torch.float64:
            bounds = {"rtol": 1e-9, "atol": 1e-11}
        torch.testing.assert_close(found, weight, **bounds, msg=lambda m, said=said: said + m)
