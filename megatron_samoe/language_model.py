"""A trained model for Python: `megatron_samoe.load("runs/x")` gives one that scores and continues text."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from inspect import Parameter
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import TypedDict, Unpack

from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.convert.edited_model import EditedModel
from megatron_samoe.convert.opener import PYTHON, load_from, open_folder
from megatron_samoe.convert.target import plan_hf
from megatron_samoe.datasets.chat_prompt import chat_prompt
from megatron_samoe.datasets.tokenizer import Tokenizer
from megatron_samoe.dist_checkpointing.opened import Opened
from megatron_samoe.errors import ConfigError, nearest
from megatron_samoe.evaluation.zero_shot.data_files import Document
from megatron_samoe.evaluation.zero_shot.harness_model import harness_model
from megatron_samoe.evaluation.zero_shot.predictors import ModelPredictor, Score
from megatron_samoe.evaluation.zero_shot.results import TaskResult, evaluate_task
from megatron_samoe.evaluation.zero_shot.tasks import TaskLoader
from megatron_samoe.inference.engine import Engine
from megatron_samoe.inference.kv_cache import PAGE
from megatron_samoe.inference.request import Request, TokenEvent
from megatron_samoe.inference.sampling import SamplingOptions
from megatron_samoe.moe.types import ForwardContext
from megatron_samoe.parallel_state.state import single_process_state
from megatron_samoe.runtime.load import LoadedModel, load_model

_Method = TypeVar("_Method", bound=Callable[..., Any])


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
        CheckpointError: the checkpoint is missing or damaged.
        DataError: its tokenizer is not there.
        ConfigError: the model does not fit one process.
    """
    state = single_process_state(device)

    def load_opened(opened: Opened) -> LoadedModel:
        return load_model(opened, state, tokenizer_model=tokenizer_model, dtype=dtype)

    return LanguageModel(load_from(path, load_opened, state, step, PYTHON))


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


#: A text, or the messages of a conversation.
Messages: TypeAlias = str | Sequence[Mapping[str, str]]


class Sampling(TypedDict, total=False):
    """How tokens are chosen; `SamplingOptions` has the meanings and defaults."""

    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    stop: Sequence[str]
    seed: int
    ignore_eod: bool


#: What other libraries call an option.
_ELSEWHERE = {
    "max_tokens": "is called max_new_tokens here",
    "max_completion_tokens": "is called max_new_tokens here",
    "do_sample": "is not needed: temperature=0 takes the most probable token, any other temperature samples",
}


def _sampling(max_new_tokens: int, given: Sampling) -> SamplingOptions:
    """Returns the options of a request; ConfigError for one that is not known."""
    for name, value in given.items():
        if name not in Sampling.__annotations__:
            known = f"is not an option; there are max_new_tokens, {', '.join(Sampling.__annotations__)}"
            raise ConfigError(name, value, _ELSEWHERE.get(name, f"{known}.{nearest(name, Sampling.__annotations__)}"))
    return SamplingOptions(max_new_tokens, **given)  # type: ignore[arg-type]


def _shows_options(method: _Method) -> _Method:
    """Returns a method whose signature, as help() and notebooks show it, names the options of `Sampling`."""
    shown = inspect.signature(method)
    named = [p for p in shown.parameters.values() if p.kind != p.VAR_KEYWORD]
    options = [f for f in fields(SamplingOptions) if f.name in Sampling.__annotations__]
    named += [Parameter(f.name, Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type) for f in options]
    method.__signature__ = shown.replace(parameters=named)  # type: ignore[attr-defined]
    return method


class LanguageModel:
    """A loaded model. With several ranks, all of them make the same calls and get the same results.

    Attributes:
        loaded: the modules, and the checkpoint they came from.
    """

    def __init__(self, loaded: LoadedModel):
        self.loaded = loaded
        self._unread: list[TokenEvent] = []

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

    def logits(self, text: str | Sequence[int] | Sequence[Sequence[int]] | Tensor) -> Tensor:
        """Returns logits [S, V] of a text or of a sequence of ids, or [B, S, V] of B sequences of one length, without padding of
        the vocabulary.

        Raises:
            ConfigError: ids are outside the vocabulary, of different lengths, or more than the context holds; or the model
                is split over pipeline or tensor-parallel ranks.
        """
        ids = self._ids(text)
        found_BSV = self._forward(ids[None] if ids.dim() == 1 else ids)
        return found_BSV[0] if ids.dim() == 1 else found_BSV

    def loss(self, text: str | Sequence[int] | Sequence[Sequence[int]] | Tensor) -> float:
        """Returns the mean loss, in nats, of every token after the first, of what `logits` takes; a text longer than the context
        has a `score_text`.

        Raises:
            ConfigError: as for `logits`; or there is only one token.
        """
        ids = self._ids(text)
        ids_BS = ids[None] if ids.dim() == 1 else ids
        if ids_BS.shape[1] < 2:
            raise ConfigError(
                "ids", list(ids.shape), "needs two tokens or more: a loss is that of a token after others"
            )
        logits_BSV = self._forward(ids_BS)[:, :-1].float()
        return float(F.cross_entropy(logits_BSV.flatten(0, 1), ids_BS[:, 1:].flatten().to(logits_BSV.device)))

    @overload
    def generate(  # type: ignore[overload-overlap]
        self, texts: str, max_new_tokens: int = 100, **options: Unpack[Sampling]
    ) -> str: ...
    @overload
    def generate(self, texts: Sequence[str], max_new_tokens: int = 100, **options: Unpack[Sampling]) -> list[str]: ...
    @_shows_options
    def generate(
        self, texts: str | Sequence[str], max_new_tokens: int = 100, **options: Unpack[Sampling]
    ) -> str | list[str]:
        """Returns the text that follows a text, or each of several, which are generated together.

        The first call makes an engine, from the weights of then; later calls use it.

        Args:
            options: see `Sampling`; temperature=0 takes the most probable token.

        Raises:
            ConfigError: a text is empty or longer than the context, or an option is not known or out of range.
        """
        given = [texts] if isinstance(texts, str) else list(texts)
        found = [""] * len(given)
        sampling = _sampling(max_new_tokens, options)
        for number, event in self._events([self.tokenizer.encode(text) for text in given], sampling):
            found[number] += event.text
        return found[0] if isinstance(texts, str) else found

    @_shows_options
    def chat(self, messages: Messages, max_new_tokens: int | None = None, **options: Unpack[Sampling]) -> str:
        """Returns the model's answer to messages, by the chat template of its tokenizer.

        Args:
            messages: one text of a user, or a conversation: {"role": "system", "user" or "assistant", "content": TEXT}, ...
            max_new_tokens: of the answer; until it or the context ends if not given.

        Raises:
            ConfigError: the model is a base model, without a template; the template refuses the messages; or as for `generate`.
        """
        given = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        return "".join(self.stream(given, max_new_tokens, **options))

    @_shows_options
    def stream(self, text: Messages, max_new_tokens: int | None = 100, **options: Unpack[Sampling]) -> Iterator[str]:
        """Yields what follows a text, or the answer to a conversation's messages, as it comes; see `generate` and `chat`."""
        sampling = _sampling(self.config.model.max_positions if max_new_tokens is None else max_new_tokens, options)
        ids = self.tokenizer.encode(text) if isinstance(text, str) else chat_prompt(self.tokenizer, text)
        events = self._events([ids], sampling)
        return (event.text for _, event in events)

    @_shows_options
    def generate_ids(self, ids: Sequence[int], max_new_tokens: int = 100, **options: Unpack[Sampling]) -> list[int]:
        """Returns the ids that follow others, without the one that ends a document or an answer; see `generate`."""
        made = [event.token_id for _, event in self._events([ids], _sampling(max_new_tokens, options))]
        return made[:-1] if made and made[-1] in self.tokenizer.ends else made

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the model as it is now, and its tokenizer, as a new folder for transformers, as `convert --to hf` does.

        Raises:
            CheckpointError: the folder exists, or the disk is too small.
            ConfigError: no class of transformers computes the model; or it is on several ranks.
        """
        self._refuse_parts("save_pretrained")
        source, loaded = open_folder(self.loaded.directory, words=PYTHON), self.loaded.model
        tensors, now = source.tensors, loaded.global_parameters()
        model = EditedModel(tensors.config, tensors.train_state, attachments=tensors.attachments)
        for name in tensors.tensors:
            if name in now:
                model.add_value(name, now[name].detach().cpu())
            else:
                model.keep(tensors, name)
        plan = plan_hf(replace(source, tensors=model), Path(folder), loaded.dtype, with_tokenizer=True)
        plan.write(lambda num_bytes: None)

    def score(self, context: str, continuation: str) -> Score:
        """Returns the log-likelihood of a text after another, and whether greedy decoding gives it."""
        return self._predictor.score_pairs([(context, continuation)])[0]

    def score_text(self, text: str) -> TextScore:
        """Returns how probable a text of any length is, read in windows of the model's length."""
        ((loglikelihood, num_tokens),) = self._predictor.loglikelihood_of([Document("text", text)])
        return TextScore(loglikelihood, num_tokens, len(text.encode()))

    def evaluate(
        self, tasks: str, data_dir: str | Path | None = None, limit: int | None = None, num_fewshot: int | None = None
    ) -> list[TaskResult]:
        """Returns the results on tasks of lm-evaluation-harness (extra `eval`).

        Args:
            tasks: names and YAML files between commas; all: those of docs/evaluation.md that have data.
            data_dir: folder of their data; the Hugging Face Hub where none is given.
            limit: only the first items of each.
            num_fewshot: examples before each item; the task's own number if not given.

        Raises:
            ConfigError: a task is not known.
            DataError: its data cannot be had, or the harness is not installed.
        """
        model = harness_model(self.loaded)
        asked = TaskLoader(Path(data_dir) if data_dir is not None else None).load(tasks)
        return [result for task in asked for result in evaluate_task(task, model, limit, num_fewshot)]

    @cached_property
    def _predictor(self) -> ModelPredictor:
        return ModelPredictor(self.loaded)

    @cached_property
    def _engine(self) -> Engine:
        # Room for eight sequences that are short, or for one as long as the context.
        return Engine(self.loaded, max_batch=8, max_tokens=max(self.config.model.max_positions + PAGE, 1 << 14))

    def _events(self, prompts: Sequence[Sequence[int]], options: SamplingOptions) -> Iterator[tuple[int, TokenEvent]]:
        """Yields each new token with the number of its prompt. Several such iterators may share the engine's steps."""
        numbers: dict[int, int] = {}
        try:
            for number, ids in enumerate(prompts):
                own = replace(options, seed=(options.seed + number) % 2**64)
                numbers[self._engine.submit(Request(ids, own))] = number
            left = set(numbers)
            while left:
                if not any(event.request_id in left for event in self._unread):
                    self._unread += self._engine.step()
                mine = [event for event in self._unread if event.request_id in left]
                self._unread = [event for event in self._unread if event.request_id not in left]
                for event in mine:
                    left -= {event.request_id} if event.finish_reason else set()
                    yield numbers[event.request_id], event
        finally:
            for request_id in numbers:
                self._engine.cancel(request_id)
            self._unread = [event for event in self._unread if event.request_id not in numbers]

    def _ids(self, text: str | Sequence[int] | Sequence[Sequence[int]] | Tensor) -> Tensor:
        """Returns a text's ids [S], or those that are given, [S] or [B, S]; ConfigError where they are outside the vocabulary."""
        try:
            ids = torch.as_tensor(self.tokenizer.encode(text) if isinstance(text, str) else text)
        except (ValueError, TypeError) as error:
            raise ConfigError("ids", text, "must be a text, or whole numbers in sequences of one length") from error
        most, vocab_size = self.config.model.max_positions, self.loaded.model.vocab_size
        if ids.dim() not in (1, 2) or ids.dtype.is_floating_point or not 0 < ids.shape[-1] <= most:
            raise ConfigError(
                "ids", list(ids.shape), f"must be whole numbers of shape [S] or [B, S], with S from 1 to {most}"
            )
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise ConfigError("ids", f"{int(ids.min())} to {int(ids.max())}", f"must be from 0 to {vocab_size - 1}")
        return ids.long()

    @torch.no_grad()
    def _forward(self, ids_BS: Tensor) -> Tensor:
        """Returns logits [B, S, V]."""
        self._refuse_parts("logits")
        model = self.loaded.model
        found, _ = model(ids_BS.to(model.state.device), ForwardContext(batch_size=len(ids_BS), training=False))
        return found.view(*ids_BS.shape, -1)[..., : model.vocab_size]

    def _refuse_parts(self, what: str) -> None:
        state = self.loaded.model.state
        if state.pp.size * state.tp.size > 1:
            raise ConfigError(what, "a model on several ranks", "needs a model in one piece; load it in one process")
