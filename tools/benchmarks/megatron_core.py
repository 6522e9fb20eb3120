"""Training steps of Megatron-Core with experts that layers share, beside its own experts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from tools.benchmarks.harness import ProcessBenchmark, Rows, in_turn, medians_of, ratios_of_rounds

OWN = "Megatron-Core's own experts"
SHARED: dict[str, tuple[str, dict[str, Any]]] = {
    "2 banks, combined once a step": ("combined", {"num_expert_banks": 2}),
    "2 banks, combined in each layer": ("combined", {"num_expert_banks": 2, "samoe_combine": "layer"}),
    "one set for all layers": ("tied", {}),
    "own experts of the plug-in": ("own", {}),
}


@dataclass(frozen=True, kw_only=True)
class MegatronCore(ProcessBenchmark):
    """steps of Megatron-Core on a CPU, its device calls replaced: its own experts and shared ones in turn"""

    name = "megatron-core"

    hidden_size: int = 256
    moe_ffn_hidden_size: int = 512
    num_experts: int = 8
    seq_length: int = 256
    """of 8 sequences in 4 micro-batches"""

    def rows(self) -> Rows:
        # The stand-in for the device must come before megatron.core, and only into a process that asks for it.
        from tests.harness.megatron_model import Layout, start
        from tests.harness.megatron_training import Training

        sizes = {"hidden_size": self.hidden_size, "moe_ffn_hidden_size": self.moe_ffn_hidden_size}
        sizes["num_moe_experts"] = self.num_experts
        layout = Layout(length=self.seq_length, options=sizes)
        start(layout)
        trained = {OWN: Training(layout, None, {})} | {
            name: Training(layout, way, options) for name, (way, options) in SHARED.items()
        }
        times = in_turn({name: partial(one.step, 0) for name, one in trained.items()}, self.rounds)
        medians = medians_of(times)
        rows = []
        for name, seconds in medians.items():
            ratios = sorted(ratios_of_rounds(times, OWN, name))
            middle, low, high = (round(ratio, 3) for ratio in (ratios[len(ratios) // 2], ratios[0], ratios[-1]))
            row = {"experts": name, "ms": round(seconds * 1e3, 1), "speed / its own": middle}
            rows.append({**row, "from": low, "to": high})
        return rows
