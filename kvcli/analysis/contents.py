"""What a report holds, in every format: the verdict first, then what stands behind it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from kvcli.analysis import against, compare, findings, names, power, retention, wording
from kvcli.analysis.findings import Data, Finding, Outcome
from kvcli.analysis.judged import Judged, judge_tables
from kvcli.analysis.load import Run
from kvcli.analysis.marked import Bullets, Command, Grid, Paragraph, Section, code, section, strong, user
from kvcli.analysis.means import TasksMean, over_tasks
from kvcli.analysis.ranking import Ranking, rank, ranking_section
from kvcli.analysis.retention import Relative
from kvcli.analysis.scores import SampleScores
from kvcli.analysis.tables import DENSE, CellSummary, TaskTable, summarise
from kvcli.analysis.verdict_text import named, twin, verdict_section
from kvcli.analysis.verdicts import MARGIN, Kind, Verdict

FIRST_TOKEN = {
    "compressed": "the first answer token is computed through the compressed cache, like all others",
    "prefill": "the first answer token comes from the prefill, before anything was evicted",
    "n/a": "the method drops tokens while it reads the prompt, so the two ways cannot be told apart",
}


@dataclass(frozen=True)
class Contents:
    """One run, all its numbers, and the runs it is compared with. Computed once, drawn in any format."""

    data: Data
    margin: float = MARGIN
    others: tuple[Data, ...] = ()
    paper: str | None = None
    """Whose printed numbers stand beside."""

    @property
    def run(self) -> Run:
        return self.data.run

    @property
    def tables(self) -> Sequence[TaskTable]:
        return self.data.tables

    @cached_property
    def judged(self) -> Judged:
        return judge_tables(self.run, self.tables, self.margin)

    @cached_property
    def ranking(self) -> Ranking:
        return rank(self.run, self.data.scores, self.tables, self.margin)

    @cached_property
    def findings(self) -> list[Finding]:
        return findings.findings([self.data, *self.others])

    @cached_property
    def means(self) -> list[TasksMean]:
        return over_tasks(self.data.scores, self.tables)

    def verdict(self, cell: CellSummary) -> Verdict | None:
        return self.judged.of(cell)

    def kept(self, table: TaskTable, cell: CellSummary) -> Relative | None:
        """Chance-adjusted retention of one cell."""
        if cell.difference is None or table.full is None:
            return None
        (values, clusters), (full, _) = (self.data.scores.of(c.cell_ids) for c in (cell, table.full))
        both = ~np.isnan(values) & ~np.isnan(full)
        return retention.retention(
            values[both], full[both], table.chance or 0.0, clusters[both], difference=cell.difference
        )  # fmt: skip

    def sections(self) -> list[Section]:
        """All but the tables and figures, in order."""
        found = [
            verdict_section(self.tables, self.judged),
            warnings_section(self.tables, self.run),
            ranking_section(self.ranking, self.tables),
            means_section(self.means),
            findings_section(self.findings),
            first_token_section(self),
            against.against_section(self.run, self.tables) if self.paper else None,
            *(compare.compare_section(self.data, other, self.margin) for other in self.others),
        ]
        return [part for part in found if part is not None]


def contents(
    run: Run,
    tables: Sequence[TaskTable] | None = None,
    *,
    margin: float = MARGIN,
    others: Sequence[Run] = (),
    paper: str | None = None,
) -> Contents:
    """tables: the run's summary where it is known already."""
    beside = tuple(Data(other, summarise(other), SampleScores(other)) for other in others)
    return Contents(
        Data(run, summarise(run) if tables is None else tables, SampleScores(run)), margin, beside, paper
    )  # fmt: skip


def head(made: Contents) -> list[str]:
    """One or two sentences under the title."""
    run = made.run
    text = f"Run {code(run.name)}, {len(run):,} records."
    status = run.meta.get("status")
    if status not in (None, "done", "complete", "finished"):
        text += " " + strong(f"Status {status}: not all samples are in.")
    limit = run.config("limit")
    if limit is not None:
        text += f" A subset: {code(f'--limit {limit}')}, the same samples for every method."
    count = sum(len(table.warnings) for table in made.tables)
    warned = strong(f"{count} sanity warning{'s' * (count > 1)}") + " below: read them with the verdict."
    return [text, *([warned] if count else [])]


def warnings_section(tables: Sequence[TaskTable], run: Run) -> Section:
    found = [f"{named(t, tables)}: {user(text)}." for t in tables for text in t.warnings]
    found += [
        f"{named(t, tables)}: {t.too_long} prompt{'s were' if t.too_long > 1 else ' was'} left out, longer than "
        f"{code('--max-prompt-tokens')}: what stands here is of the shorter ones."
        for t in tables
        if t.too_long
    ]
    found += [
        f"{named(t, tables)}: {code('--truncate')} cut {t.truncated} prompt{'s' * (t.truncated > 1)}."
        for t in tables
        if t.truncated
    ]
    shown = {t.task for t in tables}
    found += [
        f"{code(task)}: nothing was measured, all its prompts are longer than {code('--max-prompt-tokens')}."
        for task, facts in (run.meta.get("tasks") or {}).items()
        if task not in shown and _sum(facts.get("too_long"))
    ]
    none = Paragraph(
        "None: full is above chance, agrees with its published score where there is one, and its answers can be read."
    )
    return section("warnings", "Sanity warnings", Bullets.of(found) if found else none)


def _sum(counts: Any) -> int:
    return sum(counts.values()) if isinstance(counts, dict) else 0


def means_section(means: Sequence[TasksMean]) -> Section | None:
    """Chance-adjusted retention, mean over tasks: what claims across tasks use."""
    if not means:
        return None
    columns = sorted({mean.column for mean in means}, key=lambda c: c.order)
    groups: dict[tuple[str, str, str], dict[str, str]] = {}
    for mean in means:
        groups.setdefault((mean.method, _mode_of(mean), str(len(mean.tasks))), {})[mean.column.text] = _kept(mean)
    rows = [
        [code(method), mode, tasks, *(kept.get(column.text, "") for column in columns)]
        for (method, mode, tasks), kept in groups.items()
    ]
    explained = (
        "Each task counts once, with its largest number of shots. Kept: (P - chance) / (P of full - chance), so tasks "
        "of different chance compare. Intervals come from resampling samples within each task; they are 95 %, "
        "unadjusted, and say nothing about tasks that were not run."
    )
    titles = ("method", "mode", "tasks", *(column.text for column in columns))
    grid = Grid(titles, rows, frozenset(range(2, len(titles))))
    return section("means", "Mean over tasks: share kept of what full has above chance", Paragraph(explained), grid)


def _mode_of(mean: TasksMean) -> str:
    parts = [mean.first_token, *([mean.query] if mean.query != "aware" else [])]
    return ", ".join([*parts, *([user(mean.weights)] if mean.weights != DENSE else [])])


def _kept(mean: TasksMean) -> str:
    found = mean.retention
    if found is None:
        return "-"
    ends = f" [{100 * found.interval.low:.0f}, {100 * found.interval.high:.0f}]" if found.interval else ""
    left = f" (without {', '.join(map(code, found.left_out))})" if found.left_out else ""
    return f"{100 * found.value:.0f} %{ends}{left}"


def findings_section(found: Sequence[Finding]) -> Section:
    explained = (
        "What KVFundaBench found, tested on this run; docs/findings.md defines each test. Six tests share the 5 % "
        "risk. Cannot be tested here: the run lacks what the test needs."
    )
    items = []
    for one in found:
        needs = f"Needs: {one.needs}." if one.needs and one.outcome is not Outcome.HOLDS else ""
        items.append((f"{one.number}. {one.title}: {strong(one.outcome)}.", [t for t in (one.said, needs) if t]))
    return section("findings", "The paper's six findings, on this run", Paragraph(explained), Bullets(items))


def first_token_section(made: Contents) -> Section | None:
    """Both first-token modes side by side where both were run; None otherwise."""
    pairs = [p for p in mode_pairs(made.tables) if p[2].difference and p[3].difference]
    if not pairs:
        return None
    judged = [(task, method, a, b, made.verdict(a), made.verdict(b)) for task, method, a, b in pairs]
    lost = [p for p in judged if p[4] and p[4].kind is Kind.LOSS]
    hidden = [p for p in lost if not (p[5] and p[5].kind is Kind.LOSS)]
    shown = [p for p in judged if {Kind.LOSS, Kind.GAIN} & {v.kind for v in p[4:] if v}]
    said = (
        f"{len(hidden)} of the {len(lost)} losses established with compressed are not established with prefill. "
        "With prefill the first answer token is read from the prefill's own logits, before anything is evicted: a "
        "task that is answered by one letter or word cannot lose anything that way, whatever was evicted, so its flat "
        "line there says nothing about the method. Its loss shows with compressed only. Kept tokens and bytes are the "
        "same in both, so what lies between the two columns is the first token alone."
    )
    rows = [
        [task, code(method), a.column, str(a.difference.n if a.difference else 0), _both(a, va), _both(b, vb)]
        for task, method, a, b, va, vb in shown
    ]
    titles = ("task", "method", "asked", "n", "compressed: points [simultaneous]", "prefill: points [simultaneous]")
    grid = Grid(titles, rows, frozenset({3, 4, 5})) if rows else None
    left = len(pairs) - len(shown)
    rest = Paragraph(f"Left out: {left} pairs in which neither way shows a loss or gain.") if left else None
    return section("first-token", "First token: compressed against prefill", Paragraph(said), grid, rest)


def _both(cell: CellSummary, verdict: Verdict | None) -> str:
    if verdict is None:
        return ""
    value = wording.points(verdict.value)
    value = strong(value) if verdict.kind in (Kind.LOSS, Kind.GAIN) else value
    return f"{value} {wording.points_interval(verdict.interval)}"


def mode_pairs(tables: Sequence[TaskTable]) -> Iterator[tuple[str, str, CellSummary, CellSummary]]:
    """(task, method, compressed, prefill) for cells that differ by the first-token mode alone."""
    for other in tables:
        table = twin(other, tables) if other.first_token == "prefill" else None
        if table is None:
            continue
        name = named(table, [t for t in tables if t.first_token == "compressed"])
        theirs = {(cell.method, cell.column): cell for cell in other.cells()}
        for cell in table.cells():
            if (cell.method, cell.column) in theirs:
                yield name, cell.label, cell, theirs[cell.method, cell.column]


def how_section(run: Run, tables: Sequence[TaskTable]) -> Section:
    """How it was measured."""
    shown = ("revision", "dtype", "tokenizer", "parameters", "layers", "heads", "kv_heads", "context")
    facts = {k: v for part in ("identity", "model") for k, v in flat(run.meta.get(part))}
    known = ", ".join(f"{k.replace('_', ' ')} {user(facts[k])}" for k in shown if k in facts)
    lines = [f"Model: {code(run.model)}" + (f" ({known})" if known else "") + "."]
    for first_token in dict.fromkeys(t.first_token for t in tables):
        meaning = FIRST_TOKEN.get(first_token, "")
        lines.append(f"First token {code(first_token)}" + (f": {meaning}." if meaning else "."))
    for query in dict.fromkeys(t.query for t in tables):
        seen = "was" if query == "aware" else "was not"
        lines.append(f"Query {code(query)}: the question {seen} visible to the compression.")
    found = names.files(cell.method for cell in run.cells)
    lines += [f"Method {code(name)}: {code(source)}." for name, source in found.items()]
    lines += _weights(run, tables)
    first = {(t.task, t.shots): t for t in reversed(tables)}
    lines += [f"{code(t.task)}: {task_facts(t)}." for t in reversed(first.values())]
    if len({(t.task, t.shots) for t in tables}) < len({(t.task, t.shots, t.shot_seed, t.shot_order) for t in tables}):
        lines.append(
            "Other exemplars (shot seed) and other orders of them stand in tables of their own, never averaged."
        )
    lines += [
        "Measured ratio: bytes kept over bytes of the 16-bit full cache; noop samples stay in every mean and are "
        "counted in the tables.",
        "Scores: Wilson interval (0/1 scores) or t interval. Differences: same samples with and without compression; "
        "Tango's paired score interval and mid-p McNemar for 0/1 scores, BCa bootstrap for graded ones, t over "
        "clusters where samples belong together (docs/statistics.md).",
    ]
    if any(cell.seeds > 1 for table in tables for cell in table.cells()):
        lines.append("Seeds of one method are averaged within each sample first; n counts samples.")
    return section("how", "How it was measured", Bullets.of(lines))


def _weights(run: Run, tables: Sequence[TaskTable]) -> list[str]:
    """What was pruned, on which texts, and that such results stand apart."""
    measured = run.meta.get("weights")
    lines = []
    for weights in dict.fromkeys(t.weights for t in tables if t.weights != DENSE):
        facts = measured.get(weights, {}) if isinstance(measured, dict) else {}
        said = f": {_pruned(facts)}" if facts else ""
        lines.append(f"Weights {code(weights)}{said}. Its tables stand apart; their differences are to full with "
                     "these weights.")  # fmt: skip
    return lines


def _pruned(facts: Mapping[str, Any]) -> str:
    file = facts["calibration"]["file"]
    texts = f"{facts['texts']} texts ({facts['tokens']:,} tokens) of {user(file) if file else 'its own language'}"
    return (
        f"{100 * facts['sparsity']:.2f} % of the {facts['parameters']:,} weights in {facts['matrices']} matrices are "
        f"zero ({100 * facts['of_model']:.1f} % of the model), calibrated on {texts}"
    )


def task_facts(table: TaskTable) -> str:
    parts = [
        user(table.ability or ""), user(table.metric or ""), f"version {user(table.version)}" if table.version else "",
        f"{table.shots} shots" if table.shots is not None else "",
        f"shot seed {table.shot_seed}" if table.shot_seed else "",
        f"shot order {table.shot_order}" if table.shot_order else "", f"n = {wording.sample_range(table)}",
        wording.clusters(table),
        f"median prompt {table.n_prompt:.0f} tokens" if table.n_prompt is not None else "",
        f"chance {wording.score(table.chance)}" if table.chance is not None else "",
        f"published {table.reference:g}" if table.reference is not None else "",
        f"{table.too_long} prompts too long, left out" if table.too_long else "",
        f"{table.truncated} prompts cut by --truncate" if table.truncated else "",
    ]  # fmt: skip
    return ", ".join(filter(None, parts))


def smallest_seen(made: Contents, table: TaskTable) -> str:
    """What size of loss the table's cells could have shown at the family's level."""
    level = made.judged.family.level
    every = [power.detectable(c.difference, level) for c in table.cells() if c.difference]
    known = sorted(value for value in every if value is not None)
    if not known:
        return ""
    median = known[len(known) // 2]
    return (
        f"A loss of {100 * median:.0f} points has an 80 % chance of being established here (median of its "
        f"{len(every)} cells, {made.judged.family.size} comparisons considered)."
    )


def provenance_section(run: Run) -> Section:
    parts = ("provenance", "identity", "model", "schema", "status", "created", "updated")
    facts = flat({k: run.meta[k] for k in parts if k in run.meta})
    grid = Grid(("what", "value"), [[user(k), user(v)] for k, v in facts]) if facts else None
    torn = f"Torn last lines (not written, the same command repeats them): {user(', '.join(run.torn))}."
    said, command = repeated(run)
    return section(
        "provenance", "Provenance", Paragraph(said), Command(command) if command else None,
        Paragraph(torn) if run.torn else None, grid,
    )  # fmt: skip


def repeated(run: Run) -> tuple[str, str]:
    """How to make the run again: a sentence, and the command where there is one."""
    argv, passed = run.meta.get("argv"), flat(run.meta.get("passed"))
    if isinstance(argv, list) and len(argv) > 1:
        return "The same command repeats or resumes this run:", shlex.join(map(str, argv))
    if passed:
        settings = ", ".join(f"{user(k)} = {user(v)}" for k, v in passed)
        return f"Made from Python; the same settings repeat or resume it: {settings}.", ""
    return "run.json holds no command: this report was made from the records alone.", ""


def flat(values: Any, before: str = "") -> list[tuple[str, str]]:
    """Nested facts as (dotted name, text), in order; empty ones left out. Nothing for what is not a mapping."""
    out: list[tuple[str, str]] = []
    for key, value in values.items() if isinstance(values, dict) else ():
        name = f"{before}.{key}" if before else str(key)
        if isinstance(value, dict):
            out += flat(value, name)
        elif value not in (None, "", []):
            out.append((name, _listed(value) if isinstance(value, list) else str(value)))
    return out


def _listed(values: list[Any]) -> str:
    """'2 in each of 32' where all are alike: facts per layer."""
    alike = len(values) > 2 and all(v == values[0] for v in values)
    return f"{values[0]} in each of {len(values)}" if alike else ", ".join(map(str, values))
