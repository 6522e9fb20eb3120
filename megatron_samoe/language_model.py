"""A trained model for Python: `megatron_samoe.load("runs/x")` gives one that scores and continues text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.convert.opener import PYTHON, open_verified
from megatron_samoe.datasets.tokenizer import Tokenizer
from megatron_samoe.errors import ConfigError
from megatron_samoe.evaluation.zero_shot.items import Document
from megatron_samoe.evaluation.zero_shot.predictors import ModelPredictor, Score
from megatron_samoe.inference.engine import Engine
from megatron_samoe.inference.request import Request, TokenEvent
from megatron_samoe.inference.sampling import SamplingOptions
from megatron_samoe.moe.types import ForwardContext
from megatron_samoe.parallel_state.state import single_process_state
from megatron_samoe.runtime.load import LoadedModel, load_model


def load(
    path: str | Path,
    step: int | None = None,
    *,
    tokenizer_model: str | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> LanguageModel:
    """Returns the model of a folder, in this process.

    Args:
        path: folder of a run, of checkpoints, of one checkpoint, of Hugging Face, or of Megatron-LM.
        step: iteration to load; the newest if not given.
        tokenizer_model: file of the tokenizer, where it has moved since training.
        dtype: of the weights, such as torch.bfloat16; as they are stored if not given.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
        DataError: its tokenizer is not there.
        ConfigError: the model does not fit one process.
    """
    state = single_process_state(device)
    opened = open_verified(path, state, step, PYTHON)
    return LanguageModel(load_model(opened, state, tokenizer_model=tokenizer_model, dtype=dtype))


@dataclass(frozen=True)
class TextScore:
    """How probable a text is to a model.

    Attributes:
        loglikelihood: of all tokens, natural logarithm.
        num_tokens, num_bytes: the text's.
    """

    loglikelihood: float
    num_tokens: int
    num_bytes: int

    @property
    def perplexity(self) -> float:
        """The exponential of the mean loss of a token."""
        return math.exp(-self.loglikelihood / max(self.num_tokens, 1))

    @property
    def bits_per_byte(self) -> float:
        """The loss as bits for a byte of UTF-8, which compares models of different tokenizers."""
        return -self.loglikelihood / math.log(2) / max(self.num_bytes, 1)


class LanguageModel:
    """A loaded model. With several ranks, all of them make the same calls and get the same results.

    Attributes:
        loaded: the modules, and the checkpoint they came from.
    """

    def __init__(self, loaded: LoadedModel):
        self.loaded = loaded

    @property
    def config(self) -> PretrainConfig:
        """The model's configuration."""
        return self.loaded.config

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of its training."""
        return self.loaded.tokenizer

    @property
    def num_parameters(self) -> int:
        """Parameters that this rank holds."""
        return sum(p.numel() for p in self.loaded.model.parameters())

    def __repr__(self) -> str:
        return f"LanguageModel({self.loaded.directory}, {self.num_parameters:,} parameters, {self.config.moe.expert_layout})"

    @torch.no_grad()
    def logits(self, ids: Sequence[int] | Sequence[Sequence[int]] | Tensor) -> Tensor:
        """Returns logits [S, V] of one sequence of ids, or [B, S, V] of B of one length, without padding of the vocabulary.

        Raises:
            ConfigError: ids are none of the vocabulary, of different lengths, or more than the context holds; or the model
                is split over pipeline or tensor-parallel ranks.
        """
        state, model = self.loaded.model.state, self.loaded.model
        if state.pp.size * state.tp.size > 1:
            raise ConfigError(
                "logits", "a model on several ranks", "are those of a model in one piece; load it in one process"
            )
        try:
            given = torch.as_tensor(ids)
        except (ValueError, TypeError) as error:
            raise ConfigError("ids", ids, "must be whole numbers, in sequences of one length") from error
        ids_BS = given[None] if given.dim() == 1 else given
        most = self.config.model.max_positions
        if ids_BS.dim() != 2 or ids_BS.dtype.is_floating_point or not 0 < ids_BS.shape[1] <= most:
            raise ConfigError(
                "ids", list(given.shape), f"must be whole numbers of shape [S] or [B, S], with S from 1 to {most}"
            )
        if ids_BS.numel() and not 0 <= int(ids_BS.min()) <= int(ids_BS.max()) < model.vocab_size:
            raise ConfigError(
                "ids", f"{int(ids_BS.min())} to {int(ids_BS.max())}", f"must be from 0 to {model.vocab_size - 1}"
            )
        context = ForwardContext(batch_size=len(ids_BS), training=False)
        found, _ = model(ids_BS.long().to(state.device), context)
        return found.view(*ids_BS.shape, -1)[..., : model.vocab_size].view(*given.shape, -1)

    @overload
    def generate(self, prompts: str, max_new_tokens: int = 100, **sampling: Any) -> str: ...
    @overload
    def generate(self, prompts: Sequence[str], max_new_tokens: int = 100, **sampling: Any) -> list[str]: ...
    def generate(self, prompts: str | Sequence[str], max_new_tokens: int = 100, **sampling: Any) -> str | list[str]:
        """Returns the text that follows a prompt, or each of several, which are generated together.

        A prompt longer than the context is cut from the left to half of it.
        Each call makes an engine, which folds a pool's experts anew: for many calls keep an `Engine`.

        Args:
            sampling: other fields of `SamplingOptions`: temperature (0 is greedy), top_k, top_p, stop, seed, ...

        Raises:
            ConfigError: a prompt is empty, or an option is out of range.
        """
        given = [prompts] if isinstance(prompts, str) else list(prompts)
        texts = [""] * len(given)
        for number, event in self._events([self.tokenizer.encode(text) for text in given], max_new_tokens, sampling):
            texts[number] += event.text
        return texts[0] if isinstance(prompts, str) else texts

    def stream(self, prompt: str, max_new_tokens: int = 100, **sampling: Any) -> Iterator[str]:
        """Yields the text that follows a prompt as it comes; see `generate`."""
        for _, event in self._events([self.tokenizer.encode(prompt)], max_new_tokens, sampling):
            yield event.text

    def generate_ids(self, prompt: Sequence[int], max_new_tokens: int = 100, **sampling: Any) -> list[int]:
        """Returns the ids that follow a prompt's, without the end of the document; see `generate`."""
        ids = [event.token_id for _, event in self._events([prompt], max_new_tokens, sampling)]
        return ids[:-1] if ids[-1:] == [self.tokenizer.eod] else ids

    def score(self, context: str, continuation: str) -> Score:
        """Returns the log-likelihood of a text after another, and whether greedy decoding gives it."""
        return self._predictor.score_pairs([(context, continuation)])[0]

    def score_text(self, text: str) -> TextScore:
        """Returns how probable a text of any length is, read in windows of the model's length."""
        ((loglikelihood, num_tokens),) = self._predictor.loglikelihood_of([Document("text", text)])
        return TextScore(loglikelihood, num_tokens, len(text.encode()))

    @cached_property
    def _predictor(self) -> ModelPredictor:
        return ModelPredictor(self.loaded)

    def _events(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: dict[str, Any]
    ) -> Iterator[tuple[int, TokenEvent]]:
        engine = Engine(self.loaded, max_batch=max(min(len(prompts), 8), 1))
        options, context = SamplingOptions(max_new_tokens, **sampling), engine.context_length
        cut = [ids if len(ids) <= context else ids[-(context // 2) :] for ids in prompts]
        numbers = {engine.submit(Request(ids, options)): number for number, ids in enumerate(cut)}
        while engine.has_work:
            for event in engine.step():
                yield numbers[event.request_id], event
