"""The optimization: batches, schedule, optimizer, precision, evaluation, logs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TrainingConfig:
    """Length of training, batches, precision, evaluation."""

    micro_batch_size: int = 4
    """Sequences per forward pass and data-parallel rank (B)."""
    global_batch_size: int | None = None
    """Sequences per optimizer step over all ranks. Derived if not given: micro batch * data-parallel size."""
    train_iters: int = 100
    """Optimizer steps to train for."""
    exit_interval: int | None = None
    """Save and stop after an iteration that is divisible by this."""
    exit_duration_in_mins: float | None = None
    """Save and stop after this many minutes."""
    eval_interval: int = 100
    """Steps between evaluations; one more always follows the last step."""
    eval_iters: int = 10
    """Global batches of one evaluation; 0 for none."""
    full_validation: bool = False
    """Evaluate every sample of the validation and test data, whatever --eval-iters says, each dataset of a blend whole."""
    skip_train: bool = False
    """Evaluate the checkpoint in --load and leave."""
    seed: int = 1234
    """Seed of initial weights, sample order, dropout and jitter."""
    bf16: bool = False
    """Compute in bfloat16 with fp32 master weights."""
    fp16: bool = False
    """Compute in half precision with fp32 master weights and loss scaling; CUDA only."""
    loss_scale: float | None = None
    """Fixed loss scale for --fp16; dynamic if not given."""
    initial_loss_scale: float = 65536.0
    """First value of the dynamic loss scale."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """full: keep only layer inputs and recompute layers in the backward pass; selective: recompute attention."""
    recompute_num_layers: int | None = None
    """With full: recompute only the first so many layers of a stage; all if not given."""
    spike_window: int = 0
    """Report a step whose loss or gradient norm is far above those of so many steps before, with the numbers of its
    samples; 0 for no report."""
    spike_sigmas: float = 6.0
    """How far above is far, in standard deviations of the window."""
    skip_spikes: bool = False
    """Leave the weights as they are in such a step. Needs --spike-window."""
    deterministic_mode: bool = False
    """Refuse operations that are not deterministic (bitwise equal runs on the same layout)."""
    num_threads: int | None = None
    """CPU threads per rank. Derived if not given: OMP_NUM_THREADS, which under torchrun counts if it is not 1, else cores
    divided by the ranks of this host."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its schedule and clipping."""

    lr: float = 1e-3
    """Highest learning rate."""
    min_lr: float = 0.0
    """Lowest learning rate of the decay."""
    lr_decay_style: Literal["cosine", "linear", "constant", "WSD"] = "cosine"
    """Shape of the decay. WSD: constant, then linear over the last --lr-wsd-decay-iters."""
    lr_decay_iters: int | None = None
    """Steps until the lowest rate. Derived if not given: --train-iters."""
    lr_wsd_decay_iters: int | None = None
    """Length of WSD's final decay. Derived if not given: a tenth of the decay steps."""
    lr_warmup_iters: int = 0
    """Steps of linear warm-up."""
    lr_warmup_fraction: float | None = None
    """Warm-up as a share of the decay steps, in place of --lr-warmup-iters."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; biases, norms and combination coefficients have none."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 for no clipping."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.95
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Added to the root of the second moment."""
    moe_router_lr_mult: float = 0.5
    """Learning rate of the routers relative to --lr."""
    moe_output_lr_mult: float = 1.0
    """Learning rate of the experts' output projections (w2, own or pooled) relative to --lr."""
    samoe_bank_lr_mult: float = 1.0
    """Learning rate of the pool's banks relative to --lr."""
    samoe_coefficient_lr_mult: float = 1.0
    """Learning rate of the combination coefficients relative to --lr."""
    optimizer_backend: Literal["auto", "torch", "apex"] = "auto"
    """auto: NVIDIA apex's FusedAdam where it is importable on CUDA, else torch's fused AdamW."""


@dataclass(frozen=True)
class LoggingConfig:
    """Console, metrics file, TensorBoard."""

    run_dir: str | None = None
    """Folder of the run: checkpoints/, tensorboard/ and metrics.jsonl go there unless --save, --load or
    --tensorboard-dir say otherwise."""
    log_interval: int = 10
    """Steps between log lines."""
    tensorboard_dir: str | None = None
    """Folder of TensorBoard events."""
    metrics_file: str | None = None
    """JSON-lines file with one object per logged step."""
    moe_per_layer_logging: bool = False
    """Log expert load, gradient norm per expert and combination coefficients of each layer."""
    log_progress: bool = False
    """Show a progress bar on rank 0."""
    wandb_project: str | None = None
    """Log to this project of Weights & Biases as well (extra wandb; WANDB_MODE=offline needs no network)."""
    trackio_project: str | None = None
    """Log to this project of trackio as well, which keeps it on this machine (extra trackio)."""
    exp_name: str | None = None
    """Name of the run in both. Derived if not given: the last part of --run-dir."""
    profile: bool = False
    """Profile some steps of some ranks with torch's profiler; traces go to profile/ in --run-dir or --save."""
    profile_step_start: int = 10
    """First step that is profiled."""
    profile_step_end: int = 12
    """First step that is not profiled any more."""
    profile_ranks: tuple[int, ...] = (0,)
    """Ranks that are profiled."""
