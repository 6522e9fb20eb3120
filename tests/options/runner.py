"""Runs tests with one option ignored, each in a fork of a process that has everything imported.

It reads lines of JSON, an option and a test, and writes for each how the test ended, why, and the values that were ignored.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import tempfile
from typing import Any

import pytest

from megatron_samoe.config import PretrainConfig
from tests.harness.ranks import RankFailure
from tests.options.plant import IGNORED, LOG, plant

LIMIT_S = 240


class _Outcome:
    """What pytest reports of a test: passed, failed by an assertion, broke by another error, or skipped."""

    outcome, said = "not run", ""

    def pytest_exception_interact(self, call: pytest.CallInfo[Any], report: pytest.TestReport) -> None:
        if isinstance(report, pytest.TestReport) and call.excinfo is not None:
            self.said = str(report.longrepr)[-2000:]
            self.outcome = "failed" if _is_judged(call.excinfo) else "broke"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped or (report.when == "call" and self.outcome == "not run"):
            self.outcome = report.outcome


def _is_judged(error: pytest.ExceptionInfo[BaseException]) -> bool:
    """Returns whether a test said that something is wrong. A refusal of the default, or sizes that do not fit any more, say
    nothing of what the option does."""
    if error.errisinstance(RankFailure):
        return "AssertionError" in str(error.value)
    in_program = "megatron_samoe" in error.traceback[-1].path.parts[-4:]
    return error.errisinstance((AssertionError, pytest.fail.Exception)) and not in_program


def ended(option: str, test: str) -> dict[str, Any]:
    """Returns how a test ends where the program reads the option's default."""
    # Imported once, not in each fork.
    importlib.import_module(test.partition(".py")[0].replace("/", "."))
    with tempfile.TemporaryDirectory() as folder:
        log, result = f"{folder}/values", f"{folder}/result"
        child = os.fork()
        if child == 0:
            os.setsid()
            signal.alarm(LIMIT_S)
            os.environ |= {IGNORED: option, LOG: log}
            plant(PretrainConfig)
            os.dup2(os.open(f"{folder}/output", os.O_WRONLY | os.O_CREAT), 1)
            outcome = _Outcome()
            pytest.main(["-q", "-n0", "-pno:cacheprovider", test], plugins=[outcome])
            with open(result, "w", encoding="utf-8") as file:
                json.dump([outcome.outcome, outcome.said], file)
            os._exit(0)
        os.waitpid(child, 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what a test left behind
        said, values = ["hangs", ""], list[str]()
        with contextlib.suppress(FileNotFoundError), open(result, encoding="utf-8") as file:
            said = json.load(file)
        with contextlib.suppress(FileNotFoundError), open(log, encoding="utf-8") as file:
            values = sorted({*file.read().splitlines()})
    return {"outcome": said[0], "said": said[1], "values": values}


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for line in sys.stdin:
        answers.write(json.dumps(ended(*json.loads(line))) + "\n")
