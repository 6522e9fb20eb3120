"""The trial of a hostile file: a command in a process of its own with little time and memory, whose every look outside is seen."""

from __future__ import annotations

import faulthandler
import importlib
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm

from megatron_samoe.cli.command import module_of
from megatron_samoe.errors import MegatronSamoeError
from tests.harness.program import is_change
from tests.harness.ranks import run_ranks
from tests.hostile.formats import MAKERS, Case

#: Of one command: processor time, time on a busy machine, and memory beyond what its imports take.
CPU_S, WALL_S, MOST_BYTES = 20, 60, 3 << 30
#: More memory than any of the files explains: the longest text has 300 MB.
MOST_GROWTH_MB = 1500
#: What Python tells of before it starts a program or talks to a host.
RUNS = ("os.exec", "os.posix_spawn", "os.system", "socket.connect", "socket.getaddrinfo", "subprocess.Popen")
REACHED = "REACHED OUTSIDE: "
#: File of what a process prints, in its folder.
OUTPUT = "output.txt"
#: Loaded before any process is forked.
_COMMANDS = ("pretrain", "preprocess", "train-tokenizer", "inspect-dataset", "convert", "inspect", "generate", "plan")
_LIBRARIES = ("pandas", "pyarrow.parquet", "tokenizers", "sentencepiece", "safetensors.torch", "tests.harness.serving")
MODULES = (*map(module_of, _COMMANDS), "megatron_samoe.language_model", *_LIBRARIES, __name__)
#: With what a command ends: an error, a wrong flag, damage that `inspect verify` found.
PARAGRAPH = re.compile(
    r"^(?:error[^:\n]*: |megatron-samoe [^:\n]*: |.*: DAMAGED \(.*\n  )(.*(?:\n  .*)*)", re.MULTILINE
)

tqdm.get_lock()  # made once, by the fork server: else each process would make one, and its tracker would tell of it


@dataclass(frozen=True)
class End:
    """How a process ended.

    Attributes:
        status: its exit status, or a signal's number below 0.
        growth_mb: its most memory, beyond that of a process that does nothing.
    """

    status: int
    output: str
    growth_mb: float = 0.0


def run(folder: Path, function: Callable[..., int | None], *args: Any) -> End:
    """Returns how a function ends in a process of its own, which has everything loaded and may write into a folder."""
    (end,) = run_ranks(_confined, 1, folder, function, *args, timeout_s=WALL_S + 30.0, more=MODULES, may_die=True)
    return end if isinstance(end, End) else End(end, (folder / OUTPUT).read_text(errors="replace"))


def _confined(folder: Path, function: Callable[..., int | None], *args: Any) -> End:
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _confine(folder)
    try:
        status = function(*args) or 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 99
    sys.stdout.flush()
    sys.stderr.flush()
    for process in psutil.Process().children(recursive=True):
        process.kill()
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base
    return End(status & 127, (folder / OUTPUT).read_text(errors="replace"), growth / 1024)


def _confine(folder: Path) -> None:
    """Bounds this process, and makes it say what it does outside of a folder."""
    for target, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, folder / OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        os.dup2(os.open(path, flags, 0o644), target)
    os.dup2(1, 2)
    sys.stdin = open(0, closefd=False)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)
    for number in (signal.SIGALRM, signal.SIGXCPU):
        faulthandler.register(number, all_threads=False, chain=True)  # says where it was, and ends it
    signal.alarm(WALL_S)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S + 5))
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + MOST_BYTES, has + MOST_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    scratch = folder / "tmp"
    scratch.mkdir(exist_ok=True)
    tempfile.tempdir = os.environ["TMPDIR"] = str(scratch)
    os.chdir(folder)
    torch.set_num_threads(1)
    legal = (str(folder.resolve()) + os.sep, "/dev/", "/proc/self/")

    def watch(event: str, args: tuple[Any, ...]) -> None:
        wrote = is_change(event, args) and not isinstance(args[0], int)
        ran = event in RUNS and args[0] != sys.executable  # the program's own workers
        if ran or (wrote and not os.path.realpath(os.fsdecode(args[0])).startswith(legal)):
            os.write(2, f"\n{REACHED}{event} {args[0]!r}\n".encode(errors="replace"))

    sys.addaudithook(watch)


def command(words: list[str]) -> int:
    """Runs a command as its command line does; `load` is the function of that name."""
    name, *rest = words
    if name != "load":
        sys.argv = [f"megatron-samoe {name}", *rest]
        return importlib.import_module(module_of(name)).main(rest)  # type: ignore[no-any-return]
    try:
        importlib.import_module("megatron_samoe.language_model").load(*rest).generate("Emma", max_new_tokens=2)
    except MegatronSamoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


class Trials:
    """Tries cases, one after the other, in a folder."""

    def __init__(self, root: Path):
        self.root = root

    def sound(self, kind: str) -> Path:
        """Returns the folder of a format's sound files, which are made once."""
        folder = self.root / kind
        if not folder.exists():
            folder.mkdir()
            made = run(folder, MAKERS[kind], folder)
            assert made.status == 0, made.output
        return folder

    @staticmethod
    def try_command(words: str, folder: Path, file: Path) -> End:
        """Returns how a command ends for the files of a folder."""
        places = {"in": folder / "in", "out": folder / "out", "file": file}
        return run(folder, command, [word.format_map(places) for word in words.split()])

    def __call__(self, case: Case) -> tuple[str, End]:
        """Returns what is wrong with the end of a case, nothing where all is well, and the end."""
        victim, _, words = case.drawn
        sound, folder = self.sound(victim.format), self.root / "case"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        made = run(folder, case.prepare, sound, folder)
        assert made.status == 0, f"{case}\n{made.output}"
        path = next(sound.glob(victim.glob)).relative_to(sound)
        end = self.try_command(words, folder, folder / "in" / path)
        # Of a configuration an error may name the option, as it does of a flag.
        named = (path.stem, str(folder / "in"), *(("--",) if "--config" in words else ()))
        fault = fault_of(end, named, folder / "CANARY")
        if not fault and end.status == 0 and "skip" not in words:
            judged = run(folder, case.refuse, folder / "in" / path)
            if judged.status != 0 and "emory" not in judged.output:
                fault = f"accepts what another program refuses: {judged.output.strip().splitlines()[-1]}"
            elif victim.format == "native" and "verify" in words:
                fault = next(_unseen(sound, folder / "in"), "")
        return fault, end


def _unseen(sound: Path, hostile: Path) -> Iterator[str]:
    """Yields what differs of a checkpoint in which verifying finds nothing."""
    for path in (p for p in (sound / "run").rglob("iter_*/*") if p.is_file()):
        other = hostile / path.relative_to(sound)
        if not other.is_file() or path.read_bytes() != other.read_bytes():
            yield f"verifies {path.name}, which is not as it was written"


def fault_of(end: End, named: tuple[str, ...], canary: Path) -> str:
    """Returns what is wrong with how a command ended that was given a hostile file; nothing where all is well.

    Args:
        named: texts of which its error must have one: the file, or the folder it is in.
        canary: what exists if code of the file was run.
    """
    if canary.exists():
        return "runs code of the file"
    if REACHED in end.output:
        return next(line for line in end.output.splitlines() if line.startswith(REACHED))
    if end.status < 0:
        name = signal.Signals(-end.status).name
        words = {"SIGALRM": f"hangs for {WALL_S} s", "SIGXCPU": f"takes {CPU_S} s of processor time"}
        return words.get(name, f"dies by {name}") + _place(end.output, 0)
    if "Traceback (most recent call last)" in end.output:
        return f"traceback: {end.output.strip().splitlines()[-1]}{_place(end.output, -1)}"
    if end.growth_mb > MOST_GROWTH_MB:
        return f"takes {end.growth_mb:,.0f} MB"
    told = PARAGRAPH.findall(end.output)
    # `inspect check` and `stat` end with 1 where they find something, which is not an error.
    if end.status == 0 or (end.status == 1 and not told and "checkpoint in" in end.output):
        return ""
    if end.status not in (1, 2) or len(told) != 1:
        return f"ends with status {end.status} and {len(told)} paragraphs of error"
    if control := re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", told[0]):
        return f"prints the control character {control[0]!r}"
    if len(told[0]) > 6000:
        return f"prints an error of {len(told[0]):,} characters"
    return "" if any(name in told[0] for name in named) else f"prints an error that names no file: {told[0]}"


def _place(output: str, which: int) -> str:
    """Returns where in the program it was: the first line that a stack names, or the last that a traceback does."""
    found = re.findall(r'File "[^"]*(megatron_samoe/[^"]+)", line (\d+)', output)
    return f" ({':'.join(found[which])})" if found else ""
