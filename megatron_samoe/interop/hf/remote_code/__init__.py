"""Our model as one self-contained class of transformers.

The other files are not imported here: they are copied beside exported weights, where
transformers loads them with trust_remote_code=True, without megatron_samoe.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_samoe.interop.hf.families.samoe import CODE_FILES


def copy_code(folder: Path) -> None:
    """Copies the class's files into a folder."""
    for name in CODE_FILES:
        shutil.copyfile(Path(__file__).parent / name, folder / name)
