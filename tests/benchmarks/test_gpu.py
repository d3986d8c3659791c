"""benchmarks/gpu.py without a GPU: it says so; its sections run at tiny sizes; what goes wrong is written down."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.py"
FOREIGN = ("typer", "datasets", "jsonlines", "matplotlib", "rich")
"""Packages that a machine with no more than PyTorch and transformers does not have."""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("benchmarks_gpu", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    before = sorted((ROOT / "docs").rglob("*"))
    out = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--json", str(out)], capture_output=True, text=True, cwd=tmp_path, timeout=120,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "no CUDA device here: nothing measured\n"), done.stderr
    assert not out.exists()
    assert sorted((ROOT / "docs").rglob("*")) == before


@pytest.mark.slow
def test_every_section_runs_at_tiny_sizes_with_little_installed(tmp_path: Path) -> None:
    for name in FOREIGN:
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is not here')\n")
    out = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--cpu-check", "--json", str(out)], capture_output=True, text=True, timeout=280,
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    sections = json.loads(out.read_text())["sections"]
    assert {name: s["status"] for name, s in sections.items()} == dict.fromkeys(sections, "done")
    cases = sections["correctness"]["rows"]
    assert len(cases) == 8 and all(case["ok"] for case in cases)
    assert all(case["triton"] <= 1 and case["same_twice"] for case in cases if "triton" in case)
    assert [row["n"] for row in sections["capture"]["rows"] if "n" in row] == [64, 128]
    assert any("speedup" in row for row in sections["sweep"]["rows"])
    assert [row["batch"] for row in sections["decode"]["rows"] if "batch" in row] == [1, 4]


def test_a_failed_section_is_written_down_and_the_rest_goes_on(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(section: object) -> None:
        section.add("one row", value=1)  # type: ignore[attr-defined]
        raise ValueError("the kernel is missing")

    monkeypatch.setitem(gpu.RUN, "kernel", broken)
    monkeypatch.setitem(gpu.RUN, "decode", lambda section: section.add("fine", value=2))
    out = tmp_path / "out.jsonl"
    assert gpu.child(["kernel", "decode"], out, "tiny") == 1
    monkeypatch.setattr(gpu.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1))
    monkeypatch.setattr(gpu.Path, "touch", lambda path: path.write_text(out.read_text()))
    sections = gpu.start(["kernel", "decode"], "tiny", tmp_path)
    assert sections["kernel"]["rows"] == [{"value": 1}] and sections["decode"]["rows"] == [{"value": 2}]
    assert (sections["kernel"]["status"], sections["decode"]["status"]) == ("failed", "done")
    assert "FAILED: ValueError: the kernel is missing" in gpu.summary(sections)


@pytest.mark.parametrize("late", [False, True])
def test_a_process_that_dies_or_hangs_is_a_failed_section(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    def run(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
        if late:
            raise subprocess.TimeoutExpired("gpu.py", 1)
        return subprocess.CompletedProcess([], -11)

    monkeypatch.setattr(gpu.subprocess, "run", run)
    found = gpu.start(["capture"], "8b", tmp_path)["capture"]
    assert found["status"] == "failed"
    assert found["error"] == ("not ended after 170 s" if late else "its process ended with code -11")


def test_the_least_cost_of_sums_is_counted_in_operations(gpu: ModuleType) -> None:
    """Scores are a quarter of causal attention's operations twice over, so sums add at most half of attention."""
    config = gpu.shape(gpu.Section("capture", Path(os.devnull), "8b", 0.0))
    assert gpu.floor(config, 1) == pytest.approx(1, abs=1e-3)
    assert gpu.floor(config, 32768) == pytest.approx(1.19, abs=0.01)
    assert gpu.floor(config, 131072) == pytest.approx(1.36, abs=0.01)
    assert gpu.floor(config, 10**8) == pytest.approx(1.5, abs=1e-3)


def test_all_sections_together_stay_below_eight_minutes(gpu: ModuleType) -> None:
    assert set(gpu.LIMITS) == set(gpu.RUN)
    assert sum(gpu.LIMITS.values()) <= 455
