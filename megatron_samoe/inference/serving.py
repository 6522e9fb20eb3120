"""How a model's experts are kept for inference, what each way takes, and which one fits: arithmetic on sizes.

A SaMoE's layer l uses W[l, e] = sum_b A[l, b] T[b, e]. *folded*: all W are made once and kept, as a plain MoE would. *on
the fly*: the banks T are kept, and the weights of the experts that tokens chose are combined when needed, into a cache of
bounded size. *selected*: where every layer's A takes one bank only, its experts are those of that bank, at most scaled.
Other layers' experts are always kept as the checkpoint has them: those of their own, and each set that layers share once.
"""

from __future__ import annotations

from typing import Literal

import torch

from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.errors import ConfigError, in_units
from megatron_samoe.models.layer_layout import LayerSpec, all_layers
from megatron_samoe.models.rank_model import RankModel
from megatron_samoe.moe.scores import score_of
from megatron_samoe.moe.sharing.selected import one_bank
from megatron_samoe.moe.sharing.way import Banks
from megatron_samoe.ops.decode_parts import PAGE

#: auto: selected where one bank serves each layer, else folded where it fits into memory, else on the fly.
Serving = Literal["auto", "folded", "on-the-fly", "selected"]
#: Of weights. int8 is weight-only: rows with a scale each.
Precision = Literal["fp32", "bf16", "int8"]
SERVINGS: tuple[Serving, ...] = ("auto", "folded", "on-the-fly", "selected")
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "int8")
#: Precisions that the training model computes in.
COMPUTE_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
WEIGHT_BYTES: dict[str, int] = {"fp32": 4, "bf16": 2, "int8": 1}


def precision_of(model: RankModel) -> Precision:
    """Returns the precision in which a model is served by default: its own, or fp32 for fp16."""
    return "bf16" if model.dtype == torch.bfloat16 else "fp32"


def cache_bytes(model: RankModel, dtype: Precision, num_pages: int) -> int:
    """Returns the memory of a key-value cache of `num_pages` pages, on this rank."""
    positions = num_pages * PAGE * sum(len(chunk.layers) for chunk in model.chunks)
    return positions * model.config.model.cached_numbers(model.state.tp.size) * (4 if dtype == "fp32" else 2)


def needed_bytes(model: RankModel, dtype: Precision, cache_experts: int, num_pages: int) -> dict[Serving, int]:
    """Returns the memory that each way of serving takes on this rank in addition to the loaded model; scales of int8 aside.

    Args:
        cache_experts: slots for experts combined on the fly.
        num_pages: of the key-value cache.
    """
    config, width = model.config, WEIGHT_BYTES[dtype]

    def kept(banks: Banks) -> int:
        # Weights that stay as they are take nothing.
        return 0 if dtype == "fp32" and not banks.is_sharded else width * banks.bank_numel

    own = {id(p) for p in ([] if model.expert_pool is None else model.expert_pool.parameters())}
    others = sum(p.numel() for p in model.parameters() if id(p) not in own)
    converted = 0 if precision_of(model) == dtype and model.dtype != torch.float16 else width * others
    uses = [(model.sources[layer.moe.moe_index], model.mixture(layer.moe)) for layer in model.moe_layers()]
    sets = {source: m.banks for source, m in uses if source.way.is_shared and not m.combines}
    converted += sum(map(kept, sets.values()))
    cache = cache_bytes(model, dtype, num_pages)
    if not config.moe.has_pool:
        return {"folded": converted + cache}
    pools = [
        (m.banks, layer.moe.shape.num_experts // model.state.ep.size)
        for layer, (_, m) in zip(model.moe_layers(), uses, strict=True)
        if m.combines
    ]
    banks = config.moe.num_expert_banks * max((kept(pool) for pool, _ in pools), default=0)
    expert = max((pool.bank_numel // experts for pool, experts in pools), default=0)
    return {
        "folded": converted + cache + width * sum(pool.bank_numel for pool, _ in pools),
        "on-the-fly": converted + cache + banks + width * cache_experts * expert,
        "selected": converted + cache + banks,
    }


def default_cache_experts(config: PretrainConfig) -> int:
    """Returns the experts that an on-the-fly cache holds by default: for each combined layer those of two tokens, or all."""
    of_two = 2 * score_of(config.moe).topk
    return sum(min(place.num_experts, of_two) for place in combined_layers(config))


def combined_layers(config: PretrainConfig) -> list[LayerSpec]:
    """Returns the layers that combine a pool of banks."""
    return [place for place in all_layers(config) if place.source is not None and place.source.way.combines]


def choose_serving(serving: Serving, model: RankModel, needed: dict[Serving, int], free_bytes: int) -> Serving:
    """Returns the way to serve, before anything is allocated; all ranks call it together and get the same.

    Args:
        needed: new memory that each way takes; see `needed_bytes`.

    Raises:
        ConfigError: the model has no such way, or it takes more memory than is free; the message names one that fits.
    """
    has_pool = model.config.moe.has_pool
    if not has_pool and serving not in ("auto", "folded"):
        raise ConfigError(
            "serving",
            serving,
            f"the checkpoint is a {model.config.moe.expert_layout} model without a shared pool of experts; its only way "
            "is folded",
        )
    mixtures = [model.mixture(layer.moe) for layer in model.moe_layers()]
    takes_one = all(one_bank(m.a_2GP) is not None for m in mixtures if m.combines and m.a_2GP is not None)
    facts = model.state.world.all_gather_object((needed, free_bytes, takes_one))
    needed = {way: max(others[way] for others, _, _ in facts) for way in needed}
    free_bytes = min(free for _, free, _ in facts)
    ways: list[Serving] = ["folded", "on-the-fly"] if has_pool else ["folded"]
    if has_pool and all(one for _, _, one in facts):
        ways.insert(0, "selected")
    elif serving == "selected":
        raise ConfigError(
            "serving",
            serving,
            "some layer of the checkpoint combines several banks, so there is no one bank to select; its ways are folded "
            "and on-the-fly, and `megatron-samoe edit select` makes a checkpoint that can be served so",
        )
    fitting = [way for way in ways if needed[way] <= free_bytes]
    if serving == "auto" and fitting:
        return fitting[0]
    if serving in fitting:
        return serving
    asked = ways[0] if serving == "auto" else serving
    others = "".join(f"; {way} takes {in_units(needed[way], 'B')}" for way in ways if way != asked)
    advice = f"{fitting[0]} fits" if fitting else "none fits; a smaller precision, max_batch or max_tokens takes less"
    raise ConfigError(
        "serving",
        serving,
        f"{asked} experts and the key-value cache take {in_units(needed[asked], 'B')} more memory and "
        f"{in_units(max(free_bytes, 0), 'B')} are free{others}; {advice}",
    )
