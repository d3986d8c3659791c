"""kvcli list: methods, tasks, models, presets and result folders, as tables and as JSON."""

from __future__ import annotations

import json
import shlex

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


@pytest.mark.parametrize(("width", "columns"), [(60, 3), (70, 4), (80, 5), (120, 6), (200, 6)])
def test_the_table_of_methods_gives_up_columns_before_words(kvcli, monkeypatch, width, columns):
    monkeypatch.setenv("COLUMNS", str(width))
    lines = kvcli("list", "methods").out.splitlines()
    assert max(map(len, lines)) <= width
    cards = json.loads(kvcli("list", "methods", "--json").out)
    words = {word for line in lines for word in line.split()}
    for card in cards:
        assert card["name"] in words
        assert columns < 5 or not card["paper"] or card["paper"] in words
        assert {f"{s['name']}={s['default']}" for s in card["settings"] if type(s["default"]) is int} <= words
    shown = [name for name in ("method", "tier", "kind", "paper", "settings", "always") if name in words]
    assert len(shown) == columns


def test_what_a_narrow_table_of_methods_leaves_out_is_said(kvcli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert "not shown on a screen this narrow: always keeps\n" in kvcli("list", "methods").err
    monkeypatch.setenv("COLUMNS", "120")
    assert "not shown" not in kvcli("list", "methods").err


def test_one_method_with_its_definition_facts_and_settings(kvcli):
    done = kvcli("list", "methods", "snapkv")
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    assert lines[0] == "SnapKV (snapkv)"
    assert "paper arXiv:2404.14469" in lines and "the budget binds each KV head" in lines
    assert any(line.startswith("window 32 at least 1 32;") for line in lines)
    assert any(line.startswith("pool max max or avg") for line in lines)
    assert "next: kvcli sweep --model testbed --method snapkv --ratio 0.3 --dry-run" in done.err
    card = json.loads(kvcli("list", "methods", "Streaming-LLM".lower(), "--json").out)
    assert card["name"] == "streaming_llm" and "arXiv:2309.17453" in card["about"] and "needs" in card


def test_every_method_can_be_shown_and_its_next_command_is_one(kvcli):
    from kvcli.methods import catalog

    for name in catalog.own_names():
        done = kvcli("list", "methods", name)
        assert done.code == 0 and str(catalog.find(name).title or name) in done.out
        for said in done.err.split("--method ")[1:]:
            assert catalog.expand([shlex.split(said)[0]]), "what is said can be typed"
    assert " - " in kvcli("list", "methods", "kivi").out.partition("the budget binds")[2].splitlines()[0]


def test_methods_of_one_tier(kvcli):
    assert {c["tier"] for c in json.loads(kvcli("list", "methods", "tier2", "--json").out)} == {2}


def test_tasks(kvcli):
    from kvcli.evals.loader import task_names

    found = json.loads(kvcli("list", "tasks", "--json").out)
    assert [task["name"] for task in found] == task_names()
    assert all(task["ability"] and task["metric"] for task in found)
    assert kvcli("list", "tasks").code == 0


def test_all_facts_of_tasks_are_in_the_json(kvcli):
    found = {task["name"]: task for task in json.loads(kvcli("list", "tasks", "--json").out)}
    gsm8k, recall = found["gsm8k"], found["tb_recall"]
    assert gsm8k["dataset"] == {"path": "openai/gsm8k", "name": "main", "revision": None}
    assert (gsm8k["type"], gsm8k["chance"], gsm8k["harmful"], gsm8k["package"]) == ("generate_until", 0.0, False, None)
    assert gsm8k["reference"]["llama3.1-8b-instruct"]["8"] == 0.7945
    assert recall["suites"] == ["testbed"] and recall["dataset"]["path"] is None
    assert {"name": "prompt_tokens", "kind": "a whole number", "value": 448} in recall["settings"]
    assert found["mmlu"]["cluster"] == "{{ subject }}" or "subject" in found["mmlu"]["cluster"]


@pytest.mark.parametrize("width", [80, 100, 200])
def test_the_table_of_tasks_fits_the_screen_and_cuts_no_name(kvcli, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    found = json.loads(kvcli("list", "tasks", "--json").out)
    done = kvcli("list", "tasks")
    assert done.code == 0 and max(map(len, done.out.splitlines())) <= width
    lines = [line.split() for line in done.out.splitlines() if line.strip()]
    for task in found:
        line = next(line for line in lines if line[0] == task["name"])
        assert line[-1] == task["metric"] and line[-2] in ("gen", "mc") and line[-3] == str(task["shots"])
    for task in found:
        assert not task["suites"] or f"{task['suites'][-1]}:" in done.out, "a group for its suites"


def test_on_a_very_narrow_screen_names_go_on_in_the_next_line(kvcli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "72")
    done = kvcli("list", "tasks", "longbench_passage*")
    assert max(map(len, done.out.splitlines())) <= 72
    assert "longbench_passage_retrieval_zh" in "".join(line[:27].strip() for line in done.out.splitlines())


def test_one_task(kvcli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    done = kvcli("list", "tasks", "tb-recall:prompt_tokens=300")
    assert done.code == 0 and done.out.startswith("tb_recall:prompt_tokens=300\n")
    rows = {line.split("  ")[0].strip(): line for line in done.out.splitlines()}
    assert rows["prompt_tokens"].split()[-1] == "300" and rows["shots"].split()[-1] == "12"
    assert "associative recall" in rows["ability"] and "key-value notes" in done.out
    assert "--task tb_recall:operators=" in done.err
    (row,) = json.loads(kvcli("list", "tasks", "gsm8k", "--json").out)
    assert "Exemplars:" in row["about"] and row["version"]


def test_a_user_s_own_task(kvcli, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("# My questions.\ntask: mine\ndoc_to_text: q\ndoc_to_target: a\nchance: 0.5\n")
    done = kvcli("list", "tasks", path)
    assert done.code == 0 and "My questions." in done.out and str(path) in done.out.replace("\n", "")


def test_the_tasks_of_a_suite(kvcli):
    assert [t["name"] for t in json.loads(kvcli("list", "tasks", "tb_c*", "--json").out)] == ["tb_choice", "tb_code"]
    assert "tb_choice" in kvcli("list", "tasks", "testbed").out


def test_presets(kvcli):
    found = {preset["name"]: preset for preset in json.loads(kvcli("list", "presets", "--json").out)}
    assert {"demo", "kvfundabench_table7"} <= set(found)
    assert found["kvfundabench_table7"]["settings"]["model"] == "llama3.1-8b-instruct"
    assert "kvfundabench_table7" in kvcli("list", "presets").out


def test_one_preset_with_the_numbers_it_repeats(kvcli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    done = kvcli("list", "presets", "kvfundabench-table7")
    assert done.code == 0 and "mmlu:shots=5" in done.out
    assert (
        "0.5314" in done.out and "full cache 0.8895" in " ".join(done.out.split()) and "\n(k) Called attack" in done.out
    )
    row = json.loads(kvcli("list", "presets", "kvfundabench_table7", "--json").out)
    assert len(row["published"]) == 275 and row["tables"] == ["7"] and set(row["remarks"]) == set("dpjk")
    assert json.loads(kvcli("list", "presets", "demo", "--json").out)["published"] == []
    assert kvcli("list", "presets", "demo").code == 0


@pytest.mark.parametrize(
    "args, what",
    [
        (("tasks", "gsm"), "unknown task 'gsm'"),
        (("presets", "dem"), "unknown preset 'dem'"),
        (("methods", "snpkv"), "kvcli list methods snpkv\n  try:   snapkv"),
        (("models", "testbed"), "kvcli list models takes no name"),
    ],
)
def test_an_unknown_name(kvcli, args, what):
    done = kvcli("list", *args)
    assert done.code == 2 and what in done.err


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
