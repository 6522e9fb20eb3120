"""The end of a run: index, manifest, names. Every step can be repeated, so a kill here is harmless too."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_samoe.datasets import index_format, manifest
from megatron_samoe.datasets.preprocess import checksums, journal
from megatron_samoe.datasets.preprocess.inputs import InputFile
from megatron_samoe.datasets.preprocess.options import PreprocessOptions
from megatron_samoe.datasets.preprocess.worker import TokenizerFacts
from megatron_samoe.parsing import JsonObject

#: With fewer, a twentieth of them is less than one.
FEW_DOCUMENTS = 20
# Options that say where things are, not what the data are.
_LOCATIONS = ("input", "output_prefix", "tokenizer_model", "vocab_file", "merge_file", "chunk_bytes")


@dataclass(frozen=True)
class Report:
    """The result of a run."""

    prefixes: list[str]
    num_tokens: int
    totals: journal.Totals
    engine: str

    @property
    def num_documents(self) -> int:
        """Documents, the same number for every key."""
        return self.totals.positions[0].num_documents

    def describe(self) -> str:
        """Returns a few lines for the user."""
        lines = [f"{self.num_documents:,} documents, {self.num_tokens:,} tokens -> {', '.join(self.prefixes)}"]
        if self.num_documents < FEW_DOCUMENTS:
            lines.append(
                "--split of pretraining divides by documents, so with so few validation may get none: cut text files "
                "into more with --document-kb or --document-separator, or give a dataset of its own to --valid-data-path"
            )
        lines += [f"{count:,} documents left out: {reason}" for reason, count in sorted(self.totals.left_out.items())]
        if self.totals.num_bad:
            lines.append(f"{self.totals.num_bad:,} bad lines or documents left out; the first of them:")
            lines += [f"  {file}:{line}: {reason}" for file, line, reason in self.totals.first_bad]
        return "\n".join(lines)


def describe_losses(totals: journal.Totals) -> str:
    """Returns a sentence on what was left out, empty if nothing was."""
    parts = [f"{count} {reason}" for reason, count in sorted(totals.left_out.items())]
    if totals.num_bad:
        file, line, reason = totals.first_bad[0]
        parts.append(f"{totals.num_bad} bad (first {file}:{line}: {reason})")
    return f" Left out: {', '.join(parts)}." if parts else ""


def keys_path(options: PreprocessOptions) -> str:
    """Returns the file that holds the de-duplication keys of a run under way."""
    return f"{options.output_prefix}.preprocess.keys"


def append_keys(options: PreprocessOptions, keys: np.ndarray) -> None:
    """Stores the keys of the documents that stayed, for --resume."""
    with open(keys_path(options), "ab") as file:
        file.write(np.ascontiguousarray(keys, dtype="<u8").tobytes())


def load_keys(options: PreprocessOptions, entries: list[JsonObject]) -> np.ndarray:
    """Returns the keys that belong to the chunks of `entries`, and cuts off those of later ones."""
    count = sum(entry["kept_keys"] for entry in entries)
    path = keys_path(options)
    os.truncate(path, 8 * count)
    return np.fromfile(path, dtype="<u8", count=count)


def finish(
    options: PreprocessOptions,
    files: list[InputFile],
    facts: TokenizerFacts,
    totals: journal.Totals,
    log: journal.Journal,
    has_indices: bool,
) -> Report:
    """Writes the indices (unless a run before did), marks the journal complete, and gives all files their names."""
    prefixes = [options.dataset_prefix(key) for key in options.json_keys]
    if not has_indices:
        for prefix, position in zip(prefixes, totals.positions, strict=True):
            for path, size in zip(index_format.partial_paths(prefix), position.offsets, strict=True):
                # A killed run may have written beyond what its successor needs.
                with open(path, "r+b") as file:
                    file.truncate(size)
                    os.fsync(file.fileno())
            index_format.write_partial_index(prefix, facts.dtype)
        log.append({"complete": True})
        log.sync()
    for key, prefix in enumerate(prefixes):
        bin_partial, lengths, boundaries = index_format.partial_paths(prefix)
        if os.path.exists(f"{prefix}.idx.partial"):
            record = _manifest(options, files, facts, totals, key, f"{prefix}.idx.partial")
            manifest.write(prefix, record)
            if os.path.exists(bin_partial):
                os.replace(bin_partial, f"{prefix}.bin")
            os.replace(f"{prefix}.idx.partial", f"{prefix}.idx")
        for path in (lengths, boundaries):
            Path(path).unlink(missing_ok=True)
    _write_bad_report(options, totals)
    Path(keys_path(options)).unlink(missing_ok=True)
    tokens = sum(position.num_bytes for position in totals.positions) // facts.itemsize
    return Report(prefixes, tokens, totals, facts.engine)


def _manifest(
    options: PreprocessOptions,
    files: list[InputFile],
    facts: TokenizerFacts,
    totals: journal.Totals,
    key: int,
    index_path: str,
) -> manifest.Manifest:
    position = totals.positions[key]
    kept = {name: value for name, value in options.output_options().items() if name not in _LOCATIONS}
    return manifest.Manifest(
        tokenizer_type=options.tokenizer_type,
        tokenizer_fingerprint=facts.fingerprint,
        vocab_size=facts.vocab_size,
        eod=facts.eod,
        num_documents=position.num_documents,
        num_sequences=position.num_sequences,
        num_tokens=position.num_bytes // facts.itemsize,
        max_token_id=totals.max_token_ids[key],
        bin_bytes=position.num_bytes,
        bin_crc32=totals.crcs[key],
        idx_crc32=checksums.file_crc32(index_path),
        options=kept | {"key": options.json_keys[key]},
        inputs=[{"name": os.path.basename(file.path), "bytes": file.num_bytes} for file in files],
        counts={"lines": totals.num_lines, "bad": totals.num_bad, **totals.left_out},
    )


def _write_bad_report(options: PreprocessOptions, totals: journal.Totals) -> None:
    path = f"{options.output_prefix}.bad_input.json"
    if not totals.num_bad:
        Path(path).unlink(missing_ok=True)
        return
    first = [{"file": file, "line": line, "reason": reason} for file, line, reason in totals.first_bad]
    manifest.write_text(path, json.dumps({"count": totals.num_bad, "first": first}, indent=1))
