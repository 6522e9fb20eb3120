"""A record of every rank when a job hangs: stacks shortly before the time-out, and the last collectives after it."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.dist_checkpointing.store import newest_in_words
from megatron_samoe.errors import CommunicationError
from megatron_samoe.parallel_state.backend import is_communication_failure
from megatron_samoe.parallel_state.state import ParallelState

#: Share of the time-out after which a step that has not ended is looked at: before others give up on its rank, and
#: torchrun kills it.
_EARLY = 0.9


class HangWatch:
    """Watches one rank's progress; a context.

    A thread of faulthandler's, which needs no interpreter lock, writes the stacks of all threads if nothing ends in time.
    They go to `rank-N.txt`, which stays only if something was written.

    Args:
        folder: for the ranks' files; None for no files.
        timeout_s: longest wait of a rank for another.
    """

    def __init__(self, folder: Path | None, rank: int, timeout_s: float):
        self.folder, self._rank, self._after_s = folder, rank, _EARLY * timeout_s
        self.doing = "starting"
        self._file: IO[str] | None = None
        self._header_bytes = 0

    @staticmethod
    def of(config: PretrainConfig, rank: int) -> HangWatch:
        """Returns what watches a rank of a run."""
        return HangWatch(config.folder_of("hangs"), rank, 60.0 * config.parallel.distributed_timeout_minutes)

    def __enter__(self) -> HangWatch:
        if self.folder is not None:
            with contextlib.suppress(OSError):  # a folder that cannot be written is for the first checkpoint to report
                self.folder.mkdir(parents=True, exist_ok=True)
                self._file = open(self.path, "w")
                self._file.write(f"rank {self._rank}, process {os.getpid()} on {socket.gethostname()}\n")
                self._file.flush()
                self._header_bytes = self._file.tell()
        return self

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self._file is None:
            return
        assert self.folder is not None
        empty = os.fstat(self._file.fileno()).st_size <= self._header_bytes
        with contextlib.suppress(OSError):  # a full disk has been reported, or does not matter
            self._file.close()
        with contextlib.suppress(OSError):
            if empty:
                os.unlink(self.path)
            os.rmdir(self.folder)  # which the last rank can

    @property
    def path(self) -> Path:
        """The rank's file."""
        assert self.folder is not None
        return self.folder / f"rank-{self._rank:05d}.txt"

    def begin(self, doing: str) -> None:
        """Something begins, and should end within the time-out."""
        self.doing = doing
        if self._file is not None:
            faulthandler.dump_traceback_later(self._after_s, file=self._file)

    @contextlib.contextmanager
    def naming_lost_ranks(self, parallel: ParallelState, save: str | None) -> Iterator[None]:
        """Watches the block, and says what this rank was doing when it lost another.

        Args:
            save: folder of the run's checkpoints.

        Raises:
            CommunicationError: another rank died or hung.
        """
        with self:
            try:
                yield
            except CommunicationError as error:
                error.args = (f"{error}{self.lost_others(str(error))}",)
                raise
            except RuntimeError as error:
                if not is_communication_failure(error):
                    raise
                problem = str(error).splitlines()[0]
                raise CommunicationError(
                    f"Rank {parallel.rank} of {parallel.world_size} lost another rank while {self.doing}: {problem} "
                    f"{newest_in_words(save)}{self.lost_others(problem)}"
                ) from error

    def lost_others(self, problem: str) -> str:
        """Notes what happened to this rank, its stacks and its last collectives; returns where, as a sentence for messages."""
        if self._file is None:
            return ""
        try:
            self._file.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} while {self.doing}: {problem}\n\n")
            self._file.flush()
            faulthandler.dump_traceback(file=self._file)
            self._file.write(
                "\nlast collectives, the newest last:\n" + "".join(f"  {line}\n" for line in last_collectives())
            )
            self._file.flush()
        except OSError:
            return ""
        return f" What each rank was doing is in {self.folder}."


def last_collectives() -> list[str]:
    """Returns the newest 20 entries of torch's flight recorder, a line each; nothing where this torch has none.

    It records where TORCH_FR_BUFFER_SIZE was set before torch was loaded, as `start.prepare` does.
    """
    try:
        recorded = json.loads(torch._C._distributed_c10d._dump_fr_trace_json(True, False))  # type: ignore[attr-defined]
        return [_line(entry) for entry in recorded.get("entries", [])[-20:]]
    except (AttributeError, RuntimeError, ValueError, TypeError, KeyError):
        return []


def _line(entry: dict[str, Any]) -> str:
    shapes = f"{entry['input_sizes']} {entry['input_dtypes']}"
    return f"{entry['profiling_name']} number {entry['collective_seq_id']} of {entry['process_group'][1]}, {shapes}"
