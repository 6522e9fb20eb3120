"""Pretraining by Megatron-Core, with layers that share experts.

    megatron-samoe preprocess --input novel.txt --document-kb 8 --tokenizer-type ByteTokenizer --append-eod --output-prefix corpus
    torchrun --nproc-per-node 4 examples/megatron_core/pretrain_pool.py --data-path corpus_text_document --vocab-size 257 \
        --pipeline-model-parallel-size 2 --expert-model-parallel-size 2 --expert-sharing combined --num-expert-banks 2

Model, data set, router, dispatcher, data parallelism, optimizer, schedule and checkpoints are Megatron-Core's. The lines that
mention `sharing` are what a pretrain_gpt.py would have more; --expert-sharing none leaves them out. Tensor parallelism is not
offered: MoE layers then need sequence parallelism, which torch's RMSNorm in this spec refuses. Transformer Engine's spec has it.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_samoe.plugins.megatron_core import ExpertSharing


class Tokens:
    """What a data set of ids that are there asks of a tokenizer."""

    def __init__(self, vocab_size: int):
        self.vocab_size, self.eod, self.pad = vocab_size, vocab_size - 1, -1
        self.unique_identifiers = {"class": "Tokens", "vocab_size": vocab_size}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", required=True, help="prefix of a .bin and .idx")
    parser.add_argument("--save", help="folder for a torch_dist checkpoint at the end")
    parser.add_argument("--expert-sharing", default="combined", help="a way, or none for experts of each layer's own")
    parser.add_argument("--num-expert-banks", type=int, help="of a way that combines banks")
    parser.add_argument("--pool-lock-step", type=int, help="of --expert-sharing pool")
    parser.add_argument("--use-distributed-optimizer", action="store_true")
    parser.add_argument("--overlap-grad-reduce", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    sizes = {
        "vocab-size": 257, "seq-length": 128, "train-iters": 50, "micro-batch-size": 2, "global-batch-size": 8, "num-layers": 4,
        "hidden-size": 64, "num-attention-heads": 4, "num-experts": 8, "moe-ffn-hidden-size": 128, "moe-router-topk": 2,
        "pipeline-model-parallel-size": 1, "expert-model-parallel-size": 1,
    }  # fmt: skip
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=3e-3)
    return parser.parse_args()


def model_config(args: argparse.Namespace, on_gpu: bool) -> TransformerConfig:
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    return TransformerConfig(
        num_layers=args.num_layers, hidden_size=args.hidden_size, num_attention_heads=args.num_attention_heads,
        num_moe_experts=args.num_experts, moe_ffn_hidden_size=args.moe_ffn_hidden_size, moe_router_topk=args.moe_router_topk,
        moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.01, moe_token_dispatcher_type="alltoall",
        normalization="RMSNorm", gated_linear_unit=True, activation_func=torch.nn.functional.silu, add_bias_linear=False,
        attention_dropout=0.0, hidden_dropout=0.0, bias_dropout_fusion=False, masked_softmax_fusion=False,
        gradient_accumulation_fusion=False, apply_rope_fusion=False, use_cpu_initialization=not on_gpu,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size, expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=1, bf16=args.bf16, params_dtype=dtype, pipeline_dtype=dtype,
    )  # fmt: skip


def arguments(args: argparse.Namespace) -> argparse.Namespace:
    """Returns what Megatron-LM's training program would keep of its command line: by it `megatron-samoe convert` knows the model."""
    shared = {} if args.expert_sharing == "none" else {"expert_sharing": args.expert_sharing}
    banks = {"num_expert_banks": args.num_expert_banks} if args.num_expert_banks else {}
    same = "num_layers hidden_size num_attention_heads num_experts moe_ffn_hidden_size moe_router_topk seq_length vocab_size bf16"
    return argparse.Namespace(
        **{name: getattr(args, name) for name in same.split()}, **shared, **banks, pool_lock_step=args.pool_lock_step,
        ffn_hidden_size=4 * args.hidden_size, max_position_embeddings=args.seq_length, position_embedding_type="rope",
        rotary_base=10000, rotary_percent=1.0, normalization="RMSNorm", norm_epsilon=1e-5, swiglu=True, add_bias_linear=False,
        untie_embeddings_and_output_weights=True, moe_aux_loss_coeff=0.01, moe_router_load_balancing_type="aux_loss",
        micro_batch_size=args.micro_batch_size, make_vocab_size_divisible_by=1,
    )  # fmt: skip


def dataset(args: argparse.Namespace) -> Any:
    """Returns Megatron-Core's data set; all ranks call it together."""
    config = GPTDatasetConfig(
        random_seed=1234, sequence_length=args.seq_length, blend=([args.data_path], None), split="1,0,0",
        tokenizer=Tokens(args.vocab_size), reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
        create_attention_mask=False, path_to_cache=os.path.join(os.path.dirname(args.data_path) or ".", "cache"),
    )  # fmt: skip
    count = args.train_iters * args.global_batch_size
    return BlendedMegatronDatasetBuilder(GPTDataset, [count, None, None], lambda: True, config).build()[0]


def samples(args: argparse.Namespace, train: Any) -> Any:
    """Yields this rank's micro-batches, on every pipeline stage the same."""
    count = args.train_iters * args.global_batch_size
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    for first in range(rank * args.micro_batch_size, count, size * args.micro_batch_size):
        rows = [train[i] for i in range(first, first + args.micro_batch_size)]
        yield {
            name: torch.stack([row[name] for row in rows]).cuda()
            for name in ("tokens", "labels", "position_ids", "loss_mask")
        }


def forward_step(batches: Any, model: Any) -> Any:
    batch = next(batches)
    length = batch["tokens"].shape[1]
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=batch["tokens"].device).triu(1)
    losses = model(batch["tokens"], batch["position_ids"], mask, labels=batch["labels"])

    def loss(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        mean = (losses.float() * batch["loss_mask"]).sum() / batch["loss_mask"].sum()
        return mean, {"loss": mean.detach().clone()}  # the first is divided in its place

    return losses, loss


def main() -> None:
    args = parsed()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size, expert_tensor_parallel_size=1,
    )  # fmt: skip
    model_parallel_cuda_manual_seed(1234)
    config = model_config(args, on_gpu)
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    sharing = None
    if args.expert_sharing != "none":
        options = {name: getattr(args, name) for name in ("num_expert_banks", "pool_lock_step")}
        sharing = ExpertSharing(config, args.expert_sharing, **{n: v for n, v in options.items() if v is not None})
        spec = sharing.spec(spec)
    model = GPTModel(
        config, spec, args.vocab_size, args.seq_length, position_embedding_type="rope", share_embeddings_and_output_weights=False,
        pre_process=parallel_state.is_pipeline_first_stage(), post_process=parallel_state.is_pipeline_last_stage(),
    )  # fmt: skip
    config.finalize_model_grads_func = finalize_model_grads
    if sharing is not None:
        sharing.attach(model)
        config.finalize_model_grads_func = sharing.finalize_model_grads
    model = model.cuda().to(config.params_dtype)
    reduction = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=args.overlap_grad_reduce, use_distributed_optimizer=args.use_distributed_optimizer,
    )  # fmt: skip
    wrapped = DistributedDataParallel(config, reduction, model)
    config.no_sync_func = wrapped.no_sync if args.overlap_grad_reduce else None
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=args.lr, clip_grad=1.0, weight_decay=0.1, bf16=args.bf16,
                        params_dtype=config.params_dtype, use_distributed_optimizer=args.use_distributed_optimizer), [wrapped],
    )  # fmt: skip
    if sharing is not None and args.pool_lock_step:
        sharing.follow(optimizer)
    batches = samples(args, dataset(args))
    per_rank = args.global_batch_size // args.micro_batch_size // parallel_state.get_data_parallel_world_size()
    for step in range(1, args.train_iters + 1):
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        found = get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=batches, model=wrapped, num_microbatches=per_rank,
            seq_length=args.seq_length, micro_batch_size=args.micro_batch_size, forward_only=False,
        )  # fmt: skip
        _, norm, _ = optimizer.step()
        if found and parallel_state.get_data_parallel_rank() == 0 and (step == 1 or step % 10 == 0):
            loss = sum(float(one["loss"]) for one in found) / len(found)
            print(f"step {step}: loss {loss:.4f}, gradient norm {norm:.3f}", flush=True)
    if args.save:
        os.makedirs(args.save, exist_ok=True)
        content = {"args": arguments(args), "iteration": args.train_iters, "checkpoint_version": 3.0}
        dist_checkpointing.save({**content, "model": model.sharded_state_dict()}, args.save)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
