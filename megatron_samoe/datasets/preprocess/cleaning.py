"""Optional cleaning: Unicode repair, length and language filters, sentence splitting. Libraries are deferred."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import regex

from megatron_samoe.datasets.preprocess.options import PreprocessOptions
from megatron_samoe.errors import DataError, optional_import

# Abbreviations after which a full stop does not end a sentence (English).
_ABBREVIATIONS = (
    "Mr|Mrs|Ms|Messrs|Dr|Prof|Rev|Hon|Gen|Col|Capt|Lt|Sgt|Maj|St|Sr|Jr|vs|etc|e\\.g|i\\.e|cf|al|No|Fig|Vol|pp"
)
# A sentence ends after . ! ? or … (with closing quotes or brackets) and white space before an upper-case letter, digit
# or opening quote, or after a full stop of scripts that write no space.
_SENTENCE_END = regex.compile(
    rf"""(?<!\b(?:{_ABBREVIATIONS}|\p{{Lu}}))(?<=[.!?…])["'”’)\]]*\s+(?=["'“‘(\[]*[\p{{Lu}}\p{{Lt}}\p{{N}}])"""
    rf"""|(?<=[.!?…]["'”’)\]])\s+(?=["'“‘(\[]*[\p{{Lu}}\p{{Lt}}\p{{N}}])|(?<=[。！？])|\n\s*\n\s*"""
)
_ABBREVIATED = regex.compile(rf"(?:^|[\s(\"'“‘])(?:{_ABBREVIATIONS}|\p{{Lu}})\.$")


def split_sentences(text: str, keep_newlines: bool) -> list[str]:
    """Returns the sentences of a text, by rules for punctuation; joined they give the text back if keep_newlines.

    Without keep_newlines the white space around sentences is removed and that inside becomes one space.
    """
    sentences, start = [], 0
    for match in _SENTENCE_END.finditer(text):
        if match.end() == start or _ABBREVIATED.search(text, start, match.start()):
            continue
        sentences.append(text[start : match.end()])
        start = match.end()
    sentences.append(text[start:])
    if keep_newlines:
        return [sentence for sentence in sentences if sentence]
    return [joined for sentence in sentences if (joined := " ".join(sentence.split()))]


@functools.cache
def _unicode_fixer() -> Callable[[str], str]:
    fix: Callable[[str], str] = optional_import("ftfy", "clean", "--fix-unicode").fix_text
    return fix


@functools.cache
def _language_identifier() -> Any:
    langid = optional_import("py3langid.langid", "clean", "--languages")
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE)


class Cleaner:
    """Applies the cleaning that the options ask for to one document after another."""

    def __init__(self, options: PreprocessOptions):
        self._options = options
        if options.fix_unicode:
            _unicode_fixer()
        if options.languages:
            known = set(_language_identifier().labels)
            unknown = [language for language in options.languages if language not in known]
            if unknown:
                raise DataError(f"--languages {unknown[0]!r} is not known; known are {', '.join(sorted(known))}.")

    def clean(self, texts: tuple[str, ...]) -> tuple[tuple[str, ...], str | None]:
        """Returns the texts of a document after repair, and why the document is left out, or None if it stays.

        Lengths count characters of all keys together; the language is that of all keys joined.
        """
        if self._options.fix_unicode:
            texts = tuple(_unicode_fixer()(text) for text in texts)
        num_chars = sum(map(len, texts))
        if num_chars < self._options.min_chars:
            return texts, "too short"
        if self._options.max_chars and num_chars > self._options.max_chars:
            return texts, "too long"
        if self._options.languages:
            language, _ = _language_identifier().classify("\n".join(texts))
            if language not in self._options.languages:
                return texts, "another language"
        return texts, None
