"""Shows how far a run is: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time

from megatron_samoe.datasets.preprocess.journal import Totals
from megatron_samoe.errors import in_units


class Progress:
    """Prints to standard error.

    Args:
        total_bytes: of the inputs on disk; 0 if unknown (standard input).
        itemsize: bytes per token.
        log_interval: documents between lines where the output is not a terminal.
        quiet: print nothing.
    """

    def __init__(self, total_bytes: int, itemsize: int, log_interval: int, quiet: bool):
        self._total, self._itemsize, self._interval = total_bytes, itemsize, log_interval
        self._quiet, self._terminal = quiet, sys.stderr.isatty()
        self._start = self._shown = time.monotonic()
        self._shown_documents = self._first_bytes = self._first_documents = -1

    def show(self, totals: Totals, raw_bytes: int, last: bool = False) -> None:
        """Shows the state after a chunk; `raw_bytes` counts input on disk."""
        documents = totals.positions[0].num_documents
        if self._first_bytes < 0:
            self._first_bytes, self._first_documents = totals.num_bytes, documents
        now = time.monotonic()
        waited_s, new = now - self._shown, documents - self._shown_documents
        is_due = waited_s >= 0.2 if self._terminal else waited_s >= 1.0 and new >= self._interval
        if self._quiet or not (is_due or last):
            return
        elapsed = max(now - self._start, 1e-6)
        share = min(raw_bytes / self._total, 1.0) if self._total else 0.0
        tokens = sum(position.num_bytes for position in totals.positions) // self._itemsize
        left = f", {elapsed * (1 - share) / share:.0f} s left" if 0 < share < 1 else ""
        rate = f"{(documents - self._first_documents) / elapsed:,.0f} documents/s"
        speed = in_units((totals.num_bytes - self._first_bytes) / elapsed, "B/s")
        text = f"{documents:,} documents, {tokens:,} tokens, {rate}, {speed}{left}"
        if self._total:
            text = f"{share:4.0%} {text}"
        if self._terminal:
            bar = f"[{'#' * int(30 * share):.<30}] " if self._total else ""
            print(f"\r\x1b[K{bar}{text}", end="\n" if last else "", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)
        self._shown, self._shown_documents = now, documents
