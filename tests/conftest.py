"""What all tests share: threads that wait do not spin for long, so that tests beside other work take seconds, not minutes;
parts of a long run, which go on where they ended; and no success where nothing ran.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import pytest

from megatron_samoe.start import SPINS

os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", default="1/1", metavar="I/N", help="run the I-th of N parts of the tests")
    parser.addoption(
        "--resume", type=Path, metavar="FILE", help="leave out the tests that a file says have passed, and add to it"
    )


def _part_of(item: pytest.Item) -> str:
    """Returns what must stay together: tests of one file, of one layout where processes train for all tests of a layout."""
    parameters = getattr(item, "callspec", None)
    layout = parameters.params.get("layout", "") if parameters else ""
    return f"{item.nodeid.partition('::')[0]} {layout}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    index, _, count = config.getoption("--shard").partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise pytest.UsageError(f"--shard {index}/{count}: must be I/N with I from 1 to N, such as 2/4")
    file = config.getoption("--resume")
    passed = set(file.read_text().splitlines()) if file and file.exists() else set()
    mine = [
        i for i in items if zlib.crc32(_part_of(i).encode()) % int(count) == int(index) - 1 and i.nodeid not in passed
    ]
    chosen = set(mine)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = mine
    config.stash[_GOES_ON] = len(passed)


_GOES_ON = pytest.StashKey[int]()
_RAN = pytest.StashKey[bool]()


def pytest_report_collectionfinish(config: pytest.Config) -> str:
    return f"part {config.getoption('--shard')}; {config.stash[_GOES_ON]} tests passed before"


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    if call.when == "call" and call.excinfo is None:
        item.config.stash[_RAN] = True
        file = item.config.getoption("--resume")
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a") as log:
                log.write(item.nodeid + "\n")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Tests that were all left out are no success, unless an earlier run passed them."""
    config = session.config
    ran = config.stash.get(_RAN, False) or config.stash.get(_GOES_ON, 0)
    if exitstatus == pytest.ExitCode.OK and not ran and not config.option.collectonly:
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
