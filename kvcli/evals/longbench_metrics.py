"""The metrics of LongBench, rule by rule as in THUDM/LongBench LongBench/metrics.py (commit 2e00731)."""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from kvcli.evals.rouge import rouge_l

CHINESE_MARKS = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃"
    "》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
Rule = Callable[[str, str, Sequence[str]], float]
"""(output, one right answer, all classes) to a value in [0, 1]."""


def qa_f1(output: str, gold: str, classes: Sequence[str] = ()) -> float:
    """F1 over words, without case, punctuation and articles."""
    return _f1(_words(output), _words(gold))


def qa_f1_zh(output: str, gold: str, classes: Sequence[str] = ()) -> float:
    """F1 over the words that jieba cuts, without case and punctuation. Needs the package jieba."""
    return _f1(*([w for w in map(_plain_chinese, _cut(text)) if w] for text in (output, gold)))


def rouge(output: str, gold: str, classes: Sequence[str] = ()) -> float:
    """ROUGE-L."""
    return rouge_l(output, gold)


def rouge_zh(output: str, gold: str, classes: Sequence[str] = ()) -> float:
    """ROUGE-L over the words that jieba cuts. Needs the package jieba."""
    return rouge_l(" ".join(_cut(output)), " ".join(_cut(gold)))


def count(output: str, gold: str, classes: Sequence[str] = ()) -> float:
    """The share of the numbers in the output that are the right one."""
    return _share_of_numbers(output, gold)


def retrieval(output: str, gold: str, classes: Sequence[str] = ()) -> float:
    """The share of the numbers in the output that are the right paragraph's (`Paragraph 7`)."""
    return _share_of_numbers(output, re.findall(r"Paragraph (\d+)", gold)[0])


def retrieval_zh(output: str, gold: str, classes: Sequence[str] = ()) -> float:
    """As `retrieval`, for 段落7."""
    return _share_of_numbers(output, re.findall(r"段落(\d+)", gold)[0])


def classification(output: str, gold: str, classes: Sequence[str] = ()) -> float:
    """1 over the number of classes the output names, if the right one is among them.

    A class whose name is part of the right one's does not count; as in the official loop the one behind such a class is
    not looked at.
    """
    named = [name for name in classes if name in output]
    i = 0
    while i < len(named):
        if named[i] in gold and named[i] != gold:
            named.remove(named[i])
        i += 1
    return 1 / len(named) if gold in named else 0.0


def code_similarity(output: str, gold: str, classes: Sequence[str] = ()) -> float:
    """Similarity of the first line that is no comment or fence, in whole percent (`fuzz.ratio` of fuzzywuzzy)."""
    lines = output.lstrip("\n").split("\n")
    line = next((x for x in lines if "`" not in x and "#" not in x and "//" not in x), "")
    if line == gold:
        return 1.0
    return round(100 * difflib.SequenceMatcher(None, line, gold).ratio()) / 100 if line and gold else 0.0


METRICS: dict[str, Rule] = {
    "qa_f1": qa_f1,
    "qa_f1_zh": qa_f1_zh,
    "rouge": rouge,
    "rouge_zh": rouge_zh,
    "count": count,
    "retrieval": retrieval,
    "retrieval_zh": retrieval_zh,
    "classification": classification,
    "code_similarity": code_similarity,
}
NEED_JIEBA = ("qa_f1_zh", "rouge_zh")
OF_NUMBERS = ("count", "retrieval", "retrieval_zh")
"""Metrics that look at the numbers of an output only."""


def numbers(output: str) -> list[str]:
    return re.findall(r"\d+", output)


def _share_of_numbers(output: str, right: str) -> float:
    found = numbers(output)
    return found.count(right) / len(found) if found else 0.0


def _f1(output: Sequence[str], gold: Sequence[str]) -> float:
    same = sum((Counter(output) & Counter(gold)).values())
    if not same:
        return 0.0
    precision, recall = same / len(output), same / len(gold)
    return 2 * precision * recall / (precision + recall)


def _words(text: str) -> list[str]:
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def _plain_chinese(word: str) -> str:
    return "".join("".join(c for c in word.lower() if c not in string.punctuation + CHINESE_MARKS).split())


def _cut(text: str) -> list[str]:
    import logging

    import jieba

    jieba.setLogLevel(logging.WARNING)
    return list(jieba.cut(text, cut_all=False))
