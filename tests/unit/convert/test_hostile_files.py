"""Small files that somebody changed, by mistake or on purpose, are read or refused in words: quickly, in little memory, and where their
contents would fill it by their sizes, before they are read."""

from __future__ import annotations

import argparse
import copy
import functools
import gzip
import io
import json
import os
import pickle
import random
import shutil
import struct
import tempfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import safetensors.torch
import torch
import yaml
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import Metadata

from megatron_samoe.config.cli import from_mapping, to_mapping
from megatron_samoe.config.validate import validate
from megatron_samoe.convert.hf.export import native_model, refuse_other_tensors
from megatron_samoe.convert.hf.export import plan_export as plan_hf
from megatron_samoe.convert.hf.export import write_export as write_hf
from megatron_samoe.convert.hf.folder import MAX_JSON_BYTES, HFFolder, read_json
from megatron_samoe.convert.hf.safetensors_io import SafetensorsReader
from megatron_samoe.convert.hf.source import HFSource, family_of
from megatron_samoe.convert.megatron.arguments import from_arguments
from megatron_samoe.convert.megatron.rank_files import load_rank_file
from megatron_samoe.convert.megatron.reader import MegatronReader
from megatron_samoe.convert.opener import open_folder
from megatron_samoe.datasets.inspect import verify as verify_dataset
from megatron_samoe.datasets.preprocess.run import preprocess
from megatron_samoe.dist_checkpointing import store
from megatron_samoe.dist_checkpointing.global_tensors import CheckpointReader, write_checkpoint
from megatron_samoe.dist_checkpointing.saved_tensor import find_saved_bytes, read_saved_tensor
from megatron_samoe.dist_checkpointing.table_of_contents import METADATA, read_table
from megatron_samoe.errors import MegatronSamoeError, nearest
from tests.harness.datasets import decoded, options
from tests.harness.megatron_files import write_rank_files
from tests.harness.tables import table
from tests.harness.tiny import tiny_config
from tests.hostile.changes import ODD, changed, mutate
from tests.hostile.formats import LINES, TEXTS
from tests.unit.convert.memory_source import new_source

SEEDS = pytest.mark.parametrize("seeds", [range(300), pytest.param(range(300, 3000), marks=pytest.mark.night)], ids=str)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A SaMoE as a checkpoint, and a MoE as transformers and as Megatron keep it."""
    root = tmp_path_factory.mktemp("sound")
    samoe = new_source(tiny_config("samoe", num_expert_banks=2, num_layers=2))
    moe = new_source(tiny_config("moe", num_layers=2, style="llama"))
    native = write_checkpoint(root / "native", 7, samoe)
    write_hf(plan_hf(samoe), root / "hf", lambda _: None)
    write_rank_files(moe, root / "megatron")
    return {"native": native, "hf": root / "hf", "megatron": root / "megatron"}


def write_state(folder: Path, state: Any) -> None:
    """Writes a training state whose own digest is right, so that its other values are looked at."""
    state = json.loads(json.dumps(state))  # whose keys are texts
    signed = {**state, "digest": store.digest_of_values(state)} if isinstance(state, dict) else state
    (folder / store.TRAIN_STATE).write_text(json.dumps(signed))


def forget_digests(folder: Path) -> None:
    """Lets the files of a checkpoint be changed."""
    write_state(folder, {**_without_digest(folder), "digests": {}})


def _without_digest(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((folder / store.TRAIN_STATE).read_text())
    return {name: value for name, value in state.items() if name != "digest"}


def read_by_kind(folders: dict[str, Path]) -> dict[str, tuple[Any, Callable[[Any], object]]]:
    """Returns the contents of small files, and what reads a variant of each."""
    native, hf = folders["native"], folders["hf"]
    texts = corpora()
    arguments = MegatronReader(folders["megatron"]).arguments
    plain = {k: v for k, v in arguments.items() if isinstance(v, (int, float, str, list, bool, type(None)))}
    config = yaml.safe_load((native / store.CONFIG).read_text())
    (rank_path,) = folders["megatron"].rglob("model_optim_rng.pt")

    def training_state(variant: Any) -> None:
        write_state(native, variant)
        reader = CheckpointReader(native)
        native_model(reader)
        reader.verify()

    def config_yaml(variant: Any) -> None:
        forget_digests(native)
        (native / store.CONFIG).write_text(yaml.safe_dump(variant))
        native_model(CheckpointReader(native))

    def config_json(variant: Any) -> None:
        (hf / "config.json").write_text(json.dumps(variant))
        HFSource(hf)

    def table_of_contents(variant: Metadata) -> None:
        (native / METADATA).write_bytes(pickle.dumps(variant))
        read_table(native)

    def megatrons_arguments(variant: Any) -> None:
        from_arguments(argparse.Namespace(**{str(k): v for k, v in variant.items()}), "test")

    def rank_file(variant: bytes) -> None:
        rank_path.write_bytes(variant)
        reader = MegatronReader(folders["megatron"])
        for name in reader.tensors:
            reader.read(name)

    def corpus(suffix: str, variant: bytes) -> None:
        (hf / f"in{suffix}").write_bytes(variant)
        report = preprocess(options(hf, f"in{suffix}", chunk_bytes=2048, on_bad_input="skip"))
        verify_dataset(str(hf / "out_text_document"))
        found = decoded(hf / "out_text_document")
        assert len(found) == report.num_documents <= report.totals.num_lines
        assert variant != texts[suffix] or found == TEXTS

    return {
        "configuration": (
            to_mapping(tiny_config("samoe", mock_data=True)),
            lambda variant: validate(from_mapping(variant, "test"), 2),
        ),
        "training state": (_without_digest(native), training_state),
        "config.yaml": ({name: config[name] for name in ("model", "moe", "data")}, config_yaml),
        "config.json": (json.loads((hf / "config.json").read_text()), config_json),
        "Megatron's arguments": (plain, megatrons_arguments),
        "rank file": (rank_path.read_bytes(), rank_file),
        "table of contents": (pickle.loads((native / METADATA).read_bytes()), table_of_contents),
        **{suffix: (content, functools.partial(corpus, suffix)) for suffix, content in texts.items()},
    }


def corpora() -> dict[str, bytes]:
    """Returns texts in files of each format that is preprocessed."""
    parquet = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), parquet, row_group_size=8)
    packed = {".jsonl.zst": zstandard.ZstdCompressor().compress(LINES), ".jsonl.gz": gzip.compress(LINES, mtime=0)}
    return {".jsonl": LINES, ".parquet": parquet.getvalue(), **packed}


def damaged_table(table: Metadata, rng: random.Random) -> Metadata:
    """Returns a table of contents in which one value is odd."""
    variant = copy.deepcopy(table)
    entries, placed = variant.state_dict_metadata, next(iter(variant.storage_data.values()))
    name = rng.choice(sorted(entries))
    spots = [
        *((variant, attribute) for attribute in ("state_dict_metadata", "storage_data", "storage_meta")),
        *((entries[name], attribute) for attribute in ("size", "properties", "chunks")),
        *((entries[name].chunks[0], attribute) for attribute in ("offsets", "sizes")),
        *((placed, attribute) for attribute in ("relative_path", "offset", "length")),
    ]
    holder, attribute = rng.choice(spots)
    object.__setattr__(holder, attribute, copy.deepcopy(rng.choice(ODD)))
    return variant


TABLE = table(__file__)
#: The least share of variants that must be refused.
LEAST: dict[str, float] = TABLE["least refused"]


def damaged_bytes(content: bytes, rng: random.Random) -> bytes:
    """Returns bytes of which some are changed, of an archive three times of four in its first entry, which is unpickled."""
    whole = not content.startswith(b"PK") or rng.random() < 0.25
    begin, end = 0, len(content) if whole else content.index(b"PK\x03\x04", 4)
    return content[:begin] + mutate(content[begin:end], np.random.default_rng(rng.getrandbits(32))) + content[end:]


#: What makes a variant of contents that are not of mappings and lists.
DAMAGE = {Metadata: damaged_table, bytes: damaged_bytes}


@SEEDS
@pytest.mark.parametrize("kind", LEAST)
def test_what_was_changed_is_read_or_refused_in_words(
    kind: str, seeds: range, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # most of the time
    copies = {name: Path(shutil.copytree(path, tmp_path / name / path.name)) for name, path in folders.items()}
    value, read = read_by_kind(copies)[kind]
    change, refused = DAMAGE.get(type(value), changed), 0
    read(value)
    for seed in seeds:
        variant = change(value, random.Random(seed))
        try:
            read(variant)
        except MegatronSamoeError as error:
            refused += 1
            assert len(str(error)) < 6000
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
    assert refused / len(seeds) > LEAST[kind]


@given(st.binary(max_size=60))
@example(bytes.fromhex("5d72000000042e"))  # asks for a gigabyte
@settings(max_examples=500, deadline=None)
def test_any_bytes_as_a_table_of_contents(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / METADATA).write_bytes(b"\x80\x02" + content)
        with pytest.raises(MegatronSamoeError):
            read_table(folder)


def _repacked(path: Path, change: Callable[[str, bytes], tuple[bytes, int]], claims: tuple[str, int] = ("", 0)) -> None:
    """Packs an archive's entries anew; `claims` are the end of an entry's name, and the size that it is said to have."""
    with zipfile.ZipFile(path) as old:
        entries = [(record.filename, old.read(record)) for record in old.infolist()]
    with zipfile.ZipFile(path, "w") as new:
        for name, content in entries:
            content, packing = change(name, content)
            new.writestr(name, content, compress_type=packing)
            if claims[1] and name.endswith(claims[0]):
                new.getinfo(name).file_size = claims[1]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda _, content: (content, zipfile.ZIP_DEFLATED), "is compressed"),
        (
            lambda name, content: (content[:4] if name.endswith("data/0") else content, zipfile.ZIP_STORED),
            "other sizes",
        ),
        (lambda name, content: (b"big" if name.endswith("byteorder") else content, zipfile.ZIP_STORED), "byte order"),
    ],
)
def test_archives_that_were_packed_anew_are_not_read_as_garbage(
    change: Any, problem: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """torch maps whatever lies where an entry begins."""
    megatron = shutil.copytree(folders["megatron"], tmp_path / "megatron")
    _repacked(next(megatron.rglob("model_optim_rng.pt")), change)
    with pytest.raises(MegatronSamoeError, match=problem):
        MegatronReader(megatron)
    torch.save({"a": torch.ones(100), "b": torch.zeros(3, 4)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text("{}")
    assert set(HFFolder(tmp_path).tensors) == {"a", "b"}
    _repacked(tmp_path / "pytorch_model.bin", change)
    with pytest.raises(MegatronSamoeError, match=problem):
        HFFolder(tmp_path)


def refused_cheaply(read: Callable[[], object], match: str = "", most_bytes: float = 4e6) -> None:
    tracemalloc.start()
    began = time.perf_counter()
    with pytest.raises(MegatronSamoeError, match=match) as caught:
        read()
    assert time.perf_counter() - began < 5.0  # tracemalloc alone makes it several times slower
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < most_bytes and len(str(caught.value)) < 2000 and str(caught.value).isprintable()


@pytest.mark.parametrize("num_bytes", [2 << 20, 100 << 20])
def test_a_header_longer_than_its_tensors_is_not_read(num_bytes: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", num_bytes))
        file.truncate(8 + num_bytes + 100)
    refused_cheaply(lambda: SafetensorsReader(path), f"its header has {num_bytes:,} bytes for 100 bytes of tensors")


def test_a_header_of_many_empty_entries_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({f"tensor.{i}": torch.empty(0) for i in range(20_000)}, path)
    refused_cheaply(lambda: SafetensorsReader(path), "is not longer than its tensors")
    # It may be long where its tensors are.
    safetensors.torch.save_file({f"tensor.{i}": torch.zeros(40) for i in range(20_000)}, path)
    assert len(SafetensorsReader(path).tensors) == 20_000
    safetensors.torch.save_file({"empty": torch.empty(0)}, path)
    assert len(SafetensorsReader(path).tensors) == 1


def test_a_large_config_json_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b'{"model_type": "' + b"x" * MAX_JSON_BYTES + b'"}')
    refused_cheaply(lambda: read_json(tmp_path / "config.json"), "such a file has at most 16,777,216")


def test_a_long_name_is_compared_with_none() -> None:
    long = "llama" * 1_000_000
    assert nearest(long, [long]) == ""
    with pytest.raises(MegatronSamoeError) as caught:
        family_of({"model_type": long})
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["data.pkl", "byteorder", "data/0"])
@pytest.mark.parametrize("claims", [0, 10**10])
def test_a_compressed_entry_is_seen_before_anything_is_read(name: str, claims: int, tmp_path: Path) -> None:
    """64 MB of zeros, or a size that is only claimed."""

    def bomb(entry: str, content: bytes) -> tuple[bytes, int]:
        if claims or not entry.endswith(name):
            return content, zipfile.ZIP_STORED
        return content + bytes(64 << 20), zipfile.ZIP_DEFLATED

    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "pytorch_model.bin"
    torch.save({"args": argparse.Namespace(), "model": {"a": torch.ones(3)}}, path)
    _repacked(path, bomb, (name, claims))
    assert path.stat().st_size < 1e6
    refused_cheaply(lambda: HFFolder(tmp_path), "is compressed")
    path.rename(tmp_path / "model_optim_rng.pt")
    refused_cheaply(lambda: load_rank_file(tmp_path), "is compressed")
    path = tmp_path / "model_optim_rng.pt"
    with pytest.raises(ValueError, match="is compressed"):
        read_saved_tensor(path, 0, path.stat().st_size)
    with open(path, "rb", buffering=0) as file, pytest.raises(ValueError, match="is compressed"):
        find_saved_bytes(file, 0, path.stat().st_size)


@pytest.mark.parametrize("name", ["a\x1b[2J", "b\u202e", "c\n", "d" * 400])
def test_names_that_no_tensor_has_are_refused_and_shown_escaped(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    safetensors.torch.save_file({name: torch.ones(1)}, tmp_path / "model.safetensors")
    refused_cheaply(lambda: HFFolder(tmp_path), "is not legal")
    (tmp_path / "model.safetensors").unlink()
    torch.save({name: torch.ones(1)}, tmp_path / "pytorch_model.bin")
    refused_cheaply(lambda: HFFolder(tmp_path), "a tensor in it is called")
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    refused_cheaply(lambda: HFFolder(tmp_path), "which is not a file of its folder")


def test_a_single_file_goes_before_an_index(tmp_path: Path) -> None:
    """As transformers has it: the index may be of an earlier save."""
    (tmp_path / "config.json").write_text("{}")
    safetensors.torch.save_file({"new": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"old": "gone.safetensors"}}))
    assert set(HFFolder(tmp_path).tensors) == {"new"}


@pytest.mark.parametrize(
    ("file", "name", "size"),
    [(file, name, size) for file, (sizes, names) in TABLE["sizes"].items() for size in sizes for name in names],
)
def test_sizes_that_no_tensor_has(file: str, name: str, size: int, folders: dict[str, Path], tmp_path: Path) -> None:
    """Refused before a model of that size is built."""
    folder = Path(shutil.copytree(folders["native" if file == "config.yaml" else "hf"], tmp_path / "iter_0000007"))
    if file == "config.yaml":
        forget_digests(folder)
    config = yaml.safe_load((folder / file).read_text())  # JSON is YAML
    section = next((part for part in config.values() if isinstance(part, dict) and name in part), config)
    section[name] = size
    (folder / file).write_text(json.dumps(config))
    refused_cheaply(lambda: refuse_other_tensors(open_folder(folder)), most_bytes=100e6)
