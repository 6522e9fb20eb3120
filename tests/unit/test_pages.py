"""The pages that users open, in a real browser: a server's, of two models, and a report."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from megatron_samoe.cli import report
from megatron_samoe.runtime.load import LoadedModel
from tests.harness.browser import Browser, browser, needs_browser
from tests.harness.serving import RunningServer, SlowEngine, greedy_text, load_tiny, save_tiny, serving, wait_for

PROMPT = "Hello <b>there</b>"
#: Writes down all that the texts show, which may come and go between two looks from outside.
RECORD = """
window.shown = {"text": [], "text-1": []};
for (const [name, texts] of Object.entries(window.shown)) {
  const element = document.getElementById(name);
  new MutationObserver(() => texts.push(element.textContent)).observe(element, {childList: true, subtree: true});
}"""


@needs_browser
def test_a_user_tries_two_models_and_opens_a_report(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    folders = {name: save_tiny(tmp_path / name / "checkpoints", name, seq_length=256) for name in ("samoe", "dense")}
    samoe, dense = (load_tiny(folder) for folder in folders.values())
    slow, beside = SlowEngine(samoe, max_batch=2), {"dense": SlowEngine(dense, max_batch=2)}
    with browser() as page:
        with serving(samoe, engine=slow, show_experts=True, beside=beside, drain_timeout_s=1) as running:
            page.open(f"{running.server.url}/")
            page.wait_for(lambda: page.text("model") == "2 models")
            see_texts_stream(page, (samoe, dense))
            see_experts(page, samoe)
            go_on_with_the_other_model_and_stop(page, running)
            policy = running.client.ask("GET", "/").headers["content-security-policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy
        open_report(page, tmp_path)


def see_texts_stream(page: Browser, models: tuple[LoadedModel, LoadedModel]) -> None:
    """Each model's text comes piece by piece, whatever it looks like, beside the other's."""
    for name, value in {"prompt": PROMPT, "max_tokens": "30", "temperature": "0"}.items():
        page.set(name, value)
    page.run(RECORD)
    page.press("control", "enter")
    page.wait_for(lambda: "tokens in" in page.text("state") and "tokens in" in page.text("state-1"))
    for name, model in zip(("text", "text-1"), models, strict=True):
        whole = PROMPT + greedy_text(model, PROMPT, 30)
        shown = list(dict.fromkeys(page.run("return window.shown[arguments[0]]", name)))
        assert shown[-1] == whole and len(shown) > 3 and all(whole.startswith(text) for text in shown), name
    tops = "return ['text', 'text-1'].map(e => document.getElementById(e).getBoundingClientRect().top)"
    page.resize(1100, 800)
    assert len(set(page.run(tops))) == 1, "side by side"
    page.resize(380, 700)
    assert len(set(page.run(tops))) == 2 and page.run("return document.documentElement.scrollWidth") <= 380
    loads = page.run("return performance.getEntriesByType('resource').map(e => new URL(e.name).host)")
    assert set(loads) == {page.run("return location.host")} and page.complaints() == []


def see_experts(page: Browser, model: LoadedModel) -> None:
    """The model that has experts shows a strip for each layer."""
    page.click("show")
    page.wait_for(lambda: page.run("return document.querySelectorAll('#strips tr').length") > 1)
    assert page.run("return document.querySelectorAll('#strips tr').length") == 1 + len(model.model.moe_layers())
    assert page.run("return document.querySelectorAll('#strips-1 tr').length") == 0


def go_on_with_the_other_model_and_stop(page: Browser, running: RunningServer) -> None:
    """The second model's text becomes the prompt of both, and what they write of it is stopped."""
    page.set("max_tokens", "999")
    page.click("on-1")
    left = page.run("return document.getElementById('max_tokens').value")
    assert int(left) == 256 - len(PROMPT.encode()) - 30, "no more than the context has left"
    prompt = page.run("return document.getElementById('prompt').value")
    assert page.focused() == "prompt" and prompt.startswith(PROMPT) and len(prompt) > len(PROMPT)
    page.set("max_tokens", "180")
    page.click("go")
    page.wait_for(lambda: page.text("state") == "writing" and page.focused() == "halt")
    page.press("escape")
    page.wait_for(lambda: page.text("state") == "stopped" and page.text("state-1") == "stopped")
    assert all(page.text(name).startswith(prompt.splitlines()[0]) for name in ("text", "text-1"))
    wait_for(lambda: running.client.metric("running_choices") == 0)
    assert page.text("error") == "" and page.complaints() == []


def open_report(page: Browser, runs: Path) -> None:
    """A report of the two models shows its figures, on a phone as well, and its links lead somewhere."""
    for name in ("samoe", "dense"):
        lines = [{"iteration": i, "consumed_tokens": 100 * i, "lm_loss": 3 / i, "tokens_per_s": 9.0, "peak_memory_bytes": 10**6,
                  "validation_loss": 3 / i, "validation_perplexity": 20 / i} for i in (1, 2, 3)]  # fmt: skip
        (runs / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = runs / "report.html"
    assert report.main(["--output", str(output), *(str(runs / name) for name in ("samoe", "dense"))]) == 0
    page.open(output.as_uri())
    assert page.run("return document.images.length") >= 2
    assert page.run("return [...document.images].every(i => i.complete && i.naturalWidth > 100)")
    targets = page.run("return [...document.querySelectorAll('nav a')].map(a => !!document.querySelector(a.hash))")
    assert len(targets) >= 4 and all(targets)
    assert page.run("return document.documentElement.scrollWidth") <= 380 and page.complaints() == []
