"""Options of Megatron-Core beside which layers cannot share experts, or with which nobody has run it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_samoe.errors import ConfigError


@dataclass(frozen=True)
class Refusal:
    """An option of Megatron-Core, when it is refused, and why."""

    option: str
    is_wrong: Callable[[Any], bool]
    why: str


def _is_on(value: Any) -> bool:
    return bool(value) and value != "none"


NOT_PARAMETERS = "meets lent experts, which are not parameters of their layer"
#: Of a TransformerConfig.
OF_MODEL = (
    Refusal("num_moe_experts", lambda v: v is None, "must be given: a model without experts has none to share"),
    Refusal("add_bias_linear", _is_on, "must be False: shared experts have no biases here"),
    Refusal("mtp_num_layers", _is_on, "must be None: layers that predict further tokens do not borrow experts"),
    Refusal("moe_apply_probs_on_input", _is_on, "must be False: lent experts weigh their results"),
    Refusal("fp8", _is_on, f"{NOT_PARAMETERS}; train in bf16 or fp32"),
    Refusal("fp4", _is_on, f"{NOT_PARAMETERS}; train in bf16 or fp32"),
    Refusal("delay_wgrad_compute", _is_on, NOT_PARAMETERS),
    Refusal("cuda_graph_impl", _is_on, NOT_PARAMETERS),
    Refusal("moe_latent_size", _is_on, "must be None: lent experts have the hidden size of the model"),
    Refusal("context_parallel_size", lambda v: v > 1, "must be 1: nobody has run it"),
    Refusal("moe_token_dispatcher_type", lambda v: v == "flex", "must be alltoall or allgather: nobody has run flex"),
)
#: Of DistributedDataParallelConfig.
OF_DDP = (
    Refusal(
        "overlap_grad_reduce",
        _is_on,
        "must be False: gradients of shared experts are complete after the last micro-batch",
    ),
    Refusal("use_megatron_fsdp", _is_on, NOT_PARAMETERS),
)


def refuse(config: Any, rows: tuple[Refusal, ...]) -> None:
    """Raises ConfigError naming the first option that is refused; options that this version lacks are off."""
    for row in rows:
        if hasattr(config, row.option) and row.is_wrong(value := getattr(config, row.option)):
            raise ConfigError(row.option, value, row.why)
