"""The split of a micro-batch's tokens over ranks: which of them each rank has.

With context parallelism a sequence is cut into 2 n chunks, and rank r of n holds chunks r and 2 n - 1 - r, in this order. So
the queries of every rank have the same number of keys in causal attention. With sequence parallelism a rank's tokens are split over its
tensor-parallel ranks once more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_samoe.errors import DataError


@dataclass(frozen=True)
class TokenShare:
    """The tokens of a micro-batch that one rank has: of each sequence two chunks, and of these tokens in a row a part.

    Attributes:
        context: (rank, size) of the context-parallel group.
        tensor: (rank, size) of the tensor-parallel group where it splits tokens too.
    """

    context: tuple[int, int] = (0, 1)
    tensor: tuple[int, int] = (0, 1)

    @property
    def num_shares(self) -> int:
        """Ranks over which the tokens are split."""
        return self.context[1] * self.tensor[1]

    @property
    def chunks(self) -> tuple[int, int]:
        """The two chunks, of 2 n, that the rank has of each sequence."""
        rank, size = self.context
        return rank, 2 * size - 1 - rank

    def spans(self, length: int) -> list[tuple[int, int]]:
        """Returns (start, stop) of the tokens of a sequence of this length that the rank's context-parallel group has."""
        if self.context[1] == 1:
            return [(0, length)]
        size = length // (2 * self.context[1])
        return [(number * size, (number + 1) * size) for number in self.chunks]

    def of_sequences(self, sequences: Tensor, dim: int = 1) -> Tensor:
        """Returns the chunks that the rank's context-parallel group has of complete sequences, [.., S, ..] -> [.., S / n, ..].

        Raises:
            DataError: the sequences cannot be cut.
        """
        size = self.context[1]
        if size == 1:
            return sequences
        if sequences.shape[dim] % (2 * size):
            raise DataError(
                f"A sequence of {sequences.shape[dim]} tokens cannot be cut into 2 x --context-parallel-size {size} chunks."
            )
        chunks = sequences.chunk(2 * size, dim)
        return torch.cat([chunks[number] for number in self.chunks], dim)


def whole_sequences(parts: Tensor, size: int) -> Tensor:
    """Returns sequences [B, S, ...] in order from the parts of all ranks of a context-parallel group, [n, B, S / n, ...]."""
    assert parts.shape[0] == size
    first, second = parts.chunk(2, 2)
    in_order = torch.cat((first, second.flip(0)))  # [2 n, B, S / 2 n, ...]
    return in_order.transpose(0, 1).flatten(1, 2)
