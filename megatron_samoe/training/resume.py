"""Where a run starts: from which checkpoint, after how many steps, and with which teacher."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from megatron_samoe.config.checkpoint import CheckpointConfig
from megatron_samoe.config.cli import Asked
from megatron_samoe.config.derived import with_train_iters
from megatron_samoe.config.elastic import fit_to_ranks
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.dist_checkpointing import store
from megatron_samoe.dist_checkpointing.loading import load_newest
from megatron_samoe.dist_checkpointing.teacher import teacher_of
from megatron_samoe.log import logger
from megatron_samoe.parallel_state.state import ParallelState
from megatron_samoe.runtime.kernels import Kernels
from megatron_samoe.training.checkpointing import check_same_model, find_run, load_run
from megatron_samoe.training.setup import TrainSetup
from megatron_samoe.training.state import BF16_PRODUCTS, CUDA_KERNELS, PLAIN_KEYS, TrainState
from megatron_samoe.training.teacher import load_teacher


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        checkpoint: the options of checkpoints, with what --pretrained-checkpoint means for this start.
        iteration, samples: that the run has behind it.
        kernels: that it has used so far.
        is_taught: whether the next step has a teacher.
    """

    checkpoint: CheckpointConfig
    iteration: int = 0
    samples: int = 0
    kernels: Kernels = field(default_factory=Kernels)
    is_taught: bool = False

    def settle(self, config: PretrainConfig, world_size: int) -> PretrainConfig:
        """Returns the start of a run: the steps that --train-samples makes from here, and the checkpoint to resume from."""
        config = with_train_iters(config, world_size, (self.iteration, self.samples))
        return replace(config, checkpoint=self.checkpoint)


def on_ranks(asked: Asked, world_size: int) -> tuple[Asked, PretrainConfig, int]:
    """Returns the request with the checkpoint's part of it, the legal configuration that it is on these ranks, and
    how many of them it uses.

    Raises:
        ConfigErrors: naming every rule that it breaks.
        CheckpointError: --use-checkpoint-args reads a checkpoint that is damaged.
    """
    checkpoint = asked.config.with_run_dir().checkpoint
    directory = store.find_checkpoint(store.with_start(checkpoint)) if checkpoint.use_checkpoint_args else None
    if directory is not None:
        asked = asked.with_checkpoint(store.read_config(directory))
    config = asked.settled()
    return asked, *fit_to_ranks(config, world_size, teacher_of(config) if config.parallel.elastic else None)


def find_start(config: PretrainConfig, parallel: ParallelState) -> tuple[PretrainConfig, Start]:
    """Returns what a run trains with, and where it starts; all ranks call it together."""
    # A dying attempt may be saving, so ranks that look one after the other may see different things: rank 0's counts.
    start: Start = parallel.world.all_gather_object(_seen(config.checkpoint))[0]
    config = start.settle(config, parallel.world_size)
    return config, replace(start, is_taught=is_taught(config, start.iteration))


def _seen(options: CheckpointConfig) -> Start:
    """Returns where training starts, as this rank sees it."""
    checkpoint = store.with_start(options)
    directory = None if checkpoint.finetune else store.find_checkpoint(checkpoint)
    if directory is None:
        return Start(checkpoint)
    saved = store.read_train_state(directory, PLAIN_KEYS)
    kernels = Kernels(saved.get(CUDA_KERNELS), saved.get(BF16_PRODUCTS))
    return Start(checkpoint, saved["iteration"], saved["consumed_samples"], kernels)


def is_taught(config: PretrainConfig, iteration: int) -> bool:
    """Returns whether the step after a number of steps has a teacher."""
    training = config.training
    ends = training.skip_train or iteration >= training.train_iters
    return not ends and config.distillation.teaches_after(iteration)


def resume(setup: TrainSetup, fresh: TrainState) -> tuple[TrainSetup, TrainState]:
    """Returns a set-up, and the state of its run, that resume the checkpoint, if any; with the teacher of the
    next step, if it has one. All ranks call it together.

    Args:
        fresh: state of a run that has not begun.

    Raises:
        CheckpointError: a checkpoint is damaged, or of another model; or --save holds checkpoints of another one.
    """
    checkpoint, training = setup.config.checkpoint, setup.config.training
    if not training.skip_train:
        _remark_on_saving(checkpoint)
        _keep_others(setup)

    def load(problems_of: store.Problems) -> TrainState | None:
        found = find_run(setup, problems_of)
        return None if found is None else load_run(setup, fresh, found)

    loaded = load_newest(load, setup.parallel)
    state = fresh if loaded is None else loaded
    if loaded is None and checkpoint.load:
        logger.info(f"no checkpoint in {checkpoint.load}: starting from the beginning")
    if is_taught(setup.config, state.iteration):
        setup = replace(setup, teacher=load_teacher(setup.config, setup.model))
    return setup, state


def _remark_on_saving(checkpoint: CheckpointConfig) -> None:
    """Says so where nothing is saved, or earlier checkpoints are to be replaced."""
    if checkpoint.save is None:
        logger.info("no --save and no --run-dir: the model is gone when this run ends")
        return
    done = store.whole_iterations(checkpoint.save) if checkpoint.finetune else []
    if done and checkpoint.save != checkpoint.load:
        logger.info(
            f"--finetune starts at iteration 0 though --save {checkpoint.save} has iteration {done[-1]}, and will "
            f"replace its checkpoints. To continue from there, give --load {checkpoint.save} --pretrained-checkpoint "
            f"{checkpoint.load} instead of --load and --finetune."
        )


def _keep_others(setup: TrainSetup) -> None:
    """Raises CheckpointError where the folder to save in holds checkpoints of another model, which would be replaced or taken
    for this run's.
    """
    checkpoint = setup.config.checkpoint
    if checkpoint.save is None or checkpoint.save == checkpoint.load:  # what is loaded is compared then
        return
    for iteration in store.whole_iterations(checkpoint.save)[-1:]:
        directory = store.iteration_dir(checkpoint.save, iteration)
        saved = store.read_train_state(directory, (*PLAIN_KEYS, "vocab_size"))
        advice = "Give another --save or --run-dir."
        check_same_model(setup, store.read_config(directory), saved, directory, advice)
