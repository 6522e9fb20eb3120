"""The text that --help of every command shows."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any


def plain_help(parse: Callable[..., Any]) -> str:
    """Returns the text of --help without boxes, and without "(default: )" where there is no default.

    Args:
        parse: `tyro.cli` with all but its `args`.
    """
    shown = io.StringIO()  # without an encoding, so tyro draws no boxes
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        parse(args=["--help"])
    text = re.sub(r"\s*\(default:\s*(None|False|'')?\s*\)", "", shown.getvalue())
    text = text.replace("At most one argument can be overridden.", "At most one of these.")
    return "\n".join(_filled(text.splitlines(), shutil.get_terminal_size().columns))


def _filled(lines: Sequence[str], width: int) -> Iterator[str]:
    """Yields lines whose paragraphs are filled: tyro breaks an option's text also where its source does, and a
    description not at all."""
    paragraphs: list[tuple[str, str]] = []  # each with what is before its first word
    for line in lines:
        before, words = re.findall(r"^(  \S.*?  +|\s*)(.*)", line.rstrip())[0]
        last, text = paragraphs[-1] if paragraphs else ("", "")
        if len(before) in (1, 2):  # a heading, a rule, or a flag without a text beside it
            paragraphs.append((line, ""))
        elif words and text and before == " " * len(last):
            paragraphs[-1] = (last, f"{text} {words}")
        else:
            paragraphs.append((before, words))
    for before, text in paragraphs:
        wrapper = textwrap.TextWrapper(width, before, " " * len(before), break_long_words=False, break_on_hyphens=False)
        yield from wrapper.wrap(text) or [before.rstrip()]
