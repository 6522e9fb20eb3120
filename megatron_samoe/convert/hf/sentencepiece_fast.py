"""A SentencePiece model as a tokenizer of the `tokenizers` library, which is what transformers loads.

The translation is trusted only after both have given the same ids for texts that try their odd sides; models with
normalisation rules that differ are left as they are.
"""

from __future__ import annotations

from typing import Any

from megatron_samoe.errors import DataError

#: Texts with spaces at all positions, digits, line ends, scripts that need byte fallback, and nothing.
PROBES = (
    "",
    " ",
    "Hello, world!",
    "  two  spaces  ",
    "line\nend\n\n",
    "tab\tand 1234567890",
    "naïve café ﬁne ＡＢＣ",
    "中文字符 と かな",
    "emoji 👩‍🚀🎉",
    "a" * 70,
    "def f(x):\n    return x ** 2 + 0.5e-3\n",
    "ÅÄÖ Ελληνικά русский עברית",
)
_SPACE = "▁"
_USER_DEFINED = 4


def fast_tokenizer(model: bytes, processor: Any) -> Any | None:
    """Returns a `tokenizers.Tokenizer` that gives the same ids as a SentencePiece model; None where it would not.

    Args:
        model: content of the .model file.
        processor: a SentencePieceProcessor of it.
    """
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:  # it needs protobuf
        return None
    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(model)
    tokenizer = _translated(proto)
    if tokenizer is None:
        return None
    for text in (*PROBES, *_probes_of(proto)):
        ids = processor.encode(text, out_type=int)
        if tokenizer.encode(text, add_special_tokens=False).ids != ids:
            return None
        if tokenizer.decode(ids, skip_special_tokens=False) != processor.decode(ids):
            return None
    return tokenizer


def _probes_of(proto: Any) -> list[str]:
    """Returns a text for each piece that the model's user defined: at the start, between words and spaces, twice."""
    own = [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]
    return [f"{piece}one{piece}two {piece} three  {piece}{piece}" for piece in own]


def _translated(proto: Any) -> Any | None:
    import tokenizers
    from tokenizers import decoders, models, normalizers

    spec, trainer = proto.normalizer_spec, proto.trainer_spec
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    if spec.precompiled_charsmap and spec.name != "identity":
        first: list[Any] = [normalizers.Precompiled(spec.precompiled_charsmap)]
    else:
        first = []
    if spec.remove_extra_whitespaces:
        first += [normalizers.Strip(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    if not spec.escape_whitespaces:
        return None
    if spec.add_dummy_prefix:
        first.append(normalizers.Prepend(_SPACE))
    first.append(normalizers.Replace(" ", _SPACE))
    unigram, bpe = 1, 2
    if trainer.model_type == unigram:
        model: Any = models.Unigram(pieces, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
    elif trainer.model_type == bpe:
        model = models.BPE(
            vocab={piece: i for i, (piece, _) in enumerate(pieces)},
            merges=_merges(proto),
            unk_token=pieces[trainer.unk_id][0],
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    else:
        return None
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(first)
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    unknown, control = 2, 3
    special = [piece.piece for piece in proto.pieces if piece.type in (unknown, control)]
    tokenizer.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in special])
    # Added tokens cut the text before it is normalised, which would put a space before whatever follows one. A character
    # that is in no other piece needs no cut: no merge takes it in.
    whole = "".join(piece.piece for piece in proto.pieces if len(piece.piece) > 1)
    own = [p.piece for p in proto.pieces if p.type == _USER_DEFINED and (len(p.piece) > 1 or p.piece in whole)]
    tokenizer.add_tokens([tokenizers.AddedToken(name, normalized=False) for name in own])
    return tokenizer


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Returns the merges that a BPE model's scores imply: pieces by falling score, each cut at every position where both
    halves are pieces."""
    normal = 1
    rank = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    merges = []
    for piece in sorted((p for p in proto.pieces if p.type == normal), key=lambda p: -p.score):
        text = piece.piece
        halves = [(text[:i], text[i:]) for i in range(1, len(text)) if text[:i] in rank and text[i:] in rank]
        merges += sorted(halves, key=lambda pair: (rank[pair[0]], rank[pair[1]]))
    return merges


def processor_of(model: bytes, path: str) -> Any:
    """Returns a SentencePieceProcessor; DataError where the content is not a model."""
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, OSError) as error:
        raise DataError(f"{path} is not a SentencePiece model: {error}.") from None
