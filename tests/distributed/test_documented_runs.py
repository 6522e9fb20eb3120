"""What pages say is so: the commands of README and of the tutorial are those that `init` prints, which lead to a served model; every
message of docs/troubleshooting.md; names, defaults and two published scripts of docs/from_megatron.md.

Commands of other pages are parsed (tests/unit/cli/test_documented_commands.py); `PARSED` says why they are not run.
"""

from __future__ import annotations

import re
import shlex
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_samoe.cli.command import module_of
from megatron_samoe.cli.quickstart import NOVELS
from megatron_samoe.config.cli import foreign_flags, parse, parse_pretrain_args, what_it_is_here
from megatron_samoe.config.derived import flag
from megatron_samoe.config.option import all_options
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.validate import validate
from megatron_samoe.dist_checkpointing.folder_lock import folder_lock
from megatron_samoe.errors import MegatronSamoeError, optional_import
from megatron_samoe.parsing import parse_yaml
from tests.harness.program import REPOSITORY, arguments, call, losses, start, write_corpus
from tests.harness.tables import table
from tests.unit.cli.test_documented_commands import PAGES, shown_commands

pytestmark = pytest.mark.distributed

TABLE = table(__file__)
#: Pages whose commands are those of `init`.
PAGES_RUN = ("README.md", "docs/tutorial.md")
#: Pages whose commands are not run as they stand, and why.
PARSED: dict[str, str] = {page: why for why, pages in TABLE["parsed"].items() for page in pages}


def blocks(page: str) -> list[str]:
    """Returns the lines of a page's code that are commands of ours, or go on with one."""
    text = re.sub(r"\\\n\s*", " ", (REPOSITORY / page).read_text())
    return [line.strip() for line in text.splitlines() if re.match(r"    (megatron-samoe|torchrun) [a-z-]", line)]


@pytest.mark.parametrize("page", PAGES_RUN)
def test_a_page_shows_what_init_prints_and_trainings_that_are_legal(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tests/unit/cli/test_init.py runs what `init` prints of a text, from the tokenizer to the server."""
    monkeypatch.chdir(tmp_path)
    Path("novel.txt").write_bytes(NOVELS.read_bytes())
    (_, _, *init), *shown = [shlex.split(line.partition(" && ")[0], comments=True) for line in blocks(page)]
    said = call(module_of("init"), *init).stdout.replace("\\\n", "")
    printed = [shlex.split(line) for line in said.splitlines() if line.startswith("megatron-samoe")]
    assert all(words in shown for words in printed) and len(printed) == (5 if "--text" in init else 0)
    monkeypatch.chdir(init[0])
    ranks = []
    for words in (words for words in shown if "pretrain" in words):
        ranks.append(int(words[2]) if words[0] == "torchrun" else 1)
        validate(parse_pretrain_args(words[words.index("pretrain") + 1 :]), ranks[-1])
    assert ranks == [1, 2]


def test_every_page_with_commands_is_run_or_says_why_not() -> None:
    pages = {str(page.relative_to(REPOSITORY)): page for page in PAGES}
    with_commands = {name for name, page in pages.items() if shown_commands(page.read_text())}
    assert set(PAGES_RUN) <= with_commands and PARSED.keys() <= pages.keys()
    in_blocks = {name for name in pages if blocks(name)}
    assert in_blocks <= {*PAGES_RUN, *PARSED}, in_blocks - {*PAGES_RUN, *PARSED}


PREPROCESS = ("--output-prefix", "x", "--tokenizer-type", "ByteTokenizer")
LARGE = "--num-layers 24 --hidden-size 2048 --num-attention-heads 16 --vocab-size 50257".split()
MESSAGES = re.findall(r"^\| `(.+?)` \|", (REPOSITORY / "docs/troubleshooting.md").read_text(), re.MULTILINE)


def said(command: str, *words: object) -> str:
    """Returns what a command that fails says."""
    done = call(module_of(command), *map(str, words))
    assert done.returncode != 0
    return done.stderr


def refused(*words: str) -> str:
    """Returns what training says of options."""
    return said("pretrain", *arguments(mock_data=True), *words)


def failed(**options: object) -> str:
    """Returns what a run on the project's corpus ends with."""
    given = {"data_path": "data/corpus", "run_dir": "other", "train_iters": 9, **options}
    return start(arguments(**given), Path("out"), cwd=Path.cwd()).fail()


def raised(cause: Callable[[], object]) -> str:
    with pytest.raises(MegatronSamoeError) as caught:
        cause()
    return str(caught.value)


def wrong_key() -> str:
    Path("config.yaml").write_text("model:\n  num_layer: 4\n")
    return said("pretrain", "--config", "config.yaml")


def rows_without_text() -> str:
    Path("rows.jsonl").write_text('{"body": "x"}\n')
    return said("preprocess", "--input", "rows.jsonl", *PREPROCESS, "--workers", 1, "--executor", "inline")


def tokenizer_again() -> str:
    Path("text.txt").write_text("It was a text. " * 20)
    Path("data/tokenizer.json").touch()
    words = "--type byte-bpe --input text.txt --vocab-size 300 --output-prefix data/tokenizer"
    return said("train-tokenizer", *words.split())


def foreign_tokens() -> str:
    return failed(data_path=write_corpus(Path("data/wide"), vocab_size=5000))


def short_text() -> str:
    return failed(data_path=write_corpus(Path("data/short"), num_documents=3, document_tokens=5))


def two_runs() -> None:
    with folder_lock("."), folder_lock("."):
        pass


def damaged() -> str:
    (weights,) = Path("run/checkpoints").glob("*/__0_0.distcp")
    content = bytearray(weights.read_bytes())
    weights.write_bytes(bytes([*content[:-1], content[-1] ^ 1]))
    try:
        return failed(run_dir="run")
    finally:
        weights.write_bytes(content)


def port_in_use() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        return said("serve", "--load", "run", "--port", taken.getsockname()[1])


CAUSES: dict[str, Callable[[], str]] = {
    "--num-expert-bank is": lambda: refused("--num-expert-bank", "2"),
    "--recompute-activations is": lambda: refused("--recompute-activations"),
    "--num-expert-banks =": lambda: refused("--expert-layout", "moe"),
    "model.num_layer": wrong_key,
    "--num-attention-heads": lambda: refused("--num-attention-heads", "3"),
    "--tensor-model-parallel-size": lambda: refused("--tensor-model-parallel-size", "3"),
    "--global-batch-size": lambda: refused("--micro-batch-size", "3"),
    "--distributed-backend": lambda: refused("--distributed-backend", "nccl"),
    "--memory-gb": lambda: said("plan", "--world-size", 1, "--memory-gb", 1, "--mock-data", *LARGE),
    "--input": lambda: said("preprocess", "--input", "none.jsonl", *PREPROCESS),
    "rows.jsonl": rows_without_text,
    "... exists. Give": tokenizer_again,
    "There is no dataset": lambda: said("pretrain", *arguments(data_path="data/corpsu")),
    "... holds token id": foreign_tokens,
    "The train split": short_text,
    "The valid split": lambda: failed(split="100,0,0"),
    "The checkpoint in": lambda: failed(run_dir="run", hidden_size=32),
    "... is in use": lambda: raised(two_runs),
    "Iteration": lambda: failed(lr=1e30),
    "... is damaged": damaged,
    "--load": lambda: said("generate", "--load", "runs/none", "--prompt", "x"),
    "... has no validation loss": lambda: said("report", "--output", "report.html", "run"),
    "--host and --port": port_in_use,
    "Task piqa": lambda: said("evaluate", "--load", "run", "--data-dir", "data", "--tasks", "piqa"),
    "--save-dir": lambda: said("convert", "--load-dir", "run/checkpoints", "--save-dir", "run", "--to", "hf"),
    "... needs the package": lambda: raised(lambda: optional_import("not_installed", "hf", "Converting")),
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, and a run of two steps that was stopped before its first evaluation."""
    folder = tmp_path_factory.mktemp("project")
    write_corpus(folder / "data/corpus")
    start(arguments(data_path="data/corpus", run_dir="run", exit_interval=2), folder / "out", cwd=folder).succeed()
    return folder


@pytest.mark.parametrize("message", MESSAGES)
def test_the_cause_gives_the_message(message: str, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    (cause,) = [cause for begin, cause in CAUSES.items() if message.startswith(begin)]
    pattern = ".*".join(re.escape(part) for part in message.split("..."))
    found = " ".join(cause().split())
    assert re.search(pattern, found), found


def test_every_cause_is_on_the_page() -> None:
    assert len(MESSAGES) == len(CAUSES) >= 20


FACTS = parse_yaml((REPOSITORY / "docs/megatron.yaml").read_text())
PAGE = (REPOSITORY / "docs/from_megatron.md").read_text()
OURS = {flag(name): (group, name) for group, name, *_ in all_options(PretrainConfig())}
#: Ranks of a script's own layout, and what makes it a run of four ranks that two processor cores train.
SCRIPTS: dict[str, tuple[int, str]] = TABLE["scripts"]


def option(config: PretrainConfig, name: str) -> Any:
    group, field = OURS[name]
    return getattr(getattr(config, group), field)


def translated(script: str, *more: str) -> PretrainConfig:
    return parse_pretrain_args(["--config", str(REPOSITORY / f"examples/from_megatron/{script}.yaml"), *more])


def test_names_are_one_thing_each() -> None:
    same = set(FACTS["same"])
    assert len(same) > 100 and same <= OURS.keys()
    assert not any(same & set(flags) for flags in foreign_flags().values())


def test_the_table_of_defaults_is_true() -> None:
    rows = re.findall(r"^\| (`--.*?) \| (.*?) \| (.*?) \|$", PAGE.split("## Two scripts")[0], re.MULTILINE)
    listed: dict[str, tuple[str, str]] = {}
    for names, there, here in rows:
        flags = re.findall(r"`(--[a-z0-9-]+)`", names)
        values = [(text.split(", ") * len(flags))[: len(flags)] for text in (there, here)]
        listed |= dict(zip(flags, zip(*values, strict=True), strict=True))
    derived = {"--moe-ffn-hidden-size"}  # whose default is words
    assert listed.keys() == FACTS["defaults"].keys() | derived
    words = {"none": None, "no": False, "yes": True, "2^32": 2**32, "2^16": 2**16}
    for name, there in FACTS["defaults"].items():
        written = [words.get(text, text) for text in listed[name]]
        default = option(PretrainConfig(), name)
        for text, value in zip(written, (there, default), strict=True):
            assert text == value or float(text) == value, name
        assert default != there, f"{name} does not differ"


@pytest.mark.parametrize("script", FACTS["scripts"])
def test_each_flag_of_a_script_is_kept_renamed_or_refused(script: str) -> None:
    config = translated(script, "--tokenizer-model", "x", "--data-path", "x", "--save", "x")
    validate(config, SCRIPTS[script][0])
    asked = {"--no-load-optim", "--no-load-rng"}  # of a run that begins from a checkpoint
    flags, changed = FACTS["scripts"][script], FACTS["changed"][script]
    for name in changed:
        assert any(f"| `{name}` |" in line and changed[name] in line for line in PAGE.splitlines()), name
    others = flags.keys() - OURS.keys()
    assert all(map(what_it_is_here, others))
    kept = [name for name in flags if flags[name] != "x" and name not in others | asked | changed.keys()]
    words = [name if flags[name] is True else f"{name}={flags[name]}" for name in kept]
    given = parse(words).config
    assert len(kept) > 30 and {name: option(config, name) for name in kept} == {
        name: option(given, name) for name in kept
    }


@pytest.mark.parametrize("script", FACTS["scripts"])
def test_a_translated_script_trains(script: str, tmp_path: Path) -> None:
    config = ["--config", str(REPOSITORY / f"examples/from_megatron/{script}.yaml"), "--run-dir", str(tmp_path / "run")]
    start([*config, *SCRIPTS[script][1].split()], tmp_path / "out", num_ranks=4).succeed()
    assert len(losses(tmp_path / "run/metrics.jsonl")) == 2
