"""Measurements by other commands for a report's runs: decoding times, zero-shot results, a study's list of runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_samoe.errors import DataError
from megatron_samoe.evaluation.run_groups import RunGroup
from megatron_samoe.evaluation.zero_shot.metrics import SHARES_OF_ITEMS
from megatron_samoe.parsing import JsonObject, finite_float, parse_json


@dataclass(frozen=True)
class DecodeTime:
    """A row of `benchmark decode --json`; the checkpoint is the folder that was measured."""

    checkpoint: Path
    dtype: str
    batch: int
    ms_per_token: float


@dataclass(frozen=True)
class ZeroShot:
    """One metric of one task for one run, from `evaluate.py --json`; shares are in percent.

    Attributes:
        items: that were asked; fewer than the task has with --limit.
        stderr: from the number of items.
        values: of nearby checkpoints, the newest last; one value without --checkpoints.
        constant: what the best single choice gets; None without choices.
    """

    checkpoint: Path
    task: str
    metric: str
    items: int
    value: float | None
    stderr: float | None
    values: tuple[float | None, ...]
    constant: float | None


@contextmanager
def reading(path: Path, what: str) -> Iterator[Any]:
    """Gives a file's content.

    Raises:
        DataError: it cannot be read, is not JSON, or is found not to be what it is to be.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as {what}: {error}.") from error
    try:
        yield content
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DataError(f"{path} is not {what}: {error!r}.") from error


def read_decode(path: Path) -> list[DecodeTime]:
    """Returns the rows that are of checkpoints; other programs' rows are left out.

    Raises:
        DataError: the file is not what `benchmark decode --json` writes.
    """
    with reading(path, "the output of benchmark.py decode --json") as rows:
        return [_decode_time(row) for row in rows if row["serving"]]


def _decode_time(row: JsonObject) -> DecodeTime:
    # The name of one of our own rows is its checkpoint and its way of serving.
    checkpoint = Path(row["contestant"].removesuffix(f" {row['serving']}").removesuffix(" auto"))
    dtype, batch, measured = row["dtype"], row["batch"], [row[key] for key in ("ms_per_token", "read_mb", "floor_ms")]
    are_numbers = all(not isinstance(value, str) and finite_float(value) is not None for value in measured)
    if not (isinstance(dtype, str) and type(batch) is int and batch > 0 and are_numbers):
        raise ValueError("a measured time is no number")
    return DecodeTime(checkpoint, dtype, batch, measured[0])


def read_zero_shot(path: Path) -> list[ZeroShot]:
    """Returns the metrics of the newest checkpoint in a file, and how they vary over all of its folder.

    Raises:
        DataError: the file is not what `evaluate.py --json` writes.
    """
    with reading(path, "the output of evaluate.py --json") as content:
        # A model to compare with is last, in a folder of its own.
        home = Path(content["runs"][0]["checkpoint"]).parent
        newest = [run for run in content["runs"] if Path(run["checkpoint"]).parent == home][-1]
        varied = {(v["task"], v["metric"]): v["values"] for v in content.get("variation", ())}
        results = [
            _zero_shot(newest["checkpoint"], result, metric, found, varied.get((result["task"], metric)))
            for result in newest["results"]
            for metric, found in result["metrics"].items()
        ]
    return results


def _zero_shot(
    checkpoint: str, result: JsonObject, metric: str, found: JsonObject, values: Sequence[float | None] | None
) -> ZeroShot:
    # Files of earlier versions don't say it: all of their other metrics are shares.
    in_percent = found.get("in_percent", not metric.endswith(("perplexity", "bits_per_byte")))
    factor = 100.0 if in_percent else 1.0

    def scaled(value: float | None) -> float | None:
        return None if value is None else factor * value

    constant = result["best_constant"] if metric in SHARES_OF_ITEMS else None
    return ZeroShot(
        Path(checkpoint),
        result["task"],
        metric,
        int(result["items"]),
        scaled(found["value"]),
        scaled(found["stderr"]),
        tuple(scaled(v) for v in (values or [found["value"]])),
        scaled(constant),
    )


def read_study(path: Path) -> JsonObject:
    """Returns a study's results.json.

    Raises:
        DataError: the file is malformed.
    """
    with reading(path, "a study's results.json") as content:
        if not isinstance(content["title"], str) or not directories_of(content):
            raise ValueError("it must have a title and variants")
    study: JsonObject = content
    return study


def directories_of(study: JsonObject) -> dict[str, list[Path]]:
    """Returns the run folders of a study by model."""
    return {str(v["name"]): [Path(d) for d in v["directories"]] for v in study["variants"]}


def of_group(group: RunGroup, rows: Sequence[Any]) -> list[Any]:
    """Returns the rows whose checkpoint is in a group's folders."""
    return [row for row in rows if group.contains(row.checkpoint)]
