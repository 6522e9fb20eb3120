"""Published runs as configurations of this program: `python -m tools.planner.rows 12 > run.yaml` writes that of row 12.

`megatron-samoe plan --config run.yaml --world-size N` plans it. speeds.csv names each row's source; models.yaml has the architectures.
"""

from __future__ import annotations

import csv
import sys
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from megatron_samoe.config.cli import from_mapping
from megatron_samoe.config.derived import uneven_layout
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.errors import ConfigError

HERE = Path(__file__).parent
#: Columns that hold whole numbers, and columns that a row cannot be without.
COUNTS = ("gpus", "gbs", "mbs", "seq", "tp", "pp", "cp", "vp", "ep", "fsdp")
#: Bytes that operations of Megatron-Core's experts move for each element of a row, where no kernel fuses them: the bias after the
#: last product, scaled by the token's weight in fp32 or bf16, of hidden size (`TEGroupedMLP._apply_bias`); and the clamp before
#: GPT-OSS's activation, of the experts' width (`weighted_bias_quick_geglu_impl`). Forwards and backwards, every operand and result
#: of each of PyTorch's operations once: a copy reads and writes, a comparison writes one byte.
BIAS_FP32, BIAS_BF16, CLAMP, CLAMP_FORWARDS = 28 + 40, 12 + 16, 16 + 30, 16
NEEDED = ("source", "version", "date", "model", "gpu", "precision", "tokens_per_s", *COUNTS)


@dataclass(frozen=True)
class Row:
    """A published run; the fields are the columns of speeds.csv.

    Attributes:
        number: of the row in the file, from 1.
        features: words: mtp, a layer of multi-token prediction; moe_act, experts' activations are recomputed; and the keys of
            `not_modelled` in families.yaml.
        tokens_per_s: of one GPU.
        tflops: model TFLOP/s of one GPU, by the page's own count, or None.
    """

    number: int
    source: str
    version: str
    date: str
    model: str
    gpu: str
    gpus: int
    precision: str
    gbs: int
    mbs: int
    seq: int
    tp: int
    pp: int
    cp: int
    vp: int
    ep: int
    fsdp: int
    graphs: str
    dispatcher: str
    recompute: str
    features: str
    tokens_per_s: float
    tflops: float | None

    @property
    def family(self) -> str | None:
        """The model's family; None where models.yaml has no such architecture."""
        if self.model not in models():
            return None
        known = [*families()["fit"], *families()["held_out"]]
        return next(family for family in known if self.model.startswith(family))

    @property
    def is_moe(self) -> bool:
        """Whether the model has experts."""
        return "moe" in models().get(self.model, {"moe": None})

    @property
    def overlaps_experts(self) -> bool:
        """Whether the run's recipe overlaps the exchanges of expert parallelism."""
        return any(
            all(word in f"{self.model} {self.gpu} {self.version}" for word in rule.split())
            for rule in families()["overlap"]
        )

    @property
    def expert_row_bytes(self) -> float:
        """Bytes that biases and clamps of experts move for each row of an expert; steps that are one graph have fused experts."""
        model = models()[self.model]
        if not model.get("clamps_experts") or self.graphs == "full":
            return 0.0
        # DeepEP and HybridEP return weights of tokens in fp32; the other dispatcher in the router's bf16.
        bias = BIAS_FP32 if self.dispatcher == "flex" else BIAS_BF16
        clamp = CLAMP + (CLAMP_FORWARDS if "moe_act" in self.features.split() else 0)
        return float(bias * model["model"]["hidden_size"] + clamp * model["moe"]["moe_ffn_hidden_size"])

    @property
    def not_modelled(self) -> str | None:
        """Why the model of time has no words for the run: a key of families.yaml; None where it has."""
        if self.model not in models():
            return "architecture"
        if self.fsdp:
            return "fsdp"
        if self.precision == "nvfp4":
            return "nvfp4"
        return next((word for word in ("drops", "regression") if word in self.features.split()), None)


@lru_cache(maxsize=1)
def models() -> dict[str, Any]:
    """Returns the architectures by name."""
    loaded: dict[str, Any] = yaml.safe_load((HERE / "models.yaml").read_text())["models"]
    return loaded


@lru_cache(maxsize=1)
def families() -> dict[str, Any]:
    """Returns what families.yaml says: families to fit and to judge by, and why rows are not modelled."""
    loaded: dict[str, Any] = yaml.safe_load((HERE / "families.yaml").read_text())
    return loaded


def read_rows(path: Path = HERE / "speeds.csv") -> list[Row]:
    """Returns the published runs; ConfigError names a row and column that lacks a value or has an impossible one."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return [_row(number, cells) for number, cells in enumerate(csv.DictReader(lines), 1)]


def _row(number: int, cells: dict[str, str]) -> Row:
    for name in NEEDED:
        if not cells.get(name):
            raise ConfigError(name, "", f"is missing in row {number} of the published runs ({cells.get('model', '')})")
    values: dict[str, Any] = {f.name: cells.get(f.name, "") for f in fields(Row)}
    for name in (*COUNTS, "tokens_per_s", "tflops"):
        try:
            values[name] = (int if name in COUNTS else float)(cells[name]) if cells[name] else None
        except ValueError:
            raise ConfigError(name, cells[name], f"must be a number in row {number} of the published runs") from None
    return Row(**{**values, "number": number})


def config_of(row: Row) -> PretrainConfig:
    """Returns a run's configuration."""
    return from_mapping(mapping_of(row), f"row {row.number} of the published runs")


def mapping_of(row: Row) -> dict[str, dict[str, Any]]:
    """Returns the options of a run, by group. A multi-token prediction layer counts as one more layer, without its second
    head."""
    described = models()[row.model]
    moe = {**described["moe"]} if row.is_moe else {}
    model = {**described["model"], "seq_length": row.seq}
    if "mtp" in row.features.split():
        model["num_layers"] += 1
        if "moe_layer_freq" in moe:
            moe["moe_layer_freq"] += "+[1]"
    training = {"bf16": True, "micro_batch_size": row.mbs, "global_batch_size": row.gbs}
    return {
        "model": model,
        **({"moe": moe} if row.is_moe else {}),
        "data": {"mock_data": True, "vocab_size": described["vocab_size"]},
        "training": training | ({"recompute_granularity": row.recompute} if row.recompute else {}),
        **({"optimizer": {"optimizer": "muon", "muon_ns_dtype": "bf16"}} if row.model == "Kimi-K2" else {}),
        "parallel": {
            "tensor_model_parallel_size": row.tp,
            "sequence_parallel": row.tp > 1,
            "pipeline_model_parallel_size": row.pp,
            "context_parallel_size": row.cp,
            "use_distributed_optimizer": True,
            "overlap_grad_reduce": True,
            **({"expert_model_parallel_size": row.ep, "expert_tensor_parallel_size": 1} if row.is_moe else {}),
            **_chunks(row, model["num_layers"]),
        },
    }


def _chunks(row: Row, num_layers: int) -> dict[str, Any]:
    """Returns how the layers are cut into chunks."""
    chunks = row.pp * row.vp
    if chunks == 1:
        return {}
    if num_layers % chunks:
        return {"pipeline_model_parallel_layout": uneven_layout(num_layers, chunks)}
    return {"num_layers_per_virtual_pipeline_stage": num_layers // chunks} if row.vp > 1 else {}


def main(words: list[str]) -> int:
    """Prints the configuration of the row with a number."""
    rows = read_rows()
    number = int(words[0]) if len(words) == 1 and words[0].isdigit() else 0
    if not 0 < number <= len(rows):
        print(f"error: give the number of a row, 1 to {len(rows)}", file=sys.stderr)
        return 2
    row = rows[number - 1]
    if row.model not in models():
        print(f"error: row {number} is {row.model}, which this program does not train", file=sys.stderr)
        return 2
    print(f"# {row.model} on {row.gpus} {row.gpu}: {row.source} {row.version}, {row.date}")
    print(yaml.safe_dump(mapping_of(row), sort_keys=False))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
