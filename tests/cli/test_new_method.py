"""kvcli new-method says how to run the test it writes, also where pytest is not installed."""

from __future__ import annotations

import importlib.util

import pytest


@pytest.mark.parametrize("package", [False, True])
def test_how_to_run_the_test_is_said(kvcli, tmp_path, monkeypatch, package):
    monkeypatch.chdir(tmp_path)
    more = ["--package"] if package else []
    test = "kvcli-mine" if package else "test_mine.py"
    done = kvcli("new-method", "mine", *more)
    assert done.code == 0 and f"python -m pytest {test}\n" in done.err and "pip install pytest" not in done.err
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pytest" else found(name))
    done = kvcli("new-method", "mine", *more, "--out", "other")
    assert done.code == 0 and f"pip install pytest && python -m pytest other/{test}\n" in done.err
