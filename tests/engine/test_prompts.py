"""Prompt sets: how many samples the first N of a task's order are, where some were left out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvcli.engine.plan import Generation, make_plan
from kvcli.engine.prompts import said_of
from tests.engine import tiny
from tests.engine.test_plan import BASE, KEY, cells_of


@given(st.sets(st.integers(0, 19)), st.one_of(st.none(), st.integers(1, 25)))
def test_the_first_so_many_count_those_left_out(gone: set[int], limit: int | None) -> None:
    whole = 20
    prompts = tiny.prompt_set([10] * (whole - len(gone)))
    prompts.left_out = sorted(gone)
    mine = [place for place in range(whole) if place not in gone]
    first = [place for place in mine if limit is None or place < limit]
    assert prompts.within(limit) == len(first)
    assert mine[: len(first)] == first
    dropped = min(whole, limit or whole) - len(first)
    said = said_of(prompts, limit)
    assert (f"any: {dropped} of {min(whole, limit or whole)} prompts left out" in "".join(said)) == bool(dropped)


@given(st.sets(st.integers(0, 24), max_size=20), st.lists(st.integers(1, 30), min_size=1, max_size=4))
def test_each_generation_of_a_grid_has_the_samples_of_its_limit(gone: set[int], limits: list[int]) -> None:
    cells = cells_of(BASE)
    prompts = tiny.prompt_set([10] * (25 - len(gone)))
    prompts.left_out = sorted(gone)
    generations = [Generation((cell.id,), limit) for cell, limit in zip(cells, limits, strict=False)]
    plan = make_plan(cells, generations, {KEY: len(prompts.samples)}, 4, lambda key, limit: prompts.within(limit))
    rows = {c.id: [i for b in plan.batches if c in b.cells for i in range(b.start, b.end)] for c in cells}
    for cell, limit in zip(cells, limits, strict=False):
        assert rows[cell.id] == list(range(prompts.within(limit)))
