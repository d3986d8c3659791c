"""Cells with their verdicts, by method and size; what was seen where nothing is established."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvcli.analysis.marked import code
from kvcli.analysis.reports import phrases
from kvcli.analysis.statistics.verdicts import Kind, Verdict
from kvcli.analysis.tables import wording
from kvcli.analysis.tables.table import CellSummary

MOST_NAMED = 8
"""So many methods of a task are named with their numbers in one point; the others by name alone."""
SEEN = 0.0005
"""A smaller difference is printed as 0.0 points: none was seen."""


@dataclass(frozen=True)
class Found:
    """One cell with its verdict."""

    cell: CellSummary
    verdict: Verdict


def of_kind(found: Sequence[Found], kind: Kind) -> list[Found]:
    return [f for f in found if f.verdict.kind is kind]


def by_method(found: Sequence[Found]) -> dict[str, list[Found]]:
    groups: dict[str, list[Found]] = {}
    for f in found:
        groups.setdefault(f.cell.label, []).append(f)
    return groups


def places(found: Sequence[Found], order: Sequence[str]) -> str:
    """Methods by the sizes they share."""
    shared: dict[str, list[str]] = {}
    for name, cells in by_method(found).items():
        shared.setdefault(phrases.where([f.cell for f in cells], order), []).append(code(name))
    return "; ".join(f"{', '.join(methods)} at {places}" for places, methods in shared.items())


def open_points(found: Sequence[Found], order: Sequence[str]) -> list[str]:
    """What is not established, by what was seen: a loss, a gain, or nothing, of which n says how much it could be."""
    points = []
    for sign, head in ((-1, "loss seen, not established"), (1, "gain seen, not established")):
        cells = [f for f in found if sign * f.verdict.value > SEEN]
        if cells:
            points.append(f"{head}{phrases.needs([f.verdict for f in cells])}: {_amounts(cells, order)}.")
    flat = [f for f in found if abs(f.verdict.value) <= SEEN]
    if flat:
        most = max(-f.verdict.interval.low for f in flat if f.verdict.interval)
        excluded = f"a loss of {100 * most:.1f} points is not excluded{phrases.simultaneous(flat[0].verdict)}"
        needs = phrases.needs([f.verdict for f in flat]).removeprefix(" (").removesuffix(")")
        points.append(f"no difference seen, not established ({needs}; {excluded}): {places(flat, order)}.")
    return points


def _amounts(found: Sequence[Found], order: Sequence[str]) -> str:
    """Each method once with what was seen at each size, the largest first."""
    groups = sorted(by_method(found).items(), key=lambda g: -max(abs(f.verdict.value) for f in g[1]))
    named = [
        f"{code(name)} "
        + ", ".join(
            f"{wording.points(f.verdict.value)} at {phrases.at(f.cell)}"
            for f in sorted(cells, key=lambda f: order.index(f.cell.column))
        )
        for name, cells in groups[:MOST_NAMED]
    ]
    more = [code(name) for name, _ in groups[MOST_NAMED:]]
    return "; ".join(named) + (f"; and {', '.join(more)} (tables below)" if more else "")
