"""The inspection tool's command line: what a checkpoint holds, and what is wrong with it."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from megatron_samoe.cli.arguments import Options, Parser, Words, adder, sub_commands
from megatron_samoe.convert.edited_model import NOT_MODEL
from megatron_samoe.convert.inspect.health import Health, as_plain, check_health
from megatron_samoe.convert.inspect.numbers import Difference, difference, statistics
from megatron_samoe.convert.inspect.open import Opened, open_any, verify
from megatron_samoe.convert.inspect.sharing import described_sharing
from megatron_samoe.convert.megatron.export import VOCABULARY
from megatron_samoe.dist_checkpointing.global_tensors import StoredTensor
from megatron_samoe.errors import ConfigError, MegatronSamoeError
from megatron_samoe.parsing import JsonObject

#: Exit statuses, as those of diff and grep.
FINE, FOUND, TROUBLE = 0, 1, 2
_DESCRIPTION = """Looks at checkpoints of this program, of Megatron-LM (format torch) and of Hugging Face, one tensor in memory
at a time. Exits with 0 where nothing is wrong or different, with 1 where something is, with 2 where it cannot tell."""

Result = tuple[int, Mapping[str, Any], list[str]]


def main(words: Words = None) -> int:
    """Runs the tool and returns its exit status."""
    options = make_parser().parse_args(words)
    try:
        status, values, lines = COMMANDS[options.command](options)
    except MegatronSamoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return TROUBLE
    print(json.dumps(_finite(values), indent=1) if options.json else "\n".join(lines))
    return status


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = Parser(_DESCRIPTION)
    command_for = sub_commands(parser)

    def command(name: str, text: str) -> Callable[..., argparse.Action]:
        add = adder(command_for(name, text))
        add("directory", str, "folder of checkpoints, or of one")
        if name == "diff":
            add("other", str, "folder to compare with")
        add("--ckpt-step", int, "iteration; the newest if not given")
        add("--json", bool, "print JSON")
        if name in ("list", "stat", "diff"):
            add("--match", str, "only tensors in whose names this is found", metavar="REGEX")
            add("--model-only", bool, "leave out optimizer state and statistics")
            add("--raw", bool, "names and shapes as in the files of other programs")
        return add

    command("list", "names, shapes and sizes")
    command("stat", "smallest, largest, mean, spread, NaN and Inf")
    diff = command("diff", "compare two checkpoints, also of two families, tensor by tensor")
    diff("--other-step", int, "iteration of the other folder; the newest if not given")
    diff("--atol", 0.0, "tolerated absolute difference of an element")
    diff("--rtol", 0.0, "tolerated norm of the difference over the norm")
    diff("--limit", 20, "show so many tensors, the most different first")
    command("verify", "check files against their digests, names and shapes; every iteration unless one is given")
    command("sharing", "which layers share which experts, and how large these are")
    check = command("check", "find NaN and Inf, experts that were never updated, banks that no layer uses")
    check("--start", str, "an earlier checkpoint of the run, to tell updates by", metavar="DIR")
    check("--start-step", int, "iteration of --start; the newest if not given")
    check("--dead-below", 1e-3, "share of a layer's largest coefficient below which a bank is dead there")
    return parser


def _chosen(opened: Opened, options: Options) -> dict[str, StoredTensor]:
    try:
        pattern = re.compile(options.match or "")
    except re.error as error:
        raise ConfigError("--match", options.match, f"is no regular expression: {error}") from None
    return {
        name: stored
        for name, stored in opened.source.tensors.items()
        if pattern.search(name) and not (options.model_only and name.startswith(NOT_MODEL))
    }


def _described(opened: Opened) -> list[str]:
    step = (opened.train_state or {}).get("iteration")
    return [f"{opened.kind} checkpoint in {opened.directory}" + (f", iteration {step}" if step is not None else ""),
            *opened.notes]  # fmt: skip


def _open(options: Options) -> tuple[Opened, dict[str, StoredTensor], int]:
    """Returns the checkpoint, what is chosen of it, and how wide a column for the names is."""
    opened = open_any(options.directory, options.ckpt_step, options.raw)
    chosen = _chosen(opened, options)
    return opened, chosen, max(map(len, chosen), default=4)


def _list(options: Options) -> Result:
    opened, chosen, width = _open(options)
    described = {n: {"shape": list(t.shape), "dtype": t.dtype_name, "bytes": t.num_bytes} for n, t in chosen.items()}
    lines = [f"{name:{width}}  {t['dtype']:9} {t['bytes']:>14,} B  {t['shape']}" for name, t in described.items()]
    count, size = sum(t.num_elements for t in chosen.values()), sum(t.num_bytes for t in chosen.values())
    model = sum(t.num_elements for name, t in chosen.items() if not name.startswith(NOT_MODEL))
    lines.append(f"{len(chosen)} tensors, {count:,} elements ({model:,} of the model), {size:,} bytes.")
    values = {
        "kind": opened.kind, "directory": str(opened.directory), "train_state": opened.train_state,
        "config": opened.config, "elements": count, "model_elements": model, "bytes": size, "tensors": described,
    }  # fmt: skip
    return FINE, values, [*_described(opened), *lines]


def _stat(options: Options) -> Result:
    opened, chosen, width = _open(options)
    found = {name: statistics(opened.source.read(name)) for name in chosen}
    head = f"{'tensor':{width}}  {'smallest':>10} {'largest':>10} {'mean':>10} {'spread':>10} {'zeros':>7} NaN/Inf"
    lines = [*_described(opened), head]
    for name, s in found.items():
        numbers = " ".join(f"{value:10.3e}" for value in (s.minimum, s.maximum, s.mean, s.std))
        lines.append(f"{name:{width}}  {numbers} {s.zeros:7.1%} {s.nan}/{s.inf}")
    num_bad = sum(not s.is_finite for s in found.values())
    lines.append(f"{len(found)} tensors, {num_bad} with NaN or Inf.")
    return (FOUND if num_bad else FINE), _tensors(found), lines


def _tensors(found: Mapping[str, Any]) -> JsonObject:
    return {"tensors": {name: asdict(record) for name, record in found.items()}}


def _diff(options: Options) -> Result:
    for name in ("atol", "rtol", "limit"):
        if not getattr(options, name) >= 0:
            raise ConfigError(f"--{name}", getattr(options, name), "must be 0 or more")
    sides = (open_any(options.directory, options.ckpt_step, options.raw),
             open_any(options.other, options.other_step, options.raw))  # fmt: skip
    if any(side.kind != "native" for side in sides):
        options.model_only = True  # other families keep the model alone
    first, second = chosen = [_chosen(side, options) for side in sides]
    padding = _Padding(sides)
    only = [[name for name in own if name not in other] for own, other in (chosen, chosen[::-1])]
    both = [name for name in first if name in second]
    shaped = [n for n in both if padding.shape_without(n, first[n]) != padding.shape_without(n, second[n])]
    found = {
        name: difference(*(padding.cut(name, side.source.read(name)) for side in sides))
        for name in both
        if name not in shaped
    }
    beyond = [name for name, d in found.items() if not d.is_within(options.atol, options.rtol)]
    lines = [line for side in sides for line in _described(side)]
    for which, names in zip(("first", "second"), only, strict=True):
        lines += [f"only in the {which}: {name}" for name in names[: options.limit]]
    lines += [f"{n} is {list(first[n].shape)} in the first, {list(second[n].shape)} in the second" for n in shaped]
    lines += _difference_table(found, options.limit)
    equal = sum(d.num_different == 0 for d in found.values())
    lines.append(f"{len(found)} tensors compared: {equal} equal, {len(found) - equal} different, {len(beyond)} beyond "
                 f"--atol {options.atol:g} and --rtol {options.rtol:g}; {len(only[0])} and {len(only[1])} on one side "
                 f"only, {len(shaped)} of other shapes.")  # fmt: skip
    values = {
        "only_in_first": only[0], "only_in_second": only[1], "other_shape": shaped, "beyond_tolerance": beyond,
        **_tensors(found),
    }  # fmt: skip
    return (FOUND if beyond or shaped or any(only) else FINE), values, lines


class _Padding:
    """Rows of the vocabulary beyond the last token, which each family rounds up and fills as it likes."""

    def __init__(self, sides: Sequence[Opened]):
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


def _verify(options: Options) -> Result:
    verdicts = verify(options.directory, options.ckpt_step)
    lines = []
    for verdict in verdicts:
        state = "DAMAGED" if verdict.problems else "whole"
        lines += [f"{verdict.directory}: {state} ({verdict.checked})", *(f"  {p}" for p in verdict.problems)]
    values = [{"directory": str(v.directory), "checked": v.checked, "problems": v.problems} for v in verdicts]
    return (FOUND if any(v.problems for v in verdicts) else FINE), {"checkpoints": values}, lines


def _check(options: Options) -> Result:
    if not 0 < options.dead_below < 1:
        raise ConfigError("--dead-below", options.dead_below, "must be a share between 0 and 1")
    if options.start_step is not None and options.start is None:
        raise ConfigError("--start-step", options.start_step, "needs --start")
    opened = open_any(options.directory, options.ckpt_step)
    start = None if options.start is None else open_any(options.start, options.start_step)
    health = check_health(opened.source, None if start is None else start.source, options.dead_below)  # type: ignore[arg-type]
    return (FINE if health.is_sound else FOUND), as_plain(health), [*_described(opened), *_health_lines(health)]


def _sharing(options: Options) -> Result:
    opened = open_any(options.directory, options.ckpt_step)
    text, stores = described_sharing(opened.source)  # type: ignore[arg-type]
    lines = [*_described(opened), f"--expert-sharing {text}" if stores else "No layer has experts."]
    for s in stores:
        layers = ", ".join(map(str, s.layers))
        lines.append(
            f"{s.name:24}  {s.num_experts:>5} experts  {s.elements:>14,} elements  {s.num_bytes:>15,} B  layers {layers}"
        )
    shared = sum(s.elements for s in stores if len(s.layers) > 1)
    if stores:
        whole = sum(s.elements // s.num_banks * len(s.layers) for s in stores)
        lines.append(f"{sum(s.elements for s in stores):,} elements of experts, {shared:,} of them shared; "
                     f"{whole:,} if no layers shared.")  # fmt: skip
    return FINE, {"expert_sharing": text, "stores": [asdict(s) for s in stores]}, lines


_EVIDENCE = {
    "start": "weights equal to those of --start",
    "moments": "no gradient in Adam's second moments",
    "seed": "weights as the run's seed draws them, but for weight decay",
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


def _finite(value: Any) -> Any:
    """Returns the value with text in place of numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


COMMANDS: dict[str, Callable[[Options], Result]] = {
    "list": _list, "stat": _stat, "diff": _diff, "verify": _verify, "check": _check,
    "sharing": _sharing,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
