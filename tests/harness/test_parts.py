"""What needs no lm-eval: prompts cut into segments, requests as samples, and the message where it is missing."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvcli.errors import KvcliError
from kvcli.evals.harness import package
from kvcli.evals.harness.live import cut
from kvcli.evals.harness.tasks import find
from kvcli.harness.requests import request, settings_text
from tests.harness.reference import NO_HARNESS


def test_the_builder_s_turns_are_shots_and_question() -> None:
    segments, spans = cut("About it.\n\nQ: a A: b\n\nQ: c A:", ["Q: a A: b\n\n", "Q: c A:"], 1, "unused")
    assert spans == "shots"
    assert [(s.text, s.region, s.shot) for s in segments] == [
        ("About it.\n\n", "system", -1), ("Q: a A: b\n\n", "shot", 0), ("Q: c A:", "question", -1),
    ]  # fmt: skip


@pytest.mark.parametrize("turns", [[], ["Q: c A:"], ["something else", "Q: c A:"], ["a", "b", "Q: c A:"]])
def test_turns_that_do_not_make_up_the_prompt_leave_one_context(turns: list[str]) -> None:
    segments, spans = cut("Q: a A: b\n\nQ: c A:", turns, 1, "Q: c A:")
    assert spans == "context"
    assert [(s.text, s.region) for s in segments] == [("Q: a A: b\n\n", "context"), ("Q: c A:", "question")]


def test_a_prompt_without_the_question_s_text_is_all_question() -> None:
    segments, spans = cut("Q: a A: b\n\nQ: c A:", [], 1, 3)
    assert (spans, [(s.text, s.region) for s in segments]) == ("none", [("Q: a A: b\n\nQ: c A:", "question")])


@pytest.mark.parametrize(
    ("prompt", "regions"),
    [
        ("Q: a A: b\n\nQ: c A:", [("Q: a A: b\n\n", "context"), ("Q: c A:", "question")]),
        ("one\n\ntwo\n\nQ:", [("one\n\ntwo\n\n", "context"), ("Q:", "question")]),
        ("Q: c A:", [("Q: c A:", "question")]),
        ("Q: c A:\n\n", [("Q: c A:\n\n", "question")]),
    ],
)
def test_a_request_s_context_ends_at_the_last_delimiter(prompt: str, regions: list[tuple[str, str]]) -> None:
    assert [(s.text, s.region) for s in request(0, prompt, "\n\n").segments] == regions


def test_settings_behind_a_method_become_its_text() -> None:
    assert settings_text("snapkv", {}) == "snapkv"
    assert settings_text("snapkv", {"window": 16, "kernel": 5}) == "snapkv:window=16,kernel=5"
    assert settings_text("adakv:base=snapkv", {"alpha": 0.2}) == "adakv:base=snapkv,alpha=0.2"
    assert settings_text("x", {"a": True, "b": None, "c": 1}) == "x:a=true,b=none,c=1"


def test_without_lm_eval_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(KvcliError, match="lm-evaluation-harness is not installed") as e:
        find("nobody_asked_for_this_name_before")
    assert e.value.fix == "pip install 'kvcli[lm-eval]'"


def test_written_exemplars_of_a_task_or_why_there_are_none() -> None:
    pytest.importorskip("lm_eval", reason=NO_HARNESS)
    rows, why = package.samples_of("gsm8k_cot")
    assert len(rows) == 8 and why == "" and set(rows[0]) == {"question", "target"}
    for name in ("hellaswag", "nobody_has_this_task"):
        assert package.samples_of(name) == ([], f"the installed lm-eval has none in its task '{name}'")


def test_finding_tasks_imports_no_torch() -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'lm_eval'}"
    code = f"import sys, kvcli.evals.harness.tasks; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "[]", done.stderr


def test_other_functions_make_another_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvcli.evals.harness import tasks

    monkeypatch.setattr(tasks.package, "version", lambda: "0")

    def digest(code: str, **settings: Any) -> str:
        file = tmp_path / "functions.py"
        file.write_text(code)
        space: dict[str, Any] = {}
        exec(compile(code, str(file), "exec"), space)
        return tasks._digest({"task": "x", "process_docs": space["f"], **settings})

    first = digest("def f(x):\n    return x\n")
    assert digest("def f(x):\n    return x\n") == first
    assert digest("def f(x):\n    return g(x)\n") != first
    assert digest("def f(x):\n    return x\n\nLIMIT = 3\n") != first
    assert digest("def f(x):\n    return x\n", description="new") != first
    assert digest("def f(x):\n    return x\n", metadata={"config_source": "/elsewhere"}) == digest(
        "def f(x):\n    return x\n", metadata={}
    )
