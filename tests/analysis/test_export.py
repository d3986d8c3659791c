"""Exports read back by pandas, pyarrow, lm-eval's own functions, and held to Every Eval Ever's schema."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from kvcli.analysis.exports import tables as export_tables
from kvcli.analysis.exports.shared import Wanted, export, hidden, variants
from kvcli.analysis.reading.load import Run, load_run
from kvcli.analysis.reports.contents import contents
from kvcli.analysis.tables.build import summarise
from kvcli.errors import KvcliError
from tests.analysis.synthetic import METHODS, TASKS, Spec, build, meta, record, write
from tests.analysis.tables_of import cell, data_of, right, tasks

SECRET = "zanzibar"
"""Stands in every text of the harmful task."""


def line(task: str, method: str, sample: int, score: float | None, **more: Any) -> dict[str, Any]:
    ok, harmful = score is not None, task == "attacks"
    text = SECRET if harmful else f'said "{sample}",\n<b>ü</b>'
    return record(
        cell_id=f"{task}-{method}", sample_id=f"s{sample}", task=task, ability="x", method=method,
        ratio=1.0 if method == "full" else 0.2, first_token="compressed", shots=4 if task == "sums" else 8, shot_seed=0,
        shot_order=0, draw=0, weights="dense", metric="accuracy", status="ok" if ok else "error", score=score,
        output=text if ok else None, extracted=text if ok and sample else None, target=text, n_prompt=50 + sample,
        measured_ratio=0.21, prompt_sha=f"{task}{sample}", finish="length" if sample == 1 else "stop", n_new=5,
        error=None if ok else f"bad {text}", **more,
    )  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Two tasks, one of them harmful; a failed sample, a graded score, flags, further figures, stored prompts."""
    folder = tmp_path / "demo"
    folder.mkdir()
    lines = [line(t, m, i, float(i != 2)) for t in ("sums", "attacks") for m in ("full", "snapkv") for i in range(4)]
    lines += [line("sums", "h2o", 0, 0.25, extra={"f1": 0.5}, flags=["noop", "simulated"], cluster="g", options=[-1.5]),
              line("sums", "h2o", 1, None)]  # fmt: skip
    write(folder / "samples.jsonl", lines)
    prompts = [{"sha": f"{t}{i}", "task": t, "text": None if t == "attacks" else f"prompt {i}"}
               for t in ("sums", "attacks") for i in range(4)]  # fmt: skip
    write(folder / "prompts.jsonl", prompts)
    facts = meta(Spec(), lines)
    facts["tasks"] = {"sums": {"harmful": False, "version": "1"}, "attacks": {"harmful": True, "version": "2"}}
    facts |= {"created": "2026-01-02T03:04:05Z", "updated": "2026-01-02T04:04:05Z", "kvcli": "0.1.0"}
    (folder / "run.json").write_text(json.dumps(facts))
    return load_run(folder)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


def holding(folder: Path) -> list[str]:
    return [p.name for p in folder.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]


# --- tables -----------------------------------------------------------------------------------------------------------


def test_parquet_holds_every_record(run: Run, tmp_path: Path) -> None:
    samples, cells = export(run, "parquet", tmp_path / "out")
    table = parquet.read_table(samples).to_pylist()
    assert (samples.name, cells.name) == ("samples.parquet", "cells.parquet")
    found = {(row["cell_id"], row["sample_id"]): row for row in table}
    assert len(found) == len(table) == len(run) == 18
    failed, graded = found["sums-h2o", "s1"], found["sums-h2o", "s0"]
    assert (failed["status"], failed["score"]) == ("error", None)
    assert (graded["score"], graded["extra.f1"], graded["flags"], graded["cluster"]) == (
        0.25,
        0.5,
        "noop simulated",
        "g",
    )
    assert (graded["ratio"], graded["n_prompt"], graded["seed"], graded["kl"]) == (0.2, 50, None, None)
    assert found["sums-full", "s1"]["cut_at_limit"] is True and found["sums-full", "s0"]["answered"] is False
    assert not {"output", "extracted", "target"} & set(table[0])


def test_csv_and_parquet_are_one_table(run: Run, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    for name in ("samples", "cells"):
        export(run, "csv", tmp_path / "csv", Wanted(outputs=True))
        export(run, "parquet", tmp_path / "parquet", Wanted(outputs=True))
        kinds = {"sample_id": str, "cluster": str, "flags": str, "decode": str, "match": str}
        read = pandas.read_csv(
            tmp_path / "csv" / f"{name}.csv", dtype=kinds, keep_default_na=False, na_values={"x": [""]}
        )
        other = parquet.read_table(tmp_path / "parquet" / f"{name}.parquet")
        assert list(read.columns) == other.column_names
        for field in other.schema:
            values = other.column(field.name).to_pylist()
            if pa.types.is_floating(field.type):
                mine = pandas.to_numeric(read[field.name]).to_numpy(float)
                np.testing.assert_array_equal(mine, [np.nan if v is None else v for v in values])
            elif pa.types.is_string(field.type):
                assert read[field.name].astype(str).tolist() == ["" if v is None else v for v in values]


def test_a_file_may_be_named(run: Run, tmp_path: Path) -> None:
    written = export(run, "csv", tmp_path / "a" / "mine.csv")
    assert [path.name for path in written] == ["mine.csv", "mine-cells.csv"]
    with pytest.raises(KvcliError, match="does not end as --format parquet"):
        export(run, "parquet", tmp_path / "mine.csv")


def test_cells_are_the_report_s(run: Run, tmp_path: Path) -> None:
    rows = parquet.read_table(export(run, "parquet", tmp_path)[1]).to_pylist()
    expected = [one for table in summarise(run) for one in ([table.full] if table.full else []) + table.cells()]
    assert [(r["method"], r["score"], r["n"]) for r in rows] == [(c.method, c.score, c.n) for c in expected]
    for row, one in zip(rows, expected, strict=True):
        change = one.difference
        assert row["difference"] == (change and change.value) and row["p"] == (change and change.p)
        assert row["established_alone"] == (one.verdict if change else None)
        assert row["cell_ids"] == " ".join(one.cell_ids)


def test_cells_have_the_verdict_that_considers_all_comparisons(tmp_path: Path) -> None:
    """Alone the loss is established; among the comparisons planned it is not."""
    lines = cell("t", "full", "1", right(40, 40)) + cell("t", "snapkv", "0.1", right(34, 40))
    many = [{**facts, "cell_id": f"{i}", "ratio": f"0.{i}"} for i in range(2, 9) for facts in lines[-1:]]
    data = data_of(tmp_path / "run", lines, tasks=tasks(t={"chance": 0.25}))
    described = {**data.run.meta["cells"], **{one["cell_id"]: one for one in many}}
    run = replace(data.run, meta={**data.run.meta, "cells": described})
    full, row = parquet.read_table(export(run, "parquet", tmp_path / "out")[1]).to_pylist()
    judged = contents(run).verdict(summarise(run)[0].cells()[0])
    assert judged is not None and judged.interval is not None
    assert (row["established_alone"], row["verdict"]) == ("loss", "not established")
    assert (row["family"], row["margin"]) == (8, 0.02)
    assert row["p_holm"] == judged.p and row["p_holm"] > row["p"]
    assert (row["simultaneous_low"], row["simultaneous_high"]) == (judged.interval.low, judged.interval.high)
    assert row["simultaneous_high"] > 0 > row["difference_high"]
    assert row["retention"] == pytest.approx((0.85 - 0.25) / 0.75)
    assert row["retention_low"] < row["retention"] < row["retention_high"]
    assert row["detectable"] == contents(run).detectable(summarise(run)[0].cells()[0].difference)
    assert (row["incoherent"], row["seeds"], row["draws"]) == (0.0, 1, 1)
    assert {full[name] for name in ("verdict", "family", "retention", "detectable", "established_alone")} == {None}


def test_the_margin_of_exported_verdicts_may_be_stated(tmp_path: Path) -> None:
    lines = cell("t", "full", "1", right(90, 100)) + cell("t", "snapkv", "0.1", right(90, 100))
    run = data_of(tmp_path / "run", lines).run
    rows = [parquet.read_table(export(run, "parquet", tmp_path / str(m), Wanted(margin=m))[1]).to_pylist()[1]
            for m in (0.02, 0.05)]  # fmt: skip
    assert [(row["verdict"], row["margin"]) for row in rows] == [("not established", 0.02), ("unchanged", 0.05)]


def test_tables_are_written_in_portions(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = parquet.read_table(export(run, "parquet", tmp_path / "whole", Wanted(outputs=True))[0])
    monkeypatch.setattr(export_tables, "ROWS", 4)
    parts = parquet.read_table(export(run, "parquet", tmp_path / "parts", Wanted(outputs=True))[0])
    assert parts.equals(whole)


def test_outputs_of_harmful_tasks_need_to_be_asked_for(run: Run, tmp_path: Path) -> None:
    rows = parquet.read_table(export(run, "parquet", tmp_path / "a", Wanted(outputs=True))[0]).to_pylist()
    assert {row["output"] for row in rows if row["task"] == "attacks"} == {None}
    assert {row["output"] for row in rows if row["method"] == "full" and row["task"] == "sums"} == {
        f'said "{i}",\n<b>ü</b>' for i in range(4)
    }
    rows = parquet.read_table(export(run, "parquet", tmp_path / "b", Wanted(outputs=True, harmful=True))[0]).to_pylist()
    assert {row["output"] for row in rows if row["task"] == "attacks"} == {SECRET}


def test_texts_of_a_task_that_run_json_does_not_know_stay(tmp_path: Path) -> None:
    run = load_run(build(tmp_path / "run", Spec(TASKS[:1], METHODS[1:2], n=3), with_meta=False))
    assert hidden(run, "tb_knowledge")
    rows = parquet.read_table(export(run, "parquet", tmp_path / "out", Wanted(outputs=True))[0]).to_pylist()
    assert {row["extracted"] for row in rows} == {None}


def test_a_failed_export_leaves_the_earlier_one(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = export(run, "csv", tmp_path / "out")[0]
    before = samples.read_bytes()

    def broken(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(export_tables, "_sample_columns", broken)
    with pytest.raises(RuntimeError):
        export(run, "csv", tmp_path / "out")
    assert samples.read_bytes() == before
    assert sorted(path.name for path in samples.parent.iterdir()) == ["cells.csv", "samples.csv"]


def test_unknown_formats_and_places_that_cannot_be_written_are_user_errors(run: Run, tmp_path: Path) -> None:
    with pytest.raises(KvcliError, match="unknown format"):
        export(run, "xlsx", tmp_path)
    (tmp_path / "file").touch()
    for form in ("csv", "lm-eval", "every-eval-ever"):
        with pytest.raises(KvcliError, match="cannot write to"):
            export(run, form, tmp_path / "file")


# --- variants ---------------------------------------------------------------------------------------------------------


def test_a_variant_is_one_method_with_one_size_over_all_tasks(run: Run) -> None:
    found = {variant.text: sorted(variant.cells) for variant in variants(run)}
    assert found == {
        "method=full,ratio=1": ["attacks", "sums"], "method=snapkv,ratio=0.2": ["attacks", "sums"],
        "method=h2o,ratio=0.2": ["sums"],
    }  # fmt: skip


def test_what_is_not_as_usual_stands_in_a_variant_s_name(tmp_path: Path) -> None:
    base = {"task": "t", "method": "m", "ratio": 0.2, "first_token": "compressed", "weights": "dense", "score": 1.0}
    ways: list[dict[str, Any]] = [
        {"shots": 4}, {"shots": 8}, {"shots": 4, "seed": 1}, {"shots": 4, "query": "agnostic"}, {"shots": 4, "draw": 2},
        {"shots": 4, "decode": {"ratio": "0.3", "interval": 1}}, {"shots": 4, "ratio": None, "budget": 64},
        {"shots": 4, "first_token": "prefill"}, {"shots": 4}, {"task": "u", "shots": 2},
    ]  # fmt: skip
    write(tmp_path / "samples.jsonl", [record(**{**base, "cell_id": f"c{i}", "sample_id": "1", **way})
                                       for i, way in enumerate(ways)])  # fmt: skip
    assert [variant.text for variant in variants(load_run(tmp_path))] == [
        "method=m,ratio=0.2,shots=4", "method=m,ratio=0.2,shots=8", "method=m,ratio=0.2,shots=4,seed=1",
        "method=m,ratio=0.2,query=agnostic,shots=4", "method=m,ratio=0.2,shots=4,draw=2",
        "method=m,ratio=0.2,shots=4,decode_ratio=0.3", "method=m,budget=64,shots=4",
        "method=m,ratio=0.2,first_token=prefill,shots=4", "method=m,ratio=0.2,shots=4,cell=c8",
        "method=m,ratio=0.2,shots=2",
    ]  # fmt: skip


# --- lm-evaluation-harness --------------------------------------------------------------------------------------------


def test_lm_eval_s_own_functions_read_the_files(run: Run, tmp_path: Path) -> None:
    utils = pytest.importorskip("lm_eval.utils")
    files = [str(path) for path in export(run, "lm-eval", tmp_path / "out")]
    results, samples = utils.get_results_filenames(files), utils.get_sample_results_filenames(files)
    assert sorted(results + samples) == sorted(files) and len(results) == 3
    assert {utils.get_file_task_name(Path(name).name) for name in samples} == {"sums", "attacks"}
    assert {utils.get_file_datetime(Path(name).name) for name in samples} == {"2026-01-02T04-04-05.000000"}
    for name in results:
        loaded = json.loads(Path(name).read_text())
        assert Path(name).parent.name == utils.sanitize_model_name(loaded["model_name"])
        text = utils.make_table(loaded)
        assert "accuracy" in text and ("attacks" in text) == ("h2o" not in name)


def test_lm_eval_s_schema_knows_every_key(run: Run, tmp_path: Path) -> None:
    schema = pytest.importorskip("lm_eval.result_schema")
    for path in export(run, "lm-eval", tmp_path / "out"):
        if path.suffix == ".json":
            assert set(json.loads(path.read_text())) <= set(schema.EvalResults.__annotations__)
        for sample in lines_of(path) if path.suffix == ".jsonl" else ():
            assert set(sample) - {"accuracy", "f1"} == set(schema.SampleResult.__annotations__)


def test_lm_eval_figures(run: Run, tmp_path: Path) -> None:
    export(run, "lm-eval", tmp_path)
    folder = tmp_path / "testbed,method=snapkv,ratio=0.2"
    found = json.loads(next(folder.glob("results_*.json")).read_text())
    api = pytest.importorskip("lm_eval.api.metrics")
    scores = [1.0, 1.0, 0.0, 1.0]
    assert found["results"]["sums"]["accuracy,none"] == api.mean(scores)
    assert found["results"]["sums"]["accuracy_stderr,none"] == pytest.approx(api.mean_stderr(scores), rel=1e-12)
    assert found["n-shot"] == {"sums": 4, "attacks": 8} and found["versions"] == {"sums": "1", "attacks": "2"}
    assert found["config"]["model_args"] == "pretrained=testbed,method=snapkv,ratio=0.2"
    assert found["config"]["kvcli"]["measured_ratio"]["sums"] == pytest.approx(0.21)
    assert found["config"]["kvcli"]["outputs"]["sums"] == {"no_answer": 0.25, "incoherent": 0.0, "cut_at_limit": 0.25}
    lines = lines_of(next(folder.glob("samples_sums_*.jsonl")))
    assert [s["doc_id"] for s in lines] == [0, 1, 2, 3] and [s["accuracy"] for s in lines] == scores
    assert [s["arguments"]["gen_args_0"]["arg_0"] for s in lines] == [f"prompt {i}" for i in range(4)]
    assert lines[0]["filtered_resps"] == ["[invalid]"] and lines[1]["filtered_resps"] == [lines[1]["target"]]
    hidden_ones = lines_of(next(folder.glob("samples_attacks_*.jsonl")))
    assert {(s["filtered_resps"][0], s["target"], s["arguments"]["gen_args_0"]["arg_0"]) for s in hidden_ones} == {
        ("", "", "")
    }
    hashes = "".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in lines)
    assert found["task_hashes"]["sums"] == hashlib.sha256(hashes.encode()).hexdigest()


def test_lm_eval_leaves_failed_samples_out_and_says_so(run: Run, tmp_path: Path) -> None:
    export(run, "lm-eval", tmp_path)
    folder = tmp_path / "testbed,method=h2o,ratio=0.2"
    found = json.loads(next(folder.glob("results_*.json")).read_text())
    assert found["n-samples"] == {"sums": {"original": 2, "effective": 1}}
    assert found["config"]["kvcli"]["failed"] == {"sums": 1}
    assert found["results"]["sums"]["accuracy_stderr,none"] == "N/A" and found["results"]["sums"]["f1,none"] == 0.5
    (sample,) = lines_of(next(folder.glob("samples_*.jsonl")))
    assert sample["resps"] == [[["-1.5", "None"]]] and sample["metrics"] == ["accuracy", "f1"]


def test_datasets_loads_the_samples(run: Run, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    paths = [str(p) for p in export(run, "lm-eval", tmp_path / "out") if p.name.startswith("samples_sums")]
    loaded = datasets.load_dataset("json", data_files=paths[:2], split="train", cache_dir=str(tmp_path / "cache"))
    assert len(loaded) == 8 and loaded[0]["doc"]["id"] == "s0"


# --- Every Eval Ever --------------------------------------------------------------------------------------------------

REQUIRED = {"schema_version", "evaluation_id", "retrieved_timestamp", "source_metadata", "model_info", "eval_library",
            "evaluation_results"}  # fmt: skip
REQUIRED_OF_A_SAMPLE = {"schema_version", "evaluation_id", "model_id", "evaluation_name", "sample_id",
                        "interaction_type", "input", "answer_attribution", "evaluation"}  # fmt: skip
PLACE = re.compile(r"data/kvcli/kvcli/testbed/[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
                   r"(_samples\.jsonl|\.json)")  # fmt: skip


def logs(folder: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in (folder / "data").rglob("*.json")]
    return {log["eval_library"]["additional_details"]["variant"]: log for log in found}


def test_every_eval_ever_s_rules_hold(run: Run, tmp_path: Path) -> None:
    """Those of schema 0.3.0 and of its validator that concern how files and records belong together."""
    written = export(run, "every-eval-ever", tmp_path)
    assert len(written) == 6 and all(PLACE.fullmatch(str(path.relative_to(tmp_path))) for path in written)
    for log in logs(tmp_path).values():
        assert set(log) - REQUIRED == {"evaluation_timestamp", "detailed_evaluation_results"}
        detail = log["detailed_evaluation_results"]
        data = (tmp_path / detail["file_path"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == detail["checksum"]
        lines = [json.loads(text) for text in data.splitlines()]
        assert len(lines) == detail["total_rows"]
        results = {result["evaluation_result_id"]: result for result in log["evaluation_results"]}
        for sample in lines:
            assert set(sample) >= REQUIRED_OF_A_SAMPLE
            assert sample["evaluation_id"] == log["evaluation_id"] and sample["model_id"] == log["model_info"]["id"]
            assert results[sample["evaluation_result_id"]]["evaluation_name"] == sample["evaluation_name"]
            assert all(isinstance(value, str) for value in sample["metadata"].values())
        for result in results.values():
            metric, score = result["metric_config"], result["score_details"]["score"]
            assert metric["min_score"] <= score <= metric["max_score"]
            assert all(isinstance(v, str) for v in result["generation_config"]["additional_details"].values())


def test_every_eval_ever_s_own_models_accept_the_records(run: Run, tmp_path: Path) -> None:
    types = pytest.importorskip("every_eval_ever.eval_types", reason="the package every_eval_ever is not installed")
    instances = pytest.importorskip("every_eval_ever.instance_level_types")
    for path in export(run, "every-eval-ever", tmp_path):
        if path.suffix == ".json":
            types.EvaluationLog.model_validate_json(path.read_text())
        else:
            for text in path.read_text().splitlines():
                instances.InstanceLevelEvaluationLog.model_validate_json(text)


def test_every_eval_ever_figures(run: Run, tmp_path: Path) -> None:
    export(run, "every-eval-ever", tmp_path, Wanted(organization="A lab", relationship="third_party"))
    found = logs(tmp_path)
    assert set(found) == {variant.text for variant in variants(run)}
    assert len({log["evaluation_id"] for log in found.values()}) == 3
    log = found["method=snapkv,ratio=0.2"]
    assert log["source_metadata"]["source_organization_name"] == "A lab"
    result = next(r for r in log["evaluation_results"] if r["evaluation_name"] == "sums")
    summary = next(c for t in summarise(run) if t.task == "sums" for c in t.cells() if c.method == "snapkv")
    ends = result["score_details"]["uncertainty"]["confidence_interval"]
    assert summary.interval is not None
    assert result["score_details"]["score"] == summary.score
    assert (ends["lower"], ends["upper"]) == (summary.interval.low, summary.interval.high)
    assert result["generation_config"]["additional_details"]["ratio"] == "0.2"
    shares = {
        name: float(result["score_details"]["details"][name]) for name in ("no_answer", "incoherent", "cut_at_limit")
    }
    assert shares == {
        "no_answer": summary.no_answer,
        "incoherent": summary.incoherent,
        "cut_at_limit": summary.truncated,
    }
    assert {r["metric_config"]["score_type"] for r in log["evaluation_results"]} == {"binary", "continuous"}


def test_a_second_export_replaces_the_first(run: Run, tmp_path: Path) -> None:
    assert export(run, "every-eval-ever", tmp_path) == export(run, "every-eval-ever", tmp_path)
    assert export(run, "lm-eval", tmp_path / "l") == export(run, "lm-eval", tmp_path / "l")
    assert sum(path.is_file() for path in (tmp_path / "data").rglob("*")) == 6


@pytest.mark.parametrize(
    ("model", "expected"),
    [("testbed", "kvcli/testbed"), ("org/Name-1.5B", "org/Name-1.5B"), ("mymodel", "local/mymodel"),
     ("random:tiny", "local/tiny"), ("./a/b", "local/._a_b")],
)  # fmt: skip
def test_models_without_a_hub_id_say_so(tmp_path: Path, model: str, expected: str) -> None:
    build(tmp_path / "run", Spec(TASKS[:1], METHODS[1:2], ("0.1",), n=2, model=model))
    export(load_run(tmp_path / "run"), "every-eval-ever", tmp_path / "out")
    assert {log["model_info"]["id"] for log in logs(tmp_path / "out").values()} == {expected}


# --- harmful tasks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["csv", "parquet", "lm-eval", "every-eval-ever"])
def test_no_text_of_a_harmful_task_leaves_unasked(run: Run, tmp_path: Path, form: str) -> None:
    export(run, form, tmp_path / "out", Wanted(outputs=True))
    assert holding(tmp_path / "out") == []
    export(run, form, tmp_path / "asked", Wanted(outputs=True, harmful=True))
    assert holding(tmp_path / "asked") != []


@pytest.mark.parametrize("form", ["lm-eval", "every-eval-ever"])
def test_prompts_that_were_not_stored_are_not_exported(run: Run, tmp_path: Path, form: str) -> None:
    export(run, form, tmp_path, Wanted(harmful=True))
    text = "".join(path.read_text() for path in tmp_path.rglob("*.jsonl") if "demo" not in path.parts)
    assert "prompt 1" in text and "attacks1" in text
    assert not re.search(r'"(raw|arg_0)": "[^"]*attack', text)
