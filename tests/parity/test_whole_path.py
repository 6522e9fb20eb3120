"""The whole path of docs/finetuning.md, by the page's own commands, on models of the quickstart: tuned by TRL and peft, back, served,
and in other programs. Each gives the greedy texts that transformers has of the tuned folder.
"""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_samoe.cli import quickstart
from megatron_samoe.cli.command import module_of
from tests.harness import other_programs
from tests.harness.program import REPOSITORY, ProgramRun, start

pytestmark = [pytest.mark.parity, pytest.mark.night]
PAGE = (REPOSITORY / "docs/finetuning.md").read_text()
#: Lines of the page up to the tuned model, and the exports of that by their folders.
COMMANDS = re.findall(r"^    ((?:megatron-samoe|python) .*)$", PAGE, re.MULTILINE)
EXPORTS = {line.split("--save-dir ")[1].split()[0]: line for line in COMMANDS if "--load-dir tuned-native" in line}
LIKE_MIXTRAL = ["--position-embedding-type", "rope", "--swiglu", "--normalization", "RMSNorm", "--disable-bias-linear"]
MODELS = {
    "moe": quickstart.MODELS["moe"],
    "moe like Mixtral": [*quickstart.MODELS["moe"], *LIKE_MIXTRAL],
    "pool like Mixtral": [*quickstart.MODELS["samoe"], *LIKE_MIXTRAL],
}
CONTEXT = 128
QUESTION = "Which book is this from? "
WORDS = quickstart.NOVELS.read_text(encoding="utf-8").split()
CHATS = [
    *([{"role": "user", "content": QUESTION + " ".join(WORDS[i : i + 30])}] for i in (5_000, 290_000)),
    [
        {"role": "user", "content": "Who is Emma?"},
        {"role": "assistant", "content": "A friend."},
        {"role": "user", "content": "Why?"},
    ],
]
TEXTS = ["It was", "Emma said that", "Mr. Knightley, who had"]


@dataclass
class Walked:
    """A model at the end of the path: its folder, what it is, and transformers' answers of the tuned folder."""

    folder: Path
    model: str
    expected: list[str]

    def command(self, line: str, *more: str) -> ProgramRun:
        """Starts a line of the page, in the folder."""
        return command(self.folder, line, *more)


def command(folder: Path, line: str, *more: str) -> ProgramRun:
    _, name, *words = shlex.split(line, comments=True)
    return start([*words, *more], folder / "out", cwd=folder, program=module_of(name))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Returns the flags that name the quickstart's data."""
    return quickstart.prepare_data(tmp_path_factory.mktemp("quickstart"))


@pytest.fixture(scope="module", params=MODELS)
def walked(request: pytest.FixtureRequest, data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Walked:
    pytest.importorskip("trl", reason="TRL and peft are not installed (extra finetune)")
    folder = tmp_path_factory.mktemp("path")
    run = ["--run-dir", "runs/quickstart/moe", "--num-threads", "1", "--train-iters", "40"]
    words = ["--config", str(quickstart.CONFIG), *MODELS[request.param], *data, *run]
    start(words, folder / "out", cwd=folder).succeed(900)
    export, tune, back = (line for line in COMMANDS if "tuned-native" not in line or "--load-dir tuned " in line)
    command(folder, export).succeed(300)
    _, script, *words = shlex.split(tune)
    words = [sys.executable, str(REPOSITORY / script), *words, "--steps", "20", "--questions", "8", "--lr", "1e-3"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = (float(loss) for loss in re.findall(r"(?:before|after): loss ([\d.]+)", done.stdout))
    assert after < before - 1
    command(folder, back).succeed(300)
    found = Walked(folder, request.param, of_transformers(folder / "tuned"))
    assert len(set(found.expected)) > 2, "texts that are all alike show little"
    return found


def of_transformers(folder: Path) -> list[str]:
    """Returns the greedy answers of the tuned folder's own class."""
    import transformers

    kinds = (transformers.AutoModelForCausalLM, transformers.AutoTokenizer)
    model, tokenizer = (kind.from_pretrained(folder, trust_remote_code=True) for kind in kinds)
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in CHATS]
    found = []
    for prompt in [*prompts, *TEXTS]:
        given = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        given = {name: given[name] for name in ("input_ids", "attention_mask")}
        ids = model.generate(**given, max_new_tokens=other_programs.TOKENS, do_sample=False)[0].tolist()
        ids = ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids
        # A tokenizer of SentencePiece's leaves out the space at the start of a text, which an answer is not.
        head = tokenizer.decode(given["input_ids"][0])
        found.append(tokenizer.decode(ids).removeprefix(head))
    return found


def test_the_openai_client_gets_them_from_the_server(walked: Walked) -> None:
    openai = pytest.importorskip("openai", reason="the package openai is not installed")
    (line,) = (line for line in COMMANDS if line.startswith("megatron-samoe serve"))
    server = walked.command(line, "--port", "0", "--num-threads", "1")
    try:
        address: Sequence[str] = []

        def is_up() -> bool:
            address[:] = re.findall(r"serving \S+ at (\S+)", server.output())  # type: ignore[index]
            return bool(address)

        assert server.wait_until(is_up, 300), server.output()
        client = openai.OpenAI(base_url=f"{address[0]}/v1", api_key="none", max_retries=0)
        name = client.models.list().data[0].id
        greedy: dict[str, Any] = {"model": name, "max_tokens": other_programs.TOKENS, "temperature": 0.0}
        chats = [client.chat.completions.create(messages=chat, **greedy).choices[0].message.content for chat in CHATS]
        texts = [client.completions.create(prompt=text, **greedy).choices[0].text for text in TEXTS]
    finally:
        server.signal(signal.SIGTERM)
    assert chats + texts == walked.expected


@pytest.mark.skipif(other_programs.LLAMA_PYTHON is None, reason=other_programs.NO_LLAMA)
def test_llama_cpp_gives_them(walked: Walked) -> None:
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    export = walked.command(EXPORTS["tuned-gguf"])
    if walked.model == "moe":  # of GPT-2's parts, which the page says
        assert " ".join(LIKE_MIXTRAL) in PAGE
        said = export.fail(300)
        assert "the nearest is mixtral" in said and all(word in said for word in LIKE_MIXTRAL), said
        return
    export.succeed(300)
    found = other_programs.from_llama_cpp(walked.folder / "tuned-gguf/model.gguf", chats=CHATS, texts=TEXTS)
    assert found == walked.expected


@pytest.mark.skipif(other_programs.VLLM_PYTHON is None, reason=other_programs.NO_VLLM)
@pytest.mark.parametrize("way", ["plug-in", "stock"])
def test_vllm_gives_them(way: str, walked: Walked) -> None:
    """Our class as it is, by the plug-in; and vLLM's own Mixtral without that, for which a pool is folded."""
    line, folder = EXPORTS["tuned-hf"], walked.folder / "tuned-hf"
    if way == "stock":
        if walked.model == "moe":
            pytest.skip("no stock class is a MoE of GPT-2's parts")
        folder = walked.folder / "stock"
        fold = " --fold" if walked.model.startswith("pool") else ""
        line = line.replace("tuned-hf", "stock", 1).partition(" --hf-model-type")[0] + fold
    walked.command(line).succeed(300)
    found = other_programs.from_vllm(folder, CONTEXT, plug_in=way == "plug-in", chats=CHATS, texts=TEXTS)
    assert found == walked.expected
