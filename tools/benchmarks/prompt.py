"""Time to the first token of a prompt, beside as many FLOPs in torch's own matrix products in the same run."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_samoe.planning.accounting import forward_flops_per_token
from tools.benchmarks.contestants import Contestant, Pair, checkpoint_model, started
from tools.benchmarks.decode import Decode
from tools.benchmarks.harness import Row, Rows, Times, medians_of, seconds_of

#: Rows and size of the square matrix of the product that others are compared with.
PRODUCT = (512, 2048)


@dataclass(frozen=True, kw_only=True)
class Prompt(Decode):
    """time to the first token of long prompts, beside torch's products and other programs

    "of fp32 product" is the speed over that of torch's product of 512 x 2,048 by 2,048 x 2,048 in fp32, for as many FLOPs as
    the prompt has, attention included; "of bf16 product" the same in bf16. Other columns and options are `decode`'s.
    """

    name = "prompt"

    batch_sizes: tuple[int, ...] = (1,)
    prompt_lengths: tuple[int, ...] = (512, 2048)
    new_tokens: int = 2
    context: int = 2064
    work_dir: Path = Path("runs/benchmark_prompt")

    def save(self, rows: Rows, found: Row) -> None:
        self.write_json(rows)

    def _rows(self, contestants: Sequence[Contestant], first_checkpoint: Path) -> Rows:
        seconds: dict[tuple[str, Pair], list[float]] = {}
        times: Times = {"fp32": [], "bf16": []}
        num, size = PRODUCT
        operands = {
            name: (torch.randn(num, size).to(dtype), torch.randn(size, size).to(dtype))
            for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
        }
        with started(contestants) as workers:
            torch.set_num_threads(workers[0].spec["threads"])
            for pair, worker, result in self.measure(workers):
                seconds.setdefault((worker.name, pair), []).append(result["first_s"])
                for name, (x, w) in operands.items():
                    times[name].append(statistics.mean(seconds_of(lambda x=x, w=w: x @ w.t()) for _ in range(8)))  # type: ignore[misc]
        rates = {name: 2.0 * num * size * size / s for name, s in medians_of(times).items()}
        config, vocab = checkpoint_model(first_checkpoint)
        rows = []
        for pair, worker in itertools.product(self.pairs, workers):
            model = replace(config.model, seq_length=pair[1])
            head = 2.0 * model.hidden_size * vocab
            flops = pair[0] * (pair[1] * (forward_flops_per_token(replace(config, model=model), vocab) - head) + head)
            median = statistics.median(seconds[worker.name, pair])
            speeds = {f"of {name} product": round(flops / median / rate, 2) for name, rate in rates.items()}
            who = {"dtype": worker.spec["dtype"], "contestant": worker.name, "version": worker.facts["version"]}
            rows.append({**who, "prompt": pair[1], "batch": pair[0], "first_ms": round(median * 1e3, 1), **speeds})
        return rows
