from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kvcli.analysis.reading import line
from kvcli.analysis.reading.columns import Columns
from kvcli.analysis.reading.load import FIGURES, find_run, load_run
from kvcli.analysis.reading.texts import whole_records
from kvcli.errors import KvcliError
from kvcli.results.schema import LATER
from kvcli.results.store import read_records
from tests.analysis.synthetic import Spec, build, record, records, write


def one(cell: str, sample: str, score: float | None, **more: object) -> dict:
    base = {"task": "t", "method": "snapkv", "ratio": "0.1", "first_token": "compressed", "extracted": "x"}
    status = "ok" if score is not None else "error"
    return record(cell_id=cell, sample_id=sample, score=score, status=status, **{**base, **more})


def scores(folder: Path) -> dict[tuple[str, str], float]:
    run = load_run(folder)
    return {(run.cells[c].cell_id, run.samples[s]): v for c, s, v in zip(run.cell, run.sample, run.score, strict=True)}


def test_last_line_per_cell_and_sample_wins(tmp_path: Path) -> None:
    lines = [one("c", "1", None), one("c", "2", 1.0), one("c", "1", 1.0), one("d", "1", 0.0)]
    write(tmp_path / "samples.jsonl", lines)
    assert scores(tmp_path) == {("c", "1"): 1.0, ("c", "2"): 1.0, ("d", "1"): 0.0}


def test_between_files_finished_beats_failed_then_the_first_file(tmp_path: Path) -> None:
    write(
        tmp_path / "samples.jsonl", [one("c", "1", 0.25), one("c", "2", None), one("c", "4", 1.0), one("c", "4", None)]
    )
    (tmp_path / "shards").mkdir()
    write(tmp_path / "shards" / "1.jsonl", [one("c", "1", 0.75), one("c", "2", 0.5), one("c", "3", 0.0)])
    write(tmp_path / "shards" / "0.jsonl", [one("c", "1", 0.5), one("c", "2", 0.25), one("c", "4", None)])
    found = scores(tmp_path)
    assert np.isnan(found.pop(("c", "4")))
    assert found == {("c", "1"): 0.25, ("c", "2"): 0.25, ("c", "3"): 0.0}


def test_reads_what_the_store_reads(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    (tmp_path / "shards").mkdir()
    for path in (tmp_path / "samples.jsonl", *(tmp_path / "shards" / f"{i}.jsonl" for i in range(3))):
        picked = rng.integers(0, 12, (30, 2))
        write(path, [one(f"c{c}", f"{s}", float(rng.integers(2)) if rng.random() < 0.7 else None) for c, s in picked])
        path.write_bytes(path.read_bytes()[: -int(rng.integers(0, 50))])
    expected = {(r["cell_id"], r["sample_id"]): r["score"] for r in read_records(tmp_path, ("score",))}
    found = {key: None if np.isnan(value) else value for key, value in scores(tmp_path).items()}
    assert found == expected


def test_shards_alone_give_the_same_as_one_file_with_run_json(tmp_path: Path) -> None:
    whole, shards = build(tmp_path / "whole"), build(tmp_path / "shards", shards=3, with_meta=False)
    assert scores(whole) == scores(shards)
    assert {c.cell_id: c for c in load_run(whole).cells} == {c.cell_id: c for c in load_run(shards).cells}


@pytest.mark.parametrize("cut", [0, 1, 10, 200])
def test_torn_last_line_counts_as_not_written(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "samples.jsonl"
    write(path, [one("c", "1", 1.0), one("c", "2", 1.0)])
    path.write_bytes(path.read_bytes()[: -1 - cut])
    run = load_run(tmp_path)
    assert len(run) == 1
    assert run.torn == ("samples.jsonl",)


@pytest.mark.parametrize(
    "broken",
    [b'{"cell_id": "c", "sam\n', b"[1, 2]\n", b'{"sample_id": "1"}\n', b"\xff\xfe\n", b"\x00\x00\x00\n", b"{} {}\n"],
)
def test_broken_line_in_the_middle_names_file_and_line(tmp_path: Path, broken: bytes) -> None:
    path = tmp_path / "samples.jsonl"
    write(path, [one("c", "1", 1.0)])
    good = path.read_bytes()
    path.write_bytes(good + broken + good)
    with pytest.raises(KvcliError, match=r"samples\.jsonl:2 ") as caught:
        load_run(tmp_path)
    assert caught.value.fix.startswith("kvcli check")


def test_torn_line_in_the_middle_of_a_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    write(path, [one("c", "1", 1.0)])
    good = path.read_bytes()
    path.write_bytes(good[:40] + good + good)
    with pytest.raises(KvcliError, match=r"samples\.jsonl:1 is not JSON"):
        load_run(tmp_path)


def test_newer_schema_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "samples.jsonl", [{**one("c", "1", 1.0), "schema": 99}])
    with pytest.raises(KvcliError, match="newer kvcli"):
        load_run(tmp_path)


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(KvcliError, match="no result folder"):
        load_run(tmp_path / "absent")
    with pytest.raises(KvcliError, match="no records"):
        load_run(tmp_path)
    (tmp_path / "samples.jsonl").touch()
    with pytest.raises(KvcliError, match="no finished records"):
        load_run(tmp_path)
    (tmp_path / "run.json").write_text("{nope")
    with pytest.raises(KvcliError, match=r"run\.json:1 is not JSON"):
        load_run(tmp_path)


def test_columns_hold_what_tables_need(tmp_path: Path) -> None:
    lines = [
        one("c", "1", 0.5, flags=["noop", "simulated"], finish="length", measured_ratio=0.12, n_prompt=80, cluster="g"),
        one("c", "2", None, extracted=None, cluster=""),
        one("c", "3", 1, flags=["a_new_flag"], extracted=None, cluster=7),
    ]
    write(tmp_path / "samples.jsonl", lines)
    run = load_run(tmp_path)
    assert np.array_equal(run.score, [0.5, np.nan, 1.0], equal_nan=True)
    assert np.array_equal(run.measured_ratio, [0.12, np.nan, np.nan], equal_nan=True)
    assert run.answered.tolist() == [True, False, False]
    assert run.truncated.tolist() == [True, False, False]
    assert [run.clusters[c] if c >= 0 else None for c in run.cluster] == ["g", None, "7"]
    named = [{n for i, n in enumerate(run.flag_names) if mask >> i & 1} for mask in run.flags.tolist()]
    assert named == [{"noop", "simulated"}, set(), {"a_new_flag"}]


def test_cell_facts_come_from_records_and_run_json_fills_gaps(tmp_path: Path) -> None:
    write(tmp_path / "samples.jsonl", [one("c", "1", 1.0, ratio=0.10, budget=None, shots=None, decode={"r": 1})])
    described = {"c": {"ratio": "0.7", "shots": 8, "query": "agnostic"}}
    (tmp_path / "run.json").write_text(json.dumps({"cells": described, "config": {"model": "m@1"}}))
    run = load_run(tmp_path)
    cell = run.cells[0]
    assert (cell.ratio, cell.shots, cell.query, cell.decode) == ("0.1", 8, "aware", '{"r": 1}')
    assert run.model == "m@1"


def test_find_run_by_path_and_unique_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("testbed-0a", "testbed-0b", "testbed"):
        build(Path("runs") / name, Spec(n=2))
    assert find_run("runs/testbed-0b") == find_run("testbed-0b") == Path("runs/testbed-0b")
    assert find_run("testbed") == Path("runs/testbed")
    with pytest.raises(KvcliError, match="2 result folders"):
        find_run("testbed-0")
    with pytest.raises(KvcliError, match="unknown result folder"):
        find_run("nope")


def test_reads_quickly(tmp_path: Path) -> None:
    """A million records must take under 20 s; this reads 20,000 and allows ten times that rate."""
    import time

    lines = list(records(Spec(n=20)))
    with (tmp_path / "samples.jsonl").open("w") as file:
        for i in range(20_000):
            file.write(json.dumps({**lines[i % len(lines)], "sample_id": str(i), "output": "word " * 60}) + "\n")
    start = time.process_time()
    assert len(load_run(tmp_path)) == 20_000
    assert time.process_time() - start < 4


@pytest.fixture(params=["fast", "slow"])
def read(request: pytest.FixtureRequest) -> Callable[[bytes], line.Line]:
    """Both ways to read a line."""
    if request.param == "slow":
        return line.read_slowly
    pytest.importorskip("msgspec", reason="the fast way needs msgspec")
    return line.reader()


WHOLE = record(
    cell_id="c", sample_id="7", task="t", method="m", score=0.5, measured_ratio=0.25, kept=12.5, metric="accuracy",
    extra={"f1": 0.75, "whole": 1}, extracted="x", cluster="g", finish="length", n_prompt=80, truncated=3, n_new=5,
    context={"tokens": 60, "measured_ratio": 0.2}, flags=["noop"], repetition=0.125,
    kv_bytes={"full": 4096, "prefill": 1024, "end": 2048, "read": None, "match": None},
    fidelity={"kl": 0.5, "top1": 1.0, "nll": 2.0, "tokens": 5, "first_divergence": None, "identical": False},
)  # fmt: skip


def test_a_line_is_read_whole(read: Callable[[bytes], line.Line]) -> None:
    found = read(json.dumps(WHOLE).encode() + b"\n")
    assert (found.cell_id, found.sample_id, found.score, found.status) == ("c", "7", 0.5, "ok")
    assert (found.extra, found.flags, found.cluster) == ({"f1": 0.75, "whole": 1.0}, ["noop"], "g")
    assert found.fidelity == line.Fidelity(0.5, 1.0, 2.0, False)
    assert found.kv_bytes == line.Bytes(4096, 1024, 2048)
    assert found.context == line.Context(60, 0.2)
    assert (found.n_prompt, found.truncated, found.n_new, found.kept) == (80, 3, 5, 12.5)


@pytest.mark.parametrize(
    "change",
    [
        {}, {"score": 1}, {"score": True}, {"sample_id": 7}, {"cluster": 4}, {"cluster": 1.5}, {"metric": 3},
        {"extra": None}, {"extra": []}, {"extra": {"f1": 1}}, {"flags": None}, {"flags": [1]}, {"n_prompt": 80.0},
        {"context": None}, {"context": 7}, {"kv_bytes": {}}, {"fidelity": None}, {"finish": 1}, {"extracted": ["a"]},
        {"extracted": "\ud800"}, {"output": "\u2028 é \U0001f600 \" \\ \n"}, {"status": None}, {"status": "error"},
        {"schema": None}, {"measured_ratio": 1e-300}, {"a_new_field": {"b": [1, {"score": 0}]}},
    ],
)  # fmt: skip
def test_both_ways_to_read_give_one_record(change: dict[str, object]) -> None:
    pytest.importorskip("msgspec", reason="the fast way needs msgspec")
    text = json.dumps({**WHOLE, **change}).encode() + b"\n"
    fast, slow = (columns_of([text], way) for way in (line.reader(), line.read_slowly))
    assert fast == slow


def columns_of(lines: list[bytes], read: Callable[[bytes], line.Line]) -> str:
    """All that columns make of lines, as text, for NaN is not equal to itself."""
    columns = Columns(lambda cell, text: None, "RUN")
    columns.starts.append(0)
    for text in lines:
        columns.add(read(text), text, 0)
    arrays = columns.whole() | columns.real() | columns.extra(np.arange(len(columns)))
    codes = columns.cluster_codes, columns.metric_codes, columns.sample_codes, columns.flag_bits
    return repr(({name: value.tolist() for name, value in arrays.items()}, codes))


@pytest.mark.parametrize(
    ("text", "error"),
    [(b"{} {}\n", ValueError), (b"[1]\n", TypeError), (b'{"cell_id": "c"}\n', KeyError), (b"", ValueError),
     (b'{"cell_id": "c", "sample_id": "1"}', ValueError), (b'{"cell_id": "c", "sample_id": "1", "score": "x"}\n',
     ValueError), (b'\xff{"cell_id": "c"}\n', ValueError)],
)  # fmt: skip
def test_what_is_no_record_is_refused(read: Callable[[bytes], line.Line], text: bytes, error: type) -> None:
    with pytest.raises(error):
        read(text)


def test_nothing_is_stored_of_a_line_that_is_refused() -> None:
    columns = Columns(lambda cell, text: None, "RUN")
    with pytest.raises(KvcliError, match="newer"):
        columns.add(line.Line("c", "1", schema=99, extra={"f1": 1.0}), b"", 0)
    assert len(columns) == 0 and columns.extra(np.arange(0)) == {}


def test_records_of_before_the_newer_fields_are_read(tmp_path: Path) -> None:
    old = {k: v for k, v in one("c", "1", 1.0).items() if k not in LATER}
    write(tmp_path / "samples.jsonl", [old])
    run = load_run(tmp_path)
    cell = run.cells[0]
    assert (cell.weights, cell.match, cell.shot_seed, cell.shot_order, cell.draw) == ("dense", None, 0, 0, 0)
    assert np.isnan(run.figures["cut"][0]) and np.isnan(run.figures["context_ratio"][0])


def test_shots_and_draws_are_facts_of_a_cell(tmp_path: Path) -> None:
    write(tmp_path / "samples.jsonl", [one("c", "1", 1.0, shot_seed=3, shot_order=2, draw=4)])
    cell = load_run(tmp_path).cells[0]
    assert (cell.shot_seed, cell.shot_order, cell.draw) == (3, 2, 4)


def test_figures_belong_to_the_record_that_counts(tmp_path: Path) -> None:
    lines = [{**WHOLE, "kept": 1.0}, {**WHOLE, "sample_id": "8", "fidelity": None}, {**WHOLE, "kept": 2.0}]
    write(tmp_path / "samples.jsonl", lines)
    run = load_run(tmp_path)
    assert tuple(run.figures) == FIGURES
    assert run.figures["kept"][np.argsort(run.sample)].tolist() == [2.0, 12.5]
    assert np.isnan(run.figures["kl"]).tolist() == [run.samples[code] == "8" for code in run.sample]
    assert run.figures["cut"].tolist() == [3, 3] and run.figures["bytes_full"].tolist() == [4096, 4096]


def test_whole_records_are_found_again_in_their_files(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    write(tmp_path / "samples.jsonl", [one("c", "1", None), one("é", "1", 0.25, output="ü" * 9), one("c", "1", 1.0)])
    write(tmp_path / "shards" / "0.jsonl", [one("c", "2", 0.5, output="two")])
    (tmp_path / "samples.jsonl").write_bytes((tmp_path / "samples.jsonl").read_bytes() + b"\n  \n")
    run = load_run(tmp_path)
    found = list(whole_records(run, range(len(run))))
    assert [r["score"] for r in found] == run.score.tolist()
    assert sorted(r["output"] for r in found) == ["", "two", "ü" * 9]


def test_a_file_that_was_compacted_meanwhile_is_noticed(tmp_path: Path) -> None:
    write(tmp_path / "samples.jsonl", [one("c", "1", 1.0), one("c", "2", 1.0)])
    run = load_run(tmp_path)
    write(tmp_path / "samples.jsonl", [one("c", "2", 1.0)])
    with pytest.raises(KvcliError, match="changed while it was read"):
        list(whole_records(run, [0]))


def test_a_run_that_grew_is_read_with_what_is_new(tmp_path: Path) -> None:
    write(tmp_path / "samples.jsonl", [one("c", "1", 1.0)])
    assert len(load_run(tmp_path)) == 1
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write(json.dumps(one("c", "2", 0.0)) + "\n")
    assert scores(tmp_path) == {("c", "1"): 1.0, ("c", "2"): 0.0}


def test_a_folder_may_be_named_by_text(tmp_path: Path) -> None:
    assert load_run(str(build(tmp_path / "run"))).name == "run"


def test_torch_is_not_imported(tmp_path: Path) -> None:
    build(tmp_path / "run")
    code = (
        "import pathlib, sys, kvcli; kvcli.load_run(pathlib.Path(sys.argv[1]));"
        "sys.exit(bool({'torch', 'transformers', 'pandas', 'pyarrow', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
