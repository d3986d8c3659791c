"""The numbers printed in the KVFundaBench paper (arXiv:2502.01941v4), to lay beside a user's own.

They are data: kvcli/presets/kvfundabench_numbers.json, with notes on what is wrong with some of them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[2] / "presets" / "kvfundabench_numbers.json"
MEAN = "mean"
"""In place of a method: the printed average over those of `averaged()`."""


@dataclass(frozen=True)
class Published:
    """One printed score. ratio: the kept part, 1 for the full cache; score: in 0..1; notes: letters of `notes()`."""

    tables: tuple[str, ...]
    model: str
    task: str
    shots: int
    method: str
    ratio: float
    printed: str
    score: float
    notes: tuple[str, ...]
    variant: str = ""
    """What an ablation changed: prefill-only, re-ordered 1, other exemplars 2."""


@dataclass(frozen=True)
class Efficiency:
    """One printed row of times, batch 1 on an A40."""

    tables: tuple[str, ...]
    method: str
    prompt_tokens: int
    new_tokens: int
    latency_s: float
    tokens_per_s: float
    notes: tuple[str, ...]


@cache
def scores() -> tuple[Published, ...]:
    """All printed scores, in the order of the paper's tables."""
    return tuple(Published(**_tuples(row)) for row in _document()["rows"])


@cache
def times() -> tuple[Efficiency, ...]:
    return tuple(Efficiency(**_tuples(row)) for row in _document()["efficiency"])


def notes() -> dict[str, str]:
    """What is wrong with printed numbers, by letter."""
    return dict(_document()["notes"])


def averaged() -> tuple[str, ...]:
    """The methods whose plain mean the paper prints as its average."""
    return tuple(_document()["averaged"])


def models() -> dict[str, str]:
    """kvcli's names of the paper's models to their hub ids."""
    return dict(_document()["models"])


def tables_of(preset: str) -> tuple[str, ...]:
    """The paper's tables that a preset repeats; none for other presets."""
    return tuple(_document()["presets"].get(preset, ()))


def find(model: str | None = None, table: str | None = None, **wanted: Any) -> list[Published]:
    """The printed scores with these facts (task=, shots=, method=, ratio=, variant=). model: an alias or a hub id, with
    or without its revision."""
    name = None if model is None else alias_of(model)
    return [
        row
        for row in scores()
        if (name is None or row.model == name)
        and (table is None or table in row.tables)
        and all(getattr(row, key) == value for key, value in wanted.items())
    ]


def alias_of(model: str) -> str:
    """kvcli's name of one of the paper's models; of any other what was given, without its revision."""
    plain = model.partition("@")[0]
    return next((alias for alias, hub_id in models().items() if hub_id == plain), plain)


def _tuples(row: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}


@cache
def _document() -> dict[str, Any]:
    return dict(json.loads(FILE.read_text(encoding="utf-8")))
