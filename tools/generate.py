#!/usr/bin/env python3
"""Prints text that follows a prompt: `generate.py --load runs/quickstart/samoe/checkpoints --prompt "Emma was"`.

Under torchrun it spreads the model over the ranks; the checkpoint may have been saved by any other layout.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_samoe.config import ParallelConfig
from megatron_samoe.errors import MegatronSamoeError
from megatron_samoe.inference.generate import generate_text
from megatron_samoe.inference.load import load_model
from megatron_samoe.log import configure_logging
from megatron_samoe.parallel_state import backend, initialize_model_parallel


def main() -> int:
    """Runs the program and returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--load", required=True, help="folder of checkpoints, saved by any layout")
    parser.add_argument("--ckpt-step", type=int, help="iteration; the newest if not given")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most probable token")
    parser.add_argument("--top-k", type=int, default=40, help="0 for all")
    parser.add_argument("--seed", type=int, default=0)
    for size in ("tensor", "pipeline", "expert"):
        parser.add_argument(f"--{size}-model-parallel-size", type=int, default=1, metavar="N")
    options = parser.parse_args()
    configure_logging(int(os.environ.get("RANK", "0")))
    layout = ParallelConfig(
        tensor_model_parallel_size=options.tensor_model_parallel_size,
        pipeline_model_parallel_size=options.pipeline_model_parallel_size,
        expert_model_parallel_size=options.expert_model_parallel_size,
    )
    try:
        device = backend.choose_device(layout)
        backend.set_num_threads(None)
        backend.initialize_distributed(layout, device)
        parallel = initialize_model_parallel(layout, device)
        loaded = load_model(options.load, parallel, layout, ckpt_step=options.ckpt_step)
        text = generate_text(
            loaded, options.prompt, options.max_new_tokens, temperature=options.temperature, top_k=options.top_k,
            seed=options.seed,
        )  # fmt: skip
    except MegatronSamoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    if parallel.rank == 0:
        print(options.prompt + text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
