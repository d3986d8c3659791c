"""Finding the answer in an output: the filters of lm-evaluation-harness, and cutting at stop texts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal


@dataclass(frozen=True)
class Step:
    """One filter function as in lm-evaluation-harness `lm_eval/filters/extraction.py` and `selection.py`.

    take_first picks the one output of a sample and changes nothing here; letter, with its `letters`, is kvcli's own.
    """

    function: Literal["regex", "take_first", "remove_whitespace", "letter"]
    regex_pattern: str = r"#### (\-?[0-9\.\,]+)"
    group_select: int = 0
    letters: str = "ABCD"

    def __post_init__(self) -> None:
        try:
            re.compile(self.regex_pattern)
        except re.error as e:
            raise ValueError(f"regex_pattern is not a regular expression: {e}") from e
        if not re.fullmatch("[A-Z]+", self.letters):
            raise ValueError("'letters' must be capital letters, as in letters: ABCD")

    def __call__(self, text: str) -> str | None:
        if self.function == "regex":
            return select(self.regex_pattern, text, self.group_select)
        if self.function == "letter":
            return letter(text, self.letters)
        return text.strip() if self.function == "remove_whitespace" else text


@dataclass(frozen=True)
class Filter:
    """A named chain of steps from an output to an answer."""

    name: str
    filter: tuple[Step, ...]

    def __call__(self, text: str) -> str | None:
        """The answer, or None when a step finds none or nothing is left."""
        answer: str | None = text
        for step in self.filter:
            answer = None if answer is None else step(answer)
        return answer or None


def select(pattern: str, text: str, which: int) -> str | None:
    """The match number `which` of a pattern (-1: the last), its first group with text in it; None without a match.

    Rule: RegexFilter of lm-evaluation-harness, whose fallback text "[invalid]" is None here.
    """
    found = re.findall(pattern, text)
    if not -len(found) <= which < len(found):
        return None
    match = found[which]
    if isinstance(match, tuple):
        match = next((group for group in match if group), None)
    return None if match is None else match.strip()


def letter(text: str, letters: str) -> str | None:
    """The option letter that the first line with words gives as its answer, as a capital; None where it gives none.

    kvcli's own rule, for models that answer in a sentence. In this order: the line begins with the letter, alone or
    followed by a bracket, full stop, colon or dash; the line says that the answer is the letter; it says that the
    letter is right. A letter that begins words ("A dog"), or stands beside another one ("B or C"), is no answer.
    """
    line = next((line for line in text.splitlines() if re.search(r"\w", line)), "")
    found = (pattern.search(line) for pattern in _letter_patterns(letters))
    match = next(filter(None, found), None)
    return None if match is None else next(filter(None, match.groups())).upper()


_BEGINS = r"""
    ^[\W_]* (?:(?:boxed|text){{\W*)* ([{any}]) {end}
    (?= [\W_]*$ | [\s*_"'`$]*[.):\]] | \s+[-–—]\s )
"""
_SAYS = r"""
    \b (?i: answer | (?:correct|right|best)\s+(?:option|choice) ) \b
    (?i: \s+(?:to|for)(?:\s+\w+){{1,6}}? \s+is\b )?
    [\W_]* (?i: (?:is|would|should|be|option|choice|boxed|text|textbf|the|correct|best|one)\b [\W_]* )*?
    (?: (?!A\s+(?!because|since)[a-z]) ([{capital}]) {end}
        (?! \s* (?:or|and|nor|,|/|&) \s* \W?[{capital}] {end} )
      | ([{small}]) (?=[\W_]*$) )
"""
_RIGHT = r"""
    (?<![\w'’]) ([{capital}]) [)*\s]*\s (?:is|was) \s+ (?:the\s+)? (?:most\s+)? (?:correct|right|best|answer)\b
"""


@cache
def _letter_patterns(letters: str) -> tuple[re.Pattern[str], ...]:
    names = {"capital": letters, "small": letters.lower(), "any": letters + letters.lower()}
    names["end"] = r"(?![^\W_]|['’]\w)"
    return tuple(re.compile(text.format(**names), re.VERBOSE) for text in (_BEGINS, _SAYS, _RIGHT))


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first stop text, as lm-evaluation-harness cuts generations."""
    for stop in until:
        if stop:
            text = text.split(stop)[0]
    return text
