"""The result folder: resume, torn and broken lines, locks, shards, kill -9, a full disk, a vanished folder."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcli.errors import Exit, KvcliError
from kvcli.results import store
from kvcli.results.schema import FIELDS
from kvcli.results.store import RunStore


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


def write(folder: Path, *records: dict, **options) -> list[str]:
    with RunStore(folder, **options) as opened:
        for one in records:
            opened.append(one)
        return opened.notes


def test_resume_knows_what_is_done_and_repeats_errors(folder, record):
    write(folder, record("c1", "s1"), record("c1", "s2", status="error", score=None))
    with RunStore(folder) as opened:
        assert opened.done_keys() == {("c1", "s1")}
        opened.append(record("c1", "s2"))
        assert opened.done_keys() == {("c1", "s1"), ("c1", "s2")}
    kept = store.read_records(folder)
    assert [(r["sample_id"], r["status"]) for r in kept] == [("s1", "ok"), ("s2", "ok")]


def test_a_record_is_written_at_once_with_its_fields_in_order(folder, record):
    with RunStore(folder) as opened:
        opened.append(dict(reversed(record(output="naïve \u2028 \ud800").items())))
        line = (folder / "samples.jsonl").read_bytes()
    assert line.count(b"\n") == 1
    value = json.loads(line)
    assert list(value) == list(FIELDS)
    assert value["output"] == "naïve \u2028 \ud800"


def test_wrong_fields_and_nan_are_bugs_and_write_nothing(folder, record):
    with RunStore(folder) as opened:
        with pytest.raises(ValueError, match="unknown"):
            opened.append({**record(), "scor": 1})
        with pytest.raises(ValueError, match="Out of range float"):
            opened.append(record(score=float("nan")))
    assert (folder / "samples.jsonl").read_bytes() == b""


@pytest.mark.parametrize(
    "torn", [b'{"cell_id": "c9", "sample', b'{"cell_id": "c9", "sample_id": "s9"}', b"\0\0\0", b"[1]\n", b"{}\n"]
)
def test_a_torn_last_line_counts_as_not_written(folder, record, torn):
    write(folder, record("c1", "s1"))
    path = folder / "samples.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert [r["sample_id"] for r in store.read_records(folder)] == ["s1"]
    assert path.read_bytes() == whole + torn, "reading changes nothing"
    [note] = write(folder, record("c1", "s2"))
    assert "samples.jsonl.torn" in note
    assert path.with_name("samples.jsonl.torn").read_bytes().rstrip(b"\n") == torn.rstrip(b"\n")
    assert [r["sample_id"] for r in store.read_records(folder)] == ["s1", "s2"]
    assert write(folder) == []


def test_a_torn_prompt_is_cut_off_too(folder, record):
    with RunStore(folder) as opened:
        opened.add_prompt({"sha": "a", "text": "x"})
    with (folder / "prompts.jsonl").open("a") as file:
        file.write('{"sha": "b"')
    with RunStore(folder) as opened:
        assert len(opened.notes) == 1
        opened.add_prompt({"sha": "a", "text": "x"})
        opened.add_prompt({"sha": "b", "text": "y"})
    assert list(store.read_prompts(folder)) == ["a", "b"]
    assert (folder / "prompts.jsonl").read_bytes().count(b"\n") == 2


def test_a_broken_line_in_the_middle_names_file_and_line(folder, record):
    write(folder, record("c1", "s1"), record("c1", "s2"), record("c1", "s3"))
    path = folder / "samples.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:50] + b"\n" + lines[2] + b'{"torn')
    before = path.read_bytes()
    for attempt in (lambda: RunStore(folder), lambda: store.read_records(folder)):
        with pytest.raises(KvcliError) as caught:
            attempt()
        assert f"{path}:2 " in caught.value.what
        assert caught.value.code == Exit.USAGE
        assert f"kvcli check {folder} --fix" in caught.value.fix
    assert path.read_bytes() == before, "nothing is lost"


@given(cut=st.integers(0, 10_000), count=st.integers(1, 5))
def test_a_file_cut_anywhere_resumes_to_the_same_records(tmp_path_factory, cut, count):
    folder = tmp_path_factory.mktemp("cut")
    records = [{**dict.fromkeys(FIELDS), "cell_id": "c", "sample_id": f"s{i}", "status": "ok"} for i in range(count)]
    write(folder, *records)
    path = folder / "samples.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: min(cut, len(whole))])
    with RunStore(folder) as opened:
        missing = [r for r in records if ("c", r["sample_id"]) not in opened.done_keys()]
        for one in missing:
            opened.append(one)
    assert path.read_bytes() == whole


@given(blocks=st.lists(st.binary(max_size=40), max_size=4), tail=st.binary(max_size=40))
def test_lines_cover_the_whole_file(tmp_path_factory, blocks, tail):
    path = tmp_path_factory.mktemp("lines") / "x.jsonl"
    data = b"".join(block.replace(b"\n", b"") + b"\n" for block in blocks) + tail.replace(b"\n", b"")
    path.write_bytes(data)
    lines = list(store.read_lines(path))
    assert all(data[line.start : line.start + len(line.raw)] == line.raw for line in lines)
    assert [line.start for line in lines] == sorted(line.start for line in lines)
    start, raw = store._last_line(path)
    assert data[start:] == raw
    assert b"\n" not in raw[:-1]


def test_shards_are_files_of_their_own_and_know_each_other(folder, record):
    write(folder, record("c1", "s1"), shard=(0, 2))
    with RunStore(folder, shard=(1, 2)) as one, RunStore(folder, shard=(0, 2)) as other:
        assert one.done_keys() == other.done_keys() == {("c1", "s1")}
        one.append(record("c1", "s2"))
        one.add_prompt({"sha": "a", "text": "x"})
    assert (folder / "shards" / "1-of-2.jsonl").exists()
    assert not (folder / "samples.jsonl").exists()
    with RunStore(folder) as later:
        assert later.done_keys() == {("c1", "s1"), ("c1", "s2")}
    assert list(store.read_prompts(folder)) == ["a"]


def test_between_files_ok_beats_error(folder, record):
    write(folder, record("c1", "s1", status="ok"), shard=(0, 2))
    write(folder, record("c1", "s1", status="error", score=None))
    [one] = store.read_records(folder)
    assert one["status"] == "ok"
    write(folder, record("c1", "s2", status="error", score=None), shard=(0, 2))
    write(folder, record("c1", "s2"), shard=(1, 2))
    assert {r["status"] for r in store.read_records(folder)} == {"ok"}


HOLDER = """
import sys, time
from kvcli.results.store import RunStore
opened = RunStore(sys.argv[1])
print("open", flush=True)
time.sleep(60)
"""


def test_another_process_cannot_write_the_same_file(folder):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(KvcliError, match=f"process {holder.pid} ") as caught:
            RunStore(folder)
        assert caught.value.code == Exit.USAGE
        assert "--out" in caught.value.fix
        assert store.writers(folder) == [f"process {holder.pid} on {os.uname().nodename}"]
        RunStore(folder, shard=(0, 2)).close()
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    RunStore(folder).close()
    assert store.writers(folder) == []


WRITER = """
import sys
from kvcli.results.schema import FIELDS
from kvcli.results.store import RunStore
with RunStore(sys.argv[1]) as opened:
    for i in range(10**9):
        record = {**dict.fromkeys(FIELDS), "cell_id": "c", "sample_id": f"s{i}", "status": "ok", "output": "x" * 3000}
        opened.append(record)
"""


def test_kill_9_of_a_writer_loses_nothing_that_was_written(folder):
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)])
        path, deadline = folder / "samples.jsonl", time.monotonic() + 30
        before = path.stat().st_size if path.exists() else 0
        while (not path.exists() or path.stat().st_size < before + 100_000) and time.monotonic() < deadline:
            time.sleep(0.01)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        data = path.read_bytes()
        with RunStore(folder) as opened:
            done = opened.done_keys()
        whole = {json.loads(line)["sample_id"] for line in data.split(b"\n")[:-1]}
        assert {sample for _, sample in done} == whole
        assert len(whole) > 20


def test_a_full_disk_is_an_environment_error_and_leaves_whole_lines(folder, record, monkeypatch):
    with RunStore(folder) as opened:
        opened.append(record("c1", "s1"))
        monkeypatch.setattr(os, "write", _fails_after(10))
        with pytest.raises(KvcliError) as caught:
            opened.append(record("c1", "s2"))
        monkeypatch.undo()
        assert caught.value.code == Exit.ENVIRONMENT
        assert "free some space" in caught.value.fix
        assert opened.done_keys() == {("c1", "s1")}
        opened.append(record("c1", "s3"))
    assert [r["sample_id"] for r in store.read_records(folder)] == ["s1", "s3"]


def _fails_after(count: int):
    """os.write of a disk with room for `count` more bytes."""
    real, left = os.write, count

    def write(fd: int, data: bytes) -> int:
        nonlocal left
        if left <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = real(fd, bytes(data)[:left])
        left -= done
        return done

    return write


def test_a_real_full_disk(record):
    """/dev/full takes no byte."""
    lines = store._Lines(Path("/dev/full"))
    with pytest.raises(KvcliError) as caught:
        lines.append(record())
    assert caught.value.code == Exit.ENVIRONMENT


def test_a_folder_that_is_gone_is_an_environment_error(folder, record):
    with pytest.raises(KvcliError) as caught, RunStore(folder) as opened:
        opened.append(record("c1", "s1"))
        folder.rename(folder.with_name("elsewhere"))
        opened.append(record("c1", "s2"))
    assert caught.value.code == Exit.ENVIRONMENT
    assert len(store.read_records(folder.with_name("elsewhere"))) == 1


def test_a_file_replaced_underneath_is_noticed(folder, record):
    with RunStore(folder) as opened:
        (folder / "samples.jsonl").unlink()
        (folder / "samples.jsonl").touch()
        with pytest.raises(KvcliError, match="replaced"):
            opened.append(record())


@pytest.mark.parametrize("under", ["", "a/b"])
def test_a_file_in_place_of_the_folder(tmp_path, under):
    (tmp_path / "file").write_text("mine")
    target = tmp_path / "file" / under
    for attempt in (store.check_out, RunStore):
        with pytest.raises(KvcliError, match="is not a folder") as caught:
            attempt(target)
        assert caught.value.code == Exit.USAGE
        assert str(target) in caught.value.given


def test_an_unwritable_folder():
    with pytest.raises(KvcliError, match="cannot write to") as caught:
        RunStore("/proc/kvcli/run")
    assert caught.value.code == Exit.USAGE


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(KvcliError, match="permission denied"):
        store.check_out(tmp_path / "run")


def test_run_json_is_edited_whole_or_not_at_all(folder):
    with RunStore(folder) as opened:
        with opened.edit_run() as run:
            run["status"] = "running"
        first = (folder / "run.json").read_bytes()
        with pytest.raises(RuntimeError), opened.edit_run() as run:
            run["status"] = "done"
            raise RuntimeError
        assert (folder / "run.json").read_bytes() == first
        with opened.edit_run() as run:
            run.setdefault("cells", {})["c1"] = {"task": "t"}
    run = store.read_run(folder)
    assert (run["schema"], run["status"], run["cells"]) == (1, "running", {"c1": {"task": "t"}})
    assert run["created"] <= run["updated"]
    assert not list(folder.glob(".*.part"))


def test_run_json_of_a_newer_kvcli_or_broken_is_refused(folder):
    folder.mkdir()
    for text, what in (('{"schema": 99}', "newer"), ("{", "not a JSON"), ("[]", "not a JSON")):
        (folder / "run.json").write_text(text)
        with pytest.raises(KvcliError, match=what):
            store.read_run(folder)
    (folder / "run.json").unlink()
    with pytest.raises(KvcliError, match="cannot read"):
        store.read_run(folder)


def test_another_model_is_refused_by_name():
    old = {"model": "a/b", "revision": "1", "dtype": "float32"}
    store.ensure_same(old, dict(old), Path("runs/x"))
    with pytest.raises(KvcliError) as caught:
        store.ensure_same(old, {**old, "model": "c/d", "dtype": "bfloat16"}, Path("runs/x"))
    text = "\n".join(caught.value.lines())
    for part in ("runs/x", "dtype and model", "a/b", "c/d", "bfloat16", "float32", "--out"):
        assert part in text


@pytest.mark.parametrize(
    "kept",
    [
        [np.array([0, 2, 5]), np.array([1, 5])],
        [np.array([[0, 5], [1, 5]])] * 2,
        [[np.array([0, 5]), np.array([5])], [np.array([1, 2, 5]), np.array([3, 5])]],
        [[[0, 5], [5]], [[1], [2]]],
    ],
)
def test_kept_positions_come_back(folder, kept):
    with RunStore(folder) as opened:
        opened.keep_map("tb_recall", "doc/7 é", "c1", kept)
    back = store.read_map(store.map_path(folder, "tb_recall", "doc/7 é", "c1"))
    for layer, found in zip(kept, back, strict=True):
        rows = layer if isinstance(layer, list) else np.atleast_2d(layer)
        assert [list(row) for row in rows] == [row.tolist() for row in found]


def test_kept_positions_of_torch(folder):
    torch = pytest.importorskip("torch")
    with RunStore(folder) as opened:
        opened.keep_map("t", "s", "c", [torch.tensor([0, 3]), [torch.tensor([1]), torch.tensor([1, 3])]])
    back = store.read_map(store.map_path(folder, "t", "s", "c"))
    assert [[row.tolist() for row in layer] for layer in back] == [[[0, 3]], [[1], [1, 3]]]


@given(names=st.lists(st.text(min_size=1, max_size=200), min_size=2, max_size=2, unique=True))
def test_sample_ids_become_different_file_names(names):
    one, other = (store.map_path(Path("r"), "t", name, "c") for name in names)
    assert one != other
    assert all(path.parts[:3] == ("r", "kept", "t") and len(path.parts) == 5 for path in (one, other))


def test_find_run_takes_paths_names_and_unique_beginnings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/demo", "runs/testbed-1a", "runs/testbed-2b", "other/mine"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "run.json").write_text("{}")
    (tmp_path / "runs" / "empty").mkdir()
    for text in ("runs/demo", "runs/demo/", "demo", "de", "runs/d", "runs/demo/run.json", str(tmp_path / "runs/demo")):
        assert store.find_run(text).resolve() == tmp_path / "runs/demo"
    assert store.find_run("other/m") == Path("other/mine")
    (tmp_path / "runs" / "demo2").mkdir()
    (tmp_path / "runs" / "demo2" / "samples.jsonl").touch()
    assert store.find_run("demo") == Path("runs/demo"), "a name that is also a beginning is itself"
    wrong = {"": "no run.json", "testbed": "begins 2", "demi": "unknown result folder", "runs/empty": "no run.json"}
    for text, what in wrong.items():
        with pytest.raises(KvcliError, match=what):
            store.find_run(text)
