""" "max_tokens": 0 scores a prompt, as other servers of this API do; and what is counted of answers that are cut off."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from megatron_samoe.inference.engine import Engine
from megatron_samoe.inference.request import TokenEvent
from megatron_samoe.inference.server.answers import joined_logprobs
from megatron_samoe.inference.server.worker import ThreadShares
from megatron_samoe.language_model import LanguageModel
from megatron_samoe.runtime.load import LoadedModel
from tests.harness.serving import CONTEXT, Client, SlowEngine, load_tiny, save_tiny, serving, texts, wait_for


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_tiny(save_tiny(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def client(loaded: LoadedModel) -> Iterator[Client]:
    with serving(loaded) as running:
        yield running.client


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["Emma was very much", "x" * CONTEXT], ids=["short", "whole context"])
def test_a_prompt_is_scored_and_nothing_added(client: Client, loaded: LoadedModel, prompt: str, stream: bool) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    answer = client.complete(prompt, max_tokens=0, echo=True, logprobs=2, stop=[" was"], **options)
    assert answer.status == 200 and list(texts(answer)) == [prompt]
    pieces = (
        [choice for event in answer.events[:-1] for choice in event["choices"]] if stream else answer.json["choices"]
    )
    assert [piece["finish_reason"] for piece in pieces] == ["length"]
    told = joined_logprobs([piece["logprobs"] for piece in pieces])
    ids = loaded.tokenizer.encode(prompt)
    expected = LanguageModel(loaded).logits(ids).double().log_softmax(-1)
    assert told is not None and "".join(told["tokens"]) == prompt and told["token_logprobs"][0] is None
    assert told["token_logprobs"][1:] == pytest.approx([float(expected[i, t]) for i, t in enumerate(ids[1:])], abs=1e-4)
    assert {len(told[key]) for key in told} == {len(ids)}
    usage = answer.events[-2]["usage"] if stream else answer.json["usage"]
    assert usage == {"prompt_tokens": len(ids), "completion_tokens": 0, "total_tokens": len(ids)}


def test_without_probabilities_it_is_the_prompt_alone(client: Client) -> None:
    choice = client.complete("Hello", max_tokens=0, echo=True).json["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["logprobs"]) == ("Hello", "length", None)


def test_nothing_to_give_back_and_prompts_beyond_the_context_are_refused(client: Client) -> None:
    for body, part in (
        ({"max_tokens": 0}, 'without "echo"'),
        ({"max_tokens": -1}, "0 or more"),
        ({"max_tokens": False}, "0 or more"),
    ):
        answer = client.complete("Hello", **body)
        assert answer.status == 400 and part in answer.json["error"]["message"]
    answer = client.complete("x" * (CONTEXT + 1), max_tokens=0, echo=True)
    assert answer.status == 400 and answer.json["error"]["code"] == "context_length_exceeded"


def test_models_with_and_without_a_slash(client: Client) -> None:
    assert client.ask("GET", "/v1/models/").json == client.ask("GET", "/v1/models").json


@pytest.mark.parametrize("stream", [False, True])
def test_answers_that_nobody_waits_for_are_counted_as_such(loaded: LoadedModel, stream: bool) -> None:
    engine = SlowEngine(loaded, max_batch=2)
    name = 'http_requests_total{{route="/v1/completions",status="{}"}}'.format
    with serving(loaded, engine=engine) as running:
        client = running.client
        held = client.begin({"prompt": "x", "max_tokens": 60, "ignore_eos": True, "stream": stream})
        wait_for(lambda: client.metric("generated_tokens_total") > 1)
        held.close()
        wait_for(lambda: client.metric(name("499")) == 1)
        assert client.metric(name("200")) == 0
        client.complete("x", max_tokens=2, stream=stream)
        assert (client.metric(name("200")), client.metric(name("499"))) == (1, 1)


class CountingEngine(Engine):
    """An engine that writes down how many threads its steps have, and steps together with another when it is told to."""

    together: threading.Barrier | None = None

    def __init__(self, loaded: LoadedModel):
        super().__init__(loaded, max_batch=1)
        self.threads: list[int] = []

    def step(self) -> list[TokenEvent]:
        self.threads.append(torch.get_num_threads())
        if self.together is not None:
            self.together.wait(30)
        return super().step()


def test_engines_of_several_models_divide_the_threads(loaded: LoadedModel, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        first, second = CountingEngine(loaded), CountingEngine(load_tiny(save_tiny(tmp_path, "dense")))
        with serving(loaded, engine=first, beside={"other": second}) as running, ThreadPoolExecutor(2) as pool:
            ask = {"max_tokens": 10, "ignore_eos": True}
            running.client.complete("x", **ask)
            assert first.threads == [4] * 10, "no other engine has work"
            first.threads.clear()
            first.together = second.together = threading.Barrier(2)
            list(pool.map(lambda name: running.client.complete("x", model=name, **ask), ("tiny", "other")))
        # Who comes first has all of them for one step, while the other's request is on its way.
        assert first.threads[1:] == second.threads[1:] == [2] * 9
    finally:
        torch.set_num_threads(before)


def test_shares_are_as_even_as_they_can_be() -> None:
    before = torch.get_num_threads()
    try:
        shares = ThreadShares(5)
        assert [shares.take(name) for name in "abcabc"] == [5, 2, 1, 2, 2, 1]
        shares.leave("a")
        assert [shares.take(name) for name in "bc"] == [3, 2]
        assert [ThreadShares(1).take(name) for name in "a"] == [1]
    finally:
        torch.set_num_threads(before)
