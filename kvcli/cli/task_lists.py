"""What `kvcli list tasks` prints: all tasks by suite, or one with its facts and settings."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcli.cli import output
from kvcli.errors import KvcliError

if TYPE_CHECKING:
    from rich.table import Table

Row = dict[str, Any]
TYPES = {"generate_until": "gen", "multiple_choice": "mc"}
"""Whether an answer is generated or chosen."""
NO_SUITE = "in no suite"
NARROW_NAME = 26
"""Width of names where the screen is very narrow; longer ones go on in the next line."""
NARROWEST = 12
"""Least width of abilities."""


def rows(name: str | None = None) -> list[Row]:
    """The facts of all tasks that can be used, or of those that a text of --task names."""
    from kvcli.evals import loader, packages

    if name is not None:
        return [facts(task) for task in loader.find_tasks([name])]
    found = [_row(loader.load_task(known)) for known in loader.own_names()]
    for known in sorted(set(packages.offers()) - set(loader.own_names())):
        try:
            found.append(_row(loader.load_task(known)))
        except KvcliError as e:
            output.warn(e.what)
    for problem in packages.problems():
        output.warn(problem)
    return sorted(found, key=lambda row: str(row["name"]))


def facts(task: Any) -> Row:
    """Everything that is known of a task without its data, and the remarks its definition begins with."""
    return {**_row(task), "about": about(Path(task.source))}


def _row(task: Any) -> Row:
    from kvcli.evals import loader
    from kvcli.evals.settings import kind_of, settings_of

    cluster = getattr(task, "cluster", None)
    data = {key: getattr(task, key, None) for key in ("dataset_path", "dataset_name", "revision")}
    return {
        "name": task.name, "version": task.version, "ability": task.ability, "type": task.output_type,
        "metric": task.metric, "shots": task.usual_shots, "max_new_tokens": task.max_new_tokens,
        "until": list(task.until), "chance": task.chance, "cluster": getattr(cluster, "text", cluster),
        "harmful": task.harmful, "chat": task.chat, "reference": task.published,
        "suites": list(task.suites),
        "dataset": {key.removeprefix("dataset_"): value for key, value in data.items()},
        "package": _package(task, loader), "source": task.source,
        "typed": loader.text_of(task), "bare": loader.bare_text_of(task),
        "settings": [
            {"name": key, "kind": kind_of(task, key), "value": value} for key, value in settings_of(task).items()
        ],
    }  # fmt: skip


def _by_shots(model: str, scores: Mapping[str, float]) -> str:
    return f"{model} " + ", ".join(f"{score:g} ({shots} shot{'s' * (shots != '1')})" for shots, score in scores.items())


def _package(task: Any, loader: Any) -> str | None:
    return loader.package_of(task.base) if task.base in loader.task_names() else None


def about(source: Path) -> str:
    """The comment that a definition begins with: how its prompts and scores are made, and after whom."""
    if source.suffix not in (".yaml", ".yml") or not source.is_file():
        return ""
    lines = []
    for line in source.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" "))
    return "\n".join(lines).strip()


def print_rows(found: list[Row]) -> None:
    """One table, tasks of the same suites together."""
    from rich.text import Text

    groups: dict[str, list[Row]] = {}
    for row in found:
        groups.setdefault(", ".join(row["suites"]) or NO_SUITE, []).append(row)
    packages = any(row["package"] for row in found)
    headers = ("task", "ability", "shots", "type", "metric", *(["package"] if packages else []))
    lines: list[tuple[object, ...]] = []
    for group in sorted(groups, key=lambda name: (name == NO_SUITE, name)):
        gap = [("",) * len(headers)] if lines else []
        lines += [*gap, (Text(f"{group}:", style="bold"), *("",) * (len(headers) - 1))]
        lines += [_line(row, packages) for row in groups[group]]
    table = output.table(headers, lines)
    table.padding = (0, 1, 0, 0)
    table.columns[2].justify = "right"
    _fit(table, [max(len(str(line[i])) for line in [headers, *lines]) for i in range(len(headers))])
    output.result(table)
    output.note("a suite or a pattern names several: --task testbed, --task 'tb_*'   your own: ./mine.yaml")
    output.note("with settings: --task tb_recall:prompt_tokens=300   one task whole: kvcli list tasks NAME")
    built_in = next((row["name"] for row in found if "testbed" in row["suites"]), None)
    run = f"kvcli sweep --model testbed --method tier1 --ratio 0.3 --task {built_in}"
    output.next_command(run if built_in else f"kvcli list tasks {found[0]['name']}")


def _fit(table: Table, widths: list[int]) -> None:
    """On a narrow screen abilities are cut first, then names go on in the next line; on a very narrow one everything
    wraps as rich would have it."""
    room = output.console()
    bound = room.width if room.is_terminal or "COLUMNS" in os.environ else sum(widths) + 100
    spare = bound - 2 * len(widths) - 1 - (sum(widths) - widths[1])
    if spare < min(widths[1], NARROWEST):
        table.columns[0].max_width = min(widths[0], NARROW_NAME)
        spare += widths[0] - min(widths[0], NARROW_NAME)
    if spare < NARROWEST:
        return
    for column, width in zip(table.columns[1:], widths[1:], strict=True):
        column.no_wrap, column.min_width = True, width
    table.columns[1].min_width, table.columns[1].overflow = None, "ellipsis"
    table.columns[1].max_width = min(widths[1], spare)


def _line(row: Row, packages: bool) -> tuple[object, ...]:
    cells = (row["name"], row["ability"], str(row["shots"]), TYPES.get(row["type"], row["type"]), row["metric"])
    return (*cells, row["package"] or "") if packages else cells


def print_one(row: Row) -> None:
    """Remarks, facts and settings of one task."""
    from rich.text import Text

    data = row["dataset"]
    where = " ".join(filter(None, (data["path"], data["name"]))) if data["path"] else None
    pairs = [
        ("ability", row["ability"]), ("answers", _answers(row)), ("metric", row["metric"]), ("shots", row["shots"]),
        ("new tokens, at most", row["max_new_tokens"]), ("score of guessing", row["chance"]),
        ("cluster", row["cluster"]), ("harmful prompts", "yes, not shown" if row["harmful"] else "no"),
        ("data set", where), ("its revision", data["revision"] or "the newest" if where else None),
        ("published, full cache", "; ".join(_by_shots(k, v) for k, v in row["reference"].items()) or None),
        ("suites", ", ".join(row["suites"]) or None), ("version", row["version"]),
        ("package", _whose(row)), ("definition", row["source"]),
    ]  # fmt: skip
    output.result(Text(row["name"] + (f"\n\n{row['about']}" if row["about"] else "")))
    output.result(output.table(("fact", "value"), [(name, str(v) if v is not None else None) for name, v in pairs]))
    settings = [(s["name"], s["kind"], _shown(s["value"])) for s in row["settings"]]
    settings.append(("shots", "a whole number", str(row["shots"])))
    output.result(output.table(("setting", "takes", "is"), settings))
    numbers = [(key, value) for key, kind, value in settings if kind == "a whole number"]
    name, value = numbers[0]
    example = f"{row['bare']}:{name}={value}"
    output.note(f"set them as in --task {shlex.quote(example)}")
    task = shlex.quote(row["typed"])
    output.next_command(f"kvcli sweep --method tier1 --ratio 0.3 --task {task} --limit 20 --dry-run")


def _whose(row: Row) -> str:
    if str(row["typed"]).startswith("lm_eval:"):
        return "lm-eval"
    return row["package"] or ("kvcli" if "/" not in row["typed"] else "your own file")


def _answers(row: Row) -> str:
    return "chosen by log-likelihood" if row["type"] == "multiple_choice" else "written"


def _shown(value: Any) -> str:
    """A setting's value on one line, short enough for a table; texts in quotes where their ends would not be seen."""
    from kvcli.evals.schema import to_text

    text = to_text(value)
    if isinstance(value, str) and (not value or value != value.strip() or not value.isprintable()):
        text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}..."
