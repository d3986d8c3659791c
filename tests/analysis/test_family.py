"""Which comparisons a plan makes, and Holm's adjustment against worked examples and its definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcli.analysis.statistics import family, stats, verdicts
from kvcli.analysis.statistics.family import Family


def _cell(method: str, ratio: str | None = "0.5", **facts: Any) -> dict[str, Any]:
    return {"task": "t", "shots": 8, "first_token": "compressed", "method": method, "ratio": ratio, **facts}


def test_holm_worked_example() -> None:
    """0.005 x 4, 0.01 x 3, 0.03 x 2, and 0.04 x 1, which must not fall below the one before."""
    assert family.holm([0.01, 0.04, 0.03, 0.005], 4) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_comparisons_not_made_yet_count_as_one() -> None:
    assert family.holm([0.01, None, 0.04], 10) == [pytest.approx(0.1), None, pytest.approx(0.36)]
    assert family.holm([], 3) == []
    with pytest.raises(ValueError, match="family of 1 has 2"):
        family.holm([0.1, 0.2], 1)


def _stepped(p: list[float]) -> list[float]:
    """The closed test: a hypothesis falls at a level if every set that holds it has a p-value of level / size."""
    found = []
    for at, own in enumerate(p):
        others = sorted(q for i, q in enumerate(p) if i != at)
        sets = [min([own, *others[len(others) - k :]]) * (k + 1) for k in range(len(p))]
        found.append(min(max(sets), 1.0))
    return found


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
@settings(max_examples=80, deadline=None)
def test_holm_is_the_closed_bonferroni_test(p: list[float]) -> None:
    assert family.holm(p, len(p)) == pytest.approx(_stepped(p))


def test_holm_against_statsmodels() -> None:
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    p = np.random.default_rng(0).random(200) ** 3
    assert family.holm(list(p), 200) == pytest.approx(list(multitest.multipletests(p, method="holm")[1]))


def test_seeds_and_draws_are_one_comparison_and_full_is_none() -> None:
    cells = [_cell("full", "1"), *(_cell("random", seed=s, draw=d) for s in (0, 1, 2) for d in (0, 1)), _cell("snapkv")]
    assert len(family.comparisons(cells)) == 2


@pytest.mark.parametrize(
    "facts",
    [{"task": "u"}, {"shots": 4}, {"first_token": "prefill"}, {"query": "agnostic"}, {"ratio": "0.1"},
     {"budget": 64}, {"weights": "sparsegpt"}, {"shot_seed": 1}, {"shot_order": 2}, {"decode": {"ratio": "0.5"}},
     {"match": {"method": "kivi"}}],
)  # fmt: skip
def test_every_axis_makes_comparisons_of_its_own(facts: dict[str, Any]) -> None:
    assert len(family.comparisons([_cell("snapkv"), {**_cell("snapkv"), **facts}])) == 2


def test_new_code_of_the_same_method_is_no_new_comparison() -> None:
    cells = [_cell("snapkv", method_code="a", query="aware", shot_order=0), _cell("snapkv", method_code="b")]
    assert len(family.comparisons(cells)) == 1


def test_full_with_other_weights_is_compared_with_dense_full() -> None:
    assert len(family.comparisons([_cell("full", "1"), _cell("full", "1", weights="sparsegpt")])) == 1


def test_the_family_is_what_the_commands_planned() -> None:
    cells = {"f": _cell("full", "1"), "a": _cell("h2o"), "b": _cell("snapkv"), "old": _cell("snapkv", "0.9")}
    meta = {"cells": cells, "generations": [{"cells": ["f", "a"]}, {"cells": ["f", "a", "b"]}]}
    assert family.planned(meta, found=1) == Family(2, grown=1)
    assert family.planned({"cells": cells}) == Family(3)
    assert family.planned({}, found=5) == Family(5, planned=False)
    assert family.planned(meta, found=7).size == 7, "records of cells that no plan names"


def test_level_holds_for_all_at_once() -> None:
    assert Family(1).level == pytest.approx(0.95)
    assert Family(700).level == pytest.approx(1 - 0.05 / 700)


def test_pairs_of_methods_asked_for_the_same() -> None:
    cells = [_cell("full", "1"), *(_cell(m, r) for m in ("h2o", "snapkv", "chunkkv") for r in ("0.1", "0.5"))]
    assert family.between_methods([*cells, _cell("own", None), _cell("random", seed=0), _cell("random", seed=1)]) == 9


def _matched(method: str, **anchor: Any) -> dict[str, Any]:
    """As run.json has a method held to the bytes of another."""
    facts = {"method": "snapkv", "ratio": None, "budget": None, **anchor}
    return _cell(method, None, match={**facts, "code": "1a2b"})


@pytest.mark.parametrize(
    ("anchor", "size"),
    [(_cell("snapkv", None), {}), (_cell("snapkv", "0.2"), {"ratio": "0.2"}),
     (_cell("snapkv", None, budget=64), {"budget": 64})],
)  # fmt: skip
def test_the_method_whose_bytes_are_matched_is_paired_with_those_that_match_it(
    anchor: dict[str, Any], size: dict[str, Any]
) -> None:
    cells = [anchor, _matched("streaming_llm", **size), _matched("kivi", **size)]
    assert family.between_methods(cells) == 3
    assert family.between_methods([*cells, _cell("h2o", "0.7"), _cell("tova", "0.7")]) == 4
    assert family.between_methods([{**anchor, "task": "u"}, *cells[1:]]) == 1, "other prompts"


def test_new_code_of_the_method_that_is_matched_is_no_new_comparison() -> None:
    assert len(family.comparisons([_matched("kivi"), _matched("kivi", code="3c4d")])) == 1


def _planned(*commands: tuple[str, int | None]) -> Family:
    """commands: letters of the cells asked for, samples per task."""
    cells = {name: _cell(name) for name in "abc"} | {"f": _cell("full", "1")}
    asked = [{"cells": ["f", *names], "grid": {"limit": limit}} for names, limit in commands]
    return family.planned({"cells": cells, "generations": asked})


@pytest.mark.parametrize(
    ("commands", "grown", "looks"),
    [
        ([("ab", 20)], 0, ()),
        ([("a", 20), ("ab", 20)], 1, ()),
        ([("ab", 20), ("ab", 60)], 0, (20, 60)),
        ([("a", 20), ("abc", 60), ("a", None)], 1, (20, 60, None)),
        ([("a", 20), ("b", 60)], 1, ()),
        ([("a", 60), ("b", 20), ("c", 20)], 2, ()),
        ([("ab", None), ("a", 20)], 0, ()),
    ],
)
def test_growing_by_comparisons_and_by_samples_are_told_apart(
    commands: list[tuple[str, int | None]], grown: int, looks: tuple[int | None, ...]
) -> None:
    found = _planned(*commands)
    assert (found.grown, found.looks) == (grown, looks)


def test_error_rate_of_the_family() -> None:
    """Nothing is lost in 40 comparisons: about 5 % of families hold a false loss or gain; unadjusted most do."""
    rng = np.random.default_rng(7)
    false = alone = 0
    for _ in range(200):
        found = [_changed(*rng.multinomial(150, [0.05, 0.05, 0.9])[:2].tolist()) for _ in range(40)]
        judged = verdicts.judge_all(found, Family(40))
        false += any(v is not None and v.kind in (verdicts.Kind.LOSS, verdicts.Kind.GAIN) for v in judged)
        alone += any(f.verdict != "open" for f in found)
    assert false / 200 <= 0.08
    assert alone / 200 > 0.5


def _changed(better: int, worse: int, n: int = 150) -> stats.Difference:
    full = np.array([0.0] * better + [1.0] * (n - better))
    compressed = np.array([1.0] * better + [0.0] * worse + [1.0] * (n - better - worse))
    return stats.paired_difference(compressed, full)
