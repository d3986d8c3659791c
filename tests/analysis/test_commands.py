"""kvcli plot and kvcli report through the real command line, in this process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvcli.cli.app import main
from tests.analysis.synthetic import METHODS, TASKS, Spec, build


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return build(Path("runs/demo-1a2b"), Spec(TASKS[1:3], METHODS[1:3], ("0.1", "0.5"), n=30))


def test_plot(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", "demo", "--format", "png"]) == 0
    said = capsys.readouterr()
    names = ["difference.png", "score.png", "difference.json", "score.json"]
    assert said.out.split() == [f"runs/demo-1a2b/figures/{name}" for name in names]
    assert all(Path(path).is_file() for path in said.out.split())
    assert "kvcli report runs/demo-1a2b" in said.err


def test_plot_json_and_out(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", str(run), "--format", "pdf", "--out", "elsewhere", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["figures"] == ["elsewhere/difference.pdf", "elsewhere/score.pdf"]
    assert Path(found["data"][0]).is_file()


def test_report(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "demo"]) == 0
    said = capsys.readouterr()
    text = (run / "report.md").read_text()
    assert "![difference](figures/difference.png)" in text
    assert (run / "figures" / "difference.png").is_file()
    assert "tb_recall" in said.out
    assert "report: runs/demo-1a2b/report.md" in said.out
    assert "kvcli show runs/demo-1a2b --task tb_" in said.err


def test_report_json_is_one_document(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "demo", "--json", "--no-figures", "--out", "out/mine.md"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["report"], found["figures"]) == ("out/mine.md", [])
    assert {t["task"] for t in found["tables"]} == {"tb_choice", "tb_recall"}
    cells = [cell for table in found["tables"] for cell in table["cells"]]
    assert all(0 < cell["detectable"] <= 1 for cell in cells)
    assert all(cell["retention"]["interval"]["low"] <= cell["retention"]["value"] for cell in cells)
    assert all(cell["incoherent"] == 0 for cell in cells)
    assert Path("out/mine.md").is_file()
    assert not Path("out/figures").exists()


@pytest.mark.parametrize(
    "args",
    [
        ["plot", "nope"],
        ["report", "nope"],
        ["plot", "demo", "--format", "gif"],
        ["plot"],
        ["export", "demo", "--margin", "0"],
    ],
)
def test_bad_input_is_one_message_and_exit_2(run: Path, capsys: pytest.CaptureFixture[str], args: list[str]) -> None:
    assert main(args) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert "try:" in said.err


def test_only_full_has_a_report_and_nothing_to_draw(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(Path("runs/full"), Spec(TASKS[:1], (), n=3))
    assert main(["report", "full"]) == 0
    capsys.readouterr()
    assert main(["plot", "full"]) == 2
    assert "nothing to draw" in capsys.readouterr().err


def test_broken_records_are_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "samples.jsonl"
    path.write_bytes(b"not json\n" + path.read_bytes())
    assert main(["report", "demo"]) == 2
    assert "samples.jsonl:1 is not JSON" in capsys.readouterr().err


def test_neither_torch_nor_transformers_is_imported(run: Path) -> None:
    code = (
        "import sys; from kvcli.cli.app import main; code = main(['report', 'demo']);"
        "sys.exit(code or bool({'torch', 'transformers', 'datasets', 'pandas'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("module", ["kvcli.cli.plot", "kvcli.cli.report"])
def test_command_modules_import_nothing_heavy(module: str) -> None:
    code = (
        f"import sys, {module}; sys.exit(bool({{'numpy', 'scipy', 'matplotlib', 'rich', 'torch'}} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
