"""Trains a tokenizer on a corpus: SentencePiece BPE or unigram, or byte-level BPE."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from typing import Literal

from megatron_samoe.datasets import manifest
from megatron_samoe.datasets.preprocess import inputs, records
from megatron_samoe.datasets.preprocess.options import PreprocessOptions
from megatron_samoe.errors import DataError
from megatron_samoe.parsing import JsonObject

TokenizerKind = Literal["sentencepiece-bpe", "sentencepiece-unigram", "byte-bpe"]
EOD = "<|endoftext|>"
# SentencePiece drops longer "sentences"; longer lines are cut at white space below this.
_MAX_LINE_BYTES = 4096


def corpus_texts(options: PreprocessOptions, sample_bytes: int, seed: int) -> Iterator[str]:
    """Yields the texts of a corpus, about `sample_bytes` of them if that is above 0.

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
        if read.counts.bad and options.on_bad_input == "fail":
            line, reason = read.counts.bad[0]
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


def train_byte_bpe(texts: Iterator[str], vocab_size: int, output_prefix: str) -> tuple[str, int]:
    """Writes `{output_prefix}.json` (a tokenizer.json), `-vocab.json` and `-merges.txt`; returns the first path, and the
    number of entries, which is less than `vocab_size` where the text has no more pairs to merge.

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
    spec: JsonObject = json.loads(tokenizer.to_str())
    model = spec["model"]
    vocab = model["vocab"] | {EOD: len(model["vocab"])}
    manifest.write_text(f"{output_prefix}-vocab.json", json.dumps(vocab, ensure_ascii=False))
    merges = "\n".join(["#version: 0.2", *map(" ".join, model["merges"])])
    manifest.write_text(f"{output_prefix}-merges.txt", f"{merges}\n")
    manifest.write_text(f"{output_prefix}.json", tokenizer.to_str())
    return f"{output_prefix}.json", len(vocab)
