"""How far a model's predictions are from the original's on held-out text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_samoe.evaluation.measurements import reading
from megatron_samoe.evaluation.run_summary import Table, table
from megatron_samoe.models.rank_model import RankModel
from megatron_samoe.moe.types import ForwardContext
from megatron_samoe.ops.kl_divergence import kl_divergence_terms, scaled_logsumexp

#: Of a compression, in its folder.
VERDICTS_FILE = "verdicts.json"


@dataclass(frozen=True)
class Verdict:
    """A model on held-out text.

    Attributes:
        expert_bytes: of all experts, each counted once, in the precision that the model computes in.
        loss: mean cross-entropy of a token in nats.
        divergence: mean KL(original || model) of a token in nats.
    """

    model: str
    expert_bytes: int
    loss: float
    divergence: float


@torch.no_grad()
def losses(original: RankModel, model: RankModel, passes: Sequence[Tensor]) -> tuple[float, float]:
    """Returns mean cross-entropy, and mean KL(original || model), over tokens; for the original itself the latter is 0.

    Args:
        passes: ids [B, S + 1] of each forward pass.
    """
    loss = divergence = 0.0
    tokens = 0
    for ids_BS in passes:
        logits_TV, taught_TV = (_logits(m, ids_BS) for m in (model, original))
        labels_T = ids_BS[:, 1:].flatten()
        lse_T, taught_lse_T = scaled_logsumexp(logits_TV, 1.0), scaled_logsumexp(taught_TV, 1.0)
        loss += float((lse_T - logits_TV.gather(1, labels_T[:, None])[:, 0]).double().sum())
        divergence += float(kl_divergence_terms(logits_TV, taught_TV, lse_T, taught_lse_T, 1.0).double().sum())
        tokens += len(labels_T)
    return loss / tokens, divergence / tokens


def _logits(model: RankModel, ids_BS: Tensor) -> Tensor:
    logits_TV, _ = model(ids_BS[:, :-1], ForwardContext(batch_size=len(ids_BS)))
    return logits_TV[:, : model.vocab_size].float()


def read_verdicts(folder: Path) -> list[Verdict]:
    """Returns the verdicts of a compression that ended; the original's is the first.

    Raises:
        DataError: it has none, or they are damaged.
    """
    with reading(
        folder / VERDICTS_FILE, "a file of verdicts, which megatron-samoe compress writes when it has judged"
    ) as content:
        found = [Verdict(**verdict) for verdict in content["verdicts"]]
        if not found:
            raise ValueError("it has none")
    return found


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    """Returns rows for users; the first model is the original."""

    def rounded(value: float) -> float:
        return round(value, 4) + 0.0  # no -0.0000

    whole = verdicts[0]
    columns: dict[str, Callable[[Verdict], str]] = {
        "model": lambda v: v.model,
        "expert bytes": lambda v: f"{v.expert_bytes:,}",
        "share": lambda v: f"{v.expert_bytes / whole.expert_bytes:.3f}",
        "CE": lambda v: f"{v.loss:.4f}",
        "over the original": lambda v: f"{rounded(v.loss - whole.loss):+.4f}",
        "KL from it": lambda v: f"{rounded(v.divergence):.4f}",
    }
    return table(columns, verdicts)
