"""Ways to damage tokenizers, rows and tables, as `changes.py` has those for other files."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.harness.tables import table
from tests.hostile.changes import ODD, RAW, Change, changed, dumped, of_bytes


def _spec(**parts: Any) -> Change:
    """Returns the change to parts of a tokenizer.json; those of its model are under `model`."""

    def new(content: bytes, rng: random.Random) -> bytes:
        spec = json.loads(content)
        return dumped({**spec, **parts, "model": {**spec["model"], **parts.get("model", {})}})

    return of_bytes(new)


TOKENIZER: dict[str, Change] = {name: _spec(**parts) for name, parts in table(__file__, tuples=False).items()}
TOKENIZER |= {"a million merges": _spec(model={"merges": [["a", "a"]] * 1_000_000})}


def _row(line: Callable[[random.Random], bytes]) -> Change:
    """Returns the change that puts a line among those of a JSONL file."""

    def new(content: bytes, rng: random.Random) -> bytes:
        lines = content.splitlines(keepends=True)
        lines.insert(rng.randrange(len(lines) + 1), line(rng) + b"\n")
        return b"".join(lines)

    return of_bytes(new)


JSONL: dict[str, Change] = {
    "an odd row": _row(lambda rng: dumped(changed({"text": "words", "prompt": "w", "meta": {"n": [1, 2]}}, rng))),
    "an odd text": _row(lambda rng: dumped(dict.fromkeys(("text", "prompt", "prompt_ids"), rng.choice((*ODD, *RAW))))),
    "no row": _row(lambda rng: rng.choice((b"[]", b"7", b'"text"', b"null", b"{", b"NaN", b"\x1e", b"{'text': 'x'}"))),
    "a key twice": _row(lambda rng: b'{"text": "a", "text": 7}'),
    "many levels": _row(lambda rng: b'{"text": "a", "x": ' + b"[" * 100_000 + b"}"),
    "a text of 100 MB": _row(lambda rng: b'{"text": "' + b"a b " * (25 << 20) + b'"}'),
    "100 MB of escapes without an end": _row(lambda rng: b'{"text": "' + b"\\u0041" * (16 << 20)),
    "a million empty texts": _row(lambda rng: b'{"text": ""}\n' * 1_000_000),
    "a million wrong rows": _row(lambda rng: b"{}\n" * 1_000_000),
    "returns in place of line ends": of_bytes(lambda content, rng: content.replace(b"\n", b"\r")),
}


def packed(pack: Callable[[bytes], bytes]) -> dict[str, Change]:
    """Returns changes of a packed JSONL file."""
    return {
        "a line of 300 MB": of_bytes(lambda content, rng: pack(b'{"text": "' + b"a" * (300 << 20) + b'"}\n')),
        "300 MB of space": of_bytes(lambda content, rng: pack(b" " * (300 << 20))),
        "packed twice": of_bytes(lambda content, rng: pack(content)),
    }


def _table(make: Callable[[Any, list[str]], Any], **options: Any) -> Change:
    """Returns the change to a table, or one of a column `text`, that pyarrow makes of texts."""

    def new(path: Path, _: random.Random) -> None:
        import pyarrow
        import pyarrow.parquet

        made = make(pyarrow, [f"document {n} of some words" for n in range(16)])
        table = made if isinstance(made, pyarrow.Table) else pyarrow.table({"text": made})
        pyarrow.parquet.write_table(table, path, **options)

    return new


def column(kind: str, value: Any) -> Any:
    """Returns 16 times a value in a column of a type, written as a call of pyarrow."""
    import pyarrow

    return pyarrow.array([value] * 16, eval(kind, vars(pyarrow)))


def _column(kind: str, value: Any) -> Change:
    return _table(lambda pa, texts: column(kind, value))


_NUMBERS = "int8() uint64() float16() float64() date32() timestamp('us') time64('us') duration('us') decimal128(9)"
COLUMNS = {
    **dict.fromkeys(_NUMBERS.split(), 7),
    **{"bool_()": True, "null()": None, "binary()": b"\xff\xfe", "binary(4)": b"\xff\xfe\0a"},
    **{"string()": None, "large_string()": "a\0b", "string_view()": "a", "list_(string())": ["a"]},
    **{"struct([('a', string())])": {"a": "x"}, "map_(string(), int8())": [("a", 1)]},
}
PARQUET: dict[str, Change] = {
    **{f"a column of {kind}": _column(kind, value) for kind, value in COLUMNS.items()},
    "a column of a dictionary": _table(lambda pa, texts: pa.array(texts).dictionary_encode()),
    "a string that is no UTF-8": _table(lambda pa, texts: pa.array([b"\xff\xfe"] * 16).view(pa.string())),
    "another column": _table(lambda pa, texts: pa.table({"other": texts})),
    "the column twice": _table(lambda pa, texts: pa.table([texts, list(range(16))], names=["text", "text"])),
    "no column": _table(lambda pa, texts: pa.table({})),
    "no row": _table(lambda pa, texts: pa.array([], pa.string())),
    "ten thousand columns": _table(
        lambda pa, texts: pa.table({"text": texts} | {f"c{n}": texts for n in range(10_000)})
    ),
    "texts that unpack to 256 MB": _table(lambda pa, texts: pa.array(["a " * (8 << 20)] * 16), compression="zstd"),
}
