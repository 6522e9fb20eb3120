"""Which tokens of which requests a step runs: continuous batching, as pure bookkeeping."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from megatron_samoe.inference.kv_cache import PageTable, Span
from megatron_samoe.inference.request import Request, TokenScore
from megatron_samoe.inference.sampling import Sampler
from megatron_samoe.inference.text_stream import TextStream


@dataclass
class Sequence:
    """A request on its way.

    Attributes:
        length: most tokens it may come to, prompt included; the last one is never run, so it needs no page.
        num_cached: tokens whose keys and values are in the cache.
        slot: its row of the page table; None while it waits.
        prompt_scores: those of the prompt's tokens so far, where the request asks for them.
    """

    request_id: int
    request: Request
    length: int
    sampler: Sampler
    text: TextStream
    ids: list[int] = field(default_factory=list)
    num_cached: int = 0
    slot: int | None = None
    prompt_scores: list[TokenScore] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ids = list(self.request.prompt_ids)

    @property
    def num_new(self) -> int:
        """Generated tokens."""
        return len(self.ids) - len(self.request.prompt_ids)

    @property
    def num_unscored(self) -> int:
        """Tokens of the prompt whose scores are still wanted."""
        return len(self.request.prompt_ids) - 1 - self.num_cached if self.request.scores_prompt else 0


@dataclass(frozen=True)
class StepPlan:
    """A step's spans, their tokens in order, and the sequences that get a new token with the row of its logits.

    Attributes:
        scored: sequences and the rows of logits that score the prompt's next tokens, in order.
    """

    spans: tuple[Span, ...]
    sequences: tuple[Sequence, ...]
    tokens: tuple[int, ...]
    samples: tuple[tuple[Sequence, int], ...]
    scored: tuple[tuple[Sequence, int], ...] = ()

    def undo(self) -> None:
        """Takes the step back, which failed: the next plan has its tokens again."""
        for sequence, span in zip(self.sequences, self.spans, strict=True):
            sequence.num_cached = span.first_position


class Scheduler:
    """Admits requests in order of arrival as slots and pages allow; every running request advances in every step.

    A prompt may be spread over several steps, so that a long one does not hold up the others for long.

    Args:
        max_step_tokens: most tokens of one step.
        max_logits: most tokens of one step whose logits are wanted.
    """

    def __init__(self, pages: PageTable, max_step_tokens: int, max_logits: int):
        self._pages, self._max_step_tokens, self._max_logits = pages, max_step_tokens, max_logits
        self._waiting: deque[Sequence] = deque()
        self._running: dict[int, Sequence] = {}

    @property
    def num_waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests with a slot."""
        return len(self._running)

    def add(self, sequence: Sequence) -> None:
        """Puts a request at the end of the queue."""
        self._waiting.append(sequence)

    def remove(self, request_id: int) -> bool:
        """Takes a request out and frees its pages; returns whether it was there."""
        sequence = self._running.pop(request_id, None)
        if sequence is not None:
            assert sequence.slot is not None
            self._pages.release(sequence.slot)
            return True
        for sequence in self._waiting:
            if sequence.request_id == request_id:
                self._waiting.remove(sequence)
                return True
        return False

    def plan(self) -> StepPlan | None:
        """Admits what fits and returns the next step; None where there is nothing to do.

        The caller runs it; the plan counts its tokens as cached.
        """
        while self._waiting and self._pages.fits(self._waiting[0].length - 1):
            sequence = self._waiting.popleft()
            sequence.slot = self._pages.reserve(sequence.length - 1)
            self._running[sequence.request_id] = sequence
        spans, sequences, samples = [], [], []
        scored: list[tuple[Sequence, int]] = []
        tokens: list[int] = []
        # Every running request may get a token; what is left of the logits scores prompts.
        logits = self._max_logits - len(self._running)
        # Requests that generate need one token each; what is left of the step goes to prompts, oldest first.
        ordered = sorted(self._running.values(), key=lambda s: len(s.ids) - s.num_cached > 1)
        for sequence in ordered:
            room = self._max_step_tokens - len(tokens)
            unscored = sequence.num_unscored
            room = min(room, logits - len(scored)) if unscored > 0 else room
            new = sequence.ids[sequence.num_cached : sequence.num_cached + room]
            if not new:
                continue
            scored += [(sequence, len(tokens) + offset) for offset in range(min(len(new), unscored))]
            assert sequence.slot is not None
            spans.append(Span(sequence.slot, sequence.num_cached, len(new)))
            sequences.append(sequence)
            tokens += new
            sequence.num_cached += len(new)
            if sequence.num_cached == len(sequence.ids):
                samples.append((sequence, len(tokens) - 1))
        if not spans:
            return None
        return StepPlan(tuple(spans), tuple(sequences), tuple(tokens), tuple(samples), tuple(scored))
