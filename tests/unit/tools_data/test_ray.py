"""Preprocessing on a Ray cluster started on this machine: the same bytes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_samoe.datasets.preprocess.options import PreprocessOptions
from megatron_samoe.datasets.preprocess.run import preprocess
from megatron_samoe.errors import DataError


def test_ray_gives_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is an extra: pip install 'megatron_samoe[ray]'")
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": f"document {n}"}) + "\n" for n in range(500)))

    def run(executor: str, **more: object) -> bytes:
        options = PreprocessOptions((str(tmp_path / "in.jsonl"),), str(tmp_path / executor), quiet=True, workers=2)
        preprocess(replace(options, executor=executor, chunk_bytes=2000, **more))  # type: ignore[arg-type]
        return b"".join((tmp_path / f"{executor}_text_document{s}").read_bytes() for s in (".bin", ".idx"))

    assert run("ray") == run("inline")
    with pytest.raises(DataError, match="cannot be read"):
        run("ray", tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(tmp_path / "none"))
