"""Options of the training loop: batches, schedule, optimizer, precision, evaluation, logs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_samoe.config import needs
from megatron_samoe.config.option import ABOVE_ZERO, AT_LEAST_ZERO, BELOW_ONE, BY_RULES, LARGEST, POSITIVE, option


@dataclass(frozen=True)
class TrainingConfig:
    """The length of training, batches, precision and evaluation."""

    micro_batch_size: int = option(4, range=POSITIVE, largest=10_000_000)
    """Sequences per forward pass and data-parallel rank (B)."""
    global_batch_size: int | None = option(None, range=POSITIVE, largest=10_000_000)
    """Sequences per optimizer step over all ranks. Derived if not given: micro batch * data-parallel size."""
    train_iters: int = option(100, range=AT_LEAST_ZERO)
    """Optimizer steps to train for."""
    train_samples: int | None = option(None, range=POSITIVE)
    """Sequences to train for, instead of --train-iters, which follows from them. The rate then follows the samples."""
    rampup_batch_size: tuple[int, int, int] | None = option(
        None, range=POSITIVE, largest=LARGEST, needs=needs.TRAIN_SAMPLES
    )
    """Three numbers: the first steps' batch size, the increment by which it grows to --global-batch-size, and the samples
    over which it does, in equal parts."""
    exit_interval: int | None = option(None, range=POSITIVE)
    """Save and stop after an iteration that is divisible by this."""
    exit_duration_in_mins: float | None = option(None, range=ABOVE_ZERO)
    """Save and stop after this many minutes."""
    eval_interval: int = option(100, range=POSITIVE)
    """Steps between evaluations; one more always follows the last step."""
    eval_iters: int = option(10, range=AT_LEAST_ZERO, largest=10_000_000)
    """Global batches of one evaluation; 0 for none."""
    full_validation: bool = option(False)
    """Evaluate every sample of the validation and test data, whatever --eval-iters says, all of each dataset of a blend."""
    skip_train: bool = option(False)
    """Evaluate the checkpoint in --load and stop."""
    seed: int = option(1234, range=AT_LEAST_ZERO, largest=2**32 - 1)
    """Seed of initial weights, sample order, dropout and jitter."""
    bf16: bool = option(False)
    """Compute in bfloat16 with fp32 master weights."""
    fp16: bool = option(False)
    """Compute in half precision with fp32 master weights and loss scaling; CUDA only."""
    loss_scale: float | None = option(None, range=ABOVE_ZERO, needs=needs.FP16)
    """Fixed loss scale for --fp16; dynamic if not given."""
    initial_loss_scale: float = option(65536.0, range=ABOVE_ZERO, needs=needs.FP16)
    """First value of the dynamic loss scale."""
    recompute_granularity: Literal["full", "selective"] | None = option(None)
    """full: keep only layer inputs and recompute layers in the backward pass; selective: recompute only attention."""
    recompute_num_layers: int | None = option(None, range=POSITIVE, needs=needs.FULL_RECOMPUTE)
    """With full: number of first layers of a stage to recompute; all if not given."""
    fused_linear_cross_entropy: bool = option(False)
    """Compute the logits of some tokens at a time, and again in the backward pass: none are kept, which large vocabularies are
    glad of. Not while a teacher teaches, who compares logits."""
    spike_window: int = option(0, range=AT_LEAST_ZERO)
    """Report a step whose loss or gradient norm is far above those of this many steps before, with the numbers of its
    samples; 0 for no report."""
    spike_sigmas: float = option(6.0, range=ABOVE_ZERO, needs=needs.SPIKE_WINDOW)
    """How far above the mean a spike is, in standard deviations of the window."""
    skip_spikes: bool = option(False, needs=needs.SPIKE_WINDOW)
    """Leave the weights as they are in such a step. Needs --spike-window."""
    deterministic_mode: bool = option(False)
    """Refuse operations that are not deterministic (bitwise equal runs on the same layout)."""
    num_threads: int | None = option(None, range=POSITIVE, largest=4096)
    """CPU threads per rank. Derived if not given: OMP_NUM_THREADS, which under torchrun counts if it is not 1, else cores
    divided by the ranks of this host."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Muon, their schedule and clipping."""

    optimizer: Literal["adam", "muon"] = option("adam")
    """adam: AdamW. muon: Muon for the matrices of attention, MLPs and experts; AdamW for embeddings, output matrix, routers,
    coefficients and vectors."""
    lr: float = option(1e-3, range=AT_LEAST_ZERO)
    """Highest learning rate."""
    min_lr: float = option(0.0, range=AT_LEAST_ZERO)
    """Lowest learning rate of the decay."""
    lr_decay_style: Literal["cosine", "linear", "constant", "WSD"] = option("cosine")
    """Shape of the decay. WSD: constant, then linear over the last --lr-wsd-decay-iters."""
    lr_decay_iters: int | None = option(None, range=POSITIVE)
    """Steps until the lowest rate. Derived if not given: --train-iters."""
    lr_decay_samples: int | None = option(None, range=POSITIVE, needs=needs.TRAIN_SAMPLES)
    """Samples until the lowest rate. Derived if not given: --train-samples."""
    lr_wsd_decay_iters: int | None = option(None, range=POSITIVE, needs=needs.WSD)
    """Length of WSD's final decay. Derived if not given: a tenth of the decay steps."""
    lr_wsd_decay_samples: int | None = option(None, range=POSITIVE, needs=needs.WSD_SAMPLES)
    """The same in samples. Derived if not given: a tenth of the decay samples."""
    lr_warmup_iters: int = option(0, range=AT_LEAST_ZERO)
    """Steps of linear warm-up."""
    lr_warmup_samples: int = option(0, range=AT_LEAST_ZERO, needs=needs.TRAIN_SAMPLES)
    """Samples of linear warm-up."""
    lr_warmup_fraction: float | None = option(None, range=BY_RULES)
    """Warm-up as a share of the decay steps or samples, instead of --lr-warmup-iters or --lr-warmup-samples."""
    weight_decay: float = option(0.1, range=AT_LEAST_ZERO)
    """Decoupled weight decay of matrices; biases, norms and coefficients of banks have none."""
    clip_grad: float = option(1.0, range=AT_LEAST_ZERO)
    """Largest global gradient norm; 0 for no clipping."""
    adam_beta1: float = option(0.9, range=BELOW_ONE)
    """Decay of the first moment."""
    adam_beta2: float = option(0.95, range=BELOW_ONE)
    """Decay of the second moment."""
    adam_eps: float = option(1e-8, range=ABOVE_ZERO)
    """Added to the root of the second moment."""
    moe_router_lr_mult: float = option(0.5, range=ABOVE_ZERO, needs=needs.EXPERTS)
    """Learning rate of the routers relative to --lr."""
    moe_expert_lr_mult: float = option(1.0, range=ABOVE_ZERO, needs=needs.EXPERTS)
    """Learning rate of routed experts, own or pooled, relative to --lr."""
    moe_output_lr_mult: float = option(1.0, range=ABOVE_ZERO, needs=needs.EXPERTS)
    """Learning rate of the experts' output projections (w2, own or pooled) relative to that of experts."""
    samoe_bank_lr_mult: float = option(1.0, range=ABOVE_ZERO, needs=needs.SHARING)
    """Learning rate of the pool's banks relative to that of experts."""
    samoe_coefficient_lr_mult: float = option(1.0, range=ABOVE_ZERO, needs=needs.TRAINED_COEFFICIENTS)
    """Learning rate of the coefficients of banks relative to --lr."""
    muon_momentum: float = option(0.95, range=BELOW_ONE, needs=needs.MUON)
    """Decay of Muon's momentum."""
    muon_use_nesterov: bool = option(True, needs=needs.MUON)
    """Look one step ahead (Nesterov)."""
    muon_num_ns_steps: int = option(5, range=POSITIVE, largest=100, needs=needs.MUON)
    """Newton-Schulz steps of an update."""
    muon_scale_mode: Literal["spectral", "unit_rms_norm", "shape_scaling"] = option("spectral", needs=needs.MUON)
    """Scale of a matrix's update by its outputs a and inputs b. spectral: sqrt(max(a, b)); unit_rms_norm: sqrt(a / b);
    shape_scaling: sqrt(max(1, a / b))."""
    muon_extra_scale_factor: float = option(0.2, range=ABOVE_ZERO, needs=needs.MUON)
    """Extra factor. 0.2 with spectral gives updates the size of AdamW's, whose rate and decay then carry over."""
    muon_split_qkv: bool = option(True, needs=needs.MUON)
    """Take queries, keys and values of the fused projection as a matrix each."""
    muon_ns_dtype: Literal["fp32", "bf16"] = option("fp32", needs=needs.MUON)
    """Precision of the Newton-Schulz products."""
    lr_mult_patterns: tuple[str, ...] = option(())
    """PATTERN=FACTOR for each: the learning rate of parameters whose name a regular expression matches, relative to what it
    would be; 0 freezes them."""
    weight_decay_mult_patterns: tuple[str, ...] = option(())
    """PATTERN=FACTOR for each: weight decay of parameters whose name a regular expression matches, relative to what it
    would be."""
    optimizer_backend: Literal["auto", "torch", "apex"] = option("auto")
    """auto: NVIDIA apex's FusedAdam where it is importable on CUDA, else torch's fused AdamW."""


@dataclass(frozen=True)
class LoggingConfig:
    """Console, metrics file, TensorBoard."""

    run_dir: str | None = option(None)
    """Folder of the run: checkpoints/, tensorboard/ and metrics.jsonl go there unless --save, --load or
    --tensorboard-dir say otherwise."""
    log_interval: int = option(10, range=POSITIVE)
    """Steps between log lines."""
    tensorboard_dir: str | None = option(None)
    """Folder of TensorBoard events."""
    metrics_file: str | None = option(None)
    """JSON-lines file with one object per logged step."""
    moe_per_layer_logging: bool = option(False)
    """Log expert load, gradient norm per expert and coefficients of each layer."""
    log_progress: bool = option(False)
    """Show a progress bar on rank 0."""
    wandb_project: str | None = option(None)
    """Log to this project of Weights & Biases as well (extra wandb; WANDB_MODE=offline needs no network)."""
    trackio_project: str | None = option(None)
    """Log to this project of trackio as well, which keeps it on this machine (extra trackio)."""
    exp_name: str | None = option(None, needs=needs.TRACKERS)
    """Name of the run in both. Derived if not given: the last part of --run-dir."""
    profile: bool = option(False)
    """Profile some steps of some ranks with torch's profiler; traces go to profile/ in --run-dir or --save."""
    profile_step_start: int = option(10, range=BY_RULES, needs=needs.PROFILE)
    """First profiled step."""
    profile_step_end: int = option(12, range=BY_RULES, needs=needs.PROFILE)
    """First step after the profiled ones."""
    profile_ranks: tuple[int, ...] = option((0,), range=BY_RULES, needs=needs.PROFILE)
    """Ranks that are profiled."""


@dataclass(frozen=True)
class DistillationConfig:
    """Options of distillation from a teacher."""

    teacher: str | None = option(None)
    """Folder of a run, of checkpoints, or of one checkpoint, whose newest model teaches. The loss is cross-entropy plus
    weight * T^2 * KL(teacher || student) over the vocabulary, at temperature T. It may have any layers, widths and experts,
    and the same vocabulary."""
    teacher_temperature: float = option(1.0, range=ABOVE_ZERO, needs=needs.TEACHER)
    """T, by which the logits of both are divided."""
    teacher_weight: float = option(1.0, range=ABOVE_ZERO, needs=needs.TEACHER)
    """Weight of the divergence, which is added to the cross-entropy."""
    teacher_until: int | None = option(None, range=POSITIVE, needs=needs.TEACHER)
    """Last optimizer step that the teacher teaches; from there on it takes no memory and no time, and steps are plain
    ones. Derived if not given: --train-iters."""

    def teaches_after(self, iteration: int) -> bool:
        """Whether the step after a number of steps has a teacher."""
        return self.teacher is not None and (self.teacher_until is None or iteration < self.teacher_until)
