"""Errors meant for users: each message is one paragraph that says what is wrong and what is allowed."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import reprlib
import signal
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from megatron_samoe.installation import install_extra


class MegatronSamoeError(Exception):
    """Base of every error that a command shows without a traceback.

    Args:
        collective: every rank raises the same error, so that one of them is enough to show it.
    """

    exit_status = 1
    #: Whether every attempt has the same fault, so that a launcher should not try again.
    permanent = False
    #: Whether a permanent fault of this rank is one of the job.
    ends_job = True

    def __init__(self, message: str, collective: bool = False):
        super().__init__(message)
        self.collective = collective


class ConfigError(MegatronSamoeError):
    """A configuration is not legal.

    Args:
        field: flag or key that is wrong, as the user writes it.
        value: the value it has.
        allowed: what would be accepted.
        collective: as of every error; False where other ranks may have what this one lacks.
    """

    exit_status = 2
    permanent = True

    def __init__(self, field: str, value: object, allowed: str, collective: bool = True):
        self.field, self.value, self.allowed = field, value, allowed
        super().__init__(f"{field} = {shown(value)}: {allowed}", collective)

    def of_file(self, path: object) -> ConfigError:
        """Returns the error with the file in front whose content is wrong."""
        # A field that begins with the file's name is shown without the folder.
        field = self.field.removeprefix(f"{os.path.basename(str(path))}: ")
        return ConfigError(f"{path}: {field}", self.value, self.allowed)


class UnknownFlagError(ConfigError):
    """A flag that this program does not have."""

    def __init__(self, flag: str, what: str):
        super().__init__(flag, None, what)
        self.args = (f"{flag} {what}",)


class ConfigErrors(ConfigError):
    """Several rules are broken at once; all are shown, after what they have in common."""

    def __init__(self, errors: list[ConfigError], common: str = "the configuration breaks several rules:"):
        assert errors
        self.errors = errors
        first = errors[0]
        super().__init__(first.field, first.value, first.allowed)
        self.args = ("\n  ".join([common, *map(str, errors)]),) if len(errors) > 1 else first.args

    def of_file(self, path: object) -> ConfigError:
        """Returns the errors with the file in front of each."""
        return ConfigErrors([error.of_file(path) for error in self.errors])


@contextlib.contextmanager
def naming_file(path: object) -> Iterator[None]:
    """Lets ConfigErrors name the file whose content is wrong."""
    try:
        yield
    except ConfigError as error:
        raise error.of_file(path) from None


class HostDiffersError(ConfigErrors):
    """This host differs from those of an elastic job, which continues without it."""

    ends_job = False

    def __init__(self, errors: list[ConfigError], common: str = ""):
        super().__init__(errors, common)
        self.args = (f"{self}; the job continues without this host",)


class DataError(MegatronSamoeError):
    """A corpus, dataset or tokenizer is missing, damaged or does not fit."""

    permanent = True


class CheckpointError(MegatronSamoeError):
    """A checkpoint is missing, damaged, or of another model."""


class NonFiniteLossError(MegatronSamoeError):
    """A loss or gradient of training is not a number."""

    permanent = True


class ReplicaDriftError(MegatronSamoeError):
    """Ranks that should hold equal weights do not."""

    permanent = True


class CommunicationError(MegatronSamoeError):
    """Ranks could not exchange data: a peer died, timed out or disagrees."""


class JobEndedError(CommunicationError):
    """Another rank had a permanent fault, and ended the job."""

    permanent = True


class HostsLeftError(MegatronSamoeError):
    """Other ranks of the job were signalled to leave, and this one was not."""


class ToldToLeaveError(MegatronSamoeError):
    """This rank got SIGTERM, to leave a job whose other hosts may continue."""

    exit_status = 128 + signal.SIGTERM


class HostRefusedError(MegatronSamoeError):
    """A host cannot take part in an elastic job, and this one continues without it."""


class ExtensionError(MegatronSamoeError):
    """The compiled extension was demanded and is not usable."""

    permanent = True


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 300
_short.maxlong = 60
_short.maxlist = _short.maxtuple = _short.maxdict = _short.maxset = 20
_short.maxlevel = 3


def shown(value: object) -> str:
    """Returns a value as Python writes it, cut where it is long: a message must not be as large as what it refuses."""
    try:
        return _short.repr(value)[:1000]
    except ValueError:  # an integer of more digits than Python writes
        return f"a {type(value).__name__} of very many digits"


def in_units(value: float, unit: str) -> str:
    """Returns a number of a unit as a reader takes it in: three digits, with the prefix that leaves one to three before the point."""
    for power, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * power:  # which would be 1e+03 of the next
            return f"{value / power:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def readable(name: str) -> str:
    """Returns a name from a file as it can be printed: control characters escaped, and cut where it is long."""
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name[:300])
    return escaped if len(name) <= 200 else f"{escaped[:200]}... ({len(name):,} characters)"


def some(names: Sequence[str]) -> str:
    """Returns the first few of many names."""
    rest = len(names) - 3
    return ", ".join(names[:3]) + (f" and {rest} more" if rest > 0 else "")


def is_odd_name(name: object) -> bool:
    """Returns whether a tensor of a file has a name that cannot be shown as it is, and that no model's tensor has."""
    return not isinstance(name, str) or not name.isprintable() or len(name) > 300


def optional_import(module: str, extra: str, what: str) -> Any:
    """Returns a module of an extra of this package; DataError where it is not installed, by the name of what needs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise DataError(f"{what} needs the package {package}: {install_extra(extra)}.") from error


def nearest_file(path: str) -> str:
    """Returns what `nearest` says of a missing path, by the files of its folder."""
    folder = os.path.dirname(path) or "."
    return nearest(os.path.basename(path), os.listdir(folder) if os.path.isdir(folder) else [])


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" for the closest allowed name, or an empty string."""
    # A text as long as a file would be compared for hours.
    match = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.65) if len(name) <= 300 else []
    return f" Did you mean {match[0]!r}?" if match else ""
