"""The commands of README and of the tutorial, run in their order as they stand, on less text and for fewer steps.

Commands of other pages are parsed (tests/unit/cli/test_documented_commands.py); `PARSED` says why they are not run.
"""

from __future__ import annotations

import json
import re
import shlex
import signal
import urllib.request
from pathlib import Path

import pytest

from megatron_samoe.cli.command import module_of
from megatron_samoe.cli.quickstart import NOVELS
from tests.harness.program import REPOSITORY, ProgramRun, start
from tests.harness.tables import table
from tests.unit.cli.test_documented_commands import PAGES, shown_commands

pytestmark = pytest.mark.distributed
RUN = ("README.md", "docs/tutorial.md")
#: Pages whose commands are not run as they stand, and why.
PARSED: dict[str, str] = {page: why for why, pages in table(__file__)["parsed"].items() for page in pages}
#: What makes runs short; what a page says of the same options comes first, and the last one counts.
SHORT = {
    "pretrain": "--train-iters 4 --num-layers 2 --eval-iters 1 --eval-interval 2 --save-interval 2",
    "generate": "--max-new-tokens 4",
    "serve": "--port 0",
}


def blocks(page: str) -> list[str]:
    """Returns the lines of a page's code that are commands of ours, or go on with one."""
    text = re.sub(r"\\\n\s*", " ", (REPOSITORY / page).read_text())
    return [line.strip() for line in text.splitlines() if re.match(r"    (megatron-samoe|torchrun) [a-z-]", line)]


def ask(server: ProgramRun) -> None:
    """Asks the served model for text, and ends the server."""
    found: list[str] = []

    def is_up() -> bool:
        found[:] = re.findall(r"serving first at (\S+)", server.output())
        return bool(found)

    try:
        assert server.wait_until(is_up), server.output()
        body = json.dumps({"prompt": "It was", "max_tokens": 4}).encode()
        request = urllib.request.Request(f"{found[0]}/v1/completions", body, {"Content-Type": "application/json"})
        assert json.load(urllib.request.urlopen(request))["choices"][0]["text"]
    finally:
        server.signal(signal.SIGTERM)


@pytest.mark.night
@pytest.mark.parametrize("page", RUN)
def test_the_commands_of_a_page_run_in_their_order(page: str, tmp_path: Path) -> None:
    text = NOVELS.read_text(encoding="utf-8")
    for name in ("novel.txt", "text.txt"):
        (tmp_path / name).write_text(text[:400_000])
    ran = []
    for number, line in enumerate(blocks(page)):
        words = shlex.split(line.partition(" && ")[0], comments=True)
        ranks = 1
        if words[0] == "torchrun":
            ranks, words = int(words[2]), words[words.index("megatron_samoe") :]
        _, command, *rest = words
        if command == "quickstart":  # tests/unit/cli/test_quickstart.py
            continue
        here = tmp_path if command == "init" else tmp_path / "first"
        (tmp_path / "first").exists() and (here / "other.txt").write_text(text[-2_000:])
        more = SHORT.get(command, "").replace("--train-iters 4", f"--train-iters {4 + 2 * (ranks > 1)}").split()
        done = start([*rest, *more], tmp_path / f"out-{number}", ranks, cwd=here, program=module_of(command))
        if command == "serve":
            ask(done)
        done.succeed(300)
        ran.append(command)
    assert {"init", "train-tokenizer", "preprocess", "pretrain", "generate", "serve"} <= set(ran), ran
    assert ran.count("pretrain") == 2, "on one rank, and on two"


def test_every_page_with_commands_is_run_or_says_why_not() -> None:
    pages = {str(page.relative_to(REPOSITORY)): page for page in PAGES}
    with_commands = {name for name, page in pages.items() if shown_commands(page.read_text())}
    assert set(RUN) <= with_commands and PARSED.keys() <= pages.keys()
    in_blocks = {name for name in pages if blocks(name)}
    assert in_blocks <= {*RUN, *PARSED}, in_blocks - {*RUN, *PARSED}
