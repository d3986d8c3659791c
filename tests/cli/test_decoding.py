"""Compression and sampling while answers are generated, from the command line: what is refused, what is said, what is
stored, how a grid grows by it, and what happens where memory runs out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvcli.analysis.reading.load import load_run
from kvcli.analysis.tables.build import summarise
from kvcli.engine.asking import Asker
from kvcli.models.wrapper import Model
from tests.cli import sweeping
from tests.cli.sweeping import Done, comparable, one_error, records, typed

BASE = typed("sweep --model testbed --task tb_longgen --ratio 0.3 --limit 3")
METHODS = "h2o,shotkv,snapkv"
AXIS = typed("--decode-ratio off,same,0.1")

WRONG: dict[str, tuple[str, tuple[str, ...]]] = {
    # what follows BASE -> words of the message
    "ratio 0": ("--method h2o --decode-ratio 0", ("ratio 0 is out of range",)),
    "ratio 1.5": ("--method h2o --decode-ratio 1.5", ("ratio 1.5 is out of range",)),
    "ratio abc": ("--method h2o --decode-ratio abc", ("abc",)),
    "ratio empty": ("--method h2o --decode-ratio 0.1,,0.2", ("given:",)),
    "budget 0": ("--method h2o --decode-budget 0", ("--decode-budget must be at least 1",)),
    "budget x": ("--method h2o --decode-budget x", ("--decode-budget x",)),
    "cap": ("--method h2o --cap shrink", ("--cap 'shrink' is not known", "grow | fixed")),
    "interval 0": ("--method h2o --decode-ratio 0.5 --decode-interval 0", ("--decode-interval must be at least 1",)),
    "interval x": ("--method h2o --decode-interval x", ("'--decode-interval'", "valid integer")),
    "ratio and budget": ("--method h2o --decode-ratio 0.5 --decode-budget 8", ("exclude each other", "0.5", "8")),
    "ratio and cap": ("--method h2o --decode-ratio same --cap fixed", ("exclude each other", "--cap fixed")),
    "budget and cap": ("--method h2o --decode-budget 8 --cap fixed", ("exclude each other",)),
    "no decode phase": ("--method snapkv --decode-ratio 0.5", ("none of these methods", "snapkv", "h2o", "shotkv")),
    "none of two": ("--method snapkv,pyramidkv --decode-budget 8", ("none of these methods", "snapkv,pyramidkv")),
    "switched off": ("--method shotkv:decode=off --cap fixed", ("none of these methods", "shotkv:decode=off")),
    "temperature -1": ("--method h2o --temperature -1", ("--temperature", "-1")),
    "temperature nan": ("--method h2o --temperature nan", ("--temperature",)),
    "temperature inf": ("--method h2o --temperature inf", ("--temperature",)),
    "top-p 0": ("--method h2o --temperature 1 --top-p 0", ("--top-p must lie in (0, 1]",)),
    "top-p 1.1": ("--method h2o --temperature 1 --top-p 1.1", ("--top-p must lie in (0, 1]",)),
    "top-p alone": ("--method h2o --top-p 0.9", ("without --temperature", "--top-p 0.9")),
    "draws alone": ("--method h2o --draws 2", ("without --temperature", "--draws 2")),
    "draws at 0": ("--method h2o --temperature 0 --draws 2", ("without --temperature", "--draws 2")),
    "draws 0": ("--method h2o --temperature 1 --draws 0", ("--draws must be at least 1",)),
    "memory": ("--method h2o --memory much", ("not an amount of memory", "--memory much")),
    "memory 0": ("--method h2o --memory 0G", ("not an amount of memory",)),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_met_is_refused(kvcli: Callable[..., Done], tmp_path: Path, name: str) -> None:
    words, message = WRONG[name]
    done = kvcli(*BASE, *typed(words), "--out", tmp_path / "run")
    one_error(done, *message)
    assert not (tmp_path / "run").exists()


def test_same_needs_ratios(kvcli: Callable[..., Done], tmp_path: Path) -> None:
    command = typed("sweep --task tb_longgen --method h2o --budget 20 --decode-ratio same --limit 2")
    one_error(kvcli(*command, "--out", tmp_path / "run"), "--decode-ratio same needs --ratio")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """Two methods that compress generated tokens and one that does not."""
    folder = tmp_path_factory.mktemp("decoding") / "run"
    done = sweeping.call(*BASE, "--method", METHODS, *AXIS, "--out", folder)
    assert done.code == 0, done.err
    return folder, done


def cells(folder: Path) -> set[tuple[str, str]]:
    return {(r["method"], json.dumps(r["decode"])) for r in records(folder)}


def test_a_mix_warns_and_keeps_every_token_of_the_others(whole: tuple[Path, Done]) -> None:
    folder, done = whole
    assert done.err.count("snapkv: no such compression while generating, every generated token is kept") == 1
    ratio = {r: json.dumps({"ratio": r, "interval": 1}) for r in ("0.3", "0.1")}
    assert cells(folder) == {
        ("full", "null"), ("snapkv", "null"), *((m, d) for m in ("h2o", "shotkv") for d in ("null", *ratio.values()))
    }  # fmt: skip
    assert len(records(folder)) == 3 * (1 + 1 + 2 * 3)
    held: dict[tuple[str, str, str], int] = {}
    for r in records(folder):
        decode = "off" if r["decode"] is None else r["decode"]["ratio"]
        held[r["method"], r["sample_id"], decode] = r["kv_bytes"]["end"] - r["kv_bytes"]["prefill"]
        if r["method"] != "full":
            assert r["fidelity"]["kl"] is not None
    for method in ("h2o", "shotkv"):
        for sample in {r["sample_id"] for r in records(folder)}:
            assert held[method, sample, "0.1"] < held[method, sample, "0.3"] < held[method, sample, "off"]


def test_tables_and_show_name_the_decode_settings(whole: tuple[Path, Done], kvcli: Callable[..., Done]) -> None:
    folder, done = whole
    lines = done.out.splitlines()
    for method in ("h2o", "shotkv"):
        rows = [line for line in lines if line.strip().startswith(method)]
        assert len(rows) == 3
        assert sum("[r_d = r_p]" in row for row in rows) == 1
        assert sum("[r_d 0.1]" in row for row in rows) == 1
    assert sum(line.strip().startswith("snapkv") for line in lines) == 1
    sample = records(folder)[0]["sample_id"]
    which = ("show", folder, "--task", "tb_longgen", "--sample", sample, "--method", "h2o")
    shown = kvcli(*which)
    assert shown.code == 0, shown.err
    for words in ("h2o ratio 0.3, r_d 0.1:", "h2o ratio 0.3, r_d 0.3:", "h2o ratio 0.3:", "h2o [r_d 0.1]"):
        assert words in shown.out
    assert '"decode": {"ratio": "0.1", "interval": 1}' in json.dumps(json.loads(kvcli(*which, "--json").out))


@pytest.mark.parametrize(
    ("words", "label", "decode"),
    [
        ("--decode-budget 8", "8 generated kept", {"budget": 8, "interval": 1}),
        ("--cap fixed", "fixed cap", {"cap": "fixed", "interval": 1}),
        ("--decode-ratio 0.50 --decode-interval 4", "r_d 0.5, every 4", {"ratio": "0.5", "interval": 4}),
    ],
)
def test_the_other_settings_are_stored_and_named(
    kvcli: Callable[..., Done], tmp_path: Path, words: str, label: str, decode: dict[str, Any]
) -> None:
    done = kvcli(*BASE, "--method", "streaming_llm", *typed(words), "--limit", 2, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    (table,) = summarise(load_run(tmp_path / "run"))
    assert [row.label for row in table.rows] == [f"streaming_llm [{label}]"]
    assert all(word in done.out for word in f"[{label}]".split())  # a narrow column breaks it into lines
    assert cells(tmp_path / "run") == {("full", "null"), ("streaming_llm", json.dumps(decode))}
    cell_facts = json.loads((tmp_path / "run" / "run.json").read_text())["cells"].values()
    assert decode in [facts["decode"] for facts in cell_facts]


def test_a_grid_grows_by_decode_settings(whole: tuple[Path, Done], kvcli: Callable[..., Done], tmp_path: Path) -> None:
    """One after the other in one folder: the records of one command over all of them."""
    folder, out = whole[0], tmp_path / "run"
    seen: list[bytes] = []
    for ratio in ("off", "same", "0.1"):
        done = kvcli(*BASE, "--method", METHODS, "--decode-ratio", ratio, "--out", out)
        assert done.code == 0, done.err
        now = (out / "samples.jsonl").read_bytes()
        assert all(now.startswith(before) for before in seen)
        seen.append(now)
    assert len(set(seen)) == 3
    without = ("batch_id", "alloc_bytes", "fidelity")
    assert comparable(out, *without) == comparable(folder, *without)
    done = kvcli(*BASE, "--method", METHODS, *AXIS, "--out", out)
    assert done.code == 0 and "nothing left to do" in done.err
    assert (out / "samples.jsonl").read_bytes() == seen[-1]
    assert done.out.count("[r_d 0.1]") == 2


def test_the_dry_run_names_who_evicts(kvcli: Callable[..., Done], tmp_path: Path) -> None:
    command = (*BASE, "--method", METHODS, *AXIS, "--out", tmp_path / "run")
    done = kvcli(*command, "--dry-run")
    assert done.code == 0, done.err
    for words in (
        "h2o by itself, for what it does while generating: 2 cells, 6 rows",
        "shotkv by itself, for what it does while generating: 2 cells, 6 rows",
        "caches that only grow: 4 cells, 12 rows",
        "one prefill for all of them",
    ):
        assert words in done.out
    facts = json.loads(kvcli(*command, "--dry-run", "--json").out)
    assert {s["kind"]: s["rows"] for s in facts["storage"]} == {"kept": 12, "h2o": 6, "shotkv": 6}
    assert len(facts["cells_list"]) == facts["cells"] == 8
    assert not (tmp_path / "run").exists()


# --- sampling ---------------------------------------------------------------------------------------------------------

SAMPLED = typed(
    "sweep --model testbed --task tb_longgen --ratio 0.3 --limit 3 --method snapkv --temperature 5 --top-p 0.99"
)


def test_draws_are_averaged_and_grow(kvcli: Callable[..., Done], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert kvcli(*SAMPLED, "--out", out).code == 0
    first = records(out)
    assert len(first) == 6 and {(r["draw"], r["seed"]) for r in first} == {(0, 0)}
    done = kvcli(*SAMPLED, "--draws", 3, "--json", "--out", out)
    assert done.code == 0, done.err
    now = records(out)
    assert now[:6] == first and len(now) == 18
    assert {r["draw"] for r in now} == {0, 1, 2}
    (table,) = json.loads(done.out)
    assert (table["full"]["n"], table["full"]["records"]) == (3, 9)
    assert [(c["n"], c["records"], c["seeds"]) for c in table["cells"]] == [(3, 9, 3)]
    mean = sum(r["score"] for r in now if r["method"] == "snapkv") / 9
    assert table["cells"][0]["score"] == pytest.approx(mean, abs=1e-6)
    assert len({tuple(r["output_ids"]) for r in now if r["method"] == "full"}) > 3


def test_a_resumed_sampled_run_is_compared_with_fulls_own_draws(kvcli: Callable[..., Done], tmp_path: Path) -> None:
    """`full` was recorded before the command ended; its answers come out of the folder, draw by draw."""
    command = (*SAMPLED, "--draws", 2, "--seed", "0,1")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert kvcli(*command, "--out", whole).code == 0
    shutil.copytree(whole, cut)
    lines = (whole / "samples.jsonl").read_text().splitlines(keepends=True)
    (cut / "samples.jsonl").write_text("".join(line for line in lines if json.loads(line)["method"] == "full"))
    assert kvcli(*command, "--out", cut).code == 0
    assert len(records(cut)) == len(records(whole)) == 24
    truth = {(r["cell_id"], r["sample_id"]): r for r in records(whole)}
    for record in records(cut):
        wanted = truth[record["cell_id"], record["sample_id"]]
        assert record["output_ids"] == wanted["output_ids"]
        assert record["fidelity"] == pytest.approx(wanted["fidelity"], abs=1e-5)
        assert record["fidelity"]["identical"] is not None or record["method"] == "full"


# --- memory -----------------------------------------------------------------------------------------------------------


def test_smaller_batches_after_memory_ran_out_are_said_and_recorded(
    whole: tuple[Path, Done], kvcli: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Model.step

    def limited(self: Model, tokens: Any, *args: Any) -> Any:
        if len(tokens) > 3:
            raise torch.OutOfMemoryError("no memory")
        return step(self, tokens, *args)

    monkeypatch.setattr(Model, "step", limited)
    out = tmp_path / "run"
    done = kvcli(*BASE, "--method", METHODS, *AXIS, "--out", out)
    assert done.code == 0, done.err
    assert "did not fit in memory together, went on in smaller batches" in done.err
    run = json.loads((out / "run.json").read_text())
    assert run["status"] == "done"
    noted = run["batching"]["out_of_memory"]
    assert noted and all("-d00" in what for what in noted)
    monkeypatch.undo()
    without = ("alloc_bytes", "fidelity")
    assert comparable(out, *without) == comparable(whole[0], *without)
    for a, b in zip(sorted(records(out), key=str_key), sorted(records(whole[0]), key=str_key), strict=True):
        assert a["fidelity"] == pytest.approx(b["fidelity"], abs=1e-4)
    again = kvcli(*BASE, "--method", METHODS, *AXIS, "--out", out)
    assert again.code == 0
    assert json.loads((out / "run.json").read_text())["batching"]["out_of_memory"] == noted


def str_key(record: dict[str, Any]) -> tuple[str, str]:
    return record["cell_id"], record["sample_id"]


def test_rows_that_never_fit_are_error_records_and_the_same_command_tries_again(
    whole: tuple[Path, Done], kvcli: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = Asker.ask

    def limited(self: Asker, prompts: Any, sample: int, cell: Any, ready: Any, *more: Any) -> Any:
        if cell.method == "h2o" and sample == 1:
            raise torch.OutOfMemoryError("no memory at all")
        return ask(self, prompts, sample, cell, ready, *more)

    monkeypatch.setattr(Asker, "ask", limited)
    out = tmp_path / "run"
    command = (*BASE, "--method", METHODS, *AXIS, "--out", out)
    done = kvcli(*command)
    assert done.code == 3, done.err
    assert "3 samples failed" in done.err and "no memory at all" in done.err and "Traceback" not in done.err
    failed = [r for r in records(out) if r["status"] == "error"]
    assert len(failed) == 3 and {r["method"] for r in failed} == {"h2o"}
    assert len(records(out)) == len(records(whole[0]))
    monkeypatch.undo()
    done = kvcli(*command)
    assert done.code == 0, done.err
    mended = {(r["cell_id"], r["sample_id"]): r for r in records(out)}
    assert {r["status"] for r in mended.values()} == {"ok"}
    wanted = {(r["cell_id"], r["sample_id"]): r["output_ids"] for r in records(whole[0])}
    assert {key: r["output_ids"] for key, r in mended.items()} == wanted


def test_memory_that_ran_out_before_a_command_failed_is_recorded_too(
    kvcli: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command ends with another error later; what it found out about memory is not lost."""
    step, calls = Model.step, 0

    def limited(self: Model, tokens: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise torch.OutOfMemoryError("no memory")
        if calls == 4:
            raise ZeroDivisionError("something else")
        return step(self, tokens, *args)

    monkeypatch.setattr(Model, "step", limited)
    out = tmp_path / "run"
    with pytest.raises(ZeroDivisionError):
        kvcli(*BASE, "--method", "h2o", "--out", out)
    run = json.loads((out / "run.json").read_text())
    assert run["status"] == "failed"
    assert len(run["batching"]["out_of_memory"]) == 1
