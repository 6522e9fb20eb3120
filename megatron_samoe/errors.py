"""Errors meant for users: each message is one paragraph that says what is wrong and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MegatronSamoeError(Exception):
    """Base of every error that a command shows without a traceback.

    Args:
        collective: every rank raises the same error, so that one of them is enough to show it.
    """

    exit_status = 1
    #: Whether another attempt can only meet the fault again, so that a launcher should make none.
    permanent = False

    def __init__(self, message: str, collective: bool = False):
        super().__init__(message)
        self.collective = collective


class ConfigError(MegatronSamoeError):
    """A configuration is not legal.

    Args:
        field: flag or key that is wrong, as the user writes it.
        value: the value it has.
        allowed: what would be accepted.
    """

    exit_status = 2
    permanent = True

    def __init__(self, field: str, value: object, allowed: str):
        self.field, self.value, self.allowed = field, value, allowed
        super().__init__(f"{field} = {value!r}: {allowed}", collective=True)


class ConfigErrors(ConfigError):
    """Several rules are broken at once; all are shown."""

    def __init__(self, errors: list[ConfigError]):
        assert errors
        self.errors = errors
        first = errors[0]
        super().__init__(first.field, first.value, first.allowed)
        if len(errors) > 1:
            self.args = ("\n  ".join(["the configuration breaks several rules:", *map(str, errors)]),)


class DataError(MegatronSamoeError):
    """A corpus, dataset or tokenizer is missing, damaged or does not fit."""

    permanent = True


class CheckpointError(MegatronSamoeError):
    """A checkpoint is missing, damaged, or of another model."""


class NonFiniteLossError(MegatronSamoeError):
    """Training met a loss or gradient that is not a number."""

    permanent = True


class ReplicaDriftError(MegatronSamoeError):
    """Ranks that should hold equal weights do not."""

    permanent = True


class CommunicationError(MegatronSamoeError):
    """Ranks could not exchange data: a peer died, timed out or disagrees."""


class JobEndedError(CommunicationError):
    """Another rank met a fault that does not pass, and ended the job."""

    permanent = True


class ExtensionError(MegatronSamoeError):
    """The compiled extension was demanded and is not usable."""

    permanent = True


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" for the closest allowed name, or an empty string."""
    match = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.6)
    return f" Did you mean {match[0]!r}?" if match else ""
