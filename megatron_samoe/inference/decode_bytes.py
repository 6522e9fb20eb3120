"""Bytes that a decoding step must read, by which its time is bound: arithmetic on a configuration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.inference.serving import WEIGHT_BYTES, Precision, Serving
from megatron_samoe.models.layer_layout import LayerSpec
from megatron_samoe.planning.accounting import count_parameters
from megatron_samoe.planning.description import unsharded_model


def expected_distinct_experts(num_experts: int, topk: float, num_tokens: int) -> float:
    """Returns the expected number of experts that some of the tokens choose, each token K of E evenly and independently.

    An expert is missed by a token with probability 1 - K / E, so by all of B with its B-th power.
    """
    return num_experts * (1.0 - (1.0 - topk / num_experts) ** num_tokens)


def _layers_of_one_set(places: Iterable[LayerSpec]) -> Iterator[list[LayerSpec]]:
    """Yields the MoE layers, those together that follow each other directly and use one set."""
    run: list[LayerSpec] = []
    for place in (place for place in places if place.source is not None):
        assert place.source is not None
        shares = place.source.way.in_sets and run and run[-1].source == place.source
        if run and not (shares and run[-1].index + 1 == place.index):
            yield run
            run = []
        run.append(place)
    if run:
        yield run


@dataclass(frozen=True)
class StepBytes:
    """The bytes that one step of a batch reads: experts, all other weights, and the key-value cache."""

    experts: float
    others: float
    cache: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.experts + self.others + self.cache


def step_bytes(
    config: PretrainConfig,
    vocab_size: int,
    batch: int,
    context: float,
    serving: Serving,
    dtype: Precision,
    distinct: float | None = None,
) -> StepBytes:
    """Returns the bytes of one token for each of `batch` sequences; each needed weight counts once, also where layers that
    follow each other use one set.

    Args:
        context: mean number of positions that a token attends to.
        serving: on-the-fly reads P banks for each expert of combined layers, as if none were in its cache.
        distinct: experts hit per MoE layer, as counted; `expected_distinct_experts` if not given.
    """
    model, moe, width = config.model, config.moe, WEIGHT_BYTES[dtype]
    whole = unsharded_model(config, vocab_size)
    count, expert_bytes, routers = count_parameters(config, vocab_size), 0.0, 0
    for run in _layers_of_one_set(whole.layers()):
        layer, num_experts = whole.description.layer(run[0]).moe, run[0].num_experts
        per_layer = sum(
            p.numel() for part in (layer.router, layer.mixing) if part is not None for p in part.parameters()
        )
        routers += len(run) * per_layer
        hit = (
            expected_distinct_experts(num_experts, layer.router.experts_per_token, batch)
            if distinct is None
            else distinct
        )
        # Layers choose independently, so their union follows as for tokens.
        hit = expected_distinct_experts(num_experts, hit, len(run))
        combines = run[0].source is not None and run[0].source.way.combines
        banks = moe.num_expert_banks if serving == "on-the-fly" and combines else 1
        scales = 4 * layer.shape.matrix_rows if dtype == "int8" else 0
        expert_bytes += hit * banks * (width * layer.shape.expert_parameters + scales)
    # A row of the embedding is read for each token, the whole of it only as the output matrix.
    tables = vocab_size * model.hidden_size if model.untie_embeddings_and_output_weights else 0
    if model.position_embedding_type == "learned_absolute":
        tables += model.max_positions * model.hidden_size
    others = width * (count.total - count.expert - tables - routers) + 4 * routers
    kept = 4 if dtype == "fp32" else 2
    seen = sum(min(context, model.window_of(layer) or context) for layer in range(model.num_layers))
    cache = batch * seen * model.cached_numbers() * kept
    return StepBytes(expert_bytes, others, cache)
