"""Text that comes piece by piece is the whole text up to its first stop, however tokens cut its bytes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_samoe.datasets.tokenizer import Tokenizer
from megatron_samoe.inference.text_stream import TextStream

#: Characters of one to four bytes, some of which begin with the same bytes.
LETTERS = "ab \n<é€₭中😀😁"


class CutTokenizer(Tokenizer):
    """Tokens are any pieces of a text's UTF-8, as merges of bytes make them."""

    def __init__(self, pieces: Sequence[bytes]):
        self._pieces = pieces
        self.vocab_size, self.eod, self.fingerprint = len(pieces), None, "cut"

    def encode(self, text: str) -> list[int]:
        return list(range(len(self._pieces)))

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self._pieces[i] for i in ids).decode(errors="replace")


def cut(content: bytes, places: Iterable[int]) -> list[bytes]:
    """Returns the pieces between some places, none of them empty."""
    edges = sorted({0, len(content), *(place % (len(content) + 1) for place in places)})
    return [content[a:b] for a, b in itertools.pairwise(edges)]


def up_to_stop(text: str, stops: Sequence[str]) -> str:
    """Returns what comes before the stop text that is complete first, reading letter by letter."""
    for end in range(1, len(text) + 1):
        found = [len(text[:end]) - len(stop) for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: min(found)]
    return text


def streamed(text: str, places: Iterable[int], stops: Sequence[str], prompt: str = "") -> tuple[list[str], bool, str]:
    """Returns the pieces of a stream, whether a stop ended it, and the text whose tokens it had taken by then."""
    pieces = [prompt.encode(), *cut(text.encode(), places)]
    stream = TextStream(CutTokenizer(pieces), [0] if prompt else [], stops)
    given, last = [], 0
    for last in range(1, len(pieces)):
        given.append(stream.push(last))
        if stream.stopped:
            break
    given.append(stream.finish())
    return given, stream.stopped, b"".join(pieces[1 : last + 1]).decode(errors="ignore")


@settings(deadline=None, max_examples=300, derandomize=True)
@given(
    text=st.text(LETTERS, min_size=1, max_size=30),
    spans=st.lists(st.tuples(st.integers(0, 29), st.integers(1, 6)), max_size=3),
    others=st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=2),
    places=st.lists(st.integers(0, 10**6), max_size=40),
    prompt=st.text(LETTERS, max_size=3),
)
def test_any_cut_of_any_text_gives_the_same(
    text: str, spans: list[tuple[int, int]], others: list[str], places: list[int], prompt: str
) -> None:
    stops = [*others, *(text[start % len(text) :][:length] for start, length in spans)]
    given_out, stopped, taken = streamed(text, places, stops, prompt)
    expected = up_to_stop(text, stops)
    assert "".join(given_out) == expected and stopped == any(stop in text for stop in stops)
    if stopped:
        # No later than its last letter was whole: a token more is taken only within the next letter.
        assert up_to_stop(taken, stops) == expected
