"""The printed numbers of the benchmark: nothing was lost on the way from the tables, and the notes say what is true."""

from __future__ import annotations

import json
from collections import Counter
from math import ceil, floor

import pytest

from kvcli.analysis.tables import published
from kvcli.analysis.tables.published import MEAN, Published, find, scores
from kvcli.evals.loader import task_names
from kvcli.methods import catalog
from kvcli.models.aliases import ALIASES

NINE = [i / 10 for i in range(9, 0, -1)]
BLOCKS = [
    ("llama3.1-8b-instruct", "mmlu", 5, "7"),
    ("llama3.1-8b-instruct", "gsm8k", 8, "7"),
    ("llama3.1-8b-instruct", "commonsense_qa", 4, "7"),
    ("llama3.1-8b-instruct", "jailbreakv", 8, "7"),
    ("llama3.1-8b-instruct", "humaneval", 8, "7"),
    ("r1-distill-llama-8b", "gsm8k", 8, "6"),
    ("llama3.1-8b-instruct", "gsm8k", 1, "9"),
    ("llama3.1-8b-instruct", "gsm8k", 2, "9"),
    ("llama3.1-8b-instruct", "gsm8k", 4, "9"),
    ("llama3.1-8b-instruct", "gsm8k", 6, "9"),
    ("llama3.1-8b-instruct", "gsm8k", 50, "10"),
    ("r1-distill-llama-8b", "gsm8k", 50, "10"),
]


def one(**facts: object) -> Published:
    (row,) = find(**facts)  # type: ignore[arg-type]
    return row


def shares(row: Published, count: int) -> bool:
    """Whether the printed number is a share of so many questions, rounded or cut off."""
    digits = len(row.printed.partition(".")[2]) + (2 if float(row.printed) > 1 else 0)
    printed = round(row.score * 10**digits)
    return any(
        printed in (floor(k / count * 10**digits), ceil(k / count * 10**digits - 0.5))
        for k in range(round(row.score * count) - 1, round(row.score * count) + 2)
    )


def test_all_108_printed_averages_are_the_mean_of_the_five_methods() -> None:
    seen = 0
    for model, task, shots, table in BLOCKS:
        for ratio in NINE:
            facts = {"model": model, "task": task, "shots": shots, "ratio": ratio}
            five = [one(method=method, table=table, **facts).score for method in published.averaged()]
            printed = one(method=MEAN, table=table, **facts).score
            assert abs(sum(five) / 5 - printed) <= 0.00005 + 1e-9, (facts, printed)
            seen += 1
    assert seen == 108


def test_rows_per_table() -> None:
    counted = Counter(table for row in scores() for table in row.tables)
    assert counted == {
        "1": 4, "2": 17, "3": 13, "4": 29, "6": 110, "7": 275, "8": 165, "9": 275, "10": 110, "11": 10, "12": 9,
        "13": 4, "14": 16, "16": 10,
    }  # fmt: skip
    assert len(scores()) == 822 and len(published.times()) == 6
    assert len({(r.tables, r.model, r.task, r.shots, r.method, r.ratio, r.variant) for r in scores()}) == 822


@pytest.mark.parametrize(
    "facts, printed",
    [
        ({"task": "mmlu", "method": "full", "table": "7"}, "0.6882"),
        ({"task": "jailbreakv", "method": "streaming_llm", "ratio": 0.1}, "0.5314"),
        ({"task": "gsm8k", "shots": 8, "method": "chunkkv", "ratio": 0.1, "table": "9"}, "0.6566"),
        ({"task": "humaneval", "method": "h2o", "ratio": 0.4}, "0.5427"),
        ({"task": "gsm8k", "shots": 1, "method": "chunkkv", "ratio": 0.1}, "0.0190"),
        ({"model": "r1-distill-llama-8b", "shots": 50, "method": "full"}, "0.7123"),
        ({"model": "r1-distill-llama-8b", "shots": 8, "method": "snapkv", "ratio": 0.4}, "0.5967"),
        ({"table": "4", "method": "random_shot", "ratio": 0.1}, "51.34"),
        ({"table": "4", "method": "shotkv", "ratio": 0.1, "variant": ""}, "80.37"),
        ({"table": "13", "method": "shotkv", "ratio": 0.1}, "77.26"),
        ({"table": "14", "method": "shotkv", "ratio": 0.1, "variant": "re-ordered 2"}, "80.22"),
        ({"table": "14", "method": "shotkv", "ratio": 0.3, "variant": "other exemplars 1"}, "80.14"),
        ({"table": "2", "method": "shotkv", "ratio": 0.35}, "41.33"),
        ({"table": "12", "variant": "prefill-only", "ratio": 0.25}, "18.59"),
        ({"table": "2", "method": "pyramidinfer", "ratio": 0.4}, "38.33"),
        ({"table": "1", "task": "gsm8k", "shots": 0}, "29.04"),
        ({"table": "3", "method": "pyramidkv", "ratio": 0.3}, "44.56"),
        ({"table": "11", "task": "longbench", "method": "h2o", "ratio": 0.3}, "39.23"),
        ({"table": "16", "task": "gsm8k", "method": "h2o", "ratio": 0.1}, "49.20"),
        ({"table": "16", "task": "mmlu", "method": "chunkkv", "ratio": 0.3}, "72.31"),
    ],
)
def test_known_cells(facts: dict[str, object], printed: str) -> None:
    assert one(**facts).printed == printed


def test_scores_are_shares_of_one() -> None:
    for row in scores():
        value = float(row.printed)
        assert row.score == pytest.approx(value / 100 if value > 1 else value, abs=1e-9) and 0 <= row.score <= 1


def test_names_are_kvcli_s() -> None:
    assert {row.method for row in scores()} - {MEAN} <= set(catalog.own_names())
    assert {row.model for row in scores()} <= set(ALIASES)
    assert published.models() == {name: ALIASES[name] for name in published.models()}


def test_a_model_is_found_by_alias_and_hub_id() -> None:
    by_id = find("meta-llama/Meta-Llama-3-8B-Instruct@5f0b02c", table="2")
    assert by_id == find("llama3-8b", table="2") and len(by_id) == 17
    assert find("llama3-8b-base") == [] and find("some/model") == []


def test_every_note_concerns_a_row_and_every_row_s_note_is_there() -> None:
    used = {letter for row in [*scores(), *published.times()] for letter in row.notes}
    assert used == set(published.notes())


def test_what_the_notes_say_of_the_numbers_is_so() -> None:
    base, code = (
        [(r.method, r.ratio, r.printed) for r in rows]
        for rows in (find("llama3.1-8b", table="8"), find(task="humaneval"))
    )
    assert base == code and all("a" in r.notes for r in find("llama3.1-8b"))
    lg = [r for r in find(table="2") if not r.variant]
    assert all(shares(r, 600) and "b" in r.notes for r in lg) and not all(shares(r, 700) for r in lg)
    r1 = [r for r in find("r1-distill-llama-8b", shots=8) if r.method not in ("full", MEAN)]
    assert all(shares(r, 300) and "c" in r.notes for r in r1)
    whole = {("gsm8k", 8): 1319, ("gsm8k", 1): 1319, ("commonsense_qa", 4): 1221, ("humaneval", 8): 164}
    for (task, shots), count in whole.items():
        rows = [r for r in find("llama3.1-8b-instruct", task=task, shots=shots, variant="") if "d" in r.notes]
        assert len(rows) == 55 and all(shares(r, count) for r in rows if r.method != MEAN)
    for ratio in (0.4, 0.3, 0.2):
        whole_one, part = (one(table=t, method="shotkv", ratio=ratio, variant=v) for t, v in
                           (("4", ""), ("13", "prefill-only")))  # fmt: skip
        assert whole_one.score - part.score == pytest.approx(0.02) and "l" in part.notes
    eleven = {r.method: r.printed for r in find(table="11", task="gsm8k", ratio=0.3)}
    twenty = {m: one(table="7", task="gsm8k", method=m, ratio=0.2).printed for m in eleven}
    assert {m: float(v) for m, v in eleven.items()} == {m: round(100 * float(v), 2) for m, v in twenty.items()}


def test_the_file_has_a_line_per_row() -> None:
    text = published.FILE.read_text(encoding="utf-8")
    assert sum(line.startswith('  {"tables"') for line in text.splitlines()) == 828
    assert json.loads(text)["source"] == "arXiv:2502.01941v4"


@pytest.mark.parametrize("task", sorted({row.task for row in scores()} - {"longbench"}))
def test_each_task_is_one_of_kvcli_s(task: str) -> None:
    assert task in task_names()
