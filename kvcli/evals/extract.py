"""Finding the answer in an output: the filters of lm-evaluation-harness, and cutting at stop texts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Step:
    """One filter function as in lm-evaluation-harness `lm_eval/filters/extraction.py` and `selection.py`.

    take_first picks the one output of a sample and changes nothing here.
    """

    function: Literal["regex", "take_first"]
    regex_pattern: str = r"#### (\-?[0-9\.\,]+)"
    group_select: int = 0

    def __post_init__(self) -> None:
        try:
            re.compile(self.regex_pattern)
        except re.error as e:
            raise ValueError(f"regex_pattern is not a regular expression: {e}") from e

    def __call__(self, text: str) -> str | None:
        return text if self.function == "take_first" else select(self.regex_pattern, text, self.group_select)


@dataclass(frozen=True)
class Filter:
    """A named chain of steps from an output to an answer."""

    name: str
    filter: tuple[Step, ...]

    def __call__(self, text: str) -> str | None:
        """The answer, or None when a step finds none."""
        answer: str | None = text
        for step in self.filter:
            answer = None if answer is None else step(answer)
        return answer


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


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first stop text, as lm-evaluation-harness cuts generations."""
    for stop in until:
        if stop:
            text = text.split(stop)[0]
    return text
