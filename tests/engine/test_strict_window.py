"""--strict-window while generating: what a method protects is never cut to half of the cap, as at the prompt."""

from __future__ import annotations

from typing import Any

import pytest

from kvcli.config import SweepConfig
from kvcli.engine.runner import Options
from tests.engine import tiny
from tests.engine.asks import of_length, sweep, watch_pools

NEW = 24
CASES = {
    "scissorhands:recent=10": lambda newest: set(range(newest - 9, newest + 1)),
    "rkv:window=8": lambda newest: set(range(newest - 7, newest + 1)),
    "streaming_llm:sinks=6": lambda newest: {*range(6), newest},
}
"""Method -> what it protects when the newest token stands at a position."""
AXES: list[dict[str, Any]] = [{"cap": "fixed"}, {"decode_ratios": ("0.2",)}, {"decode_budgets": (2,)}]


@pytest.mark.parametrize("axis", AXES, ids=str)
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("text", CASES)
def test_protected_pairs_stay_whole_only_under_a_strict_window(
    monkeypatch: pytest.MonkeyPatch, text: str, strict: bool, axis: dict[str, Any]
) -> None:
    """A budget of 4, below what each of them protects."""
    steps, n = watch_pools(monkeypatch), 40
    config = SweepConfig(methods=(text,), budgets=(4,), strict_window=strict, full=False, **axis)
    options = Options(8, strict_window=strict, ignore_eos=True, fidelity=False)
    sink, outcome = sweep(tiny.tiny_llama(), config, of_length(tiny.prompt_set([n]), NEW), options)
    assert outcome.errors == 0 and len(steps) == NEW - 1 + 1
    whole = []
    for number, layers in enumerate(steps):
        needed = CASES[text](n - 1 + number)
        whole += [needed <= set(head) for layer in layers for head in layer]
    assert all(whole) == strict
    assert sink.records[0]["flags"] == (["over_budget"] if strict else ["fallback"])


@pytest.mark.parametrize("size", [4, 12])
def test_scope_keeps_its_newest_generated_tokens_under_a_strict_window(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    steps, n = watch_pools(monkeypatch), 40
    config = SweepConfig(
        methods=("scope:recent=10",), ratios=("0.5",), decode_budgets=(size,), strict_window=True, full=False
    )
    options = Options(8, strict_window=True, ignore_eos=True, fidelity=False)
    _, outcome = sweep(tiny.tiny_llama(), config, of_length(tiny.prompt_set([n]), NEW), options)
    assert outcome.errors == 0
    for number, layers in enumerate(steps):
        made = set(range(n, n + number))
        newest = {p for p in made if p > n - 1 + number - 10}
        for head in (head for layer in layers for head in layer):
            assert newest <= set(head) and len(made & set(head)) == min(number, max(10, size))


def test_where_the_budget_has_room_a_strict_window_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pools = []
    for strict in (False, True):
        steps = watch_pools(monkeypatch)
        config = SweepConfig(
            methods=("scissorhands:recent=10",), budgets=(24,), strict_window=strict, full=False,
            decode_ratios=("0.2",),
        )  # fmt: skip
        sweep(tiny.tiny_llama(), config, of_length(tiny.prompt_set([40]), NEW), Options(8, strict_window=strict))
        pools.append(list(steps))
        monkeypatch.undo()
    assert pools[0] == pools[1]
