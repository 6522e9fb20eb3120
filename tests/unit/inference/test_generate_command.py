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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


class Run:
    """Runs the program in this process."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
        self._folder, self._capsys, self._patch = folder, capsys, monkeypatch

    def __call__(self, *arguments: object, stdin: str = "", status: int = 0) -> str:
        self._patch.setattr(sys, "stdin", io.StringIO(stdin))
        words = ["--load", str(self._folder), "--num-threads", "1", *map(str, arguments)]
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


@pytest.mark.parametrize("serving", ["folded", "on-the-fly", "selected"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_every_way_and_precision(run: Run, serving: str, dtype: str) -> None:
    result = run.json("--prompt", "Emma was", *GREEDY, "--serving", serving, "--dtype", dtype)[0]
    assert result["finish_reason"] and result["ids"]
    if dtype == "fp32":
        assert result == run.json("--prompt", "Emma was", *GREEDY)[0]


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (("--prompt", "x" * 65), "", "error: prompt = '65 tokens': may have 64 tokens, the model's context"),
        (("--prompt", ""), "", "error: prompt = '': must hold at least one token"),
        ((), "fine\n" + "y" * 70 + "\n", "error: standard input, line 2: prompt = '70 tokens'"),
        ((), "\n \n", "error: standard input holds no prompt."),
        (("--prompt", "x", "--top-p", 0), "", "error: top_p = 0.0: must be above 0 and at most 1"),
        (("--prompt", "x", "--temperature", "nan"), "", "error: temperature = nan"),
        (("--prompt", "x", "--cache-experts", 1), "", "error: cache_experts = 1: must be 2 or more"),
        (("--prompt", "x", "--max-tokens", 16, "--max-new-tokens", 40), "", "error: max_new_tokens = 40: prompt and"),
        (("--prompts-file", "missing.txt"), "", "error: missing.txt cannot be read: No such file or directory."),
        (("--prompt", "x", "--num-threads", 0), "", "error: --num-threads = 0: must be 1 or more"),
    ],
)
def test_bad_input_is_one_paragraph(run: Run, arguments: tuple[object, ...], stdin: str, message: str) -> None:
    error = run(*arguments, stdin=stdin, status=1 if "standard input holds" in message or "cannot be" in message else 2)
    assert error.startswith(message) and len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt_ids": [3, 257]}', "line 1: prompt = 'token 257 at position 1': must be whole numbers from 0 to 256"),
        ('{"prompt_ids": [3, "a"]}', "line 1: prompt = \"token 'a' at position 1\""),
        ('{"prompt_ids": []}', "line 1: prompt = '': must hold at least one token"),
        ('{"text": "x"}', 'line 1: must be a JSON object with a text "prompt"'),
        ("not JSON", "but is not JSON"),
    ],
)
def test_bad_lines_are_named(run: Run, tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(line + "\n")
    status = 1 if "JSON" in message else 2
    assert message in run("--prompts-file", path, status=status)


def test_a_wrong_prompt_does_not_end_a_conversation(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    out = run("--interactive", *GREEDY, stdin="x" * 70 + "\nEmma was\n")
    assert out == run("--prompt", "Emma was", *GREEDY)


def test_ways_that_a_checkpoint_lacks_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny(tmp_path, "moe")
    words = ["--load", str(folder), "--prompt", "x", "--num-threads", "1", "--serving", "on-the-fly"]
    assert generate.main(words) == 2
    assert "a moe model without a shared pool of experts; its only way is folded" in capsys.readouterr().err


def test_text_that_is_no_utf8_is_refused(run: Run, tmp_path: Path) -> None:
    message = "must be UTF-8 text, and is not at character 4"
    assert message in run("--prompt", "bad \udcff", status=2)
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "bad \\ud800"}\n')
    said = run("--prompts-file", path, status=1)
    assert f"{path}, line 1: must be" in said and "holds half of a character" in said


def test_prompts_one_by_one_have_the_seeds_of_prompts_together(run: Run) -> None:
    hot = ("--temperature", 100, "--top-k", 0, "--max-new-tokens", 16, "--ignore-eod", "--seed", 7)
    lines = "Emma was\nx\nEmma was\n"
    alone = run.json("--interactive", *hot, stdin=lines)
    assert alone == run.json(*hot, stdin=lines) and alone[0]["ids"] != alone[2]["ids"]


def test_a_layout_that_does_not_fill_the_ranks_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")  # as torchrun does; nothing waits for the other ranks
    message = "error: layout = 'tp 1, pp 1, ep 3, etp 1': must divide the 4 processes that were started"
    assert run("--prompt", "x", "--expert-model-parallel-size", 3, status=2).startswith(message)
