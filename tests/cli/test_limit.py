"""`--limit N` is the first N of a task's order, whatever else the folder holds; prompts left out as too long count."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvcli.evals.data import first_of
from tests.cli.sweeping import records

TASK = """
task: lengths
version: 1
doc_to_text: "{{question}}"
doc_to_target: answer
generation_kwargs: {max_gen_toks: 2}
metric_list: [{metric: exact_match}]
"""
ROWS = 20
LONG = {i for i in range(ROWS) if i % 3 == 0}


@pytest.fixture
def sweep(tmp_path: Path, kvcli: Callable[..., Any]) -> Callable[..., Any]:
    """sweep(folder, method, limit): a third of the rows is longer than --max-prompt-tokens."""
    (tmp_path / "lengths.yaml").write_text(TASK)
    (tmp_path / "data" / "lengths").mkdir(parents=True)
    rows = [{"question": "note " * (60 if i in LONG else 20 + i), "answer": f"{i}"} for i in range(ROWS)]
    (tmp_path / "data" / "lengths" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def call(folder: str, method: str, limit: int | None) -> Any:
        done = kvcli(
            "sweep", "--model", "testbed", "--task", tmp_path / "lengths.yaml", "--data-dir", tmp_path / "data",
            "--method", method, "--ratio", "0.5", "--template", "raw", "--max-prompt-tokens", 50, "--prefill-batch", 3,
            *([] if limit is None else ["--limit", limit]), "--out", tmp_path / folder,
        )  # fmt: skip
        assert done.code == 0, done.err
        return done

    return call


def asked(limit: int) -> set[int]:
    """Rows of the task that are among the first and short enough."""
    return set(first_of("lengths", ROWS, limit)) - LONG


def samples(folder: Path, method: str) -> set[str]:
    return {r["sample_id"] for r in records(folder) if r["method"] == method}


def test_a_smaller_limit_in_a_larger_folder_takes_the_same_samples_as_alone(
    sweep: Callable[..., Any], tmp_path: Path
) -> None:
    sweep("grown", "snapkv", 14)
    done = sweep("grown", "h2o", 6)
    sweep("alone", "h2o", 6)
    there, here = samples(tmp_path / "grown", "h2o"), samples(tmp_path / "alone", "h2o")
    assert there == here and len(here) == len(asked(6)) < 6
    assert len(samples(tmp_path / "grown", "snapkv")) == len(asked(14))
    gone = 6 - len(asked(6))
    assert f"lengths: {gone} of 6 prompts left out, longer than --max-prompt-tokens" in done.err


def test_a_folder_that_grew_holds_what_one_command_gives_and_batches_stay(
    sweep: Callable[..., Any], tmp_path: Path
) -> None:
    sweep("grown", "h2o", 6)
    first = {(r["sample_id"], r["method"]): r["batch_id"] for r in records(tmp_path / "grown")}
    sweep("grown", "h2o", 14)
    sweep("grown", "h2o", 6)
    found = records(tmp_path / "grown")
    assert len(found) == len({(r["sample_id"], r["method"]) for r in found}) == 2 * len(asked(14))
    kept = {(r["sample_id"], r["method"]): r["batch_id"] for r in found}
    assert first.items() <= kept.items()
    lost = (tmp_path / "grown" / "samples.jsonl").read_text().splitlines(keepends=True)[1:]
    (tmp_path / "grown" / "samples.jsonl").write_text("".join(lost))
    sweep("grown", "h2o", 6)
    again = {(r["sample_id"], r["method"]): r["batch_id"] for r in records(tmp_path / "grown")}
    assert again == kept, "a resumed run forms the batches it formed before"


def test_nothing_is_left_to_do_and_status_says_so(
    sweep: Callable[..., Any], tmp_path: Path, kvcli: Callable[..., Any]
) -> None:
    sweep("run", "snapkv", 14)
    sweep("run", "h2o", 6)
    assert "nothing left to do" in sweep("run", "h2o", 6).err
    facts = json.loads(kvcli("status", tmp_path / "run", "--json").out)
    assert facts["done"] == facts["planned"] == 2 * len(asked(14)) + len(asked(6))
    assert facts["tasks"][0]["done"] == facts["tasks"][0]["planned"]


def test_a_dry_run_counts_what_the_command_will_measure(sweep: Callable[..., Any], tmp_path: Path, kvcli: Any) -> None:
    sweep("run", "snapkv", 14)
    done = kvcli(
        "sweep", "--model", "testbed", "--task", tmp_path / "lengths.yaml", "--data-dir", tmp_path / "data",
        "--method", "h2o", "--ratio", "0.5", "--template", "raw", "--max-prompt-tokens", 50, "--prefill-batch", 3,
        "--limit", 6, "--out", tmp_path / "run", "--dry-run", "--json",
    )  # fmt: skip
    assert json.loads(done.out)["records"] == len(asked(6))
