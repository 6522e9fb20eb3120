"""Counts what a reader passes between a pretraining's command line and its first optimizer step.

    python -m tools.pages.trace_start [flags of megatron-samoe pretrain, in place of a tiny run's]

The *way* is the files of the functions that are on the stack when the first step begins. A reader reads these files, and
opens each file that they call into: all of these are counted. What is behind an opened file is not, nor are properties,
lambdas and comprehensions, which are read in place. A method counts in the file of the first class that has it: of a hook,
a reader opens what hooks are. A *climb* is a call, in the order in which the program makes them,
into a higher layer of the package (tests/architecture/test_floors.py) than the call before went.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = str(ROOT / "megatron_samoe") + "/"
#: Where the first step begins.
FIRST_STEP = ("training/train_step.py", "train_step")
TINY: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "seq_length": 16,
    "split": "90,10,0",
}
TINY |= {"expert_layout": "samoe", "num_experts": 4, "train_iters": 1, "micro_batch_size": 1, "eval_iters": 1}
TINY["num_threads"] = 1


@dataclass(frozen=True)
class Call:
    """A call of a function of the package.

    Attributes:
        caller: number of the call that made it, among all; None for the first.
    """

    file: str
    function: str
    caller: int | None


class Tracer:
    """Notes the package's calls from here to the first optimizer step, imports left out."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._numbers: dict[FrameType, int] = {}  # which keeps the frames, so that none is taken for another
        self.first_step: int | None = None

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        """Takes an event of `sys.setprofile`."""
        file = frame.f_code.co_filename
        # A generator is called anew each time that it goes on.
        if event != "call" or not file.startswith(PACKAGE) or frame in self._numbers:
            return
        if any(name == "<module>" for name in self._names_above(frame)):
            return
        above = frame.f_back
        while above is not None and above not in self._numbers:
            above = above.f_back
        call = Call(interface(frame), frame.f_code.co_qualname, None if above is None else self._numbers[above])
        self._numbers[frame] = len(self.calls)
        self.calls.append(call)
        if (call.file, call.function) == FIRST_STEP:
            self.first_step = self._numbers[frame]
            sys.setprofile(None)

    @staticmethod
    def _names_above(frame: FrameType | None) -> Iterator[str]:
        while frame is not None:
            if frame.f_code.co_filename.startswith(PACKAGE):
                yield frame.f_code.co_name
            frame = frame.f_back


def interface(frame: FrameType) -> str:
    """Returns the file of a function, or of the first class of the package that has a method of its name."""
    code = frame.f_code
    this = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    kinds = [kind for kind in type(this).__mro__ if code.co_name in vars(kind) and kind.__module__ in sys.modules]
    files = [str(getattr(sys.modules[kind.__module__], "__file__", "")) for kind in kinds]
    own = [file for file in files if file.startswith(PACKAGE)] if code.co_filename in files else []
    return (own[-1] if own else code.co_filename).removeprefix(PACKAGE)


def way(calls: Sequence[Call], first_step: int) -> list[str]:
    """Returns the files with a function on the stack when the first step begins, the outermost first."""
    found: list[str] = []
    number: int | None = first_step
    while number is not None:
        found.insert(0, calls[number].file)
        number = calls[number].caller
    return list(dict.fromkeys(found))


def opened(calls: Sequence[Call], first_step: int) -> list[str]:
    """Returns the files that a reader of the way opens, in order; one after another is never the same."""
    on_way = set(way(calls, first_step))
    found: list[str] = []
    for call in calls[: first_step + 1]:
        calls_it = call.file in on_way or (call.caller is not None and calls[call.caller].file in on_way)
        if calls_it and not is_value(call) and found[-1:] != [call.file]:
            found.append(call.file)
    return found


def is_value(call: Call) -> bool:
    """Whether a call is read in place: a property, a lambda or a comprehension."""
    *_, name = call.function.rpartition(".")
    found: Any = sys.modules.get("megatron_samoe." + call.file.removesuffix(".py").replace("/", "."))
    for part in call.function.split("."):
        found = inspect.getattr_static(found, part, None)
    return name.startswith("<") or isinstance(found, (property, functools.cached_property))


def climbs(files: Sequence[str]) -> list[tuple[str, str]]:
    """Returns the calls of a row of files that go into a higher layer of the package than the one before."""
    layers = importlib.import_module("tests.architecture.test_floors").FLOOR_OF

    def layer(file: str) -> Any:
        return layers[file.partition("/")[0].removesuffix(".py")]

    return [(before, after) for before, after in pairwise(files) if layer(after) > layer(before)]


def trace(flags: Sequence[str]) -> Tracer:
    """Runs the pretraining command, and returns its calls until the first step."""
    from megatron_samoe.cli.command import main

    tracer = Tracer()
    sys.argv = ["megatron-samoe", "pretrain", *flags]
    sys.setprofile(tracer)
    try:
        main()
    finally:
        sys.setprofile(None)
    return tracer


def tiny_run(folder: Path) -> list[str]:
    """Returns the flags of a tiny run on a corpus that is written to a folder."""
    from megatron_samoe.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(folder / "corpus.bin"), np.uint16)
    for _ in range(10):
        builder.add_item(np.arange(100) % 256)
        builder.end_document()
    builder.finalize(str(folder / "corpus.idx"))
    (folder / "config.yaml").write_text(yaml.safe_dump(TINY))
    return ["--config", f"{folder}/config.yaml", "--data-path", f"{folder}/corpus", "--run-dir", f"{folder}/run"]


def main(flags: Sequence[str]) -> int:
    """Prints the files and climbs, and returns an exit status."""
    with tempfile.TemporaryDirectory() as folder:
        tracer = trace(flags or tiny_run(Path(folder)))
    if tracer.first_step is None:
        print("the run made no step")
        return 1
    row = opened(tracer.calls, tracer.first_step)
    files, up = list(dict.fromkeys(row)), climbs(row)
    print(f"\non the way: {', '.join(way(tracer.calls, tracer.first_step))}")
    print(f"files: {len(files)}", *files, sep="\n  ")
    print(f"climbs: {len(up)}", *(f"{before} -> {after}" for before, after in up), sep="\n  ")
    all_files = {call.file for call in tracer.calls[: tracer.first_step + 1]}
    print(f"all files that the run calls into, those behind others included: {len(all_files)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
