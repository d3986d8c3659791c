"""kvcli report through the command line: what it writes, what it refuses, and that it needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvcli.cli.app import main
from tests.analysis.page_runs import EVIL, chunks_in, with_texts
from tests.analysis.synthetic import METHODS, TASKS, Spec, build


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
    assert main(["report", "demo", "other", "--no-figures"]) == 0
    text = (run / "report.md").read_text()
    assert "## Compared with other" in text
    assert "model is testbed here and another there" in text


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
