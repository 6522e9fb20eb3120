"""Datasets and corpora on an S3 server (moto's, on this machine), and on fsspec's memory file system."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_samoe.config.data import DataConfig
from megatron_samoe.datasets.bin_readers import RemoteBinReader, fetch_index
from megatron_samoe.datasets.build import build_train_valid_test_datasets
from megatron_samoe.datasets.indexed_dataset import IndexedDataset
from megatron_samoe.datasets.preprocess.run import preprocess
from megatron_samoe.datasets.tokenizer import ByteTokenizer
from megatron_samoe.errors import DataError
from tests.harness.datasets import decoded, jsonl, options, random_dataset


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """Returns the URL of an empty bucket on a local server."""
    server_module = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("samoe-data")
        yield "s3://samoe-data"
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def upload(local: str, url: str) -> None:
    import s3fs

    fs = s3fs.S3FileSystem()
    for suffix in (".bin", ".idx"):
        fs.put_file(local + suffix, url.removeprefix("s3://") + suffix)
    fs.invalidate_cache()


def test_training_from_s3_gives_the_same_samples(tmp_path: Path, bucket: str) -> None:
    local = random_dataset(tmp_path / "d", [40] * 60)
    upload(local, f"{bucket}/d")
    cache = str(tmp_path / "cache")
    samples = []
    for prefix in (local, f"{bucket}/d"):
        data = DataConfig(data_path=(prefix,), split="1", data_cache_path=cache)
        train, _, _ = build_train_valid_test_datasets(data, (30, 0, 0), 32, 1, ByteTokenizer())
        samples.append(train.get_batch(range(30))["tokens"])
    assert torch.equal(*samples)


def test_a_changed_object_is_fetched_again(tmp_path: Path, bucket: str) -> None:
    url = f"{bucket}/changing"
    for count in (3, 5):
        upload(random_dataset(tmp_path / f"d{count}", [40] * count), url)
        assert len(IndexedDataset(url, index_cache_path=str(tmp_path / "cache"))) == count


def test_a_missing_object_and_a_missing_package(tmp_path: Path, bucket: str) -> None:
    with pytest.raises(DataError, match="There is no dataset at"):
        IndexedDataset(f"{bucket}/none")
    with pytest.raises(DataError, match="cannot be opened"):
        IndexedDataset("nosuchscheme://x/y")


def test_a_corpus_on_s3(tmp_path: Path, bucket: str) -> None:
    import s3fs

    fs = s3fs.S3FileSystem()
    for name, text in (("b", "second"), ("a", "first")):
        fs.pipe_file(f"samoe-data/corpus/{name}.jsonl", jsonl([text]))
    fs.invalidate_cache()
    preprocess(replace(options(tmp_path, "none"), input=(f"{bucket}/corpus/*.jsonl",)))
    assert decoded(tmp_path / "out_text_document") == ["first", "second"]


def test_blocks_of_remote_data(tmp_path: Path) -> None:
    import fsspec

    content = np.arange(5000, dtype=np.uint16)
    fsspec.filesystem("memory").pipe_file("/blocks.bin", content.tobytes())
    reader = RemoteBinReader("memory://blocks.bin", block_bytes=100, max_blocks=3)
    random = np.random.default_rng(0)
    for _ in range(200):
        start = int(random.integers(0, 5000))
        count = int(random.integers(0, 5001 - start))
        np.testing.assert_array_equal(reader.read(np.dtype("<u2"), count, 2 * start), content[start : start + count])
        assert reader._block.cache_info().currsize <= 3
    with pytest.raises(DataError, match="were asked for"):
        reader.read(np.dtype("<u2"), 2, 9998)


@pytest.mark.parametrize("how", ["open to others", "a link", "a file"])
def test_a_folder_for_indexes_that_others_could_fill_is_not_used(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    prefix = random_dataset(tmp_path / "x", [40])
    fsspec.filesystem("memory").put_file(f"{prefix}.idx", "/index/x.idx")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = tmp_path / f"megatron_samoe_index_{os.getuid()}"
    if how == "open to others":
        folder.mkdir()
        folder.chmod(0o777)
    elif how == "a link":
        (tmp_path / "other").mkdir()
        folder.symlink_to(tmp_path / "other")
    else:
        folder.write_text("")
    with pytest.raises(DataError, match=r"nobody else can write to.*--data-cache-path"):
        fetch_index("memory://index/x.idx", None)
    folder.unlink() if folder.is_symlink() or folder.is_file() else folder.rmdir()
    assert Path(fetch_index("memory://index/x.idx", None)).read_bytes() == Path(f"{prefix}.idx").read_bytes()
    assert folder.stat().st_mode & 0o777 == 0o700
