"""Devices that work asynchronously, and the one way to read their numbers.

On such a device a number is not there when the host has asked for it: reading one makes the host wait for all earlier
work. So ops keep what depends on data (how many rows an expert has) in tensors of the device, and sizes come from
shapes. On a CPU a number is simply there, and faster ops take it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from megatron_samoe.ops.process_choice import ProcessChoice

#: Types of these devices, and the source of their compute capability. Algorithms are chosen by it and never by `is_cuda`, so
#: another device can be taken for a GPU (`taken_for_gpu`).
DEVICES: ProcessChoice[Mapping[str, Callable[[torch.device], tuple[int, int]]]] = ProcessChoice(
    {"cuda": torch.cuda.get_device_capability}
)


def runs_behind_host(device: torch.device) -> bool:
    """Returns whether the host would wait for the device where it reads a number."""
    return device.type in DEVICES.value


def capability(device: torch.device) -> tuple[int, int]:
    """Returns the compute capability of a device that works asynchronously."""
    return DEVICES.value[device.type](device)


# torch.compile asks once: it could not follow the question, which takes a lock. The decorator that says so, torch.compiler's
# `assume_constant_result`, would load the compiler here, for longer than all else together.
capability._dynamo_marked_constant = True  # type: ignore[attr-defined]


def taken_for_gpu(device_type: str, of_capability: tuple[int, int] = (9, 0)) -> contextlib.AbstractContextManager[None]:
    """Inside, tensors on a type of device go the way of those of a GPU of a capability (9.0: an H100)."""
    return DEVICES.replaced_by({**DEVICES.value, device_type: lambda device: of_capability})


class HostCopy:
    """A tensor on its way to the host. The device continues with other work, and so does the host until `wait`.

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
    """Returns the stream of copies, which do not queue behind work that the device has been given meanwhile."""
    return torch.cuda.Stream(device)
