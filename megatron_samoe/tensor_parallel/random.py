"""Noise that does not depend on the layout, and recomputation of activations.

Every draw is seeded by (seed, iteration, sample, layer, site). So a sample gets the same dropout mask on any rank and
in any micro-batch, a recomputed layer gets it again, and a resumed run needs no saved generator.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

from megatron_samoe.parallel_state.token_share import TokenShare

#: All tokens of a micro-batch.
ALL_TOKENS = TokenShare()
#: Rows of a sample that are drawn from one seed; a rank that has a part of a long sequence draws no more than it needs.
BLOCK = 2048


def derived_seed(*parts: int | str) -> int:
    """Returns a 63-bit seed that is the same in every process for the same parts."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True)
class SampleRandom:
    """The noise of one micro-batch.

    Attributes:
        seed: of the run.
        iteration: optimizer step, from 0.
        samples: indices of the micro-batch's sequences in the global batch.
    """

    seed: int
    iteration: int
    samples: tuple[int, ...]

    def uniform(
        self,
        shape_per_sample: tuple[int, ...],
        device: torch.device,
        layer: int,
        site: str,
        share: TokenShare = ALL_TOKENS,
    ) -> Tensor:
        """Returns [B * n, ...] fp32 draws from [0, 1), where shape_per_sample is (n, ...), or of each sample those of the
        share's context-parallel group.
        """
        length, *rest = shape_per_sample
        spans, generator = share.spans(length), torch.Generator(device=device)
        draws = torch.empty((len(self.samples), sum(stop - start for start, stop in spans), *rest), device=device)
        for of_sample, sample in zip(draws, self.samples, strict=True):
            for (start, stop), part in zip(spans, of_sample.split([b - a for a, b in spans]), strict=True):
                for low in range(start - start % BLOCK, stop, BLOCK):
                    high, number = min(low + BLOCK, length), low // BLOCK
                    seed = derived_seed(self.seed, self.iteration, sample, layer, site, *([number] if number else []))
                    generator.manual_seed(seed)
                    begin, end = max(low, start), min(high, stop)
                    own = part[begin - start : end - start]
                    if (begin, end) == (low, high):
                        own.uniform_(generator=generator)
                    else:
                        block = torch.empty((high - low, *rest), device=device).uniform_(generator=generator)
                        own.copy_(block[begin - low : end - low])
        return draws.flatten(0, 1)

    def dropout(
        self, x_TH: Tensor, probability: float, layer: int, site: str, share: TokenShare = ALL_TOKENS
    ) -> Tensor:
        """Returns x with elements dropped and the rest scaled by 1 / (1 - probability).

        Args:
            share: the micro-batch's tokens that x holds.
        """
        if probability == 0.0:
            return x_TH
        keep = self.uniform_like(x_TH, layer, site, share) >= probability
        return x_TH * keep.to(x_TH.dtype).div_(1.0 - probability)

    def uniform_like(self, x_TH: Tensor, layer: int, site: str, share: TokenShare) -> Tensor:
        """Returns fp32 draws from [0, 1) of x's shape: the share of what is drawn for the full micro-batch."""
        per_sample = (x_TH.shape[0] * share.num_shares // len(self.samples), *x_TH.shape[1:])
        part, parts = share.tensor
        return self.uniform(per_sample, x_TH.device, layer, site, share).chunk(parts)[part]

    def attention_seed(self, layer: int, tensor_rank: int) -> int:
        """Returns the seed of a fused attention kernel, which draws in its own order.

        This is the only noise that depends on the layout: on how heads and samples are grouped.
        """
        return derived_seed(self.seed, self.iteration, self.samples[0], layer, f"attention{tensor_rank}")


def recompute(function: Callable[..., Any], *args: Any) -> Any:
    """Returns function(*args) and keeps only args for the backward pass, which runs the function again.

    Noise comes from `SampleRandom`, so no generator state needs to be saved.
    """
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
