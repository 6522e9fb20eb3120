"""The page in a headless Chromium: a user with a mouse, with keys alone, on a phone, and with what goes wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_samoe.cli import convert
from megatron_samoe.language_model import LanguageModel
from megatron_samoe.runtime.load import LoadedModel
from tests.harness.browser import Browser, browser, needs_browser
from tests.harness.chat import chat_folder
from tests.harness.serving import RunningServer, SlowEngine, greedy_text, load_tiny, save_tiny, serving, wait_for

pytestmark = [needs_browser, pytest.mark.night]


#: A prompt whose most probable continuation goes on to the end of the context.
LONG = "H"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    torch.set_num_threads(1)
    return load_tiny(save_tiny(tmp_path_factory.mktemp("model"), seq_length=256))


@pytest.fixture(scope="module")
def page() -> Iterator[Browser]:
    with browser() as page:
        yield page


@pytest.fixture
def running(loaded: LoadedModel, page: Browser) -> Iterator[RunningServer]:
    with serving(loaded, engine=SlowEngine(loaded, max_batch=2), drain_timeout_s=1) as running:
        page.resize(1100, 800)
        page.open(f"{running.server.url}/")
        page.wait_for(lambda: page.text("model") == "tiny")
        yield running


def complete(page: Browser, prompt: str, **fields: str) -> None:
    for name, value in {"prompt": prompt, **fields}.items():
        page.set(name, value)
    page.click("go")


def test_a_model_that_refuses_says_so_and_shows_no_older_answer(
    page: Browser, loaded: LoadedModel, tmp_path: Path
) -> None:
    short = load_tiny(save_tiny(tmp_path, "moe", seq_length=32))
    with serving(loaded, beside={"short": short}, show_experts=True) as running:
        page.open(f"{running.server.url}/")
        page.wait_for(lambda: page.text("model") == "2 models")
        headings = [page.text(f"heading-{number}") for number in (0, 1)]
        assert headings == ["tiny context of 256 tokens", "short context of 32 tokens"]
        assert page.run("return document.getElementById('talk').offsetHeight") == 0, "no model here talks"
        sent = "window.asked = []; const f = window.fetch; window.fetch = (u, o) => { window.asked.push([u, o]); return f(u, o); }"
        page.run(sent)
        complete(page, "Hello", max_tokens="8")
        page.wait_for(lambda: "tokens in" in page.text("state") and "tokens in" in page.text("state-1"))
        asked = "return window.asked.filter(([u]) => u === '/v1/completions').map(([u, o]) => JSON.parse(o.body).seed)"
        seeds = page.run(asked)
        assert len(seeds) == 2 and seeds[0] == seeds[1] and isinstance(seeds[0], int), "one seed for both"
        page.click("show")
        page.wait_for(lambda: page.run("return document.querySelectorAll('#strips-1 tr').length") > 1)
        complete(page, "Hello", max_tokens="100")
        page.wait_for(lambda: "tokens in" in page.text("state") and page.text("state-1").startswith("no answer"))
        assert page.text("error").startswith("short: ") and "context has 32 tokens" in page.text("error")
        assert page.text("text").startswith("Hello") and page.text("text-1") == ""
        hidden = [page.run(f"return document.getElementById('{n}').hidden") for n in ("experts", "experts-1")]
        assert hidden == [True, True], "strips of other texts"
    page.complaints()


def test_a_chat_goes_on_with_what_was_said(page: Browser, loaded: LoadedModel, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    assert not convert.main(["--load-dir", str(chat_folder(tmp_path / "hf")), "--save-dir", str(tmp_path / "native")])
    talks = LanguageModel(load_tiny(tmp_path / "native"))
    with serving(talks.loaded, engine=SlowEngine(talks.loaded, max_batch=2), beside={"base": loaded}) as running:
        page.resize(1100, 800)
        page.open(f"{running.server.url}/")
        page.wait_for(lambda: page.text("title") == "Chat with")
        assert page.run("return document.getElementById('heading-1').closest('section').hidden"), (
            "a base model does not talk"
        )
        told: list[dict[str, str]] = [{"role": "system", "content": "Be <b>kind</b>."}]
        page.set("system", told[0]["content"])
        for said in ("Why?", "And then?"):
            complete(page, said, max_tokens="9", temperature="0")
            page.wait_for(lambda: "tokens in" in page.text("state"))
            told += [{"role": "user", "content": said}]
            told += [{"role": "assistant", "content": talks.chat(told, 9, temperature=0.0)}]
            page.wait_for(lambda: page.run("return document.getElementById('prompt').value") == "")
        shown = "return [...document.querySelectorAll('#text .turn')].map(e => [e.dataset.role, e.textContent])"
        assert page.run(shown) == [[turn["role"], turn["content"]] for turn in told]
        for width in (320, 1100):
            page.resize(width, 700)
            assert page.run("return document.documentElement.scrollWidth") <= width
        # Where the model says much: rounding decides what it says.
        answers = {
            said: talks.chat([*told, {"role": "user", "content": said}], 90, temperature=0.0)
            for said in ("Yes", "More", "Emma")
        }
        complete(page, max(answers, key=lambda said: len(answers[said])), max_tokens="90", temperature="0")
        page.wait_for(lambda: page.text("state") == "writing")
        page.click("halt")
        page.wait_for(lambda: page.text("state") == "stopped")
        page.click("on")
        assert page.text("text") == "" and page.complaints() == []
        complete(page, "Why?", max_tokens="9", temperature="0")
        page.wait_for(lambda: "tokens in" in page.text("state"))
        begun = [told[0], {"role": "user", "content": "Why?"}]
        assert page.run(shown)[-1] == ["assistant", talks.chat(begun, 9, temperature=0.0)]
        page.run("const v = document.getElementById('view'); v.value = 'text'; v.dispatchEvent(new Event('change'))")
        assert page.text("title") == "Completions of" and page.text("text") == ""
        complete(page, "Hello", max_tokens="5", temperature="0")
        page.wait_for(lambda: "tokens in" in page.text("state") and "tokens in" in page.text("state-1"))
        assert page.text("text") == "Hello" + greedy_text(talks.loaded, "Hello", 5)
        assert page.complaints() == []


def test_keys_are_enough(page: Browser, running: RunningServer) -> None:
    page.run("document.getElementById('prompt').focus()")
    page.press(LONG)
    order = []
    for _ in range(8):
        page.press("tab")
        order.append(page.focused())
    assert order == ["max_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed", "SUMMARY", "go"]
    page.set("max_tokens", "200")
    page.set("temperature", "0")
    page.run("document.getElementById('go').focus()")
    page.press("enter")
    page.wait_for(lambda: page.text("state") == "writing")
    assert page.focused() == "halt"
    page.press("space")
    page.wait_for(lambda: page.text("state") == "stopped")
    assert page.focused() == "go"
    wait_for(lambda: running.client.metric('choices_total{end="cancelled"}') == 1)


def test_refusals_leave_the_text_and_a_server_that_ends_is_said(page: Browser, running: RunningServer) -> None:
    complete(page, "Hello", max_tokens="5")
    page.wait_for(lambda: "tokens in" in page.text("state"))
    before = page.text("text")
    complete(page, "x" * 300)
    page.wait_for(lambda: "context has 256 tokens" in page.text("error"))
    assert page.text("text") == before and page.text("state") == ""
    complete(page, LONG, max_tokens="240", temperature="0")
    page.wait_for(lambda: page.text("state") == "writing" and page.text("error") == "")
    running.server.end()
    page.wait_for(lambda: "shutting down" in page.text("error"))
    assert running.join() == 0
    page.click("go")
    page.wait_for(lambda: "cannot be reached" in page.text("error"))
    page.complaints()


def test_the_access_token_is_asked_for(page: Browser, loaded: LoadedModel) -> None:
    with serving(loaded, api_key="secret") as running:
        page.open(f"{running.server.url}/")
        page.wait_for(lambda: "access token is missing" in page.text("error"))
        assert page.run("return document.querySelector('details').open")
        complete(page, "Hello", max_tokens="3", key="wrong")
        page.wait_for(lambda: "access token is wrong" in page.text("error"))
        complete(page, "Hello", max_tokens="3", key="secret")
        page.wait_for(lambda: "tokens in" in page.text("state"))
        assert page.text("model") == "tiny" and page.text("error") == ""
    page.complaints()
