"""The shared experts of one rank: banks, sharded or unsharded."""

from __future__ import annotations

import torch
from torch import nn

from megatron_samoe.moe.experts import ExpertShape
from megatron_samoe.moe.sharing.bank_store import BankStore, meta_state, shard_bank
from megatron_samoe.moe.sharing.way import SharingContext
from megatron_samoe.ops.grouped_mlp import ExpertWeights

FP32_BYTES = 4


class ExpertPool(nn.Module):
    """P banks of E experts each: `bank.w1` is [P, e, F, H] (or [P, e, 2, F, H]), and so on.

    Of banks that several ranks would hold each holds a slice only, unless --samoe-pool-placement is replicated. Banks are
    fp32 whatever the compute dtype: they are their own master weights.

    Args:
        on_one_stage: whether only layers of this pipeline stage use the banks; else all stages hold them.
    """

    def __init__(self, context: SharingContext, shape: ExpertShape, num_banks: int, on_one_stage: bool = False):
        super().__init__()
        config, state = context.config, context.state
        holders = state.group("edp") if on_one_stage else state.pool_dp
        self.is_sharded = config.samoe_pool_placement == "sharded" and holders.size > 1
        dtype = torch.promote_types(context.dtype, torch.float32)
        made_for = meta_state(state) if self.is_sharded else state
        banks = shape.parameters(num_banks, made_for, dtype, on_one_stage)
        if self.is_sharded:
            banks = {name: shard_bank(bank, state) for name, bank in banks.items()}
        self.bank = nn.ParameterDict(banks)
        self.stores = {name: BankStore(bank, state) for name, bank in banks.items()}
        self.activation = shape.activation
        groups = shape.num_experts // state.ep.size if config.samoe_granularity == "expert" else 1
        #: [G, P] of a layer's coefficients on this rank.
        self.coefficient_shape = (groups, num_banks)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of unsharded banks, by name."""
        return {name: store.shape for name, store in self.stores.items()}

    def unsharded(self) -> ExpertWeights:
        """Returns the banks [P, e, ...]; holders of slices call it together."""
        return ExpertWeights(**{name: store.unsharded() for name, store in self.stores.items()})

    @property
    def bank_numel(self) -> int:
        """Elements of one unsharded bank, all tensors together."""
        return sum(store.num_elements for store in self.stores.values())

    def sent(self, times: float) -> dict[str, float]:
        """Returns the elements that holders of slices exchange where each is moved a number of times, by their group."""
        sent: dict[str, float] = {}
        for store in self.stores.values() if self.is_sharded else ():
            sent[store.group.name] = sent.get(store.group.name, 0.0) + times * store.numel
        return sent
