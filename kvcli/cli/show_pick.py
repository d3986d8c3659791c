"""Which records of a folder `kvcli show` is asked for."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from kvcli.analysis.reading import names
from kvcli.errors import KvcliError, unknown
from kvcli.grammar import parse_methods, parse_ratios, ratio_text
from kvcli.results import store
from kvcli.weights.spec import DENSE, canonical, parse_weights

Record = dict[str, Any]


@dataclass(frozen=True)
class Pick:
    """Which records are wanted; an empty axis takes all of them."""

    methods: tuple[str, ...] = ()
    ratios: tuple[Decimal, ...] = ()
    weights: tuple[str, ...] = ()

    @classmethod
    def of(cls, methods: list[str], ratios: list[str], weights: list[str]) -> Pick:
        """From the texts of the options. Raises KvcliError for texts outside their grammars."""
        return cls(
            tuple(str(m) for m in parse_methods(methods)),
            tuple(parse_ratios(ratios)),
            tuple(dict.fromkeys(_weights_text(piece) for text in weights for piece in _pieces(text))),
        )

    def __bool__(self) -> bool:
        return bool(self.methods or self.ratios or self.weights)

    def named(self, record: Record) -> bool:
        """Whether it was asked for itself."""
        sized = not self.ratios or (record["ratio"] is not None and Decimal(str(record["ratio"])) in self.ratios)
        called = not self.methods or not names.spellings(record["method"]).isdisjoint(self.methods)
        return self._weighed(record) and sized and called

    def shown(self, record: Record) -> bool:
        """Whether it was, or is the full cache of weights that were, to compare with."""
        return self.named(record) or (record["method"] == "full" and self._weighed(record))

    def _weighed(self, record: Record) -> bool:
        found = str(record.get("weights") or DENSE)
        spellings = {found, found.partition(",calib=")[0], found.partition(":")[0]}
        return not self.weights or not spellings.isdisjoint(self.weights)

    def options(self) -> str:
        """The options as typed, for the next command."""
        typed = [("--method", m) for m in self.methods] + [("--ratio", ratio_text(r)) for r in self.ratios]
        return "".join(f" {shlex.join(option)}" for option in [*typed, *(("--weights", w) for w in self.weights)])


def _pieces(text: str) -> list[str]:
    """Pieces of a comma list; one that begins with KEY= goes with the one before it."""
    return re.split(r",(?!\s*[A-Za-z_]\w*\s*=)", text)


def _weights_text(text: str) -> str:
    """As records name them; `sparsegpt` alone stands for all weights that it pruned."""
    form, comma, data = text.strip().partition(",calib=")
    return form if form == "sparsegpt" else canonical(parse_weights([form])[0]) + comma + data


def filtered(records: list[Record], by: str, pick: Pick, listing: str) -> list[Record]:
    """The wanted records and full's beside them, of the tasks or samples that have a wanted one."""
    if not pick:
        return records
    there = {record[by] for record in records if pick.named(record)}
    if not there:
        given = pick.options().strip()
        raise KvcliError("no such cell in this folder", given=given, fix=f"{listing} shows what there is")
    return [record for record in records if record[by] in there and pick.shown(record)]


def records_of(folder: Path, task: str, fields: tuple[str, ...] | None) -> list[Record]:
    """The task's records; all fields with None. Raises KvcliError when there are none."""
    records = store.read_records(folder, None if fields is None else ("task", *fields))
    found = [record for record in records if record["task"] == task]
    if not found:
        names = {str(record["task"]) for record in records}
        raise unknown("task in this folder", task, names, given=f"--task {task}", listing=f"kvcli show {folder}")
    return found
