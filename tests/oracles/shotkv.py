"""ShotKV, prompt phase (arXiv:2502.01941 v4, section 5.1, equations 3 to 6, algorithm 1; KVFUNDABENCH.md section 5).

A shot's score is the mean over its tokens of the accumulated attention, summed over the query heads of the layer. Shots
are taken whole, the best first, while they fit; `special`, `system` and `question` stay and count. Passages
(`context`) compete as blocks of 16 tokens (CLI.md, Regions of a prompt), since no sentences are known here.
"""

from __future__ import annotations

from tests.oracles.picks import Answer, Units
from tests.oracles.prompts import Array, Prompt

BLOCK = 16


def units_of(prompt: Prompt) -> list[list[int]]:
    """Positions of each unit, in the order of their first positions; a shot may stand in several places."""
    shots: dict[int, list[int]] = {}
    blocks = []
    for kind, start, end, index in prompt.layout:
        if kind == "shot":
            shots.setdefault(index, []).extend(range(start, end))
        if kind == "context":
            blocks += [list(range(a, min(a + BLOCK, end))) for a in range(start, end, BLOCK)]
    return sorted([*shots.values(), *blocks], key=lambda unit: unit[0])


def _received(prompt: Prompt, queries: str, window: int) -> list[Array]:
    """Per layer [H, n]: what each key received from the queries that count: all, the question's, the last `window`."""
    if queries != "window":
        return prompt.column_sums(queries)
    last = range(max(0, prompt.n - window), prompt.n)
    return [sum((weights[:, i] for i in last), 0 * weights[:, 0]) for weights in prompt.attention]


def shotkv(
    prompt: Prompt,
    size: int,
    *,
    scope: str = "layer",
    queries: str = "all",
    window: int = 32,
    fit: str = "skip",
    column_sums: list[Array] | None = None,
) -> Answer:
    units = units_of(prompt)
    forced = {*prompt.positions("special", "system", "question"), prompt.n - 1}
    scores = []
    for sums in _received(prompt, queries, window) if column_sums is None else column_sums:
        per_token = [sum(float(sums[h, p]) for h in range(prompt.heads)) for p in range(prompt.n)]
        scores.append([sum(per_token[p] for p in unit) / len(unit) for unit in units])
    if scope == "all-layers":
        mean = [sum(of_layer) / prompt.layers for of_layer in zip(*scores, strict=True)]
        scores = [mean] * prompt.layers
    picks = [Units(forced, units, of_layer, size, stop=fit == "stop") for of_layer in scores]
    flags = {"over_budget"} if len(forced) > size else set()
    if units and not all(pick.taken() for pick in picks):
        flags.add("fallback")
    return Answer([[pick] * prompt.kv_heads for pick in picks], flags)
