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
from tests.harness.tiny import VOCAB_SIZE, gather_global, micro_batches, tiny_config, with_layout, with_options

LLAMA: dict[str, Any] = {"style": "llama", "init_method_std": 0.2}
LATENT: dict[str, Any] = {
    "multi_latent_attention": True, "group_query_attention": False, "num_query_groups": 1, "kv_lora_rank": 10, "qk_head_dim": 6,
    "qk_pos_emb_head_dim": 4, "v_head_dim": 5,
}  # fmt: skip
MUON: dict[str, Any] = {"optimizer": "muon", "lr": 3e-3}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "dp2": (2, {}),
    "tp2": (2, {"tp": 2}),
    "ep2": (2, {"ep": 2}),
    "tp2 etp1": (2, {"tp": 2, "etp": 1}),
    "tp2 ep2": (4, {"tp": 2, "ep": 2}),
    "tp2 etp1 ep4": (4, {"tp": 2, "etp": 1, "ep": 4}),
    "ep2 edp2": (4, {"ep": 2}),
    "tp2 sp": (2, {"tp": 2, "sp": True}),
    "tp2 sp etp1 ep2": (4, {"tp": 2, "sp": True, "etp": 1, "ep": 2}),
    "pp2": (2, {"pp": 2}),
    "zero dp2": (2, {"zero": True}),
    "pp2 vpp2 dp1": (2, {"pp": 2, "vpp": 1}),
    "pp2 ep2 zero": (4, {"pp": 2, "ep": 2, "zero": True}),
    "pp4 uneven": (4, {"pp": 4, "stages": "Et|tt||tL"}),
    "pp2 gpipe": (2, {"pp": 2, "schedule": "gpipe"}),
    "pp2 ep2 replicated pool": (4, {"pp": 2, "ep": 2, "pool": "replicated"}),
    "dp4 zero overlap": (4, {"zero": True, "overlap": True, "bucket": 3000}),
    "ep2 edp2 overlap": (4, {"ep": 2, "overlap": True, "bucket": 3000}),
    "tp2 pp2": (4, {"tp": 2, "pp": 2}),
    "tp2 pp2 sp etp1 zero": (4, {"tp": 2, "pp": 2, "sp": True, "etp": 1, "zero": True}),
    "tp2 sp dp2 zero": (4, {"tp": 2, "sp": True, "zero": True}),
    "tp2 etp1 ep2": (4, {"tp": 2, "etp": 1, "ep": 2}),
    "pp2 vpp2 ep2": (4, {"pp": 2, "stages": "Et|t|t|tL", "ep": 2}),
    "cp2": (2, {"cp": 2}),
    "cp2 a2a": (2, {"cp": 2, "comm": "a2a"}),
    "cp4": (4, {"cp": 4}),
    "cp2 zero dp2": (4, {"cp": 2, "zero": True, "overlap": True, "bucket": 3000}),
    "cp2 ep2": (2, {"cp": 2, "ep": 2}),
    "cp2 ep4": (4, {"cp": 2, "ep": 4}),
    "cp2 tp2 sp": (4, {"cp": 2, "tp": 2, "sp": True}),
    "cp2 tp2 sp etp1 ep4": (4, {"cp": 2, "tp": 2, "sp": True, "etp": 1, "ep": 4}),
    "cp2 pp2 ep2 zero": (4, {"cp": 2, "pp": 2, "ep": 2, "zero": True}),
    "cp2 pp2 vpp2": (4, {"cp": 2, "pp": 2, "vpp": 1}),
    "cp2 a2a ep2 zero": (4, {"cp": 2, "comm": "a2a", "ep": 2, "zero": True}),
    # Much at once, for the few trainings of the day.
    "pp2 uneven": (2, {"pp": 2, "stages": "Et|tttL"}),
    "tp2 pp2 vpp2 sp etp1": (4, {"tp": 2, "pp": 2, "vpp": 1, "sp": True, "etp": 1}),
    "pp2 ep2 replicated pool zero overlap": (
        4,
        {"pp": 2, "ep": 2, "pool": "replicated", "zero": True, "overlap": True, "bucket": 3000},
    ),
    "tp2 pp2 ep2 sp zero overlap": (8, {"tp": 2, "pp": 2, "ep": 2, "sp": True, "zero": True, "overlap": True}),
    "pp2 ep4": (8, {"pp": 2, "ep": 4}),
    "pp2 ep2 edp2 zero replicated pool": (8, {"pp": 2, "ep": 2, "zero": True, "pool": "replicated"}),
    "pp4 ep2": (8, {"pp": 4, "ep": 2}),
    "tp2 etp1 ep4 pp2 sp": (8, {"tp": 2, "etp": 1, "ep": 4, "pp": 2, "sp": True}),
    "cp2 tp2 pp2 sp ep2 zero": (8, {"cp": 2, "tp": 2, "pp": 2, "sp": True, "ep": 2, "zero": True}),
    "cp2 pp2 ep4 zero replicated pool": (8, {"cp": 2, "pp": 2, "ep": 4, "zero": True, "pool": "replicated"}),
    "cp4 ep2 dp2 zero": (8, {"cp": 4, "ep": 2, "zero": True}),
    "cp4 pp2 gpipe": (8, {"cp": 4, "pp": 2, "schedule": "gpipe"}),
    "cp2 a2a pp2 vpp2 ep4": (8, {"cp": 2, "comm": "a2a", "pp": 2, "vpp": 1, "ep": 4}),
}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"layout": "dense"},
    "moe": {"layout": "moe"},
    "samoe step": {"layout": "samoe", "samoe_combine": "step"},
    "samoe layer": {"layout": "samoe", "samoe_combine": "layer"},
    "moe top2 llama": {"layout": "moe", "style": "llama", "moe_router_topk": 2, "moe_z_loss_coeff": 0.01,
                       "qk_layernorm": True,
                       "moe_shared_expert_intermediate_size": 16},
    "samoe per expert": {"layout": "samoe", "style": "llama", "samoe_granularity": "expert", "samoe_init": "uniform",
                         "samoe_normalization": "softmax", "moe_router_topk": 2, "moe_layer_freq": "2"},
    "samoe many banks": {"layout": "samoe", "num_expert_banks": 3, "samoe_init": "uniform"},
    "samoe many banks per expert": {"layout": "samoe", "num_expert_banks": 5, "samoe_granularity": "expert",
                                    "samoe_init": "uniform", "samoe_normalization": "l2", "style": "llama"},
    "samoe noisy": {"layout": "samoe", "hidden_dropout": 0.1, "moe_input_jitter_eps": 0.05,
                    "moe_expert_capacity_factor": 1.0, "recompute_granularity": "full"},
    "moe sequence balance": {"layout": "moe", "moe_router_load_balancing_type": "seq_aux_loss",
                             "moe_router_topk": 2, "moe_router_score_function": "sigmoid",
                             "recompute_granularity": "selective"},
    "moe balance over ranks": {"layout": "moe", "moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_group_size": 4,
                               "micro_step": 4, "moe_router_topk": 2, "moe_aux_loss_coeff": 0.1,
                               "moe_router_init_method_std": 0.3, "moe_router_lr_mult": 0.5},
    "samoe balance over ranks": {"layout": "samoe", "moe_router_load_balancing_type": "aux_loss",
                                 "moe_aux_loss_group_size": 2, "micro_step": 4, "moe_aux_loss_coeff": 0.1,
                                 "moe_scale_output_init": False, "samoe_bank_lr_mult": 0.5, "moe_router_lr_mult": 2.0,
                                 "samoe_coefficient_lr_mult": 3.0, "recompute_granularity": "full"},
    # Four layers, so that with pp2 a set crosses the stages or stays on one.
    "tied": {"layout": "moe", "expert_sharing": "0,1,1,0", "moe_router_topk": 2, "samoe_bank_lr_mult": 0.5},
    "tied middle llama": {"layout": "moe", "style": "llama", "expert_sharing": "tied", "untied_ends": 1,
                          "moe_router_topk": 2, "recompute_granularity": "full"},
    "tied pyramid": {"layout": "moe", "expert_sharing": "0,0,1,1", "num_experts": (4, 4, 8, 8), "moe_router_topk": 2},
    "scaled": {"layout": "moe", "expert_sharing": "scaled:0,1,1,0", "moe_router_topk": 2},
    "scaled layer by layer": {"layout": "moe", "expert_sharing": "scaled", "num_expert_sets": 2, "samoe_combine": "layer",
                              "samoe_coefficient_lr_mult": 3.0},
    "combined middle": {"layout": "samoe", "untied_ends": 1, "samoe_init": "uniform"},
    "mixed": {"layout": "moe", "expert_sharing": "combined,0,combined,0", "moe_layer_freq": "1", "style": "llama"},
    "pool": {"layout": "moe", "expert_sharing": "pool", "num_experts": 8, "moe_router_topk": 2, "moe_aux_loss_coeff": 0.5,
             "moe_router_score_function": "norm"},
    "neighbours": {"layout": "moe", "expert_sharing": "neighbours", "moe_router_topk": 2, "neighbour_unmask_steps": 4,
                   "moe_router_init_method_std": 0.3},
    "pool locked": {"layout": "moe", "expert_sharing": "pool", "num_experts": 16, "moe_router_topk": 2,
                    "moe_router_score_function": "norm", "pool_lock_step": 2, "pool_lock_anneal_steps": 2},
    "relu": {"layout": "moe", "moe_router_topk": 2, "moe_router_score_function": "relu", "num_experts": 8, "moe_aux_loss_coeff": 0.1},
    "expert choice": {"layout": "moe", "moe_router_topk": 2, "moe_router_expert_choice": True,
                      "moe_router_load_balancing_type": "none"},
    "pyramid residual": {"layout": "moe", "num_experts": (4, 4, 8, 8), "moe_residual_mlp": True, "moe_router_topk": 1},
    "gate": {"layout": "moe", "style": "llama", "moe_router_topk": 2, "moe_shared_expert_intermediate_size": 16,
             "moe_shared_expert_gate": True, "init_method_std": 0.2},
    "sets balanced": {"layout": "moe", "style": "llama", "expert_sharing": "own,0,0,0", "moe_router_topk": 2,
                      "moe_balance_scope": "set", "moe_aux_loss_coeff": 0.5, "recompute_granularity": "full",
                      "moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 0.05, "moe_z_loss_coeff": 0.01},
    "groups and biases": {"layout": "moe", "style": "llama", "num_experts": 8, "moe_router_topk": 2,
                          "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True,
                          "moe_router_bias_update_rate": 0.05, "moe_router_num_groups": 4, "moe_router_group_topk": 2,
                          "moe_router_topk_scaling_factor": 2.5},
    # Attention and what else layers may have.
    "window": {"layout": "dense", **LLAMA, "sliding_window": 5, "window_attn_skip_freq": 2},
    "sinks and cap": {"layout": "moe", **LLAMA, "moe_router_topk": 2, "softmax_type": "learnable", "attn_logit_softcapping": 2.0},
    "olmoe": {"layout": "moe", **LLAMA, "moe_router_topk": 2, "qk_layernorm": True, "qk_layernorm_scope": "all", "clip_qkv": 0.5},
    "granite": {"layout": "moe", **LLAMA, "moe_router_topk": 2, "attention_multiplier": 0.1, "embedding_multiplier": 6.0,
                "residual_multiplier": 0.3, "logits_scaling": 2.5, "attention_bias": True, "softmax_type": "off-by-one"},
    "neox": {"layout": "moe", "init_method_std": 0.2, "position_embedding_type": "rope", "rotary_percent": 0.5,
             "moe_layer_freq": "0101", "use_parallel_residual": True, "exact_gelu": True, "attention_bias": False,
             "hidden_dropout": 0.1},
    "all of attention": {"layout": "samoe", **LLAMA, "sliding_window": 6, "softmax_type": "learnable",
                         "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5, "qk_layernorm": True,
                         "qk_layernorm_scope": "all", "rope_scaling_type": "yarn", "rope_scaling_factor": 4.0,
                         "rope_original_max_positions": 8, "recompute_granularity": "selective"},
    "latent": {"layout": "moe", **LLAMA, **LATENT, "q_lora_rank": 12, "sliding_window": 7, "softmax_type": "learnable", **MUON},
    "latent plain": {"layout": "samoe", **LLAMA, **LATENT},
    "off by one": {"layout": "dense", "softmax_type": "off-by-one", "sliding_window": 3, **MUON},
    # Muon, whose directions are those of whole matrices. Stages meet the rates of w1 and w2 in another order.
    "muon dense": {"layout": "dense", "style": "llama", "muon_extra_scale_factor": 0.5, **MUON},
    "muon moe": {"layout": "moe", "moe_router_topk": 2, "lr_mult_patterns": (r"layers\.[01]\.=0.5", "^embedding=0"), **MUON},
    "muon samoe": {"layout": "samoe", "style": "llama", "moe_shared_expert_intermediate_size": 16, **MUON},
    "muon rates by layer": {"layout": "samoe", "style": "llama", "moe_output_lr_mult": 0.5,
                            "lr_mult_patterns": (r"layers\.[01]\.=0.5",), **MUON},
    "muon tied": {"layout": "moe", "expert_sharing": "0,1,1,0", "moe_router_topk": 2, "samoe_bank_lr_mult": 0.5, **MUON},
}  # fmt: skip


def train(
    config: PretrainConfig, dtype: torch.dtype = torch.float32, steps: int = 5, device: torch.device | str = "cpu",
    exchange: Literal["torch", "extension"] = "torch", extensions: Extensions | None = None,
) -> dict[str, Any]:  # fmt: skip
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
    groups = {"ep": parallel.ep, **({"pool_dp": parallel.pool_dp} if parallel.device.type == "cpu" else {})}
    parallel = replace(
        parallel, **{name: with_exchange(g, parallel.device, backend=exchange) for name, g in groups.items()}
    )
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
    return {
        "losses": losses, "norms": norms, "balance": balance, "divergences": divergences, "gradients": gradients,
        "expert_norms": expert_norms, "weights": weights,
        "rates": {n: g.lr_mult * rates for g in build_param_groups(weights, config.optimizer) for n in g.names},
    }  # fmt: skip


def train_each(configs: list[PretrainConfig], dtype: torch.dtype, steps: int) -> list[dict[str, Any]] | None:
    """Trains one model after the other on the same processes, two steps more where a schedule of routing ends by then; the
    first rank has the results.

    Ranks call it here: a module of tests would make its cases anew in each of them.
    """
    scheduled = [c.moe.pool_lock_step is not None or bool(c.moe.neighbour_unmask_steps) for c in configs]
    results = [train(c, dtype, 5 if more else steps) for c, more in zip(configs, scheduled, strict=True)]
    return results if not dist.is_initialized() or dist.get_rank() == 0 else None


def _close_groups(parallel: ParallelState, channel: PipelineChannel | None) -> None:
    """Ends the groups that training opened: each keeps threads, and processes that train many models would crawl."""
    if not dist.is_initialized():
        return
    dist.barrier()
    handles = {getattr(parallel, name).handle for name in GROUPS} | set(channel.groups.values() if channel else ())
    for handle in handles - {None, dist.group.WORLD}:
        dist.destroy_process_group(handle)


def layout_config(layout: str, model: str) -> PretrainConfig:
    """Returns the configuration of a model of MODELS in a layout of LAYOUTS."""
    return options_in(layout, MODELS[model])


def options_in(layout: str, options: Mapping[str, Any]) -> PretrainConfig:
    """Returns the configuration of a model's options in a layout of LAYOUTS."""
    num_ranks, given = LAYOUTS[layout]
    sizes, options = dict(given), dict(options)
    if options["layout"] == "dense":
        sizes = {axis: size for axis, size in sizes.items() if axis not in ("ep", "etp")}
    pool = sizes.pop("pool", "sharded")
    # Groups of sequences that lie on several ranks need as many sequences at once in every layout.
    micro_step = options.pop("micro_step", None)
    model_size = sizes.get("tp", 1) * sizes.get("cp", 1) * sizes.get("pp", 1)
    if micro_step is not None:
        options["micro_batch_size"] = micro_step * model_size // num_ranks
    elif "pp" not in sizes and model_size == num_ranks:
        options["micro_batch_size"] = 4  # two micro-batches add up as four do, at half the messages
    config = tiny_config(**options)
    if config.moe.shares_experts:
        config = with_options(config, samoe_pool_placement=pool)
    return with_layout(config, **sizes)


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
    for key in ("losses", "norms", "balance", "divergences"):
        found, wanted = torch.tensor(actual[key]), torch.tensor(expected[key])
        torch.testing.assert_close(found, wanted, rtol=rtol, atol=0.0, msg=lambda m, k=key: f"{k}: {m}")
    torch.testing.assert_close(actual["expert_norms"], expected["expert_norms"], rtol=10 * rtol, atol=0.0)
    assert actual["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        # A number, or the bias of a norm of keys, which has no gradient but rounding, sums terms as large as its module's other
        # gradients, by which its rounding is measured.
        module = name.rpartition(".")[0] + "."
        measured_by = (
            [gradient] if gradient.dim() > 1 else [g for n, g in expected["gradients"].items() if n.startswith(module)]
        )
        scale = max(g.abs().max().item() for g in measured_by)
        torch.testing.assert_close(
            actual["gradients"][name], gradient, rtol=rtol, atol=rtol * scale,
            msg=lambda m, n=name: f"gradient of {n}: {m}",
        )  # fmt: skip
    assert expected["weights"].keys() == actual["weights"].keys()
    for name, weight in expected["weights"].items():
        is_double = weight.dtype == torch.float64
        torch.testing.assert_close(
            actual["weights"][name], weight, rtol=1e-9 if is_double else 2.0**-22,
            atol=1e-11 if is_double else 1e-3 * expected["rates"].get(name, 0.0),
            msg=lambda m, n=name: f"weight {n}: {m}",
        )  # fmt: skip
