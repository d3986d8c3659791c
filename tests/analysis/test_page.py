"""The page without a browser: what is in it, what is not, how large it is. tests/browser opens it."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from kvcli.analysis.reading.load import load_run
from kvcli.analysis.reports import flips
from kvcli.analysis.reports import page as pages
from kvcli.analysis.reports.contents import contents
from kvcli.analysis.reports.flips import flips_of, read_records, shortened
from kvcli.analysis.reports.page import page
from tests.analysis.page_runs import EVIL, chunks_in, data_in, grid_run, with_texts
from tests.analysis.tables_of import cell, data_of, folder_of, right, tasks


def html_of(folder: Path, **settings: Any) -> str:
    return page(contents(load_run(folder)), figures=False, **settings)


def test_all_sections_rows_and_the_command_are_there(tmp_path: Path) -> None:
    html = html_of(with_texts(tmp_path / "run"))
    for key in ("verdict", "warnings", "ranking", "means", "findings", "tables", "how", "provenance"):
        assert f'<section id="{key}"' in html
    assert "kvcli sweep --model testbed" in html
    found = data_in(html)
    run = load_run(tmp_path / "run")
    assert len(found["rows"]) == len({c.cell_id for c in run.cells})
    assert html.index('id="verdict"') < html.index('id="tables"')


def test_nothing_leaves_the_page(tmp_path: Path) -> None:
    html = html_of(with_texts(tmp_path / "run"))
    assert "default-src 'none'" in html
    assert not re.findall(r'(?:src|href)="(?!data:|#)', html)


def test_a_script_in_an_output_a_prompt_or_a_name_stays_text(tmp_path: Path) -> None:
    folder = with_texts(tmp_path / "run")
    for name in ("run.json", "samples.jsonl"):
        path = folder / name
        path.write_text(
            path.read_text().replace("snapkv", "<img src=x onerror=a()>").replace('"testbed"', '"<script>b()"')
        )
    html = html_of(folder)
    assert "<img src=x" not in html
    assert html.count("<script") == 3 + len(chunks_in(html)) - 1
    assert "&lt;script&gt;b()" in html
    chunk = chunks_in(html)[0]
    assert any(EVIL in text for text in chunk["texts"])


def test_flips_are_the_largest_changes_twenty_of_a_cell(tmp_path: Path) -> None:
    lines = cell("t", "full", "1", right(60, 60)) + cell("t", "a", "0.1", [0.5] * 30 + [0.0] * 25 + [1.0] * 5)
    data = data_of(tmp_path, lines)
    found = flips_of(data.scores, data.tables[0])[0]
    assert (found.total, len(found.shown)) == (55, 20)
    assert {flip.score for flip in found.shown} == {0.0}


def test_of_several_seeds_the_answer_furthest_from_full_is_shown(tmp_path: Path) -> None:
    lines = cell("t", "full", "1", [1.0, 1.0])
    for seed, scores in ((0, [1.0, 1.0]), (1, [0.0, 1.0])):
        lines += cell("t", "r", "0.1", scores, seed=seed, output=f"seed {seed}")
    folder = folder_of(tmp_path, lines)
    chunk = chunks_in(html_of(folder))[0]
    flip = chunk["cells"][0][0]
    assert (len(chunk["cells"][0]), flip["full"], flip["score"], flip["seed"]) == (1, 1.0, 0.5, 1)
    assert chunk["texts"][flip["output"]] == "seed 1"


def test_prompts_and_their_shots_are_stored_once(tmp_path: Path) -> None:
    chunk = chunks_in(html_of(with_texts(tmp_path / "run")))[0]
    shots = [region for p in chunk["prompts"].values() for region in p["regions"] if region[0] == "shot 0"]
    assert len(shots) > 5
    assert len({place for _, place, _, _ in shots}) == 1
    assert len(chunk["texts"]) == len(set(chunk["texts"]))


def test_harmful_texts_are_left_out_unless_asked_for(tmp_path: Path) -> None:
    folder = with_texts(tmp_path / "run", harmful=True)
    hidden, shown = html_of(folder), html_of(folder, harmful_texts=True)
    for chunk in chunks_in(hidden):
        assert chunk["hidden"]
        assert chunk["texts"] == [] and chunk["prompts"] == {}
        assert all(f["output"] is None and f["extracted"] is None for cell in chunk["cells"] for f in cell)
        assert all(s["target"] is None for s in chunk["samples"].values())
    assert any(EVIL in text for text in chunks_in(shown)[0]["texts"])


def test_a_prompt_that_was_not_stored_is_not_made_up(tmp_path: Path) -> None:
    folder = with_texts(tmp_path / "run")
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({**json.loads(x), "text": None}) + "\n" for x in path.read_text().splitlines()))
    assert all(prompt is None for prompt in chunks_in(html_of(folder))[0]["prompts"].values())


def test_the_last_finished_record_counts_and_a_torn_line_does_not(tmp_path: Path) -> None:
    lines = cell("t", "full", "1", [1.0]) + cell("t", "a", "0.1", [0.0], output="old")
    lines += [{**lines[-1], "output": "new"}, {**lines[-1], "output": None, "status": "error", "score": None}]
    folder = folder_of(tmp_path, lines)
    with (folder / "samples.jsonl").open("a") as file:
        file.write('{"schema":1,"cell_id":"t a')
    key = (lines[-1]["cell_id"], "t-0")
    assert read_records(folder, {key})[key]["output"] == "new"


def test_long_texts_lose_their_middle() -> None:
    text = shortened("a" * 3000 + "b" * 3000)
    assert len(text) < 1700
    assert text.startswith("aaa") and text.endswith("bbb") and "4,400 characters left out" in text
    assert shortened("short") == "short"


def test_a_page_that_would_be_too_large_has_fewer_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = with_texts(tmp_path / "run")
    whole = html_of(folder)
    monkeypatch.setattr(pages, "MOST_BYTES", len(whole.encode()) - 2000)
    fewer = html_of(folder)
    assert len(fewer) < len(whole)
    assert data_in(fewer)["most"] < data_in(whole)["most"] == flips.PER_CELL
    assert data_in(fewer)["rows"][1][24] == data_in(whole)["rows"][1][24], "how many there are is the same"


def test_kept_tokens_of_stored_maps_are_marked(tmp_path: Path) -> None:
    import numpy as np

    folder = with_texts(tmp_path / "run")
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    full = {(x["task"], x["sample_id"]): x["score"] for x in lines if x["method"] == "full"}
    flipped = next(x for x in lines if x["method"] == "snapkv" and x["score"] != full[x["task"], x["sample_id"]])
    path = folder / "kept" / flipped["task"] / flipped["sample_id"] / f"{flipped['cell_id']}.npz"
    path.parent.mkdir(parents=True)
    np.savez(path, heads=np.array([2]), lengths=np.array([2, 1]), positions=np.array([0, 3, 3]))
    chunk = next(c for c in chunks_in(html_of(folder)) if c["marks"])
    marks = chunk["marks"][f"{flipped['cell_id']} {flipped['sample_id']}"]
    assert marks[0] == "5" and marks[3] == "9" and set(marks[4:]) == {"0"}
    assert len(marks) == flipped["n_prompt"]


@pytest.mark.slow
def test_seven_tasks_ten_methods_nine_ratios_two_hundred_samples(tmp_path: Path) -> None:
    folder = grid_run(tmp_path / "run")
    run = load_run(folder)
    assert len(run) > 126_000
    started = time.perf_counter()
    html = page(contents(run))
    assert time.perf_counter() - started < 60
    assert len(html.encode()) < 5_000_000
    assert data_in(html)["most"] >= 5


def test_tasks_facts_reach_the_page(tmp_path: Path) -> None:
    lines = cell("t", "full", "1", right(30, 60)) + cell("t", "a", "0.1", right(10, 60))
    folder = folder_of(tmp_path, lines, tasks=tasks(t={"reference": {"testbed": 0.99}, "too_long": 2}))
    table = data_in(html_of(folder))["tables"][0]
    assert "published 0.99" in table["facts"]
    assert any("not ranked" in text for text in table["warnings"])
    assert any("2 prompts of the task left out" in text for text in table["notes"])


def test_full_with_other_weights_has_its_verdict_and_details_what_could_be_seen(tmp_path: Path) -> None:
    lines = cell("t", "full", "1", right(60, 60)) + cell("t", "a", "0.5", right(60, 60))
    lines += cell("t", "full", "1", right(30, 60), weights="wanda:0.5")
    lines += cell("t", "a", "0.5", right(30, 60), weights="wanda:0.5", incoherent=True)
    made = contents(load_run(folder_of(tmp_path, lines)))
    dense, same, pruned, last = data_in(page(made, figures=False))["rows"]
    change, kind, flags, incoherent, detectable = 11, 19, 20, 9, 28
    assert (dense[change], dense[kind]) == (None, "")
    assert (pruned[change], pruned[kind]) == (-0.5, "loss")
    assert "points to full of the dense model" in pruned[flags]
    assert (same[incoherent], last[incoherent]) == (0.0, 1.0)
    assert dense[detectable] is None
    assert same[detectable] == pytest.approx(made.detectable(made.tables[0].cells()[0].difference), abs=1e-6)


def test_all_commands_of_a_grown_folder_are_in_the_page(tmp_path: Path) -> None:
    lines = cell("t", "full", "1", right(3, 6)) + cell("t", "a", "0.1", right(1, 6))
    commands = [{"argv": ["kvcli", "sweep", "--limit", limit]} for limit in ("3", "6")]
    html = html_of(folder_of(tmp_path, lines, commands=commands))
    assert "kvcli sweep --limit 3\nkvcli sweep --limit 6" in html
    assert "These commands, in this order" in html


def test_distances_from_full_are_in_the_rows_and_the_columns_have_names(tmp_path: Path) -> None:
    near = {"kl": 0.25, "top1": 0.9, "nll": 1.0, "identical": False}
    lines = cell("t", "full", "1", right(3, 6)) + cell("t", "a", "0.1", right(1, 6), fidelity=near)
    html = html_of(folder_of(tmp_path, lines))
    names = re.search(r"const \[(TABLE.*?)\] = Array.from\(\{length: (\d+)\}", html, re.S)
    assert names is not None
    order = [name.strip() for name in names[1].split(",")]
    full, compressed = data_in(html)["rows"]
    assert len(order) == int(names[2]) == len(full) == len(compressed)
    assert [compressed[order.index(name)] for name in ("KL", "TOP1")] == [0.25, 0.9]
    assert full[order.index("KL")] is None
    assert "KL divergence from full" in html and "top-1 agreement with full" in html


def test_the_page_has_one_p_and_says_what_is_unadjusted(tmp_path: Path) -> None:
    html = html_of(with_texts(tmp_path / "run"))
    assert "p by itself" not in html and '"p (Holm)"' in html
    assert "points to full [95\\u00a0%, unadjusted]" in html


def test_a_prompt_whose_kept_tokens_are_marked_is_shown_whole(tmp_path: Path) -> None:
    import numpy as np

    folder = with_texts(tmp_path / "run")
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    prompts = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    for entry in prompts:
        entry["text"] = entry["text"] + "x" * flips.LONGEST
        entry["offsets"][-1] = len(entry["text"])
    (folder / "prompts.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in prompts))
    assert not any(chunk["marks"] for chunk in chunks_in(html_of(folder)))
    for line in lines:
        path = folder / "kept" / line["task"] / line["sample_id"] / f"{line['cell_id']}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, heads=np.array([2]), lengths=np.array([2, 1]), positions=np.array([0, 3, 3]))
    for chunk in chunks_in(html_of(folder)):
        assert chunk["marks"] and not any(cut for p in chunk["prompts"].values() for *_, cut in p["regions"])
