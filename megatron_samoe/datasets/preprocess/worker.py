"""A worker: takes messages, encodes chunks, writes them. Runs in a process of its own, in-process, or as a Ray actor.

Messages in, one answer each:

    ("chunk", Chunk)                      -> ("done", Summary)
    ("write", number, positions, keep mask)  -> ("written", number, [Written per key])

A worker ends when its connection closes, so none outlives a coordinator that was killed.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from megatron_samoe.datasets.preprocess.encode import Encoded, Encoder
from megatron_samoe.datasets.preprocess.options import PreprocessOptions
from megatron_samoe.datasets.preprocess.records import Counts
from megatron_samoe.datasets.preprocess.writer import NO_ROOM, ShardWriter
from megatron_samoe.errors import DataError


@dataclass(frozen=True)
class TokenizerFacts:
    """Facts on the tokenizer for the coordinator; only workers load it."""

    fingerprint: str
    vocab_size: int
    eod: int
    itemsize: int
    dtype: str
    engine: str


@dataclass(frozen=True)
class Summary:
    """Facts on an encoded chunk for the coordinator, which gives it offsets."""

    number: int
    sizes: list[tuple[int, int, int]]
    """Per key: bytes of tokens, sequences, documents."""
    counts: Counts
    keys: np.ndarray | None
    document_sizes: list[np.ndarray] | None
    """With de-duplication, per key: [documents, 2] of bytes and sequences, to know the sizes after it."""


class Worker:
    """Encodes chunks, keeps them until they have offsets, writes them."""

    def __init__(self, options: PreprocessOptions):
        self.encoder = Encoder(options)
        self._writers = [ShardWriter(options.dataset_prefix(key)) for key in options.json_keys]
        self._held: dict[int, Encoded] = {}

    def facts(self) -> TokenizerFacts:
        tokenizer = self.encoder.tokenizer
        return TokenizerFacts(
            tokenizer.fingerprint,
            tokenizer.vocab_size,
            tokenizer.eod,
            self.encoder.dtype.itemsize,
            self.encoder.dtype.str,
            getattr(tokenizer, "engine", type(tokenizer).__name__),
        )

    def handle(self, message: tuple[Any, ...]) -> tuple[Any, ...]:
        """Returns the answer to one message; what went wrong is an answer too."""
        try:
            if message[0] == "chunk":
                return ("done", self._encode(message[1]))
            assert message[0] == "write"
            return ("written", message[1], self._write(*message[1:]))
        except DataError as error:
            return ("refused", str(error))
        except OSError as error:
            if error.errno in NO_ROOM:
                return ("no room", error)
            return ("refused", f"The output cannot be written: {error}." if message[0] == "write" else str(error))
        except Exception:
            return ("crashed", traceback.format_exc())

    def _encode(self, chunk: Any) -> Summary:
        encoded = self.encoder.encode(chunk)
        self._held[encoded.number] = encoded
        sizes = [(c.tokens.nbytes, len(c.lengths), len(c.sequences)) for c in encoded.columns]
        itemsize = self.encoder.dtype.itemsize
        per_document = None if encoded.keys is None else [c.document_sizes(itemsize) for c in encoded.columns]
        return Summary(encoded.number, sizes, encoded.counts, encoded.keys, per_document)

    def _write(self, number: int, positions: list[Any], keep: np.ndarray | None) -> list[Any]:
        columns = self._held.pop(number).columns
        if keep is not None:
            columns = [column.keep(keep) for column in columns]
        return [writer.write(*pair) for writer, *pair in zip(self._writers, columns, positions, strict=True)]

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


def serve(connection: Connection) -> None:
    """Answers messages until the connection closes. Writes come before chunks: they free memory."""
    try:
        worker = Worker(connection.recv())
        connection.send(("ready", worker.facts()))
    except DataError as error:
        connection.send(("refused", str(error)))
        return
    chunks: queue.Queue[Any] = queue.Queue()
    writes: queue.Queue[Any] = queue.Queue()
    # Messages are taken in by a thread of its own, so that the coordinator never waits while a chunk is encoded.
    threading.Thread(target=_take_in, args=(connection, chunks, writes), daemon=True).start()
    while True:
        chunk = chunks.get()
        while not writes.empty():
            connection.send(worker.handle(writes.get()))
        if chunk is not None:
            connection.send(worker.handle(chunk))


def _take_in(connection: Connection, chunks: queue.Queue[Any], writes: queue.Queue[Any]) -> None:
    while True:
        try:
            message = connection.recv()
        except (EOFError, OSError):
            # Nobody is left to answer. What is half done was never promised.
            os._exit(0)
        if message[0] == "chunk":
            chunks.put(message)
        else:
            writes.put(message)
            chunks.put(None)  # wakes the loop


def main(handle: int) -> None:
    """Serves the coordinator at the other end of an inherited socket until it closes."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # The coordinator decides what an interrupt means; its end closes the connection.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        serve(Connection(handle))
    except (BrokenPipeError, ConnectionResetError, EOFError):
        pass
