from __future__ import annotations

from pathlib import Path
from typing import Any

from kvcli.analysis.marked import Bullets, Paragraph, plain
from kvcli.analysis.reports.verdict_text import verdict_section
from kvcli.analysis.statistics import stats
from kvcli.analysis.tables.judged import judge_tables
from tests.analysis.tables_of import cell, data_of, right, tasks


def said(path: Path, lines: list[dict[str, Any]], margin: float = 0.02, **meta: Any) -> tuple[list[str], list[str]]:
    """Leads with the points under them, and the paragraphs."""
    data = data_of(path, lines, **meta)
    part = verdict_section(data.tables, judge_tables(data.run, data.tables, margin))
    bullets = [b for b in part.blocks if isinstance(b, Bullets)]
    items = [plain(text) for b in bullets for lead, under in b.items for text in (lead, *under)]
    return items, [plain(b.text) for b in part.blocks if isinstance(b, Paragraph)]


def test_a_loss_is_said_without_a_sign_and_with_its_interval(tmp_path: Path) -> None:
    lines = cell("t", "full", "1", right(100, 100)) + cell("t", "a", "0.2", right(70, 100))
    items, _ = said(tmp_path, lines)
    assert items[0].startswith("t (t, n = 100): loses 30.0 points [")
    assert items[0].endswith("at 0.2 with a.")
    low, high = items[0].split("[")[1].split("]")[0].split(", ")
    assert 0 < float(low) < 30 < float(high)


def test_many_samples_without_a_change_are_unchanged_and_few_are_not_established(tmp_path: Path) -> None:
    lines = cell("t", "full", "1", right(900, 1000)) + cell("t", "a", "0.2", right(900, 1000))
    items, _ = said(tmp_path / "many", lines)
    assert items == ["t (t, n = 1000): unchanged within 2 points, wherever it was measured."]
    items, _ = said(tmp_path / "few", [line for line in lines if int(line["sample_id"][2:]) < 50])
    assert "not established (n too small: need about" in items[0]


def test_the_margin_decides(tmp_path: Path) -> None:
    lines = cell("t", "full", "1", right(300, 300)) + cell("t", "a", "0.2", right(299, 300))
    assert "no loss beyond 10 points" in said(tmp_path / "a", lines, 0.1)[0][0].replace(
        "unchanged within", "no loss beyond"
    )
    assert "not established" in said(tmp_path / "b", lines, 0.005)[0][0]


def test_a_full_that_is_not_where_it_was_published_leads_without_a_method(tmp_path: Path) -> None:
    lines = cell("t", "full", "1", right(100, 100)) + cell("t", "a", "0.2", right(20, 100))
    lines += cell("t", "b", "0.2", right(50, 100))
    far = said(tmp_path / "far", lines, tasks=tasks(t={"reference": {"testbed": 0.5}}))[0]
    assert "methods are not ranked, because full is not where it was published" in far[0]
    assert "with a" not in far[0]
    near = said(tmp_path / "near", lines, tasks=tasks(t={"reference": {"testbed": 0.99}}))[0]
    assert "with a." in near[0]


def test_a_hub_id_finds_the_reference_of_its_alias(tmp_path: Path) -> None:
    lines = cell("t", "full", "1", right(100, 100)) + cell("t", "a", "0.2", right(20, 100))
    model = "meta-llama/Llama-3.1-8B-Instruct@abc"
    data = data_of(tmp_path, lines, model=model, tasks=tasks(t={"reference": {"llama3.1-8b-instruct": 0.5}}))
    assert data.tables[0].reference == 0.5
    assert "not ranked" in data.tables[0].warnings[0]


def test_the_family_is_the_plan(tmp_path: Path) -> None:
    lines = cell("t", "full", "1", right(40, 40)) + cell("t", "a", "0.2", right(20, 40))
    planned = {f"c{i}": {"task": "t", "method": "a", "ratio": f"0.{i}"} for i in range(1, 10)}
    _, alone = said(tmp_path / "one", lines)
    assert "One comparison" in alone[0]
    data = data_of(tmp_path / "plan", lines)
    data.run.meta["cells"].update(planned)
    part = verdict_section(data.tables, judge_tables(data.run, data.tables))
    text = " ".join(plain(b.text) for b in part.blocks if isinstance(b, Paragraph))
    assert "all 10 comparisons hold together with 95 %" in text


def test_neighbouring_sizes_are_a_range(tmp_path: Path) -> None:
    lines = cell("t", "full", "1", right(60, 60))
    for i, ratio in enumerate(("0.1", "0.2", "0.3", "0.5", "0.7")):
        lines += cell("t", "a", ratio, right(10 + i if ratio != "0.5" else 60, 60))
    items, _ = said(tmp_path, lines)
    assert any("(also at 0.2, 0.3, 0.7)" in item or "(also at 0.2 to 0.3, 0.7)" in item for item in items)
    lines += (
        cell("t", "b", "0.1", right(60, 60))
        + cell("t", "b", "0.2", right(60, 60))
        + cell("t", "b", "0.3", right(60, 60))
    )
    assert any("b at 0.1 to 0.3" in item for item in said(tmp_path / "b", lines)[0])


def test_the_adjusted_p_stands_beside_every_amount(tmp_path: Path) -> None:
    lines = cell("t", "full", "1", right(100, 100)) + cell("t", "a", "0.2", right(70, 100))
    alone, _ = said(tmp_path / "one", lines)
    assert "] (p < 0.001) at 0.2 with a." in alone[0]
    items, _ = said(tmp_path / "two", lines + cell("t", "b", "0.2", right(93, 100)))
    assert "] (simultaneous, adjusted p < 0.001) at 0.2 with a." in items[0]
    assert "b 7.0 points [" in items[1]
    assert items[1].endswith(f"] (adjusted p = {stats.mcnemar_midp(0, 7):.3f}) at 0.2."), "the last step of Holm"
    items, _ = said(tmp_path / "alike", lines + cell("t", "b", "0.2", right(60, 100)))
    assert items[1].count("adjusted p") == 1 and items[1].endswith("; all adjusted p < 0.001."), "said once"


def test_where_full_is_at_chance_nothing_is_said(tmp_path: Path) -> None:
    """Not 'unchanged': what guesses cannot lose."""
    lines = cell("t", "full", "1", right(500, 1000)) + cell("t", "a", "0.2", right(500, 1000))
    lines += cell("t", "b", "0.2", right(100, 1000), flags=["over_budget"])
    items, texts = said(tmp_path / "low", lines, tasks=tasks(t={"chance": 0.5}))
    assert items == ["t (t, n = 1000): nothing can be said: full is not clearly above chance (0.50, chance 0.50)."]
    assert not any("Over budget" in text for text in texts)
    assert "loses" in said(tmp_path / "high", lines, tasks=tasks(t={"chance": 0.25}))[0][0]


def test_where_full_gives_no_answers_nothing_is_said(tmp_path: Path) -> None:
    lines = cell("t", "full", "1", right(200, 200)) + cell("t", "a", "0.2", right(200, 200))
    for line in lines[:41]:
        line["extracted"] = None
    assert said(tmp_path, lines)[0] == [
        "t (t, n = 200): nothing can be said: 20 % of full's outputs hold no answer."
    ]  # fmt: skip
    lines[0]["extracted"] = "x"
    assert "nothing can be said" not in said(tmp_path / "few", lines)[0][0]


def test_flags_that_matter_stand_in_the_sentence(tmp_path: Path) -> None:
    lines = cell("t", "full", "1", right(40, 40))
    lines += flagged("f", "fallback", 40) + flagged("s", "simulated", 40) + flagged("n", "noop", 29)
    lines += flagged("few", "noop", 2) + flagged("half", "simulated", 3)
    items, _ = said(tmp_path, lines)
    text = " ".join(items)
    assert "at 0.2 (fallback)" in text
    assert "at 0.2 (simulated)" in text
    assert "at 0.2 (noop in 29 of 40)" in text
    assert "at 0.2 (simulated in 3 of 40)" in text
    assert "noop in 2 of 40" not in text


def flagged(method: str, flag: str, count: int, ratio: str = "0.2", **facts: Any) -> list[dict[str, Any]]:
    lines = cell("t", method, ratio, right(10, 40), **facts)
    return [line | {"flags": [flag] * (i < count)} for i, line in enumerate(lines)]


def test_a_cell_over_budget_says_in_how_many_samples(tmp_path: Path) -> None:
    """Its average may well be below what was asked for."""
    lines = cell("t", "full", "1", right(40, 40)) + flagged("a", "over_budget", 2, "0.1", measured_ratio=0.09)
    items, texts = said(tmp_path, lines)
    assert "at 0.1 (over budget in 2 of 40 samples, measured 0.09 on average) with a." in items[0]
    assert any(text.startswith("Over budget = ") for text in texts)
    always = cell("t", "full", "1", right(40, 40)) + flagged("a", "over_budget", 40, "0.1", measured_ratio=0.18)
    assert "at 0.1 (over budget, measured 0.18) with a." in said(tmp_path / "always", always)[0][0]


def test_neighbours_with_the_same_flags_are_one_range(tmp_path: Path) -> None:
    lines = cell("t", "full", "1", right(40, 40)) + flagged("a", "fallback", 0, "0.9")
    for ratio in ("0.1", "0.2", "0.3"):
        lines += flagged("a", "fallback", 40, ratio) + cell("t", "b", ratio, right(40, 40))
    items, _ = said(tmp_path, lines)
    assert any("at 0.1 (fallback; also at 0.2, 0.3 (each fallback), 0.9)" in item for item in items)
    lines += flagged("a", "fallback", 40, "0.4")
    items, _ = said(tmp_path / "more", lines)
    assert any("; also at 0.2 to 0.4 (each fallback), 0.9)" in item for item in items)


def test_the_lead_says_at_which_sizes_with_how_many_methods(tmp_path: Path) -> None:
    lines = cell("t", "full", "1", right(200, 200))
    for ratio, correct in (("0.1", (20, 60, 199)), ("0.3", (60, 200, 200)), ("0.5", (200, 200, 200))):
        for name, count in zip("abc", correct, strict=True):
            lines += cell("t", name, ratio, right(count, 200))
    items, _ = said(tmp_path, lines)
    assert "with a; established at 0.1 with 2 of 3 methods, at 0.3 with 1, at 0.5 with none." in items[0]


def test_what_is_not_established_says_what_was_seen(tmp_path: Path) -> None:
    lines = cell("t", "full", "1", right(30, 30)) + cell("t", "a", "0.2", right(29, 30))
    assert " samples): -3.3 points [" in said(tmp_path / "one", lines)[0][0]
    lines += cell("t", "b", "0.2", right(28, 30))
    assert "; the largest difference seen: -6.7 points [" in said(tmp_path / "two", lines)[0][0]


def test_controls_come_last_and_never_lead(tmp_path: Path) -> None:
    lines = cell("t", "full", "1", right(200, 200)) + cell("t", "random", "0.1", right(20, 200))
    lines += cell("t", "random_shot", "0.2", right(200, 200)) + cell("t", "random:window=8", "0.2", right(150, 200))
    alone, _ = said(tmp_path / "alone", lines)
    assert "with random; established at 0.1 with 1 of 1 method, at 0.2 with 1 of 2 methods." in alone[0]
    assert not any(item.startswith("controls") for item in alone)
    lines += cell("t", "a", "0.1", right(150, 200)) + cell("t", "b", "0.1", right(200, 200))
    items, _ = said(tmp_path / "beside", lines)
    assert items[0].endswith("at 0.1 with a.")
    assert [i for i, item in enumerate(items) if "random" in item] == [len(items) - 1]
    assert items[-1].startswith("controls: loses: random 90.0 points [")
    assert "random:window=8 25.0 points" in items[-1]
    assert "not established (n too small" in items[-1] and "random_shot at 0.2" in items[-1]


def test_one_cluster_is_not_called_too_few_samples(tmp_path: Path) -> None:
    lines = cell("t", "full", "1", right(400, 400), cluster="c") + cell("t", "a", "0.2", right(224, 400), cluster="c")
    items, _ = said(tmp_path / "cluster", lines)
    assert items == ["t (t, n = 400): cannot be judged, all samples are one cluster."]
    lines = cell("t", "full", "1", [0.5]) + cell("t", "a", "0.2", [0.25])
    assert said(tmp_path / "sample", lines)[0] == ["t (t, n = 1): cannot be judged, only one sample."]


def test_what_cannot_be_judged_has_a_point_of_its_own(tmp_path: Path) -> None:
    lines = cell("t", "full", "1", [0.5] * 40) + cell("t", "a", "0.2", [0.25]) + cell("t", "b", "0.2", [0.5] * 40)
    items, _ = said(tmp_path, lines)
    assert "not established (n too small: need about" in items[0]
    assert "cannot be judged (only one sample): a at 0.2." in items
    (open_,) = (item for item in items[1:] if item.startswith("no difference seen, not established"))
    assert open_.endswith(": b at 0.2.")


def test_losses_seen_stand_apart_from_what_showed_none(tmp_path: Path) -> None:
    lines = cell("t", "full", "1", right(20, 20)) + cell("t", "a", "0.2", right(20, 20))
    lines += cell("t", "b", "0.2", right(16, 20)) + cell("t", "b", "0.5", right(18, 20))
    items, _ = said(tmp_path, lines)
    (seen,) = (item for item in items if item.startswith("loss seen, not established (n too small"))
    assert seen.endswith(": b -20.0 at 0.2, -10.0 at 0.5.")
    (none,) = (item for item in items if item.startswith("no difference seen, not established"))
    assert "points is not excluded, simultaneous): a at 0.2." in none


def test_cells_that_fell_back_throughout_do_not_lead(tmp_path: Path) -> None:
    lines = cell("t", "full", "1", right(100, 100)) + cell("t", "a", "0.2", right(60, 100))
    lines += cell("t", "b", "0.2", right(20, 100), flags=["fallback"])
    items, _ = said(tmp_path / "both", lines)
    assert "loses 40.0 points" in items[0] and " with a" in items[0]
    assert items[0].endswith("; as much or more only where methods fell back: b 80.0 points at 0.2 (fallback).")
    lines = cell("t", "full", "1", right(100, 100)) + cell("t", "b", "0.2", right(20, 100), flags=["fallback"])
    items, _ = said(tmp_path / "alone", lines)
    assert "a loss is established only where methods fell back: b 80.0 points at 0.2 (fallback)." in items[0]


PRUNED = "sparsegpt:2:4"


def pruned(count: int, n: int = 400, **facts: Any) -> list[dict[str, Any]]:
    return cell("t", "full", "1", right(n, n), **facts) + cell(
        "t", "full", "1", right(count, n), weights=PRUNED, **facts
    )  # fmt: skip


def test_full_with_other_weights_has_a_sentence_of_its_own(tmp_path: Path) -> None:
    items, _ = said(tmp_path / "loss", pruned(300))
    assert len(items) == 1
    assert items[0].startswith(f"t (t, {PRUNED}, n = 400): full with these weights against full with dense ")
    assert "weights: loses 25.0 points [" in items[0] and items[0].endswith("] (p < 0.001).")
    assert said(tmp_path / "same", pruned(400))[0][0].endswith("dense weights: unchanged within 2 points.")
    assert "not established (n too small: need about" in said(tmp_path / "few", pruned(40, 40))[0][0]
    lines = pruned(40, 40, cluster="c")
    assert said(tmp_path / "one", lines)[0][0].endswith("cannot be judged, all samples are one cluster.")


def test_the_cost_of_weights_stands_beside_what_methods_lose_with_them(tmp_path: Path) -> None:
    lines = pruned(300) + cell("t", "a", "0.2", right(100, 400), weights=PRUNED)
    items, _ = said(tmp_path, lines)
    assert items[0].startswith(f"t (t, {PRUNED}, n = 400): loses 50.0 points [")
    assert "against full with dense weights: loses 25.0 points [" in items[1]
    items, _ = said(tmp_path / "chance", lines, tasks=tasks(t={"chance": 0.999}))
    assert "nothing can be said, with dense weights full is not clearly above chance" in items[1]


def grown(path: Path, *commands: tuple[list[str], int | None]) -> str:
    """commands: methods asked for and samples per task. Returns how the sentences were judged."""
    lines = cell("t", "full", "1", right(40, 40)) + cell("t", "a", "0.2", right(20, 40))
    lines += cell("t", "b", "0.2", right(20, 40))
    ids = {line["method"]: line["cell_id"] for line in lines}
    plan = [{"cells": [ids["full"], *(ids[m] for m in methods)], "grid": {"limit": n}} for methods, n in commands]
    return " ".join(said(path, lines, generations=plan)[1])


def test_growth_of_the_plan_and_second_looks_are_said(tmp_path: Path) -> None:
    one = grown(tmp_path / "1", (["a", "b"], 40))
    assert "fixed when the sweep was planned" in one and "one look" not in one
    added = grown(tmp_path / "2", (["a"], 40), (["a", "b"], 40))
    assert "the plan grew by a later command; all that was planned counts" in added and "one look" not in added
    looked = grown(tmp_path / "3", (["a", "b"], 20), (["a", "b"], 40))
    assert "fixed when the sweep was planned" in looked
    assert "Samples were added by a later command (20, then 40): the 95 % hold for one look." in looked
    often = grown(tmp_path / "4", (["a", "b"], 1000), (["a", "b"], 2000), (["a", "b"], None))
    assert "by later commands (1,000, then 2,000, then all)" in often


def test_second_looks_at_one_comparison_are_said(tmp_path: Path) -> None:
    lines = cell("t", "full", "1", right(40, 40)) + cell("t", "a", "0.2", right(20, 40))
    ids = list(dict.fromkeys(line["cell_id"] for line in lines))
    plan = [{"cells": ids, "grid": {"limit": n}} for n in (20, 40)]
    _, texts = said(tmp_path, lines, generations=plan)
    assert "One comparison, 95 % interval. Samples were added by a later command (20, then 40)" in texts[0]
