"""Expert weights: their shapes and sharding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from megatron_samoe.ops.grouped_mlp import Activation, ExpertWeights
from megatron_samoe.parallel_state.parameter_tag import ZEROS, Init, ParameterTag
from megatron_samoe.parallel_state.shard_spec import ShardSpec
from megatron_samoe.parallel_state.state import ParallelState
from megatron_samoe.tensor_parallel.layers import new_parameter


@dataclass(frozen=True)
class ExpertShape:
    """Global sizes of the routed experts of one layer, or of one bank of the pool, and how wide they begin.

    Attributes:
        init_std, output_init_std: spread of the first values of w1 and w2.
    """

    num_experts: int
    hidden_size: int
    ffn_size: int
    activation: Activation
    bias: bool
    init_std: float = 0.02
    output_init_std: float = 0.02

    @property
    def matrix_elements(self) -> int:
        """Elements of one expert's two matrices."""
        return (3 if self.activation == "swiglu" else 2) * self.ffn_size * self.hidden_size

    @property
    def matrix_rows(self) -> int:
        """Rows of one expert's two matrices, each of which has a scale of its own in int8."""
        return (2 if self.activation == "swiglu" else 1) * self.ffn_size + self.hidden_size

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert."""
        return self.matrix_elements + (self.matrix_rows if self.bias else 0)

    def parameters(
        self, num_banks: int | None, state: ParallelState, dtype: torch.dtype, on_one_stage: bool = False
    ) -> dict[str, nn.Parameter]:
        """Returns w1, w2 and maybe b1, b2: experts split over ep, F over etp; a leading dim for banks that layers share.

        Args:
            on_one_stage: whether only layers of this pipeline stage use the banks; else all stages hold them.
        """
        E, H, F = self.num_experts, self.hidden_size, self.ffn_size
        up = (2, F) if self.activation == "swiglu" else (F,)
        leading = () if num_banks is None else (num_banks,)
        family: Literal["expert", "pool"] = "expert" if num_banks is None or on_one_stage else "pool"
        d = len(leading)
        by_expert, f_dim = (d, "ep"), d + len(up)
        inner = (by_expert, (f_dim, "etp"))

        # Several layers use a bank, so its gradient is complete when all of them are done.
        usual: Literal["backward", "step_end"] = "backward" if num_banks is None else "step_end"

        def make(
            shape: tuple[int, ...],
            spec: ShardSpec,
            init: Init = ZEROS,
            completed_at: Literal["backward", "step_end"] = usual,
        ) -> nn.Parameter:
            tag = ParameterTag(spec, init, completed_at, is_routed_expert=True)
            return new_parameter((*leading, E, *shape), tag, state, dtype)

        made = {
            "w1": make((*up, H), ShardSpec(family, inner), Init(std=self.init_std, num_indexed_dims=d + 1)),
            "w2": make(
                (H, F),
                ShardSpec(family, (by_expert, (d + 2, "etp"))),
                Init(std=self.output_init_std, num_indexed_dims=d + 1),
            ),
        }
        if self.bias:
            made["b1"] = make(up, ShardSpec(family, inner))
            # Every expert-tensor rank holds the output bias, one adds it: gradients are parts of a sum, and the others'
            # backward passes never reach the parameter.
            made["b2"] = make((H,), ShardSpec(family, (by_expert,), partial=("etp",)), completed_at="step_end")
        return made


def weights_of(parameters: Mapping[str, nn.Parameter] | nn.ParameterDict) -> ExpertWeights:
    """Returns the parameters as expert weights."""
    return ExpertWeights(**dict(parameters.items()))


def main_grads_of(parameters: Mapping[str, nn.Parameter] | nn.ParameterDict) -> ExpertWeights | None:
    """Returns the parameters' main gradients; None where no gradient buffer holds them."""
    grads = {name: getattr(p, "main_grad", None) for name, p in parameters.items()}
    if any(grad is None for grad in grads.values()):
        return None
    return ExpertWeights(**grads)  # type: ignore[arg-type]


def without_repeated_bias(weights: ExpertWeights, state: ParallelState) -> ExpertWeights:
    """Returns the weights as this rank applies them: results are summed over expert-tensor ranks, the bias only once."""
    return weights if state.etp.rank == 0 else replace(weights, b2=None)
