"""ChunkKV (arXiv:2502.00299, section 3.2 and algorithm 1).

The keys before the observation window are cut into chunks of `chunk` from position 0; a chunk scores the mean over its
tokens of the window's attention summed over its queries and all query heads; whole chunks stay, the best first, as long
as they fit beside the window. One set for all heads of a layer; with `reuse` layers 0, reuse, 2 reuse, ... choose and
the layers behind each take its set (section 3.3). Where there is room beside the window but no chunk fits in it, the
method cannot do what its name says: `fallback` (DESIGN.md, Words).
"""

from __future__ import annotations

from tests.oracles.picks import Answer, Units
from tests.oracles.prompts import Prompt, cut_window
from tests.oracles.snapkv import window_sums


def chunkkv(
    prompt: Prompt, size: int, *, chunk: int = 10, window: int = 32, reuse: int = 1, strict: bool = False
) -> Answer:
    n = prompt.n
    w, cut = cut_window(window, n, size, strict)
    chunks = [list(range(a, min(a + chunk, n - w))) for a in range(0, n - w, chunk)]
    picks: list[list[Units]] = []
    for layer in range(prompt.layers):
        if layer % reuse:
            picks.append(picks[-1])
            continue
        sums = window_sums(prompt, layer, w)
        scores = [sum(sums[h][p] for h in range(prompt.heads) for p in part) / len(part) for part in chunks]
        picks.append([Units(set(range(n - w, n)), chunks, scores, size)] * prompt.kv_heads)
    flags = {"fallback"} if cut else {"over_budget"} if w > size else set()
    if chunks and w < size and not any(pick.taken() for layer in picks for pick in layer):
        flags.add("fallback")
    return Answer(list(map(list, picks)), flags)
