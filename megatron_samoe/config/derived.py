"""Values that follow from a configuration by arithmetic: batches, layers, stages."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace

from megatron_samoe.config.moe import MoEConfig
from megatron_samoe.config.option import flag
from megatron_samoe.config.parallel import ParallelConfig
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.sharing_map import ExpertSource, parse_sharing
from megatron_samoe.config.training import TrainingConfig
from megatron_samoe.errors import ConfigError


def data_parallel_size(config: PretrainConfig, world_size: int) -> int:
    """Returns the number of ranks that hold different sequences: the data-parallel size of dense parameters."""
    return world_size // dense_model_size(config.parallel)


def dense_model_size(parallel: ParallelConfig) -> int:
    """Returns the ranks that work on one sequence: tensor x context x pipeline."""
    stage = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    return stage * parallel.pipeline_model_parallel_size


def group_tokens(config: PretrainConfig) -> int:
    """Returns the tokens of a micro-batch that the ranks of one tensor-parallel group work on together."""
    return config.training.micro_batch_size * config.model.seq_length // config.parallel.context_parallel_size


def global_batch_size(config: PretrainConfig, world_size: int) -> int:
    """Returns the number of sequences of one optimizer step."""
    training = config.training
    return training.global_batch_size or training.micro_batch_size * data_parallel_size(config, world_size)


def parse_multipliers(field: str, texts: Sequence[str]) -> tuple[tuple[str, float], ...]:
    """Returns (pattern, factor) of each PATTERN=FACTOR; ConfigError where one has another form."""
    found = []
    for text in texts:
        pattern, equals, number = text.rpartition("=")
        try:
            factor = float(number)
            re.compile(pattern)
        except (ValueError, re.error, OverflowError, RecursionError):
            factor = -1.0
        if not equals or not pattern or not 0 <= factor < float("inf"):
            raise ConfigError(
                flag(field),
                tuple(texts),
                "must each be PATTERN=FACTOR: a regular expression for names of "
                f"parameters, and a finite number, 0 or more, such as 'attention=0.5'; {text!r} is not",
            )
        found.append((pattern, factor))
    return tuple(found)


def parse_moe_layer_freq(text: str, num_layers: int) -> tuple[bool, ...]:
    """Returns for each layer whether it is MoE; ConfigError if the text is not a frequency or pattern of that length."""
    allowed = (
        f"must be an integer from 1 to {num_layers}, or {num_layers} zeros and ones such as 01 repeated, "
        "[0,1]*4 or [0]*3+[1]*5"
    )
    compact = text.replace(" ", "")
    part = r"(?:\[([01](?:,[01])*)\]|\(\[([01](?:,[01])*)\]\))(?:\*(\d{1,4}))?"
    # Megatron's scripts write the full sum in parentheses, for Python to evaluate.
    total = compact[1:-1] if compact.startswith("(") and compact.endswith(")") else compact
    if re.fullmatch(rf"{part}(?:\+{part})*", total):
        pattern = "".join((m[1] or m[2]).replace(",", "") * int(m[3] or 1) for m in re.finditer(part, total))
    elif re.fullmatch(r"[01]{2,}", compact) and len(compact) == num_layers:
        pattern = compact
    elif re.fullmatch(r"[1-9]\d*", compact) and int(compact) <= num_layers:
        pattern = "".join("1" if i % int(compact) == 0 else "0" for i in range(num_layers))
    else:
        raise ConfigError("--moe-layer-freq", text, allowed)
    if len(pattern) != num_layers:
        raise ConfigError("--moe-layer-freq", text, f"{allowed}; this one has {len(pattern)} entries")
    return tuple(c == "1" for c in pattern)


def written_layer_freq(is_moe: Sequence[bool]) -> str:
    """Returns the value of --moe-layer-freq that makes these layers MoE."""
    return "1" if all(is_moe) else "[" + ",".join("01"[bool(moe)] for moe in is_moe) + "]"


#: Letters of a pipeline's layout; a slip in nested repeats must not fill the memory.
_LONGEST_LAYOUT = 10_000


def parse_stage_layout(text: str) -> tuple[int, ...]:
    """Returns the number of layers of each virtual stage in a --pipeline-model-parallel-layout, such as Et*3|t*4|t*3L.

    Raises:
        ConfigError: the text is not one E, then t, then one L, with | between stages.
    """
    flag_name = "--pipeline-model-parallel-layout"
    allowed = "must be stages between |: E (embedding) first, t for each layer, L (head) last; t*3 and (tt|)*2 repeat"
    expanded = re.sub(r"[\s,]", "", text)
    while (unrolled := re.sub(r"\(([^()]*)\)\*(\d{1,4})", lambda m: m[1] * int(m[2]), expanded)) != expanded:
        expanded = unrolled
        if len(expanded) > _LONGEST_LAYOUT:
            raise ConfigError(flag_name, text, f"{allowed}; this one has more than {_LONGEST_LAYOUT} letters")
    expanded = re.sub(r"([EtL])\*(\d{1,4})", lambda m: m[1] * int(m[2]), expanded)
    if not re.fullmatch(r"E[t|]*L", expanded):
        raise ConfigError(flag_name, text, allowed)
    return tuple(stage.count("t") for stage in expanded.split("|"))


def uneven_layout(num_layers: int, num_stages: int) -> str:
    """Returns a --pipeline-model-parallel-layout of almost even stages; the last, which has the head, and the first, which
    has the embedding, get fewer."""
    few, more = divmod(num_layers, num_stages)
    order = [*range(1, num_stages - 1), 0, num_stages - 1]
    counts = [few] * num_stages
    for stage in order[:more]:
        counts[stage] += 1
    return "E" + "|".join("t" if n == 1 else f"t*{n}" if n else "" for n in counts) + "L"


def virtual_stages(parallel: ParallelConfig, num_layers: int) -> int:
    """Returns the number of virtual stages; 0 where the layers cannot be cut as configured."""
    pp = parallel.pipeline_model_parallel_size
    if parallel.pipeline_model_parallel_layout is not None:
        return len(parse_stage_layout(parallel.pipeline_model_parallel_layout))
    per_stage = parallel.num_layers_per_virtual_pipeline_stage
    if per_stage is None:
        return pp if num_layers % pp == 0 else 0
    return num_layers // per_stage if num_layers % (pp * per_stage) == 0 else 0


def num_micro_batches(config: PretrainConfig, world_size: int) -> int:
    """Returns the number of forward passes of one optimizer step on each rank."""
    per_pass = config.training.micro_batch_size * data_parallel_size(config, world_size)
    return global_batch_size(config, world_size) // per_pass


def num_moe_layers(config: PretrainConfig) -> int:
    """Returns L, the number of MoE layers (0 for the dense layout)."""
    if config.moe.expert_layout == "dense":
        return 0
    return sum(parse_moe_layer_freq(config.moe.moe_layer_freq, config.model.num_layers))


def experts_per_layer(moe: MoEConfig, num_moe_layers: int) -> tuple[int, ...]:
    """Returns the number of experts of each MoE layer; ConfigError where they are given for another number of layers."""
    if isinstance(moe.num_experts, int) and moe.sharing_reads("num_neighbour_layers"):
        block = moe.num_neighbour_layers
        blocks = (min(block, num_moe_layers - i // block * block) for i in range(num_moe_layers))
        return tuple(layers * moe.num_experts for layers in blocks)
    if isinstance(moe.num_experts, int):
        return (moe.num_experts,) * num_moe_layers
    if len(moe.num_experts) != num_moe_layers:
        allowed = f"must be one number, or one for each of the {num_moe_layers} MoE layers"
        raise ConfigError("--num-experts", moe.num_experts, allowed)
    return moe.num_experts


def sharing_map(config: PretrainConfig) -> tuple[ExpertSource, ...]:
    """Returns where each MoE layer's experts come from; ConfigError where --expert-sharing does not fit the layers."""
    moe = config.moe
    return parse_sharing(
        moe.sharing, num_moe_layers(config), moe.num_expert_sets, moe.untied_ends, moe.num_neighbour_layers
    )


def divisors(n: int) -> list[int]:
    """Returns the divisors of n in rising order."""
    low = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*low, *(n // d for d in low)})


def batch_sizes(config: PretrainConfig, world_size: int) -> tuple[int, ...]:
    """Returns the sequences of a step, from the first size to the last; () where --rampup-batch-size does not fit.

    As Megatron's `RampupBatchsizeNumMicroBatchesCalculator`; `with_train_iters` is as its `update_train_iters`.
    """
    full, ramp = global_batch_size(config, world_size), config.training.rampup_batch_size
    if ramp is None:
        return (full,)
    start, increment, samples = ramp if len(ramp) == 3 else (0, 0, 0)
    if min(start, increment, samples) < 1 or start >= full or (full - start) % increment:
        return ()
    return tuple(range(start, full + 1, increment))


def batch_size_after(config: PretrainConfig, world_size: int, consumed_samples: int) -> int:
    """Returns the sequences of the step that follows a number of consumed samples."""
    sizes, ramp = batch_sizes(config, world_size), config.training.rampup_batch_size
    if ramp is None or consumed_samples > ramp[2]:
        return sizes[-1]
    samples_per_size = ramp[2] / (len(sizes) - 1)
    return sizes[min(int(consumed_samples / samples_per_size), len(sizes) - 1)]


def samples_after(config: PretrainConfig, world_size: int, consumed_samples: int, steps: int) -> int:
    """Returns the sequences that a run has consumed after a number of further steps."""
    ramp = config.training.rampup_batch_size
    while ramp is not None and steps > 0 and consumed_samples <= ramp[2]:
        consumed_samples += batch_size_after(config, world_size, consumed_samples)
        steps -= 1
    return consumed_samples + max(steps, 0) * global_batch_size(config, world_size)


def steps_for_samples(config: PretrainConfig, world_size: int, consumed_samples: int = 0) -> int | None:
    """Returns the steps that --train-samples makes, or makes yet after a number of them; None without it, or where other options do
    not fit.
    """
    samples = config.training.train_samples
    if samples is None or dense_model_size(config.parallel) < 1:
        return None
    sizes = batch_sizes(config, world_size)
    if not sizes or min(sizes) < 1:
        return None
    ramp, steps = config.training.rampup_batch_size, 0
    while ramp is not None and consumed_samples <= ramp[2]:
        consumed_samples += batch_size_after(config, world_size, consumed_samples)
        steps += 1
    return steps + max(samples - consumed_samples, 0) // sizes[-1]


def with_train_iters(config: PretrainConfig, world_size: int, done: tuple[int, int] = (0, 0)) -> PretrainConfig:
    """Returns the configuration with the --train-iters that --train-samples makes, unless others were given.

    Args:
        done: steps and samples of a run that resumes: batches of another size may have made them.
    """
    steps = steps_for_samples(config, world_size, done[1])
    if steps is None or (done == (0, 0) and config.training.train_iters != TrainingConfig().train_iters):
        return config
    return replace(config, training=replace(config.training, train_iters=done[0] + steps))
