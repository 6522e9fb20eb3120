"""What all tests share: threads that wait do not spin for long, so that tests beside other work take seconds, not minutes;
parts of a long run, which go on where they ended; and no success where nothing ran.
"""

from __future__ import annotations

import gc
import os
import random
import zlib
from pathlib import Path

import pytest

from megatron_samoe.start import SPINS

os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
# A worker process has a core; tests of several threads ask for them.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", default="1/1", metavar="I/N", help="run the I-th of N parts of the tests")
    parser.addoption(
        "--resume", type=Path, metavar="FILE", help="leave out the tests that a file says have passed, and add to it"
    )
    parser.addoption(
        "--shuffle", type=int, metavar="SEED", help="run the files, and the tests of each file, in a random order"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    index, _, count = config.getoption("--shard").partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise pytest.UsageError(f"--shard {index}/{count}: must be I/N with I from 1 to N, such as 2/4")
    passed, seed = passed_before(config), config.getoption("--shuffle")

    def is_mine(item: pytest.Item) -> bool:
        """Tests of one file stay together, or of one layout where processes train for all tests of a layout."""
        parameters = getattr(item, "callspec", None)
        part = f"{item.nodeid.partition('::')[0]} {parameters.params.get('layout', '') if parameters else ''}"
        return zlib.crc32(part.encode()) % int(count) == int(index) - 1 and item.nodeid not in passed

    config.hook.pytest_deselected(items=[item for item in items if not is_mine(item)])
    items[:] = filter(is_mine, items)
    if seed is not None:
        items.sort(
            key=lambda i: [random.Random(f"{seed} {n}").random() for n in (i.nodeid.partition("::")[0], i.nodeid)]
        )


class Passed:
    """Writes down what passes, and makes tests that were all left out no success, unless an earlier run passed them.

    With several worker processes it is the first one's, which hears of all.
    """

    def __init__(self, config: pytest.Config):
        self.file: Path | None = config.getoption("--resume")
        self.before = len(passed_before(config))
        self.any = False

    def pytest_report_header(self, config: pytest.Config) -> str:
        seed = config.getoption("--shuffle")
        order = "" if seed is None else f", in the order of --shuffle {seed}"
        return f"part {config.getoption('--shard')} of the tests{order}; {self.before} have passed before"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" or not report.passed:
            return
        self.any = True
        if self.file:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a") as log:
                log.write(report.nodeid + "\n")

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if session.config.option.collectonly:
            return
        if exitstatus == pytest.ExitCode.OK and not self.any:
            session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
        if session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.before:
            session.exitstatus = pytest.ExitCode.OK


def passed_before(config: pytest.Config) -> set[str]:
    """Returns the tests that the file of --resume says have passed."""
    file: Path | None = config.getoption("--resume")
    return set(file.read_text().splitlines()) if file and file.exists() else set()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Garbage collections pass over what was loaded for all tests: each would take half a second."""
    gc.collect()
    gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Passed(config))
