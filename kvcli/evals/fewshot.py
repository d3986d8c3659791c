"""The exemplars of row tasks: where they come from, in which order, and the shots that each row gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from kvcli.errors import KvcliError
from kvcli.evals.data import Row, permutation, reordered
from kvcli.evals.spec import Segment
from kvcli.evals.template import Template


@dataclass(frozen=True)
class Fewshot:
    """Where exemplars come from, as `fewshot_config` of lm-evaluation-harness; `file`, `harness`, `group` are kvcli's.

    The pool is `samples`, else the rows of `file` in the data set's folder when it is there, or without --data-dir the
    samples of the lm-eval task `harness` when that package is installed. Asked for more than the pool holds, or without
    a pool, exemplars are drawn from the task's `fewshot_split` by the shot seed. group: a row's exemplars are those for
    which this template or field gives the same as for the row.
    """

    sampler: Literal["default", "first_n"] = "default"
    samples: tuple[dict[str, Any], ...] = ()
    file: str | None = None
    harness: str | None = None
    group: Template | None = None
    doc_to_text: Template | None = None
    doc_to_target: Template | None = None
    doc_to_choice: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pool:
    """Rows to take exemplars from. fixed: shot seed 0 keeps their order. tested: they are the rows of the test."""

    rows: Sequence[Row] = ()
    name: str = ""
    fixed: bool = False
    tested: bool = False


@dataclass
class Exemplars:
    """The shots of every row of a task; each exemplar is rendered once.

    The seed fixes one order of the pool, or of each group in it, of which the first rows are taken: 2 shots are the
    first 2 of 8. A row, or an exact copy of it, is never its own exemplar.
    """

    task: str
    """For messages, and (`salt`) for the orders."""
    salt: str
    pool: Pool
    shots: int
    seed: int
    order: int
    render: Callable[[Row], str]
    group: Callable[[Row], str] | None = None
    _orders: dict[str, list[Row]] = field(default_factory=dict)
    _texts: dict[str, str] = field(default_factory=dict)
    _shared: dict[str, tuple[Segment, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises KvcliError where the pool as a whole is too small."""
        rows, spare = self.pool.rows, int(self.pool.tested)
        if self.group is None and self.shots and self.shots + spare > len(rows):
            raise self._too_few(len(rows) - spare, f"{self.task} has {len(rows)} exemplars in {self.pool.name}")
        if not self.shots:
            return
        for row in rows:
            self._orders.setdefault("" if self.group is None else self.group(row), []).append(row)
        if not (self.pool.fixed and self.seed == 0):
            self._orders = {name: self._shuffled(name, members) for name, members in self._orders.items()}

    def of(self, row: Row) -> tuple[Segment, ...]:
        """The shots in front of this row's question. Raises KvcliError where its group has too few."""
        if not self.shots:
            return ()
        name = "" if self.group is None else self.group(row)
        if self.pool.tested:
            return self._segments([e for e in self._orders[name] if not _same(e, row)], row, name)
        if name not in self._shared:
            self._shared[name] = self._segments(self._orders.get(name, []), row, name)
        return self._shared[name]

    def _segments(self, exemplars: list[Row], row: Row, name: str) -> tuple[Segment, ...]:
        if len(exemplars) < self.shots:
            of = f" of '{name}'" if name else ""
            what = f"{row.where}: {self.task} has {len(exemplars)} exemplars{of} in {self.pool.name} for this row"
            raise self._too_few(len(exemplars), what)
        chosen = reordered(exemplars[: self.shots], self.order)
        return tuple(Segment(self._text(e), "shot", i) for i, e in enumerate(chosen))

    def _text(self, exemplar: Row) -> str:
        if exemplar.where not in self._texts:
            self._texts[exemplar.where] = self.render(exemplar)
        return self._texts[exemplar.where]

    def _shuffled(self, name: str, rows: list[Row]) -> list[Row]:
        salt = f"kvcli:shots:{self.salt}:{self.seed}" + (f":{name}" if name else "")
        return [rows[i] for i in permutation(salt, len(rows))]

    def _too_few(self, most: int, what: str) -> KvcliError:
        fix = f"--shots {most} or fewer" if most > 0 else f"--shots 0, or put rows into {self.pool.name}"
        return KvcliError(what, given=f"--shots {self.shots}", fix=fix)


def _same(exemplar: Row, row: Row) -> bool:
    return exemplar.where == row.where or exemplar.values == row.values
