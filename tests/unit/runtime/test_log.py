"""Where the package's messages go."""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO

from megatron_samoe.log import configure_logging, logger


def test_messages_follow_standard_output_where_it_is_exchanged() -> None:
    configure_logging()
    first, second = StringIO(), StringIO()
    for text, stream in (("one", first), ("two", second)):
        with redirect_stdout(stream):
            logger.info(text)
    assert (first.getvalue(), second.getvalue()) == ("one\n", "two\n")
