"""A model as lm-evaluation-harness sees one, so that any of its tasks can be run on it.

    model = harness_model(load_model(open_folder("runs/x"), single_process_state()))
    lm_eval.simple_evaluate(model=model, tasks=["lambada_openai"])

The harness (extra `eval`) is imported when a model is made, not before.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_samoe.errors import ConfigError
from megatron_samoe.evaluation.zero_shot.data_files import Document
from megatron_samoe.evaluation.zero_shot.predictors import ModelPredictor, Progress, silent
from megatron_samoe.evaluation.zero_shot.tasks import harness
from megatron_samoe.runtime.load import LoadedModel

MAX_GEN_TOKENS = 256


def harness_model(loaded: LoadedModel, batch_size: int | None = None, progress: Progress = silent) -> Any:
    """Returns an instance of lm_eval.api.model.LM.

    Under torchrun every rank makes one and gives it to the harness: all of them see all requests (world_size is 1 to
    the harness) and answer them together, spread over the layout's ranks. `cut` and `windowed` have the items of each
    task whose context was cut, and whose continuation was scored in windows.

    Raises:
        DataError: the harness is not installed.
    """
    base: Any = harness("lm_eval.api.model").LM

    class SamoeLM(base):  # type: ignore[misc]
        """See `harness_model`."""

        def __init__(self) -> None:
            super().__init__()
            self.predictor = ModelPredictor(loaded, batch_size, progress)
            self.cut: dict[str, set[int]] = defaultdict(set)
            self.windowed: dict[str, set[int]] = defaultdict(set)
            self._device = loaded.model.state.device

        @property
        def tokenizer_name(self) -> str:
            """The harness's name for caches of requests."""
            return loaded.tokenizer.fingerprint

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            """Returns (log-likelihood, whether greedy) of each request's (context, continuation)."""
            scores = self.predictor.score_pairs([request.args for request in requests], _task_of(requests))
            for request, score in zip(requests, scores, strict=True):
                self._note(request, score.cut_tokens, score.num_windows)
            return [(score.loglikelihood, score.is_greedy) for score in scores]

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            """Returns the log-likelihood of each request's text."""
            documents = [Document("", request.args[0]) for request in requests]
            return [value for value, _ in self.predictor.loglikelihood_of(documents)]

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            """Returns greedy text for each request's (context, options)."""
            texts = [""] * len(requests)
            groups: dict[tuple[tuple[str, ...], int], list[int]] = {}
            for number, request in enumerate(requests):
                wanted = _greedy_options(request.args[1], self.predictor.seq_length)
                groups.setdefault(wanted, []).append(number)
            for (until, max_new_tokens), numbers in groups.items():
                prompts = [requests[n].args[0] for n in numbers]
                made = self.predictor.generate(prompts, until, max_new_tokens, _task_of(requests))
                for n, (text, cut_tokens) in zip(numbers, made, strict=True):
                    texts[n] = text
                    self._note(requests[n], cut_tokens)
            return texts

        def _note(self, request: Any, cut_tokens: int, num_windows: int = 1) -> None:
            if cut_tokens:
                self.cut[request.task_name].add(request.doc_id)
            if num_windows > 1:
                self.windowed[request.task_name].add(request.doc_id)

    return SamoeLM()


def _task_of(requests: Sequence[Any]) -> str:
    return str(requests[0].task_name) if requests else ""


def _greedy_options(options: Mapping[str, Any], seq_length: int) -> tuple[tuple[str, ...], int]:
    """Returns (stops, most new tokens) of a request; ConfigError where it asks for sampling.

    Where a request names no number of tokens, it is the harness's own, or half of a shorter model's sequence.
    """
    if options.get("do_sample") or options.get("temperature"):
        raise ConfigError("--tasks", dict(options), "only greedy generation is offered; ask for temperature 0")
    until = options.get("until") or ()
    stops = (until,) if isinstance(until, str) else tuple(until)
    return stops, int(options.get("max_gen_toks", min(MAX_GEN_TOKENS, seq_length // 2)))
