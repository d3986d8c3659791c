"""Finished rows beside what `full` answered to the same prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from kvcli.cache.kv_cache import CompressedCache
from kvcli.cache.workspace import Workspace
from kvcli.engine import fidelity
from kvcli.engine.asking import Asker, Choice
from kvcli.engine.cells import Cell
from kvcli.engine.generate import Ask, Build, OutOfRoom
from kvcli.engine.memory import Room, batches, is_out_of_memory
from kvcli.engine.prefilling import Ready
from kvcli.engine.prompts import PromptSet
from kvcli.models.wrapper import Model

MOST_BYTES = 512 << 20
"""Full's predictions held at a time; what does not fit is computed again where it is needed."""

_APART = "\0"
"""Between the parts of a mode: no task's name holds it."""
Key = tuple[str, str]
"""Mode (`mode_of`) and sample."""


def mode_of(cell: Cell, first_token: str | None = None) -> str:
    """Cells of one mode are compared with one answer of `full`: that to the same prompts in the same first-token mode,
    with the same weights, drawn in the same way."""
    drawn = (cell.seed or 0, cell.draw) if cell.key.get("temperature") else ()
    parts = (*cell.prompt_key, first_token or cell.first_token, cell.weights, *drawn)
    return _APART.join(map(str, parts))


@dataclass
class Comparer:
    """answers: output ids of `full`. Its predictions are computed again where they are needed, once per prompt."""

    model: Model
    asker: Asker
    answers: dict[Key, list[int]]
    memory: Workspace = field(default_factory=Workspace)
    _references: dict[Key, fidelity.Reference] = field(default_factory=dict)

    def note(self, choice: Choice, ids: list[int]) -> set[Key]:
        """Keeps the answer of a row of `full`; returns its key, nothing for other rows."""
        if choice.cell.method != "full":
            return set()
        key = (mode_of(choice.cell), choice.sample_id)
        self.answers[key] = ids
        return {key}

    def key(self, choice: Choice, coming: Collection[Key] = ()) -> Key | None:
        """Where full's answer to this row's prompt is or, out of `coming`, will be; None where there is none."""
        modes = ("prefill", "compressed") if choice.cell.first_token == "n/a" else (choice.cell.first_token,)
        keys = [(mode_of(choice.cell, mode), choice.sample_id) for mode in modes]
        return next((key for key in keys if key in self.answers or key in coming), None)

    def answer(self, choice: Choice) -> list[int] | None:
        key = self.key(choice)
        return None if key is None else self.answers[key]

    def clear(self) -> None:
        """Gives up full's predictions: the next prompts are other ones."""
        self._references.clear()

    def distances(
        self, prompts: PromptSet, asks: Sequence[Ask], ready: dict[int, Ready], build: Build, room: Room
    ) -> list[fidelity.Distance | None]:
        """Per row how far its cache moves the predictions of full's answer; None without such an answer.

        Raises OutOfRoom for rows that did not fit together.
        """
        found: list[fidelity.Distance | None] = [None] * len(asks)
        keys = [self.key(ask.tag) for ask in asks]
        for i, (ask, key) in enumerate(zip(asks, keys, strict=True)):
            if ask.tag.cell.method == "full" and key is not None:
                found[i] = fidelity.same(len(fidelity.forced(ask, self.answers[key]).right))
        mine = [i for i, key in enumerate(keys) if key is not None and asks[i].tag.cell.method != "full"]
        one = build is not CompressedCache
        sizes = [(asks[i].row, fidelity.MOST_TOKENS + len(asks[i].start.follow)) for i in mine]
        for some in batches(sizes, room):
            part = [mine[at] for at in some]
            rows = [asks[i] for i in part]
            failed: OutOfRoom | None = None
            try:
                answers = [self._reference(prompts, asks[i].tag, keys[i], ready) for i in part]  # type: ignore[arg-type]
                measured = fidelity.distances(self.model, rows, answers, self.memory, build, one=one)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                failed = OutOfRoom(len(rows), rows, error)
            if failed is not None:
                raise failed
            for i, answer, distance in zip(part, answers, measured, strict=True):
                choice = asks[i].tag
                found[i] = distance
                if choice.logits is not None and choice.cell.query == "aware":
                    whole = ready[choice.sample].logits
                    found[i] = fidelity.with_first(distance, whole, choice.logits, answer.ids[0])
        return found

    def _reference(self, prompts: PromptSet, choice: Choice, key: Key, ready: dict[int, Ready]) -> fidelity.Reference:
        if key not in self._references:
            mode = key[0].split(_APART)[len(choice.cell.prompt_key)]
            cell = dataclasses.replace(
                choice.cell, method="full", ratio="1", budget=None, match=None, decode=None, first_token=mode
            )
            ask = self.asker.ask(prompts, choice.sample, cell, ready[choice.sample])
            self._references[key] = fidelity.reference(self.model, ask, self.answers[key], self.memory)
        found = self._references[key] = self._references.pop(key)  # the least recently used leave first
        while len(self._references) > 1 and sum(r.logits.nbytes for r in self._references.values()) > MOST_BYTES:
            self._references.pop(next(iter(self._references)))
        return found
