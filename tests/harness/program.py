"""Drives the pretrain program as a user does: command lines, exit statuses, output, signals.

`start` runs the program's `main` in processes of a fork server that has everything imported (half a second a run rather
than five), each a process of its own with its own output, so signals and kills are real. `start_command` runs the true
command line.
"""

from __future__ import annotations

import importlib
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_samoe.datasets.indexed_dataset import IndexedDatasetBuilder
from tests.harness import ranks  # its fork server serves both

REPOSITORY = Path(__file__).resolve().parents[2]
PRETRAIN = "megatron_samoe.cli.pretrain"
#: What a record tells about the machine rather than about the model.
MACHINE_KEYS = ("tokens_per_s", "step_time_s", "peak_memory_bytes", "own_time_mean_s", "own_time_max_s", "slowest_rank")
TINY_MODEL: dict[str, Any] = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "seq_length": 16}
TINY_MODEL |= {"expert_layout": "samoe", "num_experts": 4, "num_expert_banks": 2, "make_vocab_size_divisible_by": 8}
TINY_RUN: dict[str, Any] = {"micro_batch_size": 2, "global_batch_size": 8, "train_iters": 6, "num_threads": 1}
TINY_RUN |= {"eval_iters": 1, "eval_interval": 3, "log_interval": 1, "split": "90,10,0"}
NOISE = {"hidden_dropout": 0.1, "attention_dropout": 0.1, "moe_input_jitter_eps": 0.05}


def write_corpus(prefix: Path, num_documents: int = 40, document_tokens: int = 150, vocab_size: int = 256) -> Path:
    """Writes an indexed dataset of random tokens and returns its prefix."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(7)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", np.uint16)
    for _ in range(num_documents):
        builder.add_item(random.integers(0, vocab_size, size=document_tokens))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix


def arguments(*, model: bool = True, **options: Any) -> list[str]:
    """Returns the command line of a tiny run; options are field names, True for a bare flag, None to leave out.

    Args:
        model: whether the tiny model's own options are given.
    """
    words = []
    for name, value in {**(TINY_MODEL if model else {}), **TINY_RUN, **options}.items():
        if value is None:
            continue
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words += [str(v) for v in value] if isinstance(value, (list, tuple)) else [str(value)]
    return words


def flags(**options: object) -> list[str]:
    """Returns a command line's words for options with a value each, by field names."""
    return [word for name, value in options.items() for word in ("--" + name.replace("_", "-"), str(value))]


class ProgramRun:
    """A running or finished program: its processes, one per rank (or one launcher), and what they printed."""

    def __init__(self, processes: Sequence[Any], outputs: Sequence[Path], store: Any = None):
        self.processes, self.outputs = processes, outputs
        self._store = store

    def output(self) -> str:
        """Returns standard output and error of all ranks, one after the other."""
        return "".join(path.read_text(errors="replace") for path in self.outputs if path.exists())

    def signal(self, number: signal.Signals, rank: int | None = None) -> None:
        """Sends a signal to one rank, or to all; ranks that have left are passed over."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 60.0) -> bool:
        """Returns True as soon as the condition holds, False if the program ends first.

        Raises:
            AssertionError: neither happens in time.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if condition():
                return True
            if all(process.exitcode is not None for process in self.processes):
                return condition()
            time.sleep(0.002)
        self._give_up(f"nothing of what was waited for within {timeout_s} s")
        return False

    def reached(self) -> int:
        """Returns the last iteration that was logged, 0 for none."""
        return max(map(int, re.findall(r"iteration +(\d+)/", self.output())), default=0)

    def wait_for_step(self, step: int) -> None:
        """Waits until an iteration is logged."""
        assert self.wait_until(lambda: self.reached() >= step), self.output()

    def wait(self, timeout_s: float = 60.0) -> tuple[int, ...]:
        """Returns the exit status of each rank, negative for a signal.

        Raises:
            AssertionError: the program is still running after the time; it is killed.
        """
        deadline = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        if any(process.exitcode is None for process in self.processes):
            self._give_up(f"still running after {timeout_s} s")
        return tuple(process.exitcode for process in self.processes)

    def succeed(self, timeout_s: float = 60.0) -> str:
        """Waits, asserts that every rank ended with status 0, and returns the output."""
        statuses = self.wait(timeout_s)
        assert set(statuses) == {0}, f"exit statuses {statuses}:\n{self.output()}"
        return self.output()

    def fail(self, timeout_s: float = 60.0) -> str:
        """Waits, asserts a failure explained in one paragraph and without a traceback, and returns the paragraph."""
        statuses = self.wait(timeout_s)
        output = self.output()
        assert 0 not in statuses and min(statuses) > 0, f"exit statuses {statuses}:\n{output}"
        assert "Traceback" not in output, output
        # A rank that did not meet the error itself repeats what ended the job.
        paragraphs = re.findall(
            r"^error.*?: (?:The job was ended by rank \d+ on \S+: )?(.*(?:\n  .*)*)", output, re.MULTILINE
        )
        assert len(set(paragraphs)) == 1, output
        return paragraphs[0]

    def _give_up(self, problem: str) -> None:
        for process in self.processes:
            process.kill()
            process.join(10)
        raise AssertionError(f"{problem}:\n{self.output()}")


class _Command(subprocess.Popen):
    """A subprocess with the methods of multiprocessing's processes."""

    @property
    def exitcode(self) -> int | None:
        return self.poll()

    def join(self, timeout_s: float) -> None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(timeout_s)


@dataclass(frozen=True)
class Sabotage:
    """The end of a run's first rank: it is killed just before its n-th change to a folder."""

    at_file_event: int
    in_folder: str

    def begin(self) -> None:
        """Takes effect in the calling process."""
        seen = 0

        def watch(event: str, args: tuple[Any, ...]) -> None:
            nonlocal seen
            if is_change(event, args) and self.in_folder in str(args[0]):
                seen += 1
                if seen == self.at_file_event:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)


def is_change(event: str, args: tuple[Any, ...]) -> bool:
    """Returns whether an audit event of Python announces a change to a folder or file."""
    if event == "open":
        mode = args[1]
        return isinstance(mode, str) and any(letter in mode for letter in "wax+")
    return event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "os.truncate")


def start(
    args: Sequence[str],
    folder: Path,
    num_ranks: int = 1,
    sabotage: Sabotage | None = None,
    cwd: Path | None = None,
    program: str = PRETRAIN,
) -> ProgramRun:
    """Starts a program on one or more ranks of this host.

    Args:
        folder: where the output goes.
        cwd: the program's working directory.
        program: module whose `main` it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    store, common = None, {}
    if num_ranks > 1:
        # As torchrun does it, the store lives outside the ranks, so its port is never a guess.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
        common |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        common |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(num_ranks))
    processes, outputs = [], []
    number = len(list(folder.glob("output-*")))
    for rank in range(num_ranks):
        own = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} if num_ranks > 1 else {}
        output = folder / f"output-{number:03d}-rank{rank}.txt"
        process = ranks._context.Process(
            target=_run_main,
            args=(list(args), own, str(output), sabotage if rank == 0 else None, str(cwd or REPOSITORY), program),
        )
        process.start()
        processes.append(process)
        outputs.append(output)
    return ProgramRun(processes, outputs, store)


def call(program: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs a program's `main` in this process, and returns its exit status and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = importlib.import_module(program).main(list(words))
        except SystemExit as end:
            status = end.code
    return subprocess.CompletedProcess(words, status or 0, out.getvalue(), err.getvalue())


def start_command(
    args: Sequence[str],
    folder: Path,
    num_ranks: int | None = None,
    launcher: Sequence[str] = ("--standalone",),
    **environment: str,
) -> ProgramRun:
    """Starts `python -m megatron_samoe.cli.pretrain`, under torchrun with these options if a number of ranks is given."""
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / f"output-{len(list(folder.glob('output-*'))):03d}.txt"
    torchrun = [] if num_ranks is None else ["torch.distributed.run", *launcher, f"--nproc-per-node={num_ranks}", "-m"]
    words = [sys.executable, "-m", *torchrun, "megatron_samoe.cli.pretrain", *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    with open(output, "wb") as file:
        command = _Command(words, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=REPOSITORY)
    return ProgramRun([command], [output])


def _run_main(
    args: list[str], environment: dict[str, str], output: str, sabotage: Sabotage | None, cwd: str, program: str
) -> None:
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    # As in a fresh interpreter whose output goes to a file.
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)
    os.environ.update(environment)
    os.chdir(cwd)
    main = importlib.import_module(program).main
    if sabotage is not None:
        sabotage.begin()
    try:
        status = main(args)
    finally:
        sys.stdout.flush()
    sys.exit(status)


def records(path: Path) -> list[dict[str, Any]]:
    """Returns what a metrics file says of the model, line by line."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MACHINE_KEYS} for line in lines]


def losses(path: Path) -> list[float]:
    """Returns the training losses of a metrics file."""
    return [record["lm_loss"] for record in records(path)]


def iterations(checkpoints: Path) -> list[int]:
    """Returns the iterations of the visible checkpoints in a folder."""
    return sorted(int(path.name.removeprefix("iter_")) for path in checkpoints.glob("iter_*"))


def checkpoint_tensors(directory: Path) -> dict[str, Tensor]:
    """Returns all tensors of a checkpoint, read by torch.distributed.checkpoint itself."""
    reader = dcp.FileSystemReader(str(directory))
    stored = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(meta.size, dtype=meta.properties.dtype)
        for name, meta in stored.items()
        if isinstance(meta, TensorStorageMetadata)
    }
    logging.getLogger("c10d-NullHandler-dcp_logger").propagate = False  # it would fill the report of a failed test
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def assert_same_checkpoint(actual: Path, expected: Path) -> None:
    """Asserts that two checkpoints hold the same tensors and training state, bit for bit."""
    ours, theirs = checkpoint_tensors(actual), checkpoint_tensors(expected)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different, f"{len(different)} of {len(ours)} tensors differ: {different[:5]}"
    states = [json.loads((folder / "train_state.json").read_text()) for folder in (actual, expected)]
    for state in states:
        del state["digests"], state["digest"]  # of files, in which equal tensors may stand in another order
    assert states[0] == states[1]


def flip_bit(path: Path, at: int | None = None) -> None:
    """Changes one bit of a file, in its middle or in the byte at a place."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    path.write_bytes(content)


def contents(folder: Path) -> dict[str, bytes]:
    """Returns every file below a folder with its bytes, to show that nothing was touched."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
