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
    """Ranks that split the layers."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Interleave: each pipeline rank holds several runs of so many layers in place of one run."""
    pipeline_model_parallel_layout: str | None = None
    """Layers of each (virtual) stage as Megatron writes them: stages between |, with E the embedding, t a layer, L the
    head, t*3 and (tt|)*2 repetitions, such as Et*3|t*4|t*4|t*3L. Even runs if not given."""
    pipeline_schedule: Literal["1f1b", "gpipe"] = "1f1b"
    """Order of micro-batches: one forward, one backward (interleaved with virtual stages), or all forwards first."""
    sequence_parallel: bool = False
    """Split the residual stream, norms and dropout over tensor-parallel ranks along tokens."""
    use_distributed_optimizer: bool = False
    """Shard optimizer state over data-parallel ranks (ZeRO-1)."""
    expert_model_parallel_size: int = 1
    """Ranks that split the experts of a layer and exchange tokens."""
    expert_tensor_parallel_size: int | None = None
    """Ranks that split each expert's matrices: 1 or the tensor-parallel size, which it is if not given."""
    moe_dispatch_chunks: int = 1
    """Exchange tokens with other ranks' experts in so many parts, the local experts of one part at a time: one part
    travels while the experts of another compute, forwards and backwards. Results are the same, bit for bit."""
    moe_shared_expert_overlap: bool = False
    """Compute the shared expert while tokens travel to the routed ones."""
    moe_all_to_all_backend: Literal["auto", "torch", "extension"] = "auto"
    """What tokens travel through. torch: its process group. extension: shared memory on the CPU, an NCCL communicator with
    a stream of its own on CUDA; an error where it cannot be had. auto: the extension on the CPU if it can, else torch."""
    moe_hierarchical_all_to_all: bool = False
    """On CUDA, let tokens travel within their node first and then between nodes, one message to each node."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the step's last backward passes still run. The pool's are always reduced at the end."""
    ddp_bucket_size: int | None = None
    """Elements of one gradient buffer, which is reduced as a whole; 40 million if not given."""
    elastic: bool = False
    """Take the nearest legal layout where the launcher starts another number of ranks than the layout was chosen for
    (torchrun --nnodes 1:4): data parallelism changes first. Needs --global-batch-size, which stays."""
    distributed_backend: Literal["auto", "gloo", "nccl"] = "auto"
    """auto: NCCL where CUDA is found, else gloo."""
    preflight: bool = False
    """Test memory, speed, links and clocks of all ranks before training, and name those that are worse than others."""
    distributed_timeout_minutes: float = 10.0
    """Longest wait for another rank."""

    @property
    def expert_tp(self) -> int:
        """Ranks that split each expert's matrices."""
        if self.expert_tensor_parallel_size is None:
            return self.tensor_model_parallel_size
        return self.expert_tensor_parallel_size
