"""A conversion that is killed leaves nothing that is taken for a model, and nothing in the way of the next try."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_samoe.config.data import DataConfig
from megatron_samoe.convert.hf.families.llama import LLAMA
from megatron_samoe.convert.hf.source import derived_model
from megatron_samoe.convert.hf.tokenizer_files import imported_tokenizer
from megatron_samoe.convert.output_folder import require_new
from megatron_samoe.dist_checkpointing.global_tensors import write_checkpoint
from megatron_samoe.errors import CheckpointError, ConfigError
from tests.harness.pairs import first_by_day
from tests.harness.program import REPOSITORY, call, flags
from tests.harness.tiny import tiny_config
from tests.unit.convert.memory_source import new_source


def test_a_name_that_is_too_long_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be written: File name too long"):
        require_new(tmp_path / ("x" * 300))


def test_a_llama_without_heads_is_refused_in_words() -> None:
    with pytest.raises(ConfigError, match="num_attention_heads"):
        derived_model(LLAMA, {"num_attention_heads": 0, "hidden_size": 32})


def test_a_damaged_tokenizer_is_said_and_left_behind(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("junk")
    _, line = imported_tokenizer(DataConfig(tokenizer_type="ByteTokenizer"), tmp_path, tmp_path / "kept")
    assert "The folder's tokenizer cannot be used" in line


CONVERT = "megatron_samoe.cli.convert"
# The last moment: all is written, and gets its name now.
DIES_AT_RENAME = """
import os, signal, sys
from megatron_samoe.cli import convert
os.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
convert.main(sys.argv[1:])
"""


@pytest.mark.parametrize("target", first_by_day(["hf", "torch_dist", "native"]))
def test_killed_before_the_name_is_given(target: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "start", 7, new_source(tiny_config("moe", style="llama", moe_router_topk=2)))
    source = tmp_path / "start"
    if target == "native":
        assert call(CONVERT, *flags(load_dir=source, save_dir=tmp_path / "hf", to="hf")).returncode == 0
        source = tmp_path / "hf"
    new = tmp_path / "new"
    words = flags(load_dir=source, save_dir=new, to=target)
    killed = subprocess.run([sys.executable, "-c", DIES_AT_RENAME, *words], cwd=REPOSITORY, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    left = [p for p in (new.iterdir() if new.exists() else tmp_path.glob(".new*"))]
    assert left and all(p.name.startswith(".") for p in left)
    unread = call(CONVERT, *flags(load_dir=new, save_dir=tmp_path / "other"), "--dry-run")
    assert unread.returncode == 1 and "error: " in unread.stderr
    assert call(CONVERT, *words).returncode == 0
    assert not list(tmp_path.rglob(".*unfinished"))
