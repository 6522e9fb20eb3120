"""Experts that the MoE layers of a Megatron-Core model share.

The way of sharing and its lender are those of `moe/sharing`. Router, dispatcher, data parallelism, optimizer, schedule and
checkpoints are Megatron-Core's, which learns by its own marks what a shared parameter is:

    allreduce        False: reduced over expert-data-parallel ranks, where experts are split over ranks
    shared           on stages but the first: counted once in norms
    shared_embedding a bucket of its own, which all stages lay out in the same way for the distributed optimizer
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn

from megatron_samoe.config.sharing_map import parse_sharing
from megatron_samoe.config.words import in_python_words
from megatron_samoe.errors import ConfigError
from megatron_samoe.models.initialize import initialize_parameters
from megatron_samoe.models.rank_model import stored_name
from megatron_samoe.moe.candidates import CandidateSchedule, candidate_schedule
from megatron_samoe.moe.experts import ExpertShape
from megatron_samoe.moe.sharing.mapped import MappedSharing
from megatron_samoe.moe.sharing.way import ExpertLender, SharingContext
from megatron_samoe.moe.types import Experts
from megatron_samoe.ops.grouped_mlp import Activation
from megatron_samoe.parallel_state.parameter_tag import tag_of
from megatron_samoe.plugins.megatron_core.candidates import CandidateRouter, global_counts, reorder, steps_done
from megatron_samoe.plugins.megatron_core.experts import LentExperts, SharedExperts, sharded_tensor
from megatron_samoe.plugins.megatron_core.options import OF_MODEL, OF_SCHEDULE, refuse, sharing_options
from megatron_samoe.plugins.megatron_core.rank_layout import is_moe_layer, layers_of_stage, rank_state


class ExpertSharing:
    """Shares experts between the MoE layers of one model.

        sharing = ExpertSharing(config, "combined", num_expert_banks=2)
        model = sharing.attach(GPTModel(config, sharing.spec(get_gpt_layer_local_spec(...)), ...))
        config.finalize_model_grads_func = sharing.finalize_model_grads

    Make it after Megatron-Core's groups, before the model. With virtual pipeline stages one is for all chunks: attach each.

    Args:
        config: Megatron-Core's TransformerConfig.
        expert_sharing: as --expert-sharing; of neighbours, num_moe_experts are those of a whole block.
        seed: of the first values of experts and coefficients.
        options: of `MoEConfig`, such as num_expert_banks, num_expert_sets, samoe_combine and pool_lock_step.

    Raises:
        ConfigError: an option of the model does not go with shared experts, or the layers cannot share so.
    """

    @in_python_words()
    def __init__(self, config: Any, expert_sharing: str, seed: int = 1234, **options: Any):
        refuse(config, OF_MODEL)
        is_moe = is_moe_layer(config)
        self.config, self.seed, self.state = config, seed, rank_state(config)
        #: Indices among MoE layers, by layer from 0.
        self._moe_index = {layer: sum(is_moe[:layer]) for layer, is_one in enumerate(is_moe) if is_one}
        moe = sharing_options(config, expert_sharing, options, len(self._moe_index))
        if moe.samoe_granularity == "expert" and self.state.etp.size > 1:
            raise ConfigError("samoe_granularity", "expert", "must be layer with expert_tensor_parallel_size above 1")
        sources = parse_sharing(
            expert_sharing, len(self._moe_index), moe.num_expert_sets, moe.untied_ends, moe.num_neighbour_layers
        )
        shape = ExpertShape(
            config.num_moe_experts,
            config.hidden_size,
            config.moe_ffn_hidden_size or config.ffn_hidden_size,
            _activation(config),
            bias=False,
            init_std=config.init_method_std,
            output_init_std=config.init_method_std / (2 * config.num_layers) ** 0.5,
        )
        stages = tuple(
            tuple(self._moe_index[i] for i in layers if i in self._moe_index) for layers in layers_of_stage(config)
        )
        shapes = (shape,) * len(self._moe_index)
        self._way = MappedSharing(SharingContext(moe, sources, shapes, stages, self.state, config.params_dtype))
        self._parts: dict[int, nn.Module] = {}
        self._shared: SharedExperts | None = None
        self._is_current = False
        self._chunks: list[Any] = []
        self._schedule = candidate_schedule(moe)
        self._moves_experts = moe.pool_lock_step is not None
        self._routers: dict[int, CandidateRouter] = {}
        self._optimizer: Any = None

    def spec(self, spec: Any) -> Any:
        """Returns a copy of a layer's or a block's spec whose MoE layers borrow their experts.

        Raises:
            ConfigError: it has a router of its own where candidates change.
        """
        spec = copy.deepcopy(spec)
        for layer in getattr(spec, "layer_specs", None) or [spec]:
            mlp: Any = getattr(layer.submodules, "mlp", None)
            # From 0.17 on a partial of the layer, before that a spec of it.
            is_partial = isinstance(mlp, functools.partial)
            if (mlp.func if is_partial else getattr(mlp, "module", None)) is not MoELayer:
                continue
            submodules = mlp.keywords["submodules"] if is_partial else mlp.submodules
            lent = functools.partial(LentExperts, sharing=self)
            submodules.experts = lent if is_partial else ModuleSpec(module=LentExperts, params={"sharing": self})
            if self._schedule is not None:
                if submodules.router not in (TopKRouter, CandidateRouter):
                    raise ConfigError("router", submodules.router, "must be TopKRouter, where candidates change")
                submodules.router = CandidateRouter
        return spec

    def attach(self, model: nn.Module) -> nn.Module:
        """Gives a model, or one chunk of it, what its layers own and share, before DistributedDataParallel takes it.

        Raises:
            ConfigError: its layers were not built by `spec`, or have experts elsewhere than the config says.
        """
        layers = [module for module in model.modules() if isinstance(module, MoELayer)]
        if not all(isinstance(layer.experts, LentExperts) for layer in layers):
            raise ConfigError(
                "model", type(model).__name__, "has MoE layers that do not borrow: build it by ExpertSharing.spec"
            )
        held = {m.layer_number - 1 for m in model.modules() if isinstance(m, TransformerLayer)}
        found = {layer.layer_number - 1 for layer in layers}
        if wrong := found.symmetric_difference(held.intersection(self._moe_index)):
            raise ConfigError(
                "spec",
                f"layer {min(wrong)}",
                "must have experts where the config's num_moe_experts and moe_layer_freq say so",
            )
        named: dict[str, nn.Parameter] = {}
        for layer in layers:
            number = layer.layer_number - 1
            experts = layer.experts
            experts.moe_index = self._moe_index[number]
            experts.part = self._parts[experts.moe_index] = self._way.layer_part(experts.moe_index)
            if hasattr(experts.part, "uses_main_grads"):
                experts.part.uses_main_grads = False  # Megatron-Core's hooks want gradients from autograd
            named |= {f"layers.{number}.moe.experts.{n}": p for n, p in experts.part.named_parameters()}
            if self._schedule is not None:
                self._routers[experts.moe_index] = layer.router
                layer.router.candidates.copy_(self._schedule.start(experts.moe_index, layer.router.num_experts))
        if self._shared is None and (part := self._way.shared_part()) is not None:
            self._shared = SharedExperts(self.config, self, part)
            model.add_module("expert_pool", self._shared)
            named |= {f"expert_pool.{n}": p for n, p in part.named_parameters()}
        initialize_parameters({stored_name(n): p for n, p in named.items()}, self.state, self.seed)
        for parameter in named.values():
            self._mark(parameter)
        return model

    def _mark(self, parameter: nn.Parameter) -> None:
        """Tells Megatron-Core how a parameter is split and who holds copies of it."""
        marks: Any = parameter
        spec = tag_of(parameter).shard
        # Of experts, or of coefficients of each expert.
        by_expert = "ep" in [axis for _, axis in spec.partition]
        marks.allreduce = not (by_expert and self.state.edp.size != self.state.dp_cp.size)
        # Tensor-parallel ranks have experts of their own, or their own part of each: all count in norms.
        marks.tensor_model_parallel = by_expert
        marks.partition_dim, marks.partition_stride = -1, 1
        # A coefficient's gradient is a sum over tensor-parallel ranks, which have other experts or other parts of them;
        # of an expert's own coefficient they are not copies.
        is_copy = spec.partial and marks.allreduce and not by_expert
        marks.sequence_parallel = bool(self.config.sequence_parallel and is_copy)
        if spec.family == "pool" and self.state.pp.size > 1:
            marks.shared, marks.shared_embedding = self.state.pp.rank > 0, True

    def follow(self, optimizer: Any) -> None:
        """Takes Megatron-Core's optimizer, whose rows the lock of a pool moves with their experts; pool_lock_step needs it."""
        if optimizer.config.optimizer != "adam" or getattr(optimizer.config, "use_precision_aware_optimizer", False):
            raise ConfigError(
                "optimizer", optimizer.config.optimizer, "must be adam, not aware of precision, with pool_lock_step"
            )
        self._optimizer = optimizer

    @functools.cached_property
    def _lender(self) -> ExpertLender:
        """Made at its first use, when all chunks are attached."""
        return self._way.lender(self._parts, None if self._shared is None else self._shared.part)

    def experts(self, moe_index: int) -> Experts:
        """Returns the experts of a layer, by the weights that the optimizer has last written.

        Raises:
            ConfigError: its model was not attached.
        """
        if moe_index not in self._parts:
            raise ConfigError("model", "its layers", "must be given to ExpertSharing.attach after they are built")
        if not self._is_current:
            self._wait_for_weights()
            self._lender.begin_step()
            self._is_current = True
        return self._lender.experts(moe_index)

    def forget(self) -> None:
        """Lets weights be combined anew, since they have changed."""
        self._is_current = False

    def finalize_model_grads(self, model: list[nn.Module], *args: Any, **kwargs: Any) -> None:
        """Completes gradients of what is shared, and calls Megatron-Core's function; give it as finalize_model_grads_func.

        Raises:
            ConfigError: gradients are sent before they are complete, or a lock has no optimizer to follow.
        """
        if not isinstance(model[0], DistributedDataParallel):
            raise ConfigError(
                "model", type(model[0]).__name__, "must be wrapped in Megatron-Core's DistributedDataParallel"
            )
        refuse(self.config, OF_SCHEDULE)
        if self._moves_experts and self._optimizer is None:
            raise ConfigError(
                "pool_lock_step", "given", "moves rows of the optimizer's state: call ExpertSharing.follow(optimizer)"
            )
        lent = [module for chunk in model for module in chunk.modules() if isinstance(module, LentExperts)]
        if not self._chunks and {one.moe_index for one in lent} != set(self._parts):
            raise ConfigError(
                "model", f"{len(model)} chunks", "must be attached to one ExpertSharing, which their config calls"
            )
        self._lender.finish_step()
        self._chunks = model
        self._wait_for_weights()  # that were on their way in the first step, before the chunks were known
        for chunk, parameter in self._held():
            # Overlapped data parallelism sends a bucket once each of its parameters was announced as often as in the first
            # step. Autograd announces some of these, each time that a layer has used them; this is the last time.
            if chunk.ddp_config.overlap_grad_reduce:
                chunk.param_to_bucket_group[parameter].register_grad_ready(parameter, chunk.force_all_reduce)
        finalize_model_grads(model, *args, **kwargs)
        for parameter in self._on_several_stages():
            stages = parallel_state.get_pipeline_model_parallel_group()
            torch.distributed.all_reduce(parameter.main_grad, group=stages)
        if self._schedule is not None:
            self._change_candidates(self._schedule)
        self.forget()

    @torch.no_grad()
    def _change_candidates(self, schedule: CandidateSchedule) -> None:
        """Opens or closes experts for the next step; where a lock decides, experts move together with their gradients."""
        like = torch.zeros(self.config.num_moe_experts, device=self.state.device)
        iteration = steps_done(self._routers.values(), like)
        counts_LE = global_counts(self._routers, len(self._moe_index), like) if self._moves_experts else like
        factors_E = {moe_index: router.candidates for moe_index, router in self._routers.items()}
        order_E = schedule.update(factors_E, counts_LE, iteration, self.state)
        if order_E is None:
            return
        order_E = order_E.to(like.device)
        for parameter in () if self._shared is None else self._shared.parameters():
            dim = next(dim for dim, axis in tag_of(parameter).shard.partition if axis == "ep")
            reorder(self._optimizer, parameter, dim, order_E, is_split=self.state.ep.size > 1)
        for router in self._routers.values():
            reorder(self._optimizer, router.weight, 0, order_E, is_split=False)
            router.candidates.copy_(router.candidates[order_E])

    def _held(self) -> Iterator[tuple[Any, nn.Parameter]]:
        """Yields what layers own and share, each with the chunk that reduces its gradient."""
        for part in (*self._parts.values(), *(() if self._shared is None else (self._shared,))):
            for parameter in part.parameters():
                yield from ((chunk, parameter) for chunk in self._chunks if parameter in chunk.param_to_bucket_group)

    def _wait_for_weights(self) -> None:
        """Waits for weights that the distributed optimizer gathers while the model runs."""
        for chunk, parameter in self._held():
            if chunk.ddp_config.overlap_param_gather:
                chunk.param_to_bucket_group[parameter].finish_param_sync(skip_next_bucket_dispatch=True)

    def _on_several_stages(self) -> Iterator[Any]:
        for parameter in () if self._shared is None else self._shared.parameters():
            if getattr(parameter, "shared_embedding", False):
                yield parameter

    def sharded(self, part: nn.Module, prefix: str, label: str = "") -> dict[str, Any]:
        """Returns a part's parameters as Megatron-Core's checkpoints take them, under names with a label."""
        named = dict(part.named_parameters())
        return {f"{prefix}part.{n}": sharded_tensor(f"{prefix}{label}{n}", p, self.state) for n, p in named.items()}


def _activation(config: Any) -> Activation:
    function, gated = config.activation_func, config.gated_linear_unit
    if gated and function is torch.nn.functional.silu:
        return "swiglu"
    if not gated and function is torch.nn.functional.gelu:
        return "gelu_exact"
    raise ConfigError(
        "activation_func", getattr(function, "__name__", function), "must be gated SiLU, or GELU without gates"
    )
