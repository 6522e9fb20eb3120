"""Tables of speeds and other measurements, recomputed from what commands wrote below docs/results.

A table is known by its page and by the beginning of its first line. `TABLES` gives the figures of each of its rows, which are the last
numbers of the line; a cell before them may hold numbers that say what the row is about.
"""

from __future__ import annotations

import itertools
import json
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from tools.results.page_figures import Block, blocks_of, like, without_code

RESULTS = Path(__file__).resolve().parents[2] / "docs/results"
_NUMBER = re.compile(r"(?<![\w.,])[-+]?\d[\d,]*(?:\.\d+)?")

Row = Mapping[str, Any]
Figures = Iterator[Sequence[float]]


@cache
def rows_of(name: str) -> Sequence[Row]:
    """Returns the rows of a benchmark's file."""
    content = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    rows: Sequence[Row] = content["rows"] if isinstance(content, dict) else content
    return rows


def row(name: str, **fields: object) -> Row:
    """Returns the only row of a file that has these values."""
    (found,) = (one for one in rows_of(name) if all(one[field] == value for field, value in fields.items()))
    return found


def _layer(activation: str, topks: Sequence[int], *peers: str) -> Figures:
    for dtype, experts, topk in itertools.product(("fp32", "bf16"), (8, 64), topks):
        file = "swiglu" if activation == "swiglu" else dtype
        found = row(f"performance/layer_{file}", experts=experts, topk=topk, dtype=dtype)
        yield [
            *(found[f"{name} GFLOP:s"] for name in ("layer", "products", f"loop_{activation}", *peers)),
            found["layer / products"],
            found["layer / best peer"],
        ]


def _train_step() -> Figures:
    for dtype, file, peer in (("fp32", "", ":fused"), ("bf16", "_bf16", ":fused:bf16")):
        for model in ("dense", "moe", "samoe"):
            found = row(f"performance/train_step{file}", model=model)
            yield [found["tokens:s"], found["speed / dense"], found["peak_mb"]]
        per_layer = row("performance/train_step_combine_layer", model="samoe", dtype=dtype)
        yield [per_layer["speed / dense"], per_layer["peak_mb"]]
        theirs = f"moe:grouped_mm:k=1{peer}"
        found, memory = (row(f"performance/train_step{kind}", model=theirs) for kind in (file, "_peer_memory"))
        yield [found["tokens:s"], found["speed / dense"], memory["peak_mb"]]


def _ops() -> Figures:
    def of(file: str, other: str, **fields: object) -> list[float]:
        found = row(f"performance/{file}", **fields)
        return [found["compiled ms"], found[f"compiled / {other}"]]

    for other in ("index_add", "embedding_bag"):
        yield [x for dtype in ("fp32", "bf16") for x in of("dispatch", other, op="dispatch", dtype=dtype)]
    for way in ("forward", "backward"):
        yield of("pool", "matmul", op=f"pool {way}, 12 layers")
    for file, other in (("cross_entropy", "torch"), ("adamw", "torch fused")):
        yield [x for dtype in ("fp32", "bf16") for x in of(file, other, dtype=dtype)]
    # As ops/cpu_products.py chooses on this processor.
    wide, half = (
        row("performance/linear", op="linear 2048 x 2048, 512 tokens", dtype=dtype) for dtype in ("fp32", "bf16")
    )
    yield [wide["streamed ms"], wide["torch ms"] / wide["streamed ms"], half["products ms"], half["products / torch"]]


def _exchanges() -> Figures:
    for ranks, size in ((2, 0.0625), (2, 16.0), (4, 0.0625), (4, 16.0)):
        runs = [row(f"performance/all_to_all{run}", ranks=ranks, MB=size) for run in ("", "_2", "_3")]
        by_column = [[one[key] for one in runs] for key in ("rings / gloo", "permuted, window / permuted, gloo")]
        yield [f(values) for values in by_column for f in (statistics.median, min, max)]


def _decode() -> Figures:
    for dtype in ("fp32", "bf16", "int8"):
        for batch in (1, 8, 32):
            ours, theirs = (
                row("decode/decode", dtype=dtype, contestant=name, batch=batch)
                for name in ("moe-12-512-2048-32-2-8192 auto", "llama.cpp")
            )
            figures = [ours["ms_per_token"], 100 * ours["share_of_floor"], theirs["ms_per_token"]]
            newer = [one for one in rows_of("decode/decode_zen5") if (one["dtype"], one["batch"]) == (dtype, batch)]
            for one in newer:
                if one["contestant"] != "transformers default":
                    figures.append(one["ms_per_token"])
                if one["contestant"] == ours["contestant"]:
                    figures.append(100 * one["share_of_floor"])
            yield figures


def _decode_sharing() -> Figures:
    sizes = "12-512-2048-32-2-8192"
    for name in (
        f"moe-{sizes} folded",
        *(f"samoe-num-expert-banks-3-{sizes} {way}" for way in ("folded", "selected", "on-the-fly")),
        f"num-experts-8-{sizes} folded",
        f"pool-num-experts-96-{sizes} folded",
        f"dense-{sizes} folded",
    ):
        yield [row("decode/sharing", contestant=name, batch=batch)["ms_per_token"] for batch in (1, 8, 32)]


def _prompts() -> Figures:
    sizes = "moe-12-512-2048-32-2-8192 auto"
    for dtype, length in itertools.product(("fp32", "bf16", "int8"), (512, 2048)):
        names = (sizes, "llama.cpp") if dtype == "int8" else (sizes, "llama.cpp", "transformers default")
        found = [row("decode/prompt", dtype=dtype, contestant=name, prompt=length) for name in names]
        yield [found[0]["of fp32 product"], found[0]["of bf16 product"], *(one["first_ms"] for one in found)]


def _layers_worth() -> Figures:
    """What `megatron-samoe diagnose` wrote of the second edition's models."""
    models = (
        "moe-of-8 moe-of-32 8-banks-of-8-seed-2 2-banks-of-32 tied-middle pool-locked-as-unipool pool-locked neighbours"
    )
    for model in models.split():
        yield json.loads((RESULTS / f"diagnoses/{model}.json").read_text(encoding="utf-8"))[0]["worth_L"]


def _compressed() -> Figures:
    """Losses on the test split over the original's, which `second_compression.py` wrote, by budget and seed."""
    others = ("blind-healed", "pruned-healed", "original-longer")
    for kind, models in (("", ("fitted", "healed-routers", *others)), ("whole_", ("healed-all", *others))):
        kept = [
            json.loads(path.read_text(encoding="utf-8"))
            for budget in ("half", "quarter")
            for path in sorted((RESULTS / "compression").glob(f"seed-*-{kind}{budget}.json"))
        ]
        for model in models:
            yield [found[model]["test_loss"] - found["original"]["test_loss"] for found in kept]


def _quickstart() -> Figures:
    """What `megatron-samoe quickstart` printed."""
    lines = (RESULTS / "quickstart.txt").read_text(encoding="utf-8").splitlines()
    for line in lines[2 : lines.index("")]:
        yield [float(number.replace(",", "")) for number in _NUMBER.findall(line)]


#: Tables by their pages and the beginning of their first line.
TABLES: Mapping[tuple[str, str], Callable[[], Figures]] = {
    ("README.md", "|model|parameters|"): _quickstart,
    ("docs/compression.md", "| test loss over the original's |"): _compressed,
    ("docs/results/README.md", "| worth of a layer's experts |"): _layers_worth,
    ("docs/performance.md", "| GELU: experts, top-k |"): partial(_layer, "gelu", (1, 2), "deepspeed"),
    ("docs/performance.md", "| SwiGLU, top-1: experts, dtype |"): partial(
        _layer, "swiglu", (1,), "hf_grouped", "torchtitan"
    ),
    ("docs/performance.md", "| model | dtype | tokens/s |"): _train_step,
    ("docs/performance.md", "| op | against |"): _ops,
    ("docs/performance.md", "| ranks | MB a rank |"): _exchanges,
    ("docs/inference.md", "| dtype | batch | ms per step |"): _decode,
    ("docs/inference.md", "| model | experts' bytes in memory |"): _decode_sharing,
    ("docs/inference.md", "| weights, prompt |"): _prompts,
}


def wrong_tables(name: str, page: str, tables: Mapping[tuple[str, str], Callable[[], Figures]] = TABLES) -> list[str]:
    """Returns what is wrong with a page's tables of speeds."""
    problems = []
    for head, figures in measured_heads(name, tables).items():
        block = _block(page, head)
        if block is None:
            problems.append(f"no table begins with {head!r}")
            continue
        lines, expected = block.text.splitlines()[2:], list(figures())
        if len(lines) != len(expected):
            problems.append(f"line {block.line}: has {len(lines)} rows, and its files {len(expected)}")
        for place, (line, values) in enumerate(zip(lines, expected, strict=False)):
            numbers = _NUMBER.findall(without_code(line))[-len(values) :]
            right = [like(number, value) for number, value in zip(numbers, values, strict=False)]
            if len(numbers) != len(values) or numbers != right:
                problems.append(f"line {block.line + 2 + place}: {numbers} is {right or list(values)} by its file")
    return problems


def measured_heads(
    name: str, tables: Mapping[tuple[str, str], Callable[[], Figures]] = TABLES
) -> dict[str, Callable[[], Figures]]:
    """Returns how tables of a page begin, and what their figures are."""
    return {head: figures for (page, head), figures in tables.items() if page == name}


def _block(page: str, head: str) -> Block | None:
    return next((block for block in blocks_of(page) if block.text.startswith(head)), None)
