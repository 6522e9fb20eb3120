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
from megatron_samoe.config.rules import Rows, Table
from megatron_samoe.config.training import TrainingConfig


def _schedule(config: PretrainConfig, _: int) -> Rows:
    optimizer, training = config.optimizer, config.training
    is_constant, share = optimizer.lr_decay_style == "constant", optimizer.lr_warmup_fraction
    for name in ("min_lr", "lr_decay_iters", "lr_decay_samples"):
        yield name, is_constant and getattr(optimizer, name), "has no use with --lr-decay-style constant"
    yield "min_lr", optimizer.min_lr > optimizer.lr, f"must be at most --lr {optimizer.lr}"
    yield "lr_warmup_fraction", share is not None and not 0 <= share <= 1, "must be from 0 to 1"
    unit = "steps" if training.train_samples is None else "samples"
    decay = optimizer.lr_decay_samples or optimizer.lr_decay_iters or training.train_samples or training.train_iters
    for name in ("lr_warmup_iters", "lr_warmup_samples"):
        length = getattr(optimizer, name)
        yield "lr_warmup_fraction", length and share is not None, f"excludes {flag(name)}"
        yield name, share is None and length > decay, f"must be at most the {decay} decay {unit}"
    for name in ("lr_mult_patterns", "weight_decay_mult_patterns"):
        parse_multipliers(name, getattr(optimizer, name))


def _samples(config: PretrainConfig, world_size: int) -> Rows:
    training, ramp, samples = config.training, config.training.rampup_batch_size, config.training.train_samples
    if samples is None:
        return
    for name in ("lr_decay_iters", "lr_wsd_decay_iters", "lr_warmup_iters"):
        allowed = f"cannot be used with --train-samples; give {flag(name)[:-5]}samples"
        yield name, getattr(config.optimizer, name), allowed
    steps, full = steps_for_samples(config, world_size), global_batch_size(config, world_size)
    if steps is None:
        allowed = (
            f"must be three positive numbers: a size below the global batch of {full}, an increment that divides the "
        )
        yield "rampup_batch_size", ramp is not None, allowed + "difference, and samples"
        return
    first = batch_sizes(config, world_size)[0]
    yield "train_samples", steps == 0, f"must be at least one batch, {first} sequences"
    least = samples_after(config, world_size, 0, steps)
    is_slow = steps > 0 and least > samples
    yield "rampup_batch_size", is_slow, f"grows over {least} samples, and --train-samples is {samples}"
    is_other = steps > 0 and not is_slow and training.train_iters not in (TrainingConfig().train_iters, steps)
    yield "train_iters", is_other, f"excludes --train-samples, which makes {steps} steps"


def _training(config: PretrainConfig, _: int) -> Rows:
    training, until = config.training, config.distillation.teacher_until
    yield "fp16", training.bf16 and training.fp16, "excludes --bf16"
    yield "spike_window", 0 < training.spike_window < 3, "must be 0, or 3 or more steps (128 is usual)"
    is_late = until is not None and until > training.train_iters
    yield "teacher_until", is_late, f"must be a step of the run: at most --train-iters {training.train_iters}"


def _data(config: PretrainConfig, _: int) -> Rows:
    data, training = config.data, config.training
    by_split = data.train_data_path or data.valid_data_path or data.test_data_path
    excluded = data.mock_data and (data.data_path or by_split)
    yield "mock_data", excluded, "excludes --data-path and its per-split variants"
    excluded = data.data_path and by_split
    yield "data_path", excluded, "excludes --train-data-path, --valid-data-path, --test-data-path"
    is_blind = training.eval_iters == 0
    for name, value in (("full_validation", training.full_validation), ("test_data_path", data.test_data_path)):
        yield name, is_blind and value, "needs --eval-iters above 0: nothing is evaluated"
    held_out = training.skip_train and (data.valid_data_path or data.test_data_path)
    is_empty = not (data.mock_data or data.data_path or data.train_data_path or held_out)
    yield "data_path", is_empty, "must name a dataset (or give --train-data-path, or --mock-data)", None
    kind = data.tokenizer_type
    is_half = kind == "GPT2BPETokenizer" and not (data.vocab_file and data.merge_file)
    yield "tokenizer_type", is_half, "needs --vocab-file and --merge-file"
    is_bare = kind in ("SentencePieceTokenizer", "HuggingFaceTokenizer") and not data.tokenizer_model
    yield "tokenizer_type", is_bare, "needs --tokenizer-model"


def _profile(config: PretrainConfig, world_size: int) -> Rows:
    logs = config.logging
    if not logs.profile:
        return
    first, end, ranks = logs.profile_step_start, logs.profile_step_end, logs.profile_ranks
    allowed = f"must be above --profile-step-start {first}, which must be 1 or more"
    yield "profile_step_end", not 1 <= first < end, allowed
    are_ours = ranks and all(0 <= rank < world_size for rank in ranks)
    yield "profile_ranks", not are_ours, f"must be ranks from 0 to {world_size - 1}"
    is_lost = logs.run_dir is None and config.checkpoint.save is None
    yield "profile", is_lost, "needs --run-dir or --save, where traces go"


def _checkpoints(config: PretrainConfig, _: int) -> Rows:
    checkpoint, training = config.checkpoint, config.training
    is_new, first = checkpoint.load is None, checkpoint.pretrained_checkpoint
    is_idle = training.skip_train and (is_new or training.eval_iters == 0)
    yield "skip_train", is_idle, "needs --load (or --run-dir) and --eval-iters: it only evaluates"
    is_idle = checkpoint.use_checkpoint_args and is_new and first is None
    yield "use_checkpoint_args", is_idle, "needs --load, --run-dir or --pretrained-checkpoint"
    allowed = "needs --load (or --run-dir) with --save: without it the same command would begin again and replace what it saved"
    yield "pretrained_checkpoint", is_new and first is not None and checkpoint.save is not None, allowed
    allowed = "excludes --pretrained-checkpoint, which is not loaded again once the run has checkpoints of its own"
    yield "finetune", checkpoint.finetune and first is not None, allowed


TABLES = (
    Table(("optimizer", "training"), _schedule),
    Table(("optimizer", "training", "parallel"), _samples),
    Table(("training", "distillation"), _training),
    Table(("training", "data"), _data),
    Table(("logging",), _profile),
    Table(("training", "checkpoint"), _checkpoints),
)
