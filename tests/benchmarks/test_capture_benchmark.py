"""benchmarks/capture.py: what it concludes from its figures, and that its two processes run."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "capture.py"


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("benchmarks_capture", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(n: int, window: float, sums: float, mib: int) -> dict[str, Any]:
    return {"n": n, "ratio": {"window": window, "sums": sums}, "peak_bytes": {"plain": mib << 20, "sums": mib << 20}}


def test_ratios_are_medians_of_pairs(capture: ModuleType) -> None:
    """Not ratios of medians: a slow repeat is slow for all."""
    times = {"plain": [1.0, 2.0, 10.0], "sums": [1.5, 3.2, 15.1], "stock": [1.1]}
    assert capture.ratios(times) == {"sums": 1.51, "stock": 1.1}


def test_bars_are_judged_per_length_and_device(capture: ModuleType) -> None:
    found = capture.verdicts([row(4096, 1.05, 1.61, 10), row(8192, 1.06, 1.6, 20)], "cpu")
    met = {name: verdict["met"] for name, verdict in found.items()}
    assert met == {
        "window at 4096": True, "sums at 4096": False, "window at 8192": False, "sums at 8192": True,
        "plain memory per token, 8192 over 4096": True, "sums memory per token, 8192 over 4096": True,
    }  # fmt: skip
    on_gpu = capture.verdicts([row(8192, 1.0, 9.0, 10), row(32768, 1.0, 1.31, 160)], "cuda")
    assert "sums at 8192" not in on_gpu and not on_gpu["sums at 32768"]["met"]
    assert not on_gpu["sums memory per token, 32768 over 8192"]["met"], "quadratic memory is seen"


@pytest.mark.slow
def test_it_measures_time_and_memory_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, str(SCRIPT), "--lengths", "64,600", "--repeats", "1", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [r["n"] for r in rows] == [64, 600]
    assert all(times[0] > rows[0]["seconds"][variant][0] for variant, times in rows[1]["seconds"].items())
    for variant in ("plain", "sums"):
        assert rows[1]["peak_bytes"][variant] > rows[0]["peak_bytes"][variant] > 0
