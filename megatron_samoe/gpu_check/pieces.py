"""The pieces of the check. Each yields rows: what was measured, next to what was predicted, if anything was."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer

from megatron_samoe import children
from megatron_samoe.errors import MegatronSamoeError
from megatron_samoe.gpu_check.models import VOCAB_SIZE, configs, training_step
from megatron_samoe.ops import extension
from megatron_samoe.ops.combine import combine_banks, combine_banks_backward
from megatron_samoe.ops.permute import make_permutation, permute, unpermute
from megatron_samoe.ops.topk_gate import topk_gate
from megatron_samoe.planning.memory import rank_memory
from megatron_samoe.training.metrics import peak_memory_bytes

ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, Any]
#: The host reads losses, statistics and gradient norm together: docs/extension.md.
WAITS_OF_A_STEP = 1


@dataclass(frozen=True)
class Task:
    """The inputs of a piece.

    Attributes:
        size: of models and operands, `full` or `tiny`.
        seconds: that the piece may take.
    """

    device: torch.device
    size: str
    seconds: float

    @property
    def is_full(self) -> bool:
        """Whether sizes are those of a GPU."""
        return self.size == "full"


class NotHere(MegatronSamoeError):
    """A piece that this machine cannot run, and why: nothing is wrong."""


def on_gpu(task: Task) -> None:
    """Raises NotHere without a GPU."""
    if task.device.type != "cuda":
        raise NotHere("a CPU is not a GPU: there is nothing to measure")


def machine(task: Task) -> Iterator[Row]:
    """The machine: GPU, driver, libraries, the build."""
    yield {"what": "torch", "measured": f"{torch.__version__}, CUDA {torch.version.cuda}"}
    for name, value in extension.build_info().items():
        yield {"what": f"extension: {name}", "measured": str(value)}
    if task.device.type != "cuda":
        return
    for number in range(torch.cuda.device_count()):
        yield {"what": f"GPU {number}", "measured": str(torch.cuda.get_device_properties(number))}
    asked = "driver_version,clocks.max.sm,clocks.max.mem,power.limit,mig.mode.current"
    said = children.run(["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"], capture_output=True, text=True)
    yield {"what": asked, "measured": said.stdout.strip() or said.stderr.strip()}
    yield {"what": "NCCL", "measured": ".".join(map(str, torch.cuda.nccl.version()))}


def _of_the_source(task: Task, path: str, *words: str) -> tuple[int, list[str]]:
    """Runs python with words and a path of the source tree, and returns its status and what it said, by line.

    Raises:
        NotHere: there is no source tree.
    """
    if not (ROOT / path).exists():
        raise NotHere("needs the source tree")
    command = [sys.executable, "-m", *words, path]
    said = children.run(command, cwd=ROOT, capture_output=True, text=True, timeout=task.seconds)
    return said.returncode, (said.stdout + said.stderr).splitlines()


def tests(task: Task) -> Iterator[Row]:
    """The tests for GPUs: ops, decoding, training steps and NCCL against the CPU's reference implementations."""
    words = ("pytest", "-q", "-rfE", "-p", "no:cacheprovider", "-m", "gpu", "tests/unit/ops")
    status, lines = _of_the_source(task, "tests/gpu", *words)
    counts = next((line for line in lines[::-1] if " in " in line), "nothing")
    yield {"what": "tests", "predicted": "no failure", "measured": counts, "holds": not status and "passed" in counts}
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            name, _, why = line.partition(" - ")
            yield {"what": name, "measured": why[:200]}


def several_gpus(task: Task) -> Iterator[Row]:
    """Exchanges over NCCL and layouts of several GPUs against one process."""
    on_gpu(task)
    count = torch.cuda.device_count()
    if count < 2:
        raise NotHere("there is one GPU")
    words = ("torch.distributed.run", "--standalone", "--nproc-per-node", str(count))
    status, lines = _of_the_source(task, "tests/gpu/run_multi_gpu.py", *words)
    said = "\n".join(lines)[-1500:]
    yield {"what": f"{count} GPUs", "predicted": "equal to one process", "measured": said, "holds": status == 0}


def waits(task: Task) -> Iterator[Row]:
    """How often the host waits for the GPU in a training step."""
    on_gpu(task)
    for name, config in configs(task.size).items():
        step = training_step(config, task.size, task.device)
        step()  # libraries set themselves up
        step()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found = [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
        row = {"what": f"waits of a step, {name}", "predicted": WAITS_OF_A_STEP, "measured": len(found)}
        yield {**row, "holds": len(found) <= WAITS_OF_A_STEP, "lines": dict(Counter(found).most_common(10))}


def memory(task: Task) -> Iterator[Row]:
    """The peak of a training step, by the planner's formula and measured."""
    on_gpu(task)
    for name, config in configs(task.size).items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step = training_step(config, task.size, task.device)
        for _ in range(3):
            step()
        planned = rank_memory(config, VOCAB_SIZE[task.size], 1).total / 2**30
        measured = peak_memory_bytes(task.device) / 2**30
        yield {
            "what": f"peak of a step, {name}",
            "predicted": f"{planned:.2f} GiB",
            "measured": f"{measured:.2f} GiB",
            "holds": abs(measured / planned - 1) <= 0.05,
        }


def seconds_of(call: Callable[[], object], least_s: float = 0.2) -> float:
    """Returns the median seconds of a call on the device, repeated for a while."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=least_s).median


def op_cases(task: Task) -> dict[str, tuple[int, Callable[[], object]]]:
    """Returns ops by name: the bytes that they must move at least, and a call."""
    device = task.device
    tokens, hidden, experts, topk = (16384, 2048, 64, 2) if task.is_full else (64, 32, 4, 2)
    layers, banks, elements = (12, 3, 16 << 20) if task.is_full else (4, 2, 1 << 10)
    dtype = torch.bfloat16 if task.is_full else torch.float32
    x = torch.randn(tokens, hidden, device=device, dtype=dtype)
    logits = torch.randn(tokens, experts, device=device)
    gate = topk_gate(logits, topk)
    permutation = make_permutation(gate.ids_TK, experts)
    rows = permute(x, permutation)
    coefficients = torch.rand(layers, 1, banks, device=device)
    pool = torch.randn(banks, 1, elements, device=device)
    weights = torch.empty(layers, 1, elements, device=device, dtype=dtype)
    grads, pool_grad = torch.randn(layers, 1, elements, device=device), torch.zeros_like(pool)
    moved, contracted = rows.nbytes + x.nbytes, grads.nbytes + 3 * pool.nbytes
    return {
        "combine": (pool.nbytes + weights.nbytes, lambda: combine_banks(coefficients, pool, weights)),
        "combine backward": (contracted, lambda: combine_banks_backward(coefficients, pool, grads, pool_grad)),
        "gate": (logits.nbytes + 12 * tokens * topk, lambda: topk_gate(logits, topk)),
        "sort of slots": (3 * 8 * tokens * topk, lambda: make_permutation(gate.ids_TK, experts)),
        "permute": (moved, lambda: permute(x, permutation)),
        "unpermute": (moved, lambda: unpermute(rows, gate.probs_TK, permutation)),
    }


def _kernels() -> Row:
    return {"kernels": ", ".join(extension.cuda_kernels_in_use())}


def ops(task: Task) -> Iterator[Row]:
    """Times our own ops, each against the time in which a copy would move its bytes: by our kernels and by torch."""
    source = torch.empty((1 << 30) if task.is_full else (1 << 20), dtype=torch.uint8, device=task.device)
    target = torch.empty_like(source)
    bytes_per_s = 2 * source.nbytes / seconds_of(lambda: target.copy_(source))
    yield {"what": "copy", "measured": f"{bytes_per_s / 1e12:.3f} TB/s", **_kernels()}
    for name, (num_bytes, call) in op_cases(task).items():
        took, bound = seconds_of(call), num_bytes / bytes_per_s
        row = {"what": name, "predicted": f"{bound * 1e3:.4f} ms", "measured": f"{took * 1e3:.4f} ms"}
        yield {**row, "share of a copy's speed": round(bound / took, 3)}


def step_times(task: Task) -> Iterator[Row]:
    """Milliseconds of a training step of each model."""
    for name, config in configs(task.size).items():
        took = seconds_of(training_step(config, task.size, task.device), 10.0 if task.is_full else 0.2)
        tokens = (config.training.global_batch_size or 0) * config.model.seq_length
        row = {"what": f"step, {name}", "measured": f"{took * 1e3:.1f} ms", "tokens/s": round(tokens / took)}
        yield {**row, **_kernels()}


def profile(task: Task) -> Iterator[Row]:
    """Where the time of a SaMoE's step goes: the 30 longest kernels (on a CPU: ops)."""
    step = training_step(configs(task.size)["samoe"], task.size, task.device)
    step()
    with torch.profiler.profile() as profiler:
        for _ in range(3):
            step()
    kind, clock = ("CUDA", "device") if task.device.type == "cuda" else ("CPU", "cpu")
    found = [e for e in profiler.key_averages() if e.device_type.name == kind and not e.is_user_annotation]
    taken = {event.key: getattr(event, f"self_{clock}_time_total") for event in found}
    total = sum(taken.values())
    for name in sorted(taken, key=taken.__getitem__, reverse=True)[:30]:
        yield {"what": name[:120], "measured": f"{taken[name] / 1e3:.3f} ms", "share": round(taken[name] / total, 3)}


#: In their order, with the seconds that each may take. `ops` and `steps` run with our kernels and with torch's.
PIECES: dict[str, tuple[Callable[[Task], Iterator[Row]], float]] = {
    "machine": (machine, 120),
    "tests": (tests, 540),
    "several-gpus": (several_gpus, 540),
    "waits": (waits, 180),
    "memory": (memory, 180),
    "ops-kernels": (ops, 120),
    "ops-torch": (ops, 120),
    "steps-kernels": (step_times, 180),
    "steps-torch": (step_times, 180),
    "profile": (profile, 180),
}
