"""The commands that `init --text` prints, typed as they stand: from any plain text to a model that answers."""

from __future__ import annotations

import json
import re
import shlex
import signal
import urllib.request
from pathlib import Path

import pytest

from megatron_samoe.cli.command import module_of
from megatron_samoe.cli.init import main
from megatron_samoe.cli.quickstart import NOVELS
from tests.harness.pairs import first_by_day
from tests.harness.program import ProgramRun, start

#: The run is as long and the model as deep as a test can wait for; all else is as the project has it.
SHORT = ["--train-iters", "3", "--num-layers", "2", "--eval-iters", "1"]


def ask(server: ProgramRun, prompt: str) -> str:
    def address() -> re.Match[str] | None:
        return re.search(r"serving first at (\S+)", server.output())

    assert server.wait_until(lambda: address() is not None), server.output()
    body = json.dumps({"prompt": prompt, "max_tokens": 4}).encode()
    request = urllib.request.Request(f"{address()[1]}/v1/completions", body, {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request))["choices"][0]["text"]


@pytest.mark.parametrize("between", first_by_day(["\n", " "]), ids=["a novel", "a text of one line"])
def test_from_a_text_to_a_served_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, between: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my text.txt").write_text(between.join(NOVELS.read_text(encoding="utf-8")[:150_000].splitlines()))
    assert main(["first", "--text", "my text.txt"]) == 0
    _, _, printed = capsys.readouterr().out.partition("\n\ncd first\n")
    in_config = re.findall(r"^#   (.*)", Path("first/config.yaml").read_text(), re.MULTILINE)
    assert in_config == printed.splitlines()
    (several,) = re.findall(r"^# On two ranks: (.*)", Path("first/config.yaml").read_text(), re.MULTILINE)
    commands = [shlex.split(line)[1:] for line in printed.replace("\\\n", "").splitlines()]
    assert [words[0] for words in commands] == ["train-tokenizer", "preprocess", "pretrain", "generate", "serve"]
    said = {}
    for name, *words in commands:
        words += {"pretrain": SHORT, "serve": ["--port", "0"], "generate": ["--max-new-tokens", "4"]}.get(name, [])
        run = start(words, tmp_path / name, cwd=tmp_path / "first", program=module_of(name))
        if name == "serve":
            try:
                assert ask(run, "It was")
            finally:
                run.signal(signal.SIGTERM)
        said[name] = run.succeed(120)
    words = shlex.split(several.partition(" pretrain ")[2]) + SHORT + ["--train-iters", "4"]
    start(words, tmp_path / "several", num_ranks=2, cwd=tmp_path / "first").succeed(120)
    assert "--split" not in said["preprocess"], "there are documents enough"
    assert "validation loss at iteration 3" in said["pretrain"] and said["generate"].strip()


def test_a_text_that_is_missing_or_too_short_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, reason in (("", "has 0 bytes"), (None, "--text '"), (None, "matches no file")):
        if text is not None:
            (tmp_path / "text.txt").write_text(text)
        assert main([str(tmp_path / "new"), "--text", str(tmp_path / "text.txt")]) != 0
        assert reason in capsys.readouterr().err and not (tmp_path / "new").exists()
        (tmp_path / "text.txt").unlink(missing_ok=True)
