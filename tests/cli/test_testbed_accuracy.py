"""kvcli testbed accuracy: its table fits a screen, without a model."""

from __future__ import annotations

import json

import pytest

from kvcli.engine import testbed_accuracy

FAMILIES = ("arithmetic", "choice", "code", "knowledge", "longgen", "needle", "recall", "safety")


@pytest.fixture
def measured(monkeypatch):
    rows = [
        {"length": n, "longest": n - 2, "accuracy": dict.fromkeys(FAMILIES, 0.995 - n / 10000.0)} for n in (160, 448)
    ]
    monkeypatch.setattr(testbed_accuracy, "measure", lambda *_: rows)
    return rows


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_line_for_each_family(kvcli, measured, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    done = kvcli("testbed", "accuracy", "--limit", "20", "--lengths", "160,448")
    assert done.code == 0 and max(map(len, done.out.splitlines())) <= width
    lines = [line.split() for line in done.out.splitlines() if line.strip()]
    assert lines[0] == "testbed: full cache, % right of 20 prompts each".split()
    assert lines[1] == "family 160 tokens 448 tokens".split()
    assert lines[3:] == [[name, "97.9", "95.0"] for name in FAMILIES]
    assert "longest prompts: 158, 446 tokens" in done.err and "next: kvcli sweep --model testbed" in done.err


def test_json_is_what_was_measured(kvcli, measured):
    done = kvcli("testbed", "accuracy", "--lengths", "160,448", "--json")
    assert json.loads(done.out) == measured
