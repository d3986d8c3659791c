"""Whether an output is text at all: not empty, not running in circles, not a heap of characters or of vocabulary.

A compressed cache can break a model. What it then writes holds no refusal, and without this it would count as an
answer. Every rule looks at how the text is built, not at its language; each has its reason beside its limit. Word order
is not looked at: words in a meaningless order pass (docs/safety.md says what was measured).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise

FEWEST_LETTERS = 0.4
"""Share of letters and digits among what is not white space. Prose has 0.95, code and tables 0.6 to 0.85."""
RUN = 10
MOST_REPEATED = 0.7
"""Share of the runs of RUN characters that came before, from LOOP_CHARACTERS on. Prose has below 0.4, code below 0.65;
a text in circles 0.8 and more. Characters, because a loop need not hold blanks."""
LOOP_CHARACTERS = 40
MOST_REPEATED_BEHIND = 0.85
"""The same of the second half, from three times as many characters on: a text may begin well and end in circles, which
gives 1. Prose has below 0.65 and code below 0.8."""
MOST_UNKNOWN = 0.005
"""Share of characters that are no characters: replacement, private, unassigned and control ones. Those at the end do
not count: the token limit may cut a character in two."""
MOST_MIXED = 0.25
"""Share of neighbouring words in different alphabets, from MIXED_WORDS words on. Foreign terms give below 0.15."""
MOST_GLUED = 0.05
"""Share of words that hold letters of two alphabets, both written with blanks. Languages mix between words."""
MOST_ODD = 0.3
"""Share of words of four plain Latin letters or more that cannot be spoken: without a vowel, with six consonants in a
row, or longer than 25 letters."""
LONGEST_MEAN = 9.0
"""Mean letters of a word, from LONG_WORDS words on. German and Russian have 5 to 7, Finnish 7 to 8; tokens that lost
their blanks more."""
LONG_WORDS = 20
FEWEST_REPEATS = 0.08
"""Share of words that came before among the first SALAD_WORDS. Every language repeats its small words: prose has 0.15
and more. Words drawn from a vocabulary hardly repeat."""
SALAD_WORDS = 60
SALAD_CHARACTERS = 150
"""The same where characters count as words: they repeat later."""
NO_REPEATS = 40
"""From so many words on there must be one repeat at least; shorter texts do not say."""
MIXED_WORDS = 12

_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_HARD = re.compile(r"[bcdfghjklmnpqrstvwxz]{6,}")
_VOWELS = frozenset("aeiouy")
_ONE = ("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "IDEOGRAPHIC", "BOPOMOFO")
_UNSPACED = (*_ONE, "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
"""Alphabets written without blanks between words: each character counts as a word."""


INCOHERENT = "incoherent"
"""What scorers that look at this themselves call it in `extra`."""


def incoherent(output: str, extra: Mapping[str, float]) -> bool:
    """Whether a generated answer is no text. extra: its scorer's figures, whose word counts where they have one: of a
    request only what stands behind the thoughts of a reasoning model is looked at."""
    said = extra.get(INCOHERENT)
    return bool(why_incoherent(output)) if said is None else said > 0


def why_incoherent(text: str) -> str | None:
    """The rule that the text breaks: empty | symbols | unknown | circles | mixed | odd | salad; None for text."""
    solid = [c for c in text.rstrip("\ufffd") if not c.isspace()]
    letters = sum(unicodedata.category(c)[0] in "LMN" for c in solid)
    if not letters:
        return "empty"
    if letters < FEWEST_LETTERS * len(solid):
        return "symbols"
    if sum(_unknown(c) for c in solid) > MOST_UNKNOWN * len(solid):
        return "unknown"
    words = split_words(text)
    if _circles(" ".join(text.lower().split())):
        return "circles"
    if len(words) >= MIXED_WORDS and (mixed(words) > MOST_MIXED or _glued(text) > MOST_GLUED):
        return "mixed"
    if len(words) >= MIXED_WORDS and (odd(words) > MOST_ODD or _mean_length(text) > LONGEST_MEAN):
        return "odd"
    return "salad" if _salad(words) else None


def _circles(text: str) -> bool:
    if len(text) < LOOP_CHARACTERS:
        return False
    seen: set[str] = set()
    again: list[bool] = []
    for run in (text[i : i + RUN] for i in range(len(text) - RUN + 1)):
        again.append(run in seen)
        seen.add(run)
    behind = again[len(again) // 2 :]
    late = len(text) >= 3 * LOOP_CHARACTERS and sum(behind) > MOST_REPEATED_BEHIND * len(behind)
    return late or sum(again) > MOST_REPEATED * len(again)


def _salad(words: Sequence[str]) -> bool:
    single = sum(len(w) == 1 for w in words) > len(words) / 2
    size = SALAD_CHARACTERS if single else SALAD_WORDS
    if len(words) >= size:
        return 1 - len(set(words[:size])) / size < FEWEST_REPEATS
    return not single and len(words) >= NO_REPEATS and len(set(words)) == len(words)


def split_words(text: str) -> list[str]:
    """Words in lower case, parts of names written together apart; of alphabets without blanks single characters."""
    words: list[str] = []
    for found in _WORD.findall(text):
        for part in _CAMEL.split(found):
            words += _apart(part.lower())
    return words


def _apart(word: str) -> list[str]:
    if word.isascii():
        return [word]
    out, run = [], ""
    for char in word:
        if _alphabet(char) == "CJK" or _script(char) in _UNSPACED:
            out += [run, char]
            run = ""
        else:
            run += char
    return [w for w in (*out, run) if w]


def mixed(words: Sequence[str]) -> float:
    """Share of neighbouring words whose first letters are of different alphabets; numbers have none."""
    alphabets = [a for a in (_alphabet(word[0]) for word in words) if a]
    pairs = list(pairwise(alphabets))
    return sum(a != b for a, b in pairs) / len(pairs) if pairs else 0.0


def odd(words: Sequence[str]) -> float:
    """Share of the words in plain Latin letters that cannot be spoken; 0 where there are too few to tell."""
    latin = [w for w in words if len(w) >= 4 and w.isascii() and w.isalpha()]
    strange = sum(not _VOWELS & set(w) or bool(_HARD.search(w)) or len(w) > 25 for w in latin)
    return strange / len(latin) if len(latin) >= 8 else 0.0


def _spaced(text: str) -> list[str]:
    """Words of alphabets that are written with blanks, as they stand."""
    return [w for w in _WORD.findall(text) if not w.isdigit() and not any(_script(c) in _UNSPACED for c in w)]


def _glued(text: str) -> float:
    """Hangul stands beside Latin in ordinary words, with its endings."""
    words = _spaced(text)
    two = sum(len({_script(c) for c in word if c.isalpha()} - {"HANGUL"}) > 1 for word in words if not word.isascii())
    return two / len(words) if len(words) >= MIXED_WORDS else 0.0


def _mean_length(text: str) -> float:
    words = _spaced(text)
    return sum(map(len, words)) / len(words) if len(words) >= LONG_WORDS else 0.0


@cache
def _script(char: str) -> str:
    return unicodedata.name(char, "?").split()[0] if char.isalpha() else ""


def _alphabet(char: str) -> str:
    name = _script(char)
    return "CJK" if name in _ONE else name


def _unknown(char: str) -> bool:
    return char == "\ufffd" or unicodedata.category(char) in ("Cc", "Co", "Cn", "Cs")
