"""Options of the parallel layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_samoe.config import needs
from megatron_samoe.config.option import ABOVE_ZERO, POSITIVE, option


@dataclass(frozen=True)
class ParallelConfig:
    """The parallel layout. The data-parallel size is what remains of the world."""

    tensor_model_parallel_size: int = option(1, range=POSITIVE, largest=1_000_000)
    """Ranks that split each layer's matrices."""
    pipeline_model_parallel_size: int = option(1, range=POSITIVE, largest=1_000_000)
    """Ranks that split the layers."""
    num_layers_per_virtual_pipeline_stage: int | None = option(None, range=POSITIVE, needs=needs.PIPELINE)
    """Layers of a chunk; each pipeline rank then holds several chunks instead of one (the interleaved schedule)."""
    pipeline_model_parallel_layout: str | None = option(None, needs=needs.PIPELINE)
    """Layers of each (virtual) stage in Megatron's notation: | between stages, E the embedding, t a layer, L the head,
    t*3 and (tt|)*2 repetitions, such as Et*3|t*4|t*4|t*3L. Even stages if not given.
    """
    pipeline_schedule: Literal["1f1b", "gpipe"] = option("1f1b", needs=needs.PIPELINE)
    """Order of micro-batches: one forward, one backward (interleaved with virtual stages), or all forwards first."""
    sequence_parallel: bool = option(False)
    """Split the residual stream, norms and dropout over tensor-parallel ranks along tokens."""
    context_parallel_size: int = option(1, range=POSITIVE, largest=1_000_000)
    """Ranks that split each sequence: rank r of n has chunks r and 2 n - 1 - r of 2 n, so that all have the same number of scores of
    attention to compute.
    """
    cp_comm_type: Literal["p2p", "a2a"] = option("p2p", needs=needs.CONTEXT_PARALLEL)
    """What attention exchanges between context-parallel ranks. p2p: keys and values go round a ring, during the products.
    a2a: each rank gets complete sequences of some of its heads (Ulysses), which every option of attention goes with.
    """
    use_distributed_optimizer: bool = option(False)
    """Shard optimizer state over data-parallel ranks, context-parallel ones included (ZeRO-1)."""
    expert_model_parallel_size: int = option(1, range=POSITIVE, largest=1_000_000)
    """Ranks that split the experts of a layer and exchange tokens."""
    expert_tensor_parallel_size: int | None = option(None, range=POSITIVE, largest=1_000_000)
    """Ranks that split each expert's matrices: 1 or the tensor-parallel size. Derived if not given: the tensor-parallel
    size.
    """
    moe_dispatch_chunks: int = option(1, range=POSITIVE, needs=needs.EXPERT_PARALLEL)
    """Number of parts in which tokens are exchanged with other ranks' experts, a few local experts in each: one part
    travels while the experts of another compute, forwards and backwards. Results are the same, bit for bit.
    """
    moe_shared_expert_overlap: bool = option(False, needs=needs.EXPERT_PARALLEL)
    """Compute the shared expert while tokens travel to the routed ones."""
    moe_all_to_all_backend: Literal["auto", "torch", "extension"] = option("auto", needs=needs.EXPERT_PARALLEL)
    """Transport of tokens. torch: its process group. extension: shared memory on the CPU, an NCCL communicator with a
    stream of its own on CUDA; an error where it cannot be had. auto: the extension on the CPU where it can be had, else
    torch.
    """
    moe_hierarchical_all_to_all: bool = option(False, needs=needs.EXPERT_PARALLEL)
    """On CUDA, send tokens within their node first and then between nodes, one message to each node."""
    overlap_grad_reduce: bool = option(False)
    """Reduce gradients while the step's last backward passes still run. The pool's are always reduced at the end."""
    ddp_bucket_size: int | None = option(None, range=POSITIVE)
    """Elements of one gradient buffer, which is reduced at once; 40 million if not given."""
    elastic: bool = option(False)
    """Take the nearest legal layout where the launcher starts another number of ranks than the layout needs (torchrun
    --nnodes 1:4): data parallelism changes first. Needs --global-batch-size, which stays.
    """
    distributed_backend: Literal["auto", "gloo", "nccl"] = option("auto")
    """auto: NCCL where CUDA is found, else gloo."""
    preflight: bool = option(False)
    """Test memory, speed, links and clocks of all ranks before training, and name the slow ones."""
    preflight_calibration: str | None = option(None, needs=needs.PREFLIGHT)
    """A file of `plan --calibrate`: name also ranks and groups that are slower than it says."""
    distributed_timeout_minutes: float = option(10.0, range=ABOVE_ZERO, largest=1_000_000)
    """Longest wait for another rank."""

    @property
    def expert_tp(self) -> int:
        """Ranks that split each expert's matrices."""
        if self.expert_tensor_parallel_size is None:
            return self.tensor_model_parallel_size
        return self.expert_tensor_parallel_size
