"""Plans: a function of the config, whole coverage, batches that a grown grid leaves as they were."""

from __future__ import annotations

import dataclasses
import itertools

from hypothesis import given
from hypothesis import strategies as st

from kvcli.config import SweepConfig
from kvcli.engine.cells import Cell, make_cells
from kvcli.engine.plan import Generation, make_plan
from tests.engine.tiny import KEY, TASK

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
    changes = {"shot_seeds": (1,), "strict_window": True, "max_new_tokens": 3, "ignore_eos": True, "shots": (5,),
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
    available = {KEY: 25}
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


DECODING = SweepConfig(
    methods=("snapkv", "h2o", "shotkv", "tova"), ratios=("0.2", "0.5"), decode_ratios=("off", "same")
)


def decodes_of(config: SweepConfig) -> dict[str, list[object]]:
    """Per method and ratio the decode settings of its cells."""
    found: dict[str, list[object]] = {}
    for cell in cells_of(config):
        found.setdefault(f"{cell.method} {cell.ratio or cell.budget}", []).append(cell.decode)
    return found


def test_the_decode_axis_by_hand() -> None:
    assert decodes_of(DECODING) == {
        "full 1": [None], "snapkv 0.2": [None], "snapkv 0.5": [None],
        **{f"{m} {r}": [None, {"ratio": r, "interval": 1}] for m in ("h2o", "shotkv", "tova") for r in ("0.2", "0.5")},
    }  # fmt: skip
    few = dataclasses.replace(DECODING, methods=("h2o", "shotkv:decode=off", "streaming_llm:rerotate=true", "scope"))
    off = {"shotkv:decode=off 0.5": [None], "streaming_llm:rerotate=true 0.5": [None]}

    def axis(**settings: object) -> dict[str, list[object]]:
        found = decodes_of(dataclasses.replace(few, ratios=("0.5",), full=False, **settings))  # type: ignore[arg-type]
        assert off.items() <= found.items()
        return {name: found[f"{name} 0.5"] for name in ("h2o", "scope")}  # type: ignore[misc]

    every = {"ratio": "0.3", "interval": 4}
    assert axis(decode_ratios=("0.3",), decode_interval=4) == {"h2o": [every], "scope": [every]}
    sizes: list[object] = [{"budget": 8, "interval": 1}, {"budget": 9, "interval": 1}]
    assert axis(decode_ratios=("off",), decode_budgets=(8, 9)) == {"h2o": sizes, "scope": sizes}
    fixed = {"cap": "fixed", "interval": 1}
    assert axis(decode_ratios=("off",), cap="fixed") == {
        "h2o": [fixed],
        "scope": [None],
    }  # its pool is the answer's alone
    once = [{"ratio": "0.5", "interval": 1}]
    assert axis(decode_ratios=("same", "0.5")) == {"h2o": once, "scope": once}


def test_the_id_changes_with_how_answers_are_generated() -> None:
    base = SweepConfig(methods=("h2o",), ratios=("0.2",), full=False, decode_ratios=("0.5",))
    (cell,) = cells_of(base)
    changes = {"decode_ratios": ("0.4",), "decode_interval": 2, "temperature": 0.5}
    ids = {cell.id, *(cells_of(dataclasses.replace(base, **{k: v}))[0].id for k, v in changes.items())}  # type: ignore[arg-type]
    ids.add(cells_of(dataclasses.replace(base, decode_ratios=("off",)))[0].id)
    ids.add(cells_of(dataclasses.replace(base, decode_ratios=("off",), decode_budgets=(5,)))[0].id)
    ids.add(cells_of(dataclasses.replace(base, decode_ratios=("off",), cap="fixed"))[0].id)
    ids.add(cells_of(dataclasses.replace(base, temperature=0.5, top_p=0.9))[0].id)
    assert len(ids) == 8
    quiet = dataclasses.replace(base, deterministic=True, fidelity=False, memory="1G")
    assert [c.id for c in cells_of(quiet)] == [cell.id]
    plain = dataclasses.replace(base, decode_ratios=("off",))
    assert [c.id for c in cells_of(dataclasses.replace(plain, decode_interval=7))] == [c.id for c in cells_of(plain)]


def test_draws_are_cells_of_every_method_and_sampling_gives_every_method_seeds() -> None:
    config = dataclasses.replace(BASE, temperature=0.7, draws=3)
    cells = cells_of(config)
    assert len(cells) == len({c.id for c in cells}) == 2 * 3 * (1 + 2 + 2)
    assert {(c.seed, c.draw) for c in cells if c.method == "full"} == {(s, d) for s in (0, 1) for d in range(3)}
    one = cells_of(dataclasses.replace(config, draws=1))
    assert {c.id for c in one} == {c.id for c in cells if c.draw == 0}


@given(st.integers(1, 9), st.integers(1, 50), st.integers(1, 5))
def test_decode_batches_are_of_one_kind_and_waves_only_join_them(
    prefill_rows: int, decode_rows: int, waves: int
) -> None:
    cells = cells_of(dataclasses.replace(DECODING, first_token=("compressed", "prefill")))
    plan = make_plan(cells, [Generation(tuple(c.id for c in cells), None)], {KEY: 11}, prefill_rows)
    names: list[str] = []
    for batch in plan.batches:
        single = [d.rows for d in batch.decode_batches(decode_rows)]
        joined = list(batch.decode_batches(decode_rows, waves))
        assert [row for rows in single for row in rows] == [row for d in joined for row in d.rows]
        for decode in joined:
            assert len({cell.storage for _, cell in decode.rows}) == 1
            names.append(decode.id)
        for kind in {cell.storage for cell in batch.cells}:
            mine = [d.rows for d in joined if d.rows[0][1].storage == kind]
            alone = [rows for rows in single if rows[0][1].storage == kind]
            assert len(mine) == -(-len(alone) // waves)
        first = joined[0].rows
        assert first[0][1].method == "full"  # the others are compared with it
    assert len(names) == len(set(names))


WEIGHED = dataclasses.replace(BASE, weights=("sparsegpt:2:4", "dense", "sparsegpt:sparsity=0.5"))


def test_full_and_all_cells_exist_once_per_kind_of_weights_and_dense_ones_keep_their_ids() -> None:
    cells = cells_of(WEIGHED)
    by_weights = {w: [c for c in cells if c.weights == w] for w in WEIGHED.weights}
    assert [c.id for c in by_weights["dense"]] == [c.id for c in cells_of(BASE)]
    assert {len(found) for found in by_weights.values()} == {len(cells_of(BASE))}
    assert all([c.method for c in found].count("full") == 1 for found in by_weights.values())
    assert len({c.id for c in cells}) == len(cells)


def test_each_kind_of_weights_is_entered_once_however_the_grid_grew() -> None:
    cells = cells_of(WEIGHED)
    first = [c.id for c in cells if c.weights == "sparsegpt:2:4" and c.method != "random"]
    more = [c.id for c in cells if c.weights != "sparsegpt:sparsity=0.5"]
    generations = [Generation(tuple(ids), limit) for ids, limit in ((first, 5), (more, 9), ([c.id for c in cells], 20))]
    plan = make_plan(cells, generations, {KEY: 25}, 4)
    order = [batch.weights for batch in plan.batches]
    assert list(dict.fromkeys(order)) == ["dense", "sparsegpt:2:4", "sparsegpt:sparsity=0.5"]
    assert sum(a != b for a, b in itertools.pairwise(order)) == 2
    assert all({c.weights for c in batch.cells} == {batch.weights} for batch in plan.batches)
    assert len({batch.id for batch in plan.batches}) == len(plan.batches)
    rows = [(c.id, i) for batch in plan.batches for c in batch.cells for i in range(batch.start, batch.end)]
    assert len(rows) == len(set(rows)) == len(cells) * 20
    before = make_plan(cells, generations[:1], {KEY: 25}, 4).batches
    assert all(batch in plan.batches for batch in before)
