"""What hosts of a job must have alike."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

from megatron_samoe.config.data import DataConfig
from megatron_samoe.errors import ConfigError
from megatron_samoe.parallel_state.meeting import Meeting
from megatron_samoe.training.machine import alike_facts
from tests.harness.program import write_corpus
from tests.harness.tiny import tiny_config


def facts(data: DataConfig | None = None, **options: object) -> dict[str, str]:
    config = tiny_config(**options)
    return alike_facts(replace(config, data=data) if data else config, torch.device("cpu"))


def test_a_difference_of_options_data_and_environment_is_one_fact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataConfig(data_path=(str(write_corpus(tmp_path / "corpus")),))
    usual = facts(data)
    assert facts(data) == usual
    assert facts(replace(data, data_cache_path="/local")) == usual, "a folder of the host"

    def changed(others: dict[str, str]) -> set[str]:
        return {name for name in usual.keys() | others.keys() if usual.get(name) != others.get(name)}

    assert changed(facts(data, lr=0.5)) == {"--lr"}
    monkeypatch.setenv("MEGATRON_SAMOE_BF16_PRODUCTS", "widened")
    assert changed(facts(data)) == {"MEGATRON_SAMOE_BF16_PRODUCTS"}
    monkeypatch.delenv("MEGATRON_SAMOE_BF16_PRODUCTS")
    with open(tmp_path / "corpus.bin", "r+b") as file:
        file.write(b"\7")
    assert changed(facts(data)) == {f"{tmp_path / 'corpus'}.bin"}
    (tmp_path / "corpus.idx").unlink()
    assert facts(data)[f"{tmp_path / 'corpus'}.idx"] == "No such file or directory"


def test_all_ranks_hear_which_host_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: dict[int, str] = {}
    stores = HashStore(), HashStore()

    def one(rank: int) -> None:
        alike, other = (Meeting(store, rank, 3) for store in stores)
        alike.meet(10)
        alike.compare({"torch": "2.13"})
        other.meet(10)
        try:
            other.compare({"torch": "2.13", "--lr": "2" if rank == 2 else "1", **({"x": "y"} if rank == 1 else {})})
        except ConfigError as error:
            heard[rank] = str(error)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(heard) == 3 and len(set(heard.values())) == 1
    assert "--lr = '2 on " in heard[0] and "(rank 2)': must be alike on all hosts, and is 1 on" in heard[0]
    assert "x = 'y on " in heard[0] and "is missing on" in heard[0]
