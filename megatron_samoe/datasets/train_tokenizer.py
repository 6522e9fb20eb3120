"""Trains a tokenizer on a corpus: SentencePiece BPE or unigram, or byte-level BPE."""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_samoe.datasets.arguments import Parser, run
from megatron_samoe.datasets.preprocess import inputs, records
from megatron_samoe.datasets.preprocess.options import PreprocessOptions
from megatron_samoe.errors import DataError

TYPES = ("sentencepiece-bpe", "sentencepiece-unigram", "byte-bpe")
EOD = "<|endoftext|>"
# SentencePiece drops longer "sentences"; longer lines are cut at white space below this.
_MAX_LINE_BYTES = 4096


def corpus_texts(options: PreprocessOptions, sample_bytes: int, seed: int) -> Iterator[str]:
    """Yields the texts of a corpus, as many as fit about `sample_bytes` if that is above 0.

    A sample takes chunks of the corpus with equal chance, so every part of it is heard.
    """
    files = inputs.find_inputs(options)
    total = sum(file.num_bytes for file in files)
    chance = min(1.0, sample_bytes / total) if sample_bytes and total else 1.0
    choose = random.Random(seed)
    for chunk in inputs.cut(files, options):
        if choose.random() >= chance and chance < 1.0:
            continue
        read = records.read(chunk, options)
        if read.bad and options.on_bad_input == "fail":
            line, reason = read.bad[0]
            raise DataError(
                f"{chunk.file}, line {line + 1} of chunk {chunk.number}: {reason}. --on-bad-input skip leaves it out."
            )
        for document in read.documents:
            yield "\n".join(document)


def _lines(texts: Iterator[str]) -> Iterator[str]:
    """Yields the lines of texts, long ones cut at spaces, empty ones left out."""
    for text in texts:
        for line in text.split("\n"):
            while len(line) > _MAX_LINE_BYTES // 4:
                cut = line.rfind(" ", 0, _MAX_LINE_BYTES // 4)
                cut = cut if cut > 0 else _MAX_LINE_BYTES // 4
                if line[:cut].strip():
                    yield line[:cut]
                line = line[cut:]
            if line.strip():
                yield line


def train_sentencepiece(
    texts: Iterator[str], kind: str, vocab_size: int, output_prefix: str, num_threads: int = 1
) -> str:
    """Writes `{output_prefix}.model` and `.vocab`; returns the path of the model.

    No text is lost: unknown characters become bytes, white space and line ends are kept. Ids: 0 <unk>, 1 <s>,
    2 </s> (end of document), then 256 bytes, a line end, and the pieces. Deterministic for the same texts.
    """
    import sentencepiece

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_prefix=f"{output_prefix}.partial",
            model_type=kind,
            vocab_size=vocab_size,
            character_coverage=0.9995,
            byte_fallback=True,
            user_defined_symbols=["\n"],
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=True,
            num_threads=num_threads,
            max_sentence_length=_MAX_LINE_BYTES * 4,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise DataError(f"The tokenizer cannot be trained: {_sentencepiece_reason(error, vocab_size)}") from error
    for suffix in (".vocab", ".model"):
        os.replace(f"{output_prefix}.partial{suffix}", output_prefix + suffix)
    return f"{output_prefix}.model"


def _sentencepiece_reason(error: Exception, vocab_size: int) -> str:
    text = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
    if "vocab" in text.lower():
        return f"--vocab-size {vocab_size} does not fit the corpus ({text})"
    return text


def train_byte_bpe(texts: Iterator[str], vocab_size: int, output_prefix: str) -> str:
    """Writes `{output_prefix}.json` (a tokenizer.json), `-vocab.json` and `-merges.txt`; returns the first path.

    GPT-2's pre-tokenization. Ids: the 256 bytes, the merges in order, and last the end-of-document token.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise DataError(f"--vocab-size {vocab_size} is too small: 256 bytes and the end-of-document token need 257.")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([EOD])
    spec: dict[str, Any] = json.loads(tokenizer.to_str())
    model = spec["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    vocab = model["vocab"] | {EOD: len(model["vocab"])}
    _store(f"{output_prefix}-vocab.json", json.dumps(vocab, ensure_ascii=False))
    _store(f"{output_prefix}-merges.txt", "#version: 0.2\n" + "".join(f"{merge}\n" for merge in merges))
    _store(f"{output_prefix}.json", tokenizer.to_str())
    return f"{output_prefix}.json"


def _store(path: str, text: str) -> None:
    with open(f"{path}.partial", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(f"{path}.partial", path)


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = Parser("Trains a tokenizer on text.", prog="train_tokenizer.py")
    parser.add_argument("--type", required=True, choices=TYPES, help="kind of tokenizer")
    parser.add_argument("--input", nargs="+", required=True, help="files, globs or folders, as for preprocess_data.py")
    parser.add_argument("--input-format", choices=inputs_formats(), default="auto", help="auto goes by the file's name")
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="keys (Parquet: columns) to train on")
    parser.add_argument(
        "--on-bad-input", choices=("skip", "fail"), default="fail", help="for lines that are no document"
    )
    parser.add_argument("--vocab-size", type=int, required=True, help="entries of the vocabulary")
    parser.add_argument("--output-prefix", required=True, help="path of the output without suffix")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing tokenizer")
    parser.add_argument("--sample-mb", type=int, default=1000, help="train on about this much text; 0 for all")
    parser.add_argument("--seed", type=int, default=1234, help="of the sample")
    parser.add_argument("--num-threads", type=int, default=os.cpu_count() or 1, help="threads of the trainer")
    return parser


def inputs_formats() -> tuple[str, ...]:
    """Returns the input formats that can be named."""
    from megatron_samoe.datasets.preprocess.options import INPUT_FORMATS

    return INPUT_FORMATS


def _main(arguments: Sequence[str] | None) -> None:
    args = make_parser().parse_args(arguments)
    if args.vocab_size < 1:
        raise DataError(f"--vocab-size {args.vocab_size} must be at least 1.")
    made = [f"{args.output_prefix}{end}" for end in (".model", ".vocab", ".json", "-vocab.json", "-merges.txt")]
    existing = [path for path in made if os.path.exists(path)]
    if existing and not args.overwrite:
        raise DataError(f"{existing[0]} exists. Give --overwrite to replace it, or another --output-prefix.")
    options = PreprocessOptions(
        input=tuple(args.input), output_prefix=args.output_prefix, input_format=args.input_format,
        json_keys=tuple(args.json_keys), on_bad_input=args.on_bad_input, chunk_bytes=1 << 20,
    )  # fmt: skip
    texts = corpus_texts(options, args.sample_mb << 20, args.seed)
    first = next(texts, None)
    if first is None:
        raise DataError("The corpus is empty: no text to train a tokenizer on.")
    texts = _chain(first, texts)
    if args.type == "byte-bpe":
        path = train_byte_bpe(texts, args.vocab_size, args.output_prefix)
    else:
        kind = args.type.removeprefix("sentencepiece-")
        path = train_sentencepiece(texts, kind, args.vocab_size, args.output_prefix, args.num_threads)
    print(f"wrote {path}")


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    return run(_main, arguments)


if __name__ == "__main__":
    sys.exit(main())
