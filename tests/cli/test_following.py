"""What commands say to type next, and of a folder that is not finished."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from kvcli.cli.following import next_in, unfinished
from kvcli.results.store import RunStore
from tests.conftest import ROOT


@pytest.fixture
def folder(tmp_path: Path, record) -> Path:
    """2 of 6 records: two cells, three samples asked for."""
    folder = tmp_path / "run"
    with RunStore(folder) as store:
        with store.edit_run() as run:
            run.update(
                status="running", cells={"c0": {"task": "tb_recall"}, "c1": {"task": "tb_recall"}},
                tasks={"tb_recall": {"samples": 3}}, generations=[{"grid": {"limit": None}, "cells": ["c0", "c1"]}],
            )  # fmt: skip
        store.append(record("c0", "s0"))
        store.append(record("c0", "s1"))
    return folder


def test_report_is_the_next_command_until_it_was_made(folder, capfd):
    next_in(folder, "kvcli plot x")
    assert capfd.readouterr().err == f"next: kvcli report {folder}\n"
    (folder / "report.md").write_text("x")
    next_in(folder, "kvcli plot x")
    assert capfd.readouterr().err == "next: kvcli plot x\n"
    os.utime(folder / "report.md", (1e9, 1e9))
    next_in(folder, "kvcli plot x")
    assert capfd.readouterr().err == f"next: kvcli report {folder}\n", "the records are newer"


@pytest.mark.parametrize("command", ["status", "check", "export"])
def test_no_command_sends_back_to_a_report_that_is_there(kvcli, folder, command):
    with RunStore(folder) as store, store.edit_run() as run:
        run.update(status="done", generations=[{"grid": {"limit": 2}, "cells": ["c0"]}])
    assert f"next: kvcli report {folder}" in kvcli(command, folder).err
    (folder / "report.md").write_text("x")
    done = kvcli(command, folder)
    assert done.code == 0 and "next: kvcli" in done.err and "kvcli report" not in done.err


def test_a_listing_sends_to_what_is_left_to_do(kvcli, folder):
    assert f"next: kvcli report {folder}" in kvcli("list", "runs", "--folder", folder.parent).err
    (folder / "report.md").write_text("x")
    assert f"next: kvcli show {folder}" in kvcli("list", "runs", "--folder", folder.parent).err


def test_a_folder_that_is_not_finished_says_so(folder):
    assert unfinished(folder, 2).startswith(f"{folder} is not finished (interrupted): 2 of 6 records; kvcli status")
    with RunStore(folder) as store:
        assert unfinished(folder, 2) == f"{folder} is not finished (running): 2 of 6 records"
        with store.edit_run() as run:
            run["status"] = "stopped"
    assert "(stopped): 2 of 6 records" in unfinished(folder, 2)
    with RunStore(folder) as store, store.edit_run() as run:
        run["status"] = "done"
    assert unfinished(folder, 2) == ""
    (folder / "run.json").unlink()
    assert unfinished(folder, 2) == ""


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_demo_says_the_next_command_once(tmp_path):
    """Its commands run a stand-in that says, where kvcli would, that it ends with the next one."""
    said = tmp_path / "kvcli"
    said.write_text('#!/bin/sh\n[ -n "$KVCLI_NO_NEXT" ] || echo "next after $1" >&2\n')
    said.chmod(0o755)
    command = ["make", "-C", str(ROOT), "-o", ".venv", "demo", f"BIN={tmp_path}"]
    env = {name: value for name, value in os.environ.items() if name not in ("KVCLI_NO_NEXT", "MAKEFLAGS")}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == ["next after report"] and "report: runs/demo/report.md" in done.stdout
