"""Plans: a function of the config, whole coverage, batches that a grown grid leaves as they were."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvcli.config import SweepConfig
from kvcli.engine.plan import Cell, Generation, make_cells, make_plan
from tests.engine.tiny import TASK

BASE = SweepConfig(methods=("snapkv", "random"), ratios=("0.2", "0.5"), seeds=(0, 1))


def cells_of(config: SweepConfig) -> list[Cell]:
    return make_cells(config, [TASK], {"model": "m"})


def share(rows: tuple[tuple[int, Cell], ...]) -> float:
    return len(rows) * max(float(cell.ratio or 1) for _, cell in rows)  # padded to the longest


def test_seeds_multiply_only_random_methods_and_full_comes_once() -> None:
    cells = cells_of(BASE)
    assert [c.method for c in cells].count("full") == 1
    assert [c.method for c in cells].count("snapkv") == 2
    assert [c.method for c in cells].count("random") == 4
    assert len({c.id for c in cells}) == len(cells)


def test_the_id_changes_with_everything_that_changes_results() -> None:
    import dataclasses

    (cell,) = cells_of(SweepConfig(methods=("snapkv",), ratios=("0.2",), full=False))
    changes = {"shot_seed": 1, "strict_window": True, "max_new_tokens": 3, "ignore_eos": True, "shots": (5,),
               "first_token": ("prefill",), "ratios": ("0.3",), "methods": ("snapkv:window=8",)}  # fmt: skip
    for name, value in changes.items():
        other = dataclasses.replace(SweepConfig(methods=("snapkv",), ratios=("0.2",), full=False), **{name: value})
        assert [c.id for c in cells_of(other)] != [cell.id], name
    for facts in ({"model": "other"}, {"model": "m", "dtype": "bfloat16"}):
        assert make_cells(SweepConfig(methods=("snapkv",), ratios=("0.2",), full=False), [TASK], facts)[0].id != cell.id
    quiet = dataclasses.replace(
        SweepConfig(methods=("snapkv",), ratios=("0.2",), full=False), limit=5, out="x", threads=2
    )
    assert [c.id for c in cells_of(quiet)] == [cell.id]


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(1, 30)), min_size=1, max_size=4),
    st.integers(1, 9),
    st.integers(1, 50),
)
def test_every_row_is_planned_exactly_once_and_growth_moves_no_earlier_batch(
    growth: list[tuple[int, int]], prefill_rows: int, decode_rows: int
) -> None:
    cells = cells_of(BASE)
    generations = [Generation(tuple(c.id for c in cells[: 1 + upto]), limit) for upto, limit in growth]
    available = {("any", 3): 25}
    before: list[object] = []
    for count in range(1, len(generations) + 1):
        plan = make_plan(cells, generations[:count], available, prefill_rows)
        rows = [
            (batch.start + i, cell.id)
            for batch in plan.batches
            for decode in batch.decode_batches(decode_rows)
            for i, cell in decode.rows
        ]
        wanted = {
            (sample, cell) for g in generations[:count] for cell in g.cells for sample in range(min(25, g.limit or 25))
        }
        assert len(rows) == len(set(rows))
        assert set(rows) == wanted
        assert plan.records == len(rows)
        assert list(plan.batches[: len(before)]) == before
        before = list(plan.batches)
        assert all(
            share(d.rows) <= decode_rows + 1e-9 or len(d.rows) == 1
            for b in plan.batches
            for d in b.decode_batches(decode_rows)
        )
        assert all(b.end - b.start <= prefill_rows for b in plan.batches)
