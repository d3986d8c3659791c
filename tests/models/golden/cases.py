"""Small prompts written for the tests, and what is kept of them in the golden files."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from kvcli.config import stable_hash
from kvcli.errors import KvcliError
from kvcli.evals.loader import load_task, task_names
from kvcli.evals.spec import Sample, Segment
from kvcli.models.prompt import Prompt
from tests.models.golden.views import SHARED, TASK_VIEWS, VIEWS, View, real

FOLDER = Path(__file__).parent
PROMPTS, TASKS = FOLDER / "prompts.json", FOLDER / "task_prompts.json"
REGENERATE = "python -m tests.models.golden"
DATA = SHARED / "data"
LIMIT = 2

TWO_SHOTS = (
    Segment("Q: How many 北京 ducks are 2 and 3?\nA: 2 + 3 = 5. The answer is 5.\n\n", "shot", 0),
    Segment("Q: Zoë's café sells 4 🥐. She eats one. How many are left?\nA: 3", "shot", 1),
    Segment("\n\nQ: What's 1,234 + 5?\nA:", "question"),
)
CASES: dict[str, tuple[Sample, dict[str, Any]]] = {
    "two shots": (Sample("1", TWO_SHOTS, "1239"), {}),
    "a system text": (Sample("2", TWO_SHOTS, "1239"), {"system": "You are brief — and naïve."}),
    "blanks at both ends": (
        Sample("3", (Segment("  Count.\n\n", "system"), *TWO_SHOTS[:2], Segment("\nQ: 1 + 1?\nA: ", "question")), "2"),
        {},
    ),
    "a context, and shots in two places": (
        Sample(
            "4",
            (
                Segment("Notes: the dog is old. The cat, été, is not.\n", "context"),
                Segment("Q1: Who is old?\n", "shot", 0),
                Segment("Q2: Who is not?\n", "shot", 1),
                Segment("Q3: Who meows?\n", "question"),
                Segment("A1: the dog\n", "shot", 0),
                Segment("A2: the cat\n", "shot", 1),
                Segment("A3:", "question"),
            ),
            "the cat",
        ),
        {},
    ),
    "options": (
        Sample("5", (Segment("What is cold?\nA. ice\nB. fire\nAnswer:", "question"),), 0, options=(" A", " B")),
        {},
    ),
    "options behind a blank": (
        Sample("6", (Segment("Ice is ", "question"),), 0, options=("cold", "very hot", "naïve")),
        {"system": "Finish it."},
    ),
    "cut in the middle": (Sample("7", TWO_SHOTS, "1239"), {"max_prompt_tokens": 60, "truncate": "middle"}),
    "cut on the left": (Sample("8", TWO_SHOTS, "1239"), {"max_prompt_tokens": 60, "truncate": "left"}),
}


def written(view: View, case: str) -> dict[str, Any]:
    """A golden prompt: its regions with their text (joined they are the whole text), its ids and its options' ids."""
    sample, options = CASES[case]
    try:
        prompt = view.build(sample, **options)
    except KvcliError as error:
        return {"error": error.what}
    regions = [[r.label, r.start, r.end, prompt.span_text((r.start, r.end))] for r in prompt.regions]
    extra = {"options": prompt.options} if prompt.options else {}
    extra |= {"truncated": prompt.truncated} if prompt.truncated else {}
    return {"regions": regions, "ids": prompt.ids, **extra}


def task_params() -> list[Any]:
    """All tasks for a parametrised test; those with golden prompts need the shared rows."""
    golden = json.loads(TASKS.read_text(encoding="utf-8"))
    return [pytest.param(name, marks=[pytest.mark.shared] if name in golden else []) for name in task_names()]


@cache
def samples(task: str, tokenizer: str) -> tuple[Sample, ...]:
    """The first samples of a task under a tokenizer; skips the running test where its rows are not there."""
    found = load_task(task)

    def tokens(text: str) -> int:
        return len(real(tokenizer)(text, add_special_tokens=False, verbose=False)["input_ids"])

    try:
        return tuple(
            found.samples(shots=found.shots, shot_seed=0, limit=LIMIT, data_dir=str(DATA), tokens=tokens)
        )  # fmt: skip
    except KvcliError as error:
        if "--data-dir" in error.given and (error.what.startswith("no ") or " has no rows of " in error.what):
            pytest.skip(f"{task}: {error.what}")
        raise


@cache
def prompts(task: str, view: View) -> tuple[Prompt, ...]:
    chat = load_task(task).chat
    return tuple(view.build(sample, chat_allowed=chat, task=task) for sample in samples(task, view.files))


def hashed(task: str, view: View) -> list[Any]:
    """What is kept of a task's prompts, which are not ours to show: hash of the texts, tokens, tokens per region."""
    built = prompts(task, view)
    counts: dict[str, int] = {}
    for region in (r for prompt in built for r in prompt.regions):
        counts[region.kind] = counts.get(region.kind, 0) + len(region)
    texts = [prompt.text for prompt in built]
    options = [[len(ids) for ids in prompt.options] for prompt in built if prompt.options]
    kept = [stable_hash(texts, 16), sum(len(p.ids) for p in built), dict(sorted(counts.items()))]
    return [*kept, options] if options else kept


def regenerate() -> None:
    """Writes both golden files; tasks whose rows are not there keep what is written of them."""
    golden = {view.name: {case: written(view, case) for case in CASES} for view in VIEWS}
    PROMPTS.write_text(_lines(golden), encoding="utf-8")
    old = json.loads(TASKS.read_text(encoding="utf-8")) if TASKS.is_file() else {}
    new: dict[str, Any] = {}
    for task in task_names():
        try:
            new[task] = {view.name: hashed(task, view) for view in TASK_VIEWS}
        except pytest.skip.Exception:
            if task in old:
                new[task] = old[task]
    TASKS.write_text(_lines(new), encoding="utf-8")


def _lines(golden: dict[str, dict[str, Any]]) -> str:
    """JSON with one line per entry, so that a change shows which."""
    blocks = []
    for name, entries in golden.items():
        lines = [f"  {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in entries.items()]
        blocks.append(f" {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(blocks) + "\n}\n"
