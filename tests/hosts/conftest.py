"""Jobs on hosts that are not there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.program import arguments, losses, start, write_corpus
from tests.hosts.cluster import Cluster, missing_means
from tests.hosts.job import OPTIONS, STEPS


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """An empty cluster, whose shared folder has a corpus."""
    if missing := missing_means():
        pytest.skip(missing)
    with Cluster(tmp_path / "cluster") as found:
        write_corpus(found.shared / "data" / "corpus")
        yield found


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of one process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    corpus = write_corpus(folder / "data" / "corpus")
    start(arguments(data_path=corpus, run_dir=folder / "run", **OPTIONS), folder).succeed()
    found = losses(folder / "run" / "metrics.jsonl")
    assert len(found) == STEPS
    return found
