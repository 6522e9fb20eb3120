"""A writer of tensors one after another. torch's own writer holds all of a file's tensors until the file is complete."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, _write_item
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_samoe.dist_checkpointing.file_storage import Writer


class StreamingWriter(Writer):
    """A writer that holds one tensor at a time, so that tensors made on demand need the memory of one."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes this rank's file and returns a completed future, as torch expects."""
        name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        results = []
        with self.fs.create_stream(self.fs.concat_path(self.path, name), "wb") as stream:
            for item in plan.items:
                data: Any = planner.resolve_data(item)
                if isinstance(data, Tensor):
                    data = _alone(data)
                results.append(
                    _write_item(self.transforms, stream, data, item, name, self.serialization_format)  # type: ignore[arg-type]
                )
                del data
            os.fsync(stream.fileno())
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future


def _alone(tensor: Tensor) -> Tensor:
    """Returns a tensor in its own CPU memory: saving a view saves its whole storage."""
    tensor = tensor.detach().to(torch.device("cpu"))
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
