"""Options of checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_samoe.config import needs
from megatron_samoe.config.option import BY_RULES, POSITIVE, option


@dataclass(frozen=True)
class CheckpointConfig:
    """Where checkpoints are saved, how often, and what is loaded."""

    save: str | None = option(None)
    """Folder to save checkpoints in."""
    load: str | None = option(None)
    """Folder to load the newest checkpoint from; a fresh start if it has none."""
    pretrained_checkpoint: str | None = option(None)
    """Folder whose newest checkpoint gives a run its first weights, at iteration 0, while --load has no checkpoint yet.
    It acts as --load with --finetune, but an interrupted run that is started again continues where it was.
    """
    save_interval: int | None = option(None, range=POSITIVE, needs=needs.SAVE)
    """Steps between checkpoints; only at the end if not given."""
    save_retain_interval: int | None = option(None, range=POSITIVE, needs=needs.SAVE)
    """Keep checkpoints whose iteration is divisible by this; newer ones replace the others."""
    keep_last: int | None = option(None, range=POSITIVE, needs=needs.SAVE)
    """Newest checkpoints to keep as well; all if neither this nor --save-retain-interval is given."""
    async_save: bool = option(False, needs=needs.SAVE)
    """Save in the background: training waits only while the state is copied."""
    ckpt_step: int | None = option(None, range=BY_RULES, needs=needs.LOAD)
    """Iteration to load instead of the newest."""
    finetune: bool = option(False, needs=needs.LOAD)
    """Load weights only and start at iteration 0."""
    no_save_optim: bool = option(False, needs=needs.SAVE)
    """Leave optimizer state out of checkpoints."""
    no_load_optim: bool = option(False, needs=needs.LOAD)
    """Do not load optimizer state."""
    no_load_rng: bool = option(False, needs=needs.LOAD)
    """Use the noise and sample order of --seed where the checkpoint's run had another seed."""
    use_checkpoint_args: bool = option(False)
    """Take the model's configuration from the checkpoint in --load."""
    exit_on_missing_checkpoint: bool = option(False, needs=needs.LOAD)
    """Stop when --load has no checkpoint."""
