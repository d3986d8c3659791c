from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from kvcli.analysis.reading.load import load_run
from kvcli.analysis.reports import report
from kvcli.analysis.reports.report import markdown, write_report
from kvcli.analysis.statistics.verdicts import Kind
from kvcli.analysis.tables.build import summarise
from tests.analysis.synthetic import (
    GOLDEN,
    METHODS,
    RATIOS,
    TASKS,
    FakeMethod,
    FakeTask,
    Spec,
    build,
    record,
    small,
    write,
)
from tests.analysis.tables_of import cell, folder_of, right, tasks


def text_of(folder: Path) -> str:
    run = load_run(folder)
    return markdown(run, summarise(run))


def section(text: str, head: str) -> str:
    return text.split(f"## {head}\n", 1)[1].split("\n## ", 1)[0]


def test_report_matches_golden(tmp_path: Path) -> None:
    """Regenerate after a change that is meant: python -m tests.analysis.synthetic"""
    assert text_of(small(tmp_path / "golden")) == (GOLDEN / "report.md").read_text(encoding="utf-8")


def test_sections_in_order(tmp_path: Path) -> None:
    heads = re.findall(r"^## (.*)$", text_of(small(tmp_path / "small")), re.M)
    assert heads == [
        "Verdict", "All tasks at one size", "Sanity warnings", "Method against method, at the same bytes",
        "Mean over tasks: share kept of what full has above chance", "The paper's six findings, on this run",
        "First token: compressed against prefill", "Tables", "How it was measured", "Provenance",
    ]  # fmt: skip


def test_each_task_leads_with_its_worst_loss_and_methods_follow_the_worst_first(tmp_path: Path) -> None:
    verdict = section(text_of(build(tmp_path / "run", Spec(TASKS, METHODS, RATIOS, n=40))), "Verdict")
    leads = [line for line in verdict.splitlines() if line.startswith("- **")]
    assert [re.search(r"\(`(\w+)`", line)[1] for line in leads] == [t.name for t in TASKS]  # type: ignore[index]
    for block in re.split(r"^- ", verdict, flags=re.M)[1:]:
        points = re.search(r"^  - loses: (.*)$", block, re.M)
        if points:
            losses = [float(value) for value in re.findall(r"` ([\d.]+) points? \[", points[1])]
            assert losses == sorted(losses, reverse=True)
            assert f"loses **{losses[0]:.1f} points" in block
    assert verdict.count("  - loses: ") > 3
    assert "`shotkv` " in verdict and re.search(r"at 0\.1 \(over budget[^()]*measured 0\.18", verdict)
    assert re.search(r"need (at least )?about \d", verdict)


def over_budget_run(folder: Path, tasks: int = 1) -> Path:
    """shotkv keeps too much in one sample of 24 at 0.1 and loses nearly all there, little at 0.3, nothing at 0.5."""
    folder.mkdir(parents=True)
    lines = []
    for number in range(tasks):
        for ratio, correct in {"1": 24, "0.1": 3, "0.3": 19, "0.5": 24}.items():
            method = "full" if ratio == "1" else "shotkv"
            for i in range(24):
                flags = ["over_budget"] if (ratio, i) == ("0.1", 7) else []
                lines.append(record(
                    cell_id=f"{number}{method}{ratio}", sample_id=str(i), task=f"t{number}", method=method, ratio=ratio,
                    measured_ratio=float(ratio), first_token="compressed", score=float(i < correct), extracted="x",
                    flags=flags,
                ))  # fmt: skip
    write(folder / "samples.jsonl", lines)
    return folder


def test_a_loss_over_budget_is_still_a_loss(tmp_path: Path) -> None:
    verdict = section(text_of(over_budget_run(tmp_path / "run")), "Verdict")
    assert "loses **87.5 points [" in verdict
    assert re.search(r"at 0\.1 \(over budget in 1 of 24 samples, measured 0\.10.*?\) with `shotkv`", verdict)
    assert "A loss is a loss all the same" in verdict


def test_a_method_whose_only_loss_is_over_budget_is_not_among_those_without(tmp_path: Path) -> None:
    folder = over_budget_run(tmp_path / "run")
    path = folder / "samples.jsonl"
    kept = [line for line in path.read_text().splitlines() if '"ratio":"0.3"' not in line]
    path.write_text("\n".join(kept) + "\n")
    verdict = section(text_of(folder), "Verdict")
    assert "no loss" not in verdict.split("Paired differences")[0]
    assert "87.5 points" in verdict


def test_over_budget_without_a_loss_is_marked(tmp_path: Path) -> None:
    spec = Spec(TASKS[:1], METHODS[7:8], ("0.1",), n=40)
    verdict = section(text_of(build(tmp_path / "run", spec)), "Verdict")
    assert "not established (n too small" in verdict
    assert "loses" not in verdict
    assert "Over budget = " in verdict


def test_file_methods_are_named_by_their_class_and_explained_once(tmp_path: Path) -> None:
    method = FakeMethod("./value_norm.py:ValueNorm:recent=64", 1.0)
    text = text_of(build(tmp_path / "run", Spec(TASKS[2:3], [method], ("0.1",), n=40)))
    assert "at 0.1 with `ValueNorm:recent=64`" in section(text, "Verdict")
    assert "| `ValueNorm:recent=64` | 0.1 |" in section(text, "Tables")
    assert "- Method `ValueNorm`: `./value_norm.py:ValueNorm`." in section(text, "How it was measured")
    assert text.count("value_norm.py") == 2, "there and in the command"


def test_every_row_has_n_interval_and_relative_change(tmp_path: Path) -> None:
    rows = [line for line in section(text_of(small(tmp_path / "small")), "Tables").splitlines() if "| `" in line[:4]]
    assert len(rows) == 3 * 2 * (1 + 4 * 3)
    for row in rows:
        fields = [field.strip() for field in row.strip("|").split("|")]
        assert re.match(r"\d+", fields[3])
        assert re.match(r"[\d.]+ \[[\d.]+, [\d.]+\]$", fields[4])
        if fields[0] != "`full`":
            assert re.match(r"(\*\*)?[+-][\d.]+(\*\*)? \[[+-][\d.]+, [+-][\d.]+\](<sup>b</sup>)?$", fields[8])
            assert fields[9].endswith("%")
            assert re.match(r"-?\d+ % \[-?\d+, \d+\]$", fields[10])
            assert fields[13] in [str(kind) for kind in Kind]


def test_further_figures_have_a_column_where_there_are_any(tmp_path: Path) -> None:
    folder = small(tmp_path)
    assert "| also |" not in markdown(load_run(folder), summarise(load_run(folder)))
    path = folder / "samples.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**line, "extra": {"over_refusal": 0.25}}) + "\n" for line in lines))
    text = markdown(load_run(folder), summarise(load_run(folder)))
    tables = section(text, "Tables").splitlines()
    table = [line for line in tables if line.startswith(("| `full`", "| method | asked"))]
    assert "| also | flags |" in table[0] and "| over_refusal 0.25 |" in table[1]
    assert len({line.count(" | ") for line in table}) == 1


def test_first_token_modes_stand_side_by_side(tmp_path: Path) -> None:
    both = text_of(small(tmp_path / "both"))
    side = section(both, "First token: compressed against prefill")
    recall = next(line for line in side.splitlines() if "`tb_recall` | `streaming_llm` | 0.3" in line)
    assert re.search(r"\| \*\*-\d", recall), "compressed is behind prefill"
    assert recall.split("|")[-2].strip().startswith("-3.4 ["), "hidden with prefill"
    assert "before anything is evicted" in side
    one = text_of(build(tmp_path / "one", Spec(n=5)))
    assert "side by side" not in one
    assert "against prefill" not in one


def test_warnings_reach_the_top_and_their_section(tmp_path: Path) -> None:
    text = text_of(build(tmp_path / "run", Spec([FakeTask("t", 0.2, 0.1, chance=0.25)], METHODS[:2])))
    assert "> **1 sanity warning** below" in text.split("## Verdict")[0]
    assert "not clearly above chance" in section(text, "Sanity warnings")


def test_nothing_to_compare_with(tmp_path: Path) -> None:
    text = text_of(build(tmp_path / "run", Spec(TASKS[:1], METHODS[:1], full=False)))
    assert "Nothing can be said" in section(text, "Verdict")


def test_only_full_and_only_failures_still_make_a_report(tmp_path: Path) -> None:
    text = text_of(build(tmp_path / "full", Spec(TASKS[:1], ())))
    assert "only full was run" in section(text, "Verdict")
    text = text_of(build(tmp_path / "failed", Spec(TASKS[:1], METHODS[1:2], ("0.1",), n=3, failed=3)))
    assert "| `streaming_llm` | 0.1 | - | 0 | - [no interval] |" in text
    assert "3 failed |" in text


def test_records_alone_suffice(tmp_path: Path) -> None:
    text = text_of(build(tmp_path / "run", Spec(n=5), with_meta=False))
    assert "made from the records alone" in section(text, "Provenance")


def test_command_is_quoted_and_status_said(tmp_path: Path) -> None:
    argv = ["kvcli", "sweep", "--method", "./my methods/a.py:M", "--ratio", "0.1"]
    folder = build(tmp_path / "run", Spec(n=5, meta={"argv": argv, "status": "running"}))
    text = text_of(folder)
    assert "kvcli sweep --method './my methods/a.py:M' --ratio 0.1" in section(text, "Provenance")
    assert "**Status running: not all samples are in.**" in text


def test_all_commands_that_grew_a_folder_are_printed_once_in_their_order(tmp_path: Path) -> None:
    first = ["kvcli", "sweep", "--method", "snapkv", "--limit", "5"]
    second = [*first[:-1], "9"]
    commands = [{"argv": first}, {"argv": second}, {"argv": first}]
    folder = build(tmp_path / "run", Spec(n=5, meta={"commands": commands, "argv": first}))
    said = section(text_of(folder), "Provenance")
    assert "These commands, in this order, repeat or resume this run:" in said
    assert "```sh\nkvcli sweep --method snapkv --limit 5\nkvcli sweep --method snapkv --limit 9\n```" in said
    commands = [{"argv": first}, {"argv": ["python", "kvcli.sweep"]}]
    folder = build(tmp_path / "both", Spec(n=5, meta={"commands": commands, "argv": ["python", "kvcli.sweep"]}))
    said = section(text_of(folder), "Provenance")
    assert "calls from Python added to it too" in said and "```sh\nkvcli sweep --method snapkv --limit 5\n```" in said


def test_a_call_from_python_is_no_command_to_type(tmp_path: Path) -> None:
    meta = {"argv": ["python", "kvcli.sweep"], "passed": {"limit": 16}}
    said = section(text_of(build(tmp_path / "run", Spec(n=5, meta=meta))), "Provenance")
    assert "Made from Python" in said and "kvcli.sweep\n```" not in said


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ((5, 5), "A subset: `--limit 5`, the same samples for every method."),
        ((5, 9), "on subsets of 5 to 9 samples of a task (`--limit`), nested"),
        ((5, None), "on subsets of 5 to all samples of a task"),
        ((None, None), ""),
    ],
)
def test_samples_of_a_grown_folder_are_not_called_the_same(
    tmp_path: Path, limits: tuple[int | None, ...], said: str
) -> None:
    grown = [{"grid": {"limit": limit}, "cells": [cell]} for limit, cell in zip(limits, "ab", strict=True)]
    top = text_of(build(tmp_path / "run", Spec(n=5, meta={"generations": grown}))).split("## Verdict")[0]
    assert said in top
    assert ("samples" in top) == bool(said)


@pytest.mark.parametrize("limits", [(5, 9), (9, 5)])
def test_more_samples_of_the_same_cells_are_the_same_for_every_method(tmp_path: Path, limits: tuple[int, int]) -> None:
    grown = [{"grid": {"limit": limit}, "cells": ["a", "b"]} for limit in limits]
    top = text_of(build(tmp_path / "run", Spec(n=5, meta={"generations": grown}))).split("## Verdict")[0]
    assert "A subset: `--limit 9`, the same samples for every method." in top


def test_full_with_other_weights_has_its_verdict_against_dense_full(tmp_path: Path) -> None:
    lines = cell("t", "full", "1", right(60, 60)) + cell("t", "a", "0.5", right(60, 60))
    lines += cell("t", "full", "1", right(30, 60), weights="wanda:0.5")
    lines += cell("t", "a", "0.5", right(30, 60), weights="wanda:0.5")
    text = text_of(folder_of(tmp_path / "run", lines))
    rows = [line for line in section(text, "Tables").splitlines() if line.startswith("| `full`")]
    assert rows[0].count("|  ") == 7, "dense full is compared with nothing"
    assert "| **-50.0** [" in rows[1] and "| loss |" in rows[1]
    assert "points to full of the dense model" in rows[1]


def test_one_graded_sample_is_not_called_one_cluster(tmp_path: Path) -> None:
    lines = cell("t", "full", "1", [0.5]) + cell("t", "a", "0.5", [0.25])
    tables = section(text_of(folder_of(tmp_path / "one", lines)), "Tables")
    assert "no interval: one sample (1 row)" in tables and "one cluster" not in tables
    lines = cell("t", "full", "1", [0.5] * 9, cluster="c") + cell("t", "a", "0.5", [0.25] * 9, cluster="c")
    assert "no interval: all samples are one cluster" in section(text_of(folder_of(tmp_path / "c", lines)), "Tables")


def test_one_cluster_is_a_warning_and_not_all_is_well(tmp_path: Path) -> None:
    lines = cell("t", "full", "1", right(9, 9), cluster="c") + cell("t", "a", "0.5", right(9, 9), cluster="c")
    text = text_of(folder_of(tmp_path / "run", lines))
    assert "not to be judged whether full is above chance" in section(text, "Sanity warnings")
    assert "None: full is above chance" not in text


def test_seeds_and_draws_and_shots_are_counted_in_words(tmp_path: Path) -> None:
    lines = cell("t", "full", "1", right(9, 9), shots=1)
    for seed in range(3):
        for draw in range(2):
            lines += cell("t", "random", "0.5", right(9, 9), shots=1, seed=seed, draw=draw)
    text = section(text_of(folder_of(tmp_path / "run", lines)), "Tables")
    assert "| 9 x 3 seeds x 2 draws |" in text
    assert "1 shot," in text and "1 shots" not in text


def test_tables_say_that_intervals_are_unadjusted_and_show_both_relative_changes(tmp_path: Path) -> None:
    lines = cell("t", "full", "1", right(50, 50)) + cell("t", "a", "0.5", right(40, 50), incoherent=True)
    text = section(text_of(folder_of(tmp_path / "run", lines, tasks=tasks(t={"chance": 0.5}))), "Tables")
    assert "| points to full [95 %, unadjusted] | relative | kept | p (Holm) |" in text
    row = next(line for line in text.splitlines() if line.startswith("| `a`"))
    assert "| -20.0 % | 60 % [" in row
    assert "| 0 % | 100 % | 0 % |" in row, "no answer, incoherent, cut"
    assert "Intervals are of each cell alone: 95 %, unadjusted." in text


def test_flags_and_shares_stand_in_short_tables_too(tmp_path: Path) -> None:
    lines = cell("t", "full", "1", right(30, 30))
    for i in range(1, 62):
        flags = {1: ["noop"], 2: ["fallback", "simulated"]}.get(i, [])
        lines += cell("t", "a", f"{i / 100:g}", right(30, 30), flags=flags, incoherent=i == 3)
    text = section(text_of(folder_of(tmp_path / "run", lines)), "Tables")
    (row,) = (line for line in text.splitlines() if line.startswith("| `a`"))
    fields = [field.strip() for field in row.strip("|").split("|")]
    assert fields[1].endswith("] n30/30") and fields[2].endswith("] f30/30 s30/30")
    assert fields[3].endswith("] ~100") and fields[4].endswith("]")
    assert "95 % interval of the cell alone, unadjusted" in text
    assert "Full scores 1.00 [0.89, 1.00] (no answer 0 %, incoherent 0 %, cut 0 %)" in text
    assert "- n, noop:" in text and "- f, fallback:" in text


def test_a_run_made_from_python_names_its_settings(tmp_path: Path) -> None:
    meta = {"argv": ["kvcli"], "passed": {"tasks": ["tb_recall"], "limit": 16}, "model": {"kv_heads": [2] * 32}}
    text = text_of(build(tmp_path / "run", Spec(n=5, meta=meta)))
    assert "tasks = tb_recall, limit = 16" in section(text, "Provenance")
    assert "| KV heads of a layer | 2 in each of 32 layers |" in text


def test_names_cannot_act_as_markdown(tmp_path: Path) -> None:
    folder = build(tmp_path / "run", Spec(n=5))
    for name in ("run.json", "samples.jsonl"):
        path = folder / name
        path.write_text(path.read_text().replace("snapkv", "a|b`<script>*x*").replace('"testbed"', '"<script>|*"'))
    text = text_of(folder)
    assert "# KV cache compression: \\<script\\>\\|\\*" in text
    assert "`a\\|b'<script>*x*`" in text
    tables = section(text, "Tables").splitlines()
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables if line.startswith("|")} == {16}


def test_only_the_pictures_that_are_named_are_linked(tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "old.png").touch()
    run = load_run(build(tmp_path / "run", Spec(n=5)))
    path = write_report(run, tmp_path / "report.md", pictures=["figures/difference.png", "figures/score.png"])
    assert re.findall(r"\]\((.*?)\)", path.read_text()) == ["figures/difference.png", "figures/score.png"]
    assert "](" not in write_report(run, tmp_path / "report.md").read_text()


def test_numbers_agree_with_the_summary(tmp_path: Path) -> None:
    run = load_run(small(tmp_path / "small"))
    text = markdown(run, summarise(run))
    table = next(t for t in summarise(run) if t.task == "tb_recall" and t.first_token == "compressed")
    cell = next(c for c in table.cells() if c.method == "snapkv" and c.column == "0.1")
    change = cell.difference
    assert change is not None and change.interval is not None
    shown = f"| {100 * change.value:+.1f} [{100 * change.interval.low:+.1f}, {100 * change.interval.high:+.1f}]"
    assert shown in section(text, "Tables")
    assert json.dumps(cell.flags) == '{"noop": 2}'
    assert f"noop 2/{cell.records}" in text


def test_a_table_of_many_rows_has_a_line_for_each_method(tmp_path: Path) -> None:
    text = text_of(build(tmp_path / "run", Spec(TASKS[:1], METHODS, tuple(f"0.{i}" for i in range(1, 9)), n=30)))
    rows = [line for line in section(text, "Tables").splitlines() if line.startswith("| `")]
    assert len(rows) == len(METHODS)
    assert all(re.search(r"\| (\*\*)?[+-][\d.]+(\*\*)? \[", row) for row in rows)
    assert "Full scores" in text


def test_left_out_prompts_are_said(tmp_path: Path) -> None:
    tasks = {"tb_knowledge": {"chance": 0.25, "version": "1", "too_long": 3}}
    text = text_of(build(tmp_path / "run", Spec(TASKS[:1], METHODS[:1], n=30, meta={"tasks": tasks})))
    assert "3 prompts were left out, longer than `--max-prompt-tokens`" in section(text, "Sanity warnings")
    assert "3 prompts too long, left out" in section(text, "Tables")


def test_other_exemplars_and_orders_stand_apart(tmp_path: Path) -> None:
    lines = []
    for seed, order in ((0, 0), (1, 0), (1, 2)):
        for method, correct in (("full", 20), ("m", 5)):
            lines += [
                record(
                    cell_id=f"{method}{seed}{order}", sample_id=str(i), task="t", method=method, ratio="0.1", shots=4,
                    measured_ratio=0.1, first_token="compressed", score=float(i < correct), extracted="x",
                    shot_seed=seed, shot_order=order,
                )
                for i in range(20)
            ]  # fmt: skip
    (tmp_path / "run").mkdir()
    write(tmp_path / "run" / "samples.jsonl", lines)
    text = text_of(tmp_path / "run")
    assert re.findall(r"^### (.*)$", text, re.M) == [
        "`t` (shot seed 0, shot order 0)", "`t` (shot seed 1, shot order 0)", "`t` (shot seed 1, shot order 2)",
    ]  # fmt: skip
    assert "never averaged" in section(text, "How it was measured")
    assert "n = 20)" in section(text, "Verdict")


def test_bold_and_the_verdict_are_one_thing(tmp_path: Path) -> None:
    """snapkv at 0.1 on tb_recall is established by itself, but not with all 72 comparisons considered."""
    rows = [line for line in section(text_of(small(tmp_path / "run")), "Tables").splitlines() if "| `" in line[:4]]
    fields = [[field.strip() for field in row.strip("|").split("|")] for row in rows if "`full`" not in row]
    assert {(field[8].startswith("**"), field[13]) for field in fields} == {(True, "loss"), (False, "not established")}
    alone = [f for f in fields if f[0] == "`snapkv`" and f[8].startswith("-18.6 [-30.4, -10.7]")]
    assert len(alone) == 1


def test_one_table_over_all_tasks_for_each_size(tmp_path: Path) -> None:
    over = section(text_of(small(tmp_path / "run")), "All tasks at one size")
    assert re.findall(r"^\*\*Kept ratio ([\d.]+)\*\*, n = 59-60\.$", over, re.M) == ["0.1", "0.3", "0.7"]
    rows = [line for line in over.splitlines() if line.startswith("|")]
    assert rows[0] == "| method | `tb_knowledge` | `tb_recall` | `tb_longgen` |"
    assert [row.split("`")[1] for row in rows[2:7]] == ["full", "streaming_llm", "snapkv", "shotkv", "random"]
    assert "| 0.14, **-84.7**<sup>n</sup> [-91.8, -73.5] |" in rows[3]
    assert "| 0.80, -18.6<sup>n</sup> [-30.4, -10.7] |" in rows[4]
    assert "<sup>no</sup>" in rows[5] and "o: over budget" in over
    assert "unadjusted" in over and "? per cent of outputs without an answer" in over


def test_the_table_over_tasks_names_warnings_and_needs_two_tasks(tmp_path: Path) -> None:
    spec = Spec([FakeTask("weak", 0.2, 0.1, chance=0.25), TASKS[2]], METHODS[1:2], n=20)
    over = section(text_of(build(tmp_path / "two", spec)), "All tasks at one size")
    assert "| method | `weak`<sup>x</sup> | `tb_recall` |" in over and "x: nothing can be said" in over
    assert "All tasks at one size" not in text_of(build(tmp_path / "one", Spec(TASKS[:1], METHODS[:2], n=5)))


def test_tables_over_tasks_do_not_mix_query_modes_and_name_shots(tmp_path: Path) -> None:
    lines = []
    for task, facts in (("t", {"shots": 1}), ("t", {"shots": 8}), ("u", {}), ("u", {"query": "agnostic"})):
        lines += cell(task, "full", "1", right(20, 20), **facts) + cell(task, "a", "0.5", right(5, 20), **facts)
    over = section(text_of(folder_of(tmp_path / "run", lines)), "All tasks at one size")
    assert [line for line in over.splitlines() if line.startswith("| method")] == [
        "| method | `t` (1 shot) | `t` (8 shots) | `u` |"
    ]


def test_facts_of_the_run_are_words(tmp_path: Path) -> None:
    said = section(text_of(small(tmp_path / "run")), "Provenance")
    assert "| version of kvcli | 0.1.0 |" in said and "| kvcli changed since that commit | no |" in said
    keys = re.findall(r"^\| (.*?) \|", said, re.M)
    assert not [key for key in keys if "." in key or "_" in key]


def test_how_many_records_are_in_is_said(tmp_path: Path) -> None:
    lines = cell("t", "full", "1", right(9, 9)) + cell("t", "a", "0.5", right(4, 9))
    names = sorted({line["cell_id"] for line in lines})
    meta = {"generations": [{"cells": names, "grid": {"limit": 20}}], "tasks": {"t": {"samples": 50}}}
    text = text_of(folder_of(tmp_path / "run", lines, status="running", **meta))
    assert "**Status running: not all samples are in (18 of 40 records).**" in text


def test_pictures_stand_before_the_tables_as_the_docs_say(tmp_path: Path) -> None:
    run = load_run(small(tmp_path / "run"))
    text = markdown(run, summarise(run), ["figures/score.png"])
    assert text.index("## Figures") < text.index("## Tables") < text.index("## How it was measured")
    page = (Path(report.__file__).parents[2] / "templates" / "report.html.j2").read_text()
    assert page.index('<section id="tables">') < page.index('<section id="figures">')
    docs = Path(report.__file__).parents[3] / "docs" / "report.md"
    assert "9. **Tables** and figures (in Markdown the figures come first)" in docs.read_text()


def test_a_folder_that_was_renamed_says_what_its_commands_called_it(tmp_path: Path) -> None:
    argv = {"argv": ["kvcli", "sweep", "--out", "runs/other"]}
    said = section(text_of(build(tmp_path / "run", Spec(n=5, meta=argv))), "Provenance")
    assert "(its folder was `runs/other` and is `run` now, which `--out` has to name):" in said
    same = section(text_of(build(tmp_path / "other", Spec(n=5, meta=argv))), "Provenance")
    assert "The same command repeats or resumes this run:" in same


def test_shots_are_said_once_above_a_table(tmp_path: Path) -> None:
    text = section(text_of(build(tmp_path / "run", Spec(n=5))), "Tables")
    lines = [line for line in text.splitlines() if "median prompt" in line]
    assert lines and all(line.count("8 shots") == 1 for line in lines)
