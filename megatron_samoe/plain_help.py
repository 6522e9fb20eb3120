"""The text that --help of every command shows."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable
from typing import Any


def plain_help(parse: Callable[..., Any]) -> str:
    """Returns the text of --help without boxes, and without "(default: )" where there is no default.

    Args:
        parse: `tyro.cli` with all but its `args`.
    """
    shown = io.StringIO()  # without an encoding, so tyro draws no boxes
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        parse(args=["--help"])
    text = re.sub(r"\s*\(default:\s*(None|False)?\s*\)", "", shown.getvalue())
    text = text.replace("At most one argument can be overridden.", "At most one of these.")
    return "\n".join(line.rstrip() for line in text.splitlines())
