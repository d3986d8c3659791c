"""kvcli status: how far a folder is, read only from the folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvcli.results.store import RunStore


@pytest.fixture
def folder(tmp_path: Path, record) -> Path:
    """Two tasks, two cells each, limit 3: 12 planned; 4 done, 1 failed."""
    folder = tmp_path / "run"
    cells = {f"c{i}": {"task": "tb_recall" if i < 2 else "tb_code"} for i in range(4)}
    with RunStore(folder) as store:
        with store.edit_run() as run:
            run.update(
                status="running", argv=["/usr/bin/kvcli", "sweep", "--method", "snapkv,h2o"],
                config={"model": "testbed"}, cells=cells, tasks={"tb_recall": {}, "tb_code": {}},
                generations=[{"grid": {"limit": 3}, "cells": list(cells)}],
            )  # fmt: skip
        for i in range(3):
            store.append(record("c0", f"s{i}"))
        store.append(record("c1", "s0"))
        store.append(record("c2", "s0", task="tb_code", status="error", error="ValueError: x", score=None))
    return folder


def test_what_is_done_and_how_to_go_on(kvcli, folder):
    done = kvcli("status", folder)
    assert done.code == 0
    assert "interrupted, model testbed" in done.out
    assert "4 of 12 records (33 %), 1 failed" in done.out
    assert "next: kvcli sweep --method snapkv,h2o" in done.err


def test_json(kvcli, folder):
    facts = json.loads(kvcli("status", folder, "--json").out)
    assert (facts["done"], facts["planned"], facts["errors"]) == (4, 12, 1)
    assert facts["tasks"][0] == {"task": "tb_recall", "cells": 2, "done": 4, "errors": 0, "planned": 6}
    assert facts["resume"] == "kvcli sweep --method snapkv,h2o"


def test_while_a_sweep_writes(kvcli, folder, record):
    with RunStore(folder) as store:
        facts = json.loads(kvcli("status", folder, "--json").out)
        assert facts["status"] == "running"
        assert len(facts["writers"]) == 1
        store.append(record("c1", "s1"))
        with (folder / "samples.jsonl").open("a") as file:
            file.write('{"half')
            file.flush()
            assert json.loads(kvcli("status", folder, "--json").out)["done"] == 5


def test_a_finished_run(kvcli, tmp_path, record):
    with RunStore(tmp_path / "r") as store:
        store.append(record("c0"))
        with store.edit_run() as run:
            run.update(
                status="done", cells={"c0": {"task": "tb_recall"}}, tasks={"tb_recall": {"samples": 1}},
                generations=[{"grid": {"limit": None}, "cells": ["c0"]}],
            )  # fmt: skip
    done = kvcli("status", tmp_path / "r")
    assert "1 of 1 record (100 %)" in done.out
    assert f"next: kvcli report {tmp_path / 'r'}" in done.err


def test_no_such_run(kvcli, tmp_path):
    done = kvcli("status", tmp_path / "none")
    assert done.code == 2
    assert "unknown result folder" in done.err
    assert "kvcli list runs" in done.err


def test_it_needs_neither_torch_nor_numpy(folder):
    code = "import sys; from kvcli.cli.app import main; main(sys.argv[1:]); print({'torch', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code, "status", folder], capture_output=True, text=True)
    assert done.stdout.endswith("set()\n")
