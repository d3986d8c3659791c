"""Golden prompts. Regenerate after a change that is meant:  python -m tests.models.golden"""

from __future__ import annotations

import json
from typing import Any

import pytest

from kvcli.evals.loader import task_names
from tests.models.golden.cases import CASES, PROMPTS, REGENERATE, TASKS, hashed, task_params, written
from tests.models.golden.views import REAL, TASK_VIEWS, VIEWS, View, real

by_name = pytest.mark.parametrize("view", VIEWS, ids=[view.name for view in VIEWS])


@pytest.fixture(scope="module")
def golden() -> Any:
    return json.loads(PROMPTS.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def golden_tasks() -> Any:
    return json.loads(TASKS.read_text(encoding="utf-8"))


@pytest.mark.shared
@by_name
def test_written_prompts_are_the_golden_ones(view: View, golden: Any) -> None:
    assert list(golden[view.name]) == list(CASES)
    for case in CASES:
        assert written(view, case) == golden[view.name][case], f"{case}; {REGENERATE}"


@by_name
def test_golden_prompts_show_the_template(view: View, golden: Any) -> None:
    """What a reader may check by eye holds in the files themselves: beginning, end and place of the question."""
    regions = golden[view.name]["a system text"]["regions"]
    text = "".join(region[3] for region in regions)
    begins, ends = {
        "raw": ("You are brief", "A:"),
        "tinyllama chat": ("<|system|>\nYou are brief", "A:</s>\n<|assistant|>\n"),
        "qwen2.5 chat": ("<|im_start|>system\nYou are brief", "A:<|im_end|>\n<|im_start|>assistant\n"),
        "qwen3 chat": ("<|im_start|>system\nYou are", "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        "qwen3 chat thinking": ("<|im_start|>system\nYou are", "A:<|im_end|>\n<|im_start|>assistant\n"),
        "llama3 chat": (
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
            "Today Date: 26 Jul 2024\n\nYou are brief",
            "A:<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        "mistral chat": ("<s>[INST] You are brief — and naïve.\n\nQ: How", "A: [/INST]"),
        "r1 chat": ("<｜begin▁of▁sentence｜>You are brief — and naïve.<｜User｜>Q: How", "A:<｜Assistant｜><think>\n"),
    }[view.name if view.template == "chat" else "raw"]
    assert text.startswith(begins) and text.endswith(ends)
    assert [r[3] for r in regions if r[0] == "question"] == ["\n\nQ: What's 1,234 + 5?\nA:"]


@pytest.mark.parametrize("task", task_params())
def test_task_prompts_are_the_golden_ones(task: str, golden_tasks: Any) -> None:
    for name in REAL:
        real(name)
    found = {view.name: hashed(task, view) for view in TASK_VIEWS}
    assert task in golden_tasks, f"no golden prompts of {task}: {REGENERATE}"
    assert found == golden_tasks[task], REGENERATE


def test_no_golden_prompts_of_tasks_that_are_gone(golden_tasks: Any) -> None:
    assert set(golden_tasks) <= set(task_names()), REGENERATE
