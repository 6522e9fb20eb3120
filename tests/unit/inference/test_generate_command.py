"""`generate.py` as users drive it: where prompts come from, how tokens are chosen, what is printed, bad input."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_samoe.cli import generate
from megatron_samoe.language_model import LanguageModel
from tests.harness.sampling import assert_drawn_from, their_probabilities
from tests.harness.serving import load_tiny, save_tiny
from tests.harness.tables import table

TABLE = table(__file__, tuples=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


class Run:
    """Runs the program in this process."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
        self.folder, self._capsys, self._patch = folder, capsys, monkeypatch

    def __call__(self, *arguments: object, stdin: str = "", status: int = 0) -> str:
        self._patch.setattr(sys, "stdin", io.StringIO(stdin))
        words = ["--load", str(self.folder), "--num-threads", "1", *map(str, arguments)]
        assert generate.main(words) == status
        out, err = self._capsys.readouterr()
        return out if status == 0 else err

    def json(self, *arguments: object, stdin: str = "") -> list[dict[str, Any]]:
        return [json.loads(line) for line in self(*arguments, "--json", stdin=stdin).splitlines()]


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(folder, capsys, monkeypatch)


GREEDY = ("--temperature", 0, "--max-new-tokens", 12)


def test_prompts_come_from_the_command_a_file_standard_input_or_one_by_one(run: Run, tmp_path: Path) -> None:
    prompts = ["Emma was", "a bank", "It is"]
    alone = [run("--prompt", prompt, *GREEDY) for prompt in prompts]
    assert all(text.startswith(prompt) and text.endswith("\n") for text, prompt in zip(alone, prompts, strict=True))
    lines = "\n".join(prompts) + "\n\n"
    (tmp_path / "prompts.txt").write_text(lines)
    expected = "".join(alone)
    assert run("--prompts-file", tmp_path / "prompts.txt", *GREEDY) == expected
    assert run("--prompts-file", "-", *GREEDY, stdin=lines) == expected
    assert run(*GREEDY, stdin=lines) == expected
    assert run("--interactive", *GREEDY, stdin=lines) == expected
    # Two places for three prompts, and pieces or whole texts: the same output in the same order.
    assert run(*GREEDY, "--max-batch", 2, "--no-stream", stdin=lines) == expected


def test_json_lines_carry_prompts_ids_and_reasons(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "two\\nlines"}\n{"prompt_ids": [69, 109]}\n')
    first, second = run.json("--prompts-file", path, *GREEDY)
    assert first["prompt"] == "two\nlines" and first["finish_reason"] == "length" and len(first["ids"]) == 12
    assert second["prompt_ids"] == [69, 109]
    assert second["ids"] == run.json("--prompt", "Em", *GREEDY)[0]["ids"]
    assert bytes(i for i in first["ids"] if i < 256).decode(errors="replace") == first["text"]


def test_streaming_prints_pieces_as_they_come(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Flushes(io.StringIO):
        num = 0

        def flush(self) -> None:
            self.num += 1

    streams = {}
    for name, flag in (("stream", ()), ("whole", ("--no-stream",))):
        streams[name] = Flushes()
        monkeypatch.setattr(sys, "stdout", streams[name])
        run("--prompt", "Emma was", *GREEDY, *flag)
    assert streams["stream"].getvalue() == streams["whole"].getvalue()
    assert streams["whole"].num == 1 and streams["stream"].num > 5


def test_sampling_options_count(run: Run, folder: Path) -> None:
    """Equal prompts of a file, with the seeds that follow each other, are independent draws."""
    prompt, ids = "Emma was", list(b"Emma was")
    logits_V = LanguageModel(load_tiny(folder)).logits(ids)[-1].numpy()
    # The tiny model's own choices are almost certain, so its temperatures are high.
    plain: dict[str, Any] = {"temperature": 9.0, "top_k": 0}
    cut: dict[str, Any] = {"temperature": 7.0, "top_k": 40, "top_p": 0.9, "repetition_penalty": 3.0}
    for given in (plain, cut):
        flags = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
        drawn = run.json("--max-new-tokens", 1, "--max-batch", 100, *flags, stdin=f"{prompt}\n" * 250)
        assert_drawn_from([(their_probabilities(logits_V, ids, **given), [result["ids"][0] for result in drawn])])
    long = ("--prompt", prompt, "--max-new-tokens", 16, "--ignore-eod")
    one = ("--temperature", 9, "--top-k", 0, "--seed", 2)
    assert run.json(*long, *one) == run.json(*long, *one)
    assert len(set(run.json(*long, "--temperature", 0, "--repetition-penalty", 100)[0]["ids"])) == 16


def test_stop_texts_end_the_result(run: Run) -> None:
    whole = run.json("--prompt", "Emma was", *GREEDY)[0]["text"]
    stop = whole[3:5]
    result = run.json("--prompt", "Emma was", *GREEDY, "--stop", "never so", stop)[0]
    assert result["finish_reason"] == "stop" and result["text"] == whole[: whole.index(stop)]


@pytest.mark.parametrize(
    ("serving", "dtype"), [("folded", "fp32"), ("on-the-fly", "bf16"), ("selected", "int8"), ("on-the-fly", "fp32")]
)
def test_every_way_and_precision(run: Run, serving: str, dtype: str) -> None:
    result = run.json("--prompt", "Emma was", *GREEDY, "--serving", serving, "--dtype", dtype)[0]
    assert result["finish_reason"] and result["ids"]
    if dtype == "fp32":
        assert result == run.json("--prompt", "Emma was", *GREEDY)[0]


@pytest.mark.parametrize(("words", "stdin", "prompts", "status", "said"), TABLE["refused"])
def test_bad_input_is_one_paragraph(
    run: Run, tmp_path: Path, words: list[str], stdin: str, prompts: str, status: int, said: str
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(prompts)
    error = run(*(words or ["--prompts-file", path] * bool(prompts)), stdin=stdin, status=status)
    assert error.startswith("error: ") and said.format(path) in error and len(error.strip().splitlines()) == 1


def test_a_wrong_prompt_does_not_end_a_conversation(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    out = run("--interactive", *GREEDY, stdin="x" * 70 + "\nEmma was\n")
    assert out == run("--prompt", "Emma was", *GREEDY)


def test_prompts_one_by_one_have_the_seeds_of_prompts_together(run: Run) -> None:
    hot = ("--temperature", 100, "--top-k", 0, "--max-new-tokens", 16, "--ignore-eod", "--seed", 7)
    lines = "Emma was\nx\nEmma was\n"
    alone = run.json("--interactive", *hot, stdin=lines)
    assert alone == run.json(*hot, stdin=lines) and alone[0]["ids"] != alone[2]["ids"]


def test_a_layout_that_does_not_fill_the_ranks_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")  # as torchrun does; nothing waits for the other ranks
    message = "error: layout = 'tp 1, pp 1, ep 3, etp 1': must divide the 4 processes that were started"
    assert run("--prompt", "x", "--expert-model-parallel-size", 3, status=2).startswith(message)
