"""Models of drawn sizes from every family, made and saved by transformers: the same logits here, and back bit for bit.

Heads and widths are odd, embeddings tied or not, files sharded, weights in fp32 or bf16.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_samoe.convert.opener import open_folder
from megatron_samoe.moe.types import ForwardContext
from megatron_samoe.parallel_state.state import single_process_state
from megatron_samoe.runtime.load import load_model
from tests.harness.pairs import first_by_day
from tests.parity.hf_models import converted, their_logits, theirs, transformers

pytestmark = pytest.mark.parity

#: Classes; those with sizes of heads besides the hidden size; those with experts.
CLASSES = tuple(
    ("Llama Mistral Qwen2 Qwen3 GPT2 GPTNeoX Granite Mixtral Qwen2Moe Qwen3Moe Olmoe GraniteMoe DeepseekV3").split()
)
FREE_HEADS = ("Llama", "Mistral", "Qwen3", "Qwen3Moe", "Mixtral")
#: What experts and their width are called.
EXPERTS = {
    "Mixtral": ("num_local_experts", "intermediate_size"),
    "Qwen2Moe": ("num_experts", "moe_intermediate_size"),
    "Qwen3Moe": ("num_experts", "moe_intermediate_size"),
    "Olmoe": ("num_experts", "intermediate_size"),
    "GraniteMoe": ("num_local_experts", "intermediate_size"),
    "DeepseekV3": ("n_routed_experts", "moe_intermediate_size"),
}


def drawn(seed: int) -> tuple[str, dict[str, Any], torch.dtype]:
    """Returns a class, the entries of its configuration, and the weights' type."""
    name, draw = CLASSES[seed % len(CLASSES)], random.Random(seed)
    heads = draw.choice((1, 2, 3, 5, 6))
    groups = draw.choice([g for g in range(1, heads + 1) if heads % g == 0])
    head_dim = 2 * draw.randint(2, 5)
    hidden = heads * (draw.randint(5, 11) if name in FREE_HEADS else head_dim)
    tied, vocabulary, width = draw.random() < 0.5, draw.randint(61, 131), draw.randint(9, 41)
    layers = draw.randint(1, 3)
    dtype = torch.bfloat16 if draw.random() < 0.3 else torch.float32
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "initializer_range": 0.2}
    if name == "GPT2":
        return name, {**special, "vocab_size": vocabulary, "n_embd": hidden, "n_layer": layers, "n_head": heads, "n_inner": width,
                      "n_positions": 40, "activation_function": draw.choice(("gelu", "gelu_new"))}, dtype  # fmt: skip
    options: dict[str, Any] = {
        **special, "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": width, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": groups, "max_position_embeddings": 40, "tie_word_embeddings": tied,
    }  # fmt: skip
    if name in FREE_HEADS:
        options["head_dim"] = head_dim
    if name in EXPERTS:
        count, size = EXPERTS[name]
        options |= {count: draw.choice((3, 4, 7)), size: width, "num_experts_per_tok": draw.randint(2, 3)}
    either = lambda: draw.random() < 0.5  # noqa: E731
    multipliers = {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.1,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
    }
    more = {
        "Llama": {"attention_bias": either(), "mlp_bias": either()},
        "Mistral": {"sliding_window": draw.choice((None, 4))},
        "GPTNeoX": {"use_parallel_residual": either(), "attention_bias": either(), "hidden_act": draw.choice(("gelu", "gelu_new")),
                    "rotary_pct": 1.0, "hidden_dropout": 0.0},
        "Granite": {**multipliers, "attention_bias": either(), "mlp_bias": either()},
        "GraniteMoe": {**multipliers, "attention_bias": either()},
        "Qwen2Moe": {"shared_expert_intermediate_size": draw.randint(5, 21), "norm_topk_prob": either(), "qkv_bias": either()},
        "Qwen3Moe": {"norm_topk_prob": either(), "mlp_only_layers": [0] if layers > 1 else []},
        "Olmoe": {"clip_qkv": draw.choice((None, 0.7)), "norm_topk_prob": either()},
        "DeepseekV3": {"num_key_value_heads": heads, "q_lora_rank": draw.choice((None, 7)), "kv_lora_rank": draw.randint(5, 11),
                       "qk_nope_head_dim": draw.randint(3, 7), "qk_rope_head_dim": head_dim, "v_head_dim": draw.randint(3, 7),
                       "n_shared_experts": draw.randint(1, 2), "n_group": 1, "topk_group": 1, "first_k_dense_replace": layers - 1},
    }  # fmt: skip
    return name, {**options, **more.get(name, {})}, dtype


@torch.no_grad()
@pytest.mark.parametrize("seed", first_by_day(range(65), len(CLASSES)))
def test_a_drawn_model_gives_its_logits_and_comes_back(seed: int, tmp_path: Path) -> None:
    name, options, dtype = drawn(seed)
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**options)
    # Products of all experts together want rows of 16 bytes.
    eager = {"experts_implementation": "eager"} if name in EXPERTS else {}
    model = transformers.AutoModelForCausalLM.from_config(config, **eager).eval()
    for tensor in model.state_dict().values():
        if tensor.dim() == 1:
            tensor.add_(torch.randn_like(tensor), alpha=0.2)
    model = model.to(dtype)
    model.save_pretrained(tmp_path / "hf", max_shard_size="9KB")
    root = converted(tmp_path / "hf", tmp_path / "native")
    if dtype == torch.float32:
        ids_BS = torch.randint(0, options["vocab_size"], (2, 30))
        expected = their_logits(model, ids_BS)
        ours = load_model(open_folder(root), single_process_state()).model
        logits, _ = ours(ids_BS, ForwardContext(batch_size=2, training=False))
        found = logits.view(*ids_BS.shape, -1)[..., : options["vocab_size"]]
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max(), (name, options)
    again = theirs(converted(root, tmp_path / "back", "--to", "hf", "--hf-model-type", model.config.model_type))
    state = again.state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(state[key].to(tensor.dtype), tensor), (name, key, options)
