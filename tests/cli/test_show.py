"""kvcli show: what there is, one prompt with kept tokens marked, outputs side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvcli.results.store import RunStore

TEXT = "The key is red. What is the key?"
OFFSETS = [0, 3, 7, 10, 15, 20, 23, 27, 32]
"""Token 0 is a BOS without text; then 'The', ' key', ' is', ' red.', ' What', ' is', ' the', ' key?'."""
REGIONS = [["special", 0, 1], ["shot 0", 1, 5], ["question", 5, 9]]


@pytest.fixture
def folder(tmp_path: Path, record) -> Path:
    folder = tmp_path / "run"
    facts = dict(prompt_sha="p", n_prompt=9, target="red", output="a [bold]red[/bold] key\nindeed", extracted="red")
    with RunStore(folder) as store:
        with store.edit_run() as run:
            run["cells"] = {}
        prompt = dict(sha="p", task="tb_recall", sample_id="s1", n=9)
        store.add_prompt({**prompt, "text": TEXT, "offsets": OFFSETS, "regions": REGIONS})
        store.append(record("cf", "s1", method="full", ratio=None, measured_ratio=1.0, **facts))
        for cell, method, ratio in (("c1", "snapkv", 0.1), ("c2", "h2o:reduce=max", 0.1), ("c3", "snapkv", 0.5)):
            store.append(record(cell, "s1", method=method, ratio=ratio, flags=["fallback"], **facts))
        store.append(record("c1", "s2", **facts))
        store.keep_map("tb_recall", "s1", "cf", [list(range(9))] * 2)
        store.keep_map("tb_recall", "s1", "c1", [[[1, 8], [1, 8]], [[1, 2, 8], [1, 8]]])
        store.keep_map("tb_recall", "s1", "c3", [[0, 3, 4, 7, 8]] * 2)
    return folder


def test_what_there_is(kvcli, folder):
    done = kvcli("show", folder)
    assert done.code == 0
    assert "tb_recall" in done.out
    assert f"next: kvcli show {folder} --task tb_recall" in done.err
    [task] = json.loads(kvcli("show", folder, "--json").out)
    methods = ["full", "snapkv", "h2o:reduce=max"]
    assert task == {"task": "tb_recall", "samples": 2, "cells": 4, "methods": methods, "weights": ["dense"]}
    assert "weights" not in kvcli("show", folder).out
    done = kvcli("show", folder, "--task", "tb-recall")
    assert f"next: kvcli show {folder} --task tb_recall --sample s1" in done.err
    samples = json.loads(kvcli("show", folder, "--task", "tb_recall", "--json").out)
    assert samples[0] == {
        "sample": "s1", "cells": 4, "mean_score": 1.0, "full": 1.0, "worse": 0, "better": 0, "kept_marked": True,
    }  # fmt: skip


def test_outputs_that_are_no_text_are_marked_beside_the_flags(kvcli, folder, record):
    with RunStore(folder) as store:
        store.append(record("c9", "s1", method="tova", flags=["noop"], incoherent=True, prompt_sha="p", n_prompt=9))
    out = kvcli("show", folder, "--task", "tb_recall", "--sample", "s1", "--method", "tova").out
    assert "noop incoherent" in " ".join(
        next(line for line in out.splitlines() if line.strip().startswith("tova")).split()
    )
    assert "incoherent" not in kvcli("show", folder, "--task", "tb_recall", "--sample", "s1", "--method", "snapkv").out
    cells = json.loads(kvcli("show", folder, "--task", "tb_recall", "--sample", "s1", "--json").out)["cells"]
    assert {c["method"]: c["incoherent"] for c in cells}["tova"] is True


def test_samples_that_changed_come_first(kvcli, folder, record):
    """s1 of the folder is as full has it in all cells; s2 has no full."""
    with RunStore(folder) as store:
        for sample, full, scores in (("s3", 1.0, (1.0, 0.0)), ("s4", 1.0, (0.0, 0.5)), ("s5", 0.0, (1.0, 0.0))):
            facts = dict(prompt_sha=sample, n_prompt=9)
            store.append(record("cf", sample, method="full", ratio=None, score=full, **facts))
            for cell, score in zip(("c1", "c3"), scores, strict=True):
                store.append(record(cell, sample, score=score, **facts))
    rows = json.loads(kvcli("show", folder, "--task", "tb_recall", "--json").out)
    found = [(row["sample"], row["full"], row["worse"], row["better"]) for row in rows]
    assert found == [("s4", 1.0, 2, 0), ("s3", 1.0, 1, 0), ("s5", 0.0, 0, 1), ("s1", 1.0, 0, 0), ("s2", None, 0, 0)]
    done = kvcli("show", folder, "--task", "tb_recall")
    assert "changed: 3 of 5 samples" in done.err and "--sample s4" in done.err
    one = json.loads(kvcli("show", folder, "--task", "tb_recall", "--ratio", "0.5", "--json").out)
    assert one[0]["sample"] == "s1", "c3 was recorded with the ratio of c1 but for s1: nothing changed there"


def test_a_change_is_against_full_of_the_same_prompt_weights_and_draw(kvcli, folder, record):
    with RunStore(folder) as store:
        for draw, full, score in ((0, 1.0, 1.0), (1, 0.0, 0.0)):
            store.append(record(f"d{draw}", "s6", method="full", ratio=None, score=full, draw=draw, prompt_sha="x"))
            store.append(record(f"e{draw}", "s6", score=score, draw=draw, prompt_sha="x"))
        pruned = dict(weights="sparsegpt:2:4", prompt_sha="x", score=0.0)
        store.append(record("p0", "s6", method="full", ratio=None, **pruned))
        store.append(record("p1", "s6", **pruned))
    rows = json.loads(kvcli("show", folder, "--task", "tb_recall", "--json").out)
    (row,) = [row for row in rows if row["sample"] == "s6"]
    assert (row["cells"], row["worse"], row["better"]) == (6, 0, 0)


def test_methods_stand_as_in_tables_full_first(kvcli, tmp_path, record):
    """Whatever was written first."""
    with RunStore(tmp_path / "run") as store:
        with store.edit_run() as run:
            run.update(config={"methods": ["snapkv", "h2o"]}, cells={"c3": {"method": "tova"}})
        for cell, method in (("c1", "h2o"), ("c2", "snapkv"), ("c3", "tova"), ("cf", "full")):
            store.append(record(cell, "s1", method=method))
    [task] = json.loads(kvcli("show", tmp_path / "run", "--json").out)
    assert task["methods"] == ["full", "snapkv", "h2o", "tova"]


def test_a_sample_needs_its_task(kvcli, folder, record):
    with RunStore(folder) as store:
        store.append(record("x1", "s2", task="tb_code"))
    done = kvcli("show", folder, "--sample", "s2")
    assert (done.code, done.out) == (2, "")
    assert "--sample needs --task" in done.err
    assert "try:   --task tb_recall --sample s2 or --task tb_code --sample s2" in done.err
    assert f"kvcli show {folder} --task TASK" in kvcli("show", folder, "--sample", "none").err


def test_what_was_not_stored_can_be_drawn(kvcli, folder, record):
    """attn-map needs no new sweep; a cell that scores lower than full is proposed."""
    facts = dict(prompt_sha="p", n_prompt=9, target="red")
    with RunStore(folder) as store:
        with store.edit_run() as run:
            run["config"] = {"model": "./mine", "shots": [2], "template": "raw", "truncate": None, "tokenizer": None}
        store.append(record("cf", "s2", method="full", ratio=None, score=1.0, **facts))
        store.append(record("c1", "s2", score=1.0, **facts))
        store.append(record("c3", "s2", ratio=0.5, score=0.0, shot_seed=3, **facts))
    done = kvcli("show", folder, "--task", "tb_recall", "--sample", "s2")
    assert "kept tokens are stored for the first samples" in done.err
    command = "kvcli attn-map --model ./mine --task tb_recall --sample s2 --method snapkv --ratio 0.5 --shots 2"
    assert f"drawn without a new sweep: {command} --shot-seed 3 --template raw\n" in done.err
    picked = kvcli("show", folder, "--task", "tb_recall", "--sample", "s2", "--ratio", "0.1")
    assert "--method snapkv --ratio 0.1" in picked.err
    assert "attn-map" not in kvcli("show", folder, "--task", "tb_recall", "--sample", "s1").err


def test_kept_tokens_and_outputs(kvcli, folder):
    done = kvcli("show", folder, "--task", "tb_recall", "--sample", "s1", "--method", "snapkv", "--ratio", "0.1")
    assert done.code == 0
    assert "snapkv ratio 0.1: 2.2 of 9 tokens kept" in done.out
    lines = done.out.splitlines()
    at = lines.index("[shot 0: 31 % kept]")
    assert lines[at + 1 : at + 4] == ["The ··· ·· ····", "[question: 25 % kept]", " ···· ·· ··· key?"]
    assert "[bold]red[/bold]" in done.out, "texts of the model are no markup"
    methods = [line.split()[0] for line in lines if line.strip().startswith(("full ", "snapkv ", "h2o"))]
    assert methods == ["snapkv", "full", "snapkv"]
    assert "fallback" in done.out


def test_all_cells_by_default(kvcli, folder):
    done = kvcli("show", folder, "--task", "tb_recall", "--sample", "s1")
    assert "snapkv ratio 0.5: 5.0 of 9" in done.out
    assert "h2o:reduce=max" in done.out


def test_json(kvcli, folder):
    facts = json.loads(kvcli("show", folder, "--task", "tb_recall", "--sample", "s1", "--json").out)
    assert facts["prompt"]["text"] == TEXT
    cells = {cell["cell_id"]: cell for cell in facts["cells"]}
    assert cells["c1"]["kept_share"] == [0, 1, 0.25, 0, 0, 0, 0, 0, 1]
    assert cells["c2"]["kept_share"] is None
    assert facts["cells"][0]["method"] == "full"


@pytest.fixture
def two_prompts(folder: Path, record) -> Path:
    """The sample of `folder` once more with no shots: another, shorter prompt."""
    with RunStore(folder) as store:
        with store.edit_run() as run:
            run["cells"] = {cell: {"shot_seed": 0} for cell in ("cf", "c1", "c2", "c3", "z1", "zf", "zx")}
        prompt = dict(sha="q", task="tb_recall", sample_id="s1", n=5)
        regions = [["special", 0, 1], ["question", 1, 5]]
        store.add_prompt({**prompt, "text": "What is the key?", "offsets": [0, 4, 7, 11, 16], "regions": regions})
        facts = dict(shots=0, target="blue", prompt_sha="q", n_prompt=5, output="blue")
        store.append(record("zf", "s1", method="full", ratio=None, **facts))
        store.append(record("z1", "s1", method="snapkv", ratio=0.1, **facts))
        failed = dict(shots=0, target="blue", status="error", error="ValueError: x", score=None, output=None)
        store.append(record("zx", "s1", method="h2o", ratio=0.1, **failed))
        store.keep_map("tb_recall", "s1", "z1", [[2, 4]] * 2)
    return folder


def test_each_prompt_of_a_sample_is_shown_with_its_own_cells(kvcli, two_prompts):
    done = kvcli("show", two_prompts, "--task", "tb_recall", "--sample", "s1")
    assert done.code == 0
    first, second = done.out.split("--- prompt 2 of 2: 2 shots ---\n")
    assert first.startswith("--- prompt 1 of 2: 0 shots ---\n")
    assert "target: blue" in first and "target: red" not in first
    assert "snapkv ratio 0.1: 2.0 of 5 tokens kept" in first
    assert "[question: 50 % kept]\n···· is ··· key?" in first
    assert "failed: ValueError: x" in first, "a failed record names no prompt: it goes by its shots"
    assert "target: red" in second and "target: blue" not in second
    assert "snapkv ratio 0.1: 2.2 of 9 tokens kept" in second
    assert "The ··· ·· ····" in second
    assert done.err.count("next:") == 1


def test_json_of_several_prompts_is_a_list_of_them(kvcli, two_prompts):
    facts = json.loads(kvcli("show", two_prompts, "--task", "tb_recall", "--sample", "s1", "--json").out)
    assert list(facts) == ["task", "sample_id", "prompts"]
    zero, two = facts["prompts"]
    assert (zero["prompt_sha"], zero["shots"], zero["shot_seed"], zero["target"]) == ("q", 0, 0, "blue")
    assert zero["prompt"]["text"] == "What is the key?"
    assert [cell["cell_id"] for cell in zero["cells"]] == ["zf", "zx", "z1"]
    assert {cell["cell_id"]: cell["kept_share"] for cell in zero["cells"]}["z1"] == [0, 0, 1, 0, 1]
    assert (two["prompt_sha"], two["prompt"]["text"], two["target"]) == ("p", TEXT, "red")


def test_prompts_that_differ_by_shot_seed_are_told_apart(kvcli, two_prompts, record):
    with RunStore(two_prompts) as store:
        with store.edit_run() as run:
            run["cells"]["y1"] = {"shot_seed": 7}
        prompt = dict(sha="r", task="tb_recall", sample_id="s1", n=1, text="Key?", offsets=[4])
        store.add_prompt({**prompt, "regions": [["question", 0, 1]]})
        store.append(record("y1", "s1", prompt_sha="r", n_prompt=1))
    done = kvcli("show", two_prompts, "--task", "tb_recall", "--sample", "s1")
    heads = [line for line in done.out.splitlines() if line.startswith("---")]
    assert heads == [
        "--- prompt 1 of 3: 0 shots, shot seed 0 ---",
        "--- prompt 2 of 3: 2 shots, shot seed 0 ---",
        "--- prompt 3 of 3: 2 shots, shot seed 7 ---",
    ]


def test_method_and_ratio_filter_the_listings(kvcli, folder):
    [task] = json.loads(kvcli("show", folder, "--method", "h2o", "--json").out)
    assert (task["samples"], task["cells"], task["methods"]) == (1, 2, ["full", "h2o:reduce=max"])
    listed = json.loads(kvcli("show", folder, "--task", "tb_recall", "--method", "h2o", "--json").out)
    assert [(row["sample"], row["cells"]) for row in listed] == [("s1", 2)]
    listed = json.loads(kvcli("show", folder, "--task", "tb_recall", "--ratio", "0.5", "--json").out)
    assert [(row["sample"], row["cells"]) for row in listed] == [("s1", 2)]
    done = kvcli("show", folder, "--method", "h2o:reduce=max", "--ratio", "0.1")
    assert f"next: kvcli show {folder} --task tb_recall --method h2o:reduce=max --ratio 0.1" in done.err


def test_a_file_method_is_found_by_the_name_tables_show(kvcli, folder, record):
    with RunStore(folder) as store:
        store.append(record("f1", "s1", method="./value_norm.py:ValueNorm:recent=64", prompt_sha="p", n_prompt=9))
    for given in ("ValueNorm", "ValueNorm:recent=64", "./value_norm.py:ValueNorm"):
        [task] = json.loads(kvcli("show", folder, "--method", given, "--json").out)
        assert task["cells"] == 2, given


@pytest.fixture
def pruned(folder: Path, record) -> Path:
    """`folder` with full and snapkv of pruned weights, calibrated on a file, beside the dense ones."""
    facts = dict(prompt_sha="p", n_prompt=9, target="red")
    with RunStore(folder) as store:
        for cell, weights in (("2", "sparsegpt:2:4,calib=1a2b3c4d"), ("5", "sparsegpt:sparsity=0.5,damp=0.1")):
            more = dict(**facts, weights=weights, output=f"pruned {cell}")
            store.append(record(f"f{cell}", "s1", method="full", ratio=None, **more))
            store.append(record(f"w{cell}", "s1", method="snapkv", ratio=0.1, **more))
            store.keep_map("tb_recall", "s1", f"w{cell}", [[0, 8]] * 2)
    return folder


@pytest.mark.parametrize(
    ("given", "cells"),
    [
        ("dense", {"cf", "c1", "c2", "c3"}),
        ("sparsegpt", {"f2", "w2", "f5", "w5"}),
        ("sparsegpt:2:4", {"f2", "w2"}),
        ("sparsegpt:2:4,calib=1a2b3c4d", {"f2", "w2"}),
        ("sparsegpt:damp=0.1,sparsity=0.50", {"f5", "w5"}),
        ("dense,sparsegpt:sparsity=0.5,damp=0.1", {"cf", "c1", "c2", "c3", "f5", "w5"}),
    ],
)
def test_weights_are_picked_as_sweep_names_them(kvcli, pruned, given, cells):
    """`full` of other weights is nothing to compare with."""
    shown = json.loads(kvcli("show", pruned, "--task", "tb_recall", "--sample", "s1", "--weights", given, "--json").out)
    assert {cell["cell_id"] for cell in shown["cells"]} == cells
    [task] = json.loads(kvcli("show", pruned, "--weights", given, "--json").out)
    assert task["cells"] == len(cells)


def test_weights_go_with_the_other_filters_and_into_the_next_command(kvcli, pruned):
    only = ("--method", "snapkv", "--ratio", "0.1", "--weights", "sparsegpt:2:4")
    done = kvcli("show", pruned, "--task", "tb_recall", "--sample", "s1", *only)
    assert "snapkv ratio 0.1, sparsegpt:2:4,calib=1a2b3c4d: 2.0 of 9 tokens kept" in done.out
    assert done.out.count("pruned 2") == 2 and "pruned 5" not in done.out
    listed = kvcli("show", pruned, "--task", "tb_recall", *only)
    assert f"--sample s1 {' '.join(only)}" in listed.err
    table = kvcli("show", pruned)
    assert "dense sparsegpt:2:4,calib=1a2b3c4d sparsegpt:sparsity=0.5,damp=0.1" in table.out


@pytest.mark.parametrize(
    ("width", "gone"), [(200, ()), (80, ("flags", "measured")), (68, ("flags", "measured", "answer"))]
)
def test_narrow_screens_give_up_columns_before_names(kvcli, folder, record, monkeypatch, width, gone):
    facts = dict(prompt_sha="p", n_prompt=9, target="red", flags=["fallback", "over_budget"])
    with RunStore(folder) as store:
        store.append(record("cl", "s1", method="streaming_llm:sinks=8", ratio=0.1, output="word " * 15, **facts))
    monkeypatch.setenv("COLUMNS", str(width))
    done = kvcli("show", folder, "--task", "tb_recall", "--sample", "s1", "--method", "streaming_llm")
    assert max(map(len, done.out.splitlines())) <= width
    (line,) = [line for line in done.out.splitlines() if line.split()[:1] == ["streaming_llm:sinks=8"]]
    assert line.split()[1:3] == ["ratio", "0.1"] and "word word word" in line
    (heads,) = [line.split() for line in done.out.splitlines() if line.split()[:2] == ["method", "size"]]
    assert set(heads) == {"method", "size", "measured", "score", "answer", "flags", "output"} - set(gone)
    assert ("not shown on a screen this narrow" in done.err) == bool(gone)
    assert all(name in done.err for name in gone)


def test_weights_that_all_lines_share_stand_above(kvcli, pruned):
    only = ("--task", "tb_recall", "--sample", "s1", "--weights")
    one = kvcli("show", pruned, *only, "sparsegpt:2:4").out
    assert one.count("\nweights: sparsegpt:2:4,calib=1a2b3c4d\n") == 1 and "[sparsegpt" not in one
    two = kvcli("show", pruned, *only, "sparsegpt").out
    assert "\nweights: " not in two and "snapkv [sparsegpt:2:4,calib=1a2b3c4d]" in two


def test_colours_on_a_terminal(kvcli, folder, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    done = kvcli("show", folder, "--task", "tb_recall", "--sample", "s1", "--method", "snapkv")
    assert "\x1b[" in done.out
    assert "·" not in done.out.partition("target")[0]
    monkeypatch.setenv("NO_COLOR", "1")
    done = kvcli("show", folder, "--task", "tb_recall", "--sample", "s1", "--method", "snapkv")
    assert "\x1b[" not in done.out + done.err


def test_a_harmful_prompt_is_not_shown_unless_stored(kvcli, tmp_path, record):
    folder = tmp_path / "run"
    with RunStore(folder) as store:
        with store.edit_run() as run:
            run["tasks"] = {"tb_safety": {"harmful": True}}
        store.add_prompt(dict(sha="p", task="tb_safety", sample_id="s1", n=3, text=None, offsets=None, regions=[]))
        store.append(record("c1", "s1", task="tb_safety", prompt_sha="p", n_prompt=3))
        store.append(record("c1", "s2", task="tb_safety", status="error", error="ValueError: x", score=None))
        store.keep_map("tb_safety", "s1", "c1", [[0, 2]])
    done = kvcli("show", folder, "--task", "tb_safety", "--sample", "s1")
    assert done.code == 0
    assert "--store-prompts" in done.err
    done = kvcli("show", folder, "--task", "tb_safety", "--sample", "s2")
    assert "failed: ValueError: x" in done.out


@pytest.mark.parametrize(
    "args, what, fix",
    [
        (["--task", "tb_recal"], "unknown task in this folder 'tb_recal'", "tb_recall"),
        (["--task", "tb_recall", "--sample", "s7"], "unknown sample 's7'", "s2"),
        (["--task", "tb_recall", "--sample", "s2", "--method", "h2o"], "no such cell", "snapkv ratio 0.1"),
        (["--task", "tb_recall", "--sample", "s1", "--ratio", "1.5"], "out of range", "kept ratio"),
        (["--method", "pyramidkv"], "no such cell", "shows what there is"),
        (["--task", "tb_recall", "--method", "h2o", "--ratio", "0.9"], "no such cell", "shows what there is"),
        (["--weights", "sparsegpt:2:4"], "no such cell", "shows what there is"),
        (["--task", "tb_recall", "--sample", "s1", "--weights", "sparsegpt"], "no such cell", "one of full -"),
        (["--weights", "sparsegtp"], "no form of the weights", "sparsegpt:2:4"),
    ],
)
def test_mistakes(kvcli, folder, args, what, fix):
    done = kvcli("show", folder, *args)
    assert done.code == 2
    assert what in done.err
    assert fix in done.err
    assert done.out == ""
