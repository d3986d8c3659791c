"""The report in Markdown: verdicts, how it was measured, warnings, tables with every interval, provenance."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcli.analysis import names, stats, wording
from kvcli.analysis.load import Run
from kvcli.analysis.stats import Difference
from kvcli.analysis.tables import DENSE, MATCH, CellSummary, TaskTable, summarise

WORST = 20
"""So many (task, method) pairs get a verdict of their own; the others are named in one line each task."""
FIGURES = "figures"
"""Folder beside the report whose pictures it shows."""

OVER_BUDGET = (
    "Over budget = the method kept more than was asked for, in some samples at least. A loss is a loss all the same, "
    "but such a cell is not ranked: compare it with other methods at its measured ratio only"
)
FIRST_TOKEN = {
    "compressed": "the first answer token is computed through the compressed cache, like all others",
    "prefill": "the first answer token comes from the prefill, before anything was evicted",
    "n/a": "the method drops tokens while it reads the prompt, so the two ways cannot be told apart",
}


def write_report(run: Run, path: Path, tables: Sequence[TaskTable] | None = None) -> Path:
    """Writes the report; shows the pictures that lie in figures/ beside it. Returns the path.

    tables: the run's summary where it is known already.
    """
    folder = path.parent / FIGURES
    pictures = sorted(p.name for p in folder.glob("*.png")) if folder.is_dir() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    text = markdown(run, summarise(run) if tables is None else tables, [f"{FIGURES}/{name}" for name in pictures])
    path.write_text(text, encoding="utf-8")
    return path


def markdown(run: Run, tables: Sequence[TaskTable], pictures: Sequence[str] = ()) -> str:
    """The whole report. pictures: links relative to the report's folder."""
    parts = [
        _head(run, tables), _verdicts(tables), _how(run, tables), _warnings(tables), _first_token(tables),
        _figures(pictures), _tables(tables), _provenance(run),
    ]  # fmt: skip
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _head(run: Run, tables: Sequence[TaskTable]) -> list[str]:
    lines = [f"# KV cache compression: {_plain(run.model)}", "", f"Run `{run.name}`, {len(run):,} records."]
    status = run.meta.get("status")
    if status not in (None, "done", "complete", "finished"):
        lines[-1] += f" **Status {_plain(status)}: not all samples are in.**"
    if run.config("limit") is not None:
        lines[-1] += f" A subset: `--limit {run.config('limit')}`, the same samples for every method."
    count = sum(len(table.warnings) for table in tables)
    if count:
        lines += ["", f"> **{count} sanity warning{'s' * (count > 1)}** below: read them before the verdicts."]
    return lines


@dataclass(frozen=True)
class _Finding:
    """One task and method over all its ratios."""

    label: str
    method: str
    cells: tuple[CellSummary, ...]

    @property
    def worst(self) -> float:
        """Largest established loss, over budget or not, in score (negative); 0 where none is established."""
        losses = [c.difference.value for c in self.cells if c.difference and c.verdict == "loss"]
        return min(losses, default=0.0)


def _verdicts(tables: Sequence[TaskTable]) -> list[str]:
    judged = [t for t in tables if not (t.first_token == "prefill" and _twin(t, tables))]
    findings = sorted(_findings(judged), key=lambda f: f.worst)
    comparisons = sum(cell.difference is not None for f in findings for cell in f.cells)
    lines = ["## Verdict", ""]
    if not comparisons:
        compared = "only `full` was run" if not findings else "there is no finished sample of both `full` and a method"
        return [*lines, f"Nothing can be said: {compared}."]
    lines += [
        f"Loss established = less than `full` on the same samples, and {stats.ESTABLISHED}. {comparisons} "
        "comparisons, not adjusted for their number: if nothing were lost, up to about "
        f"{comparisons * 0.025:.1f} of them would still look like a loss. Differences are in percentage points, with "
        "their interval and the change relative to `full`.",
        "",
    ]
    if len(judged) < len(tables):
        lines += ["First token `compressed` only; `prefill` stands beside it in a section of its own.", ""]
    if any(_over(cell) for f in findings for cell in f.cells):
        lines += [f"{OVER_BUDGET}.", ""]
    lost = [f for f in findings if f.worst < 0]
    lines += [f"- {_sentence(f)}" for f in lost[:WORST]] or ["- No loss is established anywhere."]
    lines += _in_short("Smaller losses established", lost[WORST:], _smaller)
    lines += _in_short("No loss established at any ratio", [f for f in findings if f.worst == 0], _not_excluded)
    return lines


def _twin(table: TaskTable, tables: Sequence[TaskTable]) -> TaskTable | None:
    """The same task, query mode and shots with the first token through the compressed cache."""
    key = (table.task, table.query, table.shots, table.weights, "compressed")
    return next((t for t in tables if (t.task, t.query, t.shots, t.weights, t.first_token) == key), None)


def _findings(tables: Sequence[TaskTable]) -> list[_Finding]:
    return [
        _Finding(_label(table, tables), row.label, tuple(cell for cell in table.cells() if cell.method == row.method))
        for table in tables
        for row in table.rows
    ]


def _label(table: TaskTable, tables: Sequence[TaskTable]) -> str:
    """The task, with what tells its tables apart where it has several."""
    same = [t for t in tables if t.task == table.task]
    parts = [
        f"first token {table.first_token}" if len({t.first_token for t in same}) > 1 else "",
        f"query {table.query}" if len({t.query for t in same}) > 1 else "",
        f"{table.shots} shots" if len({t.shots for t in same}) > 1 else "",
        table.weights if table.weights != DENSE else "",
    ]
    extra = ", ".join(filter(None, parts))
    return f"{table.task} ({extra})" if extra else table.task


def _sentence(finding: _Finding) -> str:
    groups: dict[str, list[str]] = {"loss": [], "gain": [], "open": []}
    for cell in finding.cells:
        if cell.difference is None:
            continue
        relative = f", {wording.relative(cell.relative)}" if cell.relative is not None else ""
        interval = wording.points_interval(cell.difference.interval)
        groups[cell.verdict].append(f"{_at(cell)}: {wording.points(cell.difference.value)} ({interval}{relative})")
    heads = {"loss": "**loss established** at ", "gain": "gain established at ", "open": "not established at "}
    text = "; ".join(heads[kind] + ", ".join(found) for kind, found in groups.items() if found)
    counts = sorted({cell.difference.n for cell in finding.cells if cell.difference})
    n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"
    return f"**{_code(finding.label)}, {_code(finding.method)}** (n = {n}): {text}."


def _at(cell: CellSummary) -> str:
    """What was asked for, and beside it what was kept where that is more."""
    over = f" (over budget, measured {wording.measured(cell.measured_ratio)})" if _over(cell) else ""
    asked = f"the bytes of {cell.column.removeprefix(MATCH)}" if cell.column.startswith(MATCH) else cell.column
    return f"{asked}{over}"


def _over(cell: CellSummary) -> bool:
    return cell.over_budget and cell.difference is not None


def _in_short(head: str, findings: Sequence[_Finding], say: Any) -> list[str]:
    """One line per task."""
    if not findings:
        return []
    by_task: dict[str, list[str]] = {}
    for finding in findings:
        by_task.setdefault(finding.label, []).append(f"{_code(finding.method)} ({say(finding)})")
    return ["", f"{head}:", "", *(f"- {_code(label)}: {', '.join(said)}" for label, said in by_task.items())]


def _smaller(finding: _Finding) -> str:
    at = ", ".join(_at(c) for c in finding.cells if c.verdict == "loss")
    return f"{wording.points(finding.worst)} at worst, established at {at}"


def _not_excluded(finding: _Finding) -> str:
    """The largest loss that the intervals still allow: 'not established' is not 'none'."""
    lows = [c.difference.interval.low for c in finding.cells if c.difference and c.difference.interval]
    if not lows:
        said = "no interval"
    else:
        said = f"losses up to {wording.points(-max(-min(lows), 0.0)).lstrip('-+')} points not excluded"
    over = ", ".join(f"{c.column} (measured {wording.measured(c.measured_ratio)})" for c in finding.cells if _over(c))
    return f"{said}; over budget at {over}" if over else said


def _how(run: Run, tables: Sequence[TaskTable]) -> list[str]:
    shown = ("revision", "dtype", "tokenizer", "parameters", "layers", "heads", "kv_heads", "context")
    facts = {k: v for part in ("identity", "model") for k, v in _flat(run.meta.get(part))}
    known = ", ".join(f"{k.replace('_', ' ')} {_plain(facts[k])}" for k in shown if k in facts)
    lines = ["## How it was measured", "", f"- Model: `{_plain(run.model)}`" + (f" ({known})" if known else "") + "."]
    for first_token in dict.fromkeys(t.first_token for t in tables):
        meaning = FIRST_TOKEN.get(first_token, "")
        lines.append(f"- First token `{first_token}`" + (f": {meaning}." if meaning else "."))
    for query in dict.fromkeys(t.query for t in tables):
        seen = "was" if query == "aware" else "was not"
        lines.append(f"- Query `{query}`: the question {seen} visible to the compression.")
    found = names.files(cell.method for cell in run.cells)
    lines += [f"- Method {_code(name)}: {_code(source)}." for name, source in found.items()]
    lines += _weights(run, tables)
    first = {(t.task, t.shots): t for t in reversed(tables)}
    lines += [f"- {_code(t.task)}: {_task_facts(t)}." for t in reversed(first.values())]
    lines += [
        "- Measured ratio: bytes kept over bytes of the 16-bit full cache; `noop` samples stay in every mean and are "
        "counted in the tables.",
        "- Scores: Wilson interval (0/1 scores) or t interval. Differences: same samples with and without compression; "
        "Newcombe's paired score interval and mid-p McNemar for 0/1 scores, BCa bootstrap for graded ones, t over "
        "clusters where samples belong together (docs/statistics.md).",
    ]
    if any(cell.seeds > 1 for table in tables for cell in table.cells()):
        lines.append("- Seeds of one method are averaged within each sample first; n counts samples.")
    return lines


def _weights(run: Run, tables: Sequence[TaskTable]) -> list[str]:
    """What was pruned, on which texts, and that such results stand apart."""
    measured = run.meta.get("weights")
    lines = []
    for weights in dict.fromkeys(t.weights for t in tables if t.weights != DENSE):
        facts = measured.get(weights, {}) if isinstance(measured, dict) else {}
        said = f": {_pruned(facts)}" if facts else ""
        lines.append(f"- Weights {_code(weights)}{said}. Its tables stand apart; their differences are to `full` with "
                     "these weights.")  # fmt: skip
    return lines


def _pruned(facts: dict[str, Any]) -> str:
    file = facts["calibration"]["file"]
    texts = f"{facts['texts']} texts ({facts['tokens']:,} tokens) of {_plain(file) if file else 'its own language'}"
    return (
        f"{100 * facts['sparsity']:.2f} % of the {facts['parameters']:,} weights in {facts['matrices']} matrices are "
        f"zero ({100 * facts['of_model']:.1f} % of the model), calibrated on {texts}"
    )


def _task_facts(table: TaskTable) -> str:
    parts = [
        _plain(table.ability) if table.ability else "", f"{_plain(table.metric)}" if table.metric else "",
        f"version {_plain(table.version)}" if table.version else "",
        f"{table.shots} shots" if table.shots is not None else "", f"n = {wording.sample_range(table)}",
        f"{table.clusters} clusters" if table.clusters else "",
        f"median prompt {table.n_prompt:.0f} tokens" if table.n_prompt is not None else "",
        f"chance {wording.score(table.chance)}" if table.chance is not None else "",
    ]  # fmt: skip
    return ", ".join(filter(None, parts))


def _warnings(tables: Sequence[TaskTable]) -> list[str]:
    found = [f"- {_code(_label(t, tables))}: {_plain(text)}." for t in tables for text in t.warnings]
    return ["## Sanity warnings", "", *(found or ["None: `full` is above chance and its answers could be extracted."])]


def _first_token(tables: Sequence[TaskTable]) -> list[str]:
    """Both first-token modes side by side where both were run; nothing otherwise."""
    pairs = [p for p in _mode_pairs(tables) if p[2].difference and p[3].difference]
    if not pairs:
        return []
    established = [p for p in pairs if p[2].verdict == "loss"]
    hidden = [p for p in established if p[3].verdict != "loss"]
    shown = [p for p in pairs if {p[2].verdict, p[3].verdict} != {"open"}]
    lines = [
        "## First token: compressed against prefill",
        "",
        f"{len(hidden)} of the {len(established)} losses established with `compressed` are not established with "
        "`prefill`. With `prefill` the first answer token is read from the prefill's own logits, before anything is "
        "evicted, so a task answered by one letter or word cannot lose much; its loss shows only with `compressed`. "
        "Kept tokens and bytes are the same in both, so what lies between the two columns is the first token alone.",
        "",
        "| task | method | asked | n | compressed: points [95 %] | prefill: points [95 %] |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for task, method, compressed, prefill in shown:
        n = compressed.difference.n if compressed.difference else 0
        ends = " | ".join(_difference(cell) for cell in (compressed, prefill))
        lines.append(f"| {_code(task)} | {_code(method)} | {compressed.column} | {n} | {ends} |")
    if len(shown) < len(pairs):
        lines += ["", f"Left out: {len(pairs) - len(shown)} pairs in which neither mode shows an established change."]
    return lines


def _mode_pairs(tables: Sequence[TaskTable]) -> Iterator[tuple[str, str, CellSummary, CellSummary]]:
    """(task, method, compressed, prefill) for cells that differ by the first-token mode alone."""
    for other in tables:
        table = _twin(other, tables) if other.first_token == "prefill" else None
        if table is None:
            continue
        label = _label(table, [t for t in tables if t.first_token == "compressed"])
        theirs = {(cell.method, cell.column): cell for cell in other.cells()}
        for cell in table.cells():
            if (cell.method, cell.column) in theirs:
                yield label, cell.label, cell, theirs[cell.method, cell.column]


def _figures(pictures: Sequence[str]) -> list[str]:
    if not pictures:
        return []
    lines = ["## Figures", ""]
    for link in pictures:
        lines += [f"![{Path(link).stem}]({link.replace(' ', '%20')})", ""]
    return lines[:-1]


def _tables(tables: Sequence[TaskTable]) -> list[str]:
    lines = ["## Tables"]
    for table in tables:
        lines += ["", f"### {_plain(_label(table, tables))}", "", *table_lines(table)]
    return [*lines, "", *_legend(tables)]


def table_lines(table: TaskTable) -> list[str]:
    """One task as a Markdown table: a row per method and ratio, full first."""
    lines = [f"{_task_facts(table)}; {wording.mode(table)}.", ""]
    lines += [f"> {_plain(text)}\n" for text in (*(f"warning: {w}" for w in table.warnings), *table.notes)]
    cells = ([table.full] if table.full else []) + table.cells()
    more = any(cell.extra for cell in cells)
    lines += [
        "| method | asked | measured | n | score [95 %] | points to full [95 %] | relative | p | better / worse "
        "| no answer | cut | " + "also | " * more + "flags |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | " + "--- | " * more + "--- |",
    ]
    lines += [_row(cell, table.full, more) for cell in cells]
    return [*lines, "", *_intervals_used(table)]


def _row(cell: CellSummary, full: CellSummary | None, more: bool) -> str:
    change = cell.difference
    marks = [wording.flag_counts(cell), f"{cell.errors} failed" if cell.errors else ""]
    fields = [
        _code(cell.label), cell.column, wording.measured(cell.measured_ratio),
        f"{cell.n}" + (f" x {cell.seeds} seeds" if cell.seeds > 1 else ""),
        f"{wording.score(cell.score)} {wording.score_interval(cell.interval)}", _difference(cell),
        wording.relative(cell.relative) if change else "", wording.p_value(change.p) if change else "",
        f"{change.better} / {change.worse}" if change else "", wording.share(cell.no_answer),
        wording.share(cell.truncated), *[_plain(wording.figures(cell))] * more, ", ".join(filter(None, marks)),
    ]  # fmt: skip
    return "| " + " | ".join(fields) + " |"


def _difference(cell: CellSummary) -> str:
    """'**-12.3** [-16.4, -8.1]', bold where the difference is established."""
    if cell.difference is None:
        return ""
    value = wording.points(cell.difference.value)
    if cell.verdict in ("loss", "gain"):
        value = f"**{value}**"
    return f"{value} {wording.points_interval(cell.difference.interval)}"


def _intervals_used(table: TaskTable) -> list[str]:
    used: Counter[str] = Counter()
    for cell in table.cells():
        if cell.difference:
            used[_way(cell.difference)] += 1
    if not used:
        return []
    said = "; ".join(f"{way} ({count} row{'s' * (count > 1)})" for way, count in used.most_common())
    return [f"Intervals of the differences and their tests: {said}."]


def _way(difference: Difference) -> str:
    interval = difference.interval
    if interval is None:
        return "no interval: one independent unit only"
    return f"{interval.method}, p by {difference.test}" + (f" ({interval.note})" if interval.note else "")


def _legend(tables: Sequence[TaskTable]) -> list[str]:
    """What the columns and the flags that occur mean."""
    lines = [
        "Columns: *asked* kept ratio or budget; *measured* bytes kept over the 16-bit full cache; *relative* "
        "(P - P_full) / P_full; *p* two-sided, not adjusted; *better / worse* samples that changed; *no answer* share "
        "of outputs without an extractable answer (of requests: incoherent or empty ones); *cut* share stopped by the "
        "token limit; *also* means of what the scorer gives beside the score. **Bold**: established: "
        f"{stats.ESTABLISHED}.",
    ]
    if any(column.kind == "match" for table in tables for column in table.columns):
        lines[0] += (" *Asked* `= METHOD`: held, prompt by prompt, to the bytes of that method (whole KV pairs, so to "
                     "within half a pair per KV head), which stands beside them.")  # fmt: skip
    flags = {flag for table in tables for cell in table.cells() for flag in cell.flags}
    meanings = [wording.MEANING[wording.MARKS[flag]] for flag in wording.MARKS if flag in flags]
    return lines + ["", *(f"- {_plain(text)}" for text in meanings)] * bool(meanings)


def _provenance(run: Run) -> list[str]:
    parts = ("provenance", "identity", "model", "schema", "status", "created", "updated")
    facts = _flat({k: run.meta[k] for k in parts if k in run.meta})
    lines = ["## Provenance", ""]
    if facts:
        lines += ["| what | value |", "| --- | --- |", *(f"| {_plain(k)} | {_plain(v)} |" for k, v in facts), ""]
    if run.torn:
        lines += [f"Torn last lines (not written, the same command repeats them): {', '.join(run.torn)}.", ""]
    argv, passed = run.meta.get("argv"), _flat(run.meta.get("passed"))
    if isinstance(argv, list) and len(argv) > 1:
        lines += ["The same command repeats or resumes this run:", "", "```sh", shlex.join(map(str, argv)), "```"]
    elif passed:
        settings = ", ".join(f"{k} = {_plain(v)}" for k, v in passed)
        lines.append(f"Made from Python; the same settings repeat or resume it: {settings}.")
    else:
        lines.append("run.json holds no command: this report was made from the records alone.")
    return lines


def _flat(values: Any, before: str = "") -> list[tuple[str, str]]:
    """Nested facts as (dotted name, text), in order; empty ones left out. Nothing for what is not a mapping."""
    out: list[tuple[str, str]] = []
    for key, value in values.items() if isinstance(values, dict) else ():
        name = f"{before}.{key}" if before else str(key)
        if isinstance(value, dict):
            out += _flat(value, name)
        elif value not in (None, "", []):
            out.append((name, _listed(value) if isinstance(value, list) else str(value)))
    return out


def _listed(values: list[Any]) -> str:
    """'2 in each of 32' where all are alike: facts per layer."""
    alike = len(values) > 2 and all(v == values[0] for v in values)
    return f"{values[0]} in each of {len(values)}" if alike else ", ".join(map(str, values))


def _plain(value: Any) -> str:
    """Text of a model, a task or a user that must not act as Markdown."""
    text = " ".join(str(value).split())
    for char in "\\`*<>|[]":
        text = text.replace(char, f"\\{char}")
    return text


def _code(text: str) -> str:
    """A name as it is typed; pipes would end a table's cell."""
    return "`" + " ".join(text.split()).replace("`", "'").replace("|", "\\|") + "`"
