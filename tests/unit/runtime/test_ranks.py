"""GPUs that a job cannot use are told before it starts. What torch says of GPUs is made up here."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import pytest
import torch

from megatron_samoe.config import ParallelConfig
from megatron_samoe.errors import ConfigError
from megatron_samoe.ops import extension
from megatron_samoe.parallel_state import backend
from megatron_samoe.runtime.ranks import check_gpu, has_code
from tests.harness.tables import table

TABLE = table(__file__)

T4, H100 = (7, 5), (9, 0)
GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """Makes torch tell of GPUs of a capability, of what it holds code for, and of what our kernels are compiled for."""

    def make(capability: tuple[int, int], archs: list[str], kernels: list[str] | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Example")
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: archs)
        monkeypatch.setenv(extension.CUDA_ENVIRONMENT_VARIABLE, "auto" if kernels is None else "1")
        monkeypatch.setattr(extension, "has_cuda_kernels", lambda: kernels is not None)
        monkeypatch.setattr(extension, "build_info", lambda: {"cuda_archs": kernels})
        extension._asked_for.cache_clear()

    yield make
    extension._asked_for.cache_clear()


@pytest.mark.parametrize(("archs", "capability", "runs"), TABLE["code"])
def test_code_runs_where_nvidia_says(archs: list[str], capability: tuple[int, int], runs: bool) -> None:
    assert has_code(archs, capability) == runs


def test_a_gpu_that_fits_is_taken(gpu) -> None:
    gpu(H100, ["sm_80", "sm_90"], ["8.0", "9.0+PTX"])
    check_gpu(GPU, bf16=True)
    gpu((12, 0), ["sm_120"], ["8.0", "9.0+PTX"])
    check_gpu(GPU, bf16=True)
    check_gpu(torch.device("cpu"), bf16=True)


def test_bf16_needs_a_gpu_that_has_it(gpu) -> None:
    gpu(T4, ["sm_75"])
    check_gpu(GPU)
    with pytest.raises(ConfigError, match=r"--bf16.*needs .* 8.0 .* 7.5.*--fp16") as caught:
        check_gpu(GPU, bf16=True)
    assert not caught.value.collective  # other ranks may have other GPUs, so each says it


def test_a_torch_without_code_for_the_gpu_is_refused(gpu) -> None:
    gpu(T4, ["sm_80", "sm_90"])
    with pytest.raises(ConfigError, match=r"no code for NVIDIA Example .* 7.5.*sm_80, sm_90"):
        check_gpu(GPU)


def test_kernels_that_were_compiled_for_others_are_refused(gpu) -> None:
    gpu((12, 0), ["sm_120"], ["8.0", "9.0"])
    with pytest.raises(ConfigError, match=r"CUDA_KERNELS = '?1'?: .*for 8.0, 9.0 and not .*ARCH_LIST='8.0;9.0;12.0'"):
        check_gpu(GPU)
    gpu((12, 0), ["sm_120"])
    check_gpu(GPU)  # torch does the work


def _choose(monkeypatch: pytest.MonkeyPatch, wanted: str, num_gpus: int, problem: str = "", local_rank: int = 0):
    def init() -> None:
        if problem:
            raise RuntimeError(problem)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_rank + 1))
    return backend.choose_device(ParallelConfig(distributed_backend=wanted))


def test_fewer_gpus_than_ranks_are_an_error_of_the_ranks_without(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _choose(monkeypatch, "auto", 4, local_rank=3) == torch.device("cuda", 3)
    with pytest.raises(ConfigError, match=r"--nproc-per-node = '5'.* 4 CUDA devices .*gloo") as caught:
        _choose(monkeypatch, "auto", 4, local_rank=4)
    assert not caught.value.collective
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(ConfigError, match=r"the 2 CUDA devices of this host that CUDA_VISIBLE_DEVICES = 0,1 shows"):
        _choose(monkeypatch, "nccl", 2, local_rank=2)


OLD = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by downloading and "
    "installing a new version from the URL: http://www.example.com"
)


@pytest.mark.parametrize("wanted", ["auto", "nccl"])
def test_a_driver_that_is_too_old_is_named_and_no_reason_to_train_on_the_cpu(monkeypatch, wanted: str) -> None:
    with pytest.raises(ConfigError, match=r"driver = '?11.4'?: is older than CUDA 13.0, .*newer driver.*gloo"):
        _choose(monkeypatch, wanted, 0, OLD)
    assert _choose(monkeypatch, "gloo", 0, OLD) == torch.device("cpu")


def test_nccl_without_a_gpu_says_what_torch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    no_driver = "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU"
    assert _choose(monkeypatch, "auto", 0, no_driver) == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"needs a CUDA device; .*Found no NVIDIA driver on your system\."):
        _choose(monkeypatch, "nccl", 0, no_driver)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match=r"torch sees no GPU, with CUDA_VISIBLE_DEVICES = ''"):
        _choose(monkeypatch, "nccl", 0)


def test_launch_order_is_the_programs_where_our_exchange_shares_gpus_with_torchs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backend.dist, "init_process_group", lambda *args, **kwargs: None)
    monkeypatch.setattr(backend.dist.distributed_c10d, "_set_pg_timeout", lambda _: None)
    others: Any = (None, None, 0, 2, timedelta(minutes=1))
    for chosen, device, order in (
        ("torch", GPU, None),
        ("extension", torch.device("cpu"), None),
        ("extension", GPU, "1"),
    ):
        monkeypatch.delenv("NCCL_LAUNCH_ORDER_IMPLICIT", raising=False)
        backend._connect(ParallelConfig(moe_all_to_all_backend=chosen), device, *others)
        assert os.environ.get("NCCL_LAUNCH_ORDER_IMPLICIT") == order
    monkeypatch.setenv("NCCL_LAUNCH_ORDER_IMPLICIT", "0")
    backend._connect(ParallelConfig(moe_all_to_all_backend="extension"), GPU, *others)
    assert os.environ["NCCL_LAUNCH_ORDER_IMPLICIT"] == "0"
