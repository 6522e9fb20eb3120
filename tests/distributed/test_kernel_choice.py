"""CUDA kernels and host waits of a run over ranks: CPU tensors stand for a GPU's. Verdicts on kernels are given; waits are counted as
in tests/unit/moe.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_samoe.cli import pretrain
from megatron_samoe.dist_checkpointing import store
from megatron_samoe.ops import cpu_products, extension
from megatron_samoe.ops.extension import TRAINING_KERNELS
from megatron_samoe.parallel_state import initialize_model_parallel
from megatron_samoe.runtime import kernels
from tests.harness.host_waits import as_if_asynchronous
from tests.harness.pairs import first_by_day
from tests.harness.ranks import run_ranks
from tests.harness.tiny import tiny_config, with_layout
from tests.harness.wait_figures import Figures, figures

pytestmark = pytest.mark.distributed

FLAGS = (
    "--mock-data --num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --lr 1e-3 "
    "--tokenizer-type ByteTokenizer --micro-batch-size 2 --train-iters 2 --num-threads 1"
).split()


def chosen_on_rank(problem_of_rank_1: str) -> list[str]:
    parallel = initialize_model_parallel(with_layout(tiny_config("moe"), ep=2).parallel)
    with as_if_asynchronous(), pytest.MonkeyPatch.context() as patch:
        patch.delenv(extension.CUDA_ENVIRONMENT_VARIABLE, raising=False)
        patch.delenv("LOCAL_RANK", raising=False)  # each rank is the first of a host
        patch.setattr(extension, "has_cuda_kernels", lambda: True)
        own = {k: problem_of_rank_1 if parallel.rank == 1 and k == "rows" else "" for k in TRAINING_KERNELS}
        patch.setattr(kernels, "compare", lambda *_: own)
        kernels.choose_kernels(parallel, None)
        return list(extension.cuda_kernels_in_use())


def test_all_ranks_use_the_same_kernels() -> None:
    agreed = [k for k in TRAINING_KERNELS if k != "rows"]
    assert run_ranks(chosen_on_rank, 2, "it differs") == [agreed, agreed]


def test_a_run_records_its_kernels_and_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first half finds that rows differ; the second finds no fault, and leaves rows to torch all the same."""
    monkeypatch.delenv(extension.CUDA_ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(extension, "has_cuda_kernels", lambda: True)
    verdicts: dict[Any, str] = dict.fromkeys(TRAINING_KERNELS, "")
    monkeypatch.setattr(kernels, "compare", lambda *_: dict(verdicts))
    flags = [*FLAGS, "--run-dir", str(tmp_path)]
    used = []
    with as_if_asynchronous():
        for problem, more in (("it differs", ["--exit-interval", "1"]), ("", [])):
            verdicts["rows"] = problem
            assert pretrain.main([*flags, *more]) == 0
            used.append(extension.cuda_kernels_in_use())
    extension.trust(())
    assert used == [[k for k in TRAINING_KERNELS if k != "rows"]] * 2
    last = store.read_train_state(tmp_path / "checkpoints" / "iter_0000002")
    assert last["cuda_kernels"] == used[0]


def products_on_rank() -> str | None:
    parallel = initialize_model_parallel(with_layout(tiny_config("moe"), ep=2).parallel)
    old = cpu_products.Processor("GenuineIntel", frozenset({"avx2", "avx512f"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(cpu_products.VARIABLE, raising=False)
        new = cpu_products.Processor("GenuineIntel", old.features | {"amx_tile", "amx_bf16"})
        patch.setattr(cpu_products, "this_processor", lambda: old if parallel.rank else new)
        kernels.choose_products(parallel, None)
        row = cpu_products.in_use()
        return None if row is None else row.bf16


@pytest.mark.skipif(not extension.available(), reason="the compiled extension is not built")
def test_all_ranks_multiply_alike() -> None:
    """Of two machines one has tiles."""
    assert run_ranks(products_on_rank, 2) == ["fp32", "fp32"]


@pytest.mark.skipif(not extension.available(), reason="the compiled extension is not built")
def test_a_run_records_how_it_multiplies_and_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first half is asked for products in fp32, the second for nothing."""
    flags = [*FLAGS, "--run-dir", str(tmp_path)]
    try:
        monkeypatch.setenv(cpu_products.VARIABLE, "fp32")
        assert pretrain.main([*flags, "--exit-interval", "1"]) == 0
        monkeypatch.delenv(cpu_products.VARIABLE)
        cpu_products.use()
        assert pretrain.main(flags) == 0
        row = cpu_products.in_use()
        assert row is not None and row.bf16 == "fp32"
    finally:
        monkeypatch.delenv(cpu_products.VARIABLE, raising=False)
        cpu_products.use()
    assert store.read_train_state(tmp_path / "checkpoints" / "iter_0000002")["bf16_products"] == "fp32"


def on_rank(world: int, cases: list[tuple[str, str, dict[str, Any]]]) -> list[Figures]:
    return [figures(way, style, world=world, **options) for way, style, options in cases]


@pytest.mark.parametrize("world", first_by_day([2, 4]))
def test_a_layer_waits_once_for_the_sizes_of_messages(world: int) -> None:
    """A rank's own are 4 / world of the four micro-batches of a step."""
    capacity: dict[str, Any] = {"moe_expert_capacity_factor": 1.0}
    ways = ("moe", "samoe", "samoe layer", "tied", "pool")
    cases = [(way, "gelu", capacity if i % 2 else {}) for i, way in enumerate(ways)]
    cases += [(way, "swiglu", {} if i % 2 else capacity) for i, way in enumerate(ways)]
    cases += [("moe", "swiglu", {"moe_shared_expert_intermediate_size": 16})]
    cases += [("samoe", "gelu", {"moe_dispatch_chunks": 2, "samoe_combine": "step"})] if world == 2 else []
    for found in run_ranks(on_rank, world, world, cases):
        for case, each in zip(cases, found, strict=True):
            assert each.totals == (1, 0, 4 * (4 // world) + 1), (case, each)
