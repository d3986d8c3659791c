"""Samples that compression changed, with their texts: what a page shows of them.

Records are read a second time, and only the lines that are needed are parsed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kvcli.analysis.reading.load import Run
from kvcli.analysis.tables.scores import SampleScores
from kvcli.analysis.tables.table import CellSummary, TaskTable
from kvcli.results import store

PER_CELL = 20
LONGEST = 1600
"""Characters of a region or an output that are shown; the middle of a longer one is left out."""
LONGEST_MAP = 4000
"""Tokens of a prompt whose kept tokens are marked."""
LONGEST_MARKED = 16_000
"""Characters of a region whose kept tokens are marked: it can only be shown whole."""
FIELDS = ("output", "extracted", "score", "n_prompt", "kept", "measured_ratio", "kept_by_region", "flags", "finish")

_HEAD = re.compile(rb'\{"schema":\d+,"cell_id":"([^"\\]*)","sample_id":"([^"\\]*)"')

Record = dict[str, Any]


@dataclass(frozen=True)
class Flip:
    """One sample that a cell scores unlike full. sample: index into the run's samples."""

    sample: int
    full: float
    score: float


@dataclass(frozen=True)
class CellFlips:
    """Those of one cell, the largest changes first. total: how many there are; `shown` has the first of them."""

    cell: CellSummary
    total: int
    shown: tuple[Flip, ...]


def flips_of(scores: SampleScores, table: TaskTable, most: int = PER_CELL) -> list[CellFlips]:
    """For every cell of a table, in its order."""
    if table.full is None:
        return []
    full, _ = scores.of(table.full.cell_ids)
    found = []
    for cell in table.cells():
        value, _ = scores.of(cell.cell_ids)
        change = value - full
        at = np.flatnonzero(~np.isnan(change) & (change != 0))
        first = at[np.argsort(-np.abs(change[at]), kind="stable")][:most]
        shown = tuple(Flip(int(i), float(full[i]), float(value[i])) for i in first)
        found.append(CellFlips(cell, len(at), shown))
    return found


@dataclass
class Texts:
    """Parts of prompts, each once: shots are the same in many prompts."""

    all: list[str] = field(default_factory=list)
    _places: dict[str, int] = field(default_factory=dict)

    def add(self, text: str) -> int:
        place = self._places.setdefault(text, len(self.all))
        if place == len(self.all):
            self.all.append(text)
        return place


def chunk(
    run: Run, table: TaskTable, flips: Sequence[CellFlips], records: Mapping[store.Key, Record],
    prompts: Mapping[str, Any], *, hidden: bool,
) -> dict[str, Any]:  # fmt: skip
    """What the page's script reads of one table's flips. hidden: scores only, no text of the task or of its answers."""
    texts, known, kept = Texts(), {}, {}
    samples: dict[int, Any] = {}
    cells = []
    for found in flips:
        listed = []
        for flip in found.shown:
            name = run.samples[flip.sample]
            record = _unlike(found.cell, name, flip.full, records)
            reference = _first(table.full, name, records) if table.full else None
            if record is None:
                continue
            if flip.sample not in samples:
                samples[flip.sample] = _sample(name, reference or record, texts, hidden)
            sha = record.get("prompt_sha")
            if sha and sha not in known and not hidden:
                marked = _map_of(run.folder, record).is_file()
                known[sha] = _prompt(prompts.get(sha), texts, LONGEST_MARKED if marked else LONGEST)
            marks = None if hidden else _marks(run.folder, record, known.get(sha))
            kept.update(marks or {})
            listed.append({
                **_shown(record, texts, hidden), "sample": flip.sample, "full": flip.full, "score": flip.score,
                "prompt": None if hidden else sha, "marks": next(iter(marks)) if marks else None,
            })  # fmt: skip
        cells.append(listed)
    return {"samples": samples, "prompts": known, "texts": texts.all, "marks": kept, "cells": cells, "hidden": hidden}


def wanted(run: Run, table: TaskTable, flips: Iterable[CellFlips]) -> Iterator[store.Key]:
    """(cell, sample) of all records that `chunk` shows."""
    full = table.full.cell_ids[:1] if table.full else ()
    for found in flips:
        for flip in found.shown:
            yield from ((cell_id, run.samples[flip.sample]) for cell_id in (*found.cell.cell_ids, *full))


def read_records(folder: Path, keys: Collection[store.Key]) -> dict[store.Key, Record]:
    """The finished records of these cells and samples, the last of each. Raises KvcliError where a line is broken."""
    found: dict[store.Key, Record] = {}
    cells = {cell.encode() for cell, _ in keys}
    for path in store.record_files(folder):
        here: dict[store.Key, Record] = {}
        with path.open("rb") as file:
            for line in file:
                head = _HEAD.match(line)
                if head and head[1] not in cells:
                    continue
                if head and (head[1].decode(), head[2].decode()) not in keys:
                    continue
                try:
                    record = json.loads(line)
                except ValueError:
                    continue  # a torn last line; broken ones before it stopped the first reading
                if (record["cell_id"], record["sample_id"]) in keys and record["status"] == "ok":
                    here[record["cell_id"], record["sample_id"]] = record
        found = {**here, **found}
    return found


def _unlike(cell: CellSummary, sample: str, full: float, records: Mapping[store.Key, Record]) -> Record | None:
    """Of several seeds or draws the one furthest from full."""
    there = [records[cell_id, sample] for cell_id in cell.cell_ids if (cell_id, sample) in records]
    return max(there, key=lambda record: abs(record["score"] - full), default=None)


def _first(cell: CellSummary, sample: str, records: Mapping[store.Key, Record]) -> Record | None:
    return next((records[cell_id, sample] for cell_id in cell.cell_ids if (cell_id, sample) in records), None)


def _sample(name: str, record: Record, texts: Texts, hidden: bool) -> dict[str, Any]:
    """What all cells share: the right answer, and full's own answer."""
    target = None if hidden else _text(record.get("target"))
    return {"id": name, "target": target, "full": _shown(record, texts, hidden)}


def _shown(record: Record, texts: Texts, hidden: bool) -> dict[str, Any]:
    facts = {name: record.get(name) for name in FIELDS}
    output = record.get("output")
    facts["output"] = None if hidden or output is None else texts.add(shortened(output))
    facts["extracted"] = None if hidden else _text(record.get("extracted"))
    facts["seed"], facts["draw"] = record.get("seed"), record.get("draw")
    return facts


def _text(value: Any) -> str | None:
    return None if value is None else shortened(value if isinstance(value, str) else json.dumps(value), 400)


def _prompt(entry: Any, texts: Texts, longest: int) -> dict[str, Any] | None:
    """Regions as [label, place of its text, tokens, whether it is cut]; None where the text was not stored."""
    if not isinstance(entry, dict) or entry.get("text") is None:
        return None
    text, ends = entry["text"], entry["offsets"]
    regions = []
    for label, start, end in entry["regions"]:
        words = text[ends[start - 1] if start else 0 : ends[end - 1]] if end > start else ""
        regions.append([label, texts.add(shortened(words, longest)), end - start, len(words) > longest])
    found: dict[str, Any] = {"regions": regions}
    if entry["n"] <= LONGEST_MAP and not any(cut for *_, cut in regions):
        found["ends"] = [int(end) for end in np.diff(np.array([0, *ends]))]
    return found


def _marks(folder: Path, record: Record, prompt: Any) -> dict[str, str] | None:
    """The share of layers and heads that kept each token, as one digit each: 0 to 9. Only of stored maps."""
    path = _map_of(folder, record)
    if not prompt or "ends" not in prompt or not record.get("n_prompt") or not path.is_file():
        return None
    share = np.zeros(record["n_prompt"])
    maps = store.read_map(path)
    for heads in maps:
        share += np.bincount(np.concatenate(heads), minlength=len(share)) / len(heads)
    digits = np.ceil(9 * share / len(maps) - 1e-9).astype(int)
    return {f"{record['cell_id']} {record['sample_id']}": "".join(map(str, digits.clip(0, 9)))}


def _map_of(folder: Path, record: Record) -> Path:
    return store.map_path(folder, record["task"], record["sample_id"], record["cell_id"])


def shortened(text: str, longest: int = LONGEST) -> str:
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters left out ...] {text[-half:]}"
