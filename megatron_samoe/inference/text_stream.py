"""The text of a request, piece by piece as its tokens come, cut before the first complete stop text.

`Engine._take` (engine.py) ends the request then, or at the end-of-document token or its limit of tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron_samoe.datasets.tokenizer import Tokenizer

#: The decoders' sign for bytes that are not a complete character yet.
REPLACEMENT = "\ufffd"


class TextStream:
    """Turns new tokens into text as soon as it is certain.

    A token's text can depend on those before it (a leading space, a character of several tokens), so a few tokens are
    decoded twice, without and with the new ones, and the difference is the new text.

    Args:
        prompt_ids: the last few are the first context.
        stop: texts that end the stream; none of their characters is given out. Of several, the one that is complete
            first counts, so that it does not matter how the text is cut into tokens.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Iterable[str] = ()):
        self._tokenizer = tokenizer
        self._context = list(prompt_ids[-4:])
        self._ids: list[int] = []
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Takes a token and returns the text that is certain; sets `stopped` when a stop text is complete."""
        self._ids.append(token_id)
        before = self._tokenizer.decode(self._context)
        after = self._tokenizer.decode(self._context + self._ids)
        if after.endswith(REPLACEMENT) and len(self._ids) < 8:
            return ""  # within a character; UTF-8 has at most 4 bytes, so longer waits are for damaged text
        fresh = after[len(before) :] if after.startswith(before) else self._tokenizer.decode(self._ids)
        self._context, self._ids = self._ids[-4:], []
        return self._release(self._held + fresh)

    def finish(self) -> str:
        """Ends the stream: returns the rest of the text, cut at a stop text that is complete only now."""
        text, self._held = self._held, ""
        if self._ids and not self.stopped:
            before = self._tokenizer.decode(self._context)
            after = self._tokenizer.decode(self._context + self._ids)
            text = self._release(text + (after[len(before) :] if after.startswith(before) else ""))
            text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        """Cuts a text before the stop text that completes first; holds back an end that may begin one."""
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest end of the text that begins the stop text."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
