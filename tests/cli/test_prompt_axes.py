"""--shot-seed, --shot-order, --query, --system, --truncate from the command line to the records."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from kvcli.config import SweepConfig
from kvcli.engine.checking import check

SWEEP = (
    "sweep",
    "--task",
    "tb_knowledge",
    "--method",
    "snapkv",
    "--ratio",
    "0.2",
    "--limit",
    "2",
    "--max-new-tokens",
    "3",
)


def records(folder: Path) -> list[dict]:  # type: ignore[type-arg]
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def prompts(folder: Path) -> dict[str, dict]:  # type: ignore[type-arg]
    return {p["sha"]: p for p in map(json.loads, (folder / "prompts.jsonl").read_text().splitlines())}


def test_seeds_and_orders_of_shots_are_axes_that_grow_in_a_folder(kvcli, tmp_path: Path):
    folder = tmp_path / "run"
    assert kvcli(*SWEEP, "--out", folder).code == 0
    assert kvcli(*SWEEP, "--out", folder, "--shot-seed", "0,3", "--shot-order", "0,1").code == 0
    found = records(folder)
    axes = {(r["shot_seed"], r["shot_order"]) for r in found}
    assert axes == {(0, 0), (0, 1), (3, 0), (3, 1)}
    assert len(found) == 4 * 2 * 2
    texts = prompts(folder)
    shots = {
        key: sorted(
            t["text"][t["offsets"][a - 1] : t["offsets"][b - 1]].strip()
            for name, a, b in t["regions"]
            if name.startswith("shot")
        )
        for key in axes
        for r in found
        if (r["shot_seed"], r["shot_order"]) == key and r["sample_id"].split("@")[0] == found[0]["sample_id"]
        for t in [texts[r["prompt_sha"]]]
    }
    assert shots[0, 0] == shots[0, 1]  # the same shots
    assert len({r["prompt_sha"] for r in found}) == 4 * 2  # in another order, which is another prompt


def test_both_query_modes_run_in_one_sweep_and_stand_apart(kvcli, tmp_path: Path):
    folder = tmp_path / "run"
    done = kvcli(*SWEEP, "--out", folder, "--query", "aware,agnostic")
    assert done.code == 0
    found = records(folder)
    assert [r["query"] for r in found].count("agnostic") == 4
    for record in found:
        assert (record["context"] is None) == (record["query"] == "aware")
    report = kvcli("report", folder)
    assert "agnostic" in report.out


def test_a_system_text_stands_in_front_and_makes_other_cells(kvcli, tmp_path: Path):
    (tmp_path / "system.txt").write_text("note note")
    plain, with_text = tmp_path / "a", tmp_path / "b"
    assert kvcli(*SWEEP, "--out", plain).code == 0
    assert kvcli(*SWEEP, "--out", with_text, "--system", f"@{tmp_path / 'system.txt'}").code == 0
    assert {r["cell_id"] for r in records(plain)}.isdisjoint(r["cell_id"] for r in records(with_text))
    assert all(p["text"].startswith("note note") for p in prompts(with_text).values())
    done = kvcli(*SWEEP, "--out", tmp_path / "c", "--system", f"@{tmp_path / 'no.txt'}")
    assert (done.code, "no.txt" in done.err) == (2, True)


def test_prompts_that_are_too_long_are_cut_only_when_asked_and_counted(kvcli, tmp_path: Path):
    refused = kvcli(*SWEEP, "--out", tmp_path / "a", "--max-prompt-tokens", "300")
    assert refused.code == 2
    assert "--truncate" in refused.err
    done = kvcli(*SWEEP, "--out", tmp_path / "b", "--max-prompt-tokens", "300", "--truncate", "middle")
    assert done.code == 0
    assert "truncated" in done.err
    for record in records(tmp_path / "b"):
        assert record["n_prompt"] == 300
        assert record["truncated"] > 100


def test_prompts_longer_than_asked_for_are_left_out_and_counted(kvcli, tmp_path: Path):
    """Of two tasks one is too long: the other runs, and what was left out is said and kept in run.json."""
    folder = tmp_path / "run"
    done = kvcli(
        "sweep", "--task", "tb_knowledge,tb_longgen", "--method", "snapkv", "--ratio", "0.2", "--limit", "3",
        "--out", folder, "--max-prompt-tokens", "430",
    )  # fmt: skip
    assert done.code == 0
    facts = json.loads((folder / "run.json").read_text())["tasks"]
    left = {name: sum(f["too_long"].values()) for name, f in facts.items()}
    kept = {name: len({r["sample_id"] for r in records(folder) if r["task"] == name}) for name in facts}
    assert all(left[name] + kept[name] == 3 for name in facts)
    assert any(left.values())
    assert any(kept.values())
    for name in facts:
        assert (f"{name}: {left[name]} of 3 prompts left out" in done.err) == bool(left[name])
    assert kvcli("report", folder).code == 0


def test_both_stands_for_all_modes_of_an_axis():
    base = SweepConfig(methods=("snapkv",), ratios=("0.3",), tasks=("tb_recall",))
    short = check(dataclasses.replace(base, first_token=("both",), query=("both", "aware")))
    long = check(dataclasses.replace(base, first_token=("compressed", "prefill"), query=("aware", "agnostic")))
    assert short == long
