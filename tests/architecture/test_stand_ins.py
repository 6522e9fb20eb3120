"""What only tests use stays out of the library that is installed."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_exchanges_know_nothing_of_the_library_of_the_tests() -> None:
    folders = (
        ROOT / "cpp_ext" / "comm",
        ROOT / "cpp_ext" / "bindings" / "row_exchange",
        ROOT / "megatron_samoe" / "row_exchange",
    )
    files = [path for folder in folders for path in folder.iterdir() if path.suffix in (".cpp", ".h", ".py")]
    assert len(files) > 20
    for path in files:
        text = path.read_text().lower()
        assert not any(word in text for word in ("fake_nccl", "stand_in", "stand-in", "host_finished", "tests")), path
