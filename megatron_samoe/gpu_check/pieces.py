"""The pieces of the check. Each returns rows: what was measured, next to what was predicted, if anything was."""

from __future__ import annotations

import gzip
import json
import os
import statistics
import sys
import time
import warnings
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_samoe import children
from megatron_samoe.errors import MegatronSamoeError
from megatron_samoe.evaluation.run_summary import read_records
from megatron_samoe.gpu_check.models import VOCAB_SIZE, arms, configs, random_batches
from megatron_samoe.ops import extension
from megatron_samoe.ops.combine import combine_banks, combine_banks_backward
from megatron_samoe.ops.permute import make_permutation, permute, unpermute
from megatron_samoe.ops.topk_gate import topk_gate
from megatron_samoe.parallel_state.state import single_process_state
from megatron_samoe.planning.memory import rank_memory
from megatron_samoe.training.metrics import peak_memory_bytes
from megatron_samoe.training.setup import build_setup, initial_state
from megatron_samoe.training.train_step import train_step

#: What may be asked for.
Piece = Literal[
    "machine",
    "tests",
    "several-gpus",
    "waits",
    "memory",
    "ops-kernels",
    "ops-torch",
    "steps-kernels",
    "steps-torch",
    "profile",
    "train",
]
ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, Any]
#: Where a GPU's ops take our kernels, and where torch does the work.
KERNELS = {"kernels": "1", "torch": "0"}
#: The host reads losses, statistics and gradient norm together: docs/extension.md.
WAITS_OF_A_STEP = 1


@dataclass(frozen=True)
class Task:
    """The inputs of a piece.

    Attributes:
        folder: of the whole check; a piece may write next to its result.
        size: of models and operands, `full` or `tiny`.
        seconds: that the piece may take.
        data: flags of pretraining that name the data.
    """

    folder: Path
    device: torch.device
    size: str
    seconds: float
    data: tuple[str, ...]


class NotHere(MegatronSamoeError):
    """A piece that this machine cannot run, and why: nothing is wrong."""


def on_gpu(task: Task) -> None:
    """Raises NotHere without a GPU."""
    if task.device.type != "cuda":
        raise NotHere("a CPU is no GPU: there is nothing to measure")


def machine(task: Task) -> Iterator[Row]:
    """The machine: GPU, driver, libraries, the build."""
    yield {"what": "torch", "measured": f"{torch.__version__}, CUDA {torch.version.cuda}"}
    for name, value in extension.build_info().items():
        yield {"what": f"extension: {name}", "measured": str(value)}
    if task.device.type != "cuda":
        return
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        yield {
            "what": f"GPU {number}",
            "measured": f"{found.name}, {found.total_memory / 2**30:.1f} GiB, sm_{found.major}{found.minor}, "
            f"{found.multi_processor_count} multiprocessors",
        }
    asked = "driver_version,clocks.max.sm,clocks.max.mem,power.limit,mig.mode.current"
    said = children.run(["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"], capture_output=True, text=True)
    yield {"what": asked, "measured": said.stdout.strip() or said.stderr.strip()}
    yield {"what": "NCCL", "measured": ".".join(map(str, torch.cuda.nccl.version()))}


def tests(task: Task) -> Iterator[Row]:
    """The tests for GPUs: ops, decoding, training steps and NCCL against the CPU's reference implementations."""
    if not (ROOT / "tests/gpu").is_dir():
        raise NotHere("needs the source tree")
    report = task.folder / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "tests/gpu", f"--junitxml={report}", "-p", "no:cacheprovider"]
    said = children.run(command, cwd=ROOT, capture_output=True, text=True, timeout=task.seconds)
    if not report.is_file():
        raise MegatronSamoeError(f"pytest wrote no report: {(said.stdout + said.stderr)[-1000:]}")
    outcomes: Counter[str] = Counter()
    failed = []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        outcomes[outcome] += 1
        if outcome in ("failure", "error"):
            first = (case.find(outcome).get("message") or "").splitlines()  # type: ignore[union-attr]
            failed.append(
                {"what": f"{case.get('classname')}.{case.get('name')}", "measured": first[0][:200] if first else ""}
            )
    bad = outcomes["failure"] + outcomes["error"]
    counts = ", ".join(f"{number} {outcome}" for outcome, number in sorted(outcomes.items()))
    yield {"what": "tests", "predicted": "none fails", "measured": counts, "holds": bad == 0 and outcomes["passed"] > 0}
    yield from failed


def several_gpus(task: Task) -> Iterator[Row]:
    """Exchanges over NCCL and layouts of several GPUs against one process."""
    on_gpu(task)
    count = torch.cuda.device_count()
    if count < 2:
        raise NotHere("there is one GPU")
    program = ROOT / "tests/gpu/run_multi_gpu.py"
    if not program.is_file():
        raise NotHere("needs the source tree")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(count),
        str(program),
    ]
    said = children.run(command, cwd=ROOT, capture_output=True, text=True, timeout=task.seconds)
    last = (said.stdout + said.stderr)[-1500:]
    yield {
        "what": f"{count} GPUs",
        "predicted": "equal to one process",
        "measured": last,
        "holds": said.returncode == 0,
    }


def steps(task: Task, name: str, count: int) -> Iterator[Callable[[], None]]:
    """Yields training steps of a model on random tokens."""
    config = configs(task.size)[name]
    vocab_size = VOCAB_SIZE[task.size]
    setup = build_setup(config, vocab_size, single_process_state(task.device))
    state = initial_state(setup)
    for batches in islice(random_batches(config, vocab_size, task.device), count):

        def step(batches: Any = batches) -> None:
            nonlocal state
            _, state = train_step(setup, state, batches)

        yield step


def waits(task: Task) -> Iterator[Row]:
    """How often the host waits for the GPU in a training step."""
    on_gpu(task)
    for name in arms(task.size):
        found = []
        for number, step in enumerate(steps(task, name, 3)):
            if number == 0:  # libraries set themselves up
                step()
                continue
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            found.append([str(w.filename) + f":{w.lineno}" for w in caught if "synchroniz" in str(w.message)])
        row = {"what": f"waits of a step, {name}", "predicted": WAITS_OF_A_STEP, "measured": len(found[-1])}
        yield {**row, "holds": len(found[-1]) <= WAITS_OF_A_STEP, "places": dict(Counter(found[-1]).most_common(10))}


def memory(task: Task) -> Iterator[Row]:
    """The peak of a training step, by the planner's formula and measured."""
    on_gpu(task)
    for name, config in configs(task.size).items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        for step in steps(task, name, 3):
            step()
        planned = rank_memory(config, VOCAB_SIZE[task.size], 1).total / 2**30
        measured = peak_memory_bytes(task.device) / 2**30
        holds = abs(measured / planned - 1) <= 0.05
        yield {
            "what": f"peak of a step, {name}",
            "predicted": f"{planned:.2f} GiB",
            "measured": f"{measured:.2f} GiB",
            "holds": holds,
        }


def seconds_of(task: Task, run: Callable[[], object], rounds: int = 10) -> float:
    """Returns the median seconds of a run on the device."""
    times = []
    for _ in range(rounds + 2):
        if task.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def op_cases(task: Task) -> dict[str, tuple[int, Callable[[], object]]]:
    """Returns ops by name: the bytes that they must move at least, and a call."""
    full, device = task.size == "full", task.device
    tokens, hidden, experts, topk = (16384, 2048, 64, 2) if full else (64, 32, 4, 2)
    layers, banks, elements = (12, 3, 16 << 20) if full else (4, 2, 1 << 10)
    dtype = torch.bfloat16 if full else torch.float32
    x = torch.randn(tokens, hidden, device=device, dtype=dtype)
    logits = torch.randn(tokens, experts, device=device)
    gate = topk_gate(logits, topk)
    permutation = make_permutation(gate.ids_TK, experts)
    rows = permute(x, permutation)
    coefficients = torch.rand(layers, 1, banks, device=device)
    pool = torch.randn(banks, 1, elements, device=device)
    weights = torch.empty(layers, 1, elements, device=device, dtype=dtype)
    grads, pool_grad = torch.randn(layers, 1, elements, device=device), torch.zeros_like(pool)
    moved = rows.nbytes + x.nbytes
    return {
        "combine": (pool.nbytes + weights.nbytes, lambda: combine_banks(coefficients, pool, weights)),
        "combine backward": (
            grads.nbytes + 3 * pool.nbytes,
            lambda: combine_banks_backward(coefficients, pool, grads, pool_grad),
        ),
        "gate": (logits.nbytes + 12 * tokens * topk, lambda: topk_gate(logits, topk)),
        "sort of slots": (3 * 8 * tokens * topk, lambda: make_permutation(gate.ids_TK, experts)),
        "permute": (moved, lambda: permute(x, permutation)),
        "unpermute": (moved, lambda: unpermute(rows, gate.probs_TK, permutation)),
    }


def ops(task: Task) -> Iterator[Row]:
    """Time of the ops that no library has, against the time of a copy of the same bytes: by our kernels and by torch."""
    size = (1 << 30) if task.size == "full" else (1 << 20)
    source: Tensor = torch.empty(size, dtype=torch.uint8, device=task.device)
    target = torch.empty_like(source)
    bytes_per_s = 2 * size / seconds_of(task, lambda: target.copy_(source))
    yield {
        "what": "copy",
        "measured": f"{bytes_per_s / 1e12:.3f} TB/s",
        "kernels": ", ".join(extension.cuda_kernels_in_use()),
    }
    for name, (least, call) in op_cases(task).items():
        took, limit = seconds_of(task, call), least / bytes_per_s
        row = {"what": name, "predicted": f"{limit * 1e3:.4f} ms", "measured": f"{took * 1e3:.4f} ms"}
        yield {**row, "share of a copy's speed": round(limit / took, 3)}


def step_times(task: Task) -> Iterator[Row]:
    """Milliseconds of a training step of each model."""
    for name, config in configs(task.size).items():
        times = []
        for step in steps(task, name, 12 if task.size == "full" else 3):
            started = time.perf_counter()
            step()  # which reads the loss, so it is over
            times.append(time.perf_counter() - started)
        took = statistics.median(times[1:])
        assert config.training.global_batch_size is not None
        tokens = config.training.global_batch_size * config.model.seq_length
        row = {"what": f"step, {name}", "measured": f"{took * 1e3:.1f} ms", "tokens/s": round(tokens / took)}
        yield {**row, "kernels": ", ".join(extension.cuda_kernels_in_use())}


def pretrain(task: Task, name: str, *flags: str, **environment: str) -> Path:
    """Trains a model in a process of its own, and returns the run's folder."""
    run_dir = task.folder / "runs" / name
    arm = name.split("-")[0]
    command = [
        sys.executable,
        "-m",
        "megatron_samoe",
        "pretrain",
        *arms(task.size)[arm],
        *task.data,
        "--run-dir",
        str(run_dir),
        *flags,
    ]
    said = children.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=task.seconds
    )
    if said.returncode:
        raise MegatronSamoeError(
            f"pretraining {name} ended with status {said.returncode}: {(said.stdout + said.stderr)[-1500:]}"
        )
    return run_dir


def profile(task: Task) -> Iterator[Row]:
    """Where the time of a SaMoE's step goes: the 30 longest kernels (on a CPU: ops)."""
    run_dir = pretrain(
        task,
        "samoe-profile",
        "--exit-interval",
        "6",
        "--profile",
        "--profile-step-start",
        "3",
        "--profile-step-end",
        "5",
    )
    (trace,) = (run_dir / "profile").glob("*.json.gz")
    with gzip.open(trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    wanted = "kernel" if task.device.type == "cuda" else "cpu_op"
    taken: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == wanted:
            taken[event["name"]] += event["dur"]
    total = sum(taken.values())
    for kernel, microseconds in taken.most_common(30):
        yield {
            "what": kernel[:120],
            "measured": f"{microseconds / 1e3:.3f} ms",
            "share": round(microseconds / total, 3),
        }


def train(task: Task) -> Iterator[Row]:
    """Trains dense, MoE and SaMoE in turn for the time that is left; each resumes."""
    names = list(arms(task.size))
    minutes = max(task.seconds / len(names) / 60 - 0.75, 0.05)  # starting and saving take time, too
    for name in names:
        pretrain(
            task, name, "--exit-duration-in-mins", f"{minutes:.3f}", "--save-interval", "100000", "--keep-last", "1"
        )
    losses = {}
    for name in names:
        records = read_records(task.folder / "runs" / name / "metrics.jsonl")
        losses[name] = {r["iteration"]: r["validation_loss"] for r in records if "validation_loss" in r}
        speeds = [r["tokens_per_s"] for r in records if "tokens_per_s" in r]
        speed = round(statistics.median(speeds)) if speeds else None
        last = max(r["iteration"] for r in records)
        yield {"what": f"training, {name}", "measured": f"{last} steps", "tokens/s": speed, "losses": losses[name]}
    for step in sorted(set.intersection(*(set(found) for found in losses.values())))[-1:]:
        for name in names:
            from_dense = f"{losses[name][step] - losses['dense'][step]:+.4f} from dense"
            yield {
                "what": f"validation loss at step {step}, {name}",
                "measured": f"{losses[name][step]:.4f}, {from_dense}",
            }


#: In their order, with the seconds that each may take. `ops` and `steps` run with our kernels and without.
PIECES: dict[Piece, tuple[Callable[[Task], Iterator[Row]], float]] = {
    "machine": (machine, 120),
    "tests": (tests, 540),
    "several-gpus": (several_gpus, 540),
    "waits": (waits, 180),
    "memory": (memory, 180),
    "ops-kernels": (ops, 120),
    "ops-torch": (ops, 120),
    "steps-kernels": (step_times, 180),
    "steps-torch": (step_times, 180),
    "profile": (profile, 240),
}
