"""The record that the preprocessor leaves with a dataset: who made it, from what, and checksums to verify it by."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field

from megatron_samoe.datasets.bin_readers import filesystem, is_remote
from megatron_samoe.errors import DataError, shown
from megatron_samoe.parsing import JsonObject, parse_json, read_text

FORMAT_VERSION = 1
#: Types of the manifest's fields, by their annotations.
_TYPES = {"int": int, "str": str, "JsonObject": dict, "list[JsonObject]": list, "dict[str, int]": dict}


@dataclass(frozen=True)
class Manifest:
    """Facts about one dataset. It does not depend on the number of workers or on the time it took."""

    tokenizer_type: str
    tokenizer_fingerprint: str
    vocab_size: int
    eod: int
    num_documents: int
    num_sequences: int
    num_tokens: int
    max_token_id: int
    """Largest id in the data, -1 if it is empty."""
    bin_bytes: int
    bin_crc32: int
    idx_crc32: int
    options: JsonObject = field(default_factory=dict)
    inputs: list[JsonObject] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    """Lines read, lines left out and why."""
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """Returns the text of the manifest file."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"


def get_manifest_path(path_prefix: str) -> str:
    """Returns the path of the manifest of the dataset at `path_prefix`."""
    return path_prefix + ".manifest.json"


def read(path_prefix: str) -> Manifest | None:
    """Returns the manifest of a dataset, None if it has none (a dataset made by Megatron); DataError if damaged."""
    path = get_manifest_path(path_prefix)
    try:
        if is_remote(path):
            fs, key = filesystem(path)
            text = fs.cat_file(key).decode()
        else:
            text = read_text(path)
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    try:
        values = parse_json(text)
        known = {f.name for f in dataclasses.fields(Manifest)}
        record = Manifest(**{name: value for name, value in values.items() if name in known})
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a manifest ({error}). Remove it if the dataset is known to be good.") from error
    for field_ in dataclasses.fields(Manifest):
        value, kind = getattr(record, field_.name), _TYPES[str(field_.type)]
        if type(value) is not kind or (isinstance(value, int) and not -1 <= value < 2**62):
            raise DataError(f"{path} is damaged: its {field_.name} is {shown(value)}.")
    if record.bin_bytes < 0 or not all(0 <= crc < 2**32 for crc in (record.bin_crc32, record.idx_crc32)):
        raise DataError(f"{path} is damaged: its sizes or checksums cannot be.")
    if not 1 <= record.format_version <= FORMAT_VERSION:
        raise DataError(f"{path} has format version {record.format_version}; this program reads {FORMAT_VERSION}.")
    parts = ((record.inputs, dict), (record.counts.values(), int))
    if not all(type(value) is kind for values, kind in parts for value in values):
        raise DataError(f"{path} is damaged: its inputs or counts hold something else.")
    return record


def write(path_prefix: str, record: Manifest) -> None:
    """Writes the manifest of a dataset atomically."""
    write_text(get_manifest_path(path_prefix), record.to_json())


def write_text(path: str, text: str) -> None:
    """Writes a file that appears when it is whole, and survives a crash of the machine."""
    with open(f"{path}.partial", "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.partial", path)
