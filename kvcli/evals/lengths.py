"""Texts of a wanted length in tokens, for any tokenizer."""

from __future__ import annotations

from collections.abc import Callable

from kvcli.evals.spec import Tokens


def counter(tokens: Tokens | None) -> Tokens:
    """What counts tokens. Without a tokenizer words are counted: that is for judging stored outputs again, where only
    the right answers are needed; those never depend on the tokenizer."""
    return tokens or (lambda text: len(text.split()))


def fitted(build: Callable[[int], str], tokens: Tokens, most: int, guess: int, least: int = 1, slack: int = 0) -> int:
    """The largest n >= `least` for which build(n) has at most `most` tokens, or one that comes within `slack` tokens.

    build(n) must grow with n; where it stops growing the search ends at 100 units a token. It is called a few times
    near the answer: each try is aimed by the tokens per unit seen so far, and where tries do not close in, what is left
    is halved. Returns least - 1 where even build(least) is too long.
    """
    low, high = least - 1, None
    low_count, high_count = 0, 0
    n, aimed = max(least, guess), 0
    while high is None or high - low > 1:
        count = tokens(build(n))
        if count <= most:
            low, low_count = n, count
            if most - count <= slack:
                return n
        else:
            high, high_count = n, count
        aimed += 1
        if low > 100 * most:
            return low
        n = _next(low, low_count, high, high_count, most - slack // 2, least, aimed)
    return low


def _next(low: int, low_count: int, high: int | None, high_count: int, aim: int, least: int, aimed: int) -> int:
    """Where to look next, strictly between low and high."""
    if high is None:
        rate = max(low_count, 1) / max(low, 1)
        return max(low + 1, int(aim / rate) if aimed < 4 else low * 2)
    if low < least:
        n = int(high * aim / max(high_count, 1))
    else:
        n = low + int((high - low) * (aim - low_count) / max(high_count - low_count, 1))
    if aimed > 6 and aimed % 2:
        n = (low + high) // 2
    return min(max(n, low + 1), high - 1)
