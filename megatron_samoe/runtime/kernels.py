"""The choice of a run's CUDA kernels: those that agree with their references on this machine, the same on all ranks.

A kernel can do worse than to compute a wrong number: an access outside memory ends every later call of its process. So
a process of its own compares them, which may fail, die or hang without harm.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_samoe import children
from megatron_samoe.log import logger
from megatron_samoe.ops import cpu_products, extension
from megatron_samoe.ops.asynchronous import runs_behind_host
from megatron_samoe.ops.extension import TRAINING_KERNELS, CudaKernel
from megatron_samoe.parallel_state import launcher
from megatron_samoe.parallel_state.state import ParallelState
from megatron_samoe.runtime import reference_checks

#: What a process that compares kernels says of each: an empty string, or what is wrong.
Verdicts = Mapping[CudaKernel, str]

_CHECKS: dict[CudaKernel, Callable[[torch.device], None]] = {
    "gate": reference_checks.check_small_gates,
    "rows": reference_checks.check_small_rows,
    "combination": reference_checks.check_small_combination,
    "swiglu": reference_checks.check_small_swiglu,
}
_TIMEOUT_S = 120.0
_NOT_BUILT = "it was not built"


@dataclass(frozen=True)
class Kernels:
    """The kernels of a run where a device leaves a choice; a resumed run keeps them.

    Attributes:
        cuda: CUDA kernels in use; None where nothing has chosen among them.
        products: how CPUs multiply experts in bf16; None likewise.
    """

    cuda: Sequence[str] | None = None
    products: str | None = None


def choose(parallel: ParallelState, recorded: Kernels) -> Kernels:
    """Returns what this run computes with, the same on all ranks, which call it together.

    Args:
        recorded: what it has computed with so far.
    """
    return Kernels(choose_kernels(parallel, recorded.cuda), choose_products(parallel, recorded.products))


def choose_kernels(
    parallel: ParallelState, recorded: Sequence[str] | None, timeout_s: float = _TIMEOUT_S
) -> Sequence[str] | None:
    """Chooses the CUDA kernels of this run and returns them, or None where nothing is to be chosen; all ranks call it together. One
    line says what was chosen.

    Args:
        recorded: those that the run has used so far, which it keeps; None for a run that has none behind it.
        timeout_s: for the comparison of one kernel and the start of its process.
    """
    if not (runs_behind_host(parallel.device) and extension.cuda_kernels_are_chosen()):
        return None
    verdicts: Verdicts | None = None
    if not extension.has_cuda_kernels():
        verdicts = dict.fromkeys(TRAINING_KERNELS, _NOT_BUILT)
    elif launcher.local_rank() == 0:
        verdicts = compare(comparison_of(parallel.device), timeout_s)
    found = [v for v in parallel.world.all_gather_object(verdicts) if v is not None]
    kernels, remark = agreement(found, recorded)
    extension.trust(kernels)
    logger.info(remark)
    return kernels


def choose_products(parallel: ParallelState, recorded: str | None) -> str | None:
    """Chooses how CPUs multiply experts in bf16, the same on all ranks, which call it together, and returns it; None where
    nothing can be chosen.

    Args:
        recorded: how the run has done so far, which it keeps where every rank can; None for a run that has none behind it.

    Raises:
        ConfigError: a way is asked for that this machine lacks.
    """
    if runs_behind_host(parallel.device):
        return None
    chosen = cpu_products.use(recorded).bf16 if extension.load() else None
    if len(set(parallel.world.all_gather_object(chosen))) > 1 and chosen is not None:
        chosen = cpu_products.use("fp32").bf16
        logger.info("bf16 products: in fp32 on all ranks, whose machines have no other way in common")
    return chosen


def agreement(found: Sequence[Verdicts], recorded: Sequence[str] | None) -> tuple[list[CudaKernel], str]:
    """Returns the CUDA kernels that a run uses, those that agree with their references on all hosts, and a line that says so.

    Args:
        found: what `compare` said on each host.
        recorded: as for `choose_kernels`.
    """
    problems = {k: next((v[k] for v in found if v[k]), "") for k in TRAINING_KERNELS}
    agreeing = [k for k in TRAINING_KERNELS if not problems[k]]
    kernels = [k for k in agreeing if recorded is None or k in recorded]
    parts = [f"CUDA kernels: {', '.join(kernels)} agree with their references" if kernels else "CUDA kernels: none"]
    if set(problems.values()) == {_NOT_BUILT}:
        parts.append("the extension was built without them (MEGATRON_SAMOE_BUILD=cuda builds them)")
    else:
        parts += [f"torch does the work of {k}: {problem}" for k, problem in problems.items() if problem]
    left = [k for k in agreeing if k not in kernels]
    if left:
        parts.append(f"torch does the work of {', '.join(left)}, as in this run so far")
    return kernels, "; ".join(parts)


def comparison_of(device: torch.device) -> list[str]:
    """Returns the command that compares the kernels named after it, on a device."""
    return [sys.executable, "-m", "megatron_samoe.runtime.kernels", str(device)]


def compare(command: Sequence[str], timeout_s: float = _TIMEOUT_S) -> Verdicts:
    """Returns the verdicts of a command; where its process ends early, another continues with the next kernel."""
    verdicts: dict[CudaKernel, str] = {}
    environment = {**os.environ, extension.CUDA_ENVIRONMENT_VARIABLE: "1"}
    while left := [k for k in TRAINING_KERNELS if k not in verdicts]:
        try:
            said = children.run([*command, *left], capture_output=True, text=True, env=environment, timeout=timeout_s)
            output, problem = said.stdout, _last_line(said.stderr) or f"its process ended with status {said.returncode}"
        except subprocess.TimeoutExpired as expired:
            output, problem = _text(expired.stdout), f"it was not done after {timeout_s:.0f} s"
        verdicts |= dict(_verdicts_in(output, left))
        unanswered = [k for k in left if k not in verdicts]
        if unanswered:
            verdicts[unanswered[0]] = problem
    return verdicts


def _verdicts_in(output: str, kernels: Sequence[CudaKernel]) -> Iterator[tuple[CudaKernel, str]]:
    for line in output.splitlines():
        try:
            kernel, problem = json.loads(line)
        except (ValueError, TypeError):
            continue  # what a library said
        if kernel in kernels:
            yield kernel, problem


def _text(output: bytes | str | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def _last_line(output: str) -> str:
    lines = output.strip().splitlines()
    return lines[-1] if lines else ""


def main(argv: Sequence[str]) -> int:
    """Compares kernels on a device, and prints a verdict a line; ends where the device can no longer be trusted.

    Args:
        argv: the device, then the kernels.
    """
    device = torch.device(argv[0])
    for kernel in TRAINING_KERNELS:
        if kernel not in argv[1:]:
            continue
        try:
            _CHECKS[kernel](device)
        except AssertionError as error:
            print(json.dumps([kernel, "it differs from its reference: " + " ".join(str(error).split())]), flush=True)
            continue
        except RuntimeError as error:
            print(json.dumps([kernel, str(error).splitlines()[0]]), flush=True)
            return 1
        print(json.dumps([kernel, ""]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
