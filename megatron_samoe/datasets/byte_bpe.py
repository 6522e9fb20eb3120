"""Decides whether a byte-level BPE of the `tokenizers` library can run on tiktoken's engine with identical ids.

tiktoken's engine merges, at each step, the adjacent pair whose *concatenation* has the lowest rank, and takes a
whole word that is in the vocabulary as it is. `tokenizers` merges the *listed* pair with the lowest rank. Both give
the same ids for every text if

1. the normalizer, pre-tokenizer and options do nothing that tiktoken cannot do;
2. every byte is in the vocabulary, ids grow along the merge list, and every result has one listed pair made of
   parts with smaller ids;
3. every token of the vocabulary, spelled out in bytes, is merged back to itself by the listed pairs only.

Why 3 suffices: suppose tiktoken merged an unlisted pair (x, y) into t. Up to then the merges inside the bytes of t
did not depend on the text around, so `tokenizers` on t alone also reaches (x, y), finds no listed pair, and does
not return t: 3 excludes that.
"""

from __future__ import annotations

import json
from typing import Any

from megatron_samoe.parsing import JsonObject

# Splits as the pattern of tokenizers' ByteLevel(use_regex=True), that is GPT-2's, does:
#   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
# but never backtracks inside a run, which is a tenth faster: white space up to the end of the text is one piece; of
# other white space all but the last character, if there are several, else the one.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|re|ve)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


def byte_alphabet() -> dict[str, int]:
    """Returns GPT-2's printable stand-in character for each of the 256 bytes, as character -> byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet.update({chr(256 + place): byte for place, byte in enumerate(others)})
    return alphabet


def tiktoken_encoding(tokenizer: Any) -> Any | None:
    """Returns a tiktoken.Encoding with the ids of a `tokenizers.Tokenizer`, or None where they could differ."""
    spec = json.loads(tokenizer.to_str())
    model, pattern = spec["model"], _pattern(spec)
    if pattern is None or not _plain_model(spec, model):
        return None
    alphabet = byte_alphabet()
    special = {token["content"]: token["id"] for token in spec["added_tokens"]}
    merges = list(map(tuple, model["merges"]))
    # Other entries (a special token kept in the vocabulary of GPT-2, say) no text is ever merged into.
    reachable = {token for token in model["vocab"] if len(token) == 1} | {left + right for left, right in merges}
    if model.get("ignore_merges") and len(set(model["vocab"]) - reachable - set(special)) > 0:
        return None
    if any(character not in alphabet for token in reachable for character in token):
        return None
    if not _merges_agree(model["vocab"], merges, reachable):
        return None
    ranks = {
        bytes(alphabet[c] for c in token): number for token, number in model["vocab"].items() if token in reachable
    }
    import tiktoken

    return tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def _pattern(spec: JsonObject) -> str | None:
    """Returns the splitting pattern if the pre-tokenizer is one pattern followed by byte mapping."""
    pre = spec["pre_tokenizer"] or {}
    steps = pre.get("pretokenizers", []) if pre.get("type") == "Sequence" else [pre]
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    if len(steps) == 1:
        return GPT2_PATTERN if steps[0].get("use_regex", True) else None
    split = steps[0]
    if len(steps) != 2 or steps[1].get("use_regex", True) or split.get("type") != "Split":
        return None
    if split.get("behavior") != "Isolated" or split.get("invert") or "Regex" not in split["pattern"]:
        return None
    return split["pattern"]["Regex"]


def _plain_model(spec: JsonObject, model: JsonObject) -> bool:
    """Returns whether the model is byte-level BPE with no option that changes what is merged."""
    extras = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    tokens_plain = all(
        not (token["lstrip"] or token["rstrip"] or token["single_word"] or token["normalized"])
        for token in spec["added_tokens"]
    )
    return (
        model.get("type") == "BPE"
        and not any(model.get(option) for option in extras)
        and spec["normalizer"] is None
        and spec["truncation"] is None
        and spec["padding"] is None
        and tokens_plain
    )


def _merges_agree(vocab: dict[str, int], merges: list[tuple[str, ...]], reachable: set[str]) -> bool:
    """Returns whether conditions 2 and 3 of the module hold."""
    if sum(len(token) == 1 for token in reachable) != 256 or not all(len(merge) == 2 for merge in merges):
        return False
    last = -1
    for left, right in merges:
        if not {left, right, left + right} <= vocab.keys():  # a file in which a token is twice
            return False
        result = vocab[left + right]
        # Ids that grow strictly along the list also make every result unique.
        if result <= last or max(vocab[left], vocab[right]) >= result:
            return False
        last = result
    from tokenizers.models import BPE

    plain = BPE(vocab=vocab, merges=merges, ignore_merges=False)  # type: ignore[arg-type]
    return all(len(plain.tokenize(token)) == 1 for token in reachable)
