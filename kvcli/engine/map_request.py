"""What `kvcli attn-map` is asked for: which prompts, and whose attention is drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvcli.config import SweepConfig
from kvcli.engine.checking import Request, check
from kvcli.engine.prepare import Prepared
from kvcli.engine.prompts import PromptSet
from kvcli.errors import KvcliError, unknown
from kvcli.evals.spec import Sample, Score, Segment, Task

TEXT = "text"
"""The task of a user's own texts."""
PRESET = (15, 10, 32, 32)
"""Layer and head of the paper's heat maps, and how many of each its model has (KVFundaBench, arXiv:2502.01941, figures
1b and 2: LLaMA-3.1-8B-Instruct). Counted from 0 here; the paper does not say how it counts."""


@dataclass(frozen=True)
class Asked:
    """What `kvcli attn-map` is asked for. config: model, tasks, methods and how prompts are made; samples: only those;
    texts: (name, text) instead of a task's samples; layer, head: a number, 'mean', or None for the preset."""

    config: SweepConfig
    samples: tuple[str, ...] = ()
    texts: tuple[tuple[str, str], ...] = ()
    layer: str | None = None
    head: str | None = None
    blocks: int = 512


@dataclass(frozen=True, kw_only=True)
class Texts(Task):
    """A user's own texts as prompts."""

    texts: tuple[tuple[str, str], ...] = ()

    def samples(self, **_: Any) -> list[Sample]:
        return [Sample(name, (Segment(text, "context"),), "") for name, text in self.texts]

    def score(self, sample: Sample, output: str) -> Score:
        raise NotImplementedError("texts have no right answer")


def request_of(asked: Asked) -> Request:
    """Everything that can be checked without torch's weights. Raises KvcliError."""
    request = check(asked.config)
    if not asked.texts:
        return request
    texts = Texts(
        name=TEXT, version="1", ability="", metric="none", shots=0, max_new_tokens=0, texts=asked.texts,
        chat=asked.config.template == "chat",
    )  # fmt: skip
    return dataclasses.replace(request, tasks=(texts,), config=dataclasses.replace(request.config, tasks=(TEXT,)))


@dataclass(frozen=True)
class Group:
    """Prompts that are drawn together. whole: as they are read; before: the same, compressed before their question is
    known (`--query agnostic`), None where that is not asked for."""

    whole: PromptSet
    before: PromptSet | None

    @classmethod
    def of(cls, sets: Sequence[PromptSet], index: Sequence[int] | None) -> Group:
        """One task's prompts under one key but for the query mode; index: only these."""
        found = {s.key.query: _picked(s, index) for s in sets}
        any_set = next(iter(found.values()))
        whole = PromptSet(
            any_set.task, any_set.key._replace(query="aware"), any_set.samples, any_set.prompts, [], any_set.left_out
        )
        return cls(whole, found.get("agnostic"))


def _picked(s: PromptSet, index: Sequence[int] | None) -> PromptSet:
    if index is None:
        return s
    contexts = [s.contexts[i] for i in index] if s.contexts else []
    return PromptSet(s.task, s.key, [s.samples[i] for i in index], [s.prompts[i] for i in index], contexts)


def chosen_samples(prepared: Prepared, asked: Asked) -> list[Group]:
    """The prompts with the samples asked for. Raises KvcliError for a sample that no task has."""
    sets = list(prepared.prompt_sets.values())
    together: dict[Any, list[PromptSet]] = {}
    for s in sets:
        together.setdefault(s.key._replace(query="aware"), []).append(s)
    if not asked.samples:
        return [Group.of(alike, None) for alike in together.values() if alike[0].prompts]
    known = {sample.id for s in sets for sample in s.samples}
    for name in asked.samples:
        if name not in known:
            tasks = ",".join(dict.fromkeys(s.task.name for s in sets))
            listing = f"kvcli show RUN --task {sets[0].task.name}"
            raise unknown("sample", name, known, given=f"--task {tasks} --sample {name}", listing=listing)
    found = []
    for alike in together.values():
        index = [i for i, sample in enumerate(alike[0].samples) if sample.id in asked.samples]
        if index:
            found.append(Group.of(alike, index))
    return found


@dataclass(frozen=True)
class Chosen:
    """Whose attention is drawn. layers, heads: numbers; texts: as asked; note: why these, where it is a choice."""

    layers: tuple[int, ...]
    heads: tuple[int, ...]
    layer: str
    head: str
    note: str = ""

    @property
    def pairs(self) -> frozenset[tuple[int, int]]:
        return frozenset((layer, head) for layer in self.layers for head in self.heads)


def chosen_heads(asked: Asked, model_config: Any) -> Chosen:
    """The layers and heads of the large map. Raises KvcliError for numbers the model does not have."""
    config = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    counts = (int(config.num_hidden_layers), int(config.num_attention_heads))
    there = counts[0] > PRESET[0] and counts[1] > PRESET[1]
    texts, numbers, preset = [], [], []
    for option, text, count, usual, of in zip(
        ("--layer", "--head"), (asked.layer, asked.head), counts, PRESET[:2], PRESET[2:], strict=True
    ):
        if text is None:
            text = str(usual if there else min(count - 1, round(usual / of * count)))
            preset.append(option)
        if text != "mean" and not (text.isdigit() and int(text) < count):
            what = f"{option} must be a number from 0 to {count - 1}, or mean"
            raise KvcliError(what, given=f"{option} {text}", fix=f"{option} {count // 2}")
        texts.append(text)
        numbers.append(tuple(range(count)) if text == "mean" else (int(text),))
    return Chosen(numbers[0], numbers[1], texts[0], texts[1], _note(preset, counts, there))


def _note(preset: Sequence[str], counts: tuple[int, int], there: bool) -> str:
    """Why these, of the options that were not typed."""
    parts = {
        "--layer": (f"layer {PRESET[0]}", f"{counts[0]} layers"),
        "--head": (f"head {PRESET[1]}", f"{counts[1]} heads"),
    }
    names, sizes = (", ".join(parts[option][i] for option in preset) for i in (0, 1))
    if preset and not there:
        return f"the paper's {names} scaled to {sizes}"
    if "--layer" in preset and counts[0] == PRESET[0] + 1:
        here = f"layer {PRESET[0]} is the last of {counts[0]} here"
        return f"the paper's {names}; {here}, in the paper's model it is one in the middle"
    return ""
