"""What is done to a sound file so that it is hostile: tables of changes by the kind of file.

A change gets the file's path and a random generator, and alters the file.
"""

from __future__ import annotations

import copy
import functools
import io
import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

Change = Callable[[Path, random.Random], object]
#: What stands in for a value somewhere.
_NUMBERS = (-1, 0, 1.5, 1e308, float("nan"), float("inf"), 10**9, 2**63, 10**18, 10**400)
_TEXTS = ("", "x", "1e9", "y" * 5000, "\x1b[2J\x07", "../../../etc/passwd", "/dev/zero", "a\0b")
ODD: tuple[Any, ...] = (None, True, *_NUMBERS, *_TEXTS, [], [[1]], {}, {"a": {}}, [None] * 40)
#: What json.dumps does not write, and what stands for it in a value.
RAW = {
    "@digits@": "9" * 5000,
    "@levels@": "[" * 100_000 + "]" * 100_000,
    "@float@": "0." + "1" * 1_000_000,
    "@half@": '"\\ud800"',
}
#: Before a key that is there twice.
TWICE = "@twice@"


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yields the path of every value within mappings and lists."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in inner:
        yield from places(child, (*path, key))


def changed(value: Any, rng: random.Random, odd: tuple = ODD) -> Any:
    """Returns a copy in which one or two values are odd, missing, or under another name."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2))):
        *path, last = rng.choice([p for p in places(value) if p])
        holder = functools.reduce(lambda held, key: held[key], path, value)
        if rng.random() < 0.15:
            del holder[last]
        elif rng.random() < 0.1 and isinstance(holder, dict):
            holder[rng.choice(("x", "", 7, "num_layers"))] = holder.pop(last)
        else:
            holder[last] = copy.deepcopy(rng.choice(odd))
    return value


def mutate(content: bytes, random: np.random.Generator) -> bytes:
    """Returns content with a few bytes changed, cut, repeated or replaced by extreme numbers."""
    data = bytearray(content)
    for _ in range(int(random.integers(1, 4))):
        kind, at = int(random.integers(5)), int(random.integers(len(data) + 1))
        if kind == 0 and data:
            data[at % len(data)] = int(random.integers(256))
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at : at + int(random.integers(1, 9))]
        elif kind == 3:
            data[at:at] = data[: int(random.integers(1, 20))]
        else:
            extreme = random.choice([b"\xff" * 8, b"\0" * 8, b"\xff" * 7 + b"\x7f", b"\0\0\0\x80", b"\xff\xff\xff\x7f"])
            data[at : at + len(extreme)] = extreme
    return bytes(data)


def of_bytes(change: Callable[[bytes, random.Random], bytes]) -> Change:
    return lambda path, rng: path.write_bytes(change(path.read_bytes(), rng))


def _in_its_place(make: Callable[[Path], object]) -> Change:
    def change(path: Path, _: random.Random) -> None:
        path.unlink()
        make(path)

    return change


def _inserted(text: bytes) -> Change:
    return of_bytes(lambda content, rng: content[: (at := rng.randrange(len(content) + 1))] + text + content[at:])


#: No more than what a corpus or a checkpoint may be, which are read to their ends.
HOLES = "a terabyte of holes"
HEADS = (
    b"PK\x03\x04",
    b"\x1f\x8b\x08\0",
    b"\x28\xb5\x2f\xfd",
    b"PAR1",
    b"\x7fELF\2\1\1",
    b"\x80\x04\x95",
    b"GGUF\3\0\0\0",
)
ANY: dict[str, Change] = {
    "a few bytes": of_bytes(lambda content, rng: mutate(content, np.random.default_rng(rng.getrandbits(32)))),
    "a cut": of_bytes(lambda content, rng: content[: rng.randrange(len(content) + 1)]),
    "nothing in it": of_bytes(lambda content, rng: b""),
    "twice itself": of_bytes(lambda content, rng: content * 2),
    "another kind of file": of_bytes(lambda content, rng: rng.choice(HEADS) + content),
    "not there": _in_its_place(lambda path: None),
    "a folder": _in_its_place(Path.mkdir),
    "a pipe": _in_its_place(os.mkfifo),
    "an endless device": _in_its_place(lambda path: path.symlink_to("/dev/zero")),
    "a link to itself": _in_its_place(lambda path: path.symlink_to(path.name)),
    HOLES: lambda path, rng: os.truncate(path, 1 << 40),
}
TEXT: dict[str, Change] = {
    "a byte order mark": of_bytes(lambda content, rng: b"\xef\xbb\xbf" + content),
    "UTF-16": of_bytes(lambda content, rng: content.decode().encode("utf-16")),
    "no UTF-8": _inserted(b"\xff\xfe\x80"),
    "NUL": _inserted(b"\0"),
    "half of a character": _inserted(b"\\ud800"),
    "an escape": _inserted(b"\x1b[2J"),
    "a line of 100 MB": of_bytes(lambda content, rng: content + b'"' + b"a " * (50 << 20)),
    "100 MB of space": of_bytes(lambda content, rng: b" " * (100 << 20) + content),
    "20 million lines": of_bytes(lambda content, rng: content + b"\n" * (20 << 20)),
}


def dumped(value: Any) -> bytes:
    """Returns JSON, in which the texts of `RAW` stand for what they are."""
    text = json.dumps(value).replace(f'"{TWICE}', '"')
    for token, written in RAW.items():
        text = text.replace(f'"{token}"', written)
    return text.encode()


def _twice(value: Any, rng: random.Random) -> Any:
    """Gives a key of some mapping a second value, that of another key."""
    value = copy.deepcopy(value)
    *path, last = rng.choice([p for p in places(value) if p and isinstance(p[-1], str)])
    holder = functools.reduce(lambda held, key: held[key], path, value)
    holder[TWICE + last] = rng.choice([v for k, v in holder.items() if k != last] or [7])
    return value


VALUES: dict[str, Callable[[Any, random.Random], Any]] = {
    "an odd value": changed,
    "an odd value in its place": lambda value, rng: rng.choice(ODD),
    "a key twice": _twice,
    "a million keys": lambda value, rng: {**value, **{f"k{n}": n for n in range(1_000_000)}},
    "a long text": lambda value, rng: changed(value, rng, ("llama" * 3_000_000,)),
    "what no value is": lambda value, rng: changed(value, rng, tuple(RAW)),
}


def _values(read: Callable[[bytes], Any]) -> dict[str, Change]:
    """Returns the changes of `VALUES` to what a file holds, which is then written as JSON."""

    def apply(change: Callable[[Any, random.Random], Any], content: bytes, rng: random.Random) -> bytes:
        return dumped(change(read(content), rng))

    return {name: of_bytes(functools.partial(apply, change)) for name, change in VALUES.items()}


JSON = _values(json.loads)
#: Of a checkpoint's state.
DIGESTS: dict[str, Change] = {
    "no digests": of_bytes(
        lambda content, rng: dumped({k: v for k, v in json.loads(content).items() if "digest" not in k})
    )
}


def _header(change: Callable[[Any, random.Random], Any]) -> Change:
    def new(content: bytes, rng: random.Random) -> bytes:
        end = 8 + struct.unpack("<Q", content[:8])[0]
        text = dumped(change(json.loads(content[8:end]), rng))
        return struct.pack("<Q", len(text)) + text + content[end:]

    return of_bytes(new)


#: What else a header may say is held against the library in tests/unit/convert/test_hf_files.py.
SAFETENSORS: dict[str, Change] = {f"header: {name}": _header(change) for name, change in VALUES.items()}

_NINE = "[" + ", ".join(["*a{0}"] * 9) + "]"
YAML_TEXTS = {
    "aliases of aliases": "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} {_NINE.format(n - 1)}\n" for n in range(1, 12)),
    "merges of merges": "a0: &a0 {x: 1}\n"
    + "".join(f"a{n}: &a{n} {{<<: {_NINE.format(n - 1)}}}\n" for n in range(1, 12)),
    "a list in itself": "model: &a [*a]\n",
    "a mapping in itself": "model: &a\n  num_layers: *a\n",
    "a Python object": "x: !!python/object/apply:os.system [touch CANARY]\n",
    "a Python name": "num_layers: !!python/name:os.system\n",
    "tags that do not fit": "num_layers: !!binary 7\nhidden_size: !!timestamp x\nlr: !!float abc\n",
    "a key that is a list": "? [1, 2]\n: 3\n",
    "several documents": "num_layers: 2\n---\nnum_layers: 3\n",
    "many levels of blocks": "".join(" " * n + "a:\n" for n in range(2000)),
    "many levels of flow": "model: " + "{a: " * 100_000,
    "a million anchors": "model: [" + ", ".join(f"&a{n} 1" for n in range(1_000_000)) + "]\n",
    "a million lines": "".join(f"k{n}: {n}\n" for n in range(1_000_000)),
    "a number in base 60": "lr: 1:30:00.5\nnum_layers: 0o17\nhidden_size: 1_6\n",
}


def _appended(text: str) -> Change:
    return of_bytes(lambda content, rng: content + text.encode())


YAML = _values(yaml.safe_load) | {name: _appended(text) for name, text in YAML_TEXTS.items()}


class Bomb:
    """Unpickling it calls a function."""

    def __init__(self, function: Callable[..., object], *args: object):
        self._call = function, args

    def __reduce__(self) -> tuple:
        return self._call


def bomb(rng: random.Random) -> Bomb:
    """Returns a call that creates CANARY where the program runs, itself or through a loader that may seem harmless."""
    touch, box = Bomb(exec, "open('CANARY', 'w')"), io.BytesIO()
    torch.save(touch, box)
    hidden = Bomb(torch.storage._load_from_bytes, box.getvalue()), Bomb(pickle.loads, pickle.dumps(touch))
    return rng.choice((touch, Bomb(os.mkdir, "CANARY"), Bomb(os.system, "touch CANARY"), *hidden))


def _odd_object(value: Any, rng: random.Random) -> Any:
    """Returns an unpickled object with an odd value, or a call, somewhere in it."""
    holder, odd = value, rng.choice((*ODD, [0] * 10_000_000, bomb(rng), bomb(rng), bomb(rng)))
    while True:
        held = holder if isinstance(holder, dict) else vars(holder)
        name = rng.choice([*held, "x"]) if held else "x"
        inner = held.get(name)
        if not (isinstance(inner, dict) or hasattr(inner, "__dict__")) or callable(inner) or rng.random() < 0.3:
            held[name] = odd
            return value
        holder = inner


PICKLE: dict[str, Change] = {
    "an odd value": of_bytes(lambda content, rng: pickle.dumps(_odd_object(pickle.loads(content), rng))),
    "a call": of_bytes(lambda content, rng: pickle.dumps(bomb(rng))),
    "a demand of memory": of_bytes(lambda content, rng: bytes.fromhex("80025d72000000042e")),
    "an announced terabyte": of_bytes(lambda content, rng: b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"."),
    "many levels": of_bytes(lambda content, rng: b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."),
}


def _saved(change: Callable[[Any, random.Random], Any], **options: Any) -> Change:
    """Returns a change to what a file of torch.save holds."""

    def new(path: Path, rng: random.Random) -> None:
        torch.save(change(torch.load(path, weights_only=False), rng), path, **options)

    return new


def _packed(path: Path, rng: random.Random) -> None:
    """Compresses the entries of an archive, of which one becomes 200 MB."""
    with zipfile.ZipFile(path) as old:
        entries = {record.filename: old.read(record) for record in old.infolist()}
    entries[rng.choice(list(entries))] += bytes(200 << 20)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def _odd_tensor(value: Any, rng: random.Random) -> Any:
    strange = torch.eye(3).to_sparse(), torch.zeros(1).expand(1 << 40), torch.empty(3, device="meta")
    wrong = torch.ones(2, dtype=torch.complex64), torch.full((3,), float("nan")), torch.ones(0)
    held = value.get("model", value)
    damaged = {**held, rng.choice(list(held)): rng.choice((*strange, *wrong))}
    return {**value, "model": damaged} if "model" in value else damaged


TORCH: dict[str, Change] = {
    "an odd value": _saved(_odd_object),
    "an odd tensor": _saved(_odd_tensor),
    "a call": _saved(lambda value, rng: bomb(rng)),
    "a call in place of a value": _saved(lambda value, rng: {**value, "x": bomb(rng)}),
    "the old format": _saved(lambda value, rng: value, _use_new_zipfile_serialization=False),
    "a zip bomb": _packed,
}
