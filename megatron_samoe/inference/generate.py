"""Sampling text from a model, one sequence, running the whole context for every token."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_samoe.errors import ConfigError
from megatron_samoe.inference.load import LoadedModel
from megatron_samoe.moe.types import ForwardContext


@torch.no_grad()
def generate_ids(
    loaded: LoadedModel,
    prompt: list[int],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
) -> list[int]:
    """Returns the ids that follow a prompt, up to an end-of-document token.

    The context is cut to the model's sequence length. Every rank of a layout gets the same ids.

    Args:
        temperature: 0 takes the most probable token.
        top_k: sample among so many most probable tokens; all if 0.

    Raises:
        ConfigError: the prompt is empty or an option is out of range.
    """
    if not prompt:
        raise ConfigError("--prompt", "", "must hold at least one token")
    if temperature < 0 or top_k < 0 or max_new_tokens < 0:
        raise ConfigError(
            "--temperature/--top-k/--max-new-tokens", (temperature, top_k, max_new_tokens), "must be 0 or more"
        )
    assert loaded.model.state.pp.size == 1, "generation runs the whole model on each rank"
    device = loaded.model.state.device
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    for _ in range(max_new_tokens):
        context_ids = torch.tensor([ids[-loaded.config.model.seq_length :]], device=device)
        logits_TV, _ = loaded.model(context_ids, ForwardContext(batch_size=1))
        logits_V = _whole_vocabulary(logits_TV[-1].float(), loaded).cpu()
        next_id = _choose(logits_V, temperature, top_k, generator)
        if next_id == loaded.tokenizer.eod:
            break
        ids.append(next_id)
    return ids[len(prompt) :]


def _whole_vocabulary(logits_V: Tensor, loaded: LoadedModel) -> Tensor:
    """Returns the logits of all tensor-parallel ranks; parts differ in width, so they are padded to travel."""
    tp = loaded.model.state.tp
    if tp.size == 1:
        return logits_V
    widest = -(-loaded.model.vocab_size // tp.size) + loaded.config.model.make_vocab_size_divisible_by
    padded = torch.full((1, widest), -torch.inf, device=logits_V.device)
    padded[0, : logits_V.numel()] = logits_V
    widths = tp.all_gather(torch.tensor([logits_V.numel()], device=logits_V.device)).tolist()
    return torch.cat([row[:width] for row, width in zip(tp.all_gather(padded), widths, strict=True)])


def _choose(logits_V: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    if 0 < top_k < logits_V.numel():
        least = logits_V.topk(top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < least, -torch.inf)
    return int(torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=generator))


def generate_text(loaded: LoadedModel, prompt: str, max_new_tokens: int, **options: float) -> str:
    """Returns the text that follows a prompt; options as in `generate_ids`."""
    ids = loaded.tokenizer.encode(prompt)
    new_ids = generate_ids(loaded, ids, max_new_tokens, **options)  # type: ignore[arg-type]
    # Decoded together with the prompt: a token's text can depend on the one before it.
    whole, start = loaded.tokenizer.decode(ids + new_ids), loaded.tokenizer.decode(ids)
    return whole[len(start) :] if whole.startswith(start) else loaded.tokenizer.decode(new_ids)
