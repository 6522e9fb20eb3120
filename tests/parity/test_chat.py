"""Chat templates and conversations against transformers: prompts, ids, what travels by import and export, and greedy answers."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import megatron_samoe
from megatron_samoe.cli import generate
from megatron_samoe.config.data import DataConfig
from megatron_samoe.convert.hf.tokenizer_files import tokenizer_files
from megatron_samoe.datasets.chat_prompt import chat_prompt
from megatron_samoe.datasets.chat_template import chat_files
from megatron_samoe.datasets.tokenizer import Tokenizer, build_tokenizer
from megatron_samoe.datasets.train_tokenizer import train_sentencepiece
from megatron_samoe.errors import CheckpointError, ConfigError
from megatron_samoe.runtime.load import LoadedModel
from tests.harness.chat import CHATML, CONTEXT, CORPUS, TEMPLATES, chat_folder, chat_tokenizer
from tests.harness.serving import load_tiny, save_tiny, serving
from tests.parity.hf_models import converted, transformers

#: Whether transformers itself can keep a user's text from becoming control tokens.
SANITIZES = "sanitize_control_tokens" in transformers.PreTrainedTokenizerBase.apply_chat_template.__annotations__
QUESTION = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "What did Emma say?"}]


def both_of(folder: Path, template: str) -> tuple[Tokenizer, Any]:
    """Returns our tokenizer over the files that transformers' own writes, and that."""
    chat_tokenizer(template).save_pretrained(folder)
    ours = build_tokenizer("HuggingFaceTokenizer", str(folder / "tokenizer.json"))
    return ours, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=TEMPLATES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    return both_of(tmp_path_factory.mktemp("tokenizer"), TEMPLATES[request.param])


TEXT = st.text(
    st.sampled_from("\n\n  ab1é中🚀.\t<>|'\"&\U000f0000\U000f0001") | st.characters(codec="utf-8"), max_size=30
)
CHATS = st.lists(st.sampled_from(["system", "user", "assistant"]), min_size=1, max_size=5)


def answers(ours: Tokenizer, theirs: Any, messages: list[dict[str, str]], **options: Any) -> tuple[object, object]:
    """Returns both prompts as ids, or None for each that its template refuses."""
    found: list[object] = []
    for ask in (
        lambda: chat_prompt(ours, messages),
        lambda: theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **options),
    ):
        try:
            found.append(ask())
        except Exception as error:  # transformers passes on those of Jinja and of Python
            assert "Roles must alternate" in str(error)
            found.append(None)
    return found[0], found[1]


CONTROL = st.lists(
    TEXT | st.sampled_from(["<|im_end|>", "<|im_start|>", "</think>", "<think>", "<|endoftext|>"]), max_size=5
).map("".join)
CONTENTS = [
    pytest.param(TEXT, {}, id="text"),
    pytest.param(
        CONTROL,
        {"sanitize_control_tokens": True},
        marks=pytest.mark.skipif(not SANITIZES, reason="this transformers cannot keep control tokens out of a text"),
        id="control tokens",
    ),
]


@pytest.mark.parametrize(("content", "options"), CONTENTS)
@settings(deadline=None, max_examples=60)
@given(roles=CHATS, data=st.data())
def test_prompts_are_those_of_transformers(
    both: tuple[Tokenizer, Any], content: Any, options: dict[str, bool], roles: list[str], data: st.DataObject
) -> None:
    """Control tokens in a message stay text."""
    messages = [{"role": role, "content": data.draw(content)} for role in roles]
    ours, theirs = answers(*both, messages, **options)
    assert ours == theirs


def test_a_message_of_all_private_characters_is_refused(tmp_path: Path) -> None:
    ours, _ = both_of(tmp_path, CHATML)
    with pytest.raises(ConfigError, match="two of Unicode's private ones"):
        chat_prompt(ours, [{"role": "user", "content": "".join(map(chr, range(0xF0000, 0x110000)))}])


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sentencepiece_talks_as_its_exported_files_do(tmp_path: Path, kind: Any) -> None:
    model = train_sentencepiece(iter([CORPUS.read_text()[:150_000]]), kind, 700, str(tmp_path / "tok"))
    template = "{% for m in messages %}{{ bos_token + m.role + ': ' + m.content + eos_token }}{% endfor %}"
    data = DataConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(model))
    tokenizer_files(data).write(tmp_path, 128)
    (tmp_path / "chat_template.jinja").write_text(template)
    ours = build_tokenizer("SentencePieceTokenizer", str(model))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids, expected = answers(ours, theirs, QUESTION)
    assert ids == expected and ours.ends >= {theirs.eos_token_id}


def test_a_template_of_an_older_file_counts_too(tmp_path: Path) -> None:
    ours, _ = both_of(tmp_path, CHATML)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "chat_template.jinja").unlink()
    for template in (CHATML, [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
        older = build_tokenizer("HuggingFaceTokenizer", str(tmp_path / "tokenizer.json"))
        assert chat_prompt(older, QUESTION) == chat_prompt(ours, QUESTION)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_folder(tmp_path_factory.mktemp("chat") / "hf")


@pytest.fixture(scope="module")
def native(folder: Path) -> Path:
    return converted(folder, folder.parent / "native")


def test_what_came_with_a_model_goes_with_it(folder: Path, native: Path, tmp_path: Path) -> None:
    """Import, another import of the export, and an edit lose none of the files, and transformers reads them."""
    more = tmp_path / "more"
    shutil.copytree(folder, more)
    (more / "additional_chat_templates").mkdir()
    (more / "additional_chat_templates/tool_use.jinja").write_text("{{ tools }}")
    ours = converted(more, tmp_path / "native")
    shutil.rmtree(more)
    files = chat_files(converted(ours, tmp_path / "back", "--to", "hf"))
    assert {name: files[name] for name in chat_files(folder)} == chat_files(folder)
    assert files["additional_chat_templates/tool_use.jinja"] == b"{{ tools }}"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    expected = transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(QUESTION, tokenize=False)
    template = theirs.get_chat_template() if hasattr(theirs, "get_chat_template") else None
    assert theirs.apply_chat_template(QUESTION, tokenize=False, chat_template=template) == expected
    assert transformers.AutoConfig.from_pretrained(tmp_path / "back").eos_token_id == [2, 0]


def test_gguf_has_the_template_and_the_end_of_an_answer(native: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    fields = gguf.GGUFReader(converted(native, tmp_path / "gguf", "--to", "gguf") / "model.gguf").fields
    assert bytes(fields["tokenizer.chat_template"].parts[-1]).decode() == CHATML
    assert int(fields["tokenizer.ggml.eos_token_id"].parts[-1][0]) == 2


def greedy(folder: Path, messages: list[dict[str, str]], num_tokens: int) -> list[int]:
    """Returns the ids of transformers' answer, without the token that ended it."""
    model, words = (k.from_pretrained(folder) for k in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer))
    ids = words.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    ends = model.generation_config.eos_token_id
    out = model.generate(
        ids, max_new_tokens=num_tokens, do_sample=False, attention_mask=torch.ones_like(ids), pad_token_id=0
    )
    made = out[0, ids.shape[1] :].tolist()
    return made[:-1] if made[-1] in (ends if isinstance(ends, list) else [ends]) else made


@pytest.fixture(scope="module")
def loaded(native: Path) -> LoadedModel:
    torch.set_num_threads(1)
    return megatron_samoe.load(native).loaded


def test_the_openai_client_gets_transformers_answers(folder: Path, loaded: LoadedModel) -> None:
    openai = pytest.importorskip("openai")
    words = transformers.AutoTokenizer.from_pretrained(folder)
    with serving(loaded) as running:
        client = openai.OpenAI(base_url=f"{running.server.url}/v1", api_key="none", max_retries=0)
        ask = client.chat.completions.create
        first = ask(model="tiny", messages=QUESTION, max_completion_tokens=20, temperature=0)
        assert first.object == "chat.completion" and first.choices[0].finish_reason == "length"
        expected = greedy(folder, QUESTION, 20)
        assert first.choices[0].message.content == words.decode(expected) and first.usage.completion_tokens == 20
        # The answer as the client has it is the next question's history.
        history = [*QUESTION, first.choices[0].message, {"role": "user", "content": [{"type": "text", "text": "Why?"}]}]
        said = {"role": "assistant", "content": words.decode(expected)}
        plain = [*QUESTION, said, {"role": "user", "content": "Why?"}]
        pieces = ask(model="tiny", messages=history, max_tokens=20, temperature=0, stream=True)
        second = "".join(piece.choices[0].delta.content or "" for piece in pieces)
        assert second == words.decode(greedy(folder, plain, 20))
        told = ask(model="tiny", messages=QUESTION, max_tokens=3, temperature=0, logprobs=True, top_logprobs=2)
        entries = told.choices[0].logprobs.content
        assert [e.token for e in entries] == [words.decode([i]) for i in expected[:3]]
        ids = words.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
        logits = transformers.AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([ids])).logits[0, -1]
        best = logits.log_softmax(-1).topk(2).values.tolist()
        assert [t.logprob for t in entries[0].top_logprobs] == pytest.approx(best, rel=1e-4)
        tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
        with pytest.raises(
            openai.BadRequestError, match=r"tools is not supported: models here call no tools\. Leave it out"
        ):
            ask(model="tiny", messages=QUESTION, tools=tools)
        with pytest.raises(openai.BadRequestError, match=f"context has {CONTEXT} tokens"):
            ask(model="tiny", messages=[{"role": "user", "content": "why " * 600}])


def test_python_gives_transformers_answers_logits_and_loss(folder: Path, native: Path, tmp_path: Path) -> None:
    model = megatron_samoe.load(native)
    theirs, words = (k.from_pretrained(folder) for k in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer))
    assert model.chat(QUESTION, 20, temperature=0.0) == words.decode(greedy(folder, QUESTION, 20))
    assert model.chat("Why?", 9, temperature=0.0) == "".join(
        model.stream([{"role": "user", "content": "Why?"}], 9, temperature=0.0)
    )
    assert "a chat template" in repr(model.tokenizer)
    text = "Emma was very much surprised"
    ids = words(text, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = theirs(ids, labels=ids)
    torch.testing.assert_close(model.logits(text), expected.logits[0], rtol=1e-4, atol=1e-4)
    assert model.loss(text) == model.loss(ids) == pytest.approx(float(expected.loss), rel=1e-5)
    two = torch.stack([ids[0], ids[0].flip(0)])
    with torch.no_grad():
        assert model.loss(two) == pytest.approx(float(theirs(two, labels=two).loss), rel=1e-5)
    # What is in memory is saved, not what was loaded.
    model.loaded.model.global_parameters()["embedding.word.weight"].mul_(2.0)
    model.save_pretrained(tmp_path / "saved")
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(saved(ids).logits[0], model.logits(text), rtol=1e-4, atol=1e-4)
    assert chat_files(tmp_path / "saved") == chat_files(folder)
    with pytest.raises(CheckpointError, match="exists; nothing is overwritten"):
        model.save_pretrained(tmp_path / "saved")


def test_every_token_of_the_list_ends_an_answer(folder: Path, tmp_path: Path) -> None:
    """generation_config.json may name several, of which one comes early here."""
    end = greedy(folder, QUESTION, 8)[5]
    shutil.copytree(folder, tmp_path / "hf")
    path = tmp_path / "hf/generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [2, end]}))
    ours = converted(tmp_path / "hf", tmp_path / "native")
    expected = greedy(tmp_path / "hf", QUESTION, 40)
    assert len(expected) <= 5
    loaded = megatron_samoe.load(ours).loaded
    with serving(loaded) as running:
        body = {"messages": QUESTION, "temperature": 0, "max_tokens": 40}
        (choice,) = running.client.ask("POST", "/v1/chat/completions", body).json["choices"]
    assert choice["finish_reason"] == "stop" and choice["message"]["content"] == loaded.tokenizer.decode(expected)


def test_the_command_talks(
    folder: Path, native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = transformers.AutoTokenizer.from_pretrained(folder)
    errors: list[str] = []

    def run(*arguments: str, stdin: str = "", status: int = 0) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        fixed = ("--load", str(native), "--num-threads", "1", "--temperature", "0", "--max-new-tokens", "9")
        assert generate.main([*fixed, *arguments]) == status
        out, err = capsys.readouterr()
        errors.append(err)
        return err if status else out

    def answer(*messages: str, system: str | None = None) -> str:
        told = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(messages)]
        return words.decode(greedy(folder, [{"role": "system", "content": system}] * bool(system) + told, 9))

    assert run("--chat", "--prompt", "Why?", "--system", "Be kind.") == answer("Why?", system="Be kind.") + "\n"
    # Prompts of a file are conversations of their own; those one by one are one.
    said = ("Why?", "And then?")
    assert run("--chat", stdin="\n".join(said)) == "".join(f"{answer(text)}\n" for text in said)
    first = answer(said[0])
    lines = [first, answer(said[0], first, said[1])]
    assert run("--chat", "--interactive", stdin="\n".join(said)) == "".join(f"{line}\n" for line in lines)
    long = run("--chat", "--interactive", stdin=f"{said[0]}\n{'why ' * 300}\n{said[0]}\n")
    assert long == f"{first}\n{first}\n" and "error: prompt = " in errors[-1]
    assert errors[-1].endswith("may have 256 tokens, the model's context; the conversation begins anew\n")
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": QUESTION}) + "\n" + json.dumps({"prompt": "Why?"}) + "\n")
    told = [json.loads(line) for line in run("--chat", "--prompts-file", str(path), "--json").splitlines()]
    assert [line["messages"] for line in told] == [QUESTION, [{"role": "user", "content": "Why?"}]]
    assert [line["text"] for line in told] == [words.decode(greedy(folder, QUESTION, 9)), answer("Why?")]
    for line, part in (
        ({"prompt_ids": [1]}, "chats.jsonl, line 1: prompt_ids = (1,): are not for --chat"),
        ({"messages": ["x"]}, "chats.jsonl, line 1: messages = 'x': each must have"),
        ({"messages": []}, "must be a list such as"),
    ):
        path.write_text(json.dumps(line) + "\n")
        assert part in run("--chat", "--prompts-file", str(path), status=2)
    assert "--system = 'x': needs --chat" in run("--system", "x", "--prompt", "y", status=2)


def test_a_base_model_says_that_it_does_not_talk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_tiny(tmp_path)
    assert generate.main(["--load", str(path), "--chat", "--prompt", "Hello"]) == 2
    assert capsys.readouterr().err == (
        "error: --chat = True: the model has no chat template: it is a base model, which continues texts\n"
    )
    with serving(load_tiny(path)) as running:
        answer = running.client.ask("POST", "/v1/chat/completions", {"messages": QUESTION})
        assert answer.status == 400 and answer.json["error"]["code"] == "no_chat_template"
        assert answer.json["error"]["message"].startswith("The model 'tiny' has no chat template: it is a base model.")
        assert running.client.ask("GET", "/v1/models").json["data"][0]["chats"] is False
