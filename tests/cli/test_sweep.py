"""kvcli sweep and run: what they print, what they write, how a grid grows, where settings come from."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kvcli.models import loader
from kvcli.results import store
from kvcli.results.schema import check_record
from tests.cli import sweeping
from tests.cli.sweeping import TINY, Done, comparable, contents, model_folder, prompts, records, typed

BASE = ("--model", "testbed", "--method", "shotkv", "--ratio", "0.1", "--task", "tb_recall,tb_safety", "--limit", "6")
"""2 tasks x (full + shotkv) x 6 samples = 24 records."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep; tests work on copies."""
    folder = tmp_path_factory.mktemp("base") / "run"
    done = sweeping.call("sweep", *BASE, "--out", folder)
    assert done.code == 0, done.err
    return folder


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "run"))


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading weights is an error from here on."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(loader, "load_weights", refuse)


def cells_of(done: Done) -> list[dict]:
    """The cells a `--dry-run --json` announces."""
    assert done.code == 0, done.err
    return json.loads(done.out)["cells_list"]


def axis(done: Done, name: str) -> set:
    return {cell[name] for cell in cells_of(done)}


# --- what is printed --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_first_command_of_the_readme(kvcli, kvcli_process, tmp_path, monkeypatch):
    """As a process of its own, without --out; typed again it finds everything done."""
    monkeypatch.chdir(tmp_path)
    command = typed("sweep --model testbed --method shotkv --ratio 0.1 --task tb_recall --limit 4")
    done: Done = kvcli_process(*command)
    assert done.code == 0, done.err
    err = done.err.splitlines()
    found = re.fullmatch(r"results: (runs/testbed-[0-9a-f]{8})", err[0])
    assert found, "the result folder comes first"
    assert err[-1] == f"next: kvcli report {found[1]}"
    assert re.search(r"2 cells, 4 \w+, 8 records.* MiB", done.err), "cells, samples, records and their size"
    assert re.search(r"about .*\d s", done.err), "an estimate of the time"
    assert "sweep: 8/8 (100 %)" in done.err
    assert "tb_recall" in done.out and "shotkv" in done.out and "0.1" in done.out and "full 1.00" in done.out
    assert not re.search(r"next:|results:|loading|sweep:|warning", done.out), "stdout has nothing but the table"
    assert "Traceback" not in done.err
    assert len(records(Path(found[1]))) == 8

    before = contents(Path(found[1]))
    again: Done = kvcli_process(*command)
    assert (again.code, again.out) == (0, done.out)
    assert "loading" not in again.err
    after = contents(Path(found[1]))
    assert {k: v for k, v in after.items() if k != "run.json"} == {k: v for k, v in before.items() if k != "run.json"}


def test_a_finished_sweep_loads_no_model(kvcli, folder, no_weights):
    before = comparable(folder)
    done = kvcli("sweep", *BASE, "--out", folder)
    assert done.code == 0
    assert "loading" not in done.err
    assert comparable(folder) == before
    assert json.loads((folder / "run.json").read_text())["status"] == "done"


def test_a_smaller_grid_is_done_already(kvcli, folder, no_weights):
    before = (folder / "samples.jsonl").read_bytes()
    for less in (("--limit", "3"), ("--task", "tb_safety"), ("--no-full",)):
        assert kvcli("sweep", *BASE, *less, "--out", folder).code == 0
    assert (folder / "samples.jsonl").read_bytes() == before


def test_json_is_one_document_on_stdout(kvcli, folder):
    done = kvcli("sweep", *BASE, "--json", "--out", folder)
    tables = {table["task"]: table for table in json.loads(done.out)}
    assert set(tables) == {"tb_recall", "tb_safety"}
    assert done.err.splitlines()[-1] == f"next: kvcli report {folder}"
    for name, table in tables.items():
        for cell in (table["full"], *table["cells"]):
            mine = [r["score"] for r in records(folder) if (r["task"], r["method"]) == (name, cell["method"])]
            assert cell["n"] == len(mine) == 6
            assert cell["score"] == pytest.approx(sum(mine) / 6)


def test_progress_and_notes_leave_stdout_alone(base, tmp_path):
    done = sweeping.call("sweep", *BASE, "--json", "--limit", "1", "--out", tmp_path / "run")
    json.loads(done.out)
    for part in ("results:", "cells", "loading testbed", "sweep: 4/4", "next:"):
        assert part in done.err


# --- the folder -------------------------------------------------------------------------------------------------------


def test_the_default_folder_is_the_models_not_the_grids(kvcli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def name(*args: str) -> str:
        done = kvcli("sweep", "--dry-run", "--task", "tb_recall", "--limit", "1", *args)
        assert done.code == 0
        return done.err.splitlines()[0]

    plain = name("--method", "shotkv")
    assert re.fullmatch(r"results: runs/testbed-[0-9a-f]{8}", plain)
    grid = ("--ratio", "0.3"), ("--method", "h2o"), ("--limit", "2"), ("--shots", "4"), ("--seed", "1"), ("--no-full",)
    for more in (*grid, ("--shot-seed", "1"), ("--shot-order", "1"), ("--query", "agnostic")):
        assert name(*more) == plain, more
    random = model_folder(tmp_path / "tiny")
    others = {name(*m) for m in (("--dtype", "float64"), ("--system", "a"), ("--max-new-tokens", "3"))}
    others.add(name("--model", f"random:{random}:{TINY}"))
    assert len(others) == 4 and plain not in others
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_needs_no_weights_and_writes_nothing(kvcli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bare = model_folder(tmp_path / "bare")
    common = ("sweep", "--model", bare, "--method", "h2o,snapkv", "--ratio", "0.1,0.2", "--limit", "5", "--dry-run")
    done = kvcli(*common, "--task", "tb_recall", "--out", "out")
    assert done.code == 0, done.err
    assert re.search(r"5 cells, 5 \w+, 25 records", done.out)
    assert "loading" not in done.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bare"]
    facts = json.loads(kvcli(*common, "--task", "testbed", "--json").out)
    assert (facts["cells"], facts["samples"], facts["records"]) == (40, 40, 200)
    assert facts["prefill_tokens"] * 5 == facts["separate_prefill_tokens"]
    assert Path(facts["out"]).parent == Path("runs")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bare"]


def test_a_dry_run_leaves_a_folder_as_it_is(kvcli, folder):
    before = contents(folder)
    assert kvcli("sweep", *BASE, "--method", "h2o", "--limit", "9", "--dry-run", "--out", folder).code == 0
    assert contents(folder) == before


# --- the grid ---------------------------------------------------------------------------------------------------------


def test_full_is_added_once(kvcli):
    def methods(*args: str) -> list[str]:
        done = kvcli("sweep", "--task", "tb_recall", "--limit", "1", "--ratio", "0.1,0.3", "--dry-run", "--json", *args)
        return sorted(cell["method"] for cell in cells_of(done))

    assert methods("--method", "shotkv") == ["full", "shotkv", "shotkv"]
    assert methods("--method", "shotkv,full", "--method", "full") == ["full", "shotkv", "shotkv"]
    assert methods("--method", "shotkv", "--no-full") == ["shotkv", "shotkv"]
    assert methods("--method", "full", "--no-full") == ["full"]


def test_without_options_the_testbeds_suite_and_all_methods_of_the_benchmark(kvcli):
    done = kvcli("sweep", "--limit", "1", "--dry-run", "--json")
    assert len(axis(done, "task")) == 8 and all(task.startswith("tb_") for task in axis(done, "task"))
    assert axis(done, "method") >= {"full", "snapkv", "h2o", "streaming_llm", "shotkv", "random"}
    assert axis(done, "ratio") == {"1", "0.1", "0.3", "0.5", "0.7", "0.9"}


def test_only_random_methods_are_repeated_for_each_seed(kvcli, tmp_path):
    out = tmp_path / "run"
    grid = ("--method", "random,snapkv", "--ratio", "0.3", "--task", "tb_recall", "--limit", "3", "--seed", "0,1")
    assert kvcli("sweep", *grid, "--out", out).code == 0
    cells = {(r["method"], r["seed"]) for r in records(out)}
    assert cells == {("full", None), ("snapkv", None), ("random", 0), ("random", 1)}
    drawn = [store.read_map(p) for p in sorted(maps_of(out, "random"))]
    texts = {str([[head.tolist() for head in layer] for layer in kept]) for kept in drawn}
    assert len(texts) == 6, "every seed and sample has a draw of its own"


def maps_of(out: Path, method: str) -> list[Path]:
    rows = [r for r in records(out) if r["method"] == method]
    return [store.map_path(out, r["task"], r["sample_id"], r["cell_id"]) for r in rows]


def test_a_budget_is_kv_pairs_per_head(kvcli, tmp_path):
    out = tmp_path / "run"
    grid = ("--method", "snapkv,streaming_llm", "--budget", "40,64", "--task", "tb_recall", "--limit", "2")
    assert kvcli("sweep", *grid, "--out", out).code == 0
    rows = [r for r in records(out) if r["method"] != "full"]
    assert {(r["budget"], r["ratio"], r["kept"]) for r in rows} == {(40, None, 40.0), (64, None, 64.0)}


@pytest.mark.parametrize("size", ["--budget 40", "--ratio 1,0.3", "--ratio 1,0.3 --decode-batch 1"])
def test_every_output_is_compared_with_full(kvcli, tmp_path, size: str):
    out = tmp_path / "run"
    grid = typed(f"--method chunkkv,snapkv --task tb_recall --limit 2 {size}")
    assert kvcli("sweep", *grid, "--out", out).code == 0
    full = {r["sample_id"]: r["output_ids"] for r in records(out) if r["method"] == "full"}
    for record in records(out):
        assert record["fidelity"]["identical"] is (record["output_ids"] == full[record["sample_id"]]), record["method"]


def test_every_output_of_a_usual_grid_is_compared_with_full(rich):
    full = {(r["task"], r["sample_id"]): r["output_ids"] for r in records(rich) if r["method"] == "full"}
    for record in records(rich):
        mine, theirs = record["output_ids"], full[record["task"], record["sample_id"]]
        fidelity = record["fidelity"]
        assert fidelity["identical"] is (mine == theirs)
        if mine != theirs:
            same = fidelity["first_divergence"]
            assert mine[:same] == theirs[:same] and mine[same : same + 1] != theirs[same : same + 1]


def test_the_canonical_method_is_recorded(kvcli, tmp_path):
    out = tmp_path / "run"
    grid = ("--method", "snapkv:window=16,kernel=7,h2o", "--ratio", "0.20", "--task", "tb-recall", "--limit", "1")
    assert kvcli("sweep", *grid, "--out", out).code == 0
    rows = {r["method"]: r for r in records(out)}
    assert set(rows) == {"full", "snapkv:window=16", "h2o"}
    assert rows["snapkv:window=16"]["settings"] == {"window": 16, "kernel": 7, "pool": "max", "reduce": "mean"}
    assert rows["h2o"]["ratio"] == 0.2 and rows["h2o"]["task"] == "tb_recall"


def test_run_is_one_cell_and_full(kvcli, tmp_path):
    out = tmp_path / "run"
    cell = ("run", "--task", "tb_recall", "--method", "snapkv", "--ratio", "0.2", "--limit", "2", "--out", out)
    done = kvcli(*cell)
    assert done.code == 0, done.err
    assert "snapkv" in done.out and done.err.splitlines()[-1] == f"next: kvcli report {out}"
    assert [r["method"] for r in records(out)] == ["full", "full", "snapkv", "snapkv"]
    alone = tmp_path / "alone"
    assert kvcli(*cell[:-1], alone, "--no-full").code == 0
    assert [r["method"] for r in records(alone)] == ["snapkv", "snapkv"]
    assert kvcli("sweep", *cell[1:-2], "--out", out, "--ratio", "0.4").code == 0
    assert len(records(out)) == 6, "a sweep into the folder of a run adds to it"


# --- growing ----------------------------------------------------------------------------------------------------------

GROWTH = {
    "methods": (("--method", "h2o"), 12),
    "ratios": (("--ratio", "0.1,0.3"), 12),
    "tasks": (("--task", "tb_knowledge"), 12),
    "shots": (("--shots", "12,4"), 24),
    "seeds": (("--method", "random", "--seed", "0,1"), 24),
    "first tokens": (("--first-token", "compressed,prefill"), 24),
    "limit": (("--limit", "9"), 12),
    "all at once": (("--method", "h2o", "--ratio", "0.1,0.3", "--task", "tb_knowledge", "--limit", "9"), 111),
}
"""More of an axis, and how many records it adds to the 24 of BASE."""


@pytest.mark.parametrize("more, added", GROWTH.values(), ids=GROWTH)
def test_a_grid_grows_in_its_folder(kvcli, folder, more: tuple[str, ...], added: int):
    before = (folder / "samples.jsonl").read_bytes()
    done = kvcli("sweep", *BASE, *more, "--out", folder)
    assert done.code == 0, done.err
    after = (folder / "samples.jsonl").read_bytes()
    assert after.startswith(before), "old records stay byte for byte"
    assert after.count(b"\n") == before.count(b"\n") + added
    keys = [(r["cell_id"], r["sample_id"]) for r in records(folder)]
    assert len(set(keys)) == len(keys)


@pytest.fixture(scope="module")
def grown_and_at_once(base, tmp_path_factory) -> tuple[Path, Path]:
    """The same grid, grown in the folder of BASE and swept at once."""
    top, more = tmp_path_factory.mktemp("grown"), ("--method", "snapkv", "--ratio", "0.1,0.3", "--limit", "9")
    shutil.copytree(base, top / "grown")
    for name in ("grown", "at_once"):
        assert sweeping.call("sweep", *BASE, *more, "--out", top / name).code == 0
    return top / "grown", top / "at_once"


ENGINE = ("batch_id", "alloc_bytes")
"""What depends on the batch a row was in."""


def test_a_grown_grid_has_the_records_of_one_sweep(grown_and_at_once):
    grown, at_once = (comparable(folder, *ENGINE, "fidelity") for folder in grown_and_at_once)
    assert grown == at_once


def test_a_grown_grid_is_compared_with_full_throughout(grown_and_at_once):
    """The same tokens diverge; how far predictions move depends on the batch by rounding only."""
    records = [sweeping.records(folder) for folder in grown_and_at_once]
    fidelity = [{(r["cell_id"], r["sample_id"]): r["fidelity"] for r in some} for some in records]
    assert fidelity[0].keys() == fidelity[1].keys()
    for key, grown in fidelity[0].items():
        assert grown == pytest.approx(fidelity[1][key], abs=1e-4)


# --- where settings come from -----------------------------------------------------------------------------------------


def test_the_command_line_beats_the_file_beats_the_preset_beats_the_environment(kvcli, tmp_path, monkeypatch):
    file = tmp_path / "mine.yaml"
    file.write_text("limit: 3\nmethods: [h2o, 'snapkv:window=8']\nratios: [0.4]\n")

    def facts(*args: object) -> tuple[int, set, set]:
        done = kvcli("sweep", "--task", "tb_recall", "--dry-run", "--json", *args)
        return json.loads(done.out)["samples"], axis(done, "method") - {"full"}, axis(done, "ratio") - {"1"}

    monkeypatch.setenv("KVCLI_LIMIT", "1")
    monkeypatch.setenv("KVCLI_METHODS", "streaming_llm,h2o")
    monkeypatch.setenv("KVCLI_RATIOS", "0.25")
    assert facts() == (1, {"streaming_llm", "h2o"}, {"0.25"})
    limit, methods, ratios = facts("--preset", "demo")
    assert limit > 3 and len(methods) == 9 and ratios == {"0.1", "0.3", "0.5", "0.7"}
    assert facts("--preset", "demo", "-c", file) == (3, {"h2o", "snapkv:window=8"}, {"0.4"})
    typed = ("--limit", "2", "--method", "shotkv", "--ratio", "0.1")
    assert facts("--preset", "demo", "-c", file, *typed) == (2, {"shotkv"}, {"0.1"})


def test_a_variable_with_a_methods_settings(kvcli, monkeypatch):
    monkeypatch.setenv("KVCLI_METHODS", "snapkv:window=8,kernel=5,h2o")
    done = kvcli("sweep", "--task", "tb_recall", "--limit", "1", "--dry-run", "--json")
    assert axis(done, "method") == {"full", "h2o", "snapkv:kernel=5,window=8"}


def test_a_budget_typed_beats_the_ratios_of_a_preset(kvcli):
    done = kvcli("sweep", "--preset", "demo", "--budget", "40", "--task", "tb_recall", "--dry-run", "--json")
    assert axis(done, "budget") == {None, 40} and axis(done, "ratio") == {None, "1"}


def test_run_reads_the_method_from_a_file(kvcli, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("methods: [h2o]\nratios: [0.2]\nlimit: 1\n")
    assert axis(kvcli("run", "-c", file, "--task", "tb_recall", "--dry-run", "--json"), "method") == {"full", "h2o"}


def test_the_folder_tells_what_was_asked_for(folder):
    run = json.loads((folder / "run.json").read_text())
    assert run["config"]["methods"] == ["shotkv"] and run["config"]["limit"] == 6
    assert run["passed"]["ratios"] == ["0.1"] and "dtype" not in run["passed"]
    assert len(run["cells"]) == 4 and run["status"] == "done"
    assert run["provenance"]


# --- records ----------------------------------------------------------------------------------------------------------

RICH = typed("--method snapkv,shotkv,streaming_llm,random --ratio 0.1,0.3 --task tb_recall,tb_safety --limit 6")


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rich") / "run"
    done = sweeping.call("sweep", *RICH, "--out", out)
    assert done.code == 0, done.err
    return out


def test_every_record_is_whole(rich):
    rows, stored = records(rich), prompts(rich)
    assert len(rows) == 2 * 9 * 6 and len(stored) == 12
    for record in rows:
        check_record(record)
        assert record["status"] == "ok" and record["error"] is None
        assert 0 <= record["score"] <= 1
        assert stored[record["prompt_sha"]]["n"] == record["n_prompt"]
        assert record["kept_by_region"].keys() == {label for label, _, _ in stored[record["prompt_sha"]]["regions"]}
        assert all(0 <= share <= 1 for share in record["kept_by_region"].values())
        assert len(record["output_ids"]) == record["n_new"] > 0
        assert record["seconds"]["shared"] is True
        if record["method"] == "full":
            assert (record["measured_ratio"], record["kept"]) == (1.0, record["n_prompt"])
            assert record["fidelity"]["identical"] is True


def test_the_samples_are_the_same_for_every_cell(rich):
    by_cell: dict[tuple[str, str], set[tuple[str, str]]] = {}
    for r in records(rich):
        by_cell.setdefault((r["task"], r["cell_id"]), set()).add((r["sample_id"], r["prompt_sha"]))
    for task in ("tb_recall", "tb_safety"):
        assert len({frozenset(samples) for (name, _), samples in by_cell.items() if name == task}) == 1


def test_kept_maps_are_what_the_records_say(rich):
    """Positions of the first five samples: kept pairs, measured ratio and region shares computed anew from them."""
    stored, seen = prompts(rich), 0
    for record in records(rich):
        path = store.map_path(rich, record["task"], record["sample_id"], record["cell_id"])
        if not path.exists():
            continue
        seen += 1
        n, regions = record["n_prompt"], stored[record["prompt_sha"]]["regions"]
        share = np.zeros(n)
        layers = store.read_map(path)
        for layer in layers:
            for head in layer:
                assert head[-1] == n - 1 and (np.diff(head) > 0).all() and head[0] >= 0
                share[head] += 1 / len(layer) / len(layers)
        assert record["kept"] == pytest.approx(share.sum(), abs=1e-3)
        assert record["measured_ratio"] == pytest.approx(share.sum() / n, abs=1e-5)
        for label, measured in record["kept_by_region"].items():
            tokens = np.concatenate([share[start:end] for name, start, end in regions if name == label])
            assert measured == pytest.approx(tokens.mean(), abs=1e-4), label
    assert seen == 2 * 9 * 5, "five samples per task, every cell"


def test_no_more_is_kept_than_asked_for(rich):
    for record in records(rich):
        if record["ratio"] is not None and "over_budget" not in record["flags"]:
            assert record["kept"] <= int(record["ratio"] * record["n_prompt"] + 0.5), "rounded half up"
            assert record["alloc_bytes"] > 0


# --- methods of users -------------------------------------------------------------------------------------------------


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine.py"
    file.write_text(sweeping.PLUGIN)
    return file


def sweep_mine(kvcli: Callable[..., Done], method: str) -> Done:
    grid = ("--ratio", "0.3", "--task", "tb_recall", "--limit", "4", "--out", "out")
    return kvcli("sweep", "--method", method, *grid)


def test_a_method_from_a_file(kvcli, plugin):
    done = sweep_mine(kvcli, "./mine.py:Recent:skip=0,./mine.py:Recent:skip=30")
    assert done.code == 0, done.err
    rows = {r["method"]: r for r in records(Path("out"))}
    assert set(rows) == {"full", "./mine.py:Recent", "./mine.py:Recent:skip=30"}
    assert rows["./mine.py:Recent"]["kept"] == rows["./mine.py:Recent:skip=30"]["kept"] + 30
    cells = json.loads(Path("out/run.json").read_text())["cells"]
    assert cells[rows["./mine.py:Recent"]["cell_id"]]["method_code"]


def test_an_edited_method_is_measured_again(kvcli, kvcli_process, plugin):
    assert sweep_mine(kvcli, "./mine.py:Recent").code == 0
    plugin.write_text(sweeping.PLUGIN.replace("self.skip", "7"))
    done = sweep_mine(kvcli_process, "./mine.py:Recent")
    assert done.code == 0
    kept: dict[str, list[float]] = {}
    for record in records(Path("out")):
        if record["method"] == "./mine.py:Recent":
            kept.setdefault(record["cell_id"], []).append(record["kept"])
    before, after = kept.values()
    assert [k - 7 for k in before] == after, "another cell, with the edited code"


def test_failed_samples_end_with_3_and_are_tried_again(kvcli, plugin):
    assert kvcli("sweep", "--method", "full", "--task", "tb_recall", "--limit", "4", "--out", "out").code == 0
    first, second = [r["sample_id"] for r in records(Path("out"))][:2]
    plugin.with_name("broken").write_text(f"{first} {second}")
    done = sweep_mine(kvcli, "./mine.py:Recent")
    assert done.code == 3
    assert "2 samples failed" in done.err and done.err.splitlines()[-1].startswith("next: kvcli report")
    assert "Traceback" not in done.err
    mine = [r for r in records(Path("out")) if r["method"] != "full"]
    for record in mine:
        check_record(record)
    failed = [r for r in mine if r["status"] == "error"]
    assert {(r["sample_id"], r["error"], r["score"]) for r in failed} == {
        (s, f"ValueError: cannot do sample {s}", None) for s in (first, second)
    }
    assert len([r for r in mine if r["status"] == "ok"]) == 2

    plugin.with_name("broken").write_text(second)
    done = sweep_mine(kvcli, "./mine.py:Recent")
    assert done.code == 3 and "1 sample failed" in done.err
    plugin.with_name("broken").unlink()
    done = sweep_mine(kvcli, "./mine.py:Recent")
    assert done.code == 0 and "failed" not in done.err
    last = {r["sample_id"]: r for r in store.read_records(Path("out")) if r["method"] != "full"}
    assert [r["status"] for r in last.values()] == ["ok"] * 4
    assert len([r for r in records(Path("out")) if r["status"] == "ok"]) == 8, "what was fine is not measured again"


def test_a_method_that_breaks_its_contract_fails_by_sample(kvcli, plugin):
    done = sweep_mine(kvcli, "./mine.py:Greedy")
    assert done.code == 3
    failed = [r for r in records(Path("out")) if r["status"] == "error"]
    assert len(failed) == 4
    assert all("the budget is" in r["error"] for r in failed)
    assert len([r for r in records(Path("out")) if r["method"] == "full" and r["status"] == "ok"]) == 4
