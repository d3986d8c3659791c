"""benchmarks/report_speed.py: its folder is one that a sweep could have written, and both figures are measured."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from kvcli.analysis.reading.load import load_run
from kvcli.results.schema import check_record


@pytest.fixture(scope="module")
def speed() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "report_speed.py"
    spec = importlib.util.spec_from_file_location("report_speed", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(speed: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = speed.make(tmp_path_factory.mktemp("speed") / "run", 2 * speed.CELLS)
    return made


def test_the_folder_is_one_of_a_sweep(speed: ModuleType, folder: Path) -> None:
    lines = (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    for text in lines[:: speed.CELLS // 7]:
        check_record(json.loads(text))
    run = load_run(folder)
    assert (len(run), len(run.cells), len(run.samples)) == (2 * speed.CELLS, speed.CELLS, 2)
    assert {cell.task for cell in run.cells} == set(speed.TASKS) and set(run.meta["cells"]) == {
        cell.cell_id for cell in run.cells
    }
    assert 1500 < sum(map(len, lines)) / len(lines) < 2500, "bytes a line"


def test_a_process_of_its_own_is_measured(speed: ModuleType, folder: Path) -> None:
    wall, processor, peak = speed.measure(speed.LOAD, str(folder))
    assert processor > 0 and wall > 0 and 2**24 < peak < 2**31


def test_a_process_that_fails_is_no_figure(speed: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="ended with code"):
        speed.measure(speed.LOAD, str(tmp_path))
