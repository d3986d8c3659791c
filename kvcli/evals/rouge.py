"""ROUGE-L over whole summaries, as the package `rouge` 1.0.1 computes it, which LongBench scores with.

Written again because that package computes two more metrics on the way, keeps a dictionary entry per pair of words, and
fails on sentences of more than some 900 words (LongBench then counts 0; here they are scored).
"""

from __future__ import annotations

from collections.abc import Sequence


def rouge_l(output: str, gold: str) -> float:
    """F1 of the words (as sets) in the longest common subsequences of all pairs of sentences; 0 without any words.

    Rule: pltrdy/rouge rouge/rouge_score.py `rouge_l_summary_level` with `exclusive=True`; sentences end at full stops.
    """
    written, right = _sentences(output), _sentences(gold)
    if not written or not right:
        return 0.0
    common: set[str] = set()
    for reference in right:
        for sentence in written:
            common.update(_common_subsequence(reference, sentence))
    precision = len(common) / len({word for sentence in written for word in sentence})
    recall = len(common) / len({word for sentence in right for word in sentence})
    return 2 * precision * recall / (precision + recall + 1e-8)


def _sentences(text: str) -> list[list[str]]:
    return [" ".join(piece.split()).split(" ") for piece in text.split(".") if piece]


def _common_subsequence(x: Sequence[str], y: Sequence[str]) -> list[str]:
    """One longest common subsequence; of several the one the package finds, for which words it has matters."""
    rows = [[0] * (len(y) + 1)]
    for a in x:
        last, row = rows[-1], [0]
        for j, b in enumerate(y):
            row.append(last[j] + 1 if a == b else max(last[j + 1], row[j]))
        rows.append(row)
    out, i, j = [], len(x), len(y)
    while i and j:
        if x[i - 1] == y[j - 1]:
            out.append(x[i - 1])
            i, j = i - 1, j - 1
        elif rows[i - 1][j] > rows[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return out
