"""Flags of other programs, and what they are here: for messages, and for the page on coming from Megatron-LM.

Flags of Megatron-LM's GPT pretraining that are not listed have the same name here (docs/from_megatron.md), or belong to
what this program is not for: other models than GPT, retrieval, vision, reinforcement learning, NVIDIA's services.
"""

from __future__ import annotations

from collections.abc import Mapping

#: Flags of other trainers that have another name here.
RENAMED: Mapping[str, str] = {
    "--learning-rate": "--lr", "--max-lr": "--lr", "--batch-size": "--global-batch-size", "--max-steps": "--train-iters",
    "--num-steps": "--train-iters", "--epochs": "--train-iters", "--num-train-epochs": "--train-iters",
    "--per-device-train-batch-size": "--micro-batch-size", "--warmup-steps": "--lr-warmup-iters",
    "--warmup-ratio": "--lr-warmup-fraction", "--max-grad-norm": "--clip-grad", "--output-dir": "--run-dir",
    "--load-teacher": "--teacher", "--export-kd-teacher-load": "--teacher", "--kd-temp": "--teacher-temperature",
    "--kd-beta-ce": "--teacher-weight", "--resume": "--load", "--num-experts-per-tok": "--moe-router-topk", "--top-k": "--moe-router-topk",
    # Megatron-LM's
    "--window-size": "--sliding-window (which counts the token itself: one more than the tokens before it)",
    "--rope-type": "--rope-scaling-type", "--rotary-scaling-factor": "--rope-scaling-factor",
    "--recompute-activations": "--recompute-granularity selective", "--muon-no-split-qkv": "--no-muon-split-qkv",
    "--muon-nesterov": "--muon-use-nesterov", "--muon-fp32-matmul-prec": "--muon-ns-dtype",
    "--use-rope-scaling": "--rope-scaling-type llama3", "--decoupled-min-lr": "--lr-mult-patterns",
    "--apply-wd-to-qk-layernorm": "--weight-decay-mult-patterns",
    "--check-for-spiky-loss": "--spike-window",
    "--check-weight-hash-across-dp-replicas-interval": "--pool-replica-check-interval", "--wandb-exp-name": "--exp-name",
    "--model-parallel-size": "--tensor-model-parallel-size", "--persistent-save-interval": "--save-interval",
    "--moe-extended-tp": "--expert-tensor-parallel-size", "--checkpoint-activations": "--recompute-granularity full",
    "--decoder-first-pipeline-num-layers": "--pipeline-model-parallel-layout",
    "--decoder-last-pipeline-num-layers": "--pipeline-model-parallel-layout",
    "--account-for-embedding-in-pipeline-split": "--pipeline-model-parallel-layout",
    "--account-for-loss-in-pipeline-split": "--pipeline-model-parallel-layout",
    "--num-virtual-stages-per-pipeline-rank": "--num-layers-per-virtual-pipeline-stage",
    "--decoupled-lr": "--lr-mult-patterns", "--overlap-moe-expert-parallel-comm": "--moe-dispatch-chunks",
    "--decrease-batch-size-if-needed": "--elastic", "--rotary-seq-len-interpolation-factor": "--rope-scaling-type linear",
}  # fmt: skip
#: Flags of Megatron-LM that need none here: what they ask for is so without them, or cannot be otherwise.
ALWAYS_SO: Mapping[str, str] = {
    "--use-mcore-models": "there is one implementation of the model",
    "--transformer-impl": "there is one implementation of the model",
    "--use-flash-attn": "torch's fused attention is used wherever it has what scores need",
    "--attention-backend": "torch's fused attention is used wherever it has what scores need",
    "--moe-grouped-gemm": "the experts of a rank are always computed together",
    "--moe-permute-fusion": "tokens are always permuted by one op",
    "--moe-token-dispatcher-type": "tokens always go by all-to-all, among ranks that hold a layer's experts",
    "--moe-router-dtype": "routers compute in fp32, or in fp64 where the model does",
    "--accumulate-allreduce-grads-in-fp32": "gradients are always summed and reduced in fp32",
    "--attention-softmax-in-fp32": "the softmax of attention is in fp32 wherever it is computed here",
    "--gradient-accumulation-fusion": "gradients of weights are added to fp32 sums where they are made",
    "--no-gradient-accumulation-fusion": "gradients of weights are added to fp32 sums where they are made",
    "--use-cpu-initialization": "initial weights are the same in every layout, on every device",
    "--no-save-rng": "noise follows from the seed and the sample, so there is no generator to save",
    "--exit-signal-handler": "SIGTERM, SIGINT and SIGUSR1 always save and leave",
    "--check-for-nan-in-loss-and-grad": "a loss or gradient that is not finite is always found",
    "--calculate-per-token-loss": "the loss is always a mean over the tokens of the global batch",
    "--cross-entropy-loss-fusion": "the cross-entropy is one op wherever the extension serves the device",
    "--cross-entropy-fusion-impl": "--fused-linear-cross-entropy is what `linear` is; all else is one op in any case",
    "--no-masked-softmax-fusion": "there is no such choice here",
    "--no-bias-gelu-fusion": "there is no such choice here",
    "--no-bias-swiglu-fusion": "there is no such choice here",
    "--no-bias-dropout-fusion": "there is no such choice here",
    "--no-rope-fusion": "there is no such choice here",
    "--ckpt-format": "checkpoints are torch.distributed.checkpoint's and load in any layout; `megatron-samoe convert` reads and "
                     "writes format torch",
    "--auto-detect-ckpt-format": "checkpoints have one format",
    "--ckpt-fully-parallel-load": "ranks always share reading and writing",
    "--dist-ckpt-strictness": "every parameter of a checkpoint must have its place",
    "--log-throughput": "tokens per second are always logged",
    "--timing-log-level": "`--profile` shows where time goes",
    "--log-timers-to-tensorboard": "step times are always there",
    "--log-validation-ppl-to-tensorboard": "perplexities are always there",
    "--log-memory-to-tensorboard": "peak memory is always there",
    "--tensorboard-log-interval": "--log-interval is for every log",
    "--log-straggler": "own time and the slowest rank are always recorded",
    "--use-pytorch-profiler": "--profile uses it",
    "--multiple-validation-sets": "each dataset of a blend has its own validation loss",
    "--moe-pad-expert-input-to-capacity": "experts compute the rows that they have; a capacity drops, and pads nothing",
    "--disable-gloo-process-groups": "gloo's groups are made where something uses them",
    "--no-create-attention-mask-in-dataloader": "no mask is made; --reset-attention-mask attends within documents",
    "--muon-tp-mode": "each matrix is made orthogonal whole, whichever ranks hold it",
    "--muon-scalar-optimizer": "AdamW updates what is no matrix",
    "--cache-mla-latents": "decoding keeps the latents",
    "--no-async-tensor-model-parallel-allreduce": "it has no effect in Megatron-LM either",
}  # fmt: skip
#: Flags of Megatron-LM that have no counterpart, with what there is.
MISSING: Mapping[str, str] = {
    "--hierarchical-context-parallel-sizes": "--cp-comm-type is p2p or a2a, not both at once",
    "--overlap-param-gather": "parameters are gathered after the step",
    "--use-megatron-fsdp": "sharding goes as far as ZeRO-1 and a sharded pool (--samoe-pool-placement)",
    "--use-torch-fsdp2": "sharding goes as far as ZeRO-1 and a sharded pool (--samoe-pool-placement)",
    "--num-distributed-optimizer-instances": "ZeRO-1 shards over all data-parallel ranks",
    "--fp8-format": "there is fp32, --bf16 and --fp16",
    "--optimizer-cpu-offload": "optimizer state stays with its parameters; --use-distributed-optimizer shards it",
    "--cpu-offloading-num-layers": "--recompute-granularity full saves the memory",
    "--recompute-method": "--recompute-num-layers counts the first layers of a stage (block)",
    "--recompute-modules": "selective recomputes the core of attention",
    "--tp-comm-overlap": "it is Transformer Engine's",
    "--squared-relu": "there is GELU and --swiglu",
    "--quick-geglu": "there is GELU and --swiglu",
    "--apply-layernorm-1p": "norms have their weights as they are",
    "--mtp-num-layers": "the model predicts the next token alone",
    "--qk-l2-norm": "--qk-layernorm norms queries and keys",
    "--no-rope-freq": "positions are the same in all layers",
    "--apply-query-key-layer-scaling": "attention has the usual scale in all layers",
    "--fp32-residual-connection": "the residual stream has the model's precision",
    "--grad-reduce-in-bf16": "gradients are reduced in fp32",
    "--muon-coefficient-type": "Newton-Schulz has Jordan's coefficients",
    "--qk-clip": "--qk-layernorm or --attn-logit-softcapping bound what attention sees",
    "--qk-clip-threshold": "--qk-layernorm or --attn-logit-softcapping bound what attention sees",
    "--qk-clip-alpha": "--qk-layernorm or --attn-logit-softcapping bound what attention sees",
    "--attention-output-gate": "attention's output goes on as it is",
    "--rotary-interleaved": "channels rotate in halves",
    "--mscale": "--attention-multiplier scales scores",
    "--mscale-all-dim": "--attention-multiplier scales scores: (0.1 x mscale x ln(factor) + 1)^2 over the root of a query's channels",
    "--weight-decay-incr-style": "--weight-decay stays the same",
    "--start-weight-decay": "--weight-decay stays the same",
    "--end-weight-decay": "--weight-decay stays the same",
    "--sgd-momentum": "--optimizer is adam or muon; docs/extending.md shows an SGD from outside",
    "--lr-wsd-decay-style": "WSD decays along a line",
    "--lr-warmup-init": "warmup begins at 0",
    "--override-opt-param-scheduler": "the flags always decide; what differs from the checkpoint's is said",
    "--override-opt_param-scheduler": "the flags always decide; what differs from the checkpoint's is said",
    "--use-checkpoint-opt-param-scheduler": "give the flags of the first run",
    "--use-checkpoint-opt_param-scheduler": "give the flags of the first run",
    "--embedding-init-method-std": "--init-method-std is for all",
    "--init-method-xavier-uniform": "weights are drawn from a normal distribution",
    "--data-parallel-random-init": "initial weights are the same in every layout",
    "--non-persistent-save-interval": "--async-save and --keep-last make frequent checkpoints cheap",
    "--min-loss-scale": "the loss scale may fall as far as it must",
    "--hysteresis": "the loss scale falls at the first overflow",
    "--use-tp-pp-dp-mapping": "ranks are numbered tp, cp, ep, dp, pp",
    "--data-args-path": "a YAML file names blends (docs/data.md)",
    "--per-split-data-args-path": "a YAML file names blends (docs/data.md)",
    "--moe-use-upcycling": "`megatron-samoe edit upcycle` makes a MoE of a dense checkpoint",
    "--moe-router-force-load-balancing": "routers always choose",
    "--log-params-norm": "norms of gradients are recorded",
    "--log-num-zeros-in-grad": "norms of gradients are recorded",
    "--manual-gc": "Python's collector runs by itself",
    "--iterations-to-skip": "--skip-spikes leaves weights as they are in steps whose loss is far off",
    "--moe-enable-deepep": "tokens go by this program's own all-to-all",
    "--moe-apply-probs-on-input": "outputs are weighed",
    "--wandb-entity": "the environment variable WANDB_ENTITY says it",
    "--wandb-save-dir": "it lies in --run-dir",
}  # fmt: skip


def what_it_is_here(name: str) -> str | None:
    """Returns what a flag of another program is here, for a message; None for one that is not known."""
    if (ours := RENAMED.get(name)) is not None:
        return f"is no option; this program's name for it is {ours}"
    if (reason := ALWAYS_SO.get(name)) is not None:
        return f"is no option here; leave it out: {reason}"
    return None if (reason := MISSING.get(name)) is None else f"is not there: {reason}"
