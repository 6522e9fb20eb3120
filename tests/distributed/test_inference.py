"""A checkpoint of one layout gives the same next-token logits and text in any other; the serve program as processes of their own:
signals, exit statuses, messages, and models spread over ranks."""

from __future__ import annotations

import re
import signal
import socket
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_samoe.config import CheckpointConfig, DataConfig, PretrainConfig
from megatron_samoe.convert.opener import open_folder
from megatron_samoe.inference.kv_cache import PageTable, Span, make_batch, pages_for
from megatron_samoe.inference.rank_runner import RankRunner
from megatron_samoe.language_model import LanguageModel
from megatron_samoe.parallel_state import initialize_model_parallel
from megatron_samoe.runtime.load import LoadedModel, load_model
from megatron_samoe.training.checkpointing import save_run
from megatron_samoe.training.setup import build_setup, initial_state
from tests.harness.pairs import first_by_day
from tests.harness.program import ProgramRun, call, start
from tests.harness.ranks import run_ranks
from tests.harness.serving import Client, greedy_text, load_tiny, save_tiny, texts, wait_for
from tests.harness.tables import table
from tests.harness.tiny import tiny_config, with_layout

pytestmark = pytest.mark.distributed

TABLE = table(__file__)

PROMPT = [5, 17, 200, 3, 88]


def save(config: PretrainConfig) -> None:
    setup = build_setup(config, 257, initialize_model_parallel(config.parallel))
    save_run(setup, initial_state(setup))


def next_token_logits(loaded: LoadedModel, ids: list[int]) -> torch.Tensor:
    """Returns logits_V of the training model."""
    num_pages = pages_for(len(ids))
    runner = RankRunner(loaded, num_pages, "folded")
    pages = PageTable(1, num_pages, num_pages, runner.device)
    span = Span(pages.reserve(len(ids)), 0, len(ids))
    return runner.run(make_batch([span], ids, pages.table, [len(ids) - 1], runner.device))[0]


def run(folder: str, config: PretrainConfig) -> tuple[torch.Tensor, list[int], list[int]]:
    parallel = initialize_model_parallel(config.parallel)
    loaded = load_model(open_folder(folder), parallel, config.parallel)
    logits_V = next_token_logits(loaded, PROMPT)
    greedy = LanguageModel(loaded).generate_ids(PROMPT, 20, temperature=0.0)
    return logits_V, greedy, LanguageModel(loaded).generate_ids(PROMPT, 8, temperature=1.0, top_k=20, seed=3)


MODELS: dict[str, dict[str, Any]] = TABLE["models"]


@pytest.mark.parametrize("model", first_by_day(sorted(MODELS, key=("samoe", "pool").__contains__, reverse=True)))
def test_every_layout_generates_the_same(tmp_path: Path, model: str) -> None:
    options = {"layout": "moe", "style": "llama", "make_vocab_size_divisible_by": 8, **MODELS[model]}
    base = tiny_config(**options)
    base = replace(
        base,
        data=DataConfig(mock_data=True, tokenizer_type="ByteTokenizer"),
        checkpoint=CheckpointConfig(save=str(tmp_path)),
    )
    run_ranks(save, 2, with_layout(base, ep=2))
    expected = run_ranks(run, 1, str(tmp_path), with_layout(base))[0]
    for world_size, sizes in TABLE["layouts"]:
        for logits_V, greedy, sampled in run_ranks(run, world_size, str(tmp_path), with_layout(base, **sizes)):
            torch.testing.assert_close(logits_V, expected[0], rtol=1e-4, atol=1e-6)
            assert (greedy, sampled) == expected[1:]
    # The context has 16 places, and after the last one more token can be chosen.
    assert len(expected[1]) == 12 and expected[0].shape == (257,)


PROGRAM = "megatron_samoe.cli.serve"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("serve") / "tiny" / "checkpoints")


@contextmanager
def serve(checkpoints: Path, folder: Path, *flags: str, num_ranks: int = 1) -> Iterator[tuple[ProgramRun, Client]]:
    """Starts the program and gives it with a client, once it serves; the program is killed if it goes on at the end."""
    run = start(
        ["--load", str(checkpoints), "--port", "0", "--num-threads", "1", *flags], folder, num_ranks, program=PROGRAM
    )
    try:
        assert run.wait_until(lambda: " at http" in run.output()), run.output()
        address = re.search(r"serving tiny.* at http://([\d.]+):(\d+)", run.output())
        assert address is not None
        yield run, Client(address[1], int(address[2]))
    finally:
        for process in run.processes:
            process.kill()


@pytest.mark.parametrize("number", first_by_day([signal.SIGTERM, signal.SIGINT]))
def test_a_signal_lets_requests_end_and_leaves_with_0(
    checkpoints: Path, tmp_path: Path, number: signal.Signals
) -> None:
    with serve(checkpoints, tmp_path, "--drain-timeout", "60") as (run, client):
        expected = greedy_text(load_tiny(checkpoints), "Hello", 30)
        with ThreadPoolExecutor(12) as pool:
            answers = [pool.submit(client.complete, "Hello", max_tokens=30, temperature=0) for _ in range(12)]
            wait_for(lambda: client.metric("time_to_first_token_seconds_count") == 12)  # all are accepted
            run.signal(number)
            assert [texts(a.result()) for a in answers] == [[expected]] * 12
        assert "shutting down: " in run.succeed() and "Traceback" not in run.output()


def test_a_second_signal_ends_at_once(checkpoints: Path, tmp_path: Path) -> None:
    with serve(checkpoints, tmp_path, "--drain-timeout", "60") as (run, client):
        held = client.begin({"prompt": "x", "max_tokens": 63, "n": 16, "ignore_eos": True})
        run.signal(signal.SIGSTOP)  # the requests must not be complete before the second signal
        run.signal(signal.SIGTERM)
        run.signal(signal.SIGINT)
        run.signal(signal.SIGCONT)
        run.succeed(30)
        held.close()


@pytest.mark.parametrize("kind", first_by_day(["tensor", "pipeline", "expert"]))
def test_every_layout_answers_alike(checkpoints: Path, tmp_path: Path, kind: str) -> None:
    with serve(checkpoints, tmp_path, f"--{kind}-model-parallel-size", "2", num_ranks=2) as (run, client):
        prompts = ["Hello", "Another prompt", "x"]
        loaded = load_tiny(checkpoints)
        assert texts(client.complete(prompts, max_tokens=20, temperature=0)) == [
            greedy_text(loaded, p, 20) for p in prompts
        ]
        held = client.begin({"prompt": "x", "max_tokens": 63, "ignore_eos": True, "stop": ["\u00e9\u00e9"]})
        wait_for(lambda: client.metric("running_choices") == 1)
        # With a reset: after a plain end the answer, which takes less than a second here, would still be made.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        held.close()
        wait_for(lambda: client.metric('choices_total{end="cancelled"}') == 1)
        assert texts(client.complete("Hello", max_tokens=20, temperature=0, stream=True)) == [
            greedy_text(loaded, "Hello", 20)
        ]
        run.signal(signal.SIGTERM)  # as torchrun does: to all ranks
        run.succeed()


def test_models_beside_each_other(checkpoints: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "dense" / "seed-1", "dense")
    with serve(checkpoints, tmp_path / "out", "--beside", str(other), "--max-batch", "2") as (run, client):
        assert "serving tiny, dense/seed-1 at http" in run.output()
        for name, folder in (("tiny", checkpoints), ("dense/seed-1", other)):
            answer = client.complete("Hello", model=name, max_tokens=20, temperature=0)
            assert texts(answer) == [greedy_text(load_tiny(folder), "Hello", 20)]
        run.signal(signal.SIGTERM)
        run.succeed()


def test_the_other_ranks_leave_when_the_first_dies(checkpoints: Path, tmp_path: Path) -> None:
    with serve(checkpoints, tmp_path, "--tensor-model-parallel-size", "2", num_ranks=2) as (run, _):
        run.signal(signal.SIGKILL, rank=0)
        assert run.wait() == (-signal.SIGKILL, 1)
        assert "error: rank 1 cannot reach the rank that serves" in run.output() and "Traceback" not in run.output()


@pytest.mark.parametrize(("words", "said"), TABLE["refused"])
def test_what_cannot_be_served_is_said_in_a_sentence(words: str, said: str, checkpoints: Path) -> None:
    given = ["--load", str(checkpoints), "--host", "198.51.100.1", *words.replace("FOLDER", str(checkpoints)).split()]
    done = call(PROGRAM, *given)
    assert done.returncode in (1, 2) and re.search(said, done.stderr) and "Traceback" not in done.stderr, done


def test_several_models_are_not_spread_over_ranks(checkpoints: Path, tmp_path: Path) -> None:
    words = ["--load", str(checkpoints), "--beside", str(checkpoints), "--served-model-name", "a", "b", "--port", "0"]
    run = start([*words, "--tensor-model-parallel-size", "2"], tmp_path, 2, program=PROGRAM)
    assert "--beside = 'b': needs a server of one process; this has 2" in run.fail()
