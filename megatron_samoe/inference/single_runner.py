"""Steps of a whole model in one process, by the inference ops: each needed weight is read once, and nothing is allocated.

On a CPU with the compiled extension a step is one call of a plan, but where something happens between the layers: experts
are combined on the fly, many tokens take products of whole matrices, or somebody observes. Those run block by block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_samoe.inference.decode_layers import DecodeLayer, DecodeModel, Mixed
from megatron_samoe.inference.expert_cache import ExpertCache
from megatron_samoe.inference.kv_cache import StepBatch
from megatron_samoe.ops import decode, extension
from megatron_samoe.ops.attention import soft_capped
from megatron_samoe.ops.cpu_products import product_tokens
from megatron_samoe.ops.decode import Routed
from megatron_samoe.ops.decode_parts import ExpertStack, Places
from megatron_samoe.ops.decode_plan import DecodePlan


class SingleRunner:
    """Runs a model over buffers made at the start; their results are valid until the next step.

    Args:
        max_tokens: most tokens of a step.
        max_logits: most tokens of a step whose logits are wanted.
        cache_experts: slots of the cache, where experts are combined on the fly.
    """

    def __init__(self, model: DecodeModel, max_tokens: int, max_logits: int, cache_experts: int):
        self._model = model
        vocab, hidden = model.words.data.shape
        self.device = model.words.data.device
        banks = {i: layer.experts for i, layer in enumerate(model.layers) if isinstance(layer.experts, Mixed)}
        #: Experts combined on the fly; None for other ways of serving.
        self.expert_cache = ExpertCache(banks, cache_experts) if banks else None
        #: Called with each MoE layer's index and ids_TK, for counts; such steps route twice.
        self.observer: Callable[[int, Tensor], None] | None = None
        topk = max([1, *(layer.routing.topk for layer in model.layers if layer.routing is not None)])

        def floats(*shape: int) -> Tensor:
            return torch.empty(shape, device=self.device)

        self._x_TH, self._normed_TH = floats(max_tokens, hidden), floats(max_tokens, hidden)
        self._ids = torch.empty(max_tokens * topk, dtype=torch.int64, device=self.device)
        self._probs, self._y = floats(max_tokens * topk), floats(max_tokens * topk * hidden)
        self._ones, self._mixed = torch.ones(max_tokens, device=self.device), floats(max_tokens)
        self._last_NH, self._logits_NV = floats(max_logits, hidden), floats(max_logits, vocab)
        self._rows = torch.empty(max_logits, dtype=torch.int64)
        self._scratch = floats(max(_scratch_of(layer, max_tokens, hidden) for layer in model.layers))
        # Rows of the embedding as they are stored, where that is not fp32.
        kind = model.words.data.dtype
        self._words = None if kind == torch.float32 else torch.empty(max_tokens, hidden, dtype=kind, device=self.device)
        self._scales = floats(max_tokens)
        self._plan = _make_plan(model, self._x_TH, self._scratch, max_logits)
        reason = "as there are no kernels for plans on this device"
        if banks:
            reason = "as experts are combined on the fly"
        elif not all(layer.attention.is_plain for layer in model.layers):
            reason = "as the kernels have no windows, sinks, soft caps, clipping, other scales or norms of all heads"
        elif any(layer.routing is not None and layer.routing.shared_gate_1H is not None for layer in model.layers):
            reason = "as the kernels have no gates of shared experts"
        self.steps = "by a plan" if self._plan is not None else f"layer by layer, {reason}"

    @torch.no_grad()
    def run(self, batch: StepBatch) -> Tensor:
        """See `Runner.run`."""
        model, count = self._model, batch.num_tokens
        assert count <= self._x_TH.shape[0] and len(batch.logit_rows) <= self._rows.shape[0]
        places = Places(batch.positions_T, batch.slots_T, batch.pages, model.cos_PR, model.sin_PR)
        num = len(batch.logit_rows)
        rows_N, logits_NV = self._rows[:num], self._logits_NV[:num]
        rows_N.numpy()[:] = batch.logit_rows
        takes_products = count >= product_tokens(model.output.data.dtype)
        if self._plan is not None and self.observer is None and not takes_products:
            self._plan.step(batch.tokens_T, places, rows_N, logits_NV)
            return soft_capped(logits_NV, model.logit_cap)
        x_TH = self._x_TH[:count]
        self._embed(batch, x_TH)
        for index, layer in enumerate(model.layers):
            decode.attention_block(x_TH, layer.attention, places, self._scratch)
            if self.observer is not None and layer.routing is not None:
                self.observer(index, self._route(layer, x_TH).ids_TK)
            if _is_one_block(layer):
                assert isinstance(layer.experts, ExpertStack)
                decode.mlp_block(x_TH, layer.mlp_norm, layer.routing, layer.experts, self._scratch)
            else:
                self._experts(index, layer, x_TH)
        return self._head(rows_N, x_TH, logits_NV)

    def _embed(self, batch: StepBatch, x_TH: Tensor) -> None:
        words = self._model.words
        if self._words is None:
            torch.index_select(words.data, 0, batch.tokens_T, out=x_TH)
        else:
            rows = self._words[: batch.num_tokens]
            torch.index_select(words.data, 0, batch.tokens_T, out=rows)
            x_TH.copy_(rows)
        if words.scale is not None:
            scales = self._scales[: batch.num_tokens]
            torch.index_select(words.scale, 0, batch.tokens_T, out=scales)
            x_TH.mul_(scales[:, None])
        if self._model.positions is not None:
            # The norms' buffer is free until the first layer.
            rows = self._normed_TH[: batch.num_tokens]
            torch.index_select(self._model.positions, 0, batch.positions_T, out=rows)
            x_TH.add_(rows)

    def _experts(self, index: int, layer: DecodeLayer, x_TH: Tensor) -> None:
        """Adds routed experts and a shared MLP, which both take the stream as it was before."""
        count, hidden = x_TH.shape
        routed = self._route(layer, x_TH)
        topk = routed.ids_TK.shape[1]
        y_TKH = self._y[: count * topk * hidden].view(count, topk, hidden)
        if isinstance(layer.experts, ExpertStack):
            decode.experts_block(routed, layer.experts, y_TKH, x_TH, self._scratch)
        else:
            assert self.expert_cache is not None
            self.expert_cache.run(index, routed, y_TKH, x_TH, self._scratch)
        if layer.shared is not None:
            ids_T1 = self._ids[:count].view(count, 1).zero_()
            r = layer.routing
            is_weighed = r is not None and (r.mixing is not None or r.shared_gate_1H is not None)
            probs_T1 = (self._mixed if is_weighed else self._ones)[:count].view(count, 1)
            alone = Routed(routed.normed_TH, ids_T1, probs_T1)
            y_T1H = self._y[: count * hidden].view(count, 1, hidden)
            decode.experts_block(alone, layer.shared, y_T1H, x_TH, self._scratch)

    def _route(self, layer: DecodeLayer, x_TH: Tensor) -> Routed:
        count = x_TH.shape[0]
        topk = 1 if layer.routing is None else layer.routing.topk
        ids_TK, probs_TK = (t[: count * topk].view(count, topk) for t in (self._ids, self._probs))
        routed = Routed(self._normed_TH[:count], ids_TK, probs_TK, self._mixed[:count])
        decode.route(x_TH, layer.mlp_norm, layer.routing, routed, self._scratch)
        return routed

    def _head(self, rows_N: Tensor, x_TH: Tensor, logits_NV: Tensor) -> Tensor:
        num = len(rows_N)
        if num:
            last_NH = self._last_NH[:num]
            torch.index_select(x_TH, 0, rows_N.to(self.device), out=last_NH)
            normed_NH = decode.norm(last_NH, self._model.final_norm, self._normed_TH[:num])
            decode.linear(normed_NH, self._model.output, None, logits_NV)
        return soft_capped(logits_NV, self._model.logit_cap).cpu()


def _make_plan(model: DecodeModel, x_TH: Tensor, scratch: Tensor, max_logits: int) -> DecodePlan | None:
    """Returns a plan of the model's steps; None where it cannot be: no kernels, or experts that are combined on the fly."""
    if not extension.serves(x_TH):
        return None
    plan = DecodePlan(
        model.words,
        model.positions,
        model.output,
        model.final_norm,
        model.cos_PR,
        model.sin_PR,
        x_TH,
        scratch,
        max_logits,
    )
    for layer in model.layers:
        has_gate = layer.routing is not None and layer.routing.shared_gate_1H is not None
        if isinstance(layer.experts, Mixed) or not layer.attention.is_plain or has_gate:
            return None
        plan.add_layer(layer.attention, layer.mlp_norm, layer.routing, layer.experts, layer.shared)
    return plan


def _is_one_block(layer: DecodeLayer) -> bool:
    return (
        isinstance(layer.experts, ExpertStack)
        and layer.shared is None
        and (layer.routing is None or layer.routing.is_plain)
    )


def _scratch_of(layer: DecodeLayer, max_tokens: int, hidden: int) -> int:
    """Returns the floats that a layer's blocks need."""
    sizes = [decode.attention_scratch(max_tokens, layer.attention)]
    for stack, routing in ((layer.experts, layer.routing), (layer.shared, None)):
        if stack is None:
            continue
        w2 = stack.w2 if isinstance(stack, ExpertStack) else stack.stack.w2
        num_experts = 1 if routing is None else routing.weight_EH.shape[0]
        topk = 1 if routing is None else routing.topk
        sizes.append(decode.mlp_scratch(max_tokens, hidden, w2.data.shape[-1], topk, num_experts))
    return max(sizes)
