"""What is made hostile: files of each format that are sound, and what users do with them."""

from __future__ import annotations

import bz2
import gzip
import json
import random
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import pyarrow
import pyarrow.parquet
import safetensors.torch
import tokenizers
import torch
import yaml

from megatron_samoe.convert.hf.export import plan_export, write_export
from megatron_samoe.convert.megatron import plan_dist_export, write_dist_export
from megatron_samoe.datasets.train_tokenizer import train_byte_bpe, train_sentencepiece
from tests.harness.megatron_files import write_rank_files
from tests.harness.program import TINY_MODEL, TINY_RUN, write_corpus
from tests.harness.serving import save_tiny
from tests.harness.tables import table
from tests.harness.tiny import tiny_config
from tests.hostile import changes, corpus_changes
from tests.hostile.changes import ANY, JSON, TEXT, YAML, Change
from tests.unit.convert.memory_source import new_source

TEXTS = [f"document {n} {'a' * 40} " + "words and words! " * (n % 3) for n in range(16)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def _native(folder: Path) -> None:
    save_tiny(folder / "run")


def _hugging_face(folder: Path, most_bytes: int = 1 << 30) -> None:
    source = new_source(tiny_config("moe", num_layers=2, style="llama", moe_router_topk=2))
    write_export(plan_export(source, max_shard_bytes=most_bytes), folder / "hf", lambda _: None)
    _tokenizers(folder / "hf")
    talk = {
        "eos_token": {"content": "<|endoftext|>"},
        "chat_template": [{"name": "default", "template": "{{ messages }}"}],
    }
    (folder / "hf/tokenizer_config.json").write_text(json.dumps(talk))


def _pickled(folder: Path) -> None:
    _hugging_face(folder)
    weights = folder / "hf/model.safetensors"
    torch.save(safetensors.torch.load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()


def _megatron(folder: Path) -> None:
    source = new_source(tiny_config("moe", num_layers=2, style="llama"))
    write_rank_files(source, folder / "megatron")


def _torch_dist(folder: Path) -> None:
    write_dist_export(plan_dist_export(new_source(tiny_config("moe", num_layers=2))), folder / "torch_dist", 7)


def _tokenizers(folder: Path) -> None:
    train_byte_bpe(iter(TEXTS), 300, str(folder / "tokenizer"))
    train_sentencepiece(iter(TEXTS), "bpe", 290, str(folder / "pieces"))
    (folder / "texts.jsonl").write_bytes(LINES)


def _parquet(folder: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), folder / "texts.parquet", row_group_size=8)


def _jsonl(folder: Path) -> None:
    _native(folder)
    (folder / "texts.jsonl").write_bytes(LINES)
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress(LINES, mtime=0))
    (folder / "packed.jsonl.bz2").write_bytes(bz2.compress(LINES))
    (folder / "prompts.jsonl").write_bytes(b'{"prompt": "Emma"}\n{"prompt_ids": [69, 109]}\n')


def _yaml(folder: Path) -> None:
    (folder / "run.yaml").write_text(yaml.safe_dump({**TINY_MODEL, **TINY_RUN, "mock_data": True, "lr": 1e-3}))


def _dataset(folder: Path) -> None:
    write_corpus(folder / "corpus")


#: Writes sound files into a folder.
MAKERS: dict[str, Callable[[Path], None]] = {
    "native": _native,
    "megatron": _megatron,
    "torch_dist": _torch_dist,
    "safetensors": _hugging_face,
    "hf": partial(_hugging_face, most_bytes=20_000),  # in several files
    "pickled": _pickled,
    "tokenizers": _tokenizers,
    "parquet": _parquet,
    "jsonl": _jsonl,
    "yaml": _yaml,
    "dataset": _dataset,
}


@dataclass(frozen=True)
class Victim:
    """A file that is made hostile.

    Attributes:
        format: whose sound files it is among.
        glob: its path there.
        changes: by which it is.
        commands: what users do with it: {in} is the folder, {file} the file, {out} an empty folder.
        refuse: another program, which raises where the file is damaged; then no command may end well.
    """

    format: str
    glob: str
    changes: Mapping[str, Change]
    commands: tuple[str, ...]
    refuse: Callable[[Path], object] | None = None


def _safetensors(path: Path) -> None:
    safetensors.safe_open(path, "pt")


def _read_table(path: Path) -> None:
    pyarrow.parquet.read_table(path)


def _tokenizer(path: Path) -> None:
    tokenizers.Tokenizer.from_file(str(path))


TABLE = table(__file__)
#: Kinds of changes, by the names that the table gives them.
CHANGES: dict[str, Mapping[str, Change]] = {
    "any": ANY,
    "any_but_holes": {name: change for name, change in ANY.items() if name != changes.HOLES},
    "text": TEXT,
    "json": JSON,
    "yaml": YAML,
    "digests": changes.DIGESTS,
    "pickle": changes.PICKLE,
    "torch": changes.TORCH,
    "safetensors": changes.SAFETENSORS,
    "tokenizer": corpus_changes.TOKENIZER,
    "parquet": corpus_changes.PARQUET,
    "jsonl": corpus_changes.JSONL,
    "gz": corpus_changes.packed(gzip.compress),
    "bz2": corpus_changes.packed(bz2.compress),
}
REFUSING = {"safetensors": _safetensors, "parquet": _read_table, "tokenizer": _tokenizer}


def _victim(format: str, glob: str, kinds: str, commands: tuple[str, ...], refusing: str = "") -> Victim:
    changed = {name: change for kind in kinds.split() for name, change in CHANGES[kind].items()}
    full = tuple(re.sub(r"{(\w+)}", lambda word: TABLE["words"].get(word[1], word[0]), line) for line in commands)
    return Victim(format, glob, changed, full, REFUSING.get(refusing))


VICTIMS = [_victim(*row) for row in TABLE["victims"]]
PAIRS = [(victim, change) for victim in VICTIMS for change in victim.changes]


@cache
def _in_order(turn: str) -> list[tuple[Victim, str]]:
    return random.Random(turn).sample(PAIRS, len(PAIRS))


@dataclass(frozen=True)
class Case:
    """A change to a file and a command that reads it. Of one seed, every change of every file comes once before any comes again."""

    seed: int
    number: int

    @property
    def drawn(self) -> tuple[Victim, str, str]:
        """The file, its change and the command."""
        turn, at = divmod(self.number, len(PAIRS))
        victim, change = _in_order(f"{self.seed} {turn}")[at]
        return victim, change, random.Random(f"{self.seed} {self.number}").choice(victim.commands)

    def __str__(self) -> str:
        victim, change, command = self.drawn
        return f"{victim.format}, {victim.glob}: {change}\n  {command}\n  python -m tests.hostile --replay {self.seed}:{self.number}"

    def prepare(self, sound: Path, folder: Path) -> None:
        """Copies the sound files and makes one of them hostile."""
        victim, change, _ = self.drawn
        shutil.copytree(sound, folder / "in")
        (folder / "out").mkdir()
        victim.changes[change](next((folder / "in").glob(victim.glob)), random.Random(f"{self.seed} {self.number}"))

    def refuse(self, path: Path) -> None:
        """Raises what another program raises of the file; returns where there is none."""
        if self.drawn[0].refuse is not None:
            self.drawn[0].refuse(path)
