"""kvcli report through the command line: what it writes, what it refuses, and that it needs no torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvcli.cli.app import main
from tests.analysis.page_runs import EVIL, chunks_in, with_texts
from tests.analysis.synthetic import METHODS, TASKS, FakeMethod, Spec, build
from tests.analysis.tables_of import cell, folder_of, right


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return with_texts(Path("runs/demo-1a2b"))


def test_html_and_latex_lie_beside_the_markdown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "demo", "--html", "--latex", "--no-figures", "--out", "out/mine.md"]) == 0
    assert "report: out/mine.md\nreport: out/mine.tex\nreport: out/mine.html\n" in capsys.readouterr().out
    assert Path("out/mine.html").read_text().startswith("<!doctype html>")
    assert r"\toprule" in Path("out/mine.tex").read_text()


def test_json_has_verdicts_findings_and_the_family(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "demo", "--json", "--no-figures", "--margin", "5"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["family"]["size"] == 8
    assert found["margin"] == 0.05
    assert [f["number"] for f in found["findings"]] == [1, 2, 3, 4, 5, 6]
    judged = found["tables"][0]["cells"][0]["judged"]
    assert judged["kind"] in ("loss", "not established")
    assert judged["interval"]["low"] < judged["interval"]["high"]
    assert judged["margin"] == 0.05


def test_two_runs_are_compared(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(Path("runs/other"), Spec(TASKS[1:3], METHODS[1:3], ("0.1", "0.5"), n=40, model="another"))
    assert main(["report", "demo", "--no-figures"]) == 0
    own = (run / "report.md").read_text()
    capsys.readouterr()
    assert main(["report", "demo", "other", "--no-figures"]) == 0
    text = (run / "report-vs-other.md").read_text()
    assert "## Compared with other" in text
    assert "model is testbed here and another there" in text
    assert (run / "report.md").read_text() == own, "the run's own report stays"
    out = " ".join(capsys.readouterr().out.split())
    assert "Compared with other Not paired, because model is testbed here and another there" in out


def test_the_terminal_says_which_methods_two_runs_do_not_share(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(Path("runs/third"), Spec(TASKS[1:3], [FakeMethod("h2o:recent=8", 0.5)], ("0.1", "0.5"), n=40))
    assert main(["report", "demo", "third", "--no-figures"]) == 0
    assert "No method in common: streaming_llm, snapkv / h2o:recent=8." in capsys.readouterr().out


def test_long_tables_are_left_to_the_report(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*more: str) -> tuple[str, str]:
        assert main(["report", "many", "--no-figures", *more]) == 0
        out, err = capsys.readouterr()
        return out, err

    build(Path("runs/many"), Spec(TASKS, METHODS, ("0.1",), n=4))
    out, err = said()
    assert "streaming_llm   " not in out and "report: runs/many/report.md" in out
    assert "lines are in the report; --table prints them here\n" in err
    tables = said("--table")
    assert "streaming_llm   " in tables[0] and "--table" not in tables[1]
    assert len(tables[0].splitlines()) - len(out.splitlines()) > 40
    build(Path("runs/many"), Spec(TASKS[:1], METHODS[:2], ("0.1",), n=4))
    short = said()
    assert "streaming_llm   " in short[0] and "--table" not in short[1]
    assert "streaming_llm   " not in said("--no-table")[0]


def test_every_picture_is_of_this_call(run: Path) -> None:
    def links(name: str) -> list[str]:
        return re.findall(r"!\[.*?\]\((.*?)\)", (run / name).read_text())

    assert main(["plot", "demo", "--kind", "heatmap", "--format", "png"]) == 0
    assert main(["report", "demo"]) == 0
    first = links("report.md")
    assert first and not any("heatmap" in link for link in first)
    assert all(link.startswith("figures/") and (run / link).is_file() for link in first)
    build(run, Spec(TASKS[1:4], METHODS[1:3], ("0.1", "0.5"), ("compressed", "prefill"), n=40))
    before = {path: path.stat().st_mtime_ns for path in (run / "figures").glob("*.png")}
    assert main(["report", "demo"]) == 0
    second = links("report.md")
    assert len(second) > len(first)
    assert all((run / link).stat().st_mtime_ns > before.get(run / link, 0) for link in second)
    assert main(["report", "demo", "--out", str(run / "other.md")]) == 0
    assert links("other.md") and all(link.startswith("other-figures/") for link in links("other.md"))


def test_a_folder_that_is_not_finished_is_warned_of(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meta = json.loads((run / "run.json").read_text())
    meta["status"] = "stopped"
    meta["generations"] = [{"cells": list(meta["cells"]), "grid": {"limit": 50}}]
    (run / "run.json").write_text(json.dumps(meta))
    assert main(["report", "demo", "--no-figures"]) == 0
    err = capsys.readouterr().err
    assert err.startswith("warning: runs/demo-1a2b is not finished (stopped): 400 of 500 records")
    meta["status"] = "done"
    (run / "run.json").write_text(json.dumps(meta))
    assert main(["report", "demo", "--no-figures"]) == 0
    assert "not finished" not in capsys.readouterr().err


def test_what_bench_measured_is_for_plot(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path("runs/bench-testbed")
    folder.mkdir()
    (folder / "bench.jsonl").write_text("{}\n")
    for name in ("runs/bench-testbed", "bench-testbed"):
        assert main(["report", name]) == 2
        err = capsys.readouterr().err
        assert "holds times that kvcli bench measured" in err and "kvcli plot runs/bench-testbed" in err


def test_json_has_the_distance_from_full_and_what_stands_in_the_family(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    near = {"kl": 0.25, "top1": 0.9, "nll": 1.0, "identical": False}
    lines = cell("t", "full", "1", right(30, 30)) + cell("t", "a", "0.1", right(1, 30), fidelity=near)
    folder_of(Path("runs/near"), lines)
    assert main(["report", "near", "--json", "--no-figures"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["tables"][0]["cells"]
    assert (found["kl"], found["top1"], found["in_family"]) == (0.25, pytest.approx(0.9), "loss")


def test_against_the_paper(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "demo", "--against", "kvfundabench", "--no-figures"]) == 0
    assert "The paper prints nothing of `testbed`" in (run / "report.md").read_text()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--against", "other"], "no printed numbers of 'other'"),
        (["--margin", "0"], "a margin lies between 0 and 100 points"),
        (["--margin", "-2"], "a margin lies between 0 and 100 points"),
        (["nothere"], "nothere"),
    ],
)
def test_bad_input_is_one_message(run: Path, capsys: pytest.CaptureFixture[str], args: list[str], said: str) -> None:
    assert main(["report", "demo", "--no-figures", *args]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and said in err and "try:" in err
    assert not (run / "report.md").exists()


def test_harmful_texts_are_asked_for_by_name(run: Path, tmp_path: Path) -> None:
    with_texts(tmp_path / "runs" / "harm", harmful=True)
    for args, hidden in (([], True), (["--harmful-texts"], False)):
        assert main(["report", "harm", "--html", "--no-figures", *args]) == 0
        chunks = chunks_in((tmp_path / "runs" / "harm" / "report.html").read_text())
        assert [chunk["hidden"] for chunk in chunks] == [hidden, hidden]
        assert any(EVIL in text for text in chunks[0]["texts"]) != hidden


def test_a_page_needs_no_torch(run: Path) -> None:
    code = (
        "import sys; from kvcli.cli.app import main; code = main(['report', 'demo', '--html', '--latex']);"
        "sys.exit(code or bool({'torch', 'transformers', 'datasets', 'pandas'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def test_many_compared_runs_do_not_all_name_the_file(run: Path) -> None:
    names = [f"other{i}" for i in range(5)]
    for name in names:
        build(Path("runs") / name, Spec(TASKS[1:2], METHODS[1:2], ("0.1",), n=5))
    assert main(["report", "demo", *names[:2], "--no-figures"]) == 0
    assert main(["report", "demo", *names, "--no-figures"]) == 0
    assert {path.name for path in run.glob("report*.md")} == {
        "report-vs-other0-other1.md",
        "report-vs-other0-and-4-more.md",
    }
