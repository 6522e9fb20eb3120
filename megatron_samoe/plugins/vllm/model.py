"""Our model in vLLM: its Transformers back end, with experts that are folded or selected while the weights are loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_samoe.convert.hf.remote_code.configuration_samoe import SamoeConfig
from megatron_samoe.convert.hf.remote_code.moe_samoe import Experts, MoE, experts_name
from megatron_samoe.errors import ConfigError
from megatron_samoe.plugins.vllm.experts_plan import (
    SELECTED,
    ExpertsPlan,
    Selection,
    folder_reader,
    kind_of_bank,
    plan_experts,
    without_combining,
)
from megatron_samoe.plugins.vllm.interface import vllm_interface
from megatron_samoe.plugins.vllm.plain_experts import PlainExperts

vllm = vllm_interface()
#: What vLLM's kernels for CPUs demand of the hidden size.
_CPU_MULTIPLE = 32


class SelectedExperts(nn.Module):
    """A layer's view of the set that layers share: its ids are indices in it, its factors those of input and weights.

    Args:
        experts: the set, which this module does not own: its weights are loaded once.
    """

    places_E: Tensor

    def __init__(self, experts: nn.Module, selection: Selection):
        super().__init__()
        self._experts, self._factors = [experts], selection.factors
        self.register_buffer("places_E", torch.tensor(selection.places), persistent=False)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Returns y_TH of x_TH, ids_TK and weights_TK."""
        (experts,), (first, second) = self._experts, self._factors
        ids_TK, weights_TK = self.places_E[top_k_index], top_k_weights * second
        y_TH: Tensor
        if isinstance(experts, PlainExperts):
            scale = None if first == 1.0 else hidden_states.new_tensor(first)
            y_TH = experts(hidden_states, ids_TK, weights_TK, scale)
        else:
            y_TH = experts(hidden_states if first == 1.0 else hidden_states * first, ids_TK, weights_TK)
        return y_TH


class SamoeForVLLM(vllm.TransformersForCausalLM):  # type: ignore[name-defined, misc]
    """The class that vLLM loads for SamoeForCausalLM.

    Raises:
        ConfigError: pipeline or data parallelism, or experts in plain torch in a captured CUDA graph.
        CheckpointError: a folder of an older version.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        allowed = "is not supported for SamoeForCausalLM; --tensor-parallel-size is"
        for name in ("pipeline_parallel_size", "data_parallel_size"):
            if (size := getattr(parallel, name)) > 1:
                raise ConfigError(f"--{name.replace('_', '-')}", size, allowed)
        # With trust_remote_code it may be the folder's own class, of whatever version.
        given = model.hf_config.to_dict()
        config = SamoeConfig(**{name: given[name] for name in given.keys() - {"auto_map", "model_type"}})
        if parallel.tensor_parallel_size > 1 and config.has_whole_attention:
            raise ConfigError(
                "--tensor-parallel-size",
                parallel.tensor_parallel_size,
                "must be 1: this model's queries, or their norms, are of all heads together",
            )
        self.samoe_plan = plan_experts(config, folder_reader(_folder(model)))
        model.hf_config = model.hf_text_config = without_combining(config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def recursive_replace(self) -> None:
        """Replaces our experts by vLLM's, one module for each set, then its other layers."""
        plan: ExpertsPlan = self.samoe_plan
        name = experts_name(self.config)
        shared = None
        if plan.entries:
            with torch.device("meta"):
                experts = Experts(self.config, len(plan.entries))
            shared = self._replaced(experts, f"{SELECTED}{name}")
            self.selected = nn.Module()
            self.selected.add_module(name, shared)
            self.init_parameters(self.selected)
        for index, layer in enumerate(self.model.layers):
            moe = layer.mlp
            if isinstance(moe, MoE) and moe.source.bank is None:
                if (selection := plan.selections.get(index)) is not None:
                    assert shared is not None
                    setattr(moe, name, SelectedExperts(shared, selection))
                else:
                    setattr(moe, name, self._replaced(getattr(moe, name), f"model.layers.{index}.mlp.{name}"))
        pool = self.model.expert_pool
        for number, holder in () if pool is None else pool.sets.items():
            setattr(holder, name, self._replaced(getattr(holder, name), f"model.expert_pool.sets.{number}.{name}"))
        super().recursive_replace()

    def _replaced(self, experts: Experts, prefix: str) -> nn.Module:
        """Returns experts as vLLM computes them, or in plain torch where it would compute something else."""
        config, on_cpu = self.config, vllm.current_platform.is_cpu()
        is_known = experts.gated and not experts.has_bias
        if not is_known or (on_cpu and config.hidden_size % _CPU_MULTIPLE):
            if not on_cpu and not self.model_config.enforce_eager:
                why = "experts with GELU or biases run in plain torch, which a CUDA graph cannot hold: give --enforce-eager"
                raise ConfigError("--enforce-eager", False, why)
            return PlainExperts(experts)
        is_relu = config.router_score_function == "relu"
        state = vllm.TransformersMoEState()
        made: nn.Module = vllm.FusedMoEFactory(
            num_experts=experts.num_experts,
            top_k=experts.num_experts if is_relu else config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            renormalize=False,
            quant_config=self.quant_config,
            prefix=prefix,
            activation="silu",
            custom_routing_function=partial(_our_routing, state=state),
            runner_cls=vllm.TransformersMoERunner,
            runner_args={"moe_state": state},
            routed_experts_cls=vllm.TransformersRoutedExperts,
        )
        return made

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Loads a folder's tensors; banks become experts on the way."""
        loaded: set[str] = super().load_weights(self._without_banks(weights))
        return loaded

    def _without_banks(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        plan: ExpertsPlan = self.samoe_plan
        combinations = {f"model.layers.{layer}.mlp.combination" for layer in plan.coefficients}
        for name, tensor in weights:
            if (kind := kind_of_bank(name)) is not None:
                experts = experts_name(self.config)
                yield from plan.weights(kind, tensor, experts, self.model_config.dtype)
            elif name not in combinations:
                yield name, tensor


def _our_routing(
    hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool, state: Any
) -> tuple[Tensor, Tensor]:
    """Returns weights and ids as our router has chosen them: the runner is given the first, not logits."""
    return gating_output, state.topk_ids


def _folder(model: Any) -> Path:
    """Returns where a model's files are, from the hub where it is not a folder."""
    if Path(model.model).is_dir():
        return Path(model.model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model.model, revision=model.revision, allow_patterns=["*.safetensors", "*.json"]))
