"""A teacher: a trained model whose predictions a run learns besides its data (mixture-of-students, distillation)."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_samoe.config import needs
from megatron_samoe.config.option import ABOVE_ZERO, POSITIVE, option


@dataclass(frozen=True)
class DistillationConfig:
    """What a run learns from a teacher."""

    teacher: str | None = option(None)
    """Folder of a run, of checkpoints, or of one checkpoint, whose newest model teaches. The loss is cross-entropy plus
    weight * T^2 * KL(teacher || student) over the vocabulary, at temperature T. It may have any layers, widths and experts,
    and the same vocabulary."""
    teacher_temperature: float = option(1.0, range=ABOVE_ZERO, needs=needs.TEACHER)
    """T, by which the logits of both are divided."""
    teacher_weight: float = option(1.0, range=ABOVE_ZERO, needs=needs.TEACHER)
    """Weight of the divergence beside the cross-entropy."""
    teacher_until: int | None = option(None, range=POSITIVE, needs=needs.TEACHER)
    """Last optimizer step that the teacher teaches; from there on it takes no memory and no time, and steps are plain
    ones. Derived if not given: --train-iters."""

    def teaches_after(self, iteration: int) -> bool:
        """Whether the step after so many has a teacher."""
        return self.teacher is not None and (self.teacher_until is None or iteration < self.teacher_until)
