"""A model as lm-evaluation-harness sees one, so that any of its tasks can be run on it.

    model = harness_model(load_model(open_folder("runs/x"), single_process_state()))
    lm_eval.simple_evaluate(model=model, tasks=["lambada_openai"])

The harness (extra `eval`) is imported when a model is made, not before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_samoe.errors import ConfigError
from megatron_samoe.evaluation.zero_shot.items import Document
from megatron_samoe.evaluation.zero_shot.predictors import ModelPredictor
from megatron_samoe.installation import install_extra
from megatron_samoe.runtime.load import LoadedModel

MAX_GEN_TOKENS = 256


def _harness() -> Any:
    try:
        import lm_eval.api.model
        import lm_eval.tasks
    except ImportError as error:
        raise ConfigError(
            "--harness", True, f"needs lm-evaluation-harness: {install_extra('eval')} ({error})"
        ) from None
    return lm_eval


def harness_model(loaded: LoadedModel, batch_size: int | None = None) -> Any:
    """Returns an instance of lm_eval.api.model.LM.

    Under torchrun every rank makes one and gives it to the harness: all of them see all requests (world_size is 1 to
    the harness) and answer them together, spread over the layout's ranks.

    Raises:
        ConfigError: the harness is not installed.
    """
    base: Any = _harness().api.model.LM

    class SamoeLM(base):  # type: ignore[misc]
        """See `harness_model`."""

        def __init__(self) -> None:
            super().__init__()
            self.predictor = ModelPredictor(loaded, batch_size)
            self._device = loaded.model.state.device

        @property
        def tokenizer_name(self) -> str:
            """What the harness names its caches of requests by."""
            return loaded.tokenizer.fingerprint

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            """Returns (log-likelihood, whether greedy) of each request's (context, continuation)."""
            scores = self.predictor.score_pairs([request.args for request in requests], "loglikelihood")
            return [(score.loglikelihood, score.is_greedy) for score in scores]

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            """Returns the log-likelihood of each request's whole text."""
            documents = [Document("", request.args[0]) for request in requests]
            return [value for value, _ in self.predictor.loglikelihood_of(documents)]

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            """Returns greedy text for each request's (context, options)."""
            texts = [""] * len(requests)
            groups: dict[tuple[tuple[str, ...], int], list[int]] = {}
            for number, request in enumerate(requests):
                wanted = _greedy_options(request.args[1], self.predictor.seq_length)
                groups.setdefault(wanted, []).append(number)
            for (until, max_new_tokens), numbers in groups.items():
                prompts = [requests[n].args[0] for n in numbers]
                made = self.predictor.generate(prompts, until, max_new_tokens, "generate_until")
                for n, (text, _) in zip(numbers, made, strict=True):
                    texts[n] = text
            return texts

    return SamoeLM()


def _greedy_options(options: Mapping[str, Any], seq_length: int) -> tuple[tuple[str, ...], int]:
    """Returns (stops, most new tokens) of a request; ConfigError where it asks for sampling.

    Where a request names no number of tokens, it is the harness's own, or half of a shorter model's sequence.
    """
    if options.get("do_sample") or options.get("temperature"):
        raise ConfigError("--harness", dict(options), "only greedy generation is offered; ask for temperature 0")
    until = options.get("until") or ()
    stops = (until,) if isinstance(until, str) else tuple(until)
    return stops, int(options.get("max_gen_toks", min(MAX_GEN_TOKENS, seq_length // 2)))


def run_harness(
    loaded: LoadedModel,
    tasks: Sequence[str],
    *,
    batch_size: int | None = None,
    limit: int | None = None,
    include_path: str | None = None,
) -> Mapping[str, Any]:
    """Returns what lm_eval.simple_evaluate gives for the harness's own tasks, zero-shot, on rank 0 and all others.

    Args:
        include_path: folder with further task files in the harness's format.

    Raises:
        ConfigError: the harness is not installed, or does not know a task.
    """
    harness = _harness()
    model = harness_model(loaded, batch_size)
    manager = harness.tasks.TaskManager(include_path=include_path)
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise ConfigError(
            "--tasks", ", ".join(unknown), "is no task of lm-evaluation-harness; `lm_eval ls tasks` lists them"
        )
    return harness.simple_evaluate(
        model=model, tasks=list(tasks), num_fewshot=0, limit=limit, task_manager=manager, bootstrap_iters=0
    )
