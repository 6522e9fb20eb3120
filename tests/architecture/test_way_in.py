"""What a reader passes from a command line to the first optimizer step stays little."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOST_FILES, MOST_CLIMBS = 20, 8


def test_the_way_to_the_first_step_is_short() -> None:
    words = [sys.executable, "-m", "tools.pages.trace_start"]
    shown = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files, climbs = (int(re.findall(rf"^{what}: (\d+)$", shown, re.MULTILINE)[0]) for what in ("files", "climbs"))
    assert "  training/train_step.py" in shown, "the way ends at the step"
    assert 10 < files <= MOST_FILES and climbs <= MOST_CLIMBS, shown


def test_the_loop_stays_a_page() -> None:
    lines = (ROOT / "megatron_samoe/training/trainer.py").read_text().splitlines()
    assert len(lines) <= 250
