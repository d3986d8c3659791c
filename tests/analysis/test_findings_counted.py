"""Which tables, ratios and samples the findings count, and what they say where a half cannot be tested."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from kvcli.analysis import findings
from kvcli.analysis.findings import Outcome
from kvcli.analysis.findings.long_answers import is_long
from kvcli.analysis.marked import plain
from kvcli.analysis.reading.roles import names_of
from tests.analysis.tables_of import cell, data_of, right, tasks

N = 300
TASKS = Path(__file__).parents[2] / "tasks"


def long_task(task: str, full: int, tokens: int, whole: int | None = None, **facts: Any) -> list[dict[str, Any]]:
    """A task of long generation with h2o, and shotkv at the same bytes if asked for."""
    lines = cell(task, "full", "1", right(full, N), **facts) + cell(task, "h2o", "0.1", right(tokens, N), **facts)
    return lines + (cell(task, "shotkv", "0.1", right(whole, N), **facts) if whole is not None else [])


def test_the_loss_of_every_long_task_counts(tmp_path: Path) -> None:
    """The first task loses little, the second much: the loss is there."""
    lines = long_task("lg_a", N, N - 3) + long_task("lg_b", N, 100)
    half = findings.long_generation(data_of(tmp_path, lines))
    assert "points with methods that keep tokens: holds" in plain(half.said)
    assert "lg_a" in plain(half.said)
    assert "lg_b" in plain(half.said)


def test_two_long_tasks_share_the_risk(tmp_path: Path) -> None:
    """A loss of 27 points is beyond 20 for one task of this size, but not for one of two."""
    one = long_task("lg_a", N, N - 80)
    alone = findings.long_generation(data_of(tmp_path / "one", one))
    both = findings.long_generation(data_of(tmp_path / "two", one + long_task("lg_b", N, N - 55)))
    assert "keep tokens: holds" in plain(alone.said)
    assert "keep tokens: not established" in plain(both.said)


def test_a_full_that_cannot_fall_20_points_says_nothing_about_a_loss_of_20(tmp_path: Path) -> None:
    found = findings.long_generation(data_of(tmp_path, long_task("lg_a", 45, 0)))
    assert "keep tokens: cannot be tested here" in plain(found.said)
    assert found.outcome is Outcome.UNTESTED
    assert "full is not shown to score more than 20 points: lg_a" in plain(found.said)


def test_a_task_too_low_to_fall_does_not_keep_another_from_being_tested(tmp_path: Path) -> None:
    lines = long_task("lg_a", 45, 0) + long_task("lg_b", N, 100)
    found = findings.long_generation(data_of(tmp_path, lines))
    assert "keep tokens: holds" in plain(found.said)
    assert "Not tested, full scores too little to fall so far: lg_a" in plain(found.said)


@pytest.mark.parametrize(
    ("tokens", "whole", "outcome"),
    [(100, None, Outcome.UNTESTED), (N - 3, None, Outcome.NOT), (N - 60, None, Outcome.UNTESTED)],
)
def test_finding_six_without_whole_shots(tmp_path: Path, tokens: int, whole: int | None, outcome: Outcome) -> None:
    """Not established means that more samples would tell; here a method is missing."""
    found = findings.long_generation(data_of(tmp_path, long_task("lg_a", N, tokens, whole)))
    assert found.outcome is outcome
    assert ("whole shots against tokens takes shotkv" in plain(found.needs)) == (outcome is Outcome.UNTESTED)


def test_whole_shots_that_lose_more_refute_finding_six_where_full_is_too_low_to_fall(tmp_path: Path) -> None:
    found = findings.long_generation(data_of(tmp_path, long_task("lg_a", 55, 50, 0)))
    assert "keep tokens: cannot be tested here" in plain(found.said)
    assert found.outcome is Outcome.NOT


def test_the_smallest_ratio_is_the_smallest_at_which_a_method_is_shared(tmp_path: Path) -> None:
    lines = []
    for task, own, count in (("a", "h2o", N), ("b", "tova", 100)):
        lines += cell(task, "full", "1", right(N, N)) + cell(task, own, "0.1", right(50, N))
        lines += cell(task, "snapkv", "0.3", right(count, N))
    found = findings.task_dependent(data_of(tmp_path, lines))
    assert found.outcome is Outcome.HOLDS
    assert plain(found.said).startswith("At 0.3, mean over 1 method,")


def test_a_task_that_shares_nothing_does_not_keep_the_others_from_being_compared(tmp_path: Path) -> None:
    lines = []
    for task, method, ratio, count in (("a", "h2o", "0.1", N), ("b", "h2o", "0.1", 90), ("c", "tova", "0.1", 90),
                                       ("d", "h2o", "0.5", 90)):  # fmt: skip
        lines += cell(task, "full", "1", right(N, N)) + cell(task, method, ratio, right(count, N))
    found = findings.task_dependent(data_of(tmp_path, lines))
    assert found.outcome is Outcome.HOLDS
    said = plain(found.said)
    assert "1 of 1 pairs of tasks differ (each pair at 99.17 %); furthest apart: " in said
    assert "above chance, each at 99.17 %: " in said
    assert "Not compared, without these methods there: c" in plain(found.said)


def test_methods_that_keep_tokens_are_looked_for_at_every_ratio(tmp_path: Path) -> None:
    lines = cell("lg_a", "full", "1", right(N, N)) + cell("lg_a", "shotkv", "0.1", right(N, N))
    lines += cell("lg_a", "h2o", "0.3", right(100, N))
    found = findings.long_generation(data_of(tmp_path, lines))
    assert "keep tokens: holds. lg_a at 0.3, mean over h2o" in plain(found.said)


def test_shots_that_share_no_method_with_the_fewest_leave_the_others_to_compare(tmp_path: Path) -> None:
    lines = []
    for shots, method, count in ((1, "h2o", 60), (8, "h2o", 280), (50, "tova", 280)):
        lines += cell("t", "full", "1", right(N, N), shots=shots)
        lines += cell("t", method, "0.1", right(count, N), shots=shots)
    found = findings.short_prompts(data_of(tmp_path, lines))
    assert found.outcome is Outcome.HOLDS
    assert "1 shot keeps" in plain(found.said)
    assert "8 shots keep" in plain(found.said)


def fifty(task: str, full: int, whole: int, tokens: int) -> list[dict[str, Any]]:
    lines = cell(task, "full", "1", right(full, N), shots=50)
    for name, count in (("chunkkv", whole), ("snapkv", tokens)):
        lines += cell(task, name, "0.1", right(count, N), shots=50)
    return lines


def test_chunks_are_compared_only_where_full_is_where_it_was_published(tmp_path: Path) -> None:
    lines = fifty("t", N, 280, 200)
    published = tasks(t={"reference": {"testbed": 0.5}})
    assert findings.chunks_on_many_shots(data_of(tmp_path / "as", lines)).outcome is Outcome.HOLDS
    data = data_of(tmp_path / "unlike", lines, tasks=published)
    assert findings.chunks_on_many_shots(data).outcome is Outcome.UNTESTED
    named = {f.number: "Not used, for full is not shown to be where it was published: t" in plain(f.said)
             for f in findings.findings([data])}  # fmt: skip
    assert named == {1: True, 2: True, 3: True, 4: True, 5: True, 6: False}


def test_no_finding_counts_a_table_unlike_its_reference(tmp_path: Path) -> None:
    lines = long_task("lg_a", N, 100, 200, shots=50) + long_task("lg_b", N, N - 5, N, shots=50)
    lines += long_task("lg_a", N, 20, 30, shots=1) + cell("lg_a", "full", "1", right(20, N), shots=0)
    kept, refused = tmp_path / "kept", tmp_path / "refused"
    unlike = {"reference": {"testbed": {"0": 0.5, "1": 0.5, "50": 0.5}}}
    before = {f.number: f.outcome for f in findings.findings([data_of(kept, lines)])}
    after = findings.findings([data_of(refused, lines, tasks=tasks(lg_a=unlike, lg_b=unlike))])
    assert [before[number] for number in (1, 3, 6)] == [Outcome.HOLDS] * 3
    assert {f.outcome for f in after} == {Outcome.UNTESTED}


def test_what_lies_the_other_way_is_counted_too(tmp_path: Path) -> None:
    found = findings.chunks_on_many_shots(data_of(tmp_path, fifty("a", N, 280, 200) + fifty("b", N, 200, 280)))
    assert found.outcome is Outcome.HOLDS
    assert "(1 of 2 shown, 1 the other way)" in found.said


def test_chunks_are_not_compared_where_full_is_at_chance(tmp_path: Path) -> None:
    data = data_of(tmp_path, fifty("t", 150, 160, 90), tasks=tasks(t={"chance": 0.5}))
    assert findings.chunks_on_many_shots(data).outcome is Outcome.UNTESTED


def test_two_models_that_differ_are_not_said_to_differ_by_their_training(tmp_path: Path) -> None:
    def run(name: str, count: int) -> findings.Data:
        lines = cell("a", "full", "1", right(N, N)) + cell("a", "m", "0.1", right(count, N))
        return data_of(tmp_path / name, lines, model=name)

    found = findings.model_type([run("one", 250), run("two", 90)])
    assert found.outcome is Outcome.HOLDS
    assert "How the models were trained is not in the data" in plain(found.said)


def test_the_gain_from_shots_is_that_of_the_same_samples(tmp_path: Path) -> None:
    """With shots the first half is right; without, only the second half was finished, and nothing of it is right."""
    lines = cell("t", "full", "1", right(150, N)) + cell("t", "m", "0.1", right(50, N))
    lines += cell("t", "full", "1", [0.0] * N, shots=0)[150:]
    found = findings.gain_and_loss(data_of(tmp_path, lines))
    assert "t gains +0.0 points from 8 shots and loses 67 %" in plain(found.said)


def test_a_gain_across_other_samples_is_called_one(tmp_path: Path) -> None:
    lines = cell("t", "full", "1", right(N, N)) + cell("t", "m", "0.1", right(50, N))
    bare = cell("t", "full", "1", right(150, N), shots=0)
    lines += [{**line, "sample_id": f"{line['sample_id']}@0"} for line in bare]
    found = findings.gain_and_loss(data_of(tmp_path, lines))
    assert "t gains +50.0 points from 8 shots (other samples)" in plain(found.said)


def test_every_shipped_task_of_long_generation_counts_as_one() -> None:
    stated = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(TASKS.glob("*.yaml"))]
    named = [task["task"] for task in stated if task.get("ability") == "long generation"]
    assert "tbd_longgen" in named
    assert all(is_long(_Named(name)) for name in named)  # type: ignore[arg-type]
    assert names_of("long_generation")


class _Named:
    def __init__(self, task: str) -> None:
        self.task = task


def test_no_finding_counts_a_table_whose_full_gives_too_few_answers(tmp_path: Path) -> None:
    lines = fifty("t", N, 280, 200)
    silent = [{**line, "extracted": None} if i < 0.21 * N else line for i, line in enumerate(lines)]
    assert findings.chunks_on_many_shots(data_of(tmp_path / "read", lines)).outcome is Outcome.HOLDS
    data = data_of(tmp_path / "silent", silent)
    assert silent[0]["method"] == "full" and findings.chunks_on_many_shots(data).outcome is Outcome.UNTESTED
    found = findings.findings([data])[3]
    assert plain(found.said) == "Not used, for more than 20 % of full's outputs hold no answer: t."
    edge = [{**line, "extracted": None} if i < 0.2 * N else line for i, line in enumerate(lines)]
    assert findings.chunks_on_many_shots(data_of(tmp_path / "edge", edge)).outcome is Outcome.HOLDS
