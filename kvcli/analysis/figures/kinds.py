"""All kinds of figures by name: what each needs, the data behind it, and what draws it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvcli.analysis.figures import bars, gain, heatmap, lines, needle, pareto, shots, values
from kvcli.errors import unknown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kvcli.analysis.figures.style import Style

RUN, BENCH = "run", "bench"


@dataclass(frozen=True)
class Kind:
    """build: a view (or, of `source` bench, one batch size's measurements) -> sheets, empty where it has no data.
    needs: what a folder lacks for which there is none."""

    name: str
    says: str
    needs: str
    build: Callable[[Any], Sequence[Any]]
    draw: Callable[[Any, Style], Figure]
    source: str = RUN


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("difference", "paired difference to full against the measured ratio", "full and a method on the same "
             "samples", values.difference, lines.draw),
        Kind("score", "score against the measured ratio", "a method with finished samples", values.score, lines.draw),
        Kind("relative", "relative change of the score (the paper's delta P)", "full with a score above 0",
             values.relative, lines.draw),
        Kind("kl", "KL divergence from full's predictions", "records with fidelity (a sweep without --no-fidelity)",
             values.kl, lines.draw),
        Kind("top1", "top-1 agreement with full's predictions", "records with fidelity (a sweep without "
             "--no-fidelity)", values.top1, lines.draw),
        Kind("heatmap", "methods x tasks, difference to full in each cell", "full and a method on the same samples",
             heatmap.build, heatmap.draw),
        Kind("pareto", "score against bytes, with the front", "records with kv_bytes", pareto.build, pareto.draw),
        Kind("shots", "how the loss depends on the number of shots", "one task with several numbers of shots "
             "(--shots 1,2,4,8)", shots.build, lines.draw),
        Kind("gain", "what shots gain with full against what compression loses", "two tasks with several numbers of "
             "shots (--shots 0,8)", gain.build, gain.draw),
        Kind("needle", "score by depth and length", "a task whose records have depth and length (--task niah)",
             needle.build, needle.draw),
        Kind("latency", "times of bench", "a folder of kvcli bench", bars.latency, bars.draw, BENCH),
        Kind("throughput", "tokens per second of bench", "a folder of kvcli bench", bars.throughput, bars.draw, BENCH),
    )
}  # fmt: skip
DEFAULT = ("difference", "score", "latency", "throughput")
"""Those of them that the folder has data for."""
ALL = "all"


def chosen(texts: Sequence[str]) -> list[Kind]:
    """The kinds of `--kind NAME[,NAME]|all`, in the order of KINDS. Raises KvcliError for an unknown name."""
    names = [name.strip() for text in texts for name in text.split(",")]
    if ALL in names:
        return list(KINDS.values())
    for name in names:
        if name not in KINDS:
            raise unknown("kind of figure", name, [*KINDS, ALL], given=f"--kind {name}", listing="kvcli plot --help")
    return [kind for name, kind in KINDS.items() if name in (names or DEFAULT)]
