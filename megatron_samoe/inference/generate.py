"""Sampling text from a model, one sequence, running the whole context for every token."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_samoe.errors import ConfigError
from megatron_samoe.inference.load import LoadedModel
from megatron_samoe.moe.types import ForwardContext
from megatron_samoe.pipeline_parallel.p2p_communication import TensorSpec
from megatron_samoe.pipeline_parallel.schedule_plan import forward_plan
from megatron_samoe.pipeline_parallel.schedules import run_plan


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
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    for _ in range(max_new_tokens):
        logits_V = next_token_logits(loaded, ids[-loaded.config.model.seq_length :]).cpu()
        next_id = _choose(logits_V, temperature, top_k, generator)
        if next_id == loaded.tokenizer.eod:
            break
        ids.append(next_id)
    return ids[len(prompt) :]


@torch.no_grad()
def next_token_logits(loaded: LoadedModel, ids: list[int]) -> Tensor:
    """Returns fp32 logits_V of the token after `ids`, on every rank of the layout; all ranks call it together."""
    model, parallel = loaded.model, loaded.model.state
    # Tensor-parallel ranks may share tokens out evenly; tokens after the last one cannot influence it.
    padded = ids + [ids[-1]] * (-len(ids) % parallel.tp.size)
    tokens_BS = torch.tensor([padded], device=parallel.device)
    logits_V = torch.zeros(model.vocab_size, device=parallel.device)

    def forward(chunk: int, micro_batch: int, x: Tensor | None) -> Tensor:
        y, _ = model(tokens_BS if x is None else x, ForwardContext(batch_size=1), chunk=chunk)
        if model.chunks[chunk].is_last:
            logits_V.copy_(_whole_vocabulary(y[len(ids) - 1].float(), loaded))
        return y

    spec = TensorSpec((len(padded), loaded.config.model.hidden_size), model.dtype, parallel.device)
    run_plan(forward_plan(loaded.pipeline.num_chunks, 1), loaded.pipeline, forward, spec)
    return parallel.pp.all_reduce(logits_V)


def _whole_vocabulary(logits_V: Tensor, loaded: LoadedModel) -> Tensor:
    """Returns the logits of all tensor-parallel ranks; parts differ in width, so they are padded to travel."""
    tp = loaded.model.state.tp
    if tp.size == 1:
        return logits_V
    widths = tp.all_gather(torch.tensor([logits_V.numel()], device=logits_V.device)).tolist()
    padded = torch.full((1, max(widths)), -torch.inf, device=logits_V.device)
    padded[0, : logits_V.numel()] = logits_V
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
