"""TOVA (arXiv:2401.06104; schwartz-lab-NLP/TOVA src/tova_cache.py): the last query's attention, mean over all
query heads of the layer, one set for all. kvcli keeps the last token, which is fed again (docs/architecture.md)."""

from __future__ import annotations

from tests.oracles.picks import Answer, Top
from tests.oracles.prompts import Prompt


def tova(prompt: Prompt, size: int) -> Answer:
    last = prompt.n - 1
    picks = []
    for weights in prompt.attention:
        scores = {p: sum(float(weights[h, last, p]) for h in range(prompt.heads)) / prompt.heads for p in range(last)}
        picks.append([Top({last}, scores, size - 1)] * prompt.kv_heads)
    return Answer(list(map(list, picks)))
