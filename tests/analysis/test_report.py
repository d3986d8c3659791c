from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from kvcli.analysis.load import load_run
from kvcli.analysis.report import markdown, write_report
from kvcli.analysis.tables import summarise
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
        "Verdict", "Sanity warnings", "Method against method, at the same bytes",
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
    assert "`shotkv` " in verdict and "at 0.1 (over budget, measured 0.18)" in verdict
    assert "need about" in verdict


def over_budget_run(folder: Path, tasks: int = 1) -> Path:
    """shotkv keeps too much in one sample of 24 at 0.1 and loses nearly all there, little at 0.3, nothing at 0.5."""
    folder.mkdir(parents=True)
    lines = []
    for number in range(tasks):
        for ratio, right in {"1": 24, "0.1": 3, "0.3": 19, "0.5": 24}.items():
            method = "full" if ratio == "1" else "shotkv"
            for i in range(24):
                flags = ["over_budget"] if (ratio, i) == ("0.1", 7) else []
                lines.append(record(
                    cell_id=f"{number}{method}{ratio}", sample_id=str(i), task=f"t{number}", method=method, ratio=ratio,
                    measured_ratio=float(ratio), first_token="compressed", score=float(i < right), extracted="x",
                    flags=flags,
                ))  # fmt: skip
    write(folder / "samples.jsonl", lines)
    return folder


def test_a_loss_over_budget_is_still_a_loss(tmp_path: Path) -> None:
    verdict = section(text_of(over_budget_run(tmp_path / "run")), "Verdict")
    assert "loses **87.5 points [" in verdict
    assert "at 0.1 (over budget, measured 0.10) with `shotkv`" in verdict
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
            assert re.match(r"(\*\*)?[+-][\d.]+(\*\*)? \[[+-][\d.]+, [+-][\d.]+\]$", fields[7])
            assert fields[8].endswith("%")
            assert fields[11] in ("loss", "gain", "unchanged", "no loss", "open")


def test_further_figures_have_a_column_where_there_are_any(tmp_path: Path) -> None:
    folder = small(tmp_path)
    assert "| also |" not in markdown(load_run(folder), summarise(load_run(folder)))
    path = folder / "samples.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**line, "extra": {"over_refusal": 0.25}}) + "\n" for line in lines))
    text = markdown(load_run(folder), summarise(load_run(folder)))
    table = [line for line in text.splitlines() if line.startswith(("| `full`", "| method | asked"))]
    assert "| also | flags |" in table[0] and "| over_refusal 0.25 |" in table[1]
    assert len({line.count(" | ") for line in table}) == 1


def test_first_token_modes_stand_side_by_side(tmp_path: Path) -> None:
    both = text_of(small(tmp_path / "both"))
    side = section(both, "First token: compressed against prefill")
    recall = next(line for line in side.splitlines() if "`tb_recall` | `streaming_llm` | 0.3" in line)
    assert re.search(r"\| \*\*-\d", recall), "lost with compressed"
    assert not recall.split("|")[-2].strip().startswith("**-"), "hidden with prefill"
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


def test_a_run_made_from_python_names_its_settings(tmp_path: Path) -> None:
    meta = {"argv": ["kvcli"], "passed": {"tasks": ["tb_recall"], "limit": 16}, "model": {"kv_heads": [2] * 32}}
    text = text_of(build(tmp_path / "run", Spec(n=5, meta=meta)))
    assert "tasks = tb_recall, limit = 16" in section(text, "Provenance")
    assert "| model.kv_heads | 2 in each of 32 |" in text


def test_names_cannot_act_as_markdown(tmp_path: Path) -> None:
    folder = build(tmp_path / "run", Spec(n=5))
    for name in ("run.json", "samples.jsonl"):
        path = folder / name
        path.write_text(path.read_text().replace("snapkv", "a|b`<script>*x*").replace('"testbed"', '"<script>|*"'))
    text = text_of(folder)
    assert "# KV cache compression: \\<script\\>\\|\\*" in text
    assert "`a\\|b'<script>*x*`" in text
    tables = section(text, "Tables").splitlines()
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables if line.startswith("|")} == {14}


@pytest.mark.parametrize("pictures", [(), ("difference.png", "score.png")])
def test_figures_beside_the_report_are_linked(tmp_path: Path, pictures: tuple[str, ...]) -> None:
    (tmp_path / "figures").mkdir()
    for name in (*pictures, "difference.json"):
        (tmp_path / "figures" / name).touch()
    path = write_report(load_run(build(tmp_path / "run", Spec(n=5))), tmp_path / "report.md")
    assert re.findall(r"\]\((.*?)\)", path.read_text()) == [f"figures/{name}" for name in pictures]


def test_numbers_agree_with_the_summary(tmp_path: Path) -> None:
    run = load_run(small(tmp_path / "small"))
    text = markdown(run, summarise(run))
    table = next(t for t in summarise(run) if t.task == "tb_recall" and t.first_token == "compressed")
    cell = next(c for c in table.cells() if c.method == "snapkv" and c.column == "0.1")
    change = cell.difference
    assert change is not None and change.interval is not None
    shown = f"**{100 * change.value:+.1f}** [{100 * change.interval.low:+.1f}, {100 * change.interval.high:+.1f}]"
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
        for method, right in (("full", 20), ("m", 5)):
            lines += [
                record(
                    cell_id=f"{method}{seed}{order}", sample_id=str(i), task="t", method=method, ratio="0.1", shots=4,
                    measured_ratio=0.1, first_token="compressed", score=float(i < right), extracted="x",
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
