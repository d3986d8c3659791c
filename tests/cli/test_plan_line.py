"""The line before a sweep counts what is to come; a folder in use is said before any plan is made."""

from __future__ import annotations

import pytest

from kvcli.engine import session
from kvcli.results.store import RunStore
from tests.cli.sweeping import one_error, typed

SWEEP = typed("sweep --model testbed --task tb_recall --ratio 0.3 --no-fidelity")


@pytest.fixture
def folder(tmp_path, kvcli):
    done = kvcli(*SWEEP, "--method", "random", "--limit", "6", "--out", tmp_path / "run")
    assert done.code == 0 and "2 cells, 6 prompts, 12 records to come" in done.err
    return tmp_path / "run"


def test_prompts_are_those_of_this_command(kvcli, folder):
    """The folder has 6; this command asks for 2 of them and full has both already."""
    done = kvcli(*SWEEP, "--method", "snapkv", "--limit", "2", "--out", folder)
    assert done.code == 0 and "2 cells, 2 prompts, 2 records to come" in done.err
    assert "holds 1 more cell of earlier commands" in done.err


def test_one_of_a_kind_has_no_s(kvcli, folder):
    done = kvcli(*SWEEP, "--method", "snapkv", "--limit", "1", "--out", folder, "--dry-run")
    assert "2 cells, 1 prompt, 1 record to come" in done.out and "1 cell x 1 prompt," in done.out
    assert "1 cell, 1 row\n" in done.out


def test_nothing_to_come(kvcli, folder):
    done = kvcli(*SWEEP, "--method", "random", "--limit", "6", "--out", folder)
    assert done.code == 0 and "2 cells: nothing left to do" in done.err
    assert f"next: kvcli report {folder}" in done.err
    (folder / "report.md").write_text("x")
    done = kvcli(*SWEEP, "--method", "random", "--limit", "6", "--out", folder)
    assert f"next: kvcli show {folder}" in done.err


def test_a_second_writer_is_told_before_the_plan(kvcli, folder, monkeypatch):
    def prepare(*_):
        raise AssertionError("it went on to plan")

    monkeypatch.setattr(session, "prepare", prepare)
    with RunStore(folder):
        done = kvcli(*SWEEP, "--method", "snapkv", "--limit", "6", "--out", folder)
    one_error(done, "is being written by process")


def test_a_dry_run_may_look_at_a_folder_in_use(kvcli, folder):
    with RunStore(folder):
        done = kvcli(*SWEEP, "--method", "snapkv", "--limit", "6", "--out", folder, "--dry-run")
    assert done.code == 0 and "6 records to come" in done.out
