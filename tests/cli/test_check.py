"""kvcli check: finds every kind of damage, changes nothing without --fix, loses nothing with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvcli.results import store
from kvcli.results.store import RunStore


@pytest.fixture
def folder(tmp_path: Path, record) -> Path:
    folder = tmp_path / "run"
    with RunStore(folder) as opened:
        with opened.edit_run() as run:
            run.update(cells={"c1": {}})
        opened.add_prompt({"sha": "p1", "text": "x"})
        for i in range(4):
            opened.append(record("c1", f"s{i}", prompt_sha="p1"))
    return folder


def lines(folder: Path) -> list[bytes]:
    return (folder / "samples.jsonl").read_bytes().splitlines(keepends=True)


def test_a_sound_folder(kvcli, folder):
    done = kvcli("check", folder)
    assert done.code == 0
    assert "4 records, no problems" in done.out
    assert f"next: kvcli report {folder}" in done.err


def test_damage_is_found_and_mended(kvcli, folder):
    path, whole = folder / "samples.jsonl", lines(folder)
    damaged = whole[0] + b"garbage\n" + whole[1][:40] + b"\n" + b"".join(whole[2:]) + b'{"torn'
    path.write_bytes(damaged)
    done = kvcli("check", folder)
    assert done.code == 2
    assert "3 problems" in done.out
    for number in (2, 3, 6):
        assert f"samples.jsonl:{number}" in done.out
    assert path.read_bytes() == damaged
    assert f"next: kvcli check {folder} --fix" in done.err

    done = kvcli("check", folder, "--fix")
    assert done.code == 0
    assert "3 broken lines" in done.err
    assert "no problems" in done.out
    assert path.read_bytes() == whole[0] + b"".join(whole[2:])
    assert (folder / "samples.jsonl.torn").read_bytes() == b"garbage\n" + whole[1][:40] + b'\n{"torn\n'
    with RunStore(folder) as opened:
        assert ("c1", "s1") not in opened.done_keys()


def test_the_last_line_per_key_stays(kvcli, folder, record):
    with RunStore(folder) as opened:
        opened.append(record("c1", "s9", status="error", score=None, prompt_sha="p1"))
        opened.append(record("c1", "s9", prompt_sha="p1"))
        opened.append(record("c1", "s0", score=0.5, prompt_sha="p1"))
    before = store.read_records(folder)
    done = kvcli("check", folder)
    assert done.code == 0
    assert "2 replaced lines" in done.out
    assert kvcli("check", folder, "--fix").code == 0
    assert store.read_records(folder) == before
    assert len(lines(folder)) == 5
    assert not list(folder.glob("*.torn"))


def test_damage_that_cannot_be_mended_stays_named(kvcli, folder, record):
    with RunStore(folder) as opened:
        opened.append(record("c7", "s1", prompt_sha="p1"))
        opened.append(record("c1", "s8", score=1.5, prompt_sha="p9"))
    short = {key: value for key, value in record("c1", "s7").items() if key != "metric"}
    with (folder / "samples.jsonl").open("a") as file:
        file.write(json.dumps(short) + "\n")
    found = json.loads(kvcli("check", folder, "--fix", "--json").out)
    told = "\n".join(f"{p['where']} {p['what']}" for p in found["problems"])
    for part in (
        "samples.jsonl:5 cell c7",
        "samples.jsonl:6 score 1.5",
        "samples.jsonl:6 prompt p9",
        "missing ['metric']",
    ):
        assert part in told
    assert kvcli("check", folder).code == 2


def test_a_broken_run_json(kvcli, folder):
    (folder / "run.json").write_text("{")
    done = kvcli("check", folder)
    assert done.code == 2
    assert "run.json" in done.out


def test_broken_prompts(kvcli, folder):
    with (folder / "prompts.jsonl").open("ab") as file:
        file.write(b"x\n")
    assert kvcli("check", folder).code == 2
    assert kvcli("check", folder, "--fix").code == 0
    assert (folder / "prompts.jsonl.torn").read_bytes() == b"x\n"


def test_shards_are_checked_too(kvcli, tmp_path, record):
    folder = tmp_path / "run"
    with RunStore(folder, shard=(0, 2)) as opened:
        opened.append(record())
        with opened.edit_run() as run:
            run["cells"] = {"c1": {}}
    path = folder / "shards" / "0-of-2.jsonl"
    path.write_bytes(path.read_bytes() + b"bad\n" + path.read_bytes())
    found = json.loads(kvcli("check", folder, "--json").out)
    assert [p["where"] for p in found["problems"]] == [f"{path}:2"]
    assert kvcli("check", folder, "--fix").code == 0
    assert len(path.read_bytes().splitlines()) == 1


def test_no_fixing_while_a_sweep_writes(kvcli, folder):
    with RunStore(folder):
        assert kvcli("check", folder).code == 0, "looking is allowed"
        done = kvcli("check", folder, "--fix")
    assert done.code == 2
    assert "is being written by process" in done.err
