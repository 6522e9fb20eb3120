"""Where the package's messages go."""

from __future__ import annotations

import subprocess
import sys
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


def test_a_message_appears_once_where_the_root_logger_writes_too() -> None:
    program = (
        "import logging; from megatron_samoe.log import *; logging.basicConfig(); configure_logging(); "
        "logger.warning('ranks drift'); logging.getLogger('other').warning('another')"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (ended.stdout, ended.stderr) == ("ranks drift\n", "WARNING:other:another\n")
