"""Files, YAML and JSON of whoever wrote them: what is wrong with a text is one ValueError of one line, whatever the text,
and what is wrong with a file one OSError with its reason. And what is written for others to read: complete, and legal JSON.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml

#: No file that is read here needs more.
MAX_DEPTH, MAX_VALUES = 100, 1_000_000
MAX_YAML_CHARACTERS, MAX_FILE_BYTES = 1 << 20, 16 << 20
#: Of a text whose fault the slower loader may look for: it takes a second for these.
_EXPLAINED_CHARACTERS = 100_000
#: What constructors of tags raise for values that the tags do not fit.
_WRONG_VALUES = (LookupError, AttributeError, TypeError, OverflowError)
_MERGE = "tag:yaml.org,2002:merge"


def read_file(path: str | os.PathLike, most_bytes: int | None = MAX_FILE_BYTES) -> bytes:
    """Returns a file's bytes.

    Args:
        most_bytes: of the file; None for any number.

    Raises:
        OSError: it cannot be read; or it is a pipe or a device, which may never end; or it is larger. `strerror` says why.
    """
    # Without waiting for whoever may write into a pipe.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is a pipe or a device, and must be a file", str(path))
        if most_bytes is not None and status.st_size > most_bytes:
            reason = f"it has {status.st_size:,} bytes, and such a file has at most {most_bytes:,}"
            raise OSError(errno.EFBIG, reason, str(path))
        return file.read()


def read_text(path: str | os.PathLike, most_bytes: int | None = MAX_FILE_BYTES) -> str:
    """Returns a file's text in UTF-8, by `read_file`; UnicodeDecodeError where it is not one."""
    return read_file(path, most_bytes).decode("utf-8").replace("\r\n", "\n")


#: What a JSON object or a YAML mapping with texts for keys becomes.
JsonObject = dict[str, Any]


class _Rules:
    """Refuses a mapping that has a key twice, of which YAML would silently keep the last. Digits that begin with 0 are text (a
    pattern of layers such as 0101 is not an octal number), and so are dates."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("int", "timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == _MERGE:
                continue
            key = self.construct_object(key_node, deep=deep)  # type: ignore[attr-defined]
            if key in seen:
                raise ValueError(f"the key {key!r} is there twice, {' '.join(str(key_node.start_mark).split())}")
            seen.add(key)
        return super().construct_mapping(node, deep)  # type: ignore[no-any-return, misc]


for _first in "-+0123456789":
    _Rules.yaml_implicit_resolvers.setdefault(_first, []).append(
        ("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9_]*)$"))
    )


class _FastLoader(_Rules, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """libyaml's, in a twentieth of the time. It bounds the stack, and says less of what is wrong with the syntax."""


class _Loader(_Rules, yaml.SafeLoader):
    """Refuses what would take more stack than a text is worth, and quotes what is wrong."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError(f"is nested in more than {MAX_DEPTH} levels")
        node = super().compose_node(parent, index)  # type: ignore[no-untyped-call]
        self.depth -= 1
        return node  # type: ignore[no-any-return]


def parse_yaml(text: str) -> Any:
    """Returns what a YAML text describes: mappings, lists, texts, numbers, truth values, None.

    Raises:
        ValueError: it is not YAML, or not of those; with a reason of one line.
    """
    if len(text) > MAX_YAML_CHARACTERS:
        raise ValueError(f"has {len(text):,} characters, and no file here needs more than {MAX_YAML_CHARACTERS:,}")
    try:
        return _document(_FastLoader, text)
    except ValueError as error:  # of the rules here
        raise ValueError(_one_line(error)) from None
    except Exception as error:
        # The slower loader says more of what is wrong.
        fault: Exception = error if len(text) > _EXPLAINED_CHARACTERS else _fault(text, error)
    if isinstance(fault, _WRONG_VALUES):
        raise ValueError("has a tag or a character that does not fit its value") from None
    raise ValueError(_one_line(fault)) from None


def _fault(text: str, found: Exception) -> Exception:
    """Returns what the slower loader finds wrong with a text, or what was `found` where it finds nothing."""
    try:
        _document(_Loader, text)
    except (yaml.YAMLError, ValueError, RecursionError, *_WRONG_VALUES) as error:
        return error
    return found


def _document(kind: type, text: str) -> Any:
    loader = kind(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _expanded(node, {})
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _expanded(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Returns values and depth of a node with its aliases written out; ValueError where that would be too many."""
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = (MAX_VALUES + 1, 0)  # for one that contains itself
    size, depth = 1, 1
    for child in _children(node):
        child_size, child_depth = _expanded(child, known)
        size, depth = size + child_size, max(depth, child_depth + 1)
        if depth > MAX_DEPTH:
            raise ValueError(f"is nested in more than {MAX_DEPTH} levels")
        if size > MAX_VALUES:
            raise ValueError("has aliases that stand for more values than any file here needs")
    known[id(node)] = (size, depth)
    return size, depth


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    elif isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair


def parse_json(text: str | bytes, finite: bool = False) -> Any:
    """Returns what a JSON text describes.

    Args:
        finite: refuse NaN and Infinity, which Python's JSON has and others' has not.

    Raises:
        ValueError: it is not JSON, is nested too deeply, or holds halves of characters that no file can hold.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant if finite else None)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("is not a text in UTF-8") from None
    if (b"\\ud" in text.lower()) if isinstance(text, bytes) else ("\\ud" in text.lower()):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("holds half of a character (a lone surrogate such as \\ud800)") from None
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"holds {name}, which is not a number of JSON")


def finite_float(value: object) -> float | None:
    """Returns a number, or a text that is one, as a finite float; None for everything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def without_infinities(value: Any, shown: Callable[[float], Any] = lambda number: None) -> Any:
    """Returns a value for JSON, which has neither nan nor infinities; None replaces them, or the given text."""
    if isinstance(value, Mapping):
        return {name: without_infinities(part, shown) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_infinities(part, shown) for part in value]
    return shown(value) if isinstance(value, float) and not math.isfinite(value) else value


def write_atomically(path: Path, text: str) -> None:
    """Writes a file such that whoever reads it finds all of it, or what was there before."""
    half = path.with_suffix(f".{os.getpid()}.tmp")
    half.write_text(text, encoding="utf-8")
    half.replace(path)


def _one_line(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return f"is nested in more than {MAX_DEPTH} levels"
    return " ".join(str(error).replace('in "<unicode string>", ', "at ").split())[:500]
