"""Megatron-LM's per-rank files (format `torch`) as its training program writes them, of a model of ours."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch

from megatron_samoe.config.cli import from_mapping
from megatron_samoe.convert.edited_model import model_names
from megatron_samoe.convert.layer_experts import layer_of
from megatron_samoe.convert.megatron import plan_dist_export
from megatron_samoe.convert.megatron.names import ExpertNames, MegatronLayout, slices_of
from megatron_samoe.convert.megatron.rank_files import FILE_NAME, RankPlace, folder_name
from megatron_samoe.dist_checkpointing.global_tensors import GlobalTensors
from megatron_samoe.models.layer_layout import all_layers


def write_rank_files(
    source: GlobalTensors,
    root: Path,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    etp: int | None = None,
    chunks: int = 1,
    experts: ExpertNames = "sequential",
    fused: bool = True,
    iteration: int = 7,
) -> Path:
    """Returns the folder of an iteration.

    Args:
        etp: ranks that split each expert: all tensor-parallel ones if not given, but 1 for experts with biases.
        chunks: of layers on each pipeline rank.
        fused: whether names are those of Transformer Engine's modules rather than of local ones.
    """
    plan = plan_dist_export(source)
    config, folder = from_mapping(plan.source.config, "test"), root / f"iter_{iteration:07d}"
    has_bias = config.moe.expert_layout != "dense" and not config.model.disable_bias_linear
    layout = MegatronLayout(tp, pp, ep, etp or (1 if has_bias else tp), experts)
    unit = config.model.make_vocab_size_divisible_by * tp
    padded = -(-source.train_state["vocab_size"] // unit) * unit
    sizes = {"tensor_model": tp, "pipeline_model": pp, "expert_model": ep}
    args = {**plan.arguments, "padded_vocab_size": padded, "ckpt_format": "torch"}
    args |= {f"{axis}_parallel_size": size for axis, size in sizes.items()}
    args["expert_tensor_parallel_size"] = layout.expert_tensor_parallel
    args["virtual_pipeline_model_parallel_size"] = chunks if chunks > 1 else None
    run = config.model.num_layers // (pp * chunks)
    is_moe = [layer.moe_index is not None for layer in all_layers(config)]
    models: dict[RankPlace, list[dict[str, torch.Tensor | None]]] = {
        r: [{} for _ in range(chunks)] for r in layout.ranks()
    }
    for name in model_names(plan.source):
        tensor, layer = plan.source.read(name), layer_of(name)
        if name in ("embedding.word.weight", "output.weight"):
            tensor = torch.cat((tensor, tensor.new_zeros(padded - len(tensor), *tensor.shape[1:])))
        deal, number = (
            divmod(layer, run) if layer is not None else (0 if name.startswith("embedding.") else pp * chunks - 1, None)
        )
        tied = name == "embedding.word.weight" and not config.model.untie_embeddings_and_output_weights and pp > 1
        for stage, chunk in {(deal % pp, deal // pp), *([(pp - 1, chunks - 1)] if tied else [])}:
            for part in slices_of(
                "output.weight" if tied and stage else name, tuple(tensor.shape), number, layout, config.model
            ):
                key = _fused(part.name, is_moe[layer or 0], config.model.multi_latent_attention) if fused else part.name
                for rank, made in models.items():
                    if rank.pp == stage and part.is_on(rank.tp, rank.ep):
                        made[chunk][key] = part.take(tensor).clone()
                        if key.endswith("router.weight") and not config.model.disable_bias_linear:
                            made[chunk][key.replace("weight", "bias")] = torch.zeros(
                                config.moe.most_experts, dtype=tensor.dtype
                            )
                        if key.endswith("weight") and (".linear_" in key or key == "output_layer.weight"):
                            made[chunk][key.removesuffix("weight") + "_extra_state"] = None
    for rank, own in models.items():
        path = folder / folder_name(rank, pp, ep) / FILE_NAME
        path.parent.mkdir(parents=True)
        named = {"model": own[0]} if chunks == 1 else {f"model{number}": one for number, one in enumerate(own)}
        torch.save(
            {"args": argparse.Namespace(**args), "checkpoint_version": 3.0, "iteration": iteration, **named}, path
        )
    (root / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return folder


def _fused(key: str, is_moe: bool, has_latents: bool) -> str:
    """Returns a local module's key as TEGroupedMLP and the modules that keep the norm before them have it."""
    key = re.sub(r"local_experts\.(\d+)\.(linear_fc\d\.)(\w+)", r"\2\3\1", key)
    if not has_latents:
        key = key.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
    return key if is_moe else key.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
