"""How ranks share the work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ParallelConfig:
    """Parallel layout. The data-parallel size is what remains of the world."""

    tensor_model_parallel_size: int = 1
    """Ranks that split each layer's matrices."""
    pipeline_model_parallel_size: int = 1
    """Ranks that split the layers. Only 1 is supported so far."""
    expert_model_parallel_size: int = 1
    """Ranks that split the experts of a layer and exchange tokens."""
    expert_tensor_parallel_size: int | None = None
    """Ranks that split each expert's matrices: 1 or the tensor-parallel size, which it is if not given."""
    distributed_backend: Literal["auto", "gloo", "nccl"] = "auto"
    """auto: NCCL where CUDA is found, else gloo."""
    distributed_timeout_minutes: float = 10.0
    """Longest wait for another rank."""

    @property
    def expert_tp(self) -> int:
        """Ranks that split each expert's matrices."""
        if self.expert_tensor_parallel_size is None:
            return self.tensor_model_parallel_size
        return self.expert_tensor_parallel_size
