"""Devices that run behind the host, and the one way to read their numbers.

On such a device a number is not there when the host has asked for it: reading one makes the host wait for all earlier
work. So ops keep what depends on data (how many rows an expert has) in tensors of the device, and sizes come from
shapes. On a CPU a number is simply there, and faster ops take it.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

#: Types of these devices. Algorithms are chosen by it and never by `is_cuda`, so a test can run them on another device.
DEVICE_TYPES = frozenset({"cuda"})


def runs_behind_host(device: torch.device) -> bool:
    """Returns whether the host would wait for the device where it reads a number."""
    return device.type in DEVICE_TYPES


class HostCopy:
    """A tensor on its way to the host. The device goes on with other work, and so does the host until `wait`.

    Args:
        x: as the device's current stream will leave it; it must not change before `wait`.
    """

    def __init__(self, x: Tensor):
        self._x = x.detach()
        self._event: torch.Event | None = None
        if x.device.type != "cuda":
            return
        self._x = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        stream = _copy_stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            self._x.copy_(x.detach(), non_blocking=True)
            self._event = stream.record_event()
        x.record_stream(stream)

    def wait(self) -> Tensor:
        """Returns the tensor on the CPU, when it is there."""
        if self._event is not None:
            self._event.synchronize()
        return self._x.cpu()


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Returns the stream of copies, which do not stand in line behind what the device has been given meanwhile."""
    return torch.cuda.Stream(device)
