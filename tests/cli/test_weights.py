"""Pruned weights as an axis of the grid: `--weights`, from the command line to the tables."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from kvcli.analysis.reading.load import load_run
from kvcli.analysis.tables.build import summarise
from kvcli.models import loader
from kvcli.models.source import TESTBED_FOLDER, parse_model
from kvcli.testbed import vocabulary as V
from kvcli.weights import calibration
from kvcli.weights.model import prune_model
from kvcli.weights.spec import parse_weights
from tests.cli.sweeping import TINY, call, comparable, one_error, prompts, records, typed

HALF = "sparsegpt:sparsity=0.5,length=128,samples=8"
COARSE = "sparsegpt:2:4,length=128,samples=8"
GRID = "sweep --method snapkv --ratio 0.3 --task tb_recall,tb_arithmetic --limit 6"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dense weights first; a second command adds two kinds of pruned ones."""
    out = tmp_path_factory.mktemp("weights") / "run"
    assert call(*typed(GRID), "--out", out).code == 0
    assert call(*typed(GRID), "--weights", f"dense,{HALF},{COARSE}", "--out", out).code == 0
    return out


def run_json(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return found


def test_every_record_says_which_weights_and_dense_cells_keep_their_ids(folder: Path, tmp_path: Path) -> None:
    lines = records(folder)
    assert {r["weights"] for r in lines} == {"dense", HALF, COARSE}
    assert len(lines) == 3 * 2 * 2 * 6 and len({r["cell_id"] for r in lines}) == 12
    described = run_json(folder)["cells"]
    for line in lines:
        assert described[line["cell_id"]]["weights"] == line["weights"]
        assert ("pruning" in described[line["cell_id"]]) == (line["weights"] != "dense")
    assert call(*typed(GRID), "--weights", "dense", "--out", tmp_path / "dense").code == 0
    dense = {r["cell_id"] for r in records(tmp_path / "dense")}
    assert dense == {r["cell_id"] for r in lines if r["weights"] == "dense"}


def test_run_json_holds_what_was_measured(folder: Path) -> None:
    found = run_json(folder)["weights"]
    assert set(found) == {HALF, COARSE}
    for facts in found.values():
        assert facts["sparsity"] == 0.5 and facts["matrices"] == 28 and facts["texts"] == 8 and facts["seed"] == 0
        assert facts["calibration"] == {"file": None, "sha": None}


def test_the_same_command_has_nothing_left_and_a_shared_sweep_gives_separate_records(
    folder: Path, tmp_path: Path
) -> None:
    before = (folder / "samples.jsonl").read_bytes()
    done = call(*typed(GRID), "--weights", f"dense,{HALF},{COARSE}", "--out", folder)
    assert done.code == 0 and "nothing left to do" in done.err and "pruning" not in done.err
    assert (folder / "samples.jsonl").read_bytes() == before
    assert call(*typed(GRID), "--weights", COARSE, "--out", tmp_path / "alone").code == 0
    alone = comparable(tmp_path / "alone", "batch_id")
    together = [text for text in comparable(folder, "batch_id") if json.loads(text)["weights"] == COARSE]
    assert alone == together


def test_a_resumed_run_of_pruned_weights_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "cut"
    shutil.copytree(folder, out)
    lines = (out / "samples.jsonl").read_text().splitlines(keepends=True)
    kept = [line for number, line in enumerate(lines) if json.loads(line)["weights"] != HALF or number % 3]
    (out / "samples.jsonl").write_text("".join(kept))
    assert len(kept) < len(lines)
    assert call(*typed(GRID), "--weights", f"dense,{HALF},{COARSE}", "--out", out).code == 0
    assert comparable(out) == comparable(folder)


def test_full_gives_the_tokens_of_the_pruned_model(folder: Path) -> None:
    """Equality 1: transformers' own generation on a model pruned apart from the run."""
    (pruning,) = parse_weights([COARSE])
    assert pruning is not None
    source = parse_model("testbed")
    config, tokenizer = loader.load_config(source), loader.load_tokenizer(source)
    models = [loader.load_weights(config, source, "float32", "cpu") for _ in range(2)]
    texts = calibration.sequences(pruning, None, tokenizer, 1024, TESTBED_FOLDER)
    prune_model(models[1], texts, pruning, given=COARSE)
    stored, apart = prompts(folder), 0
    for line in records(folder):
        if line["method"] != "full" or line["weights"] != COARSE:
            continue
        ids = torch.tensor([tokenizer(stored[line["prompt_sha"]]["text"])["input_ids"]])
        new = [
            hf.generate(ids, do_sample=False, max_new_tokens=len(line["output_ids"]))[0, ids.shape[1] :].tolist()
            for hf in models
        ]
        assert line["output_ids"] == new[1]
        apart += new[0] != new[1]
    assert apart, "the pruned model must differ somewhere, or nothing was tested"


def test_rows_are_compared_with_full_of_their_own_weights(folder: Path) -> None:
    lines = records(folder)
    full = {(r["weights"], r["task"], r["sample_id"]): r for r in lines if r["method"] == "full"}
    others = [r for r in lines if r["method"] != "full"]
    assert len(others) == 36
    for line in others:
        same = full[line["weights"], line["task"], line["sample_id"]]
        assert line["fidelity"]["identical"] == (line["output_ids"] == same["output_ids"])
        assert line["fidelity"]["kl"] is not None
    dense = {(t, s): r["output_ids"] for (w, t, s), r in full.items() if w == "dense"}
    assert any(r["output_ids"] != dense[t, s] for (w, t, s), r in full.items() if w == COARSE)


def test_later_rows_find_the_answers_of_full_with_their_own_weights(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "grown"
    shutil.copytree(folder, out)
    weights = f"dense,{HALF},{COARSE}"
    assert call(*typed(GRID.replace("snapkv", "h2o")), "--weights", weights, "--out", out).code == 0
    lines = records(out)
    full = {(r["weights"], r["task"], r["sample_id"]): r["output_ids"] for r in lines if r["method"] == "full"}
    later = [r for r in lines if r["method"] == "h2o"]
    assert len(later) == 36 and any(full["dense", t, s] != ids for (w, t, s), ids in full.items() if w == COARSE)
    for line in later:
        same = full[line["weights"], line["task"], line["sample_id"]]
        assert line["fidelity"]["identical"] == (line["output_ids"] == same)


def test_tables_and_figures_stand_apart(folder: Path) -> None:
    tables = summarise(load_run(folder))
    assert [(t.task, t.weights) for t in tables] == [
        (task, weights) for task in ("tb_recall", "tb_arithmetic") for weights in ("dense", HALF, COARSE)
    ]
    mean = {
        (r["task"], r["weights"]): [x["score"] for x in records(folder) if (x["task"], x["weights"], x["method"])
                                    == (r["task"], r["weights"], "full")]
        for r in records(folder)
    }  # fmt: skip
    for table in tables:
        own = mean[table.task, table.weights]
        assert table.full is not None and table.full.score == pytest.approx(sum(own) / 6)
        if table.weights == "dense":
            assert table.against_dense is None and not table.notes
        else:
            change = sum(own) / 6 - sum(mean[table.task, "dense"]) / 6
            assert table.against_dense is not None and table.against_dense.value == pytest.approx(change)
            assert f"{100 * change:+.1f} points" in table.notes[0]
    drawn = call("plot", folder, "--format", "png")
    assert drawn.code == 0, drawn.err
    names = {path.name for path in (folder / "figures").glob("*.png")}
    assert {"difference-dense.png", "score-sparsegpt-2-4-length-128-samples-8.png"} <= names and len(names) == 6
    assert call("report", folder).code == 0
    report = (folder / "report.md").read_text()
    assert f"Weights `{HALF}`: 50.00 % of the 589,824 weights in 28 matrices are zero" in report
    assert f"`tb_arithmetic` ({COARSE}" in report


def test_folders_from_before_the_field_read_as_dense(folder: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    lines = [{k: v for k, v in r.items() if k != "weights"} for r in records(folder) if r["weights"] == "dense"]
    (old / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (old / "prompts.jsonl").write_bytes((folder / "prompts.jsonl").read_bytes())
    facts = run_json(folder)
    facts["generations"] = facts["generations"][:1]
    for name in ("weights", "calib"):
        facts["generations"][0]["grid"].pop(name)
        facts["config"].pop(name)
    (old / "run.json").write_text(json.dumps(facts))
    assert {t.weights for t in summarise(load_run(old))} == {"dense"}
    checked = call("check", old)
    assert checked.code == 0, checked.out
    again = call(*typed(GRID), "--out", old)
    assert again.code == 0 and "nothing left to do" in again.err


@pytest.mark.parametrize(
    "options, words",
    [
        ("--weights magnitude:sparsity=0.5", ("no form of the weights", "sparsegpt:2:4")),
        ("--weights sparsegpt", ("needs a sparsity or a pattern",)),
        ("--weights sparsegpt:sparsity=1.5", ("sparsity=1.5", "below 1")),
        ("--weights sparsegpt:4:2", ("no pattern N:M",)),
        ("--weights sparsegpt:sparsity=0.5,window=8", ("unknown setting of sparsegpt 'window'",)),
        ("--calib texts.txt", ("changes nothing without pruned weights",)),
        ("--weights sparsegpt:2:4 --calib gone.txt", ("cannot read gone.txt",)),
        (
            f"--model random:{TESTBED_FOLDER}:{TINY} --weights sparsegpt:2:4",
            ("need texts to be calibrated on", "--calib"),
        ),
    ],
)
def test_what_cannot_be_is_one_error_before_anything_runs(options: str, words: tuple[str, ...], tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = call(*typed(f"{GRID} {options}"), "--out", out)
    one_error(done, *words)
    assert not out.exists() and "loading" not in done.err


def test_run_takes_one_kind_of_weights(tmp_path: Path) -> None:
    done = call(*typed("run --task tb_recall --method snapkv --ratio 0.3 --weights"), f"dense,{HALF}")
    one_error(done, "run takes one kind of weights", HALF)


def test_another_model_is_calibrated_on_a_file(tmp_path: Path) -> None:
    rng = random.Random(0)
    words = [w for w in V.WORDS if not w.startswith("<")]
    texts = [" ".join(rng.choices(words, k=60)) for _ in range(20)]
    first, second = tmp_path / "first.lines", tmp_path / "second.txt"
    first.write_text("\n".join(texts))
    second.write_text(" ".join(texts))
    grid = f"sweep --model random:{TESTBED_FOLDER}:{TINY} --method snapkv --ratio 0.5 --task tb_recall --limit 2"
    weights = "sparsegpt:sparsity=0.25,length=50"
    out = tmp_path / "run"
    for file in (first, second):
        done = call(*typed(grid), "--weights", weights, "--calib", file, "--out", out)
        assert done.code == 0, done.err
    measured = run_json(out)["weights"]
    assert len(measured) == 2 and all(name.startswith(f"{weights},calib=") for name in measured)
    assert sorted((f["calibration"]["file"], f["texts"]) for f in measured.values()) == [
        (str(first), 20), (str(second), 24),
    ]  # fmt: skip
    assert {f["sparsity"] for f in measured.values()} == {0.25}
    assert len(summarise(load_run(out))) == 2, "other calibration texts are other weights"


def test_pruning_says_which_layer_it_is_at(tmp_path: Path) -> None:
    from kvcli.config import SweepConfig
    from kvcli.engine.checking import check
    from kvcli.engine.prepare import prepare
    from kvcli.engine.reweighting import Models

    config = SweepConfig(methods=("snapkv",), ratios=("0.3",), tasks=("tb_recall",), limit=1, weights=(COARSE,),
                         out=str(tmp_path / "run"))  # fmt: skip
    seen: list[str] = []
    prepared = prepare(check(config), 1)
    models = Models(prepared, lambda text: None, lambda name, facts: None, lambda: False, watch=seen.append)
    models.enter(COARSE)
    layers = prepared.model_config.num_hidden_layers
    assert seen == [f"pruning layer {i + 1} of {layers}" for i in range(layers)]


def test_a_dry_run_names_the_weights(tmp_path: Path) -> None:
    done = call(*typed(GRID), "--weights", f"dense,{HALF}", "--dry-run", "--out", tmp_path / "run")
    assert done.code == 0 and "8 cells" in done.out and " s and the pruning (" in done.out
    assert f"tb_recall, 12 shots, {HALF}: 2 cells x 6 prompts" in done.out
    assert not (tmp_path / "run").exists()
