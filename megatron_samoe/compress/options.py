"""What a compression is asked for, and what is refused of it before anything is written."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_samoe.compress.matching import Matching
from megatron_samoe.compress.sharing_plan import SharingPlan, sets_in_budget
from megatron_samoe.compress.text import Text
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.sharing_map import parse_sharing, written_map
from megatron_samoe.errors import ConfigError


@dataclass(frozen=True)
class CompressOptions:
    """What is asked for.

    Attributes:
        data_path, valid_data_path: indexed datasets to calibrate on and to judge on; without the latter, the tokens after
            those of calibration.
        num_samples: tokens kept of each expert.
        sharing: combined, tied, scaled or a map of --expert-sharing.
        budget: share of expert bytes below 1, or bytes, in place of numbers of banks or sets.
        choose_map: choose the layers that share by what pairs lose.
        match: what is matched.
        refit: fit w2 to the outputs that the fitted w1 leaves it, over the text once more.
    """

    load_dir: str
    save_dir: str
    data_path: str
    calibration_tokens: int = 262_144
    valid_data_path: str | None = None
    judge_tokens: int = 65_536
    ckpt_step: int | None = None
    num_samples: int = 64
    seed: int = 1234
    sharing: str = "combined"
    num_banks: int = 1
    num_sets: int = 1
    budget: float | None = None
    choose_map: bool = False
    match: Matching = "neurons"
    refit: bool = True


def texts(options: CompressOptions, config: PretrainConfig, vocab_size: int) -> tuple[list[Tensor], list[Tensor]]:
    """Returns ids [B, S + 1] of each forward pass, of the text to calibrate on and of that to judge on.

    Raises:
        ConfigError: fewer tokens are asked for than a sequence has.
        DataError: a dataset is missing, too short, or of another tokenizer.
    """
    seq_length = config.model.seq_length
    for flag, tokens in (
        ("--calibration-tokens", options.calibration_tokens),
        ("--judge-tokens", options.judge_tokens),
    ):
        if tokens < seq_length:
            raise ConfigError(flag, tokens, f"must be a sequence of the model or more, {seq_length} tokens")
    text = Text(options.data_path, 0, options.calibration_tokens)
    held_out, flag = Text(options.data_path, options.calibration_tokens, options.judge_tokens), "--data-path"
    if options.valid_data_path is not None:
        held_out, flag = Text(options.valid_data_path, 0, options.judge_tokens), "--valid-data-path"
    return text.passes(seq_length, vocab_size, "--data-path"), held_out.passes(seq_length, vocab_size, flag)


def plan_of(options: CompressOptions, layer_bytes: int, num_layers: int) -> SharingPlan:
    """Returns which layers share where that hangs on no errors: by a map, or in equal blocks."""
    if options.budget is None:
        sources = parse_sharing(options.sharing, num_layers, options.num_sets)
        return SharingPlan(written_map(sources), options.num_banks)
    num_sets = sets_in_budget(options.budget, layer_bytes, num_layers)
    if options.sharing == "combined":
        return SharingPlan("combined", num_sets)
    return SharingPlan(written_map(parse_sharing(options.sharing, num_layers, num_sets)))


def refuse_options(options: CompressOptions, layer_bytes: int, num_layers: int) -> None:
    """Raises ConfigError for a map, a budget or numbers that do not go together or with the model.

    Args:
        layer_bytes: of one layer's experts.
        num_layers: MoE layers.
    """
    if options.budget is not None:
        if options.sharing not in ("combined", "tied", "scaled"):
            raise ConfigError(
                "--budget", options.budget, "needs --expert-sharing combined, tied or scaled; a map has its size"
            )
        sets_in_budget(options.budget, layer_bytes, num_layers)
    if options.choose_map and (options.budget is None or options.sharing == "combined"):
        raise ConfigError(
            "--choose-map", True, "needs --budget and --expert-sharing tied or scaled; combined layers share alike"
        )
    plan = plan_of(options, layer_bytes, num_layers)
    sources = parse_sharing(plan.sharing, num_layers)
    users = sum(source.way == "combined" for source in sources)
    if users and not 1 <= plan.num_banks <= users:
        raise ConfigError(
            "--num-expert-banks", plan.num_banks, f"must be from 1 to the {users} layers that combine them"
        )
    if all(source.way == "own" for source in sources):
        raise ConfigError("--expert-sharing", options.sharing, "must name layers that share")
