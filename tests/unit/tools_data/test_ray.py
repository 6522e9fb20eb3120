"""Preprocessing on a Ray cluster started on this machine: the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_samoe.errors import DataError
from tests.harness.datasets import content, preprocessed


def test_ray_gives_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is an extra: pip install 'megatron_samoe[ray]'")
    texts = [f"document {n}" for n in range(500)]
    how = {"workers": 2, "chunk_bytes": 2000}
    by_ray, inline = (preprocessed(tmp_path, name, texts, executor=name, **how) for name in ("ray", "inline"))
    assert content(by_ray) == content(inline)
    with pytest.raises(DataError, match="cannot be read"):
        preprocessed(
            tmp_path, "x", texts, executor="ray", tokenizer_type="SentencePieceTokenizer", tokenizer_model="none"
        )
