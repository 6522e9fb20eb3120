"""Rules of a run's schedule, precision, data and checkpoints."""

from __future__ import annotations

from megatron_samoe.config.batch_schedule import batch_sizes, samples_after, steps_for_samples
from megatron_samoe.config.derived import dense_model_size, flag, global_batch_size, parse_multipliers
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.rules import Problems
from megatron_samoe.config.training import TrainingConfig
from megatron_samoe.errors import ConfigError


def _schedule_fits(config: PretrainConfig, world_size: int) -> Problems:
    optimizer, training = config.optimizer, config.training
    unit = "steps" if training.train_samples is None else "samples"
    decay = optimizer.lr_decay_samples or optimizer.lr_decay_iters or training.train_samples or training.train_iters
    if optimizer.lr_decay_style == "constant":
        for name in ("min_lr", "lr_decay_iters", "lr_decay_samples"):
            if getattr(optimizer, name):
                yield ConfigError(flag(name), getattr(optimizer, name), "has no use with --lr-decay-style constant")
    if optimizer.min_lr > optimizer.lr:
        yield ConfigError("--min-lr", optimizer.min_lr, f"must be at most --lr {optimizer.lr}")
    if optimizer.lr_warmup_fraction is not None:
        if not 0 <= optimizer.lr_warmup_fraction <= 1:
            yield ConfigError("--lr-warmup-fraction", optimizer.lr_warmup_fraction, "must be from 0 to 1")
    for name in ("lr_warmup_iters", "lr_warmup_samples"):
        if getattr(optimizer, name) and optimizer.lr_warmup_fraction is not None:
            yield ConfigError("--lr-warmup-fraction", optimizer.lr_warmup_fraction, f"excludes {flag(name)}")
        elif getattr(optimizer, name) > decay:
            yield ConfigError(flag(name), getattr(optimizer, name), f"must be at most the {decay} decay {unit}")


def _samples(config: PretrainConfig, world_size: int) -> Problems:
    training, ramp = config.training, config.training.rampup_batch_size
    if training.train_samples is None:
        return
    for name in ("lr_decay_iters", "lr_wsd_decay_iters", "lr_warmup_iters"):
        if value := getattr(config.optimizer, name):
            yield ConfigError(flag(name), value, f"cannot be used with --train-samples; give {flag(name)[:-5]}samples")
    if dense_model_size(config.parallel) < 1:
        return
    steps = steps_for_samples(config, world_size)
    if steps is None:
        if ramp is not None:
            full = global_batch_size(config, world_size)
            yield ConfigError("--rampup-batch-size", ramp, "must be three positive numbers: a size below the global batch of "
                              f"{full}, an increment that divides the difference, and samples")  # fmt: skip
    elif steps == 0:
        yield ConfigError("--train-samples", training.train_samples,
                          f"must be at least one batch, {batch_sizes(config, world_size)[0]} sequences")  # fmt: skip
    elif (least := samples_after(config, world_size, 0, steps)) > training.train_samples:
        yield ConfigError("--rampup-batch-size", ramp, f"grows over {least} samples, and --train-samples is "
                          f"{training.train_samples}")  # fmt: skip
    elif training.train_iters not in (TrainingConfig().train_iters, steps):
        yield ConfigError("--train-iters", training.train_iters, f"excludes --train-samples, which makes {steps} steps")


def _multipliers(config: PretrainConfig, world_size: int) -> Problems:
    for name in ("lr_mult_patterns", "weight_decay_mult_patterns"):
        try:
            parse_multipliers(name, getattr(config.optimizer, name))
        except ConfigError as error:
            yield error


def _precision(config: PretrainConfig, world_size: int) -> Problems:
    if config.training.bf16 and config.training.fp16:
        yield ConfigError("--fp16", True, "excludes --bf16")


def _data_sources(config: PretrainConfig, world_size: int) -> Problems:
    data = config.data
    split_paths = data.train_data_path or data.valid_data_path or data.test_data_path
    if data.mock_data and (data.data_path or split_paths):
        yield ConfigError("--mock-data", True, "excludes --data-path and its per-split variants")
    if data.data_path and split_paths:
        yield ConfigError(
            "--data-path", data.data_path, "excludes --train-data-path, --valid-data-path, --test-data-path"
        )
    if config.training.eval_iters == 0:
        for name, value in (
            ("full_validation", config.training.full_validation),
            ("test_data_path", data.test_data_path),
        ):
            if value:
                yield ConfigError(flag(name), value, "needs --eval-iters above 0: nothing is evaluated")
    held_out = config.training.skip_train and (data.valid_data_path or data.test_data_path)
    if not (data.mock_data or data.data_path or data.train_data_path or held_out):
        yield ConfigError("--data-path", None, "must name a dataset (or give --train-data-path, or --mock-data)")
    if data.tokenizer_type == "GPT2BPETokenizer" and not (data.vocab_file and data.merge_file):
        yield ConfigError("--tokenizer-type", data.tokenizer_type, "needs --vocab-file and --merge-file")
    if data.tokenizer_type in ("SentencePieceTokenizer", "HuggingFaceTokenizer") and not data.tokenizer_model:
        yield ConfigError("--tokenizer-type", data.tokenizer_type, "needs --tokenizer-model")


def _spikes(config: PretrainConfig, world_size: int) -> Problems:
    if 0 < config.training.spike_window < 3:
        yield ConfigError(
            "--spike-window", config.training.spike_window, "must be 0, or 3 or more steps (128 is usual)"
        )


def _teacher(config: PretrainConfig, world_size: int) -> Problems:
    until, train_iters = config.distillation.teacher_until, config.training.train_iters
    if until is not None and until > train_iters:
        yield ConfigError("--teacher-until", until, f"must be a step of the run: at most --train-iters {train_iters}")


def _loggers(config: PretrainConfig, world_size: int) -> Problems:
    logs = config.logging
    if not logs.profile:
        return
    if not 1 <= logs.profile_step_start < logs.profile_step_end:
        yield ConfigError("--profile-step-end", logs.profile_step_end,
                          f"must be above --profile-step-start {logs.profile_step_start}, which must be 1 or more")  # fmt: skip
    if not logs.profile_ranks or not all(0 <= rank < world_size for rank in logs.profile_ranks):
        yield ConfigError("--profile-ranks", logs.profile_ranks, f"must be ranks from 0 to {world_size - 1}")
    if logs.run_dir is None and config.checkpoint.save is None:
        yield ConfigError("--profile", True, "needs --run-dir or --save, where traces go")


def _checkpoint_paths(config: PretrainConfig, world_size: int) -> Problems:
    checkpoint = config.checkpoint
    if config.training.skip_train and (checkpoint.load is None or config.training.eval_iters == 0):
        yield ConfigError("--skip-train", True, "needs --load (or --run-dir) and --eval-iters: it only evaluates")
    if checkpoint.load is None:
        if checkpoint.use_checkpoint_args and checkpoint.pretrained_checkpoint is None:
            yield ConfigError("--use-checkpoint-args", True, "needs --load, --run-dir or --pretrained-checkpoint")
        if checkpoint.pretrained_checkpoint is not None and checkpoint.save is not None:
            yield ConfigError("--pretrained-checkpoint", checkpoint.pretrained_checkpoint, "needs --load (or --run-dir) beside "
                              "--save: without it the same command would begin again and replace what it saved")  # fmt: skip
    if checkpoint.finetune and checkpoint.pretrained_checkpoint is not None:
        yield ConfigError("--finetune", True, "excludes --pretrained-checkpoint, which is not loaded again once the run has "
                          "checkpoints of its own")  # fmt: skip


RULES = (
    _schedule_fits,
    _samples,
    _multipliers,
    _precision,
    _data_sources,
    _spikes,
    _teacher,
    _loggers,
    _checkpoint_paths,
)
