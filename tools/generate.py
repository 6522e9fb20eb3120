#!/usr/bin/env python3
"""Prints text that follows a prompt: `generate.py --load runs/quickstart/samoe/checkpoints --prompt "Emma was"`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_samoe.errors import MegatronSamoeError
from megatron_samoe.inference.generate import generate_text
from megatron_samoe.inference.load import load_model
from megatron_samoe.parallel_state import single_process_state


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
    options = parser.parse_args()
    try:
        loaded = load_model(options.load, single_process_state(), ckpt_step=options.ckpt_step)
        text = generate_text(
            loaded, options.prompt, options.max_new_tokens, temperature=options.temperature, top_k=options.top_k,
            seed=options.seed,
        )  # fmt: skip
    except MegatronSamoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    print(options.prompt + text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
