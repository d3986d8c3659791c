"""SCOPE's prompt phase (arXiv:2412.13649; Linking-ai/SCOPE model/kv_utils.py and its run scripts).

`prefill=h2o` (their main runs): column sums of the keys before the window, here of causal attention; `prefill=snapkv`:
SnapKV with kernel 7 and max-pool. The window of 8 stays, cut to half of the budget.
"""

from __future__ import annotations

from tests.oracles.picks import Answer, Top
from tests.oracles.prompts import Array, Prompt, cut_window
from tests.oracles.snapkv import snapkv


def scope(
    prompt: Prompt,
    size: int,
    *,
    prefill: str = "h2o",
    window: int = 8,
    recent: int = 256,  # of the generated tokens: changes nothing here
    reduce: str = "mean",
    strict: bool = False,
    column_sums: list[Array] | None = None,
) -> Answer:
    if prefill == "snapkv":
        return snapkv(prompt, size, window=window, kernel=7, pool="max", reduce=reduce, strict=strict)
    n, group = prompt.n, prompt.group
    w, cut = cut_window(window, n, size, strict)
    picks = []
    for sums in column_sums or prompt.column_sums():
        layer = []
        for g in range(prompt.kv_heads):
            scores = {}
            for p in range(n - w):
                members = [float(sums[h, p]) for h in range(g * group, (g + 1) * group)]
                scores[p] = max(members) if reduce == "max" else sum(members) / group
            layer.append(Top(set(range(n - w, n)), scores, max(0, size - w)))
        picks.append(layer)
    return Answer(list(map(list, picks)), {"fallback"} if cut else {"over_budget"} if w > size else set())
