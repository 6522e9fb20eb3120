"""Measures the data tools beside their peers, alternating in one run; prints a table, and JSON if asked."""

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
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_samoe import children
from megatron_samoe.benchmarks.common import (
    Row,
    Times,
    add_alone,
    add_sizes,
    in_turn,
    medians_of,
    seconds_of,
    write_json,
)
from megatron_samoe.cli.arguments import Options
from megatron_samoe.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron_samoe.datasets.tokenizer import build_tokenizer

#: Random samples that are read in a round.
READS = 4000
TOKENIZERS = {
    "SentencePiece unigram": ("sentencepiece-unigram", "SentencePieceTokenizer", ".model"),
    "SentencePiece BPE": ("sentencepiece-bpe", "SentencePieceTokenizer", ".model"),
    "byte-level BPE": ("byte-bpe", "HuggingFaceTokenizer", ".json"),
}


def cpu_seconds() -> float:
    """Returns the CPU seconds of this process and of its ended children: unlike wall time, blind to other load."""
    own, ended = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime


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


def _classic_encode(line: str) -> tuple[list[int], int]:
    ids = _classic[0](json.loads(line)["text"])
    return [*ids, _classic[1]], len(line)


def classic(corpus: str, kind: str, model: str, output: str, workers: int) -> float:
    """Runs the classic loop; returns seconds without start-up."""
    pool = multiprocessing.get_context("spawn").Pool(workers, initializer=_classic_start, initargs=(kind, model))
    pool.map(_classic_encode, ['{"text": "warm"}'] * workers)
    builder = IndexedDatasetBuilder(output + ".bin", np.uint16)
    start = time.perf_counter()
    with open(corpus, encoding="utf-8") as file:
        for ids, _ in pool.imap(_classic_encode, file, 32):
            builder.add_document(np.array(ids, dtype=np.int64), [len(ids)])
    builder.finalize(output + ".idx")
    seconds = time.perf_counter() - start
    pool.terminate()
    pool.join()
    return seconds


def ours(corpus: str, kind: str, model: str, output: str, workers: int) -> dict[str, float]:
    """Runs the preprocessor as a user does.

    Returns seconds: in all; until the first token is written; in all less a run on one short document (start-up); and
    the same in CPU time.
    """

    def command(source: str, target: str) -> list[str]:
        return [
            sys.executable, "-m", "megatron_samoe", "preprocess", "--input", source, "--tokenizer-type", kind,
            "--tokenizer-model", model, "--output-prefix", target, "--append-eod", "--workers", str(workers), "--quiet",
        ]  # fmt: skip

    target, first = f"{output}_text_document.bin.partial", 0.0
    start, cpu = time.perf_counter(), cpu_seconds()
    process = children.start(command(corpus, output), stdout=subprocess.DEVNULL)
    while process.poll() is None:
        if not first and os.path.exists(target) and os.path.getsize(target):
            first = time.perf_counter() - start
        time.sleep(0.005 if not first else 0.01)
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    if process.returncode:
        raise SystemExit(f"megatron-samoe preprocess failed with status {process.returncode}")
    empty = output + "_start"
    Path(empty + ".jsonl").write_text('{"text": "start"}\n')
    start, start_cpu = time.perf_counter(), cpu_seconds()
    children.run(command(empty + ".jsonl", empty), stdout=subprocess.DEVNULL, check=True)
    return {
        "ours_all": seconds, "first_token_s": first, "ours": seconds - (time.perf_counter() - start),
        "ours_cpu": cpu - (cpu_seconds() - start_cpu),
    }  # fmt: skip


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


def benchmark_preprocess(args: Options) -> Row:
    """Returns MB/s of ours, the classic loop and the bare engine for each tokenizer."""
    from megatron_samoe.cli import train_tokenizer

    result: Row = {}
    with tempfile.TemporaryDirectory() as folder:
        corpus = f"{folder}/corpus.jsonl"
        documents, num_bytes = make_documents(args.corpus, corpus)
        texts = [json.loads(line)["text"] for line in open(corpus, encoding="utf-8")]
        result["corpus"] = {"documents": documents, "MB": round(num_bytes / 1e6, 1)}
        for name, (trainer, kind, suffix) in TOKENIZERS.items():
            if args.tokenizer and trainer not in args.tokenizer:
                continue
            model = f"{folder}/{trainer}"
            words = f"--type {trainer} --vocab-size 8192 --sample-mb 4".split()
            train_tokenizer.main([*words, "--input", corpus, "--output-prefix", model])
            model += suffix
            times: Times = {}
            for number in range(args.rounds):
                out, theirs = f"{folder}/o{number}", f"{folder}/c{number}"
                figures = ours(corpus, kind, model, out, args.workers)
                figures |= _with_cpu("bare", partial(bare_engine, texts, kind, model, args.workers))
                if number < args.classic_rounds:
                    figures |= _with_cpu("classic", partial(classic, corpus, kind, model, theirs, args.workers))
                    _same(f"{out}_text_document", theirs)
                for figure, value in figures.items():
                    times.setdefault(figure, []).append(value)
            result[name] = _preprocess_figures(medians_of(times), documents, num_bytes / 1e6)
    return result


def _with_cpu(name: str, run: Callable[[], float]) -> dict[str, float]:
    """Returns the seconds that a run says it took, and its CPU seconds."""
    before = cpu_seconds()
    seconds = run()
    return {name: seconds, f"{name}_cpu": cpu_seconds() - before}


def _preprocess_figures(median: dict[str, float], documents: int, megabytes: float) -> Row:
    def ratio(slow: str, fast: str) -> float:
        return round(median[slow] / median[fast], 2)

    rates = {"ours": "ours", "ours_with_start": "ours_all", "classic": "classic", "bare_engine": "bare"}
    return {
        **{f"{shown}_MB_s": round(megabytes / median[name], 1) for shown, name in rates.items()},
        "ours_documents_s": round(documents / median["ours"]),
        "of_bare_engine": ratio("bare", "ours"), "times_classic": ratio("classic", "ours"),
        "of_bare_engine_by_cpu": ratio("bare_cpu", "ours_cpu"), "times_classic_by_cpu": ratio("classic_cpu", "ours_cpu"),
        "first_token_s": round(median["first_token_s"], 2),
    }  # fmt: skip


def _same(first: str, second: str) -> None:
    for suffix in (".bin", ".idx"):
        if Path(first + suffix).read_bytes() != Path(second + suffix).read_bytes():
            raise SystemExit(f"{first}{suffix} and {second}{suffix} differ")


def make_synthetic(prefix: str, documents: int, mean_tokens: int) -> None:
    """Writes a dataset of random documents with log-normal lengths."""
    from megatron_samoe.datasets import index_format

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
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset as TheirDataset
    from megatron.core.datasets.utils import Split

    class TheirTokenizer:
        vocab_size, eod, pad = 8192, 0, -1
        unique_identifiers = {"class": "TheirTokenizer"}  # noqa: RUF012

    data = TheirDataset(prefix)
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=seq_length, split="1", blend=([prefix], None), path_to_cache=cache,
        tokenizer=TheirTokenizer(), reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
        create_attention_mask=False,
    )  # fmt: skip
    return GPTDataset(data, prefix, np.arange(len(data), dtype=np.int32), None, Split.train, config)


def _mine(prefix: str, seq_length: int, cache: str) -> Any:
    from megatron_samoe.datasets.gpt_dataset import GPTDataset, SampleFormat

    data = IndexedDataset(prefix)
    return GPTDataset(data, 0, len(data), None, 1, SampleFormat(seq_length, 0, 8192), cache)


BUILD = {"ours": _mine, "megatron-core": _peer}


def _index_child(which: str, prefix: str, seq_length: int) -> None:
    """Builds one index in this process and prints seconds and added peak memory (KiB; maps of files count)."""
    build = BUILD[which]
    with tempfile.TemporaryDirectory() as small, tempfile.TemporaryDirectory() as cache:
        make_synthetic(f"{small}/warm", 100, 50)
        build(f"{small}/warm", 16, small)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seconds = seconds_of(lambda: build(prefix, seq_length, cache))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(json.dumps({"s": seconds, "MB": peak / 1024}))


def benchmark_index(args: Options) -> Row:
    """Returns time and peak memory of building the sample index, each in a fresh process."""
    command = [sys.executable, "-m", "megatron_samoe.benchmarks.data", "_index"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        prefix = f"{folder}/synthetic"
        make_synthetic(prefix, args.documents, args.mean_tokens)
        runs: dict[str, Times] = {which: {"s": [], "MB": []} for which in BUILD}
        for _, which in itertools.product(range(args.rounds), BUILD):
            words = [*command, which, prefix, str(args.seq_length)]
            output = children.run(words, capture_output=True, text=True, check=True, env=environment).stdout
            for figure, value in json.loads(output.strip().splitlines()[-1]).items():
                runs[which][figure].append(value)
    medians = {which: medians_of(times) for which, times in runs.items()}
    peer, mine = medians["megatron-core"], medians["ours"]
    return {
        "documents": args.documents, **medians,
        "time_ratio": round(mine["s"] / peer["s"], 2), "memory_ratio": round(mine["MB"] / peer["MB"], 2),
    }  # fmt: skip


def benchmark_reads(args: Options) -> Row:
    """Returns random samples per second of both, and how much of its time a step would wait for the loader."""
    import torch

    from megatron_samoe.datasets.loader import DataLoader
    from megatron_samoe.datasets.samplers import PretrainingSampler

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        prefix = f"{folder}/synthetic"
        make_synthetic(prefix, min(args.documents, 1_000_000), 300)
        data = {which: build(prefix, args.seq_length, f"{folder}/{which}") for which, build in BUILD.items()}
        Path(prefix + ".bin").read_bytes()
        mine = data["ours"]
        draws = {which: np.random.default_rng(0) for which in data}  # the same samples of both

        def read(which: str) -> None:
            for index in draws[which].integers(0, len(mine), READS).tolist():
                data[which][index]

        medians = medians_of(in_turn({which: partial(read, which) for which in data}, args.rounds))
        waits = {}
        for workers, name in enumerate(("in the loop", "a thread ahead")):
            loader = DataLoader(mine, PretrainingSampler(len(mine), 0, 8, 0, 1), num_workers=workers)
            waits[name] = round(_waiting(iter(loader), 0.02) * 1e3, 3)
    return {
        "samples_s": {which: round(READS / seconds) for which, seconds in medians.items()},
        "ratio": round(medians["megatron-core"] / medians["ours"], 2), "wait_per_20_ms_step_ms": waits,
    }  # fmt: skip


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


BENCHMARKS = {"preprocess": benchmark_preprocess, "index": benchmark_index, "reads": benchmark_reads}


def run(options: Options) -> int:
    """Runs the chosen benchmarks, and prints what they found."""
    if "preprocess" in options.what and not options.corpus:
        print("error: preprocess needs --corpus", file=sys.stderr)
        return 2
    results = {what: BENCHMARKS[what](options) for what in options.what}
    for what, rows in results.items():
        print(f"\n{what}")
        for name, values in rows.items():
            shown = "  ".join(f"{k} {v}" for k, v in values.items()) if isinstance(values, dict) else values
            print(f"  {name:24} {shown}")
    write_json(options.json, results)
    return 0


def add_parser(commands: Any) -> None:
    """Adds the subcommand `data`."""
    add = add_alone(commands, "data", "the data tools beside their peers", run, description=__doc__)
    add("what", tuple(BENCHMARKS), nargs="+", default=None)
    add("--corpus", str, "folder of .txt files for preprocess")
    add("--tokenizer", [tuple(trainer for trainer, *_ in TOKENIZERS.values())], "only these")
    add_sizes(add, workers=2, rounds=3, classic_rounds=1, documents=10_000_000, mean_tokens=100, seq_length=1024)
    add("--json", Path, "also write the figures to this file")


if __name__ == "__main__":
    _index_child(sys.argv[2], sys.argv[3], int(sys.argv[4]))
