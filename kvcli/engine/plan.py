"""From cells to prefill batches and decode batches. A function of the config alone; knows no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from kvcli.config import stable_hash
from kvcli.engine.cells import Cell, PromptKey
from kvcli.weights.spec import DENSE

MAX_DECODE_ROWS = 256


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
