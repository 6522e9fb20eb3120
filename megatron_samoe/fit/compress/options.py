"""The options of a compression, and their refusals before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.sharing_map import COMBINED, parse_sharing, word_of, words_with, written_map
from megatron_samoe.datasets.build import check_vocabulary
from megatron_samoe.datasets.indexed_dataset import IndexedDataset
from megatron_samoe.datasets.tokenizer import Tokenizer
from megatron_samoe.errors import ConfigError
from megatron_samoe.fit.compress.sharing_plan import SharingPlan, sets_in_budget
from megatron_samoe.fit.compress.text import are_one_dataset, last_documents, passes_of
from megatron_samoe.fit.matching import Matching


@dataclass(frozen=True)
class CompressOptions:
    """The options of a compression."""

    load_dir: str
    """the MoE: folder of a run or of checkpoints"""
    save_dir: str
    """folder of all results"""
    data_path: str
    """indexed dataset to calibrate on, and to heal on"""
    calibration_tokens: int = 262_144
    """tokens to read from the start of --data-path for calibration"""
    valid_data_path: str | None = None
    """indexed dataset to judge on; the last documents of --data-path, held out, if not given"""
    judge_tokens: int = 65_536
    """tokens to judge on"""
    ckpt_step: int | None = None
    """iteration to load; the newest if not given"""
    num_samples: int = 64
    """tokens to keep for each expert, on which outputs of experts are matched"""
    seed: int = 1234
    """random seed of the choice of these tokens"""
    sharing: str = COMBINED.name
    """combined, tied, scaled, or a map such as own,0*3,own"""
    num_banks: int = 1
    """banks of experts that layers combine, for --expert-sharing combined"""
    num_sets: int = 1
    """sets of experts that layers share, for --expert-sharing tied or scaled"""
    budget: float | None = None
    """size of all experts after compression, a share below 1 or bytes, in place of these two numbers"""
    choose_map: bool = False
    """choose which neighbouring layers share a set by the measured error of each pair of layers"""
    match: Matching = "neurons"
    """what is permuted so that layers match: experts and their neurons, experts only, or nothing"""
    no_refit: bool = False
    """fit w2 to the original weights, not to the experts' outputs with the fitted w1, which takes a second pass over the text"""


@dataclass(frozen=True)
class Texts:
    """The inputs of a compression.

    Attributes:
        calibration, judged: ids [B, S + 1] of each forward pass.
        start: token of its dataset that the judged text begins with.
        training: options of data with which a run trains on all text but that to judge on, and validates on that.
    """

    calibration: list[Tensor]
    judged: list[Tensor]
    start: int
    training: Mapping[str, Any]


def texts(options: CompressOptions, config: PretrainConfig, vocab_size: int, tokenizer: Tokenizer) -> Texts:
    """Returns the text to calibrate and heal on, and that to judge on, which does not overlap the former.

    Args:
        vocab_size, tokenizer: the model's.

    Raises:
        ConfigError: fewer tokens are asked for than a sequence has, or both texts are one.
        DataError: a dataset is missing, too short, or of another tokenizer.
    """
    seq_length = config.model.seq_length
    for flag, tokens in (
        ("--calibration-tokens", options.calibration_tokens),
        ("--judge-tokens", options.judge_tokens),
    ):
        if tokens < seq_length:
            raise ConfigError(flag, tokens, f"must be a sequence of the model or more, {seq_length} tokens")
    own, other = options.data_path, options.valid_data_path
    for prefix in (own,) if other is None else (own, other):
        check_vocabulary(IndexedDataset(prefix), tokenizer, vocab_size)
    read = partial(passes_of, seq_length=seq_length, vocab_size=vocab_size)
    training: dict[str, Any]
    if other is None:
        start, split = last_documents(own, options.judge_tokens, "--data-path")
        judged = read(own, "--data-path", start, options.judge_tokens)
        calibration = read(own, "--data-path", 0, options.calibration_tokens, end=start)
        training = {"data_path": [own], "split": split}
    else:
        if are_one_dataset(own, other):
            raise ConfigError(
                "--valid-data-path",
                other,
                "is the text of --data-path, on which experts are fitted and healed; give other text, or "
                "leave it out, and the last documents of --data-path are held out",
            )
        start, judged = 0, read(other, "--valid-data-path", 0, options.judge_tokens)
        calibration = read(own, "--data-path", 0, options.calibration_tokens)
        training = {"train_data_path": [own], "valid_data_path": [other]}
    return Texts(calibration, judged, start, training)


def plan_of(options: CompressOptions, layer_bytes: int, num_layers: int) -> SharingPlan:
    """Returns which layers share where that hangs on no errors: by a map, or in equal blocks."""
    if options.budget is None:
        sources = parse_sharing(options.sharing, num_layers, options.num_sets)
        return SharingPlan(written_map(sources), options.num_banks)
    num_sets = sets_in_budget(options.budget, layer_bytes, num_layers)
    word = word_of(options.sharing)
    if word is not None and word.way.combines:
        return SharingPlan(word.way.name, num_sets)
    return SharingPlan(written_map(parse_sharing(options.sharing, num_layers, num_sets)))


def refuse_options(options: CompressOptions, layer_bytes: int, num_layers: int) -> None:
    """Raises ConfigError for a map, a budget or numbers that do not go together or with the model.

    Args:
        layer_bytes: of one layer's experts.
        num_layers: MoE layers.
    """
    word = word_of(options.sharing)
    if options.budget is not None:
        if word is None or "untied_ends" not in word.options:
            raise ConfigError(
                "--budget", options.budget, f"needs --expert-sharing {words_with('untied_ends')}; a map has its size"
            )
        sets_in_budget(options.budget, layer_bytes, num_layers)
    if options.choose_map and (options.budget is None or word is None or word.way.combines):
        raise ConfigError(
            "--choose-map", True, "needs --budget and --expert-sharing tied or scaled; combined layers share equally"
        )
    plan = plan_of(options, layer_bytes, num_layers)
    sources = parse_sharing(plan.sharing, num_layers)
    users = sum(source.way.combines for source in sources)
    if users and not 1 <= plan.num_banks <= users:
        raise ConfigError(
            "--num-expert-banks", plan.num_banks, f"must be from 1 to the {users} layers that combine them"
        )
    if foreign := [s.way.name for s in sources if s.way.make is not None]:
        raise ConfigError("--expert-sharing", foreign[0], "is a way of another package, and banks and sets are fitted")
    if not any(source.way.is_shared for source in sources):
        raise ConfigError("--expert-sharing", options.sharing, "must name layers that share")
