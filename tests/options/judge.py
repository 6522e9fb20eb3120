"""Plugin of pytest that says how a test has ended, for `python -m tests.options`: `pytest -p tests.options.judge TEST`.

The last line is @@ and passed, failed (by an assertion), broke (by another error) or skipped.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.harness.ranks import RankFailure

_outcomes: list[str] = []


def pytest_exception_interact(call: pytest.CallInfo[Any], report: pytest.TestReport) -> None:
    if isinstance(report, pytest.TestReport) and call.excinfo is not None:
        _outcomes.append("failed" if _is_judged(call.excinfo) else "broke")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped or (report.when == "call" and report.passed):
        _outcomes.append(report.outcome)


def pytest_unconfigure() -> None:
    print(f"@@{_outcomes[0] if _outcomes else 'not run'}")


def _is_judged(error: pytest.ExceptionInfo[BaseException]) -> bool:
    """Returns whether a test said that something is wrong. A refusal of the default, or sizes that do not fit any more, say
    nothing of what the option does."""
    if error.errisinstance(RankFailure):
        return "AssertionError" in str(error.value)
    in_program = "megatron_samoe" in error.traceback[-1].path.parts[-4:]
    return error.errisinstance((AssertionError, pytest.fail.Exception)) and not in_program
