"""`megatron-samoe edit` as users run it: from a trained dense model all the way round, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_samoe.cli import edit
from megatron_samoe.convert.opener import open_folder
from megatron_samoe.dist_checkpointing.global_tensors import write_checkpoint
from megatron_samoe.parallel_state.state import single_process_state
from megatron_samoe.runtime.load import load_model
from tests.harness.program import arguments, contents, start
from tests.harness.tables import table
from tests.harness.tiny import tiny_config
from tests.unit.convert.memory_source import new_source

TABLE = table(__file__)


def run_edit(capsys: pytest.CaptureFixture, words: str, load: Path, save: Path) -> tuple[int, str]:
    action, *options = words.split()
    folders = [str(word) for word in ("--load-dir", load, "--save-dir", save)]
    status = edit.main([action, *folders, *(str(load) if word == "LOAD" else word for word in options)])
    output = capsys.readouterr()
    return status, output.out + output.err


def test_the_tool_goes_all_the_way_round(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = {"expert_layout": "dense", "num_experts": None, "num_expert_banks": None, "num_layers": 4}
    first = {"run_dir": tmp_path / "dense", "train_iters": 2, "eval_interval": 2, **options}
    start(arguments(mock_data=True, split=None, **first), tmp_path).succeed()
    dense = tmp_path / "dense/checkpoints"
    upcycle = "upcycle --expert-layout moe --num-experts 4 --moe-router-topk 2 --noise 0.01"
    before = contents(dense)
    status, output = run_edit(capsys, f"{upcycle} --dry-run", dense, tmp_path / "moe")
    assert status == 0 and "Nothing is written" in output and not (tmp_path / "moe").exists()
    status, output = run_edit(capsys, upcycle, dense, tmp_path / "moe")
    assert status == 0 and "tensors of optimizer state are dropped" in output
    assert contents(dense) == before
    steps = {
        "pooled": ("moe", "pool --num-expert-banks 2"),
        "selected": ("pooled", "select --scale one"),
        "folded": ("selected", "fold"),
        "scaled": ("moe", "tie --expert-sharing scaled --num-expert-sets 2 --sets-from 1,2"),
        "tied": ("scaled", "select --to tied --scale one"),
        "student": ("tied", "student --keep-layers 0,1,3"),
        "thin": ("student", "fold"),
    }
    for name, (source, words) in steps.items():
        status, output = run_edit(capsys, words, tmp_path / source, tmp_path / name)
        assert status == 0 and f"{words.split()[0]}: " in output, output
        model = load_model(open_folder(tmp_path / name), single_process_state())
        assert model.config.model.num_layers == (3 if name in ("student", "thin") else 4)
    for name in ("pooled", "thin"):
        given = {
            "run_dir": tmp_path / "run" / name,
            "pretrained_checkpoint": tmp_path / name,
            "use_checkpoint_args": True,
        }
        train = arguments(model=False, mock_data=True, split=None, train_iters=1, eval_interval=1, **given)
        start(train, tmp_path / "output").succeed()


@pytest.mark.parametrize("layout", ["dense", "moe"])
def test_bad_input_is_one_paragraph(layout: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_checkpoint(tmp_path / layout, 7, new_source(tiny_config(layout)))
    for words, message in TABLE[layout]:
        status, output = run_edit(capsys, words, tmp_path / layout, tmp_path / "new")
        assert status != 0 and message in output and output.count("\n") == 1, output
    assert not (tmp_path / "new").exists()
