"""`megatron_samoe.pretrain(config)`: what the command makes, made in Python, in one process and on ranks."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_samoe
from megatron_samoe.config import CheckpointConfig, PretrainConfig
from megatron_samoe.config.cli import parse_pretrain_args
from megatron_samoe.errors import CheckpointError, ConfigError, ConfigErrors
from megatron_samoe.training.hook import Hook, Training
from megatron_samoe.training.train_step import StepResult
from tests.harness.program import (
    MACHINE_KEYS,
    TINY_MODEL,
    TINY_RUN,
    arguments,
    assert_same_checkpoint,
    checkpoint_tensors,
    iterations,
    records,
    start,
)

pytestmark = pytest.mark.distributed
LAST = "checkpoints/iter_0000006"
NOWHERE = {"load": "nowhere", "exit_on_missing_checkpoint": True}


def options(**more: Any) -> dict[str, Any]:
    return {**TINY_MODEL, **TINY_RUN, **more}


def kept(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns records without what they say of the machine, as JSON has them."""
    return [{k: v for k, v in record.items() if k not in MACHINE_KEYS} for record in json.loads(json.dumps(found))]


def main(words: list[str]) -> int:
    """Trains in Python on a rank of a job: the program that tests start. Twice, since the first run leaves half-way.

    Args:
        words: options as JSON, and a folder for what each rank was given.
    """
    given, folder = json.loads(words[0]), Path(words[1])
    half = megatron_samoe.pretrain({**given, "exit_interval": 3})
    whole = megatron_samoe.pretrain(given)
    assert half.folder == whole.folder == Path(given["run_dir"]) and whole.model is not None
    shapes = {name: list(p.shape) for name, p in whole.model.named_parameters()}
    told = {"half": kept(half.records), "whole": kept(whole.records), "shapes": shapes}
    (folder / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(told))
    return 0


def test_a_run_in_python_is_the_commands_run(corpus: Path, tmp_path: Path) -> None:
    words = arguments(data_path=corpus, run_dir=tmp_path / "command")
    start(words, tmp_path / "out").succeed()
    asked = parse_pretrain_args(arguments(data_path=corpus, run_dir=tmp_path / "typed"))
    by_name = options(data_path=str(corpus), run_dir=str(tmp_path / "named"))
    for name, config in (("typed", asked), ("named", by_name)):
        made = megatron_samoe.pretrain(config)  # the second time in one process, as in a notebook
        assert made.folder == tmp_path / name and not torch.distributed.is_initialized()
        assert_same_checkpoint(tmp_path / name / LAST, tmp_path / "command" / LAST)
        assert kept(made.records) == records(tmp_path / "command/metrics.jsonl")
        assert made.model is not None
        stored = checkpoint_tensors(tmp_path / "command" / LAST)
        for key, weight in made.model.global_parameters().items():
            assert torch.equal(weight.detach(), stored[key].view_as(weight)), key


def test_ranks_of_a_job_run_in_python_what_the_command_runs_on_them(corpus: Path, tmp_path: Path) -> None:
    layout = {"expert_model_parallel_size": 2, "save_interval": 3}
    start(arguments(data_path=corpus, run_dir=tmp_path / "command", **layout), tmp_path / "out", num_ranks=2).succeed()
    given = options(data_path=str(corpus), run_dir=str(tmp_path / "python"), **layout)
    start([json.dumps(given), str(tmp_path)], tmp_path / "out", num_ranks=2, program=__name__).succeed()
    assert_same_checkpoint(tmp_path / "python" / LAST, tmp_path / "command" / LAST)
    of_command = records(tmp_path / "command/metrics.jsonl")
    for rank in range(2):
        made = json.loads((tmp_path / f"{rank}.json").read_text())
        assert made["half"] + made["whole"] == of_command
        assert {shape[0] for name, shape in made["shapes"].items() if "banks" in name} <= {1, 2, 4}
    assert records(tmp_path / "python/metrics.jsonl") == of_command


class Interrupting(Hook):
    """Sends the signal of a notebook's stop button after some steps."""

    def __init__(self, after: int) -> None:
        self.after, self.steps = after, 0

    def post_step(self, run: Training, result: StepResult) -> None:
        self.steps += 1
        if self.steps == self.after:
            os.kill(os.getpid(), signal.SIGINT)


def test_a_notebooks_interrupt_returns_what_there_is(corpus: Path, tmp_path: Path) -> None:
    before, hook = signal.getsignal(signal.SIGINT), Interrupting(2)
    made = megatron_samoe.pretrain(options(data_path=str(corpus), run_dir=str(tmp_path)), hooks=[hook])
    assert [record["iteration"] for record in made.records] == [1, 2] and hook.steps == 2
    assert iterations(tmp_path / "checkpoints") == [2] and signal.getsignal(signal.SIGINT) == before


WRONG: list[tuple[Any, str]] = [
    ({"num_layer": 2}, "num_layer = 2: unknown option in the configuration. Did you mean 'num_layers'"),
    ({"num_layers": "two"}, "num_layers = 'two': must be of type int"),
    ({**TINY_MODEL, "hidden_size": 15}, "num_attention_heads = 2: must divide hidden_size 15, or give "),
    (options(num_experts=8, expert_layout="dense"), "num_experts = 8: needs expert_layout moe or samoe"),
    (options(mock_data=True, keep_last=2), "keep_last = 2: needs save or run_dir"),
    (options(mock_data=True, **NOWHERE), "load nowhere has no checkpoint."),
    (PretrainConfig(checkpoint=CheckpointConfig(keep_last=2)), "keep_last = 2: needs save or run_dir"),
]


@pytest.mark.parametrize(("given", "said"), WRONG)
def test_what_is_wrong_is_said_in_pythons_words(given: Any, said: str) -> None:
    with pytest.raises(CheckpointError if "nowhere" in said else ConfigError) as found:
        megatron_samoe.pretrain(given)
    assert said in str(found.value) and "--" not in str(found.value)
    if isinstance(found.value, ConfigErrors):
        assert not any("--" in str(error) for error in found.value.errors)


def test_what_is_no_configuration_or_hook_is_refused_at_once() -> None:
    with pytest.raises(TypeError, match="config must be a PretrainConfig or a mapping of options, not str"):
        megatron_samoe.pretrain("config.yaml")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="is not a Hook"):
        megatron_samoe.pretrain({"mock_data": True}, hooks=[print])  # type: ignore[list-item]
