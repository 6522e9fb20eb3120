"""The key-value cache: a fixed number of pages, dealt out to sequences, and torch's way to attend over them.

A page holds PAGE consecutive positions of one sequence in every layer. A request gets all its pages when it is admitted,
so that a running request never waits for memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_samoe.ops.attention import ScoreRule, attention
from megatron_samoe.ops.decode_parts import PAGE


class Span(NamedTuple):
    """New tokens of one sequence in a step, at consecutive positions."""

    slot: int
    first_position: int
    num_tokens: int


@dataclass(frozen=True)
class StepBatch:
    """The tokens of one step, flat: span after span.

    Attributes:
        tokens_T, positions_T, slots_T: int64, int32, int32: id, position in its sequence, and row of the page table.
        pages: [slots, pages of a sequence], int32.
        logit_rows: the tokens after which logits are wanted.
    """

    spans: tuple[Span, ...]
    tokens_T: Tensor
    positions_T: Tensor
    slots_T: Tensor
    pages: Tensor
    logit_rows: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.tokens_T.shape[0]


class BatchBuffers:
    """Memory in which batches are laid out, so that a step makes no tensors of its own; for one batch at a time."""

    def __init__(self, max_tokens: int):
        self._tensors = [torch.empty(max_tokens, dtype=dtype) for dtype in (torch.int64, torch.int32, torch.int32)]
        self._arrays = [tensor.numpy() for tensor in self._tensors]

    def fill(self, tokens: Sequence[int], positions: Sequence[int], slots: Sequence[int]) -> list[Tensor]:
        """Returns tokens_T, positions_T and slots_T, valid until the next call."""
        for array, values in zip(self._arrays, (tokens, positions, slots), strict=True):
            array[: len(values)] = values
        return [tensor[: len(tokens)] for tensor in self._tensors]


def make_batch(
    spans: Sequence[Span],
    tokens: Sequence[int],
    pages: Tensor,
    logit_rows: Sequence[int],
    device: torch.device,
    buffers: BatchBuffers | None = None,
) -> StepBatch:
    """Returns the batch of some spans, whose tokens follow each other in `tokens`.

    Args:
        buffers: CPU memory to use; on the CPU the batch is there.
    """
    positions = [p for span in spans for p in range(span.first_position, span.first_position + span.num_tokens)]
    slots = [span.slot for span in spans for _ in range(span.num_tokens)]
    assert len(tokens) == len(positions)
    filled = (buffers or BatchBuffers(len(tokens))).fill(tokens, positions, slots)
    tokens_T, positions_T, slots_T = (t.to(device) for t in filled)
    return StepBatch(tuple(spans), tokens_T, positions_T, slots_T, pages, tuple(logit_rows))


def pages_for(num_tokens: int) -> int:
    """Returns the pages that a number of positions takes."""
    return -(-num_tokens // PAGE)


def window_pages(window: int | None, max_step_tokens: int) -> int | None:
    """Returns the pages in which a sequence may go round, where no layer looks back further than a window."""
    return None if window is None else pages_for(window + max_step_tokens - 1) + 1


class PageTable:
    """Which pages each slot's sequence has.

    Args:
        most_pages: where given, a sequence has no more pages than these, and goes round in them: each page holds later
            positions once no layer looks back at the earlier ones.
    """

    def __init__(
        self,
        num_slots: int,
        num_pages: int,
        pages_per_slot: int,
        device: torch.device | str = "cpu",
        most_pages: int | None = None,
    ):
        self.num_pages, self._most_pages = num_pages, most_pages or pages_per_slot
        self.table = torch.zeros(num_slots, pages_per_slot, dtype=torch.int32, device=device)
        self._free_pages = list(range(num_pages - 1, -1, -1))
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._pages_of: dict[int, list[int]] = {}

    def fits(self, num_tokens: int) -> bool:
        """Whether a sequence of this length can be admitted now."""
        return bool(self._free_slots) and self._needed(num_tokens) <= len(self._free_pages)

    def _needed(self, num_tokens: int) -> int:
        return min(pages_for(num_tokens), self._most_pages)

    def reserve(self, num_tokens: int) -> int:
        """Returns a slot with pages for a sequence."""
        assert self.fits(num_tokens)
        slot = self._free_slots.pop()
        pages = [self._free_pages.pop() for _ in range(self._needed(num_tokens))]
        self._pages_of[slot] = pages
        count = pages_for(num_tokens)
        self.table[slot, :count] = torch.tensor([pages[i % len(pages)] for i in range(count)], dtype=torch.int32)
        return slot

    def release(self, slot: int) -> None:
        """Takes back a slot and its pages."""
        self._free_pages += reversed(self._pages_of.pop(slot))
        self._free_slots.append(slot)

    @property
    def num_free_pages(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free_pages)


class TorchCache:
    """Keys and values of some layers, [pages, PAGE, G, D] each, and attention over them by torch's own functions.

    `begin` names the step's batch; then every layer's attention calls `attend` once.

    Args:
        latent: where given, values are this number of the first channels of keys, and are not kept again.
    """

    def __init__(
        self,
        layers: Sequence[int],
        num_pages: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        latent: int | None = None,
    ):
        shape = (num_pages, PAGE, num_kv_heads, head_dim)
        self._keys = {layer: torch.zeros(shape, dtype=dtype, device=device) for layer in layers}
        self._values = {
            layer: keys[..., :latent] if latent is not None else torch.zeros_like(keys)
            for layer, keys in self._keys.items()
        }
        self._batch: StepBatch | None = None

    def begin(self, batch: StepBatch) -> None:
        """Sets the batch of the following calls."""
        self._batch = batch

    def attend(self, layer: int, q_TAD: Tensor, k_TGD: Tensor, v_TGD: Tensor, rule: ScoreRule) -> Tensor:
        """Stores the tokens' keys and values and returns attention's output, [T, A * D].

        Rows after the batch's tokens belong to no sequence; their result is 0.
        """
        batch = self._batch
        assert batch is not None, "begin comes first"
        keys, values = self._keys[layer], self._values[layer]
        num = batch.num_tokens
        page_T = batch.pages[batch.slots_T.long(), (batch.positions_T // PAGE).long()].long()
        place_T = (batch.positions_T % PAGE).long()
        keys[page_T, place_T] = k_TGD[:num]
        values[page_T, place_T] = v_TGD[:num]
        y_TAD = q_TAD.new_zeros(*q_TAD.shape[:2], v_TGD.shape[-1])
        start = 0
        for span in batch.spans:
            rows = slice(start, start + span.num_tokens)
            y_TAD[rows] = self._attend_one(span, q_TAD[rows], keys, values, rule)
            start += span.num_tokens
        return y_TAD.flatten(1)

    def _attend_one(self, span: Span, q_SAD: Tensor, keys: Tensor, values: Tensor, rule: ScoreRule) -> Tensor:
        assert self._batch is not None
        length, first_page = span.first_position + span.num_tokens, rule.first_key(span.first_position) // PAGE
        pages = self._batch.pages[span.slot, first_page : pages_for(length)].long()
        k_SGD, v_SGD = (t[pages].flatten(0, 1)[: length - first_page * PAGE] for t in (keys, values))
        query, key, value = (t.transpose(0, 1)[None] for t in (q_SAD, k_SGD, v_SGD))
        return attention(query, key, value, rule)[0].transpose(0, 1)
