"""Coordinates a preprocessing run: hands out chunks, gives their results offsets in order, keeps the journal.

Output does not depend on the number of workers: a chunk's offsets are known as soon as the sizes of all earlier
chunks are, and only the worker that holds it writes it there. At most MAX_HELD chunks per worker are encoded and not
yet written, so memory is bounded: about (MAX_HELD + 1) * (chunk + its ids) per worker, in addition to its tokenizer.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, field, replace
from itertools import accumulate
from typing import Any

import numpy as np

from megatron_samoe.datasets.index_format import partial_paths
from megatron_samoe.datasets.preprocess import dedup, finish, inputs, journal
from megatron_samoe.datasets.preprocess.executors import Executor, make_executor
from megatron_samoe.datasets.preprocess.inputs import Chunk
from megatron_samoe.datasets.preprocess.options import DEFAULT_CHUNK_BYTES, PreprocessOptions
from megatron_samoe.datasets.preprocess.progress import Progress
from megatron_samoe.datasets.preprocess.worker import Summary, TokenizerFacts
from megatron_samoe.datasets.preprocess.writer import NO_ROOM, Written
from megatron_samoe.errors import DataError, some
from megatron_samoe.parsing import JsonObject

MAX_HELD = 2
# A chunk during which this many workers died is not tried again.
MAX_DEATHS = 2
LARGE_CORPUS_BYTES = 16 << 30


def preprocess(options: PreprocessOptions) -> finish.Report:
    """Makes the datasets the options describe and returns what was done.

    Raises DataError for bad input (with on_bad_input "fail", at the first bad line in the order of the corpus), an
    empty corpus, or a worker that keeps dying. The output then does not exist; what was done stays for --resume.
    """
    files = inputs.find_inputs(options)
    if any(file.format == "text" for file in files) and len(options.json_keys) > 1:
        raise DataError("Text files have one column: give one name to --json-keys.")
    if options.resume and _reads_stdin(files):
        raise DataError("--resume cannot be used with standard input: it cannot be read a second time.")
    if options.chunk_bytes == DEFAULT_CHUNK_BYTES and sum(file.num_bytes for file in files) > LARGE_CORPUS_BYTES:
        # The journal has a line per chunk: a terabyte should not make a million.
        options = replace(options, chunk_bytes=8 * DEFAULT_CHUNK_BYTES)
    os.makedirs(options.folder, exist_ok=True)
    try:
        return _journaled(options, files)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        again = "start again" if _reads_stdin(files) else "give the same command with --resume, which resumes from here"
        raise DataError(
            f"The output cannot be written to {options.folder}: {error.strerror}. Make room, and {again}."
        ) from error


def _reads_stdin(files: list[inputs.InputFile]) -> bool:
    return any(file.path == inputs.STDIN for file in files)


def _journaled(options: PreprocessOptions, files: list[inputs.InputFile]) -> finish.Report:
    log = journal.Journal(options.journal_path())
    executor, is_complete = make_executor(options), False
    try:
        report = _Run(options, files, log, executor, executor.start()).execute()
        is_complete = True
        return report
    finally:
        executor.close()
        log.close(remove=is_complete)


@dataclass
class _InFlight:
    """A chunk that was handed out and is not yet in the journal."""

    chunk: Chunk
    worker: int
    summary: Summary | None = None
    order: tuple[Any, ...] | None = None
    """The write message, once the chunk has offsets."""
    left_out: Counter[str] = field(default_factory=Counter)
    written: list[Written] | None = None
    deaths: int = 0


class _Run:
    def __init__(
        self,
        options: PreprocessOptions,
        files: list[inputs.InputFile],
        log: journal.Journal,
        executor: Executor,
        facts: TokenizerFacts,
    ):
        self._options, self._files, self._log, self._executor, self._facts = options, files, log, executor, facts
        self._prefixes = [options.dataset_prefix(key) for key in options.json_keys]
        self._totals = journal.Totals.start(len(self._prefixes))
        self._flight: dict[int, _InFlight] = {}
        self._held = [0] * executor.num_workers
        self._to_assign = self._to_log = 0
        self._seen = dedup.KeySet()
        self._progress = Progress(
            sum(file.num_bytes for file in files), facts.itemsize, options.log_interval, options.quiet
        )
        sizes_before = accumulate((file.num_bytes for file in files), initial=0)
        self._sizes_before = {file.path: before for file, before in zip(files, sizes_before, strict=False)}
        self._positions = list(self._totals.positions)

    def execute(self) -> finish.Report:
        """Does what is left of the run."""
        header: JsonObject = {
            "options": self._options.output_options(),
            "inputs": [[file.path, file.format, file.num_bytes, file.mtime_ns] for file in self._files],
            "tokenizer": self._facts.fingerprint,
        }
        header = json.loads(json.dumps(header))  # as it will be read back
        finished = self._resume(header) if self._options.resume else self._start(header)
        if not finished:
            self._encode_all()
            self._check_not_empty()
        self._progress.show(self._totals, 1 << 62, last=True)
        return finish.finish(self._options, self._files, self._facts, self._totals, self._log, finished)

    def _start(self, header: JsonObject) -> bool:
        self._log.restart(header)
        for prefix in self._prefixes:
            for path in partial_paths(prefix):
                with open(path, "wb") as file:
                    if path.endswith(".boundaries.partial"):
                        file.write(b"\0" * 8)
        if self._options.deduplicate != "none":
            open(finish.keys_path(self._options), "wb").close()
        return False

    def _resume(self, header: JsonObject) -> bool:
        """Takes over what an earlier run did; returns whether all chunks are in the output."""
        old, entries = self._log.read()
        if old is None:
            return self._start(header)
        if old != header:
            changed = [name for name in header if old.get(name) != header[name]]
            raise DataError(
                f"--resume: the earlier run of {self._options.output_prefix} had other {', '.join(changed)}. "
                "Repeat it with the same ones, or leave out --resume to start again."
            )
        complete = bool(entries) and entries[-1].get("complete", False)
        good = [entry for entry in entries if "chunk" in entry]
        if not complete:
            good = journal.verified(good, self._prefixes)
            if not good:
                return self._start(header)
        for entry in good:
            self._totals.add(entry)
        if complete:
            return True
        if self._options.deduplicate != "none":
            self._seen.add(finish.load_keys(self._options, good))
        self._log.keep(old, good)
        self._to_assign = self._to_log = len(good)
        self._positions = list(self._totals.positions)
        return False

    def _encode_all(self) -> None:
        source = _Source(lambda: inputs.cut(self._files, self._options), self._to_log)
        while True:
            while (worker := self._free_worker()) is not None and (chunk := source.next(wait=not self._flight)):
                self._hand_out(chunk, worker)
            if not self._flight:
                break
            timeout_s = 0.02 if self._free_worker() is not None and not source.is_done else 60.0
            for worker, answer in self._executor.receive(timeout_s):
                self._take(worker, answer)

    def _free_worker(self) -> int | None:
        worker = min(range(len(self._held)), key=self._held.__getitem__)
        return worker if self._held[worker] < MAX_HELD else None

    def _hand_out(self, chunk: Chunk, worker: int) -> None:
        self._flight[chunk.number] = _InFlight(chunk, worker)
        self._held[worker] += 1
        self._executor.send(worker, ("chunk", chunk))

    def _take(self, worker: int, answer: tuple[Any, ...]) -> None:
        kind = answer[0]
        if kind == "done":
            summary: Summary = answer[1]
            flight = self._flight[summary.number]
            flight.summary = summary
            if flight.order is not None:  # its first worker died after it had offsets
                self._executor.send(worker, flight.order)
            self._assign_offsets()
        elif kind == "written":
            self._flight[answer[1]].written = answer[2]
            self._held[worker] -= 1
            self._log_ready()
        elif kind == "died":
            self._replace(worker, answer[1])
        elif kind == "refused":
            raise DataError(answer[1])
        elif kind == "no room":
            raise answer[1]
        else:
            raise RuntimeError(f"a worker failed:\n{answer[1]}")

    def _assign_offsets(self) -> None:
        """Gives offsets to encoded chunks, in order."""
        while (flight := self._flight.get(self._to_assign)) is not None and flight.summary is not None:
            summary = flight.summary
            flight.left_out = summary.counts.left_out
            if summary.counts.bad and self._options.on_bad_input == "fail":
                self._log_ready()
                self._refuse(flight, *summary.counts.bad[0])
            keep, sizes = self._deduplicate(flight, summary)
            flight.order = ("write", summary.number, list(self._positions), keep)
            self._positions = [position.after(*size) for position, size in zip(self._positions, sizes, strict=True)]
            self._executor.send(flight.worker, flight.order)
            self._to_assign += 1

    def _refuse(self, flight: _InFlight, line: int, reason: str) -> None:
        # Lines of this file in chunks that have offsets but are not in the journal yet.
        earlier = [self._flight[n] for n in range(self._to_log, flight.chunk.number)]
        base = self._totals.line_in_file
        for other in [*earlier, flight]:
            if other.chunk.new_file:
                base = 0
            if other is not flight and other.summary is not None:
                base += other.summary.counts.lines
        raise DataError(
            f"{flight.chunk.file}:{base + line + 1}: {reason}. "
            "Repair it, or leave such input out with --on-bad-input skip (--resume then continues from here)."
        )

    def _deduplicate(self, flight: _InFlight, summary: Summary) -> tuple[np.ndarray | None, list[tuple[int, ...]]]:
        if summary.keys is None or summary.document_sizes is None:
            return None, list(summary.sizes)
        keep = dedup.first_of_each(summary.keys, self._seen)
        finish.append_keys(self._options, summary.keys[keep])
        if not keep.all():
            flight.left_out["duplicate"] += int((~keep).sum())
        sizes = [(*rows[keep].sum(axis=0).tolist(), int(keep.sum())) for rows in summary.document_sizes]
        return keep, [(int(b), int(s), d) for b, s, d in sizes]

    def _log_ready(self) -> None:
        """Writes chunks to the journal, in order."""
        while (flight := self._flight.get(self._to_log)) is not None and flight.written is not None:
            summary, chunk = flight.summary, flight.chunk
            assert summary is not None
            entry: JsonObject = {
                "chunk": chunk.number,
                "file": chunk.file,
                "new_file": chunk.new_file,
                "keys": [list(astuple(written)) for written in flight.written],
                "lines": summary.counts.lines,
                "bytes": summary.counts.bytes,
                "num_bad": len(summary.counts.bad),
                "bad": summary.counts.bad[: journal.REPORTED_BAD_LINES],
                "left_out": flight.left_out,
            }
            if summary.keys is not None:
                entry["kept_keys"] = int(summary.keys.shape[1]) * flight.written[0].num_documents
            self._log.append(entry)
            self._totals.add(entry)
            del self._flight[self._to_log]
            self._to_log += 1
            self._progress.show(self._totals, self._sizes_before[chunk.file] + chunk.raw_bytes)

    def _replace(self, worker: int, why: str) -> None:
        """Starts a new worker and gives it what the dead one held."""
        lost = [f for _, f in sorted(self._flight.items()) if f.worker == worker and f.written is None]
        # A worker takes its chunks in order: the first that it did not finish is the one it died of.
        for flight in [f for f in lost if f.summary is None][:1] or lost[:1]:
            flight.deaths += 1
            if flight.deaths >= MAX_DEATHS:
                chunk = flight.chunk
                where = f"{chunk.file} from byte {chunk.start}" if chunk.kind == "range" else chunk.file
                raise DataError(
                    f"Workers died {flight.deaths} times while they held chunk {chunk.number} ({where}): {why}. "
                    "If memory ran out, use fewer --workers or a smaller --max-document-mb; --resume continues from here."
                )
        self._executor.restart(worker)
        for flight in lost:
            flight.summary = None
            self._executor.send(worker, ("chunk", flight.chunk))

    def _check_not_empty(self) -> None:
        if self._totals.positions[0].num_documents and any(position.num_bytes for position in self._totals.positions):
            return
        details = finish.describe_losses(self._totals)
        raise DataError(
            f"The corpus is empty: {some([f.path for f in self._files])} hold no document with a token.{details}"
        )


class _Source:
    """Cuts the inputs in a thread of its own, a few chunks ahead; leaves out those already done."""

    def __init__(self, cut: Callable[[], Iterator[Chunk]], skip: int):
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=4)
        self.is_done = False
        threading.Thread(target=self._fill, args=(cut, skip), daemon=True).start()

    def _fill(self, cut: Callable[[], Iterator[Chunk]], skip: int) -> None:
        try:
            for chunk in cut():
                if chunk.number >= skip:
                    self._queue.put(chunk)
            self._queue.put(None)
        except BaseException as error:
            self._queue.put(error)

    def next(self, wait: bool) -> Chunk | None:
        """Returns the next chunk, or None without one (yet, unless `wait`)."""
        item: Chunk | BaseException | None = None
        if not self.is_done:
            with contextlib.suppress(queue.Empty):
                item = self._queue.get(block=wait)
                self.is_done = item is None
        if isinstance(item, BaseException):
            raise item
        return item
