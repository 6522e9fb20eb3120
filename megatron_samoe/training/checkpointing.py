"""A run's tensors under global names, and the saving and loading of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from megatron_samoe.config.cli import CHECKPOINT_GROUPS, to_mapping
from megatron_samoe.config.option import all_options, flag
from megatron_samoe.config.training import DistillationConfig, OptimizerConfig, TrainingConfig
from megatron_samoe.dist_checkpointing import store
from megatron_samoe.dist_checkpointing.loading import load_checkpoint
from megatron_samoe.dist_checkpointing.saving import BackgroundSaver, save_checkpoint
from megatron_samoe.dist_checkpointing.sharded_state import ShardedTensor, replicated, sharded, stored_names
from megatron_samoe.errors import CheckpointError
from megatron_samoe.log import logger
from megatron_samoe.models.rank_model import RankModel
from megatron_samoe.ops import cpu_products, extension
from megatron_samoe.ops.asynchronous import runs_behind_host
from megatron_samoe.optimizer.schedule import rate_of_step
from megatron_samoe.parallel_state.parameter_tag import tag_of
from megatron_samoe.training.setup import TrainSetup
from megatron_samoe.training.state import BF16_PRODUCTS, CUDA_KERNELS, PLAIN_KEYS, TrainState

#: Options that decide which samples a run sees, in addition to its seed.
CORPUS_FIELDS = ("data_path", "train_data_path", "split", "mock_data")
EXPERT_FRACTIONS = "training.expert_fractions"


def model_state(model: RankModel) -> dict[str, list[ShardedTensor]]:
    """Returns the model's parameters."""
    return {
        name: sharded(p, tag_of(p).shard, model.state, tag_of(p).slice) for name, p in model.global_parameters().items()
    }


def optimizer_state(setup: TrainSetup) -> dict[str, list[ShardedTensor]]:
    """Returns master weights and moments, each under optimizer.<kind>.<parameter>."""
    optimizer, state = setup.optimizer, {}
    for name, piece in optimizer.pieces.items():
        tensors = optimizer.moments(name)
        if name in optimizer.own_masters():
            tensors["master"] = optimizer.masters[name]
        for kind, tensor in tensors.items():
            parts = sharded(tensor, piece.tag.shard, setup.parallel, piece.slice, piece.counts)
            state[f"optimizer.{kind}.{name}"] = parts
    return state


def run_state(setup: TrainSetup, state: TrainState) -> dict[str, list[ShardedTensor]]:
    """Returns all tensors that a checkpoint of the run holds."""
    tensors = model_state(setup.model)
    if state.expert_fractions_LE is not None:
        tensors[EXPERT_FRACTIONS] = replicated(state.expert_fractions_LE, setup.parallel)
    return tensors if setup.config.checkpoint.no_save_optim else tensors | optimizer_state(setup)


def save_run(
    setup: TrainSetup,
    state: TrainState,
    background: BackgroundSaver | None = None,
    done: Callable[[Path], None] = lambda _: None,
) -> None:
    """Saves a checkpoint; all ranks call it together.

    Args:
        background: saves it while training continues, if given.
        done: called with the folder once it is complete.

    Raises:
        CheckpointError: it could not be written, or the one before in the background; earlier ones are as they were.
    """
    checkpoint, tensors = setup.config.checkpoint, run_state(setup, state)
    plain: dict[str, Any] = {**state.plain(), "vocab_size": setup.model.vocab_size}
    if replaced := setup.model.parts.replaced():
        plain[store.PARTS] = dict(replaced)
    if runs_behind_host(setup.parallel.device):
        plain[CUDA_KERNELS] = extension.cuda_kernels_in_use()
    elif (row := cpu_products.in_use()) is not None:
        plain[BF16_PRODUCTS] = row.bf16
    if not checkpoint.no_save_optim:
        plain["optimizer_steps"] = setup.optimizer.num_steps
    what = (checkpoint, state.iteration, tensors, to_mapping(setup.config), plain)
    if background is not None:
        background.start(*what, done, setup.attachments)
    else:
        done(save_checkpoint(*what, setup.parallel, setup.attachments))


def find_run(setup: TrainSetup, problems_of: store.Problems = lambda _: []) -> Path | None:
    """Returns the checkpoint to load: the newest complete one, or that of --ckpt-step; all ranks call it together.

    Args:
        problems_of: as in `store.find_checkpoint`.

    Raises:
        CheckpointError: as `store.find_checkpoint`.
    """
    found = store.find_checkpoint(setup.config.checkpoint, problems_of)
    names = {None if path is None else path.name for path in setup.parallel.world.all_gather_object(found)}
    if len(names) > 1:
        raise CheckpointError(
            f"Ranks see different checkpoints in --load {setup.config.checkpoint.load}: {', '.join(map(str, names))}. Is it a "
            "folder that all hosts share?",
            collective=True,
        )
    return found


def load_run(setup: TrainSetup, state: TrainState, directory: Path) -> TrainState:
    """Fills model and optimizer from a checkpoint and returns the state to resume from.

    Args:
        state: that of a fresh run, which --finetune keeps.

    Raises:
        CheckpointError: the checkpoint is of another model, lacks optimizer state, or is damaged.
    """
    checkpoint = setup.config.checkpoint
    saved, saved_config = store.read_train_state(directory, (*PLAIN_KEYS, "vocab_size")), store.read_config(directory)
    check_same_model(setup, saved_config, saved, directory)
    continues = not (checkpoint.finetune or setup.config.training.skip_train)
    if continues:
        check_same_course(setup, saved_config, directory)
    with_optimizer = continues and not checkpoint.no_load_optim
    if with_optimizer and "optimizer_steps" not in saved:
        raise CheckpointError(f"{directory} has no optimizer state; give --no-load-optim or --finetune to go without.")
    tensors, stored = model_state(setup.model), stored_names(str(directory))
    _refuse_unexpected(setup, tensors, stored, directory)
    fractions = None if state.expert_fractions_LE is None else state.expert_fractions_LE.clone()
    if fractions is not None and not checkpoint.finetune:
        tensors[EXPERT_FRACTIONS] = replicated(fractions, setup.parallel)
    if with_optimizer:
        tensors |= optimizer_state(setup)
        _take_other_precision(setup, tensors, stored)
    load_checkpoint(directory, tensors, setup.parallel)
    setup.buffers.gather_weights()  # where weights came from master weights, each rank has filled its own run
    if with_optimizer:
        setup.optimizer.set_num_steps(saved["optimizer_steps"])
    else:
        setup.optimizer.refresh_masters()
    if continues:
        _remark_on_course(setup, saved_config, saved, directory)
    logger.info(f"loaded {directory}" + (" (weights only)" if checkpoint.finetune else ""))
    if checkpoint.finetune:
        return state
    loaded = TrainState.from_plain(saved, fractions)
    if not setup.config.training.fp16 or math.isclose(loaded.loss_scale.value, 1.0):
        loaded = replace(loaded, loss_scale=state.loss_scale)
    return loaded


def _remark_on_course(
    setup: TrainSetup, saved_config: Mapping[str, Any], saved: Mapping[str, Any], directory: Path
) -> None:
    """Says so where training continues otherwise than it went so far."""
    _remark_on_rate(setup, saved_config, saved, directory)
    _remark_on_router(setup, saved_config, directory)
    _remark_on_teacher(setup, saved_config, saved["iteration"], directory)
    before = (saved_config.get("training") or {}).get("global_batch_size")
    if before != setup.batch_size and saved["consumed_samples"] != saved["iteration"] * setup.batch_size:
        logger.info(
            f"{saved['iteration']} steps took {saved['consumed_samples']} samples in the run so far; from here on a step "
            f"takes {setup.batch_size} (--global-batch-size)"
        )


def _changes(setup: TrainSetup, before: Mapping[str, Any], group: str, names: Iterable[str]) -> list[str]:
    """Returns in words the options of a group, among some, that the run so far had otherwise."""
    now = to_mapping(setup.config)[group]
    changed = [name for name in names if name in before and name in now and before[name] != now[name]]
    return [f"{flag(name)} {before[name]} there, {now[name]} here" for name in changed]


def _known(kind: type, saved: Mapping[str, Any] | None) -> Any:
    """Returns saved options as this version knows them."""
    return kind(**{f.name: saved[f.name] for f in fields(kind) if saved is not None and f.name in saved})


def _remark_on_rate(
    setup: TrainSetup, saved_config: Mapping[str, Any], saved: Mapping[str, Any], directory: Path
) -> None:
    """Says so if the learning rate does not continue as in the run so far: often --train-iters was changed without thought."""
    iteration, samples = saved["iteration"], saved["consumed_samples"]
    training, optimizer = (saved_config.get(group) or {} for group in ("training", "optimizer"))
    if "train_iters" not in training or iteration == 0:  # a model that was converted never had a schedule
        return
    progress = (iteration, samples, setup.batch_size_after(samples))
    was = rate_of_step(_known(OptimizerConfig, optimizer), _known(TrainingConfig, training), *progress)
    now = rate_of_step(setup.config.optimizer, setup.config.training, *progress)
    if math.isclose(was, now, rel_tol=1e-6) or iteration >= setup.config.training.train_iters:
        return
    changed = _changes(setup, training, "training", ("train_iters", "train_samples"))
    changed += _changes(setup, optimizer, "optimizer", (name for name in optimizer if "lr" in name))
    logger.info(
        f"The learning rate of iteration {iteration + 1} is {now:.3e}; the run in {directory} would have gone on at "
        f"{was:.3e} ({', '.join(changed)})"
    )


def _remark_on_router(setup: TrainSetup, saved_config: Mapping[str, Any], directory: Path) -> None:
    """Says so if routers are trained otherwise than so far: losses and rate are not part of the model."""
    balance = ("moe_router_load_balancing_type", "moe_aux_loss_coeff", "moe_aux_loss_group_size", "moe_z_loss_coeff")
    losses = (*balance, "pool_lock_entropy_coeff", "pool_lock_entropy_group_size")
    changed = _changes(setup, saved_config.get("moe") or {}, "moe", losses)
    rate = {"moe_router_lr_mult": 1.0, **(saved_config.get("optimizer") or {})}  # 1 before there was such an option
    changed += _changes(setup, rate, "optimizer", ("moe_router_lr_mult",))
    if changed and setup.model.num_moe_layers:
        logger.info(f"Routers continue otherwise than in the run in {directory}: {', '.join(changed)}")


def _remark_on_teacher(setup: TrainSetup, saved_config: Mapping[str, Any], iteration: int, directory: Path) -> None:
    """Logs it where a teacher would have taught the next step otherwise than it does."""
    before: DistillationConfig = _known(DistillationConfig, saved_config.get("distillation"))
    if not (setup.config.distillation.teaches_after(iteration) or before.teaches_after(iteration)):
        return
    if changed := _changes(setup, asdict(before), "distillation", sorted(asdict(before))):
        logger.info(f"Teaching continues otherwise than in the run in {directory}: {', '.join(changed)}")


def _refuse_unexpected(
    setup: TrainSetup, tensors: Mapping[str, list[ShardedTensor]], stored: set[str], directory: Path
) -> None:
    """Raises CheckpointError naming stored weights that no rank's model has: they would be lost silently."""
    here = setup.parallel.world.all_gather_object(set(tensors))
    unexpected = sorted(name for name in stored.difference(*here) if not name.startswith(("optimizer.", "training.")))
    if unexpected:
        raise CheckpointError(
            f"{directory} holds weights that the model does not have: {', '.join(unexpected[:3])}"
            f"{f' and {len(unexpected) - 3} more' if unexpected[3:] else ''}. Is it of a model with other layers or options?"
        )


def _take_other_precision(setup: TrainSetup, tensors: dict[str, list[ShardedTensor]], stored: set[str]) -> None:
    """Changes which tensors are loaded to those that a checkpoint of another precision has under other names.

    Master weights that an fp32 run did not save are its weights; fp32 weights of a bf16 run are its master weights.

    Raises:
        CheckpointError: optimizer state of a parameter is not there at all.
    """
    for name, piece in setup.optimizer.pieces.items():
        master = f"optimizer.master.{name}"
        if master in tensors and master not in stored:
            tensors[name] = [*tensors.get(name, []), *tensors.pop(master)]
        elif master not in tensors and master in stored:
            # Its memory is the weight's, which has fewer digits in the checkpoint.
            tensors.pop(name, None)
            tensors[master] = sharded(piece.weight, piece.tag.shard, setup.parallel, piece.slice, piece.counts)
    missing = sorted(
        {
            name.split(".", 2)[2]
            for name in tensors
            if name.startswith("optimizer.") and not name.startswith("optimizer.master.") and name not in stored
        }
    )
    if missing:
        raise CheckpointError(
            f"The checkpoint has no optimizer state of {', '.join(missing[:3])}{' and others' if missing[3:] else ''}: "
            "were these frozen there, or trained with another optimizer? Give --no-load-optim to begin with fresh optimizer state."
        )


def check_same_model(
    setup: TrainSetup,
    saved_config: Mapping[str, Any],
    saved_state: Mapping[str, Any],
    directory: Path,
    advice: str = "Give --use-checkpoint-args to take its options, or another --run-dir.",
) -> None:
    """Raises CheckpointError naming the options in which a checkpoint's model differs from the run's, with advice."""
    current = to_mapping(setup.config)
    differences = [
        f"{name} is {saved_config[group][name]!r} there and {current[group][name]!r} here"
        for group, name, _, _, facts in all_options(setup.config)
        if group in CHECKPOINT_GROUPS
        and not facts.may_differ
        and name in (saved_config.get(group) or {})
        and saved_config[group][name] != current[group][name]
    ]
    if saved_state.get("vocab_size") != setup.model.vocab_size:
        differences.append(
            f"the vocabulary has {saved_state.get('vocab_size')} entries there, {setup.model.vocab_size} here"
        )
    parts, saved_parts = dict(setup.model.parts.replaced()), saved_state.get(store.PARTS) or {}
    if parts != saved_parts:
        differences.append(f"parts from outside the package are {saved_parts or 'none'} there, {parts or 'none'} here")
    if differences:
        raise CheckpointError(f"The checkpoint in {directory} is of another model: {'; '.join(differences)}. {advice}")


def check_same_course(setup: TrainSetup, saved_config: Mapping[str, Any], directory: Path) -> None:
    """Checks that what is to come is drawn as in the run so far: noise and order of samples by the seed, from one corpus.

    Raises:
        CheckpointError: the seeds differ and --no-load-rng is not given. Another corpus is only remarked upon: phases
            of a long training often have their own.
    """
    seed, saved_seed = setup.config.training.seed, (saved_config.get("training") or {}).get("seed")
    if saved_seed not in (None, seed) and not setup.config.checkpoint.no_load_rng:
        raise CheckpointError(
            f"The run in {directory} draws noise and order of samples from --seed {saved_seed}, this one from {seed}. "
            f"Give --seed {saved_seed} to continue as it would have, or --no-load-rng to continue with --seed {seed}."
        )
    current, saved_data = to_mapping(setup.config)["data"], saved_config.get("data") or {}
    changed = [name for name in CORPUS_FIELDS if name in saved_data and saved_data[name] != current[name]]
    if changed:
        logger.info(
            f"{', '.join(map(flag, changed))} differ from the run in {directory}; counting of samples continues in the new corpus"
        )
