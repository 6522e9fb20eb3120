"""The inspection tool's command line: what a checkpoint holds, and what is wrong with it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from torch import Tensor

from megatron_samoe.cli.program import Group, program
from megatron_samoe.convert.edited_model import NOT_MODEL
from megatron_samoe.convert.formats import NATIVE
from megatron_samoe.convert.hf.folder import WeightFile
from megatron_samoe.convert.hf.parts import VOCABULARY
from megatron_samoe.convert.inspect.health import Health, as_plain, check_health
from megatron_samoe.convert.inspect.numbers import Difference, difference, statistics
from megatron_samoe.convert.inspect.sharing import described_sharing
from megatron_samoe.convert.opener import open_folder, open_stored, verify
from megatron_samoe.dist_checkpointing.global_tensors import GlobalTensors, StoredTensor
from megatron_samoe.dist_checkpointing.store import LoadWords
from megatron_samoe.errors import ConfigError, MegatronSamoeError
from megatron_samoe.parsing import JsonObject, without_infinities

#: Exit statuses, as those of diff and grep.
FINE, FOUND, TROUBLE = 0, 1, 2
#: A folder is not a flag's value here.
WORDS = LoadWords("")
TEXT = """Looks at checkpoints of this program, of Megatron-LM and of Hugging Face, one tensor in memory
at a time. Exits with 0 where nothing is wrong or different, with 1 where something is, with 2 where it cannot tell."""


@dataclass(frozen=True)
class Side:
    """The checkpoint that is inspected.

    Attributes:
        source: its tensors, under our names or those of the files.
    """

    kind: str
    directory: Path
    source: GlobalTensors | WeightFile
    train_state: Mapping[str, Any] | None = None
    config: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()


def opened(folder: str, step: int | None, raw: bool = False) -> Side:
    """Returns a folder's model; ConfigError where ours is another, which `raw` looks at all the same."""
    if raw:
        found, directory, stored = open_stored(folder, step, WORDS)
        return Side(found.name, directory, stored)
    try:
        model = open_folder(folder, step, WORDS)
    except ConfigError as error:
        if error.field == WORDS.step:
            raise
        raise ConfigError(
            error.field, error.value, f"{error.allowed} --raw looks at the tensors as they are."
        ) from None
    notes = () if model.kind == NATIVE else model.notes
    tensors = model.tensors
    return Side(model.kind, model.directory, tensors, tensors.train_state, tensors.config, notes)


Result = tuple[int, Mapping[str, Any], list[str]]


Folder = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DIRECTORY")]


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """The actions on a checkpoint."""

    directory: Folder
    """folder of checkpoints, or of one"""
    ckpt_step: int | None = None
    """iteration; the newest if not given"""
    json: bool = False
    """print JSON"""

    def found(self) -> Result:
        """Returns the exit status, values for JSON, and lines."""
        raise NotImplementedError

    def run(self) -> int:
        try:
            status, values, lines = self.found()
        except MegatronSamoeError as error:
            print(f"error: {error}", file=sys.stderr)
            return TROUBLE
        print(json.dumps(without_infinities(values, str), indent=1) if self.json else "\n".join(lines))
        return status


@dataclass(frozen=True, kw_only=True)
class InspectTensors(Inspect):
    """The actions on single tensors."""

    match: Annotated[str | None, tyro.conf.arg(metavar="REGEX")] = None
    """only tensors in whose names this is found"""
    model_only: bool = False
    """leave out optimizer state and statistics"""
    raw: bool = False
    """names and shapes as in the files of other programs"""

    def chosen(self, side: Side, model_only: bool = False) -> dict[str, StoredTensor]:
        """Returns the tensors that were asked for."""
        try:
            pattern = re.compile(self.match or "")
        except re.error as error:
            raise ConfigError("--match", self.match, f"is not a regular expression: {error}") from None
        return {
            name: stored
            for name, stored in side.source.tensors.items()
            if pattern.search(name) and not ((self.model_only or model_only) and name.startswith(NOT_MODEL))
        }

    def open(self) -> tuple[Side, dict[str, StoredTensor], int]:
        """Returns the checkpoint, what is chosen of it, and how wide a column for the names is."""
        side = opened(self.directory, self.ckpt_step, self.raw)
        chosen = self.chosen(side)
        return side, chosen, max(map(len, chosen), default=4)


def _described(side: Side) -> list[str]:
    step = (side.train_state or {}).get("iteration")
    return [
        f"{side.kind} checkpoint in {side.directory}" + (f", iteration {step}" if step is not None else ""),
        *side.notes,
    ]


@dataclass(frozen=True, kw_only=True)
class List(InspectTensors):
    """names, shapes and sizes"""

    def found(self) -> Result:
        side, chosen, width = self.open()
        described = {
            n: {"shape": list(t.shape), "dtype": t.dtype_name, "bytes": t.num_bytes} for n, t in chosen.items()
        }
        lines = [f"{name:{width}}  {t['dtype']:9} {t['bytes']:>14,} B  {t['shape']}" for name, t in described.items()]
        count, size = sum(t.num_elements for t in chosen.values()), sum(t.num_bytes for t in chosen.values())
        model = sum(t.num_elements for name, t in chosen.items() if not name.startswith(NOT_MODEL))
        lines.append(f"{len(chosen)} tensors, {count:,} elements ({model:,} of the model), {size:,} bytes.")
        values = {
            "kind": side.kind,
            "directory": str(side.directory),
            "train_state": side.train_state,
            "config": side.config,
            "elements": count,
            "model_elements": model,
            "bytes": size,
            "tensors": described,
        }
        return FINE, values, [*_described(side), *lines]


@dataclass(frozen=True, kw_only=True)
class Stat(InspectTensors):
    """smallest, largest, mean, spread, NaN and Inf"""

    def found(self) -> Result:
        side, chosen, width = self.open()
        found = {name: statistics(side.source.read(name)) for name in chosen}
        head = f"{'tensor':{width}}  {'smallest':>10} {'largest':>10} {'mean':>10} {'spread':>10} {'zeros':>7} NaN/Inf"
        lines = [*_described(side), head]
        for name, s in found.items():
            numbers = " ".join(f"{value:10.3e}" for value in (s.minimum, s.maximum, s.mean, s.std))
            lines.append(f"{name:{width}}  {numbers} {s.zeros:7.1%} {s.nan}/{s.inf}")
        num_bad = sum(not s.is_finite for s in found.values())
        lines.append(f"{len(found)} tensors, {num_bad} with NaN or Inf.")
        return (FOUND if num_bad else FINE), _tensors(found), lines


def _tensors(found: Mapping[str, Any]) -> JsonObject:
    return {"tensors": {name: asdict(record) for name, record in found.items()}}


@dataclass(frozen=True, kw_only=True)
class Diff(InspectTensors):
    """compare two checkpoints, also of two families, tensor by tensor"""

    other: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OTHER")]
    """folder to compare with"""
    other_step: int | None = None
    """iteration of the other folder; the newest if not given"""
    atol: float = 0.0
    """tolerated absolute difference of an element"""
    rtol: float = 0.0
    """tolerated norm of the difference over the norm"""
    limit: int = 20
    """number of tensors to show, the most different first"""

    def found(self) -> Result:
        for name in ("atol", "rtol", "limit"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"--{name}", getattr(self, name), "must be 0 or more")
        asked = ((self.directory, self.ckpt_step), (self.other, self.other_step))
        sides = tuple(opened(folder, step, self.raw) for folder, step in asked)
        others = any(side.kind != NATIVE for side in sides)  # which keep only the model
        first, second = chosen = [self.chosen(side, model_only=others) for side in sides]
        padding = _Padding(sides)
        only = [[name for name in own if name not in other] for own, other in (chosen, chosen[::-1])]
        both = [name for name in first if name in second]
        shaped = [n for n in both if padding.shape_without(n, first[n]) != padding.shape_without(n, second[n])]
        found = {
            name: difference(*(padding.cut(name, side.source.read(name)) for side in sides))
            for name in both
            if name not in shaped
        }
        beyond = [name for name, d in found.items() if not d.is_within(self.atol, self.rtol)]
        lines = [line for side in sides for line in _described(side)]
        for which, names in zip(("first", "second"), only, strict=True):
            lines += [f"only in the {which}: {name}" for name in names[: self.limit]]
        lines += [f"{n} is {list(first[n].shape)} in the first, {list(second[n].shape)} in the second" for n in shaped]
        lines += _difference_table(found, self.limit)
        equal = sum(d.num_different == 0 for d in found.values())
        lines.append(
            f"{len(found)} tensors compared: {equal} equal, {len(found) - equal} different, {len(beyond)} beyond "
            f"--atol {self.atol:g} and --rtol {self.rtol:g}; {len(only[0])} and {len(only[1])} on one side "
            f"only, {len(shaped)} of other shapes."
        )
        values = {
            "only_in_first": only[0],
            "only_in_second": only[1],
            "other_shape": shaped,
            "beyond_tolerance": beyond,
            **_tensors(found),
        }
        return (FOUND if beyond or shaped or any(only) else FINE), values, lines


class _Padding:
    """Rows of the vocabulary beyond the last token, which each family rounds up and fills as it likes."""

    def __init__(self, sides: Sequence[Side]):
        sizes = {(side.train_state or {}).get("vocab_size") for side in sides}
        same_family = len({side.kind for side in sides}) == 1
        # In one family all rows count; without a common vocabulary nothing is known to be padding.
        self._num_tokens = None if same_family or len(sizes) > 1 else sizes.pop()

    def _rows(self, name: str) -> int | None:
        return self._num_tokens if name in VOCABULARY else None

    def shape_without(self, name: str, stored: StoredTensor) -> tuple[int, ...]:
        rows = self._rows(name)
        return stored.shape if rows is None else (min(rows, stored.shape[0]), *stored.shape[1:])

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        return tensor[: self._rows(name)] if name in VOCABULARY else tensor


def _difference_table(found: Mapping[str, Difference], limit: int) -> Iterator[str]:
    different = sorted((d.relative, name) for name, d in found.items() if d.num_different)[::-1]
    if not different:
        return
    width = max(len(name) for _, name in different[:limit])
    yield f"{'tensor':{width}}  {'largest':>10} {'relative':>10}  elements"
    for relative, name in different[:limit]:
        yield f"{name:{width}}  {found[name].largest:10.3e} {relative:10.3e}  {found[name].num_different:,}"
    if different[limit:]:
        yield f"and {len(different) - limit} more (--limit)"


@dataclass(frozen=True, kw_only=True)
class Verify(Inspect):
    """check files against their digests, names and shapes; every iteration unless one is given"""

    def found(self) -> Result:
        verdicts = verify(self.directory, self.ckpt_step, WORDS)
        lines = []
        for verdict in verdicts:
            state = "DAMAGED" if verdict.problems else "whole"
            lines += [f"{verdict.directory}: {state} ({verdict.checked})", *(f"  {p}" for p in verdict.problems)]
        values = [{"directory": str(v.directory), "checked": v.checked, "problems": v.problems} for v in verdicts]
        return (FOUND if any(v.problems for v in verdicts) else FINE), {"checkpoints": values}, lines


@dataclass(frozen=True, kw_only=True)
class Check(Inspect):
    """find NaN and Inf, experts that were never updated, banks that no layer uses"""

    start: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """an earlier checkpoint of the run, to see updates by"""
    start_step: int | None = None
    """iteration of --start; the newest if not given"""
    dead_below: float = 1e-3
    """share of a layer's largest coefficient below which a bank is dead there"""

    def found(self) -> Result:
        if not 0 < self.dead_below < 1:
            raise ConfigError("--dead-below", self.dead_below, "must be a share between 0 and 1")
        if self.start_step is not None and self.start is None:
            raise ConfigError("--start-step", self.start_step, "needs --start")
        side = opened(self.directory, self.ckpt_step)
        start = None if self.start is None else opened(self.start, self.start_step)
        health = check_health(side.source, None if start is None else start.source, self.dead_below)  # type: ignore[arg-type]
        return (FINE if health.is_sound else FOUND), as_plain(health), [*_described(side), *_health_lines(health)]


@dataclass(frozen=True, kw_only=True)
class Sharing(Inspect):
    """which layers share which experts, and how large these are"""

    def found(self) -> Result:
        side = opened(self.directory, self.ckpt_step)
        text, stores = described_sharing(side.source)  # type: ignore[arg-type]
        lines = [*_described(side), f"--expert-sharing {text}" if stores else "No layer has experts."]
        for s in stores:
            layers = ", ".join(map(str, s.layers))
            lines.append(
                f"{s.name:24}  {s.num_experts:>5} experts  {s.elements:>14,} elements  {s.num_bytes:>15,} B  layers {layers}"
            )
        shared = sum(s.elements for s in stores if len(s.layers) > 1)
        if stores:
            whole = sum(s.elements // s.num_banks * len(s.layers) for s in stores)
            lines.append(
                f"{sum(s.elements for s in stores):,} elements of experts, {shared:,} of them shared; "
                f"{whole:,} if no layers shared."
            )
        return FINE, {"expert_sharing": text, "stores": [asdict(s) for s in stores]}, lines


_EVIDENCE = {
    "start": "weights equal to those of --start",
    "moments": "no gradient in Adam's second moments",
    "seed": "weights as the run's seed draws them, except for weight decay",
}


def _health_lines(health: Health) -> Iterator[str]:
    for name, (nan, inf) in health.not_finite.items():
        yield f"NOT FINITE {name}: {nan} NaN, {inf} Inf"
    if not health.not_finite:
        yield "All tensors are finite."
    if health.evidence is not None:
        stale = health.stale_experts
        told = f"told by {_EVIDENCE[health.evidence]}"
        yield f"NEVER UPDATED ({told}): {'; '.join(stale)}" if stale else f"All experts have been updated ({told})."
    for layer, idle in health.idle_experts.items():
        yield f"layers.{layer}: no token of the last step went to expert {', '.join(map(str, idle))}."
    if health.coefficients:
        yield f"layer  {'weights of banks' if health.has_banks else 'factors on sets'}, of w1 and of w2"
        for layer, a_2P in health.coefficients.items():
            yield f"{layer:5}  " + "   ".join(" ".join(f"{a:7.4f}" for a in row.tolist()) for row in a_2P)
        if health.stale_coefficients:
            yield f"NO GRADIENT in the coefficients of layers {', '.join(map(str, health.stale_coefficients))}"
        banks = ", ".join(map(str, health.dead_banks))
        if health.has_banks:
            yield f"DEAD BANKS: no layer uses {banks}" if health.dead_banks else "Every bank is used by some layer."


COMMANDS = {"list": List, "stat": Stat, "diff": Diff, "verify": Verify, "sharing": Sharing, "check": Check}
main = program(Group(COMMANDS, TEXT))

if __name__ == "__main__":
    sys.exit(main())
