"""Where records go: console, metrics file, TensorBoard, trackers, progress bar."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_samoe.errors import ConfigError
from megatron_samoe.installation import install_extra
from megatron_samoe.log import logger
from megatron_samoe.parsing import parse_json
from megatron_samoe.training.hook import Hook, Record, Training
from megatron_samoe.training.machine import machine_facts
from megatron_samoe.training.train_step import StepResult


def _numbers(record: Record) -> dict[str, float]:
    """Returns the numbers of a record, and the losses of each dataset of a blend."""
    found = {key: float(v) for key, v in record.items() if isinstance(v, (int, float)) and key != "iteration"}
    for name in ("validation", "test"):
        found |= {f"{name}_loss/{data}": loss for data, loss in record.get(f"{name}_loss_by_dataset", {}).items()}
    return found


class ConsoleLog(Hook):
    """Megatron's log line, the loss first, with tokens per second."""

    rank_0_only = True

    def __init__(self, train_iters: int):
        self.train_iters = train_iters

    def record(self, run: Training, record: Record) -> None:
        """Prints one line, and one more after an evaluation."""
        fields = [
            f"iteration {record['iteration']:8d}/{self.train_iters:8d}",
            f"lm loss: {record['lm_loss']:.6E}",
            *([f"kl loss: {record['kl_loss']:.6E}"] if "kl_loss" in record else []),
            f"consumed samples: {record['consumed_samples']:12d}",
            *([f"epoch: {record['epoch']:.2f}"] if "epoch" in record else []),
            f"elapsed time per iteration (ms): {record['step_time_s'] * 1000:.1f}",
            f"tokens/s: {record['tokens_per_s']:.0f}",
            f"time left: {_hours(record['step_time_s'] * (self.train_iters - record['iteration']))}",
            f"learning rate: {record['learning_rate']:.6E}",
            f"global batch size: {record['global_batch_size']:5d}",
        ]
        if "load_balance_loss" in record:
            fields.append(f"load balancing loss: {record['load_balance_loss']:.6E}")
        if "least_load_entropy" in record:
            fields.append(f"z loss: {record['z_loss']:.6E}")
            fields.append(f"least load entropy: {record['least_load_entropy']:.3f}")
            fields.append(f"largest expert share: {record['largest_expert_share']:.1%}")
            fields.append(f"idle experts: {record['idle_experts']}")
            fields.append(f"dropped tokens: {record['dropped_token_fraction']:.2%}")
        fields += [f"loss scale: {record['loss_scale']:.1f}", f"grad norm: {record['grad_norm']:.3f}"]
        if "slowest_rank" in record:
            mean, slowest = 1000 * record["own_time_mean_s"], 1000 * record["own_time_max_s"]
            fields.append(f"own time per rank (ms): {mean:.1f}, most {slowest:.1f} of rank {record['slowest_rank']}")
        if "mfu" in record:
            fields.append(f"MFU: {record['mfu']:.1%}")
        logger.info(f" [{time.strftime('%Y-%m-%d %H:%M:%S')}] " + " | ".join(fields) + " |")
        self.evaluated(run, record)

    def checkpoint_saved(self, run: Training, path: Path) -> None:
        logger.info(f"saved {path}")

    def evaluated(self, run: Training, record: Record) -> None:
        """Prints one line for each kind of data that was evaluated, and one for each dataset of a blend."""
        for name in ("validation", "test"):
            if f"{name}_loss" in record:
                logger.info(
                    f" {name} loss at iteration {record['iteration']} | lm loss value: {record[f'{name}_loss']:.6E} | "
                    f"lm loss PPL: {record[f'{name}_perplexity']:.6E} |"
                )
            for dataset, loss in record.get(f"{name}_loss_by_dataset", {}).items():
                logger.info(f"   of {dataset} | lm loss value: {loss:.6E} |")


def _hours(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


class MetricsFile(Hook):
    """One JSON object per logged step.

    A resumed run first drops what the killed one logged beyond its checkpoint; a fresh one sets aside an existing file;
    a run that only evaluates appends. Where training runs goes into machine.json next to it, as of the last start.

    Args:
        trains: whether there will be steps, not only an evaluation, which says nothing of training's speed.
    """

    rank_0_only = True

    def __init__(self, path: str, trains: bool = True):
        self.path, self.place = Path(path), f"--metrics-file {path}"
        self._trains = trains
        self.file: Any = None

    def start(self, run: Training) -> None:
        """Opens the file and cuts it back to the iteration that training resumes from."""
        iteration = run.state.iteration
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self._trains:
            self._end_last_line()
        elif iteration == 0 and self.path.exists() and self.path.stat().st_size:
            self._set_aside()
        elif self.path.exists():
            kept = [
                line for line in self.path.read_text(errors="replace").splitlines() if _iteration_of(line) <= iteration
            ]
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(line + "\n" for line in kept))
            os.replace(temporary, self.path)
        if self._trains:
            facts = machine_facts(run.setup.parallel)
            self.path.with_name("machine.json").write_text(json.dumps(facts, indent=1) + "\n")
        self.file = open(self.path, "a")

    def _end_last_line(self) -> None:
        """Drops a record that a killed run wrote in part, so that the next one has a line of its own."""
        if self.path.exists():
            with open(self.path, "rb+") as file:
                file.truncate(file.read().rfind(b"\n") + 1)

    def _set_aside(self) -> None:
        """Keeps the records of an earlier run under another name."""
        number = next(n for n in itertools.count(1) if not Path(f"{self.path}.{n}").exists())
        self.path.rename(f"{self.path}.{number}")
        logger.info(f"{self.path} is of an earlier run; kept as {self.path}.{number}")

    def record(self, run: Training, record: Record) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def evaluated(self, run: Training, record: Record) -> None:
        self.record(run, record)

    def close(self, run: Training) -> None:
        if self.file is not None:
            self.file.close()


def _iteration_of(line: str) -> float:
    try:
        iteration = parse_json(line)["iteration"]
        return iteration if type(iteration) is int else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line that a kill cut off


class TensorBoard(Hook):
    """Scalars of every record, and coefficients and expert load per layer where they are recorded."""

    rank_0_only = True

    def __init__(self, directory: str):
        self.directory, self.place = directory, f"--tensorboard-dir {directory}"
        self.writer: Any = None

    def start(self, run: Training) -> None:
        from torch.utils.tensorboard import SummaryWriter

        iteration = run.state.iteration
        self.writer = SummaryWriter(self.directory, purge_step=iteration + 1 if iteration else None)

    def record(self, run: Training, record: Record) -> None:
        for key, value in _numbers(record).items():
            name, slash, dataset = key.partition("/")
            self.writer.add_scalar(f"{name.replace('_', '-')}{slash}{dataset}", value, record["iteration"])
        for layer, loads in enumerate(record.get("expert_load", [])):
            self.writer.add_scalar(f"max-expert-load/moe-layer-{layer}", max(loads) * len(loads), record["iteration"])
        for layer, (inputs, _) in enumerate(record.get("combination", [])):
            for bank in range(len(inputs[0])):
                mean = sum(group[bank] for group in inputs) / len(inputs)
                self.writer.add_scalar(f"combination/moe-layer-{layer}-bank-{bank}", mean, record["iteration"])

    def close(self, run: Training) -> None:
        if self.writer is not None:
            self.writer.close()


class Tracker(Hook):
    """Weights & Biases, or trackio, which has the same calls: the numbers of every record, and the configuration.

    Args:
        library: "wandb" or "trackio".
    """

    rank_0_only = True

    def __init__(self, library: str, project: str, name: str | None, config: Mapping[str, Any]):
        try:
            self._library: Any = importlib.import_module(library)
        except ImportError:
            raise ConfigError(
                f"--{library}-project", project, f"needs {library}, which is not installed: {install_extra(library)}"
            ) from None
        self.place = f"--{library}-project {project}"
        self._project, self._name, self._config = project, name, dict(config)
        self._run: Any = None
        self._failed = False

    def start(self, run: Training) -> None:
        self._try(lambda: setattr(self, "_run", self._init()))

    def _init(self) -> Any:
        return self._library.init(project=self._project, name=self._name, config=self._config)

    def _try(self, call: Callable[[], object]) -> None:
        """Runs a call; a tracker that fails is not called again, and training continues."""
        if self._failed:
            return
        try:
            call()
        except Exception as error:  # whatever the library raises
            self._failed = True
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            logger.warning(f"{self.place} failed and gets no more records: {first}")

    def record(self, run: Training, record: Record) -> None:
        """Logs the record's numbers, and losses by dataset."""
        self._try(lambda: self._library.log(_numbers(record), step=record["iteration"]))

    def close(self, run: Training) -> None:
        if self._run is not None:
            self._try(self._library.finish)


class ProgressBar(Hook):
    """A bar over iterations, which replaces the console's lines."""

    rank_0_only = True

    def __init__(self, train_iters: int, description: str):
        self.train_iters, self.description = train_iters, description
        self.bar: Any = None
        self._shown: dict[str, str] = {}

    def start(self, run: Training) -> None:
        done = run.state.iteration
        self.bar = tqdm(total=self.train_iters, initial=done, desc=self.description, unit="step", mininterval=1.0)

    def post_step(self, run: Training, result: StepResult) -> None:
        """Moves the bar and shows the step's loss, which not every step's record has."""
        self._shown["loss"] = f"{result.lm_loss:.3f}"
        self.bar.set_postfix(self._shown, refresh=False)
        self.bar.update(1)

    def record(self, run: Training, record: Record) -> None:
        self._shown |= {"loss": f"{record['lm_loss']:.3f}", "tokens/s": f"{record['tokens_per_s']:.0f}"}
        if "epoch" in record:
            self._shown["epoch"] = f"{record['epoch']:.2f}"
        if "least_load_entropy" in record:
            self._shown["load entropy"] = f"{record['least_load_entropy']:.2f}"
        if "validation_loss" in record:
            self._shown["valid"] = f"{record['validation_loss']:.3f}"
        self.bar.set_postfix(self._shown, refresh=False)

    def evaluated(self, run: Training, record: Record) -> None:
        names = {"valid": "validation_loss", "test": "test_loss"}
        self.bar.set_postfix({name: f"{record[key]:.3f}" for name, key in names.items() if key in record})

    def close(self, run: Training) -> None:
        if self.bar is not None:
            self.bar.close()
