"""Forward passes of evaluation: batches of token rows through all pipeline stages, without a cache.

Rows are sorted by length and dealt to data-parallel ranks. Right of a row are padding tokens, which causal attention
never looks at and, as no token is dropped outside training, cannot take another token's room at an expert: what a row
is given does not depend on what else is in its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_samoe.evaluation.zero_shot.encode import Query
from megatron_samoe.models.rank_model import RankModel
from megatron_samoe.moe.types import ForwardContext
from megatron_samoe.parallel_state.state import Group
from megatron_samoe.pipeline_parallel.p2p_communication import TensorSpec
from megatron_samoe.pipeline_parallel.schedule_plan import forward_plan
from megatron_samoe.pipeline_parallel.schedules import run_plan
from megatron_samoe.runtime.load import LoadedModel

#: Tokens of a batch where no number of sequences is given.
BATCH_TOKENS = 4096
#: Rows of logits whose loss is computed at a time.
LOSS_ROWS = 1024


@dataclass(frozen=True)
class Answer:
    """A model's answer to a query.

    Attributes:
        loglikelihood: of all labels, natural logarithm.
        is_greedy: every label is the most probable token at its position.
        next_id: most probable token after the last one read; the lowest id of equals.
    """

    loglikelihood: float
    is_greedy: bool
    next_id: int


def answer_queries(
    loaded: LoadedModel,
    queries: Sequence[Query],
    batch_size: int | None = None,
    progress: Callable[[int], object] = lambda count: None,
) -> list[Answer]:
    """Returns the answers in the queries' order, on every rank; all ranks of the layout call it together.

    Args:
        batch_size: sequences of a forward pass on one data-parallel rank; BATCH_TOKENS tokens if not given.
        progress: is called with how many queries were answered since it was last called.
    """
    parallel = loaded.model.state
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, query in enumerate(queries):
        groups.setdefault(query.tokens, []).append(number)
    # Longest first, so that memory runs out at once or never; then by content, so that no order of queries matters.
    inputs = sorted(groups, key=lambda tokens: (-len(tokens), tokens))
    batches = _batches(inputs, batch_size)
    # With pipeline stages, several batches are under way at a time.
    depth = 2 * parallel.pp.size if parallel.pp.size > 1 else 1
    own: list[tuple[int, Answer]] = []
    for start in range(0, len(batches), depth * parallel.dp.size):
        round_ = batches[start : start + depth * parallel.dp.size]
        mine = round_[parallel.dp.rank :: parallel.dp.size]
        # Experts may be on other data-parallel ranks: all run the number of batches of the one with most.
        mine += [[(loaded.tokenizer.eod,)]] * (-(-len(round_) // parallel.dp.size) - len(mine))
        numbers = [[groups.get(tokens, []) for tokens in batch] for batch in mine]
        own += _run(loaded, mine, numbers, queries)
        progress(sum(len(groups[tokens]) for batch in round_ for tokens in batch))
    merged = dict(pair for part in parallel.world.all_gather_object(own) for pair in part)
    return [merged[number] for number in range(len(queries))]


def _batches(inputs: Sequence[tuple[int, ...]], batch_size: int | None) -> list[list[tuple[int, ...]]]:
    """Returns runs of inputs, which come longest first."""
    batches, start = [], 0
    while start < len(inputs):
        size = batch_size or max(1, BATCH_TOKENS // len(inputs[start]))
        batches.append(list(inputs[start : start + size]))
        start += size
    return batches


@torch.no_grad()
def _run(
    loaded: LoadedModel, batches: list[list[tuple[int, ...]]], numbers: list[list[list[int]]], queries: Sequence[Query]
) -> list[tuple[int, Answer]]:
    """Runs batches through the stages; returns (query number, answer) on one rank of the last stage."""
    model, parallel = loaded.model, loaded.model.state
    num_rows = max(map(len, batches))
    length = max(len(tokens) for batch in batches for tokens in batch)
    if parallel.sequence_parallel:  # tensor-parallel ranks share each sequence's tokens out evenly
        length += -length % parallel.tp.size
    tokens_MBS = torch.full((len(batches), num_rows, length), loaded.tokenizer.eod, dtype=torch.int64)
    for m, batch in enumerate(batches):
        for b, tokens in enumerate(batch):
            tokens_MBS[m, b, : len(tokens)] = torch.tensor(tokens)
    tokens_MBS = tokens_MBS.to(parallel.device)
    found: list[tuple[int, Answer]] = []

    def forward(chunk: int, micro_batch: int, x: Tensor | None) -> Tensor:
        y, all_stats = model(
            tokens_MBS[micro_batch] if x is None else x, ForwardContext(batch_size=num_rows), chunk=chunk
        )
        dropped = sum(int(stats.sums["dropped"]) for stats in all_stats)
        assert dropped == 0, f"{dropped} tokens were dropped by experts in evaluation"
        if model.chunks[chunk].is_last:
            wanted = [(b, number) for b, row in enumerate(numbers[micro_batch]) for number in row]
            if wanted:
                found.extend(_answers(model, y, length, batches[micro_batch], wanted, queries))
        return y

    rows = num_rows * length // (parallel.tp.size if parallel.sequence_parallel else 1)
    spec = TensorSpec((rows, loaded.config.model.hidden_size), model.dtype, parallel.device)
    run_plan(forward_plan(loaded.pipeline.num_chunks, len(batches)), loaded.pipeline, forward, spec)
    return found if parallel.tp.rank == 0 else []


def _answers(
    model: RankModel,
    logits_TV: Tensor,
    length: int,
    batch: list[tuple[int, ...]],
    wanted: list[tuple[int, int]],
    queries: Sequence[Query],
) -> Iterator[tuple[int, Answer]]:
    """Yields the answers of (row, query number) pairs; only the logits that they need leave their dtype."""
    positions: list[int] = []
    labels: list[int] = []
    counts: list[int] = []
    for b, number in wanted:
        query = queries[number]
        end = b * length + len(batch[b])
        count = max(1, len(query.labels))
        positions += range(end - count, end)
        labels += query.labels or (0,)
        counts.append(count)
    device = logits_TV.device
    positions_N, labels_N = torch.tensor(positions, device=device), torch.tensor(labels, device=device)
    losses_of, best_of = [], []
    # In parts, as rows of a large vocabulary in fp32 take much memory.
    for start in range(0, len(positions), LOSS_ROWS):
        logits_NV = logits_TV[positions_N[start : start + LOSS_ROWS]].float()
        losses_of.append(model.loss(logits_NV, labels_N[start : start + LOSS_ROWS]))
        best_of.append(_argmax(logits_NV, model.state.tp))
    losses = torch.cat(losses_of).double().cpu().split(counts)
    best = torch.cat(best_of).cpu().split(counts)
    for (_, number), losses_C, best_C, right_C in zip(wanted, losses, best, labels_N.cpu().split(counts), strict=True):
        answer = Answer(-float(losses_C.sum()), bool((best_C == right_C).all()), int(best_C[-1]))
        yield number, answer


def _argmax(logits_NV: Tensor, tp: Group) -> Tensor:
    """Returns ids_N of the highest logit over all tensor-parallel ranks' parts, the lowest id of equals."""
    if tp.size == 1:
        return logits_NV.argmax(-1)
    rows, width = logits_NV.shape
    best_N2 = torch.full((rows, 2), -torch.inf, dtype=torch.float64, device=logits_NV.device)
    if width:
        ids_N = logits_NV.argmax(-1)
        best_N2 = torch.stack((logits_NV.gather(1, ids_N[:, None])[:, 0].double(), ids_N.double()), 1)
    widths = tp.all_gather(torch.tensor([width], device=logits_NV.device)).cpu()
    best_RN2 = tp.all_gather(best_N2[None])
    best_RN2[:, :, 1] += (widths.cumsum(0) - widths).to(best_RN2)[:, None]
    winner_N = best_RN2[:, :, 0].argmax(0)
    return best_RN2[winner_N, torch.arange(rows, device=winner_N.device), 1].long()
