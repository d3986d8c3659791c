"""Judging one long output that answers many numbered questions: `Answer_9: ... Answer_10: ...` (LongGenBench)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal

_MARK = re.compile(r"Answer(?:\\?_| )?(\d+)\**\s*[:\n]")
_QUESTION = re.compile(r"\n\W*Question(?:\\?_| )?\d+")
_SAID = re.compile(r"answer is", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![\w)])-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)|\d[\d,]*(?:\.\d+)?")
_OFFICIAL_ANSWER = re.compile(r"(?<=:\n)(.*?)(?=\n\n|$)", re.DOTALL)


def sections(output: str, first: int, count: int, examples: Sequence[str] = ()) -> list[str | None]:
    """The text behind `Answer_n:` for n = first, first + 1, ...; None where there is none.

    The first one of a number counts. An answer ends where the next one or a repeated question begins. An output that
    counts its answers from 1 instead (an `Answer_1`, and no number above `count`) is read that way: the model answered
    all the same. Not so where it repeats the prompt's own worked answers, `examples`, under their numbers: then its
    numbers are the prompt's, and a copy answers nothing.
    """
    parts = _MARK.split(output)
    found: dict[int, str] = {}
    for number, text in zip(parts[1::2], parts[2::2], strict=True):
        found.setdefault(int(number[:9]), _QUESTION.split(text)[0].strip())
    if 1 in found and max(found) <= count and not _copies(found, examples):
        first = 1
    return [found.get(first + i) for i in range(count)]


def _copies(found: Mapping[int, str], examples: Sequence[str]) -> bool:
    """Whether one worked answer stands under its own number, or each of those that are but `The answer is (B).`: one
    such may be right by chance."""
    pairs = [(found.get(n, "").split(), text.split()) for n, text in enumerate(examples, 1)]
    same = [answer == text for answer, text in pairs]
    worked = [len(text) > len("The answer is X".split()) for _, text in pairs]
    return any(s and w for s, w in zip(same, worked, strict=True)) or bool(same and all(same))


def number_in(text: str) -> str | None:
    """The number behind the last `answer is`, else the last number of the text."""
    tail = _SAID.split(text)[-1] if _SAID.search(text) else ""
    ahead = _NUMBER.search(tail)
    if ahead:
        return ahead[0].rstrip(",")
    numbers = _NUMBER.findall(text)
    return numbers[-1].rstrip(",") if numbers else None


def same_number(answer: str, gold: str) -> bool:
    """Equal as numbers; thousands commas and dollar signs do not count."""
    a, b = (Decimal(re.sub(r"[$,\s]", "", text)) for text in (answer, gold))
    return a == b


def letter_in(text: str, letters: str) -> str | None:
    """The letter behind the last `answer is`, else the last one in brackets, else a text that is but a letter."""
    for pattern in (rf"(?i:answer is)\W*([{letters}])\b", rf"\(([{letters}])\)", rf"\A\W*([{letters}])\b\W*\Z"):
        found = re.findall(pattern, text)
        if found:
            return str(found[-1])
    return None


def official_gsm8k(output: str, golds: Sequence[str]) -> float:
    """Share of right answers by the script of LongGenBench, with its quirks.

    Rule: Dominic789654/LongGenBench longgenbench_GSM8K_openai.py. Answers are the texts behind a colon and a line
    break up to an empty line; the first belongs to the first question whatever its number says; what was not written
    is not counted; the last run of digits decides, commas are taken out of the answer but not of the right one, signs
    are ignored. The script judges a block that begins `A_model:Q_i`, so an answer without digits counts as i. Not
    followed: lines of an answer that look like the script's own marks. Nothing written is 0 (the script stops).
    """
    return _share(_official_pairs(output, golds, r"\d*\.?\d+"))


def official_mmlu(output: str, golds: Sequence[str]) -> float:
    """As `official_gsm8k` with letters, by longgenbench_MMLU_openai.py: the last A, B, C or D character decides, and
    an answer without one counts as A, since the block begins `A_model`. Right answers over all questions: the script
    asks the unanswered ones again, which is not done here."""
    pairs = _official_pairs(output, golds, "A|B|C|D")
    return sum(a == b for a, b in pairs) / len(golds)


def scope(output: str, golds: Sequence[str], letters: bool) -> float:
    """Share of right answers over all questions, aligned by position.

    Rule: Linking-ai/SCOPE eval_longgenbench.py. Only whole numbers right behind `answer is `, or letters in brackets on
    the line of their mark's answer, are seen.
    """
    if letters:
        found = re.findall(r"Answer_\d+:\s*.*?answer is \((.*?)\)", output)
    else:
        found = re.findall(r"Answer_\d+:\s*.*?answer is (\d+)", output, re.DOTALL)
        digits = [re.match(r"\d+", gold) for gold in golds]
        golds = [d[0] if d else "" for d in digits]
    return sum(a == b for a, b in zip(found, golds, strict=False)) / len(golds)


def _official_pairs(output: str, golds: Sequence[str], pattern: str) -> list[tuple[str, str]]:
    """(answer, right answer) as the official scripts read them, as many as were written."""
    written = _OFFICIAL_ANSWER.findall("\n".join(output.split("Answer_")))
    pairs = []
    for i, (text, gold) in enumerate(zip(written, golds, strict=False)):
        block = f"A_model:Q_{i}\n{text.strip()}\n".replace(",", "")
        pairs.append((re.findall(pattern, block)[-1], re.findall(pattern, f"A_gold:\n{gold}")[-1]))
    return pairs


def _share(pairs: Sequence[tuple[str, str]]) -> float:
    return sum(a == b for a, b in pairs) / len(pairs) if pairs else 0.0
