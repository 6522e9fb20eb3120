"""Begins a project: `megatron-samoe init NAME` makes a folder with a configuration that explains itself, a JSON schema by
which editors check and complete it, and a script for Slurm.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_samoe.cli.arguments import Words, adder, program, text_parser
from megatron_samoe.config.schema import explained_yaml, json_schema
from megatron_samoe.errors import ConfigError, DataError

#: What the configuration shows: values, and None for options that are there to be found, with their defaults.
SHOWN: Mapping[str, Mapping[str, Any]] = {
    "model": {"num_layers": 12, "hidden_size": 512, "num_attention_heads": 8, "seq_length": 512,
              "position_embedding_type": "rope", "swiglu": True, "normalization": "RMSNorm", "disable_bias_linear": True},
    "moe": {"expert_layout": "samoe", "num_experts": 16, "num_expert_banks": 4, "moe_router_topk": None, "expert_sharing": None,
            "moe_aux_loss_coeff": None},
    "parallel": {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "expert_model_parallel_size": 1,
                 "use_distributed_optimizer": None, "elastic": None},
    "training": {"micro_batch_size": 4, "global_batch_size": 32, "train_iters": 1000, "eval_interval": 250, "eval_iters": 20,
                 "bf16": None, "recompute_granularity": None},
    "optimizer": {"lr": 1e-3, "min_lr": 1e-4, "lr_warmup_iters": 100, "weight_decay": 0.1},
    "data": {"data_path": ["data/corpus_text_document"], "split": "95,5,0", "tokenizer_type": "HuggingFaceTokenizer",
             "tokenizer_model": "data/tokenizer.json"},
    "checkpoint": {"save_interval": 250, "keep_last": 2},
    "logging": {"run_dir": "runs/first", "log_interval": 10, "moe_per_layer_logging": None},
}  # fmt: skip
HEAD = """# yaml-language-server: $schema=schema.json
# Text to a dataset, and training. All options: megatron-samoe pretrain --help.
#   megatron-samoe train-tokenizer --type byte-bpe --input text.txt --vocab-size 8192 --output-prefix data/tokenizer
#   megatron-samoe preprocess --input text.txt --tokenizer-type HuggingFaceTokenizer --tokenizer-model data/tokenizer.json \\
#     --append-eod --output-prefix data/corpus
#   megatron-samoe pretrain --config config.yaml              one process
#   torchrun --nproc-per-node 8 -m megatron_samoe pretrain --config config.yaml
"""
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
HEAD_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=0 torchrun --nnodes "1:$SLURM_NNODES" --nproc-per-node 8 --max-restarts 100 \\
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$HEAD_NODE:29500" \\
    -m megatron_samoe pretrain --config config.yaml --elastic "$@"
"""


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = text_parser(__doc__)
    adder(parser)("name", Path, "folder to make", metavar="NAME")
    return parser


@program
def main(words: Words) -> None:
    """Runs the command."""
    folder = make_parser().parse_args(words).name
    if folder.exists():
        raise ConfigError("NAME", str(folder), "is there already; give another")
    try:
        (folder / "data").mkdir(parents=True)
        (folder / "schema.json").write_text(json.dumps(json_schema(), indent=1) + "\n", encoding="utf-8")
        (folder / "config.yaml").write_text(HEAD + explained_yaml(SHOWN), encoding="utf-8")
        (folder / "pretrain.slurm").write_text(SLURM.format(name=folder.name), encoding="utf-8")
    except OSError as error:
        raise DataError(f"{folder} cannot be made: {error.strerror or error}") from None
    print(f"{folder}: config.yaml (begin there), schema.json, pretrain.slurm")


if __name__ == "__main__":
    sys.exit(main())
