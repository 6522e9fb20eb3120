"""Several models of a server, the threads that they share, and the end of service: drained, or by an engine that fails."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from megatron_samoe.errors import CheckpointError, ConfigError
from megatron_samoe.inference.engine import Engine
from megatron_samoe.inference.request import TokenEvent
from megatron_samoe.inference.server.models import check_names
from megatron_samoe.runtime.load import LoadedModel
from tests.harness.op_checks import threads_of_torch
from tests.harness.serving import (
    CONTEXT,
    SlowEngine,
    check_error,
    greedy_text,
    load_tiny,
    save_tiny,
    serving,
    texts,
    wait_for,
)


def test_draining_ends_open_requests_properly_and_refuses_new_ones(loaded: LoadedModel) -> None:
    with serving(loaded, engine=SlowEngine(loaded, max_batch=4)) as running, ThreadPoolExecutor(2) as pool:
        client = running.client
        ask = {"max_tokens": 40, "temperature": 0, "ignore_eos": False}
        whole = pool.submit(client.complete, "Hello", **ask)
        streamed = pool.submit(client.complete, "Hello", stream=True, **ask)
        wait_for(lambda: client.metric("running_choices") == 2)
        running.server.end()
        wait_for(lambda: client.ask("GET", "/health").status == 503)
        assert client.ask("GET", "/health").json == {"status": "draining"}
        answer = client.complete("x")
        check_error(answer, 503, "shutting down", code="draining")
        assert "retry-after" in answer.headers
        expected = [greedy_text(loaded, "Hello", 40)]
        assert texts(whole.result()) == expected and texts(streamed.result()) == expected
        assert streamed.result().events[-1] == "[DONE]"
        assert running.join() == 0


def test_what_is_not_complete_after_the_drain_time_is_told_so(loaded: LoadedModel) -> None:
    engine = SlowEngine(loaded, max_batch=4)
    engine.step_s = 0.1
    with serving(loaded, engine=engine, drain_timeout_s=0.3) as running, ThreadPoolExecutor(2) as pool:
        client = running.client
        ask = {"max_tokens": 60, "ignore_eos": True}
        whole = pool.submit(client.complete, "x", **ask)
        streamed = pool.submit(client.complete, "x", stream=True, **ask)
        wait_for(lambda: client.metric("running_choices") == 2)
        running.server.end()
        check_error(whole.result(), 503, "shutting down", code="draining")
        assert streamed.result().status == 200 and streamed.result().events[-1]["error"]["code"] == "draining"
        assert running.join() == 0


class BrokenEngine(SlowEngine):
    broken = False

    def step(self) -> list[TokenEvent]:
        events = super().step()
        if self.broken:
            raise CheckpointError("weights are damaged")
        return events


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_tiny(save_tiny(tmp_path_factory.mktemp("dense"), "dense", seq_length=32))


def test_models_beside_each_other(loaded: LoadedModel, dense: LoadedModel) -> None:
    with serving(loaded, beside={"dense": dense}, show_experts=True) as running:
        client = running.client
        models = client.ask("GET", "/v1/models").json["data"]
        assert [(m["id"], m["max_model_len"]) for m in models] == [("tiny", CONTEXT), ("dense", 32)]
        assert client.ask("GET", "/v1/models/dense").json["max_model_len"] == 32
        ask = {"max_tokens": 10, "temperature": 0}
        with ThreadPoolExecutor(2) as pool:
            both = [pool.submit(client.complete, "Hello", model=name, **ask) for name in ("tiny", "dense")]
            wanted = [greedy_text(model, "Hello", 10) for model in (loaded, dense)]
            assert [texts(answer.result()) for answer in both] == [[text] for text in wanted]
        assert wanted[0] != wanted[1] and both[1].result().json["model"] == "dense"
        assert texts(client.complete("Hello", **ask)) == wanted[:1]
        check_error(client.complete("x", model="gpt-4"), 404, "this server has 'tiny', 'dense'")
        check_error(client.complete("x" * 40, model="dense"), 400, "context has 32 tokens")
        experts = {
            name: client.ask("POST", "/v1/experts", {"prompt": "Hi", "model": name}) for name in ("tiny", "dense")
        }
        assert experts["tiny"].json["layers"] and not experts["dense"].json["layers"]
        told = client.ask("GET", "/metrics").content.decode()
        assert 'megatron_samoe_generated_tokens_total{model="dense"} 10.0' in told
        assert client.metric("generated_tokens_total") == 30


def test_the_first_engine_that_fails_ends_all_models(loaded: LoadedModel, dense: LoadedModel) -> None:
    engine, slow_engine = BrokenEngine(loaded, max_batch=2), SlowEngine(dense, max_batch=2)
    slow_engine.step_s = 0.2
    before = threading.enumerate()
    with serving(loaded, engine=engine, beside={"dense": slow_engine}) as running, ThreadPoolExecutor(2) as pool:
        ask = {"prompt": "x", "max_tokens": 30, "stream": True, "ignore_eos": True}
        slow = running.client.begin({"model": "dense", **ask})
        whole, streamed = (
            pool.submit(running.client.complete, "x", max_tokens=60, ignore_eos=True, stream=stream)
            for stream in (False, True)
        )
        wait_for(lambda: running.client.metric("running_choices") == 3)
        engine.broken = True
        check_error(whole.result(), 500, "engine has failed", type="server_error")
        assert streamed.result().events[-1]["error"]["code"] == "engine_failed"
        content = slow.makefile("rb").read()
        assert b"engine_failed" in content and b"[DONE]" not in content
        assert running.join() == 1
        left = [t for t in threading.enumerate() if t.name == "engine" and t not in before]
        assert not left, "a thread in a step would abort the process at its end"


@pytest.mark.parametrize(("names", "said"), [(["a", "a"], "would name two models"), (["a", " "], "must not be empty")])
def test_names_that_do_not_tell_models_apart(names: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_names(names)


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


def test_engines_of_several_models_divide_the_threads(loaded: LoadedModel, dense: LoadedModel) -> None:
    with threads_of_torch(4):
        first, second = CountingEngine(loaded), CountingEngine(dense)
        with serving(loaded, engine=first, beside={"other": second}) as running, ThreadPoolExecutor(2) as pool:
            ask = {"max_tokens": 10, "ignore_eos": True}
            running.client.complete("x", **ask)
            assert first.threads == [4] * 10, "no other engine has work"
            first.threads.clear()
            first.together = second.together = threading.Barrier(2)
            list(pool.map(lambda name: running.client.complete("x", model=name, **ask), ("tiny", "other")))
        # Who comes first has all of them for one step, while the other's request is on its way.
        assert first.threads[1:] == second.threads[1:] == [2] * 9
