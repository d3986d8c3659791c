"""StreamingLLM (arXiv:2309.17453, section 3.2): the first `sinks` tokens and the most recent ones.

kvcli's rule for protected tokens (METHODS.md): sinks take at most half of the budget.
"""

from __future__ import annotations

from tests.oracles.picks import Answer, Top
from tests.oracles.prompts import Prompt


def streaming_llm(prompt: Prompt, size: int, *, sinks: int = 4) -> Answer:
    n = prompt.n
    wanted = min(sinks, n - 1)
    few = wanted if size >= n else min(wanted, size // 2)
    recent = size - few
    kept = {p for p in range(n) if p < few or p >= n - recent}
    flags = {"fallback"} if few < wanted else set()
    return Answer([[Top(kept, {}, 0) for _ in range(prompt.kv_heads)] for _ in range(prompt.layers)], flags)
