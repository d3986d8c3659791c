"""From a config to cells, prefill batches and decode batches. A function of the config alone; knows no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
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

MAX_DECODE_ROWS = 256


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


@dataclass(frozen=True)
class DecodeBatch:
    """Rows (index of the sample in its prefill batch, cell) that decode together."""

    id: str
    rows: tuple[tuple[int, Cell], ...]


@dataclass(frozen=True)
class PrefillBatch:
    """Samples [start, end) of one prompt set, prefilled together for all its cells of one generation of the grid."""

    id: str
    prompts: PromptKey
    start: int
    end: int
    samples: int
    """How many samples of the prompt set this generation of the grid has."""
    cells: tuple[Cell, ...]
    weights: str = DENSE

    def decode_batches(self, rows: int, waves: int = 1) -> Iterator[DecodeBatch]:
        """Rows of one storage kind, in order of falling ratio, so that rows side by side are about equally long.

        rows: how many rows of a full cache fit in memory; of smaller ones accordingly more, at most MAX_DECODE_ROWS.
        waves: how many times that many rows a batch has, those that wait entering as others end.
        """
        number = 0
        for kind in dict.fromkeys(cell.storage for cell in self.cells):
            batch: list[tuple[int, Cell]] = []
            share = filled = widest = 0.0
            for cell in sorted((c for c in self.cells if c.storage == kind), key=_order):
                for i in range(self.end - self.start):
                    wider = max(widest, _share(cell))  # a wave is padded to its longest row
                    if batch and ((share + 1) * wider > rows or share >= max(rows, MAX_DECODE_ROWS)):
                        filled, share, wider = filled + 1, 0.0, _share(cell)
                        if filled >= waves:
                            yield DecodeBatch(f"{self.id}-d{number:03d}", tuple(batch))
                            batch, number, filled = [], number + 1, 0.0
                    batch.append((i, cell))
                    share, widest = share + 1, wider
            if batch:
                yield DecodeBatch(f"{self.id}-d{number:03d}", tuple(batch))
                number += 1


WAVES = 4
"""Rows that enter as others end: this many times as many as fit, so that a command that is stopped repeats little."""


def _order(cell: Cell) -> tuple[object, ...]:
    """`full` first: the others are compared with its output."""
    return (cell.method != "full", -_share(cell), cell.method, cell.first_token, cell.seed or 0, cell.draw,
            stable_hash(cell.decode))  # fmt: skip


LEAST_SHARE = 0.05
"""What a row counts at least: new tokens and padding need room at any ratio."""


def padded_share(rows: tuple[tuple[int, Cell], ...]) -> float:
    """What a decode batch occupies, in rows of a full cache."""
    return len(rows) * max(_share(cell) for _, cell in rows)


def _share(cell: Cell) -> float:
    """Share of a full cache that a row of this cell is expected to hold."""
    return max(LEAST_SHARE, float(cell.ratio)) if cell.ratio is not None else 1.0


@dataclass(frozen=True)
class Generation:
    """One state of a grid that grew: the cells asked for then and how many samples per task."""

    cells: tuple[str, ...]
    limit: int | None


@dataclass(frozen=True)
class Plan:
    cells: dict[str, Cell]
    batches: tuple[PrefillBatch, ...]
    samples: dict[PromptKey, int]
    """Samples per prompt set."""

    @property
    def records(self) -> int:
        return sum((b.end - b.start) * len(b.cells) for b in self.batches)


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


def make_plan(
    cells: Sequence[Cell], generations: Sequence[Generation], available: dict[PromptKey, int], prefill_rows: int,
    within: Callable[[PromptKey, int], int] | None = None,
) -> Plan:  # fmt: skip
    """Prefill batches per generation: what each added to those before it; those of one kind of weights together.

    available: samples each prompt set has. within: how many of them are among the first so many of the task's order,
    where some of those were left out; None: none was. Batches depend on the generations alone, not on what is already
    recorded, so a resumed run forms the same ones.
    """
    by_id = {cell.id: cell for cell in cells}
    covered: dict[str, int] = {}
    batches: list[PrefillBatch] = []
    for number, generation in enumerate(generations):
        asked = [by_id[i] for i in generation.cells if i in by_id]
        for weights, prompt_key in dict.fromkeys((cell.weights, cell.prompt_key) for cell in asked):
            count = min(available[prompt_key], generation.limit or available[prompt_key])
            if within is not None and generation.limit:
                count = within(prompt_key, generation.limit)
            mine = (c for c in asked if (c.weights, c.prompt_key) == (weights, prompt_key))
            group = [c for c in mine if covered.get(c.id, 0) < count]
            batches += _batches(number, prompt_key, weights, group, covered, count, prefill_rows)
            covered.update((c.id, count) for c in group)
    order = list(dict.fromkeys([DENSE, *(cell.weights for cell in cells)]))
    batches.sort(key=lambda batch: order.index(batch.weights))  # each model is made once
    return Plan(by_id, tuple(batches), dict(available))


def _batches(
    number: int,
    prompts: PromptKey,
    weights: str,
    group: list[Cell],
    covered: dict[str, int],
    count: int,
    rows: int,
) -> Iterator[PrefillBatch]:
    """Cells that already have some samples get the rest; borders of batches lie on multiples of `rows`."""
    whole = tuple(group)  # one object for all batches: what is made of it once serves them all
    for start in range(0, count, rows):
        end = min(count, start + rows)
        by_first: dict[int, list[Cell]] = {}
        for cell in group:
            first = max(start, covered.get(cell.id, 0))
            if first < end:
                by_first.setdefault(first, []).append(cell)
        order = sorted(by_first.items(), key=lambda item: (all(c.method != "full" for c in item[1]), item[0]))
        for first, members in order:  # `full` first: the others are compared with its output
            model = "" if weights == DENSE else f"-w{stable_hash(weights, 6)}"
            name = f"g{number}-{prompts}{model}-p{first:05d}"
            cells = whole if len(members) == len(whole) else tuple(members)
            yield PrefillBatch(name, prompts, first, end, count, cells, weights)


def ratio_of(cell: Cell | Anchor) -> Decimal | None:
    return Decimal(cell.ratio) if cell.ratio is not None else None
