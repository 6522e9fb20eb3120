"""Our own class for transformers computes what our checkpoints compute, with the pool and folded, and saves and loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_samoe.convert.opener import open_folder
from tests.parity.hf_models import (
    Native,
    converted,
    exported,
    native,
    random_source,
    some_ids,
    their_greedy,
    their_logits,
    theirs,
    transformers,
)

pytestmark = pytest.mark.parity

LLAMA: dict[str, Any] = {"style": "llama", "moe_router_topk": 2, "moe_ffn_hidden_size": 48}
SHARED = {"moe_shared_expert_intermediate_size": 20}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt3": ("samoe", {}),
    "gpt3_rope_softmax": ("samoe", {"position_embedding_type": "rope", "rotary_percent": 0.5, "samoe_normalization": "softmax"}),
    "llama_per_expert": ("samoe", {**LLAMA, **SHARED, "samoe_granularity": "expert", "samoe_normalization": "l2",
                                   "qk_layernorm": True}),
    "no_positions": ("samoe", {**LLAMA, "position_embedding_type": "none", "moe_layer_freq": "0110"}),
    "sigmoid": ("moe", {"moe_router_topk": 2, "moe_router_score_function": "sigmoid", "moe_layer_freq": "0101"}),
    "gated": ("samoe", {**LLAMA, **SHARED, "moe_shared_expert_gate": True}),
    "residual": ("samoe", {"moe_residual_mlp": True}),
    "dense": ("dense", {"normalization": "RMSNorm"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_our_class_gives_our_logits_and_text_and_comes_back(case: str, tmp_path: Path) -> None:
    layout, options = CASES[case]
    ours, folder, model = exported(layout, options, tmp_path, "--to", "hf", tolerance=1e-5)
    assert type(model).__name__ == "SamoeForCausalLM" and type(model).__module__.startswith("transformers_modules.")
    reader = open_folder(converted(folder, tmp_path / "back")).tensors
    for name, tensor in ours.source.weights.items():
        assert name.startswith("optimizer.") or torch.equal(reader.read(name), tensor), name


@pytest.fixture(scope="module")
def pooled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Native, Path]:
    """A SaMoE, and its export with the pool kept."""
    root = tmp_path_factory.mktemp("pooled")
    ours = native(root / "native", random_source("samoe", **LLAMA))
    return ours, converted(ours.root, root / "hf", "--to", "hf")


def test_folded_and_unfolded_compute_the_same(pooled: tuple[Native, Path], tmp_path: Path) -> None:
    ours, folder = pooled
    ids_BS = some_ids()
    kept, expected = theirs(folder), ours.logits(ids_BS)
    folded = theirs(converted(ours.root, tmp_path / "hf", "--hf-model-type", "samoe", "--fold"))
    assert kept.config.expert_layout == "samoe" and folded.config.expert_layout == "moe"
    assert (their_logits(folded, ids_BS) - expected).abs().max() < 1e-5
    # By hand, after loading: no pool is left, and what was folded can be saved.
    loaded = theirs(folder).fold_pool()
    assert not any("expert_pool" in n or "combination" in n for n in loaded.state_dict())
    assert (their_logits(loaded, ids_BS) - their_logits(folded, ids_BS)).abs().max() < 1e-5
    loaded.save_pretrained(tmp_path / "saved")
    assert torch.equal(their_logits(theirs(tmp_path / "saved"), ids_BS), their_logits(loaded, ids_BS))
    size, full = ((f / "model.safetensors").stat().st_size for f in (folder, tmp_path / "saved"))
    assert size < 0.7 * full


def test_automodel_saves_and_loads(pooled: tuple[Native, Path], tmp_path: Path) -> None:
    ours, folder = pooled
    model, ids_BS = theirs(folder), some_ids()
    model.save_pretrained(tmp_path / "saved", max_shard_size="50KB")
    again = theirs(tmp_path / "saved")
    assert torch.equal(their_logits(again, ids_BS), their_logits(model, ids_BS))
    config = transformers.AutoConfig.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    fresh = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True).eval()
    assert their_logits(fresh, ids_BS).isfinite().all() and fresh.num_parameters() == model.num_parameters()
    reader = open_folder(converted(tmp_path / "saved", tmp_path / "back")).tensors
    assert torch.equal(reader.read("expert_pool.bank.w1"), ours.source.weights["expert_pool.bank.w1"])


def test_padding_and_the_cache_change_nothing(pooled: tuple[Native, Path]) -> None:
    model, ids_BS = theirs(pooled[1]), some_ids(1, 20)
    alone = their_logits(model, ids_BS)
    with torch.no_grad():
        start = model(ids_BS[:, :12])
        cache = {"past_key_values": getattr(start, "past_key_values", None) or start.cache}
        rest = model(ids_BS[:, 12:], **cache).logits
        pad = torch.zeros(1, 5, dtype=torch.long)
        mask = torch.cat((pad, torch.ones_like(ids_BS)), 1)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        padded = model(torch.cat((pad, ids_BS), 1), attention_mask=mask, position_ids=positions).logits
        last = model(ids_BS, logits_to_keep=1).logits
    torch.testing.assert_close(torch.cat((start.logits, rest), 1), alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(padded[:, 5:], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last, alone[:, -1:], rtol=1e-4, atol=1e-5)


def test_a_batch_of_unequal_prompts_generates_as_each_alone(pooled: tuple[Native, Path]) -> None:
    ours, folder = pooled
    model = theirs(folder)
    short, long = ours.prompt[:6], ours.prompt
    alone = [their_greedy(model, prompt, 8) for prompt in (short, long)]
    pad = len(long) - len(short)
    ids_BS = torch.tensor([[0] * pad + short, long])
    mask_BS = torch.tensor([[0] * pad + [1] * len(short), [1] * len(long)])
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    out = model.generate(ids_BS, attention_mask=mask_BS, **settings)[:, len(long) :].tolist()
    assert [row[: len(a)] for row, a in zip(out, alone, strict=True)] == alone


def test_training_reaches_banks_and_coefficients(pooled: tuple[Native, Path]) -> None:
    model, ids_BS = theirs(pooled[1]).train(), some_ids()
    result = model(ids_BS, labels=ids_BS)
    logits = their_logits(model, ids_BS)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids_BS[:, 1:].flatten())
    torch.testing.assert_close(result.loss, expected)
    result.loss.backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0
        for n, p in model.named_parameters()
        if "gate_up_proj" in n or "combination" in n
    )


def test_half_precision_keeps_routers_and_the_pool_in_fp32(pooled: tuple[Native, Path]) -> None:
    model = theirs(pooled[1], dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        full = any(word in name for word in ("router", "combination", "expert_pool"))
        assert parameter.dtype == (torch.float32 if full else torch.bfloat16), name
    assert their_logits(model, some_ids()).isfinite().all()


def test_what_the_class_does_not_do_is_said(pooled: tuple[Native, Path]) -> None:
    model, ids_BS = theirs(pooled[1]), some_ids()
    with pytest.raises(ValueError, match="output_attentions is not supported"):
        model(ids_BS, output_attentions=True)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    states = model(ids_BS, output_hidden_states=True).hidden_states
    assert len(states) == 5 and states[0].shape == (2, 40, 32)
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids_BS)).logits
    assert torch.equal(embedded, model(ids_BS).logits)
    model.resize_token_embeddings(300)
    assert model(ids_BS).logits.shape[-1] == 300
