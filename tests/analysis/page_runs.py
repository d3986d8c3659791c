"""Result folders with prompts and outputs, for tests of the page."""

from __future__ import annotations

import base64
import json
import random
import re
import zlib
from pathlib import Path
from typing import Any

from tests.analysis.synthetic import METHODS, TASKS, FakeMethod, Spec, build

EVIL = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
WORDS = (
    "the of and to in is it that was for on are with as his they be at one have this from or had by hot word".split()
)


def data_in(html: str) -> dict[str, Any]:
    """What the page's script reads at once."""
    found: dict[str, Any] = json.loads(re.search(r'id="data">(.*?)</script>', html, re.S)[1])  # type: ignore[index]
    return found


def chunks_in(html: str) -> list[dict[str, Any]]:
    """What it unpacks where a row of a table is opened."""
    every = re.findall(r'id="chunk-\d+">([^<]*)</script>', html)
    return [json.loads(zlib.decompress(base64.b64decode(text))) for text in every]


def with_texts(folder: Path, *, harmful: bool = False) -> Path:
    """Two tasks, two methods, two ratios; every output and prompt holds a script."""
    spec = Spec(TASKS[1:3], METHODS[1:3], ("0.1", "0.5"), n=40)
    return _texts(build(folder, spec), output_words=12, shot_words=20, harmful=harmful)


def grid_run(folder: Path) -> Path:
    """7 tasks x 10 methods x 9 ratios x 200 samples with outputs of 100 words and prompts of 700."""
    methods = [m for m in METHODS if len(m.seeds) == 1] + [FakeMethod(f"method_{i}", 0.2 + i / 10) for i in range(3)]
    spec = Spec(TASKS[:7], methods[:10], tuple(f"0.{i}" for i in range(1, 10)), n=200)
    return _texts(build(folder, spec), output_words=100, shot_words=600, harmful=False)


def _texts(folder: Path, *, output_words: int, shot_words: int, harmful: bool) -> Path:
    draw = random.Random(1)
    prompts: dict[str, dict[str, object]] = {}
    shots: dict[str, str] = {}
    lines = []
    with (folder / "samples.jsonl").open() as file:
        for raw in file:
            line = json.loads(raw)
            shot = shots.setdefault(line["task"], " ".join(draw.choices(WORDS, k=shot_words)) + " ")
            name = f"{line['task']} {line['sample_id']}"
            if name not in prompts:
                question = f"{name} {EVIL} {' '.join(draw.choices(WORDS, k=100))}"
                prompts[name] = _prompt(name, line, shot, question)
            tokens = prompts[name]["n"]
            text = f"{' '.join(draw.choices(WORDS, k=output_words))} {EVIL}"
            line.update(output=text, target="right", prompt_sha=name, n_prompt=tokens, kept=20.0)
            line["kept_by_region"] = {"shot 0": 0.25, "question": 1.0}
            lines.append(json.dumps(line, separators=(",", ":")) + "\n")
    (folder / "samples.jsonl").write_text("".join(lines))
    (folder / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts.values()))
    if harmful:
        path = folder / "run.json"
        meta = json.loads(path.read_text())
        meta["tasks"] = {task: {**facts, "harmful": True} for task, facts in meta["tasks"].items()}
        path.write_text(json.dumps(meta))
    return folder


def _prompt(name: str, line: dict[str, object], shot: str, question: str) -> dict[str, object]:
    """One token per word; regions: one shot, the question."""
    ends, text = [], shot + question
    for i, sign in enumerate(text):
        if sign == " ":
            ends.append(i + 1)
    ends.append(len(text))
    first = shot.count(" ")
    return {
        "sha": name, "task": line["task"], "sample_id": line["sample_id"], "n": len(ends), "text": text,
        "offsets": ends, "regions": [["shot 0", 0, first], ["question", first, len(ends)]],
    }  # fmt: skip
