"""The plug-in for Megatron-Core in use: what it imports, what it refuses, and the example, which learns a text."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_samoe.convert.megatron import MegatronReader
from megatron_samoe.errors import ConfigError, DataError
from tests.harness.datasets import write_dataset
from tests.harness.megatron_model import Layout, Model, built, start
from tests.harness.megatron_training import run_megatron
from tests.harness.pairs import first_by_day
from tests.harness.tables import table
from tests.unit.convert.memory_source import logits

ROOT = Path(__file__).parents[2]
EXAMPLE = "examples/megatron_core/pretrain_pool.py"
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]


def _refused(options: dict[str, Any], sharing: str, words: dict[str, Any]) -> str:
    try:
        built(Layout(options=options), Model(sharing=sharing, sharing_options=words))
    except ConfigError as error:
        return str(error)
    return "accepted"


#: Options of Megatron-Core's model, a way of sharing, its options, and what is said.
REFUSED: list[tuple[dict[str, Any], str, dict[str, Any], str]] = [
    *table(__file__)["refused"],
    ({"activation_func": torch.nn.functional.relu}, "tied", {}, "activation_func = 'relu': must be gated SiLU"),
]


def _all_refusals() -> list[str]:
    start(Layout())
    return [_refused(*case[:3]) for case in REFUSED]


def _refused_later() -> list[str]:
    """Returns what is said of a spec without experts, of a model that was built by another spec, and of early gradients."""
    start(Layout())
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    _, (model,), sharing = built(Layout(), Model(sharing="tied"))
    _, (other,), _ = built(Layout(), Model())
    wrong = (
        lambda: sharing.spec(get_gpt_layer_local_spec()),
        lambda: sharing.attach(other),
        lambda: sharing.finalize_model_grads([model]),
    )
    found = []
    for use in wrong:
        try:
            use()
        except ConfigError as error:
            found.append(str(error))
    return found


def test_wrong_use_is_one_sentence() -> None:
    found = run_megatron(_all_refusals, 1)[0]
    for (*_, expected), message in zip(REFUSED, found, strict=True):
        assert expected in message and "\n" not in message, message


def test_wrong_use_of_a_model_is_one_sentence() -> None:
    spec, model, gradients = run_megatron(_refused_later, 1)[0]
    assert "has no MoE layer: give num_experts" in spec and "build it by ExpertSharing.spec" in model
    assert "model = 'GPTModel': must be wrapped in Megatron-Core's DistributedDataParallel" in gradients


def test_without_megatron_core_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron.core", None)
    for name in [name for name in sys.modules if name.startswith("megatron_samoe.plugins.megatron_core")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(DataError, match=r"needs the package megatron: .*megatron-core"):
        importlib.import_module("megatron_samoe.plugins.megatron_core")


def _example(words: tuple[str, ...]) -> str:
    """Runs a program as torchrun's only rank; returns what it prints."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    sys.argv, said = [*words], io.StringIO()
    with contextlib.redirect_stdout(said):
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    return said.getvalue()


def _under_torchrun(ranks: int, words: tuple[str, ...]) -> str:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [*torchrun, "tests/harness/run_on_cpu.py", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


FOUR = ("--pipeline-model-parallel-size", "2", "--expert-model-parallel-size", "2", "--use-distributed-optimizer")
#: Ranks, and words of the example's command line.
EXAMPLES = [(1, ("--train-iters", "10")), (4, FOUR), (2, ("--expert-sharing", "none"))]


@pytest.mark.parametrize(("ranks", "words"), first_by_day(EXAMPLES))
def test_the_example_learns_a_text(ranks: int, words: tuple[str, ...], tmp_path: Path) -> None:
    """Bytes that repeat, by Megatron-Core's data set: the loss begins at that of a guess and falls."""
    write_dataset(tmp_path / "corpus", [[*b"one two three four " * 40, 256]] * 40)
    given = {"--train-iters": 20, "--seq-length": 32, "--data-path": tmp_path / "corpus", "--save": tmp_path / "saved"}
    words = (EXAMPLE, *(str(word) for pair in given.items() for word in pair), *words)
    said = run_megatron(_example, 1, words)[0] if ranks == 1 else _under_torchrun(ranks, words)
    losses = [float(loss) for loss in re.findall(r"^step \d+: loss ([\d.]+),", said, re.MULTILINE)]
    assert losses[0] == pytest.approx(np.log(257), abs=0.2) and losses[-1] < losses[0] - 1
    ids = torch.tensor(list(b"one two three four " * 2)[:33])
    ours = logits(MegatronReader(tmp_path / "saved"), tokens=ids[None, :-1])[:, :257]
    assert float(torch.nn.functional.cross_entropy(ours, ids[1:])) == pytest.approx(losses[-1], abs=0.5)
