"""From a config to cells: the points of the grid, each with everything that changes its results. Knows no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import product
from typing import Any, NamedTuple

from kvcli.config import SweepConfig, stable_hash
from kvcli.errors import KvcliError
from kvcli.evals.loader import own_digest
from kvcli.evals.spec import Task
from kvcli.grammar import MethodText, parse_methods
from kvcli.methods import catalog
from kvcli.methods.base import Method, Reader
from kvcli.methods.composed import transform_of
from kvcli.models import profiles
from kvcli.models.source import parse_model
from kvcli.weights.spec import DENSE, Weights, resolve


class PromptKey(NamedTuple):
    """What decides the prompts of a task, and which part of them is compressed."""

    task: str
    shots: int
    shot_seed: int = 0
    shot_order: int = 0
    query: str = "aware"

    def __str__(self) -> str:
        named = (("e", self.shot_seed), ("o", self.shot_order), ("q", self.query if self.query != "aware" else ""))
        return f"{self.task}-s{self.shots}" + "".join(f"-{letter}{value}" for letter, value in named if value)


@dataclass(frozen=True)
class Anchor:
    """A method whose bytes others are held to, prompt by prompt, and what was asked of it."""

    method: str
    ratio: str | None = None
    budget: int | None = None

    def __str__(self) -> str:
        if self.ratio is not None:
            return f"{self.method}@{self.ratio}"
        return self.method if self.budget is None else f"{self.method}@{self.budget} KV"


@dataclass(frozen=True)
class Cell:
    """Everything that changes results, for one curve point; `id` is the hash of `key`."""

    id: str
    task: str
    shots: int
    method: str
    ratio: str | None
    budget: int | None
    first_token: str
    seed: int | None
    key: dict[str, Any]
    decode: dict[str, Any] | None = None
    """How generated tokens are compressed: ratio, budget or cap, and interval; None: they are all kept."""
    draw: int = 0
    """Which of several sampled answers this is."""
    transformed: bool = False
    """Whether its pairs are stored in another form."""
    reading: bool = False
    """Whether each new token reads only some of the pairs."""
    weights: str = DENSE
    """The model's weights, as records name them."""
    match: Anchor | None = None
    """Whose bytes its budget is, in place of a ratio or a size."""
    shot_seed: int = 0
    shot_order: int = 0
    query: str = "aware"
    """agnostic: what stands before the question is compressed without having seen it."""

    @property
    def storage(self) -> str:
        """Rows of one kind share a decode batch: caches that only grow, those stored in other forms, or those of one
        method that evicts on."""
        if self.decode or self.reading:
            return self.method
        return "stored" if self.transformed else ""

    @property
    def prompt_key(self) -> PromptKey:
        """Cells with the same one share prompts, and of the same weights prefills too."""
        return PromptKey(self.task, self.shots, self.shot_seed, self.shot_order, self.query)

    def describe(self) -> dict[str, Any]:
        return dict(self.key)


def make_cells(config: SweepConfig, tasks: Iterable[Task], facts: dict[str, Any]) -> list[Cell]:
    """All cells of the grid, `full` first. facts: model identity and template, part of every key.

    Raises KvcliError where the calibration texts of pruned weights cannot be had.
    """
    methods = [(text, catalog.build(text)) for text in parse_methods(config.methods)]
    full = parse_methods(["full"])[0]
    if config.full:
        methods = [(full, catalog.build(full)), *[m for m in methods if m[0] != full]]
    anchors = [a for text, method in methods if is_anchor(method) for a in _anchors(config, text, method)]
    cells: dict[str, Cell] = {}
    axis = [(w, {**facts, **w.facts()} if w.pruning else facts) for w in resolve(config.weights, config.calib)]
    for (weights, known), task in product(axis, list(tasks)):
        for prompts in prompt_keys(config, task):
            for text, method in methods:
                sizes = _sizes(config, method, anchors)
                for first_token in _first_tokens(config, method, prompts):
                    for cell in _method_cells(config, task, prompts, first_token, text, method, sizes, known, weights):
                        cells.setdefault(cell.id, cell)
    return list(cells.values())


def prompt_keys(config: SweepConfig, task: Task) -> list[PromptKey]:
    """The prompt sets of one task."""
    axes = (config.shots or (task.usual_shots,), config.shot_seeds, config.shot_orders, config.query)
    keys = (PromptKey(task.name, *values) for values in product(*axes))
    first = (config.shot_seeds[0], 0)  # without shots there are no others to draw or to order
    return list(dict.fromkeys(key if key.shots else PromptKey(key.task, 0, *first, key.query) for key in keys))


def _first_tokens(config: SweepConfig, method: Method, prompts: PromptKey) -> tuple[str, ...]:
    """Behind a question that is read through the compressed cache, so is the answer's first token."""
    if prompts.query == "agnostic":
        return ("compressed",)
    return config.first_token if method.kind != "in-prefill" else ("n/a",)


Size = tuple[str | None, int | None, Anchor | None]
"""Kept ratio, budget or whose bytes; nothing of it where the method's own settings decide."""


def is_anchor(method: Method) -> bool:
    """Whether its bytes are its own affair: it has no ratio, or what it keeps is stored in another form. Not where it
    keeps everything, only reads less, or reads the prompt anew."""
    if isinstance(method, Reader) or method.kind == "in-prefill" or method.domain.points == (1.0,):
        return False
    return method.domain.kind != "continuous" or transform_of(method) is not None


def is_matched(method: Method) -> bool:
    """Whether it can be set to any number of bytes: it has a ratio, and what it keeps is stored as it is."""
    return method.domain.kind == "continuous" and transform_of(method) is None


def _sizes(config: SweepConfig, method: Method, anchors: Sequence[Anchor] = ()) -> list[Size]:
    if config.match and is_matched(method):
        return [(None, None, anchor) for anchor in anchors]
    if method.domain.kind == "continuous":
        return [(r, None, None) for r in config.ratios] + [(None, b, None) for b in config.budgets]
    return [("1", None, None)] if method.domain.points == (1.0,) else [(None, None, None)]


def _anchors(config: SweepConfig, text: MethodText, method: Method) -> list[Anchor]:
    return [Anchor(str(text), ratio, budget) for ratio, budget, _ in _sizes(config, method)] if config.match else []


def _method_cells(
    config: SweepConfig,
    task: Task,
    prompts: PromptKey,
    first_token: str,
    text: MethodText,
    method: Method,
    sizes: Sequence[Size],
    facts: dict[str, Any],
    weights: Weights,
) -> Iterator[Cell]:
    aware = prompts.query == "aware"
    if aware and first_token == "compressed" and not method.keeps_last:
        what = f"{text} may evict the last prompt token, which is fed again through the compressed cache"
        raise KvcliError(what, given=f"--method {text} --first-token {first_token}", fix="--first-token prefill")
    profile = profiles.check_profiles(parse_model(config.model), method.needs())
    generated = task.output_type != "multiple_choice"
    drawn = bool(config.temperature) and generated
    draws = config.draws if drawn else 1
    for ratio, budget, anchor in sizes:
        more: dict[str, Any] = {"match": _anchor_key(config, anchor)} if anchor else {}
        more |= {"head_profile": profile} if profile else {}
        more |= {"shot_order": prompts.shot_order} if prompts.shot_order else {}
        seeded = method.seeded or drawn or (anchor and catalog.build(anchor.method).seeded)
        for seed in config.seeds if seeded else (None,):
            for decode in decode_settings(config, method, ratio) if generated else (None,):
                for draw in range(draws):
                    key = {
                        **facts,
                        "task": task.name, "task_version": task.version, "task_digest": own_digest(task),
                        "shots": prompts.shots, "shot_seed": prompts.shot_seed,
                        "method": str(text), "method_code": catalog.code_hash(text), "ratio": ratio, "budget": budget,
                        "strict_window": config.strict_window, "first_token": first_token, "query": prompts.query,
                        "decode": decode, "seed": seed, "temperature": config.temperature, "top_p": config.top_p,
                        "draw": draw, "max_new_tokens": config.max_new_tokens or task.max_new_tokens,
                        "ignore_eos": config.ignore_eos, **more,
                    }  # fmt: skip
                    yield Cell(stable_hash(key), task.name, prompts.shots, str(text), ratio, budget, first_token, seed,
                               key, decode, draw, transform_of(method) is not None, isinstance(method, Reader),
                               weights.text, anchor, *prompts[2:])  # fmt: skip


def _anchor_key(config: SweepConfig, anchor: Anchor) -> dict[str, Any]:
    """Everything that decides the anchor's bytes."""
    profile = profiles.check_profiles(parse_model(config.model), catalog.build(anchor.method).needs())
    found = {**dataclasses.asdict(anchor), "code": catalog.code_hash(parse_methods([anchor.method])[0])}
    return found | ({"head_profile": profile} if profile else {})


def decode_settings(config: SweepConfig, method: Method, ratio: str | None) -> list[dict[str, Any] | None]:
    """The decode axis for one method and ratio: None where every generated token is kept.

    ratio: r_d; budget: generated tokens kept; cap: the pool stays at its size; rule: the method's own decides.
    """
    if not method.decodes():
        return [None]
    interval = {"interval": config.decode_interval}
    if method.decoding == "own":
        rest = any(text != "off" for text in config.decode_ratios) or config.decode_budgets or config.cap == "fixed"
        off = "off" in config.decode_ratios and not config.decode_budgets and config.cap != "fixed"
        return [None] * off + [{"rule": "own", **interval}] * bool(rest)
    if config.cap == "fixed":
        return [{"cap": "fixed", **interval}] if method.decoding == "unified" else [None]
    if config.decode_budgets:
        return [{"budget": size, **interval} for size in config.decode_budgets]
    found: list[dict[str, Any] | None] = []
    for text in config.decode_ratios:
        value = ratio if text == "same" else text
        found.append(None if text == "off" or value is None else {"ratio": value, **interval})
    return list({stable_hash(item): item for item in found}.values())


def ratio_of(cell: Cell | Anchor) -> Decimal | None:
    return Decimal(cell.ratio) if cell.ratio is not None else None
