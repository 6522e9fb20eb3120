"""Rules of a run's schedule, precision, data and checkpoints."""

from __future__ import annotations

from megatron_samoe.config.derived import (
    batch_sizes,
    global_batch_size,
    parse_multipliers,
    samples_after,
    steps_for_samples,
)
from megatron_samoe.config.option import flag
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.rules import Rule, Rules, Table
from megatron_samoe.config.training import TrainingConfig


def _schedule(config: PretrainConfig, _: int) -> Rules:
    optimizer, training = config.optimizer, config.training
    if optimizer.lr_decay_style == "constant":
        for name in ("min_lr", "lr_decay_iters", "lr_decay_samples"):
            yield Rule(name, getattr(optimizer, name), "has no use with --lr-decay-style constant")
    yield Rule("min_lr", optimizer.min_lr > optimizer.lr, f"must be at most --lr {optimizer.lr}")
    share = optimizer.lr_warmup_fraction
    if share is not None:
        yield Rule("lr_warmup_fraction", not 0 <= share <= 1, "must be from 0 to 1")
    unit = "steps" if training.train_samples is None else "samples"
    decay = optimizer.lr_decay_samples or optimizer.lr_decay_iters or training.train_samples or training.train_iters
    for name in ("lr_warmup_iters", "lr_warmup_samples"):
        length = getattr(optimizer, name)
        if share is None:
            yield Rule(name, length > decay, f"must be at most the {decay} decay {unit}")
        else:
            yield Rule("lr_warmup_fraction", length, f"excludes {flag(name)}")
    for name in ("lr_mult_patterns", "weight_decay_mult_patterns"):
        parse_multipliers(name, getattr(optimizer, name))


def _samples(config: PretrainConfig, world_size: int) -> Rules:
    training, ramp, samples = config.training, config.training.rampup_batch_size, config.training.train_samples
    if samples is None:
        return
    for name in ("lr_decay_iters", "lr_wsd_decay_iters", "lr_warmup_iters"):
        allowed = f"cannot be used with --train-samples; give {flag(name)[:-5]}samples"
        yield Rule(name, getattr(config.optimizer, name), allowed)
    steps, full = steps_for_samples(config, world_size), global_batch_size(config, world_size)
    if steps is None:
        allowed = f"must be three positive numbers: a size below the global batch of {full}, an increment that divides "
        yield Rule("rampup_batch_size", ramp is not None, allowed + "the difference, and samples")
        return
    first = batch_sizes(config, world_size)[0]
    yield Rule("train_samples", steps == 0, f"must be at least one batch, {first} sequences")
    if steps == 0:
        return
    least = samples_after(config, world_size, 0, steps)
    yield Rule("rampup_batch_size", least > samples, f"grows over {least} samples, and --train-samples is {samples}")
    if least <= samples:
        is_own = training.train_iters not in (TrainingConfig().train_iters, steps)
        yield Rule("train_iters", is_own, f"excludes --train-samples, which makes {steps} steps")


def _training(config: PretrainConfig, _: int) -> Rules:
    training, until = config.training, config.distillation.teacher_until
    if training.bf16:
        yield Rule("fp16", training.fp16, "excludes --bf16")
    yield Rule("spike_window", 0 < training.spike_window < 3, "must be 0, or 3 or more steps (128 is usual)")
    if until is not None:
        steps = training.train_iters
        yield Rule("teacher_until", until > steps, f"must be a step of the run: at most --train-iters {steps}")


def _data(config: PretrainConfig, _: int) -> Rules:
    data, training = config.data, config.training
    by_split = data.train_data_path or data.valid_data_path or data.test_data_path
    if data.mock_data:
        yield Rule("mock_data", data.data_path or by_split, "excludes --data-path and its per-split variants")
    if data.data_path:
        yield Rule("data_path", by_split, "excludes --train-data-path, --valid-data-path, --test-data-path")
    if training.eval_iters == 0:
        for name, value in (("full_validation", training.full_validation), ("test_data_path", data.test_data_path)):
            yield Rule(name, value, "needs --eval-iters above 0: nothing is evaluated")
    held_out = training.skip_train and (data.valid_data_path or data.test_data_path)
    has_data = data.mock_data or data.data_path or data.train_data_path or held_out
    yield Rule("data_path", not has_data, "must name a dataset (or give --train-data-path, or --mock-data)", None)
    if data.tokenizer_type == "GPT2BPETokenizer":
        has_files = data.vocab_file and data.merge_file
        yield Rule("tokenizer_type", not has_files, "needs --vocab-file and --merge-file")
    if data.tokenizer_type in ("SentencePieceTokenizer", "HuggingFaceTokenizer"):
        yield Rule("tokenizer_type", not data.tokenizer_model, "needs --tokenizer-model")


def _profile(config: PretrainConfig, world_size: int) -> Rules:
    logs = config.logging
    if not logs.profile:
        return
    first, end, ranks = logs.profile_step_start, logs.profile_step_end, logs.profile_ranks
    allowed = f"must be above --profile-step-start {first}, which must be 1 or more"
    yield Rule("profile_step_end", not 1 <= first < end, allowed)
    are_in_world = ranks and all(0 <= rank < world_size for rank in ranks)
    yield Rule("profile_ranks", not are_in_world, f"must be ranks from 0 to {world_size - 1}")
    if logs.run_dir is None:
        yield Rule("profile", config.checkpoint.save is None, "needs --run-dir or --save, where traces go")


def _checkpoints(config: PretrainConfig, _: int) -> Rules:
    checkpoint, training = config.checkpoint, config.training
    is_new, first = checkpoint.load is None, checkpoint.pretrained_checkpoint
    if training.skip_train:
        has_nothing = is_new or training.eval_iters == 0
        yield Rule("skip_train", has_nothing, "needs --load (or --run-dir) and --eval-iters: it only evaluates")
    if first is not None:
        allowed = "excludes --pretrained-checkpoint, which is not loaded again once the run has checkpoints of its own"
        yield Rule("finetune", checkpoint.finetune, allowed)
        if is_new:
            allowed = "needs --load (or --run-dir) with --save: without it the same command would begin again and "
            yield Rule("pretrained_checkpoint", checkpoint.save is not None, allowed + "replace what it saved")
    elif is_new:
        allowed = "needs --load, --run-dir or --pretrained-checkpoint"
        yield Rule("use_checkpoint_args", checkpoint.use_checkpoint_args, allowed)


TABLES = (
    Table(("optimizer", "training"), _schedule),
    Table(("optimizer", "training", "parallel"), _samples),
    Table(("training", "distillation"), _training),
    Table(("training", "data"), _data),
    Table(("logging",), _profile),
    Table(("training", "checkpoint"), _checkpoints),
)
