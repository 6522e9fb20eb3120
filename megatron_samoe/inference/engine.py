"""The engine: requests in, tokens out, one step of continuous batching at a time.

    from megatron_samoe.convert.opener import open_folder
    from megatron_samoe.inference import Engine, Request, SamplingOptions, load_model
    from megatron_samoe.parallel_state import single_process_state

    loaded = load_model(open_folder("runs/samoe"), single_process_state(), combine=False)
    engine = Engine(loaded, max_batch=8)
    engine.submit(Request(loaded.tokenizer.encode("Emma was"), SamplingOptions(max_new_tokens=20)))
    while engine.has_work:
        for event in engine.step():
            print(event.text, end="")

A step gives every running request its next token, and lets waiting ones in.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch

from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.validate import refuse_unknown
from megatron_samoe.errors import ConfigError
from megatron_samoe.inference.decode_layers import make_decode_model, options_of_training_alone
from megatron_samoe.inference.kv_cache import PAGE, BatchBuffers, PageTable, make_batch, pages_for, window_pages
from megatron_samoe.inference.rank_runner import RankRunner, Runner, convert_weights
from megatron_samoe.inference.request import MOST_LOGPROBS, FinishReason, Request, TokenEvent, TokenScore
from megatron_samoe.inference.sampling import Sampler, check_sampling, log_probabilities, most_probable
from megatron_samoe.inference.scheduler import Scheduler, Sequence
from megatron_samoe.inference.serving import (
    PRECISIONS,
    SERVINGS,
    Precision,
    Serving,
    cache_bytes,
    choose_serving,
    combined_layers,
    default_cache_experts,
    needed_bytes,
    precision_of,
)
from megatron_samoe.inference.single_runner import SingleRunner
from megatron_samoe.inference.text_stream import TextStream
from megatron_samoe.inference.weight_memory import keep_in_file
from megatron_samoe.ops.extension import uses_cuda_kernel
from megatron_samoe.runtime.free_memory import free_memory_bytes
from megatron_samoe.runtime.load import LoadedModel

#: What the CUDA decode kernels take at most.
MAX_CUDA_HEAD_DIM, MAX_CUDA_BANKS = 256, 64

#: Tokens of prompts whose logits a step computes in addition to those of new tokens.
SCORED_ROWS = 64

__all__ = ["PRECISIONS", "SERVINGS", "Engine", "Precision", "Serving"]


class Engine:
    """Generates for many requests at once. Not thread-safe: one thread calls it.

    In a layout of several ranks, every rank makes the same calls in the same order and gets the same events.

    Args:
        loaded: weights, tokenizer and layout; see `load_model`.
        max_batch: most requests that run at the same time; others wait.
        max_tokens: tokens that the key-value cache holds over all running requests; each reserves its prompt and
            max_new_tokens when it starts. Enough for max_batch full contexts if not given.
        serving: how the experts of a shared pool are kept, see `inference.serving`; other models have one way only,
            "folded". The attribute of this name is the way that "auto" chose.
        dtype: of weights; the checkpoint's if not given. int8 is for one process.
        cache_experts: experts combined on the fly that are kept, over all layers; those of two tokens if not given.
        max_step_tokens: most tokens of one step, so that a long prompt does not hold up the others for long.
        weights_folder: where to keep the weights in a file, which may be larger than the memory that is left for them; see
            `weight_file`. For one process on a CPU.
        beside: the process's other engines that have answered nothing: Linux counts their caches as free.

    Raises:
        ConfigError: a way of serving or precision that does not fit the model, or more memory than there is.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        max_batch: int = 8,
        max_tokens: int | None = None,
        serving: Serving = "auto",
        dtype: Precision | None = None,
        max_step_tokens: int = 512,
        cache_experts: int | None = None,
        weights_folder: str | Path | None = None,
        beside: Collection[Engine] = (),
    ):
        refuse_unknown(loaded.config, "decode", "the inference engine")
        self.tokenizer, self.vocab_size = loaded.tokenizer, loaded.model.vocab_size
        self._ends = loaded.tokenizer.ends
        #: Most tokens of one sequence, prompt and result together.
        self.context_length = loaded.config.model.max_positions
        _check_sizes(max_batch, max_tokens, max_step_tokens)
        if serving not in SERVINGS:
            raise ConfigError("serving", serving, f"one of {', '.join(SERVINGS)}")
        if dtype is not None and dtype not in PRECISIONS:
            raise ConfigError("dtype", dtype, f"one of {', '.join(PRECISIONS)}")
        self.max_batch, self.dtype = max_batch, dtype or precision_of(loaded.model)
        pages_per_slot, max_step_tokens = pages_for(self.context_length), max(max_step_tokens, max_batch)
        around = window_pages(loaded.config.model.cache_window, max_step_tokens)
        most_pages = pages_per_slot if around is None else min(pages_per_slot, around)
        num_pages = max_batch * most_pages if max_tokens is None else min(max_batch * most_pages, max_tokens // PAGE)
        #: Tokens that the key-value cache has room for; with a window a sequence needs room for no more than that.
        self.max_tokens = (num_pages if num_pages < most_pages or around is None else max_batch * pages_per_slot) * PAGE
        self._world = loaded.model.state.world
        slots = _cache_slots(cache_experts, loaded)
        needed = needed_bytes(loaded.model, self.dtype, slots, num_pages)
        self._cache_bytes = cache_bytes(loaded.model, self.dtype, num_pages)
        device = loaded.model.state.device
        free = free_memory_bytes(device) - (sum(e._cache_bytes for e in beside) if device.type == "cpu" else 0)
        self.serving = choose_serving(serving, loaded.model, needed, free)
        if cache_experts is not None and self.serving != "on-the-fly":
            raise ConfigError(
                "cache_experts",
                cache_experts,
                f"has no effect on the way of serving {self.serving}, only on on-the-fly",
            )
        self._weights_folder = weights_folder
        self._runner: Runner = self._make_runner(loaded, num_pages, max_step_tokens, slots)
        self._pages = PageTable(max_batch, num_pages, pages_per_slot, self._runner.device, most_pages)
        self._buffers = BatchBuffers(max_step_tokens)
        self._scheduler = Scheduler(self._pages, max_step_tokens, self.max_batch + SCORED_ROWS)
        self._next_id = 0

    @torch.no_grad()
    def _make_runner(self, loaded: LoadedModel, num_pages: int, max_step_tokens: int, cache_experts: int) -> Runner:
        state = loaded.model.state
        alone = options_of_training_alone(loaded.config.model)
        if alone and self.dtype == "int8":
            raise ConfigError("dtype", "int8", f"fp32 or bf16 with {', '.join(alone)}")
        takes_single = not alone and takes_single_runner(state.device.type, state.world.size, self.dtype)
        if self._weights_folder is not None and not (takes_single and state.device.type == "cpu"):
            without = f", without {', '.join(alone)}" if alone else ""
            raise ConfigError("weights_folder", self._weights_folder, f"is for one process on a CPU{without}")
        if not takes_single:
            convert_weights(loaded.model, self.dtype)
            return RankRunner(loaded, num_pages, self.serving)
        if state.device.type == "cuda" and uses_cuda_kernel("decoding"):
            check_cuda_limits(loaded.config, self.serving)
        model = make_decode_model(loaded.model, self.serving, self.dtype, num_pages)
        if self._weights_folder is not None:
            keep_in_file(model.weights(), Path(self._weights_folder))
        return SingleRunner(model, max_step_tokens, self.max_batch + SCORED_ROWS, cache_experts)

    @property
    def summary(self) -> str:
        """Precision, way of serving and way of computing, in words."""
        return f"{self.dtype}, experts {self.serving}, steps {self._runner.steps}"

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self.num_running + self.num_waiting > 0

    @property
    def num_running(self) -> int:
        """Requests that are being generated."""
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a slot."""
        return self._scheduler.num_waiting

    @property
    def num_free_tokens(self) -> int:
        """Tokens of the key-value cache that no request has reserved."""
        return self._pages.num_free_pages * PAGE

    def submit(self, request: Request, request_id: int | None = None) -> int:
        """Queues a request and returns its id, which events carry.

        Args:
            request_id: of no request before; the next number if not given.

        Raises:
            ConfigError: the prompt is empty, too long or has unknown tokens, an option is out of range, or the request
                could never fit into the key-value cache.
        """
        check_sampling(request.sampling)
        _check_scores(request)
        self._check_prompt(request.prompt_ids)
        # The last token takes no position of the context: nothing is computed after it.
        length = min(len(request.prompt_ids) + request.sampling.max_new_tokens, self.context_length + 1)
        if length - 1 > self.max_tokens:
            raise ConfigError(
                "max_new_tokens",
                request.sampling.max_new_tokens,
                f"prompt and result may have {self.max_tokens} tokens together, as the key-value cache has no more; "
                f"the prompt has {len(request.prompt_ids)}. A larger max_tokens of the engine helps.",
            )
        request_id = self._next_id if request_id is None else request_id
        self._next_id = max(self._next_id, request_id + 1)
        sampler = Sampler(request.sampling, request.prompt_ids, self.vocab_size)
        text = TextStream(self.tokenizer, request.prompt_ids, request.sampling.stop)
        self._scheduler.add(Sequence(request_id, request, length, sampler, text))
        return request_id

    def cancel(self, request_id: int) -> bool:
        """Ends a request without an event and frees its slot; returns whether it was still there."""
        return self._scheduler.remove(request_id)

    def step(self) -> list[TokenEvent]:
        """Runs one step and returns the new tokens; none where there was nothing to do or prompts are half read."""
        plan = self._scheduler.plan()
        if plan is None:
            return []
        rows = [row for _, row in (*plan.samples, *plan.scored)]
        batch = make_batch(plan.spans, plan.tokens, self._pages.table, rows, self._runner.device, self._buffers)
        try:
            logits_NV = self._runner.run(batch).numpy()
            chosen = [
                sequence.sampler.choose(logits_V)
                for (sequence, _), logits_V in zip(plan.samples, logits_NV, strict=False)
            ]
        except BaseException:
            plan.undo()
            raise
        if self._world.size > 1:
            # Ranks hold equal logits up to rounding, so one of them decides.
            chosen = self._world.broadcast(torch.tensor(chosen, device=self._runner.device)).tolist()
        for (sequence, _), logits_V in zip(plan.scored, logits_NV[len(plan.samples) :], strict=True):
            token = sequence.ids[len(sequence.prompt_scores) + 1]
            sequence.prompt_scores.append(_score(token, logits_V, sequence.request))
        return [
            self._take(sequence, token, logits_V)
            for (sequence, _), token, logits_V in zip(plan.samples, chosen, logits_NV, strict=False)
        ]

    def _take(self, sequence: Sequence, token: int, logits_V: np.ndarray) -> TokenEvent:
        told = tuple(sequence.prompt_scores) if sequence.num_new == 0 else ()
        score = None if sequence.request.logprobs is None else _score(token, logits_V, sequence.request)
        sequence.ids.append(token)
        options = sequence.request.sampling
        reason: FinishReason | None = None
        text = ""
        if token in self._ends and not options.ignore_eod:
            reason = "stop"
        else:
            text = sequence.text.push(token)
            if sequence.text.stopped:
                reason = "stop"
            elif sequence.num_new >= options.max_new_tokens or len(sequence.ids) >= sequence.length:
                reason = "length"
        if reason is not None:
            text += sequence.text.finish()
            if sequence.text.stopped:
                reason = "stop"
            self._scheduler.remove(sequence.request_id)
        return TokenEvent(sequence.request_id, token, reason, text, score, told)

    def _check_prompt(self, ids: Collection[int]) -> None:
        if not len(ids):
            raise ConfigError("prompt", "", "must hold at least one token")
        if len(ids) > self.context_length:
            raise ConfigError(
                "prompt", f"{len(ids)} tokens", f"may have {self.context_length} tokens, the model's context"
            )
        for position, token in enumerate(ids):
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self.vocab_size:
                raise ConfigError(
                    "prompt",
                    f"token {token!r} at position {position}",
                    f"must be whole numbers from 0 to {self.vocab_size - 1}",
                )


def _score(token: int, logits_V: np.ndarray, request: Request) -> TokenScore:
    logprobs_V = log_probabilities(logits_V)
    top = tuple((i, float(logprobs_V[i])) for i in most_probable(logprobs_V, request.logprobs or 0))
    return TokenScore(token, float(logprobs_V[token]), top)


def _check_scores(request: Request) -> None:
    count = request.logprobs
    if count is None and request.scores_prompt:
        raise ConfigError("scores_prompt", True, "needs logprobs")
    if count is not None and not (type(count) is int and 0 <= count <= MOST_LOGPROBS):
        raise ConfigError("logprobs", count, f"must be a whole number from 0 to {MOST_LOGPROBS}")


def takes_single_runner(device_type: str, world_size: int, dtype: Precision) -> bool:
    """Returns whether the inference ops run the model, and not the training model with a cache."""
    # On CUDA without decode kernels the training model's large products are faster, where it has the precision.
    on_products = device_type == "cuda" and dtype != "int8" and not uses_cuda_kernel("decoding")
    return world_size == 1 and not on_products


def check_cuda_limits(config: PretrainConfig, serving: Serving) -> None:
    """Raises ConfigError for a model that the CUDA decode kernels do not take (kernels/cuda/launchers.h)."""
    other = "; MEGATRON_SAMOE_CUDA_KERNELS=0 decodes by torch's ops"
    if config.model.head_dim > MAX_CUDA_HEAD_DIM:
        raise ConfigError("kv_channels", config.model.head_dim, f"may be {MAX_CUDA_HEAD_DIM} on a GPU{other}")
    if serving == "on-the-fly" and config.moe.num_expert_banks > MAX_CUDA_BANKS:
        raise ConfigError(
            "serving",
            serving,
            f"combines {config.moe.num_expert_banks} banks, and may {MAX_CUDA_BANKS} on a GPU{other}",
        )


def _cache_slots(wanted: int | None, loaded: LoadedModel) -> int:
    least = max(len(combined_layers(loaded.config)), 1)
    if wanted is None:
        return default_cache_experts(loaded.config)
    if wanted < least:
        raise ConfigError("cache_experts", wanted, f"must be {least} or more, one for each layer that combines experts")
    return wanted


def _check_sizes(max_batch: int, max_tokens: int | None, max_step_tokens: int) -> None:
    for name, value, least in (
        ("max_batch", max_batch, 1),
        ("max_tokens", max_tokens, PAGE),
        ("max_step_tokens", max_step_tokens, 1),
    ):
        if value is not None and (not math.isfinite(value) or value < least):
            raise ConfigError(name, value, f"must be {least} or more")
