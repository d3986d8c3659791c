"""kvcli export through the real command line, in this process, after a real sweep of the testbed."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvcli.results.store import read_records
from tests.analysis.synthetic import METHODS, TASKS, Spec, build
from tests.cli import sweeping


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("swept") / "demo"
    done = sweeping.call(
        "sweep", "--model", "testbed", "--task", "tb_recall,tb_choice", "--method", "snapkv", "--ratio", "0.2",
        "--limit", "3", "--out", out,
    )  # fmt: skip
    assert done.code == 0, done.err
    return out


@pytest.fixture
def run(swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(swept, Path("runs/demo")))


def test_csv_is_the_default_and_lies_in_the_folder(run: Path, kvcli: Callable[..., Any]) -> None:
    done = kvcli("export", "demo")
    assert (done.code, done.out.split()) == (
        0,
        ["runs/demo/exports/csv/samples.csv", "runs/demo/exports/csv/cells.csv"],
    )
    assert "kvcli report runs/demo" in done.err
    with (run / "exports/csv/samples.csv").open(newline="") as file:
        rows = {(r["cell_id"], r["sample_id"]): r for r in csv.DictReader(file)}
    records = read_records(run)
    assert len(rows) == len(records) == 12
    for record in records:
        row = rows[record["cell_id"], record["sample_id"]]
        assert float(row["score"]) == record["score"] and float(row["measured_ratio"]) == record["measured_ratio"]
        assert float(row["kl"]) == record["fidelity"]["kl"] and int(row["n_new"]) == record["n_new"]


def test_an_unknown_format_is_told_which_there_are(run: Path, kvcli: Callable[..., Any]) -> None:
    done = kvcli("export", "demo", "--format", "xlsx")
    assert (done.code, done.out) == (2, "")
    assert "try:   --format csv or parquet or lm-eval or every-eval-ever" in done.err


def test_the_end_of_a_file_s_name_decides(run: Path, kvcli: Callable[..., Any]) -> None:
    done = kvcli("export", "demo", "--out", "mine.parquet", "--json")
    assert json.loads(done.out)["files"] == ["mine.parquet", "mine-cells.parquet"]
    assert Path("mine.parquet").read_bytes()[:4] == b"PAR1"
    assert kvcli("export", "demo", "--format", "csv", "--out", "mine.parquet").code == 2


@pytest.mark.parametrize("form", ["lm-eval", "every-eval-ever"])
def test_other_formats(run: Path, kvcli: Callable[..., Any], form: str) -> None:
    done = kvcli("export", "demo", "--format", form, "--json")
    found = [Path(name) for name in json.loads(done.out)["files"]]
    assert done.code == 0 and all(path.is_file() for path in found)
    samples = [json.loads(text) for path in found if path.suffix == ".jsonl" for text in path.read_text().splitlines()]
    outputs = {record["output"] for record in read_records(run)}
    said = {s["resps"][0][0] if form == "lm-eval" else s["output"]["raw"][0] for s in samples}
    assert len(samples) == 12 and said == outputs
    assert "warning" not in done.err


def test_an_export_in_the_folder_does_not_disturb_it(run: Path, kvcli: Callable[..., Any]) -> None:
    for form in ("csv", "lm-eval", "every-eval-ever"):
        kvcli("export", "demo", "--format", form)
    assert kvcli("check", "demo").code == 0
    assert kvcli("report", "demo", "--no-figures").code == 0


def test_texts_that_are_left_out_are_named(tmp_path: Path, kvcli: Callable[..., Any]) -> None:
    folder = build(tmp_path / "run", Spec(TASKS[:2], METHODS[1:2], n=3))
    assert "warning" not in kvcli("export", folder).err, "plain tables have no texts"
    said = kvcli("export", folder, "--outputs").err
    assert "texts of tb_choice, tb_knowledge left out" in said
    assert "left out" not in kvcli("export", folder, "--outputs", "--harmful-texts").err


@pytest.mark.parametrize(
    "args", [["nope"], ["demo", "--format", "xlsx"], ["demo", "--relationship", "friend"], [], ["demo", "--out", "f/x"]]
)
def test_bad_input_is_one_message_and_exit_2(run: Path, kvcli: Callable[..., Any], args: list[str]) -> None:
    Path("f").touch()
    done = kvcli("export", *args)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ") and "try:" in done.err


def test_neither_torch_nor_transformers_is_imported(run: Path) -> None:
    code = (
        "import sys; from kvcli.cli.app import main; code = main(['export', 'demo', '--format', sys.argv[1]]);"
        "sys.exit(code or bool({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    for form in ("parquet", "lm-eval"):
        found = subprocess.run([sys.executable, "-c", code, form], capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stderr
