"""kvcli list: methods, tasks, models and result folders, as tables and as JSON."""

from __future__ import annotations

import json

import pytest

from kvcli.results.store import RunStore


def test_without_a_kind_it_counts(kvcli, tmp_path):
    done = kvcli("list", "--folder", tmp_path)
    assert done.code == 0
    for kind in ("methods", "tasks", "models", "runs"):
        assert f"kvcli list {kind}" in done.out
    counts = json.loads(kvcli("list", "--json", "--folder", tmp_path).out)
    assert counts["runs"] == 0
    assert counts["methods"] >= 9


def test_methods(kvcli):
    done = kvcli("list", "methods")
    assert done.code == 0
    for name in ("full", "snapkv", "shotkv", "streaming_llm"):
        assert any(line.split()[:1] == [name] for line in done.out.splitlines())
    assert "next: kvcli sweep" in done.err
    cards = json.loads(kvcli("list", "methods", "--json").out)
    snapkv = next(card for card in cards if card["name"] == "snapkv")
    assert {s["name"]: s["default"] for s in snapkv["settings"]}["window"] == 32


def test_tasks(kvcli):
    from kvcli.evals.loader import task_names

    found = json.loads(kvcli("list", "tasks", "--json").out)
    assert [task["name"] for task in found] == task_names()
    assert all(task["ability"] and task["metric"] for task in found)
    assert kvcli("list", "tasks").code == 0


def test_models(kvcli):
    models = {m["name"]: m["hub_id"] for m in json.loads(kvcli("list", "models", "--json").out)}
    assert models["llama3-8b"] == "meta-llama/Meta-Llama-3-8B-Instruct"
    assert "testbed" in models
    assert "meta-llama/Meta-Llama-3-8B-Instruct" in kvcli("list", "models").out


def test_runs(kvcli, tmp_path, record):
    for name, status in (("one", "done"), ("two", "running")):
        with RunStore(tmp_path / name) as store:
            store.append(record())
            with store.edit_run() as run:
                run.update(status=status, config={"model": "testbed"})
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "run.json").write_text("{")
    (tmp_path / "not-a-run").mkdir()
    found = json.loads(kvcli("list", "runs", "--folder", tmp_path, "--json").out)
    runs = {run["folder"].rpartition("/")[2]: run for run in found}
    assert runs.keys() == {"one", "two", "bad"}
    assert (runs["one"]["status"], runs["one"]["lines"], runs["one"]["model"]) == ("done", 1, "testbed")
    assert runs["two"]["status"] == "interrupted", "running, but nobody writes"
    assert "not a JSON" in runs["bad"]["problem"]
    shown = kvcli("list", "runs", "--folder", tmp_path)
    assert shown.code == 0
    assert "not a JSON" in shown.err
    assert f"next: kvcli report {tmp_path}" in shown.err


def test_no_runs_yet(kvcli, tmp_path):
    done = kvcli("list", "runs", "--folder", tmp_path / "none")
    assert (done.code, done.out) == (0, "")
    assert "next: kvcli sweep" in done.err


@pytest.mark.parametrize("kind", ["method", "cows", ""])
def test_an_unknown_kind(kvcli, kind):
    done = kvcli("list", kind)
    assert done.code == 2
    assert "kvcli list methods" in done.err
