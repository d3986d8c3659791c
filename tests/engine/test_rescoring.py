"""Stored outputs are scored again: what changes, what is left alone, and that nothing is ever lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvcli.engine.rescoring import Tally, open_folder, rescore
from kvcli.errors import KvcliError
from kvcli.evals.coherence import why_incoherent
from kvcli.results import store
from kvcli.results.store import RunStore, read_records, read_run
from tests.cli import sweeping

SCORER = "from kvcli.evals.spec import Score\n\ndef judge(output, golds):\n    return Score({value}, {found})\n"
OWN = """
task: own
version: 1
doc_to_text: "Q: {{question}} A:"
doc_to_target: answer
scorer: own.py:judge
generation_kwargs: {max_gen_toks: 3}
reference: {llama3-8b: {0: 0.5, 4: 0.75}}
"""
PICK = """
task: pick
builder: pick.py:Pick
output_type: multiple_choice
metric_list: [{metric: acc}]
"""
PICK_CODE = """
from dataclasses import dataclass
from kvcli.evals.data import DataSet, first_of, read_split
from kvcli.evals.spec import Sample, Score, Segment, Task

@dataclass(frozen=True, kw_only=True)
class Pick(Task):
    def samples(self, *, limit, data_dir, **_):
        rows = read_split(DataSet("own", None), "test", data_dir)
        return [Sample(str(i), (Segment(rows[i].values["question"], "question"),), rows[i].values["right"],
                       options=(" one", " two")) for i in first_of("pick", len(rows), limit)]

    def score(self, sample, output):
        raise AssertionError("an answer that was chosen is not scored as text")
"""
ROWS = [{"question": f"what is number {i} of them", "answer": f"a{i}", "right": 0} for i in range(5)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of two tasks of the user's: one generates, one chooses among options."""
    place = tmp_path_factory.mktemp("made")
    (place / "own.yaml").write_text(OWN)
    (place / "own.py").write_text(SCORER.format(value=0.0, found="output[:3] or None"))
    (place / "pick.yaml").write_text(PICK)
    (place / "pick.py").write_text(PICK_CODE)
    (place / "data" / "own").mkdir(parents=True)
    write_rows(place, ROWS)
    done = sweeping.call(
        "sweep", "--model", "testbed", "--task", f"{place / 'own.yaml'},{place / 'pick.yaml'}", "--data-dir",
        place / "data", "--method", "snapkv", "--ratio", "0.5", "--limit", "4", "--template", "raw",
        "--out", place / "run",
    )  # fmt: skip
    assert done.code == 0, done.err
    return place


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may change; its run.json names the copied task files."""
    copy = Path(shutil.copytree(made, tmp_path / "copy"))
    run = copy / "run" / "run.json"
    run.write_text(run.read_text().replace(str(made), str(copy)))
    return copy


def write_rows(place: Path, rows: list[dict[str, Any]]) -> None:
    (place / "data" / "own" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def again(place: Path, **options: Any) -> dict[tuple[str, str], Tally]:
    tallies = rescore(open_folder(place / "run", data_dir=None, tasks=options.pop("tasks", ())), **options)
    return {(tally.task, tally.method): tally for tally in tallies}


def scores(place: Path, task: str) -> dict[tuple[str, str], float]:
    return {(r["cell_id"], r["sample_id"]): r["score"] for r in read_records(place / "run") if r["task"] == task}


def raw(place: Path) -> bytes:
    return (place / "run" / "samples.jsonl").read_bytes()


# --- what changes -----------------------------------------------------------------------------------------------------


def test_the_same_scorer_changes_nothing(place: Path) -> None:
    before = raw(place)
    done = again(place)
    assert set(done) == {("own", "full"), ("own", "snapkv"), ("pick", "full"), ("pick", "snapkv")}
    assert all((t.records, t.changed, t.left_out.total()) == (4, 0, 0) for t in done.values())
    assert raw(place) == before


def test_a_corrected_scorer_changes_its_task_alone_and_keeps_the_old_lines(place: Path) -> None:
    before, pick = raw(place), scores(place, "pick")
    (place / "own.py").write_text(SCORER.format(value=0.75, found="None"))
    done = again(place)
    assert {key: t.changed for key, t in done.items()} == {
        ("own", "full"): 4, ("own", "snapkv"): 4, ("pick", "full"): 0, ("pick", "snapkv"): 0,
    }  # fmt: skip
    assert (done["own", "full"].before, done["own", "full"].after) == (0, 3)
    assert set(scores(place, "own").values()) == {0.75} and scores(place, "pick") == pick
    assert raw(place).startswith(before) and len(raw(place).splitlines()) == len(before.splitlines()) + 8
    assert all(r["extracted"] is None and r["output_ids"] for r in read_records(place / "run") if r["task"] == "own")
    assert read_run(place / "run")["rescored"][-1]["changed"] == {"own": 8, "pick": 0}
    assert read_run(place / "run")["tasks"]["own"]["reference"] == {"llama3-8b": {"0": 0.5, "4": 0.75}}
    assert all(t.changed == 0 for t in again(place).values()), "a second time there is nothing left to change"


def test_all_else_of_a_record_stays(place: Path) -> None:
    old = {(r["cell_id"], r["sample_id"]): r for r in read_records(place / "run")}
    (place / "own.py").write_text(SCORER.format(value=0.5, found="'x'"))
    again(place)
    for record in read_records(place / "run"):
        was = old[record["cell_id"], record["sample_id"]]
        assert {k for k in record if record[k] != was[k]} <= {"score", "extracted", "extra"}


def test_the_report_reads_the_new_scores(place: Path) -> None:
    from kvcli.analysis.reading.load import load_run

    (place / "own.py").write_text(SCORER.format(value=0.75, found="None"))
    again(place)
    run = load_run(place / "run")
    assert sorted(run.score[[run.cells[c].task == "own" for c in run.cell]].tolist()) == [0.75] * 8


def test_a_corrected_right_answer_is_scored_anew(place: Path) -> None:
    write_rows(place, [{**row, "answer": "corrected", "right": 1} for row in ROWS])
    old = scores(place, "pick")
    done = again(place)
    assert all(t.changed == 4 for t in done.values())
    assert {r["target"] for r in read_records(place / "run")} == {"corrected", "two"}
    assert scores(place, "pick") == {key: 1 - value for key, value in old.items()}, "the log-likelihoods decide"


def test_a_dry_run_writes_nothing(place: Path) -> None:
    before = {p.name: p.read_bytes() for p in (place / "run").glob("*.json*")}
    (place / "own.py").write_text(SCORER.format(value=0.75, found="None"))
    assert again(place, dry_run=True)["own", "full"].changed == 4
    assert {p.name: p.read_bytes() for p in (place / "run").glob("*.json*")} == before


def test_one_task_alone(place: Path) -> None:
    (place / "own.py").write_text(SCORER.format(value=0.75, found="None"))
    assert set(again(place, tasks=["pick"])) == {("pick", "full"), ("pick", "snapkv")}
    assert set(scores(place, "own").values()) == {0}
    with pytest.raises(KvcliError, match="no records of task 'gsm8k'"):
        again(place, tasks=["gsm8k"])


def test_scorers_know_which_prompts_opened_the_thoughts(place: Path) -> None:
    """What only the rendered prompt knew stands with it, and reaches the scorer again."""
    path = place / "run" / "prompts.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    opened = {entries[0]["sha"]}
    marked = [{**entry, "thinking": True} if entry["sha"] in opened else entry for entry in entries]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in marked))
    folder = open_folder(place / "run", data_dir=None)
    thinking = {r["prompt_sha"]: folder.questions[r["cell_id"], r["sample_id"]].sample.meta.get("thinking", False)
                for r in folder.records}  # fmt: skip
    assert len(thinking) == 8 and {sha for sha, on in thinking.items() if on} == opened


# --- what is left alone -----------------------------------------------------------------------------------------------


def test_another_question_is_not_scored(place: Path) -> None:
    (place / "own.py").write_text(SCORER.format(value=0.75, found="None"))
    write_rows(place, [{**row, "question": f"another one, {i}"} for i, row in enumerate(ROWS)])
    done = again(place)
    assert all(t.records == 0 and t.left_out == {"its prompt is another one by now": 4} for t in done.values())
    assert set(scores(place, "own").values()) == {0}


def test_rows_in_another_order_are_noticed(place: Path) -> None:
    write_rows(place, ROWS[::-1])
    done = again(place, tasks=["own"])
    assert sum(t.left_out["its prompt is another one by now"] for t in done.values()) >= 4


def test_a_sample_that_is_gone_is_left_as_it_is(place: Path) -> None:
    write_rows(place, ROWS[:1])
    done = again(place, tasks=["own"])
    assert sum(t.left_out["its sample is no longer in the data"] for t in done.values()) >= 6


def test_a_scorer_that_fails_leaves_its_records_as_they_are(place: Path) -> None:
    (place / "own.py").write_text("def judge(output, golds):\n    raise RuntimeError(output)\n")
    done = again(place, tasks=["own"])
    assert done["own", "full"].left_out == {"its scorer failed with RuntimeError": 4}
    assert set(scores(place, "own").values()) == {0}


def test_a_prompt_without_text_is_known_by_its_hash(place: Path) -> None:
    """As with harmful tasks, whose text is not stored."""
    path = place / "run" / "prompts.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    asked = open_folder(place / "run", data_dir=None, tasks=["own"]).questions
    by_id = {sample_id: question.sample for (_, sample_id), question in asked.items()}
    hidden = [{**e, "text": None, "offsets": None} for e in entries]
    for entry in hidden:
        entry["segments"] = by_id[entry["sample_id"]].fingerprint if entry["task"] == "own" else None
    path.write_text("".join(json.dumps(e) + "\n" for e in hidden))
    assert again(place, tasks=["own"])["own", "full"].records == 4
    write_rows(place, [{**row, "question": "another"} for row in ROWS])
    assert again(place, tasks=["own"])["own", "full"].left_out == {"its prompt is another one by now": 4}
    assert again(place, tasks=["pick"])["pick", "full"].records == 4, "no hash: the right answer is the same"
    write_rows(place, [{**row, "right": 1} for row in ROWS])
    (why,) = again(place, tasks=["pick"])["pick", "full"].left_out
    assert "its right answer is another one by now, and its prompt was not stored" in why


# --- nothing is lost --------------------------------------------------------------------------------------------------


def test_stopped_in_the_middle_the_same_command_goes_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "own.py").write_text(SCORER.format(value=0.75, found="None"))
    real, count = RunStore.append, 0

    def append(self: RunStore, record: dict[str, Any]) -> None:
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        real(self, record)

    monkeypatch.setattr(RunStore, "append", append)
    with pytest.raises(KeyboardInterrupt):
        again(place)
    monkeypatch.undo()
    assert sorted(scores(place, "own").values()) == [0] * 5 + [0.75] * 3
    (place / "run" / "samples.jsonl").write_bytes(raw(place)[:-40])  # and killed while it wrote the third line
    assert sorted(scores(place, "own").values()) == [0] * 6 + [0.75] * 2
    assert sum(t.changed for t in again(place).values()) == 6
    assert set(scores(place, "own").values()) == {0.75}


def test_compacting_afterwards_keeps_the_new_scores(place: Path) -> None:
    from kvcli.cli.check import check, compact

    (place / "own.py").write_text(SCORER.format(value=0.75, found="None"))
    again(place)
    found = check(place / "run")
    assert (found.replaced, found.problems) == (8, [])
    compact(place / "run")
    assert check(place / "run").replaced == 0
    assert set(scores(place, "own").values()) == {0.75}


def test_records_of_several_processes_are_scored_too(place: Path) -> None:
    shards = place / "run" / "shards"
    shards.mkdir()
    lines = raw(place).splitlines(keepends=True)
    (place / "run" / "samples.jsonl").unlink()
    (shards / "0-of-2.jsonl").write_bytes(b"".join(lines[::2]))
    (shards / "1-of-2.jsonl").write_bytes(b"".join(lines[1::2]))
    (place / "own.py").write_text(SCORER.format(value=0.75, found="None"))
    again(place)
    assert set(scores(place, "own").values()) == {0.75}


@pytest.mark.parametrize("name", ["samples.jsonl", "shards/0-of-2.jsonl"])
def test_a_folder_that_is_being_written_is_left_alone(place: Path, name: str) -> None:
    path = place / "run" / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    with store.lock_records(path), pytest.raises(KvcliError, match="is being written by"):
        again(place)


def test_a_task_that_is_gone_is_one_clear_message(place: Path) -> None:
    (place / "own.yaml").unlink()
    with pytest.raises(KvcliError, match="the task own cannot be found: no file") as caught:
        again(place)
    assert caught.value.given == "--task own"
    assert again(place, tasks=["pick"])["pick", "full"].records == 4


def test_records_of_earlier_versions_are_scored(place: Path) -> None:
    """They lack fields that came later."""
    lines = [json.loads(line) for line in raw(place).splitlines()]
    later = ("shot_seed", "shot_order", "truncated", "context", "weights", "match")
    old = [{k: v for k, v in line.items() if k not in later} for line in lines]
    (place / "run" / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    (place / "own.py").write_text(SCORER.format(value=0.75, found="None"))
    assert again(place)["own", "full"].changed == 4


def test_samples_are_those_of_each_record_s_shots(tmp_path: Path, kvcli: Callable[..., Any]) -> None:
    """Tasks of the testbed: other shots, other seeds and orders give other questions under other ids."""
    done = kvcli(
        "sweep", "--model", "testbed", "--task", "tb_recall", "--shots", "2,4", "--shot-seed", "0,1",
        "--shot-order", "0,3", "--method", "snapkv", "--ratio", "0.5", "--limit", "2", "--out", tmp_path / "run",
    )  # fmt: skip
    assert done.code == 0, done.err
    tallies = rescore(open_folder(tmp_path / "run", data_dir=None))
    assert [(t.records, t.changed, t.left_out.total()) for t in tallies] == [(16, 0, 0)] * 2


# --- whether an output is text ----------------------------------------------------------------------------------------


def test_every_generated_record_says_whether_its_output_is_text_and_options_do_not(place: Path) -> None:
    for record in read_records(place / "run"):
        said = record["incoherent"]
        assert said is None if record["options"] else said == (why_incoherent(record["output"]) is not None)


def test_records_of_before_are_told_apart_once_and_nothing_else_of_them_changes(place: Path) -> None:
    path = place / "run" / "samples.jsonl"
    old = [json.loads(line) for line in path.read_text().splitlines()]
    new = {(r["cell_id"], r["sample_id"]): r["incoherent"] for r in old}
    path.write_text("".join(json.dumps({k: v for k, v in r.items() if k != "incoherent"}) + "\n" for r in old))
    before = raw(place)
    looked = again(place, dry_run=True)
    assert {key: (t.changed, t.told) for key, t in looked.items()} == {
        ("own", "full"): (0, 4), ("own", "snapkv"): (0, 4), ("pick", "full"): (0, 0), ("pick", "snapkv"): (0, 0),
    }  # fmt: skip
    assert raw(place) == before
    again(place)
    found = read_records(place / "run")
    assert {(r["cell_id"], r["sample_id"]): r.get("incoherent") for r in found} == new
    assert [{**r, "incoherent": None} for r in found] == [{**r, "incoherent": None} for r in old]
    assert all(t.told == 0 for t in again(place).values())
