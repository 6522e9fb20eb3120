"""Measures the data tools beside their peers, alternating in one run; prints a table, and JSON if asked."""

import argparse
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
from pathlib import Path
from typing import Any

import numpy as np

from megatron_samoe.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron_samoe.datasets.tokenizer import build_tokenizer

TOKENIZERS = {
    "SentencePiece unigram": ("sentencepiece-unigram", "SentencePieceTokenizer", ".model"),
    "SentencePiece BPE": ("sentencepiece-bpe", "SentencePieceTokenizer", ".model"),
    "byte-level BPE": ("byte-bpe", "HuggingFaceTokenizer", ".json"),
}


def cpu_seconds() -> float:
    """Returns the CPU seconds of this process and of its ended children: unlike wall time, blind to other load."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def make_documents(folder: str, target: str, document_chars: int = 2000) -> tuple[int, int]:
    """Writes the text files of a folder as JSONL of documents of about `document_chars`; returns (documents, bytes)."""
    count = 0
    with open(target, "w", encoding="utf-8") as out:
        for path in sorted(Path(folder).glob("*.txt")):
            held, size = [], 0
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
                held.append(line)
                size += len(line)
                if size >= document_chars:
                    out.write(json.dumps({"text": "".join(held)}) + "\n")
                    held, size, count = [], 0, count + 1
            if held:
                out.write(json.dumps({"text": "".join(held)}) + "\n")
                count += 1
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


def ours(corpus: str, kind: str, model: str, output: str, workers: int) -> tuple[float, float, float, float]:
    """Runs the preprocessor as a user does.

    Returns seconds: in all; until the first token is written; in all less a run on one short document (start-up); and
    the same in CPU time.
    """
    command = [
        sys.executable, "-m", "megatron_samoe", "preprocess", "--input", corpus, "--tokenizer-type", kind,
        "--tokenizer-model", model, "--output-prefix", output, "--append-eod", "--workers", str(workers), "--quiet",
    ]  # fmt: skip
    target, first = f"{output}_text_document.bin.partial", 0.0
    start, cpu = time.perf_counter(), cpu_seconds()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        if not first and os.path.exists(target) and os.path.getsize(target):
            first = time.perf_counter() - start
        time.sleep(0.005 if not first else 0.01)
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    if process.returncode:
        raise SystemExit(f"preprocess_data.py failed with status {process.returncode}")
    empty = output + "_start"
    Path(empty + ".jsonl").write_text('{"text": "start"}\n')
    command[3], command[9] = empty + ".jsonl", empty
    start, start_cpu = time.perf_counter(), cpu_seconds()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return seconds, first, seconds - (time.perf_counter() - start), cpu - (cpu_seconds() - start_cpu)


def bare_engine(texts: list[str], kind: str, model: str, threads: int) -> float:
    """Returns the seconds that the tokenizer engine alone takes on texts in memory, in `threads` threads."""
    tokenizer = build_tokenizer(kind, model)
    if kind == "SentencePieceTokenizer":
        start = time.perf_counter()
        processor = tokenizer._processor  # type: ignore[attr-defined]
        encode = getattr(processor, "encode_as_numpy", processor.encode)  # arrays are faster, where it makes them
        encode(texts, num_threads=threads)
        return time.perf_counter() - start
    encode = tokenizer._fast.encode_to_numpy  # type: ignore[attr-defined]
    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda part: [encode(text) for text in part], np.array_split(np.array(texts, dtype=object), 64)))
    return time.perf_counter() - start


def benchmark_preprocess(args: argparse.Namespace) -> dict[str, Any]:
    """Returns MB/s of ours, the classic loop and the bare engine for each tokenizer."""
    from megatron_samoe.cli import train_tokenizer

    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        corpus = f"{folder}/corpus.jsonl"
        documents, num_bytes = make_documents(args.corpus, corpus)
        texts = [json.loads(line)["text"] for line in open(corpus, encoding="utf-8")]
        result["corpus"] = {"documents": documents, "MB": round(num_bytes / 1e6, 1)}
        for name, (trainer, kind, suffix) in TOKENIZERS.items():
            if args.tokenizer and trainer not in args.tokenizer:
                continue
            model = f"{folder}/{trainer}"
            train_tokenizer.main(
                [
                    "--type",
                    trainer,
                    "--input",
                    corpus,
                    "--vocab-size",
                    "8192",
                    "--output-prefix",
                    model,
                    "--sample-mb",
                    "4",
                ]
            )
            model += suffix
            names = ("ours", "first_token_s", "ours_all", "classic", "bare", "ours_cpu", "classic_cpu", "bare_cpu")
            times: dict[str, list[float]] = {name: [] for name in names}
            for number in range(args.rounds):
                seconds, first, net, net_cpu = ours(corpus, kind, model, f"{folder}/o{number}", args.workers)
                marks = [cpu_seconds()]
                times["ours"].append(net)
                times["ours_all"].append(seconds)
                times["first_token_s"].append(first)
                times["bare"].append(bare_engine(texts, kind, model, args.workers))
                marks.append(cpu_seconds())
                times["ours_cpu"].append(net_cpu)
                times["bare_cpu"].append(marks[1] - marks[0])
                if number < args.classic_rounds:
                    times["classic"].append(classic(corpus, kind, model, f"{folder}/c{number}", args.workers))
                    times["classic_cpu"].append(cpu_seconds() - marks[1])
                    _same(f"{folder}/o{number}_text_document", f"{folder}/c{number}")
            median = {what: statistics.median(values) for what, values in times.items()}
            result[name] = {
                "ours_MB_s": round(num_bytes / 1e6 / median["ours"], 1),
                "ours_with_start_MB_s": round(num_bytes / 1e6 / median["ours_all"], 1),
                "ours_documents_s": round(documents / median["ours"]),
                "classic_MB_s": round(num_bytes / 1e6 / median["classic"], 1),
                "bare_engine_MB_s": round(num_bytes / 1e6 / median["bare"], 1),
                "of_bare_engine": round(median["bare"] / median["ours"], 2),
                "times_classic": round(median["classic"] / median["ours"], 2),
                "of_bare_engine_by_cpu": round(median["bare_cpu"] / median["ours_cpu"], 2),
                "times_classic_by_cpu": round(median["classic_cpu"] / median["ours_cpu"], 2),
                "first_token_s": round(median["first_token_s"], 2),
            }
    return result


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


def _index_child(which: str, prefix: str, seq_length: int) -> None:
    """Builds one index in this process and prints seconds and added peak memory (KiB; maps of files count)."""
    build = _mine if which == "ours" else _peer
    with tempfile.TemporaryDirectory() as small, tempfile.TemporaryDirectory() as cache:
        make_synthetic(f"{small}/warm", 100, 50)
        build(f"{small}/warm", 16, small)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        dataset = build(prefix, seq_length, cache)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(json.dumps({"s": seconds, "MB": peak / 1024, "samples": len(dataset)}))


def _child(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "megatron_samoe.benchmarks.data", *arguments]
    output = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    return json.loads(output.stdout.strip().splitlines()[-1])


def benchmark_index(args: argparse.Namespace) -> dict[str, Any]:
    """Returns time and peak memory of building the sample index, each in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        prefix = f"{folder}/synthetic"
        make_synthetic(prefix, args.documents, args.mean_tokens)
        runs: dict[str, list[dict[str, Any]]] = {"ours": [], "megatron-core": []}
        for _ in range(args.rounds):
            for which in runs:
                runs[which].append(_child("_index", which, prefix, str(args.seq_length)))
        medians = {
            which: {key: statistics.median(row[key] for row in rows) for key in ("s", "MB")}
            for which, rows in runs.items()
        }
    peer, mine = medians["megatron-core"], medians["ours"]
    return {
        "documents": args.documents, "ours": mine, "megatron-core": peer,
        "time_ratio": round(mine["s"] / peer["s"], 2), "memory_ratio": round(mine["MB"] / peer["MB"], 2),
    }  # fmt: skip


def _rate(read: Callable[[int], Any], indices: list[int]) -> float:
    start = time.perf_counter()
    for index in indices:
        read(index)
    return len(indices) / (time.perf_counter() - start)


def benchmark_reads(args: argparse.Namespace) -> dict[str, Any]:
    """Returns random samples per second of both, and how much of its time a step would wait for the loader."""
    import torch

    from megatron_samoe.datasets.loader import DataLoader
    from megatron_samoe.datasets.samplers import PretrainingSampler

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        prefix = f"{folder}/synthetic"
        make_synthetic(prefix, min(args.documents, 1_000_000), 300)
        mine, peer = _mine(prefix, args.seq_length, folder + "/o"), _peer(prefix, args.seq_length, folder + "/t")
        Path(prefix + ".bin").read_bytes()
        rates: dict[str, list[float]] = {"ours": [], "megatron-core": []}
        for number in range(args.rounds + 1):
            indices = np.random.default_rng(number).integers(0, len(mine), 4000).tolist()
            pair = _rate(mine.__getitem__, indices), _rate(peer.__getitem__, indices)
            if number:  # the first round warms up
                rates["ours"].append(pair[0])
                rates["megatron-core"].append(pair[1])
        waits = []
        for workers in (0, 1):
            loader = DataLoader(mine, PretrainingSampler(len(mine), 0, 8, 0, 1), num_workers=workers)
            waits.append(_waiting(iter(loader), 0.02))
    medians = {which: round(statistics.median(values)) for which, values in rates.items()}
    return {
        "samples_s": medians, "ratio": round(medians["ours"] / medians["megatron-core"], 2),
        "wait_per_20_ms_step_ms": {"in the loop": round(waits[0] * 1e3, 3), "a thread ahead": round(waits[1] * 1e3, 3)},
    }  # fmt: skip


def _waiting(batches: Iterator[Any], step_s: float, steps: int = 60) -> float:
    """Returns the median seconds that a step waits for its micro-batch of 8 while it computes for `step_s`."""
    waits = []
    for _ in range(steps):
        start = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - start)
        end = time.perf_counter() + step_s
        square = np.ones((64, 64), dtype=np.float32)
        while time.perf_counter() < end:
            square @ square
    return statistics.median(waits[5:])


def _print(title: str, rows: dict[str, Any]) -> None:
    print(f"\n{title}")
    for name, values in rows.items():
        shown = "  ".join(f"{k} {v}" for k, v in values.items()) if isinstance(values, dict) else values
        print(f"  {name:24} {shown}")


def main() -> int:
    """Runs the chosen benchmarks."""
    if sys.argv[1:2] == ["_index"]:
        _index_child(sys.argv[2], sys.argv[3], int(sys.argv[4]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("what", nargs="+", choices=("preprocess", "index", "reads"))
    parser.add_argument("--corpus", help="folder of .txt files for preprocess")
    parser.add_argument("--tokenizer", nargs="+", choices=[t[0] for t in TOKENIZERS.values()], help="only these")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--classic-rounds", type=int, default=1)
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--mean-tokens", type=int, default=100)
    parser.add_argument("--seq-length", type=int, default=1024)
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    if "preprocess" in args.what and not args.corpus:
        parser.error("preprocess needs --corpus")
    benchmarks = {"preprocess": benchmark_preprocess, "index": benchmark_index, "reads": benchmark_reads}
    results = {what: benchmarks[what](args) for what in args.what}
    for what, rows in results.items():
        _print(what, rows)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
