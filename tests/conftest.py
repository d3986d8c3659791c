"""Shared by all tests: hypothesis profiles, KVCLI_REQUIRE, a synthetic record, the command line in this process."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
for name in ("FORCE_COLOR", "COLUMNS", "KVCLI_DEBUG"):
    os.environ.pop(name, None)

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from kvcli.results.schema import FIELDS, SCHEMA

ROOT = Path(__file__).resolve().parent.parent

settings.register_profile("dev", max_examples=100, deadline=None)
settings.register_profile("ci", max_examples=50, deadline=None, derandomize=True)
settings.register_profile("thorough", max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """KVCLI_REQUIRE=gpu,shared (or all): a skipped test with one of these markers has failed."""
    outcome: Any = yield
    report = outcome.get_result()
    required = {name for name in os.environ.get("KVCLI_REQUIRE", "").split(",") if name}
    marked = {mark.name for mark in item.iter_markers()}
    if report.skipped and not hasattr(report, "wasxfail") and required & (marked | {"all"}):
        report.outcome = "failed"
        report.longrepr = f"KVCLI_REQUIRE={','.join(sorted(required))}, but it was skipped: {report.longrepr}"


@dataclass(frozen=True)
class Done:
    """What a command line did."""

    code: int
    out: str
    err: str


@pytest.fixture
def kvcli(capfd: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """kvcli(*args): the command line inside this process."""
    from kvcli.cli.app import main

    def call(*args: object) -> Done:
        capfd.readouterr()
        code = main([str(arg) for arg in args])
        return Done(code, *capfd.readouterr())

    return call


@pytest.fixture
def kvcli_process() -> Callable[..., Done]:
    """kvcli_process(*args, **env): the command line as a process of its own."""

    def call(*args: object, **env: str) -> Done:
        command = [sys.executable, "-m", "kvcli", *map(str, args)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, timeout=120)
        return Done(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture
def record() -> Callable[..., dict[str, Any]]:
    """record(cell, sample, **fields): a whole synthetic record."""

    def make(cell: str = "c1", sample: str = "s1", **fields: Any) -> dict[str, Any]:
        whole = dict.fromkeys(FIELDS)
        whole.update(
            schema=SCHEMA, cell_id=cell, sample_id=sample, task="tb_recall", ability="recall", method="snapkv",
            settings={"window": 32}, ratio=0.1, measured_ratio=0.1, kept=2.0, first_token="compressed", query="aware",
            shots=2, status="ok", score=1.0, metric="exact", output="out", output_ids=[1, 2], extracted="out",
            target="out", finish="eos", n_prompt=20, n_new=2, flags=[], batch_id="b0",
        )  # fmt: skip
        whole.update(fields)
        return whole

    return make
