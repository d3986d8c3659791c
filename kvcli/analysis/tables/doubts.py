"""What makes a table doubtful or needs saying beside it: its warnings and its notes."""

from __future__ import annotations

from collections.abc import Sequence

from kvcli.analysis.tables.table import DENSE, MATCH, CellSummary, TaskTable

NO_ANSWER_LIMIT = 0.2
"""More than this share without an extractable answer, and the score says little about the model."""
NOTHING = "nothing can be said"
OFF_MATCH = 0.01
"""Bytes that are further than this share from those to match are listed."""


def sanity(table: TaskTable) -> list[str]:
    """What makes a table meaningless, said above it."""
    full = table.full
    if full is None:
        return ["full was not run: losses cannot be measured; run it with: kvcli sweep ... (without --no-full)"]
    if not full.n:
        return ["full has no finished sample yet"]
    found = []
    chance = table.chance or 0.0
    if full.interval is None and table.reference is None:
        found.append(f"{_one_unit(full)}: not to be judged whether full is above chance ({chance:.2f})")
    elif full.interval is not None and full.interval.low <= chance:
        found.append(
            f"full scores {full.score:.2f} [{full.interval.low:.2f}, {full.interval.high:.2f}] (n = {full.n}), not "
            f"clearly above chance ({chance:.2f}): differences here say nothing about compression"
        )
    if unlike_reference(table):
        found.append(unlike_reference(table))
    if full.no_answer > NO_ANSWER_LIMIT:
        found.append(
            f"no answer could be extracted from {100 * full.no_answer:.0f} % of full's outputs: look at them with "
            "kvcli show before reading the scores"
        )
    if full.errors:
        found.append(f"{full.errors} samples of full failed; the same command runs them again")
    return found


def nothing_to_say(table: TaskTable) -> str:
    """Why no difference to this full says anything about compression; empty where it does. Every output then says
    NOTHING in place of a verdict."""
    full, chance = table.full, table.chance or 0.0
    if full is None or not full.n:
        return ""
    if full.interval is not None and full.interval.low <= chance:
        return f"full is not clearly above chance ({full.score:.2f}, chance {chance:.2f})"
    return unreadable(table)


def unreadable(table: TaskTable) -> str:
    """That too many of full's outputs hold no answer; empty where they can be read."""
    full = table.full
    if full is None or not full.n or full.no_answer <= NO_ANSWER_LIMIT:
        return ""
    return f"{100 * full.no_answer:.0f} % of full's outputs hold no answer"


def not_counted(table: TaskTable) -> str:
    """Why a table is in no finding, in no mean over tasks and in no ranking, in few words; empty where it is. Whether
    full is clearly above chance is asked there, at their own levels."""
    if unlike_reference(table):
        judged = table.full is not None and table.full.interval is not None
        return "full is not where it was published" if judged else "one cluster, so full cannot be judged"
    return unreadable(table)


def unlike_reference(table: TaskTable) -> str:
    """Why methods are not ranked: full is further from the published score than its interval reaches, or has none. Else
    empty."""
    full, published = table.full, table.reference
    if full is None or not full.n or published is None:
        return ""
    ends = full.interval
    if ends is None:
        return (
            f"{_one_unit(full)}: not to be judged whether full is above chance or where it was published "
            f"({published:.3f}), so methods are not ranked here"
        )
    if ends.low <= published <= ends.high:
        return ""
    return (
        f"full scores {full.score:.3f} [{ends.low:.3f}, {ends.high:.3f}], but {published:.3f} is published for this "
        "model: prompts or scoring differ from the published ones, so methods are not ranked here"
    )


def _one_unit(full: CellSummary) -> str:
    """What keeps a score from having an interval."""
    return "one sample" if full.n == 1 else "one cluster"


def mixed_metrics(metrics: Sequence[str]) -> list[str]:
    if len(metrics) < 2:
        return []
    return [f"scores of {' and '.join(sorted(metrics))} stand side by side: kvcli rescore gives all of them one metric"]


def replaced_warning(count: int) -> str:
    return (
        f"{count} older cell{'s' * (count > 1)} left out: same method, ratio and seed, but other code, template, "
        "task version or head profile: `cells` in run.json says which"
    )


def borrowed_note(mode: str) -> str:
    return f"full is taken from first-token mode '{mode}': it evicts nothing, so both give one answer"


def beside_dense(table: TaskTable) -> list[str]:
    """How full with other weights compares with full of the dense model; the table itself is against the former."""
    if table.weights == DENSE:
        return []
    change = table.against_dense
    if change is None:
        return ["differences are to full with these weights; full with dense weights was not run on these prompts"]
    ends = change.interval
    said = f" [{100 * ends.low:+.1f}, {100 * ends.high:+.1f}]" if ends else ""
    return [
        f"differences are to full with these weights, which itself is {100 * change.value:+.1f} points{said} from full "
        f"with dense weights (n = {change.n})"
    ]


def left_out(table: TaskTable) -> list[str]:
    if not table.too_long:
        return []
    return [
        f"{table.too_long} prompt{'s' * (table.too_long > 1)} of the task left out, longer than --max-prompt-tokens"
    ]


def off_match(table: TaskTable) -> list[str]:
    """Which methods do not have the bytes they were to match: listed, not forced."""
    found = []
    for column in (c for c in table.columns if c.kind == "match"):
        cells = [row.cells[column.text] for row in table.rows if column.text in row.cells]
        off = [f"{c.label} ({c.flags['unreachable']} of {c.records})" for c in cells if c.flags.get("unreachable")]
        if off:
            found.append(f"not within {100 * OFF_MATCH:.0f} % of the bytes of {column.text.removeprefix(MATCH)}: "
                         f"{', '.join(off)}")  # fmt: skip
    return found
