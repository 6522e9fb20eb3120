"""Saving and loading."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_samoe.config import needs
from megatron_samoe.config.option import BY_RULES, POSITIVE, option


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints: where, how often, what is loaded."""

    save: str | None = option(None)
    """Folder to save checkpoints in."""
    load: str | None = option(None)
    """Folder to load the newest checkpoint from; a fresh start if it has none."""
    pretrained_checkpoint: str | None = option(None)
    """Folder whose newest checkpoint's weights a run starts from, at iteration 0, while --load has no checkpoint yet: as
    --load with --finetune, but an interrupted run started again goes on where it was."""
    save_interval: int | None = option(None, range=POSITIVE, needs=needs.SAVE)
    """Steps between checkpoints; only at the end if not given."""
    save_retain_interval: int | None = option(None, range=POSITIVE, needs=needs.SAVE)
    """Keep checkpoints whose iteration is divisible by this; others give way to newer ones."""
    keep_last: int | None = option(None, range=POSITIVE, needs=needs.SAVE)
    """Newest checkpoints to keep besides; all if neither this nor --save-retain-interval is given."""
    async_save: bool = option(False, needs=needs.SAVE)
    """Save in the background: training waits only while the state is copied."""
    ckpt_step: int | None = option(None, range=BY_RULES, needs=needs.LOAD)
    """Iteration to load in place of the newest."""
    finetune: bool = option(False, needs=needs.LOAD)
    """Load weights only and start at iteration 0."""
    no_save_optim: bool = option(False, needs=needs.SAVE)
    """Leave optimizer state out of checkpoints."""
    no_load_optim: bool = option(False, needs=needs.LOAD)
    """Do not load optimizer state."""
    no_load_rng: bool = option(False, needs=needs.LOAD)
    """Go on with noise and sample order of --seed, where the checkpoint's run had another."""
    use_checkpoint_args: bool = option(False)
    """Take the model's configuration from the checkpoint in --load."""
    exit_on_missing_checkpoint: bool = option(False, needs=needs.LOAD)
    """Stop when --load has no checkpoint."""
