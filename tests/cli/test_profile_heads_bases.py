"""kvcli profile-heads --bases as typed, and the sweep that reads what it wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvcli.models.bases import cache_place, read_header
from kvcli.models.source import TESTBED_FOLDER, parse_model

TINY = f"random:{TESTBED_FOLDER}:layers=2,hidden=32,heads=4,kv_heads=2"
QUICK = ("profile-heads", "--bases", "--model", TINY, "--limit", "2", "--prompt-tokens", "100")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.slow
def test_a_sweep_of_both_kinds_on_the_testbed_in_a_process_of_its_own(tmp_path: Path) -> None:
    """Without the file: one message with the command to type. With it: both kinds run beside each other, and a record
    says which directions were read and what they weigh."""
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "kvcli", *args]
        return subprocess.run(command, capture_output=True, text=True, env=env, timeout=170)

    methods = "lowrank:basis=calibrated,lowrank:basis=weights"
    sweep = ("sweep", "--method", methods, "--task", "tb_recall", "--limit", "3", "--out", str(tmp_path / "run"))
    refused = run(*sweep)
    assert refused.returncode == 2 and refused.stderr.count("error: ") == 1
    fix = "kvcli profile-heads --bases --model testbed"
    assert fix in refused.stderr and not (tmp_path / "run").exists()
    made = run(*fix.split()[1:], "--limit", "8")
    assert made.returncode == 0, made.stderr
    assert "--method lowrank:basis=calibrated" in made.stderr
    done = run(*sweep)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    digest = read_header(cache_place(parse_model("testbed"))).digest
    for text, name in zip(methods.split(","), (digest, "weights"), strict=True):
        mine = [r for r in records if r["method"] == text]
        assert len(mine) == 3 and all(r["status"] == "ok" for r in mine)
        # 4 layers, 2 KV heads of 32 together: keys of rank 10, values of rank 32 of 64
        assert all(r["notes"] == {"basis": name, "basis_bytes": 2 * 4 * 64 * (10 + 32)} for r in mine)
        assert all(r["measured_ratio"] == pytest.approx((10 + 32) / 128, abs=1e-6) for r in mine)


def test_it_goes_where_methods_find_it_and_is_kept(kvcli: Callable[..., Any]) -> None:
    done = kvcli(*QUICK)
    assert done.code == 0, done.err
    place = cache_place(parse_model(TINY))
    found, time = read_header(place), place.stat().st_mtime_ns
    assert str(place) in done.out and found.digest in done.out
    again = kvcli(*QUICK)
    assert again.code == 0 and "kept as it is" in again.err and place.stat().st_mtime_ns == time
    other = kvcli(*QUICK, "--group", "1")
    assert other.code == 2 and "was made otherwise (group 4, now 1)" in " ".join(other.err.split())
    forced = kvcli(*QUICK, "--group", "1", "--force")
    assert forced.code == 0 and f"it held bases {found.digest}" in forced.err and read_header(place).group == 1


def test_json_is_what_the_file_says(kvcli: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "b.st"
    done = kvcli(*QUICK, "--out", out, "--json")
    facts = json.loads(done.out)
    assert facts.pop("file") == str(out) and facts == read_header(out).to_dict()
    assert f"basis={out}" in done.err


@pytest.mark.parametrize("args, why", [
    (("--calib", "x.txt"), "only --bases"), (("--group", "2"), "only --bases"),
    (("--bases", "--gates"), "different files"), (("--bases", "--wrong-too"), "no right answers"),
    (("--bases", "--out", "."), "is a folder"), (("--bases", "--calib", "none.txt"), "cannot read none.txt"),
    (("--bases", "--calib", "x.txt", "--task", "tb_recall"), "one kind of texts"),
    (("--bases", "--sinks", "3"), "only --gates"), (("--bases", "--group", "0"), "--group"),
])  # fmt: skip
def test_bad_input_is_one_message_and_code_2(kvcli: Callable[..., Any], args: tuple[str, ...], why: str) -> None:
    done = kvcli("profile-heads", *args)
    assert (done.code, done.out) == (2, "")
    assert done.err.count("error: ") == 1 and why in done.err and "Traceback" not in done.err


def test_another_file_is_not_overwritten(kvcli: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "thesis.txt"
    out.write_text("years of work")
    done = kvcli(*QUICK, "--out", out)
    assert done.code == 2 and "is no file of bases" in done.err and out.read_text() == "years of work"
