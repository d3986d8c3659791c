"""Small runs with chosen scores: every test says which sample is right in which cell."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvcli.analysis.findings import Data
from kvcli.analysis.reading.load import load_run
from kvcli.analysis.tables.build import summarise
from kvcli.analysis.tables.scores import SampleScores
from tests.analysis.synthetic import record, write

Scores = Sequence[float]


def cell(task: str, method: str, ratio: str, scores: Scores, **facts: Any) -> list[dict[str, Any]]:
    """The records of one cell; the scores are those of samples 0, 1, ..."""
    name = f"{task} {method} {ratio} " + " ".join(f"{k}={v}" for k, v in sorted(facts.items()))
    base = {"shots": 8, "first_token": "compressed", "measured_ratio": float(ratio), "extracted": "x", **facts}
    return [
        record(cell_id=name, sample_id=f"{task}-{i}", task=task, method=method, ratio=ratio, score=float(s), **base)
        for i, s in enumerate(scores)
    ]


def right(count: int, n: int) -> list[float]:
    """The first `count` of n samples are right."""
    return [float(i < count) for i in range(n)]


def folder_of(path: Path, lines: Sequence[dict[str, Any]], **meta: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    write(path / "samples.jsonl", lines)
    facts = ("task", "method", "ratio", "first_token", "query", "shots", "seed", "decode", "shot_seed", "shot_order")
    described = {line["cell_id"]: {name: line[name] for name in facts} for line in lines}
    document = {"status": "done", "config": {"model": meta.pop("model", "testbed")}, "cells": described, **meta}
    (path / "run.json").write_text(json.dumps(document))
    return path


def data_of(path: Path, lines: Sequence[dict[str, Any]], **meta: Any) -> Data:
    run = load_run(folder_of(path, lines, **meta))
    return Data(run, summarise(run), SampleScores(run))


def tasks(**facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: {"chance": 0.0, "version": "1", **more} for name, more in facts.items()}
