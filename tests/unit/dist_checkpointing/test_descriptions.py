"""What describes a checkpoint: tables of contents, formats and states that are read, or refused in words."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from torch.distributed.checkpoint.metadata import TensorProperties

from megatron_samoe.dist_checkpointing import digests, file_storage, store
from megatron_samoe.dist_checkpointing.sharded_state import stored_names
from megatron_samoe.dist_checkpointing.table_of_contents import METADATA, read_table
from megatron_samoe.errors import CheckpointError
from tests.unit.dist_checkpointing.test_store import STATE, config, loaded, save, whole


def test_digests_are_blake3_and_older_kinds_are_still_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new = save(tmp_path / "new", 1)
    written = store.read_train_state(new)["digests"]
    assert written and all(d == "blake3:" + blake3((new / n).read_bytes()).hexdigest() for n, d in written.items())

    of_kind = digests.new_digest
    for length, old_kind in ((64, hashlib.sha256), (32, lambda: hashlib.blake2b(digest_size=16))):
        for module in (digests, file_storage, store):
            monkeypatch.setattr(module, "new_digest", lambda like="", make=old_kind: of_kind(like) if like else make())
        old = save(tmp_path / f"old{length}", 1)
        monkeypatch.undo()
        assert {len(d) for d in store.read_train_state(old)["digests"].values()} == {length}
        assert store.damaged_files(old, STATE) == []
        name = next(n for n in store.read_train_state(old)["digests"] if n.endswith(".distcp"))
        (old / name).write_bytes(bytes(byte ^ 1 for byte in (old / name).read_bytes()))
        assert store.damaged_files(old, STATE) == [f"{name} differs from what was written"]


def test_tables_of_later_releases_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.15 adds to what it saves of a tensor, and Python 3.13 calls the module of paths otherwise."""
    path = save(tmp_path, 5)
    expected, table = read_table(path), pickle.loads((path / METADATA).read_bytes())
    of_now = TensorProperties.__getstate__
    monkeypatch.setattr(TensorProperties, "__getstate__", lambda self: (*of_now(self)[:5], (1,)))
    later = pickle.dumps(table, protocol=2).replace(b"cpathlib\n", b"cpathlib._local\n")
    monkeypatch.undo()
    (path / METADATA).write_bytes(later)
    assert set(expected.tensors) == set(table.state_dict_metadata) and read_table(path) == expected


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("touched"),))


def test_a_table_of_contents_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, 5)
    monkeypatch.chdir(tmp_path)
    (path / ".metadata").write_bytes(pickle.dumps(Evil()))
    for read in (lambda: stored_names(str(path)), lambda: loaded(path)):
        with pytest.raises(CheckpointError, match=r"names \S+, which no table of contents needs"):
            read()
    assert not Path("touched").exists()


def test_newer_formats_and_unreadable_descriptions_are_refused(tmp_path: Path) -> None:
    save(tmp_path, 5)
    description, options = save(tmp_path, 9) / store.TRAIN_STATE, store.iteration_dir(tmp_path, 5) / store.CONFIG
    description.write_text(json.dumps({"format_version": store.FORMAT_VERSION + 1}))
    with pytest.raises(CheckpointError, match=f"format version {store.FORMAT_VERSION + 1}"):
        store.find_checkpoint(config(tmp_path), whole)  # and does not fall back to iteration 5
    description.write_text("{")
    with pytest.raises(CheckpointError, match=r"train_state\.json cannot be read"):
        store.read_train_state(description.parent)
    options.write_text("a: [")
    with pytest.raises(CheckpointError, match=r"config\.yaml cannot be read"):
        store.read_config(options.parent)
    options.unlink()
    with pytest.raises(CheckpointError, match=r"config\.yaml cannot be read"):
        store.read_config(options.parent)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("loss_scale", {"value": value}) for value in (None, "1.0", "much", float("inf"), [1.0])),
        *(("vocab_size", value) for value in (10**12, 2**31)),
    ],
)
def test_values_that_no_run_has_are_damage(name: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=f"{name} is"):
        store.refuse_wrong_values({name: value}, "train_state.json")
    store.refuse_wrong_values({"loss_scale": {"value": 2.0**16, "good": 3, "is_dynamic": True}}, "train_state.json")
