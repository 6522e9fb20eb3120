"""The data tools beside their peers, alternating in one run."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro

from megatron_samoe import children
from megatron_samoe.cli import train_tokenizer
from megatron_samoe.datasets import index_format
from megatron_samoe.datasets.gpt_dataset import GPTDataset, SampleFormat
from megatron_samoe.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron_samoe.datasets.loader import DataLoader
from megatron_samoe.datasets.samplers import PretrainingSampler
from megatron_samoe.datasets.tokenizer import build_tokenizer
from megatron_samoe.errors import ConfigError, DataError
from tools.benchmarks.harness import (
    Benchmark,
    Row,
    Times,
    forget_peak,
    in_turn,
    medians_of,
    process_status_kb,
    seconds_of,
)

#: Random samples that are read in a round.
READS = 4000
#: What trains a tokenizer, how it is named, and how its file ends.
TOKENIZERS = {
    "SentencePiece unigram": ("sentencepiece-unigram", "SentencePieceTokenizer", ".model"),
    "SentencePiece BPE": ("sentencepiece-bpe", "SentencePieceTokenizer", ".model"),
    "byte-level BPE": ("byte-bpe", "HuggingFaceTokenizer", ".json"),
}
#: Speeds that are shown, by the times that they are of.
RATES = {"ours": "ours", "ours_with_start": "ours_all", "classic": "classic", "bare_engine": "bare"}


@dataclass(frozen=True, kw_only=True)
class DataBenchmark(Benchmark):
    """the data tools beside their peers"""

    name = "data"

    what: tyro.conf.Positional[tuple[Literal["preprocess", "index", "reads"], ...]]
    corpus: str | None = None
    """folder of .txt files for preprocess"""
    tokenizer: tuple[Literal["sentencepiece-unigram", "sentencepiece-bpe", "byte-bpe"], ...] = ()
    """only these"""
    workers: int = 2
    rounds: int = 3
    """counted rounds; medians are reported"""
    classic_rounds: int = 1
    documents: int = 10_000_000
    mean_tokens: int = 100
    seq_length: int = 1024

    def run(self) -> None:
        if "preprocess" in self.what and not self.corpus:
            raise ConfigError("--corpus", None, "must name a folder of .txt files for preprocess")
        results: dict[str, Row] = {what: getattr(self, what)() for what in self.what}
        for what, rows in results.items():
            print(f"\n{what}")
            for name, values in rows.items():
                shown = "  ".join(f"{k} {v}" for k, v in values.items()) if isinstance(values, dict) else values
                print(f"  {name:24} {shown}")
        self.write_json(results)

    def preprocess(self) -> Row:
        """Returns MB/s of ours, the classic loop and the bare engine for each tokenizer."""
        result: Row = {}
        with tempfile.TemporaryDirectory() as folder:
            corpus = f"{folder}/corpus.jsonl"
            documents, num_bytes = make_documents(str(self.corpus), corpus)
            result["corpus"] = {"documents": documents, "MB": round(num_bytes / 1e6, 1)}
            for name, (trainer, kind, suffix) in TOKENIZERS.items():
                if trainer in (self.tokenizer or (trainer,)):
                    words = f"--type {trainer} --vocab-size 8192 --sample-mb 4".split()
                    train_tokenizer.main([*words, "--input", corpus, "--output-prefix", f"{folder}/{trainer}"])
                    median = medians_of(self._preprocess_times(corpus, kind, f"{folder}/{trainer}{suffix}"))
                    result[name] = _preprocess_figures(median, documents, num_bytes / 1e6)
        return result

    def _preprocess_times(self, corpus: str, kind: str, model: str) -> Times:
        texts = [json.loads(line)["text"] for line in open(corpus, encoding="utf-8")]
        times: Times = {}
        for number in range(self.rounds):
            out, theirs = f"{model}-o{number}", f"{model}-c{number}"
            figures = ours(corpus, kind, model, out, self.workers)
            figures |= _with_cpu("bare", partial(bare_engine, texts, kind, model, self.workers))
            if number < self.classic_rounds:
                figures |= _with_cpu("classic", partial(classic, corpus, kind, model, theirs, self.workers))
                for suffix in (".bin", ".idx"):
                    if Path(f"{out}_text_document{suffix}").read_bytes() != Path(theirs + suffix).read_bytes():
                        raise DataError(f"{out}_text_document{suffix} and {theirs}{suffix} differ.")
            for figure, value in figures.items():
                times.setdefault(figure, []).append(value)
        return times

    def index(self) -> Row:
        """Returns time and peak memory of building the sample index, each in a fresh process."""
        with tempfile.TemporaryDirectory() as folder:
            prefix = f"{folder}/synthetic"
            make_synthetic(prefix, self.documents, self.mean_tokens)
            runs: dict[str, Times] = {which: {"s": [], "MB": []} for which in BUILD}
            for _, which in itertools.product(range(self.rounds), BUILD):
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
                    for figure, value in fresh.submit(_build_once, which, prefix, self.seq_length).result().items():
                        runs[which][figure].append(value)
        medians = {which: medians_of(times) for which, times in runs.items()}
        peer, mine = medians["megatron-core"], medians["ours"]
        ratios = {
            f"{word}_ratio": round(mine[unit] / peer[unit], 2) for word, unit in (("time", "s"), ("memory", "MB"))
        }
        return {"documents": self.documents, **medians, **ratios}

    def reads(self) -> Row:
        """Returns random samples per second of both, and how much of its time a step would wait for the loader."""
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            prefix = f"{folder}/synthetic"
            make_synthetic(prefix, min(self.documents, 1_000_000), 300)
            data = {which: build(prefix, self.seq_length, f"{folder}/{which}") for which, build in BUILD.items()}
            Path(prefix + ".bin").read_bytes()
            mine = data["ours"]
            draws = {which: np.random.default_rng(0) for which in data}  # the same samples of both

            def read(which: str) -> None:
                for index in draws[which].integers(0, len(mine), READS).tolist():
                    data[which][index]

            medians = medians_of(in_turn({which: partial(read, which) for which in data}, self.rounds))
            waits = {}
            for workers, name in enumerate(("in the loop", "a thread ahead")):
                loader = DataLoader(mine, PretrainingSampler(len(mine), 0, 8, 0, 1), num_workers=workers)
                waits[name] = round(_waiting(iter(loader), 0.02) * 1e3, 3)
        return {
            "samples_s": {which: round(READS / seconds) for which, seconds in medians.items()},
            "ratio": round(medians["megatron-core"] / medians["ours"], 2),
            "wait_per_20_ms_step_ms": waits,
        }


def cpu_seconds() -> float:
    """Returns the CPU seconds of this process and of its ended children: unlike wall time, blind to other load."""
    own, ended = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime


def _with_cpu(name: str, run: Callable[[], float]) -> dict[str, float]:
    """Returns the seconds that a run says it took, and its CPU seconds."""
    before = cpu_seconds()
    seconds = run()
    return {name: seconds, f"{name}_cpu": cpu_seconds() - before}


def make_documents(folder: str, target: str, document_chars: int = 2000) -> tuple[int, int]:
    """Writes the text files of a folder as JSONL of documents of about `document_chars`; returns (documents, bytes)."""
    count = 0
    with open(target, "w", encoding="utf-8") as out:
        for path in sorted(Path(folder).glob("*.txt")):
            held = ""
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            for number, line in enumerate(lines, 1):
                held += line
                if len(held) >= document_chars or number == len(lines):
                    out.write(json.dumps({"text": held}) + "\n")
                    held, count = "", count + 1
    return count, os.path.getsize(target)


# The classic loop: one process pool over documents, one writer, ids as Python lists.
_classic: Any = None


def _classic_start(kind: str, model: str) -> None:
    global _classic
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if kind == "SentencePieceTokenizer":
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_file=model)
        _classic = (processor.encode, processor.eos_id())
    else:
        import tokenizers

        tokenizer = tokenizers.Tokenizer.from_file(model)
        _classic = (lambda text: tokenizer.encode(text).ids, tokenizer.token_to_id("<|endoftext|>"))


def _classic_encode(line: str) -> list[int]:
    return [*_classic[0](json.loads(line)["text"]), _classic[1]]


def classic(corpus: str, kind: str, model: str, output: str, workers: int) -> float:
    """Runs the classic loop; returns seconds without start-up."""
    with multiprocessing.get_context("spawn").Pool(workers, initializer=_classic_start, initargs=(kind, model)) as pool:
        pool.map(_classic_encode, ['{"text": "warm"}'] * workers)
        builder = IndexedDatasetBuilder(output + ".bin", np.uint16)
        start = time.perf_counter()
        with open(corpus, encoding="utf-8") as file:
            for ids in pool.imap(_classic_encode, file, 32):
                builder.add_document(np.array(ids, dtype=np.int64), [len(ids)])
        builder.finalize(output + ".idx")
        return time.perf_counter() - start


def ours(corpus: str, kind: str, model: str, output: str, workers: int) -> dict[str, float]:
    """Runs the preprocessor as a user does.

    Returns seconds: in all; until the first token is written; in all less a run on one short document (start-up); and
    the same in CPU time.
    """
    flags = f"--tokenizer-type {kind} --append-eod --workers {workers} --quiet".split()

    def command(source: str, target: str) -> list[str]:
        words = ["preprocess", "--input", source, "--tokenizer-model", model, "--output-prefix", target, *flags]
        return [sys.executable, "-m", "megatron_samoe", *words]

    target, first = f"{output}_text_document.bin.partial", 0.0
    start, cpu = time.perf_counter(), cpu_seconds()
    process = children.start(command(corpus, output), stdout=subprocess.DEVNULL)
    while process.poll() is None:
        if not first and os.path.exists(target) and os.path.getsize(target):
            first = time.perf_counter() - start
        time.sleep(0.005 if not first else 0.01)
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    if process.returncode:
        raise DataError(f"megatron-samoe preprocess failed with status {process.returncode}.")
    empty = output + "_start"
    Path(empty + ".jsonl").write_text('{"text": "start"}\n')
    start, start_cpu = time.perf_counter(), cpu_seconds()
    children.run(command(empty + ".jsonl", empty), stdout=subprocess.DEVNULL, check=True)
    return {
        "ours_all": seconds,
        "first_token_s": first,
        "ours": seconds - (time.perf_counter() - start),
        "ours_cpu": cpu - (cpu_seconds() - start_cpu),
    }


def bare_engine(texts: list[str], kind: str, model: str, threads: int) -> float:
    """Returns the seconds that the tokenizer engine alone takes on texts in memory, in `threads` threads."""
    tokenizer: Any = build_tokenizer(kind, model)
    if kind == "SentencePieceTokenizer":
        processor = tokenizer._processor
        encode = getattr(processor, "encode_as_numpy", processor.encode)  # arrays are faster, where it makes them
        return seconds_of(lambda: encode(texts, num_threads=threads))
    encode = tokenizer._fast.encode_to_numpy
    parts = np.array_split(np.array(texts, dtype=object), 64)
    with ThreadPoolExecutor(threads) as pool:
        return seconds_of(lambda: list(pool.map(lambda part: [encode(text) for text in part], parts)))


def _preprocess_figures(median: dict[str, float], documents: int, megabytes: float) -> Row:
    def ratio(slow: str, fast: str) -> float:
        return round(median[slow] / median[fast], 2)

    return {
        **{f"{shown}_MB_s": round(megabytes / median[name], 1) for shown, name in RATES.items()},
        "ours_documents_s": round(documents / median["ours"]),
        "of_bare_engine": ratio("bare", "ours"),
        "times_classic": ratio("classic", "ours"),
        "of_bare_engine_by_cpu": ratio("bare_cpu", "ours_cpu"),
        "times_classic_by_cpu": ratio("classic_cpu", "ours_cpu"),
        "first_token_s": round(median["first_token_s"], 2),
    }


def make_synthetic(prefix: str, documents: int, mean_tokens: int) -> None:
    """Writes a dataset of random documents with log-normal lengths."""
    random = np.random.default_rng(0)
    lengths = np.maximum(8, random.lognormal(np.log(mean_tokens) - 0.32, 0.8, documents)).astype(np.int32)
    total = int(lengths.sum(dtype=np.int64))
    pool = random.integers(1, 8192, 1 << 22).astype(np.uint16)
    with open(prefix + ".bin", "wb") as file:
        for start in range(0, total, len(pool)):
            file.write(pool[: total - start].data)
    index_format.write_index(prefix + ".idx", np.uint16, lengths, np.arange(documents + 1, dtype=np.int64))


def _peer(prefix: str, seq_length: int, cache: str) -> Any:
    """Returns megatron-core's GPTDataset, one epoch."""
    warnings.simplefilter("ignore")
    from megatron.core.datasets import gpt_dataset
    from megatron.core.datasets.indexed_dataset import IndexedDataset as TheirDataset
    from megatron.core.datasets.utils import Split

    class TheirTokenizer:
        vocab_size, eod, pad = 8192, 0, -1
        unique_identifiers = {"class": "TheirTokenizer"}  # noqa: RUF012

    plain = dict.fromkeys(
        ("reset_position_ids", "reset_attention_mask", "eod_mask_loss", "create_attention_mask"), False
    )
    config = gpt_dataset.GPTDatasetConfig(
        random_seed=1,
        sequence_length=seq_length,
        split="1",
        blend=([prefix], None),
        path_to_cache=cache,
        tokenizer=TheirTokenizer(),
        **plain,
    )
    data = TheirDataset(prefix)
    documents = np.arange(len(data), dtype=np.int32)
    return gpt_dataset.GPTDataset(data, prefix, documents, None, Split.train, config)


def _mine(prefix: str, seq_length: int, cache: str) -> Any:
    data = IndexedDataset(prefix)
    return GPTDataset(data, 0, len(data), None, 1, SampleFormat(seq_length, 0, 8192), cache)


BUILD = {"ours": _mine, "megatron-core": _peer}


def _build_once(which: str, prefix: str, seq_length: int) -> dict[str, float]:
    """Builds one index in this process, by one thread; returns seconds and added peak MB (maps of files count)."""
    torch.set_num_threads(1)
    build = BUILD[which]
    with tempfile.TemporaryDirectory() as small, tempfile.TemporaryDirectory() as cache:
        make_synthetic(f"{small}/warm", 100, 50)
        build(f"{small}/warm", 16, small)
        forget_peak()
        before = process_status_kb("VmRSS")
        seconds = seconds_of(lambda: build(prefix, seq_length, cache))
        return {"s": seconds, "MB": (process_status_kb("VmHWM") - before) / 1024}


def _waiting(batches: Iterator[Any], step_s: float, steps: int = 60) -> float:
    """Returns the median seconds that a step waits for its micro-batch of 8 while it computes for `step_s`."""
    waits = []
    square = np.ones((64, 64), dtype=np.float32)
    for _ in range(steps):
        waits.append(seconds_of(lambda: next(batches)))
        end = time.perf_counter() + step_s
        while time.perf_counter() < end:
            square @ square
    return statistics.median(waits[5:])
