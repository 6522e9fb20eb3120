"""A worker: takes messages, encodes chunks, writes them. Runs in a process of its own, in-process, or as a Ray actor.

Messages in, one answer each:

    ("chunk", Chunk)                      -> ("done", Summary)
    ("write", number, positions, keep mask)  -> ("written", number, [Written per key])

A worker ends when its connection closes, so none outlives a coordinator that was killed.
"""

from __future__ import annotations

import itertools
import os
import queue
import signal
import threading
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from megatron_samoe.datasets.preprocess.encode import Column, Encoder
from megatron_samoe.datasets.preprocess.inputs import Chunk
from megatron_samoe.datasets.preprocess.options import PreprocessOptions
from megatron_samoe.datasets.preprocess.records import Counts
from megatron_samoe.datasets.preprocess.writer import NO_ROOM, Position, ShardWriter, Written
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
        self._held: dict[int, list[Column]] = {}

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

    def _encode(self, chunk: Chunk) -> Summary:
        columns, counts, keys = self.encoder.encode(chunk)
        self._held[chunk.number] = columns
        sizes = [(c.tokens.nbytes, len(c.lengths), len(c.sequences)) for c in columns]
        itemsize = self.encoder.dtype.itemsize
        per_document = None if keys is None else [c.document_sizes(itemsize) for c in columns]
        return Summary(chunk.number, sizes, counts, keys, per_document)

    def _write(self, number: int, positions: list[Position], keep: np.ndarray | None) -> list[Written]:
        columns = self._held.pop(number)
        if keep is not None:
            columns = [column.keep(keep) for column in columns]
        targets = zip(self._writers, columns, positions, strict=True)
        return [writer.write(column, position) for writer, column, position in targets]

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
    messages: queue.PriorityQueue[tuple[bool, int, Any]] = queue.PriorityQueue()

    def take_in() -> None:
        for number in itertools.count():
            try:
                message = connection.recv()
            except (EOFError, OSError):
                # Nobody is left to answer. What is half done was never promised.
                os._exit(0)
            messages.put((message[0] == "chunk", number, message))

    # In a thread of its own, so that the coordinator never waits while a chunk is encoded.
    threading.Thread(target=take_in, daemon=True).start()
    while True:
        connection.send(worker.handle(messages.get()[2]))


def main(handle: int) -> None:
    """Serves the coordinator at the other end of an inherited socket until it closes."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # The coordinator decides what an interrupt means; its end closes the connection.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        serve(Connection(handle))
    except (BrokenPipeError, ConnectionResetError, EOFError):
        pass
