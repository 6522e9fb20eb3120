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
from megatron.core.distributed import finalize_model_grads
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import nn

from megatron_samoe.config.moe import MoEConfig
from megatron_samoe.config.sharing_map import parse_sharing, word_of
from megatron_samoe.errors import ConfigError
from megatron_samoe.models.initialize import initialize_parameters
from megatron_samoe.models.rank_model import stored_name
from megatron_samoe.moe.experts import ExpertShape
from megatron_samoe.moe.sharing.mapped import MappedSharing
from megatron_samoe.moe.sharing.way import ExpertLender, SharingContext
from megatron_samoe.moe.types import Experts
from megatron_samoe.ops.grouped_mlp import Activation
from megatron_samoe.parallel_state.parameter_tag import tag_of
from megatron_samoe.plugins.megatron_core.experts import LentExperts, SharedExperts, sharded_tensor
from megatron_samoe.plugins.megatron_core.rank_layout import is_moe_layer, layers_of_stage, rank_state
from megatron_samoe.plugins.megatron_core.refusals import OF_DDP, OF_MODEL, refuse


class ExpertSharing:
    """Shares experts between the MoE layers of one model.

        sharing = ExpertSharing(config, "combined", num_expert_banks=2)
        model = sharing.attach(GPTModel(config, sharing.spec(get_gpt_layer_local_spec(...)), ...))
        config.finalize_model_grads_func = sharing.finalize_model_grads

    Make it after Megatron-Core's groups, before the model. With virtual pipeline stages attach each chunk.

    Args:
        config: Megatron-Core's TransformerConfig.
        expert_sharing: as --expert-sharing: own, combined, tied, scaled, a map, or a way from outside the package.
        seed: of the first values of experts and coefficients.
        options: of `MoEConfig`, such as num_expert_banks, num_expert_sets, samoe_combine and samoe_normalization.

    Raises:
        ConfigError: an option of the model meets shared experts wrongly, or the layers cannot share so.
    """

    def __init__(self, config: Any, expert_sharing: str, seed: int = 1234, **options: Any):
        refuse(config, OF_MODEL)
        is_moe = is_moe_layer(config)
        self.config, self.seed, self.state = config, seed, rank_state(config)
        moe = MoEConfig(
            expert_layout="moe",
            expert_sharing=expert_sharing,
            num_experts=config.num_moe_experts,
            samoe_pool_placement="replicated",
            **options,
        )
        word = word_of(expert_sharing)
        if word is not None and word.options & {"pool_lock_step", "neighbour_unmask_steps"}:
            raise ConfigError(
                "expert_sharing", expert_sharing, "needs a router that Megatron-Core lacks; tied shares sets"
            )
        if moe.samoe_granularity == "expert" and self.state.etp.size > 1:
            raise ConfigError("samoe_granularity", "expert", "must be layer with expert_tensor_parallel_size above 1")
        #: Indices among MoE layers, by layer from 0.
        self._moe_index = {layer: sum(is_moe[:layer]) for layer, is_one in enumerate(is_moe) if is_one}
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
        self._lender: ExpertLender | None = None
        self._is_current = False

    def spec(self, spec: Any) -> Any:
        """Returns a copy of a layer's or a block's spec whose MoE layers borrow their experts.

        Raises:
            ConfigError: it has no MoE layer.
        """
        spec, found = copy.deepcopy(spec), 0
        for layer in getattr(spec, "layer_specs", None) or [spec]:
            mlp: Any = getattr(layer.submodules, "mlp", None)
            # From 0.17 on a partial of the layer, before that a spec of it.
            is_partial = isinstance(mlp, functools.partial)
            if (mlp.func if is_partial else getattr(mlp, "module", None)) is not MoELayer:
                continue
            submodules = mlp.keywords["submodules"] if is_partial else mlp.submodules
            lent = functools.partial(LentExperts, sharing=self)
            submodules.experts = lent if is_partial else ModuleSpec(module=LentExperts, params={"sharing": self})
            found += 1
        if not found:
            raise ConfigError(
                "spec", type(spec).__name__, "has no MoE layer: give num_experts to the function that makes it"
            )
        return spec

    def attach(self, model: nn.Module) -> nn.Module:
        """Gives a model, or one chunk of it, what its layers own and share, before DistributedDataParallel takes it.

        Raises:
            ConfigError: its layers were not built by `spec`.
        """
        layers = [module for module in model.modules() if isinstance(module, MoELayer)]
        if not all(isinstance(layer.experts, LentExperts) for layer in layers):
            raise ConfigError(
                "model", type(model).__name__, "has MoE layers that do not borrow: build it by ExpertSharing.spec"
            )
        named: dict[str, nn.Parameter] = {}
        for layer in layers:
            number = layer.layer_number - 1
            experts = layer.experts
            experts.moe_index = self._moe_index[number]
            experts.part = self._parts[experts.moe_index] = self._way.layer_part(experts.moe_index)
            named |= {f"layers.{number}.moe.experts.{n}": p for n, p in experts.part.named_parameters()}
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
        # A coefficient's gradient is a sum over tensor-parallel ranks, which have other experts or other parts of them.
        marks.sequence_parallel = bool(self.config.sequence_parallel and spec.partial and marks.allreduce)
        if spec.family == "pool" and self.state.pp.size > 1:
            marks.shared, marks.shared_embedding = self.state.pp.rank > 0, True

    def experts(self, moe_index: int) -> Experts:
        """Returns the experts of a layer, by the weights that the optimizer has last written."""
        if self._lender is None:
            self._lender = self._way.lender(self._parts, None if self._shared is None else self._shared.part)
        if not self._is_current:
            self._lender.begin_step()
            self._is_current = True
        return self._lender.experts(moe_index)

    def forget(self) -> None:
        """Lets weights be combined anew, since they have changed."""
        self._is_current = False

    def finalize_model_grads(self, model: list[nn.Module], *args: Any, **kwargs: Any) -> None:
        """Completes gradients of what is shared, and calls Megatron-Core's function; give it as finalize_model_grads_func.

        Raises:
            ConfigError: data parallelism sends gradients before they are complete.
        """
        refuse(getattr(model[0], "ddp_config", None), OF_DDP)
        if self._lender is None:
            raise ConfigError(
                "model", type(model[0]).__name__, "has not used its shared experts: call ExpertSharing.attach"
            )
        self._lender.finish_step()
        finalize_model_grads(model, *args, **kwargs)
        for parameter in self._on_several_stages():
            stages = parallel_state.get_pipeline_model_parallel_group()
            torch.distributed.all_reduce(parameter.main_grad, group=stages)
        self.forget()

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
