"""What is made hostile: files of each format that are sound, and what users do with them."""

from __future__ import annotations

import bz2
import gzip
import json
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import yaml

from tests.hostile import changes, corpus_changes
from tests.hostile.changes import ANY, JSON, TEXT, YAML, Change

TEXTS = [f"document {n} {'a' * 40} " + "words and words! " * (n % 3) for n in range(16)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def _native(folder: Path) -> None:
    from tests.harness.serving import save_tiny

    save_tiny(folder / "run")


def _hugging_face(folder: Path, most_bytes: int = 1 << 30) -> None:
    from megatron_samoe.convert.hf.export import plan_export, write_export
    from tests.harness.tiny import tiny_config
    from tests.unit.convert.memory_source import new_source

    source = new_source(tiny_config("moe", num_layers=2, style="llama", moe_router_topk=2))
    write_export(plan_export(source, max_shard_bytes=most_bytes), folder / "hf", lambda _: None)
    _tokenizers(folder / "hf")
    talk = {
        "eos_token": {"content": "<|endoftext|>"},
        "chat_template": [{"name": "default", "template": "{{ messages }}"}],
    }
    (folder / "hf/tokenizer_config.json").write_text(json.dumps(talk))


def _pickled(folder: Path) -> None:
    import safetensors.torch
    import torch

    _hugging_face(folder)
    weights = folder / "hf/model.safetensors"
    torch.save(safetensors.torch.load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()


def _megatron(folder: Path) -> None:
    from tests.harness.megatron_files import write_rank_files
    from tests.harness.tiny import tiny_config
    from tests.unit.convert.memory_source import new_source

    source = new_source(tiny_config("moe", num_layers=2, style="llama"))
    write_rank_files(source, folder / "megatron")


def _torch_dist(folder: Path) -> None:
    from megatron_samoe.convert.megatron import plan_dist_export, write_dist_export
    from tests.harness.tiny import tiny_config
    from tests.unit.convert.memory_source import new_source

    write_dist_export(plan_dist_export(new_source(tiny_config("moe", num_layers=2))), folder / "torch_dist", 7)


def _tokenizers(folder: Path) -> None:
    from megatron_samoe.datasets.train_tokenizer import train_byte_bpe, train_sentencepiece

    train_byte_bpe(iter(TEXTS), 300, str(folder / "tokenizer"))
    train_sentencepiece(iter(TEXTS), "bpe", 290, str(folder / "pieces"))
    (folder / "texts.jsonl").write_bytes(LINES)


def _parquet(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), folder / "texts.parquet", row_group_size=8)


def _jsonl(folder: Path) -> None:
    _native(folder)
    (folder / "texts.jsonl").write_bytes(LINES)
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress(LINES, mtime=0))
    (folder / "packed.jsonl.bz2").write_bytes(bz2.compress(LINES))
    (folder / "prompts.jsonl").write_bytes(b'{"prompt": "Emma"}\n{"prompt_ids": [69, 109]}\n')


def _yaml(folder: Path) -> None:
    from tests.harness.program import TINY_MODEL, TINY_RUN

    (folder / "run.yaml").write_text(yaml.safe_dump({**TINY_MODEL, **TINY_RUN, "mock_data": True, "lr": 1e-3}))


def _dataset(folder: Path) -> None:
    from tests.harness.program import write_corpus

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
#: Sizes that a file does not choose, since work may be as large as they say.
PINNED = (
    "--num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --train-iters 1 --eval-iters 0 "
    "--global-batch-size 2 --micro-batch-size 2"
)
MODEL = "--train-iters 1 --global-batch-size 2 --micro-batch-size 2 --mock-data --use-checkpoint-args --load {in}/run"
PREPROCESS = "preprocess --output-prefix {out}/made --executor inline --tokenizer-type "
BYTES = PREPROCESS + "ByteTokenizer --input {file}"
GENERATE = "generate --max-new-tokens 2 --num-threads 1 --load {in}/run "


def _of_model(folder: str, *targets: str) -> tuple[str, ...]:
    """Returns the commands that look at a model, and that convert it."""
    looks = ("list", "list --raw", "verify", "stat", "check", "sharing")
    convert = f"convert --load-dir {{in}}/{folder} --save-dir {{out}}/made --to "
    return (*(f"inspect {look} {{in}}/{folder}" for look in looks), *(convert + target for target in targets))


def _tokenized(kind: str, options: str) -> tuple[str, ...]:
    return (f"{PREPROCESS}{kind} --input {{in}}/texts.jsonl {options}",)


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
    import safetensors

    safetensors.safe_open(path, "pt")


def _read_table(path: Path) -> None:
    import pyarrow.parquet

    pyarrow.parquet.read_table(path)


def _tokenizer(path: Path) -> None:
    import tokenizers

    tokenizers.Tokenizer.from_file(str(path))


_OURS = (*_of_model("run", "hf", "torch_dist"), GENERATE + "--prompt Emma", "load {in}/run", f"pretrain {MODEL}")
_DIST = _of_model("torch_dist", "hf", "native")
_MEGATRON, _HF = _of_model("megatron", "hf", "native"), _of_model("hf", "native", "torch_dist", "gguf", "hf")
_TRAIN = "train-tokenizer --type byte-bpe --vocab-size 300 --output-prefix {out}/made --input {file}"
_TABLES = (BYTES, f"{BYTES} --on-bad-input skip", f"{BYTES} --executor process --workers 1", _TRAIN)
_LONG, _EQUAL = "--max-document-mb 1 --on-bad-input skip", "--split-sentences --deduplicate exact"
_ROWS = (*_TABLES, f"{BYTES} {_LONG}", f"{BYTES} {_EQUAL}", f"{BYTES} --input-format text --document-kb 64")
_GPT2 = _tokenized("GPT2BPETokenizer", "--vocab-file {in}/tokenizer-vocab.json --merge-file {in}/tokenizer-merges.txt")
_CONFIG = f"--config {{file}} {PINNED} --mock-data"
_NO_HOLES = {name: change for name, change in ANY.items() if name != changes.HOLES}
_LOOKS = tuple(f"inspect-dataset {look} {{in}}/corpus" for look in ("verify", "stats", "decode"))
_CORPUS = (*_LOOKS, f"pretrain --data-path {{in}}/corpus --split 100,0,0 {PINNED}")
_TOKENIZER = _tokenized("HuggingFaceTokenizer", "--tokenizer-model {file}")
_PIECES = _tokenized("SentencePieceTokenizer", "--tokenizer-model {file}")
_SPEC = ANY | TEXT | JSON | corpus_changes.TOKENIZER
VICTIMS = (
    Victim("native", "run/iter_*/train_state.json", ANY | TEXT | JSON | changes.DIGESTS, _OURS),
    Victim("native", "run/iter_*/config.yaml", ANY | TEXT | YAML, _OURS),
    Victim("native", "run/iter_*/.metadata", ANY | changes.PICKLE, _OURS),
    Victim("native", "run/iter_*/*.distcp", _NO_HOLES, _OURS),
    Victim("native", "run/latest*", ANY | TEXT, _OURS),
    Victim("megatron", "megatron/iter_*/*/*.pt", ANY | changes.TORCH, _MEGATRON),
    Victim("megatron", "megatron/latest*", ANY | TEXT, _MEGATRON),
    Victim("torch_dist", "torch_dist/iter_*/common.pt", ANY | changes.PICKLE | changes.TORCH, _DIST),
    Victim("torch_dist", "torch_dist/iter_*/.metadata", ANY | changes.PICKLE, _DIST),
    Victim("torch_dist", "torch_dist/iter_*/metadata.json", ANY | TEXT | JSON, _DIST),
    Victim("torch_dist", "torch_dist/iter_*/*.distcp", _NO_HOLES, _DIST),
    Victim("safetensors", "hf/model.safetensors", ANY | changes.SAFETENSORS, _HF, _safetensors),
    Victim("hf", "hf/config.json", ANY | TEXT | JSON, _HF),
    Victim("hf", "hf/*.index.json", ANY | TEXT | JSON, _HF),
    Victim("hf", "hf/generation_config.json", ANY | JSON, _HF),
    Victim("hf", "hf/tokenizer_config.json", ANY | TEXT | JSON, _HF),
    Victim("hf", "hf/tokenizer.json", ANY | JSON | corpus_changes.TOKENIZER, _HF),
    Victim("hf", "hf/megatron_samoe.json", ANY | JSON, _HF),
    Victim("hf", "hf/model-*1-of*.safetensors", ANY, _HF, _safetensors),
    Victim("pickled", "hf/pytorch_model.bin", ANY | changes.PICKLE | changes.TORCH, _HF),
    Victim("tokenizers", "tokenizer.json", _SPEC, _TOKENIZER, _tokenizer),
    Victim("tokenizers", "tokenizer-vocab.json", ANY | TEXT | JSON, _GPT2),
    Victim("tokenizers", "tokenizer-merges.txt", ANY | TEXT, _GPT2),
    Victim("tokenizers", "pieces.model", ANY, _PIECES),
    Victim("parquet", "texts.parquet", ANY | corpus_changes.PARQUET, _TABLES, _read_table),
    Victim("jsonl", "texts.jsonl", _NO_HOLES | TEXT | corpus_changes.JSONL, _ROWS),
    Victim("jsonl", "packed.jsonl.gz", _NO_HOLES | corpus_changes.packed(gzip.compress), _ROWS),
    Victim("jsonl", "packed.jsonl.bz2", _NO_HOLES | corpus_changes.packed(bz2.compress), _ROWS),
    Victim("jsonl", "prompts.jsonl", _NO_HOLES | TEXT | corpus_changes.JSONL, (GENERATE + "--prompts-file {file}",)),
    Victim("yaml", "run.yaml", ANY | TEXT | YAML, (f"pretrain {_CONFIG}", f"plan --world-size 2 {_CONFIG}")),
    Victim("dataset", "corpus.idx", ANY, _CORPUS),
    Victim("dataset", "corpus.bin", _NO_HOLES, _CORPUS),
)
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
