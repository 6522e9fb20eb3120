"""The results of a finished run, read from its folder."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from megatron_samoe.config.cli import from_mapping
from megatron_samoe.config.derived import num_moe_layers, sharing_map
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.sharing_map import written_map
from megatron_samoe.config.validate import refuse_wrong_numbers
from megatron_samoe.dist_checkpointing import store
from megatron_samoe.errors import CheckpointError, shown
from megatron_samoe.parsing import JsonObject, parse_json
from megatron_samoe.planning.accounting import ParameterCount, count_parameters

#: What a study writes into the folder of a finished run; see study/results_store.py.
RUN_FILE = "run.json"
#: Share of the median by which quartiles of a run's speed may differ; more is due to the machine's other work.
NOISE = 0.15


@dataclass(frozen=True)
class RunSummary:
    """One run.

    Attributes:
        records: the lines of metrics.jsonl, by iteration: earlier checkpoints may have been evaluated later.
        checkpoint_bytes: size of the last checkpoint, optimizer state included.
        tokens_per_s: median over logged steps; None where nothing was trained, only evaluated.
        machine: where it ran, the content of machine.json; empty where that is not there.
    """

    name: str
    config: PretrainConfig
    parameters: ParameterCount
    records: list[JsonObject]
    checkpoint_bytes: int
    tokens_per_s: float | None
    directory: Path
    vocab_size: int
    machine: JsonObject = field(default_factory=dict)

    @property
    def trained(self) -> list[JsonObject]:
        """The records of training steps."""
        return [r for r in self.records if "lm_loss" in r]

    @property
    def validation(self) -> JsonObject:
        """The last record with a validation loss."""
        return next(r for r in reversed(self.records) if "validation_loss" in r)

    @property
    def last_trained(self) -> JsonObject:
        """The record of the last logged step; empty where nothing was trained."""
        return self.trained[-1] if self.trained else {}

    @property
    def least_load_entropy(self) -> float | None:
        """The least load entropy of any layer in the last logged step; None for a dense model and for older runs."""
        return self.last_trained.get("least_load_entropy")

    @property
    def num_tokens(self) -> int | None:
        """Tokens that were trained on; None where nothing was trained."""
        return self.last_trained.get("consumed_tokens")

    @property
    def peak_memory_bytes(self) -> int | None:
        """The most memory that any rank held; None where nothing was trained."""
        return max((r["peak_memory_bytes"] for r in self.trained if "peak_memory_bytes" in r), default=None)


def read_run(run_dir: Path) -> RunSummary:
    """Returns the summary of a run folder.

    Raises:
        CheckpointError: it has no checkpoint or no metrics, or the metrics are damaged.
    """
    metrics = run_dir / "metrics.jsonl"
    kept = read_run_file(run_dir) or _read_checkpoint(run_dir)
    if kept is None or not metrics.is_file():
        raise CheckpointError(f"{run_dir} is not the folder of a run: it needs checkpoints/ and metrics.jsonl.")
    config, vocab_size = from_mapping(kept["config"], kept["source"]), kept["vocab_size"]
    refuse_wrong_numbers(config)
    records = sorted(read_records(metrics), key=lambda record: record.get("iteration", 0))
    if not any("validation_loss" in r for r in records):
        raise CheckpointError(f"{metrics} has no validation loss: was the run stopped before its first evaluation?")
    speeds = [r["tokens_per_s"] for r in records if "tokens_per_s" in r]
    return RunSummary(
        run_dir.absolute().name,
        config,
        count_parameters(config, vocab_size),
        records,
        kept["checkpoint_bytes"],
        tokens_per_s=statistics.median(speeds) if speeds else None,
        directory=run_dir,
        vocab_size=vocab_size,
        machine=_read_machine(run_dir / "machine.json"),
    )


def _read_checkpoint(run_dir: Path) -> JsonObject | None:
    """Returns what `read_run_file` does, without the key, of a run's last checkpoint; None without a complete one."""
    iterations = store.whole_iterations(run_dir / "checkpoints")
    if not iterations:
        return None
    directory = store.iteration_dir(run_dir / "checkpoints", iterations[-1])
    return {
        "config": store.read_config(directory),
        "vocab_size": store.read_train_state(directory, ("vocab_size",))["vocab_size"],
        "checkpoint_bytes": sum(f.stat().st_size for f in directory.iterdir()),
        "source": str(directory),
    }


def read_run_file(run_dir: Path) -> JsonObject | None:
    """Returns what a study wrote of a run that it has finished, its key, configuration and sizes; None where it has not.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = run_dir / RUN_FILE
    if not path.is_file():
        return None
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        kinds = {"key": str, "config": dict, "vocab_size": int, "checkpoint_bytes": int}
        return {**{name: kind(content[name]) for name, kind in kinds.items()}, "source": str(path)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); remove it, and the run is evaluated again.") from None


def _read_machine(path: Path) -> JsonObject:
    """Returns where a run ran; nothing where no file says so, as in runs of earlier versions."""
    if not path.is_file():
        return {}
    try:
        machine = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; without it the report can be made.") from None
    kinds = {"device": str, "device_name": str, "ranks": int, "threads_per_rank": int, "layout": dict}
    wrong = [key for key, kind in kinds.items() if not isinstance(machine, dict) or type(machine.get(key)) is not kind]
    if wrong or not all(type(size) is int for size in machine["layout"].values()):
        raise CheckpointError(
            f"{path} is damaged in {', '.join(wrong) or 'layout'}; without it the report can be made."
        )
    return machine


def read_records(path: Path) -> list[JsonObject]:
    """Returns the lines of metrics.jsonl, without a last one that was only half written when the run was killed.

    Raises:
        CheckpointError: another line is damaged.
    """
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = parse_json(line)
        except ValueError:
            if number == len(lines) and not line.endswith("\n"):
                break
            record = None
        if not isinstance(record, dict):
            raise CheckpointError(f"{path}:{number} is not a record of a run: {line.strip()[:60]!r}.")
        wrong = [key for key, value in record.items() if not _is_metric(key, value)]
        if wrong:
            raise CheckpointError(f"{path}:{number} is not a record of a run: {wrong[0]} is {shown(record[wrong[0]])}.")
        records.append(record)
    return records


#: Metrics that are numbers, and metrics with an array of numbers for each layer; of others nothing is made here.
_NUMBERS = """
    iteration consumed_samples consumed_tokens lm_loss grad_norm learning_rate loss_scale tokens_per_s
    step_time_s peak_memory_bytes load_balance_loss z_loss least_load_entropy largest_expert_share idle_experts
    dropped_token_fraction validation_loss validation_perplexity test_loss test_perplexity mfu
""".split()
_ARRAYS = ("expert_load", "expert_grad_norm", "combination")


def _is_metric(key: str, value: object) -> bool:
    if key in _NUMBERS:
        # A loss may be infinite, or no number: such a run is reported as it was.
        return isinstance(value, (int, float)) and not isinstance(value, bool) and not 1e300 < abs(value) < math.inf
    if key not in _ARRAYS:
        return True
    try:
        array = np.asarray(value, dtype=float)
    except (ValueError, TypeError, OverflowError):
        return False
    return array.ndim == (4 if key == "combination" else 2)


T = TypeVar("T")
#: Rows of text, the first the heading.
Table = list[list[str]]


def sharing_text(config: PretrainConfig) -> str:
    """Returns how MoE layers share experts: own, pool, the number of a pool's banks, or the map of sets; a dash without
    any."""
    moe = config.moe
    if not num_moe_layers(config):
        return "-"
    if moe.word is not None and moe.sharing != moe.word.way.name:
        return moe.sharing
    text = written_map(sharing_map(config)).replace(":", " ")
    if names := [way.name for way in moe.ways if way.in_sets and not way.mixes]:
        text = f"{names[0]} {text}"
    return f"{text} ({moe.num_expert_banks} banks)" if moe.has_pool else text


def millions_text(number: float) -> str:
    """Returns a number of parameters in millions."""
    return f"{number / 1e6:.2f} M"


def megabytes_text(num_bytes: int | None, decimals: int = 0) -> str:
    """Returns a size; a dash where it is not known."""
    return "-" if num_bytes is None else f"{num_bytes / 1e6:.{decimals}f} MB"


def is_noise(speeds: Sequence[float]) -> bool:
    """Returns whether the speeds of a run's intervals scatter as they do on a machine that something else uses, too."""
    low, middle, high = np.quantile(speeds, (0.25, 0.5, 0.75)) if speeds else (0.0, 0.0, 0.0)
    return bool(high - low > NOISE * middle)


def known_text(form: str, value: float | None, otherwise: str = "-") -> str:
    """Returns a number as a format says; a dash, or another text, where it is None or nan."""
    return otherwise if value is None or math.isnan(value) else form.format(value)


def perplexity_text(loss: float) -> str:
    """Returns e^loss, with its significant digits."""
    perplexity = math.exp(loss) if not loss > math.log(sys.float_info.max) else math.inf
    return f"{perplexity:.2f}" if perplexity < 1e6 else f"{perplexity:.3g}"


def table(columns: Mapping[str, Callable[[T], str]], items: Iterable[T]) -> Table:
    """Returns a row of texts for each item, below the columns' headings.

    Args:
        columns: what each shows of an item, by its heading.
    """
    return [list(columns), *([show(item) for show in columns.values()] for item in items)]


def format_table(rows: Table) -> str:
    """Returns rows as aligned text, first column left, others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
