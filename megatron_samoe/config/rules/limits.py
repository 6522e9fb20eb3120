"""What is larger than anything that can be: refused before arithmetic or a model is made from it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from megatron_samoe.config.derived import flag
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.errors import ConfigError, ConfigErrors

LARGEST = 2**31 - 1
#: Limits of single options, from which lists are made, or which libraries hold in fewer bits.
_LARGEST_OF: Mapping[str, int] = {
    "num_layers": 100_000, "num_experts": 1_000_000, "num_expert_banks": 100_000, "moe_router_topk": 100_000,
    "tensor_model_parallel_size": 1_000_000, "pipeline_model_parallel_size": 1_000_000,
    "expert_model_parallel_size": 1_000_000, "expert_tensor_parallel_size": 1_000_000, "global_batch_size": 10_000_000,
    "micro_batch_size": 10_000_000, "num_threads": 4096, "num_workers": 4096, "seed": 2**32 - 1,
    "distributed_timeout_minutes": 1_000_000, "eval_iters": 10_000_000,
}  # fmt: skip
#: Of the tensors of a model: layers times experts.
_MOST_EXPERTS = 10_000_000


def refuse_excess(config: PretrainConfig) -> None:
    """Raises ConfigErrors naming each number that is beyond what any machine could hold."""
    problems = []
    for group in dataclasses.fields(config):
        options = getattr(config, group.name)
        for field in dataclasses.fields(options):
            value, limit = getattr(options, field.name), _LARGEST_OF.get(field.name, LARGEST)
            most = limit if isinstance(value, int) or field.name in _LARGEST_OF else 1e300
            if isinstance(value, (int, float)) and (most < value < math.inf or value < -LARGEST):
                problems.append(ConfigError(flag(field.name), value, f"must be at most {limit:,}"))
    if not problems and config.model.num_layers * config.moe.num_experts > _MOST_EXPERTS:
        problems.append(ConfigError("--num-experts", config.moe.num_experts,
                                    f"times --num-layers must be at most {_MOST_EXPERTS:,}"))  # fmt: skip
    if problems:
        raise ConfigErrors(problems)  # type: ignore[arg-type]
