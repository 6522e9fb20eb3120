"""Begins a project: a folder with a configuration that explains itself, its schema, and a script for Slurm."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from megatron_samoe.cli.program import program
from megatron_samoe.config.schema import explained_yaml, json_schema
from megatron_samoe.datasets.bin_readers import is_remote
from megatron_samoe.datasets.preprocess.inputs import find_inputs
from megatron_samoe.datasets.preprocess.options import PreprocessOptions
from megatron_samoe.errors import ConfigError, DataError, nearest
from megatron_samoe.installation import checkout

#: What the configuration shows: values, and None for options that are there to be found, with their defaults.
#: Layout and optimizer are the best of docs/results.
SHOWN: Mapping[str, Mapping[str, Any]] = {
    "model": {
        "num_layers": 12,
        "hidden_size": 512,
        "num_attention_heads": 8,
        "seq_length": 512,
        "position_embedding_type": "rope",
        "swiglu": True,
        "normalization": "RMSNorm",
        "disable_bias_linear": True,
    },
    "moe": {
        "expert_layout": "moe",
        "num_experts": 16,
        "num_expert_banks": 4,
        "moe_router_topk": None,
        "expert_sharing": None,
        "moe_aux_loss_coeff": None,
    },
    "parallel": {
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "use_distributed_optimizer": None,
        "elastic": None,
    },
    "training": {
        "micro_batch_size": 4,
        "global_batch_size": 32,
        "train_iters": 1000,
        "eval_interval": 250,
        "eval_iters": 20,
        "bf16": None,
        "recompute_granularity": None,
    },
    "optimizer": {"optimizer": "muon", "lr": 1e-3, "min_lr": 1e-4, "lr_warmup_fraction": 0.1, "weight_decay": 0.1},
    "data": {
        "data_path": ["data/corpus_text_document"],
        "split": "95,5,0",
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": "data/tokenizer.json",
    },
    "checkpoint": {"save_interval": 250, "keep_last": 2},
    "logging": {"run_dir": "runs/first", "log_interval": 10, "moe_per_layer_logging": True},
}
HEAD = "# yaml-language-server: $schema=schema.json\n"
#: What differs where the text is small: a model that two cores train in minutes.
SMALL: Mapping[str, Mapping[str, Any]] = {
    "model": {"num_layers": 6, "hidden_size": 128, "num_attention_heads": 4, "seq_length": 128},
    "moe": {"num_experts": 8, "num_expert_banks": 2},
    "training": {"micro_batch_size": 16, "global_batch_size": 16, "train_iters": 400, "eval_interval": 200},
    "optimizer": {"lr": 3e-3, "min_lr": 3e-4},
    "checkpoint": {"save_interval": 100},
}
#: Up to how many bytes a text is small, and how many it needs, so that what is held out of it holds samples.
SMALL_BYTES, LEAST_BYTES = 50_000_000, 50_000
COMMANDS = """megatron-samoe train-tokenizer --type byte-bpe --input {text} --vocab-size {vocab_size} --output-prefix data/tokenizer
megatron-samoe preprocess --input {text} {cut}--tokenizer-type HuggingFaceTokenizer \\
  --tokenizer-model data/tokenizer.json --append-eod --output-prefix data/corpus
megatron-samoe pretrain --config config.yaml
megatron-samoe generate --load runs/first --prompt "It was"
megatron-samoe serve --load runs/first
"""
CUT = "--document-kb {} "
COMMENT = """# From text to a model that answers. All options: megatron-samoe pretrain --help.
{commands}# On two ranks: torchrun --nproc-per-node 2 -m megatron_samoe pretrain --config config.yaml --micro-batch-size {each}
"""
SLURM_RANKS = 16
SLURM = """#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --signal=TERM@300
#SBATCH --requeue
# One torchrun agent on each node. Before its time is up the job saves, leaves, and is queued again.
set -euo pipefail
HEAD_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
srun --kill-on-bad-exit=0 torchrun --nnodes "1:$SLURM_NNODES" --nproc-per-node "${{SLURM_GPUS_ON_NODE:-8}}" --max-restarts 100 \\
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$HEAD_NODE:29400" \\
    -m megatron_samoe pretrain --config config.yaml --elastic --micro-batch-size {each} "$@"
"""


def examples() -> dict[str, Path]:
    """Returns the examples by name: configurations of models, and studies."""
    root = checkout()
    # A wheel holds them; an editable installation has the repository's.
    folder = root / "examples" if root is not None else Path(__file__).with_name("examples")
    return {path.stem: path for kind in ("configs", "studies") for path in sorted((folder / kind).glob("*.yaml"))}


def _is_small(text_bytes: int | None) -> bool:
    return text_bytes is not None and text_bytes < SMALL_BYTES


def _shown(expert_layout: str, text_bytes: int | None) -> Mapping[str, Mapping[str, Any]]:
    small = SMALL if _is_small(text_bytes) else {}
    shown = {group: {**values, **small.get(group, {})} for group, values in SHOWN.items()}
    if text_bytes is not None:
        # No more than what is held out, a twentieth at some four bytes a token, once.
        samples = text_bytes // 20 // 4 // shown["model"]["seq_length"]
        most = max(samples // shown["training"]["global_batch_size"], 1)
        shown["training"]["eval_iters"] = min(shown["training"]["eval_iters"], most)
    shown["moe"]["expert_layout"] = expert_layout
    if expert_layout != "samoe":
        del shown["moe"]["num_expert_banks"]
    if expert_layout == "dense":
        shown["moe"] = {"expert_layout": "dense"}
        del shown["logging"]["moe_per_layer_logging"]
    return shown


def _commands(text: Sequence[str] | None, folder: Path) -> tuple[str, int | None]:
    """Returns the commands from a text to a served model, as the project's folder runs them, and the text's bytes.

    Args:
        text: inputs as `megatron-samoe preprocess` takes them; None for one that is not known yet.

    Raises:
        DataError: a text is missing or too short.
    """
    if text is None:
        return COMMANDS.format(text="text.txt", cut=CUT.format(2), vocab_size=8192), None
    try:
        files = find_inputs(PreprocessOptions(input=tuple(text), output_prefix="data"))
    except DataError as error:
        raise DataError(str(error).replace("--input", "--text")) from None
    size = sum(file.num_bytes for file in files)
    if size < LEAST_BYTES:
        raise DataError(
            f"--text {' '.join(text)} has {size:,} bytes. A twentieth of a text is held out, so it needs {LEAST_BYTES:,} "
            "at the very least, and some millions to learn words from."
        )
    words = [path if is_remote(path) or os.path.isabs(path) else os.path.relpath(path, folder) for path in text]
    # 200 documents or more, of which a twentieth is held out; pages rather than chapters, and of many places.
    cut = CUT.format(min(max(size // 200 >> 10, 1), 16)) if any(file.format == "text" for file in files) else ""
    return COMMANDS.format(text=shlex.join(words), cut=cut, vocab_size=4096 if _is_small(size) else 8192), size


@dataclass(frozen=True, kw_only=True)
class Init:
    """Begins a project: `megatron-samoe init NAME` makes a folder with a configuration that explains itself, a JSON schema by
    which editors check and complete it, and a script for Slurm.
    """

    name: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="NAME")]
    """folder to make"""
    text: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="FILE [FILE ...]")] = None
    """text to train on: files or folders, in any form that megatron-samoe preprocess reads; size of model and commands are
    made for it"""
    expert_layout: Literal["moe", "samoe", "dense"] | None = None
    """kind of model that the configuration is for; moe if not given"""
    example: Annotated[
        str | None,
        tyro.conf.arg(metavar="EXAMPLE", help=f"copy an example in place of it: {', '.join(examples())}"),
    ] = None

    def run(self) -> None:
        """Makes it."""
        folder = self.name
        if folder.exists():
            raise ConfigError("NAME", str(folder), "is there already; give another")
        if self.example is not None and self.expert_layout is not None:
            raise ConfigError("--expert-layout", self.expert_layout, "is what the example says; leave out --example")
        if self.example is not None and self.text is not None:
            raise ConfigError("--text", " ".join(self.text), "has no meaning with --example")
        commands = ""
        if self.example is None:
            commands, text_bytes = _commands(self.text, folder)
            shown = _shown(self.expert_layout or SHOWN["moe"]["expert_layout"], text_bytes)
            batch, micro_batch = (shown["training"][f"{kind}_batch_size"] for kind in ("global", "micro"))
            listed = "".join(f"#   {line}\n" for line in commands.splitlines())
            comment = COMMENT.format(commands=listed, each=micro_batch // 2)
            files = {
                "config.yaml": HEAD + comment + explained_yaml(shown),
                "pretrain.slurm": SLURM.format(name=folder.name, each=batch // SLURM_RANKS),
            }
        else:
            files = _example(self.example)
        if "config.yaml" in files:
            files["schema.json"] = json.dumps(json_schema(), indent=1) + "\n"
        try:
            (folder / "data").mkdir(parents=True)
            for name, text in files.items():
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise DataError(f"{folder} cannot be made: {error.strerror or error}") from None
        first, *others = files
        print(f"{folder}: {first} (begin there), {', '.join(others)}")
        if self.text:
            print(f"\nFrom the text to a model that answers:\n\ncd {shlex.quote(str(folder))}\n{commands}", end="")


def _example(name: str) -> dict[str, str]:
    """Returns the files of an example by their names in the project; a study comes with the configuration that it varies."""
    known = examples()
    if name not in known:
        raise ConfigError("--example", name, f"is not known.{nearest(name, known)} There are {', '.join(known)}")
    text = known[name].read_text(encoding="utf-8")
    if known[name].parent.name != "studies":
        return {"config.yaml": HEAD + text}
    (line,) = re.findall(r"^config: .*$", text, re.MULTILINE)
    varied = (known[name].parent / line.removeprefix("config: ")).resolve()
    if not varied.exists():  # the package's own, which a study names by its place in the repository
        varied = Path(__file__).resolve().parents[1] / line.rpartition("megatron_samoe/")[2]
    return {
        f"studies/{name}.yaml": text.replace(line, f"config: ../configs/{varied.name}"),
        f"configs/{varied.name}": varied.read_text(encoding="utf-8"),
    }


main = program(Init)

if __name__ == "__main__":
    sys.exit(main())
