"""System calls that fail as in a sandbox, through a filter of the kernel (seccomp); x86-64 Linux."""

from __future__ import annotations

import ctypes
import errno
import struct

#: Numbers on x86-64.
MEMFD_CREATE, PIDFD_OPEN = 319, 434
_SET_NO_NEW_PRIVS, _SET_SECCOMP, _FILTER = 38, 22, 2
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _ERROR = 0x7FFF0000, 0x00050000


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def forbid(*numbers: int) -> None:
    """Makes these system calls fail with EPERM in this thread and those that it starts, for the rest of its life."""
    instructions = [struct.pack("HBBI", _LOAD, 0, 0, 0)]
    for number in numbers:
        instructions += [
            struct.pack("HBBI", _JUMP_IF_EQUAL, 0, 1, number),
            struct.pack("HBBI", _RETURN, 0, 0, _ERROR | errno.EPERM),
        ]
    instructions.append(struct.pack("HBBI", _RETURN, 0, 0, _ALLOW))
    program = _Program(len(instructions), b"".join(instructions))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(_SET_SECCOMP, _FILTER, ctypes.byref(program)):
        raise OSError(ctypes.get_errno(), "prctl")
