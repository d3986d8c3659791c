"""Full-cache accuracy of a testbed model per family and prompt length (the table of docs/testbed.md)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kvcli.attention.capture import Needs
from kvcli.cache.rows import Row
from kvcli.engine.generate import Ask, Start, StopRules, end_tokens, generate
from kvcli.errors import KvcliError
from kvcli.evals.loader import find_tasks
from kvcli.evals.spec import Task
from kvcli.models import loader
from kvcli.models.prompt import Prompt, build_prompt
from kvcli.models.source import parse_model
from kvcli.models.wrapper import Model

BATCH = 20
ANSWER = 32
"""Tokens of the longest answer, and a little more."""
FEW = 4
"""Shorter prompts have room for fewer examples than the task's, these at least."""


def measure(
    name: str,
    samples: int,
    lengths: Sequence[int],
    tell: Callable[[int, str], None] = lambda done, label: None,
    suite: str = "testbed",
) -> list[dict[str, Any]]:
    """One row per length: {length, longest, samples, accuracy: {family: share of exact answers}}."""
    source = parse_model(name)
    config = loader.load_config(source)
    tokenizer = loader.load_tokenizer(source)
    model = Model(loader.load_weights(config, source, "float32", "cpu"), tokenizer, name=name)
    context = config.max_position_embeddings
    for length in lengths:
        if length + ANSWER > context:
            fix = f"--lengths up to {context - ANSWER}"
            raise KvcliError(f"{length} tokens do not fit {name}, its context is {context}", given=str(length), fix=fix)
    rows: list[dict[str, Any]] = []
    done = 0
    for length in lengths:
        row: dict[str, Any] = {"length": length, "longest": 0, "samples": samples, "accuracy": {}}
        for task in find_tasks([suite]):
            exam = dataclasses.replace(task, prompt_tokens=length, size=samples)  # type: ignore[call-arg]
            fewer = max(FEW, task.shots * length // task.prompt_tokens)  # type: ignore[attr-defined]
            share, longest = _accuracy(model, exam, min(task.shots, fewer))
            row["accuracy"][task.name.partition("_")[2]] = share
            row["longest"] = max(row["longest"], longest)
            done += 1
            tell(done, f"{task.name} at {length}")
        rows.append(row)
    return rows


def _accuracy(model: Model, task: Task, shots: int) -> tuple[float, int]:
    """(share of samples whose whole answer is right, longest prompt)."""
    samples = task.samples(shots=shots, shot_seed=0, limit=None, data_dir=None)
    prompts = [build_prompt(s, model.tokenizer, template="raw") for s in samples]
    right = 0
    for at in range(0, len(samples), BATCH):
        outputs = _answers(model, prompts[at : at + BATCH], task)
        right += sum(o == s.target for o, s in zip(outputs, samples[at : at + BATCH], strict=True))
    return right / len(samples), max(len(p.ids) for p in prompts)


def _answers(model: Model, prompts: Sequence[Prompt], task: Task) -> list[str]:
    done = model.prefill([p.ids for p in prompts], Needs(), [0] * len(prompts))
    rows = []
    for i, prompt in enumerate(prompts):
        dense = done.dense(i)
        rows.append(Row(dense.keys, dense.values, [torch.arange(len(prompt.ids) - 1)] * len(dense.keys)))
    rules = StopRules(task.max_new_tokens, end_tokens(model))
    starts = [Start(p.ids[-1], len(p.ids) - 1) for p in prompts]
    asks = [Ask(row, start, rules, tag=i) for i, (row, start) in enumerate(zip(rows, starts, strict=True))]
    texts = {ask.tag: out.text for ask, out in generate(model, asks)}
    return [texts[i] for i in range(len(prompts))]
