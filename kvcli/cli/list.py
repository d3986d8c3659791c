"""kvcli list: what there is to choose from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from kvcli.cli import output
from kvcli.cli.following import next_in
from kvcli.errors import KvcliError

Row = dict[str, Any]
NEEDED = {"always keeps": 110, "paper": 80, "kind": 68}
"""Narrower screens show methods without these columns: `list methods NAME` has them."""
WRAPPED = ("settings (defaults)", "always keeps")
"""Columns that go on in the next line, between words."""


def command(
    kind: Annotated[
        str | None,
        typer.Argument(help="methods, tasks, models, presets or runs; without it: how many.", show_default=False),
    ] = None,
    name: Annotated[
        str | None, typer.Argument(help="One method, task or preset, to see all of it.", show_default=False)
    ] = None,
    folder: Annotated[Path, typer.Option("--folder", help="Where `list runs` looks.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """List methods, tasks, models, presets or result folders.

    Examples:
      kvcli list methods
      kvcli list methods snapkv
      kvcli list tasks gsm8k
      kvcli list tasks --json
      kvcli list presets kvfundabench_table7
      kvcli list runs
    """
    kinds = {"methods": methods, "tasks": tasks, "models": models, "presets": presets, "runs": lambda: runs(folder)}
    if kind is not None and name is not None:
        _one(kind, name, as_json)
        return
    if kind is None:
        counts = {name: len(rows()) for name, rows in kinds.items()}
        output.json_result(counts) if as_json else _print_counts(counts)
        return
    if kind not in kinds:
        fix = " or ".join(f"kvcli list {name}" for name in kinds)
        raise KvcliError(f"unknown kind '{kind}'", given=f"kvcli list {kind}", fix=fix)
    rows = kinds[kind]()
    if as_json:
        output.json_result(rows)
    else:
        _PRINT[kind](rows)


def methods() -> list[Row]:
    """The declared facts of every method."""
    from kvcli.methods import catalog

    return catalog.cards()


def tasks() -> list[Row]:
    from kvcli.cli import task_lists

    return task_lists.rows()


def presets() -> list[Row]:
    from kvcli.cli import presets as shipped

    return shipped.rows()


def _one(kind: str, name: str, as_json: bool) -> None:
    """`kvcli list tasks NAME` and the like. Raises KvcliError for kinds whose members are in their table whole, and for
    unknown names."""
    if kind == "tasks":
        from kvcli.cli import task_lists

        found = task_lists.rows(name)
        if as_json:
            output.json_result(found)
        elif len(found) == 1:
            task_lists.print_one(found[0])
        else:
            task_lists.print_rows(found)
    elif kind == "methods":
        _one_method(name, as_json)
    elif kind == "presets":
        from kvcli.cli import presets as shipped

        row = shipped.whole(name)
        output.json_result(row) if as_json else shipped.print_one(row)
    else:
        fix = " or ".join(f"kvcli list {other} NAME" for other in ("methods", "tasks", "presets"))
        raise KvcliError(f"kvcli list {kind} takes no name", given=f"kvcli list {kind} {name}", fix=fix)


def _one_method(name: str, as_json: bool) -> None:
    """One method whole, or the table of a tier."""
    from kvcli.cli import method_lists

    group = [card for card in methods() if f"tier{card['tier']}" == name] if name.startswith("tier") else []
    if group:
        output.json_result(group) if as_json else _print_methods(group)
        return
    card = method_lists.row(name)
    output.json_result(card) if as_json else method_lists.print_one(card)


def models() -> list[Row]:
    from kvcli.models import aliases

    shipped = [{"name": name, "hub_id": None} for name in aliases.TESTBEDS]
    return shipped + [{"name": name, "hub_id": hub} for name, hub in aliases.ALIASES.items()]


def runs(folder: Path) -> list[Row]:
    """Result folders in `folder`, last written first."""
    from kvcli.results import store

    found = [_run(path) for path in folder.iterdir() if store.is_run(path)] if folder.is_dir() else []
    return sorted(found, key=lambda run: (run["updated"] or "", run["folder"]), reverse=True)


def _run(folder: Path) -> Row:
    from kvcli.results import store

    try:
        run, problem = store.read_run(folder), None
    except KvcliError as e:
        run, problem = {}, e.what
    status = run.get("status", "unknown")
    if status == "running" and not store.writers(folder):
        status = "interrupted"
    records = sum(_count_lines(path) for path in store.record_files(folder))
    return {
        "folder": str(folder), "status": status, "model": run.get("config", {}).get("model"), "lines": records,
        "updated": run.get("updated"), "problem": problem,
    }  # fmt: skip


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def _print_counts(counts: dict[str, int]) -> None:
    rows = [(name, count, f"kvcli list {name}") for name, count in counts.items()]
    output.result(output.table(("what", "how many", "all of them"), rows))


def _print_methods(rows: list[Row]) -> None:
    columns: dict[str, list[Any]] = {
        "method": [r["name"] for r in rows], "tier": [r["tier"] for r in rows], "kind": [r["kind"] for r in rows],
        "paper": [r["paper"] or None for r in rows], "settings (defaults)": [_settings(r) for r in rows],
        "always keeps": [r["protects"] for r in rows],
    }  # fmt: skip
    gone: list[str] = []
    room = output.console()
    if room.is_terminal or "COLUMNS" in os.environ:
        for name, least in NEEDED.items():
            if room.width < least:
                del columns[name]
                gone.append(name)
    table = output.table(list(columns), zip(*columns.values(), strict=True))
    for column in table.columns:
        column.no_wrap = str(column.header) not in WRAPPED
    output.result(table)
    if gone:
        output.note(f"not shown on a screen this narrow: {', '.join(gone)}")
    output.note("one method whole: kvcli list methods NAME")
    tiers = ", ".join(f"tier{t}" for t in sorted({r["tier"] for r in rows}) if t)
    output.note(f"groups: all, {tiers}   with settings: snapkv:window=16   your own: ./mine.py:MyMethod")
    output.next_command("kvcli sweep --model testbed --method tier1 --ratio 0.1,0.3,0.5")


def _settings(card: Row) -> str:
    pairs = ((s["name"], s["default"]) for s in card["settings"])
    return " ".join(f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in pairs) or "-"


def _print_tasks(rows: list[Row]) -> None:
    from kvcli.cli import task_lists

    task_lists.print_rows(rows)


def _print_presets(rows: list[Row]) -> None:
    from kvcli.cli import presets as shipped

    shipped.print_rows(rows)


def _print_models(rows: list[Row]) -> None:
    listed = [(r["name"], r["hub_id"] or "shipped with kvcli") for r in rows]
    output.result(output.table(("model", "hub id"), listed))
    output.note("or ORG/NAME[@REV], ./FOLDER, random:FOLDER (a config with random weights)")
    output.next_command("kvcli sweep --model testbed --method tier1 --ratio 0.3")


def _print_runs(rows: list[Row]) -> None:
    if not rows:
        output.note("no result folders yet")
        output.next_command("kvcli sweep --model testbed --method tier1 --ratio 0.3")
        return
    listed = [(r["folder"], r["status"], r["model"], r["lines"], _minute(r["updated"])) for r in rows]
    output.result(output.table(("folder", "status", "model", "records", "updated (UTC)"), listed))
    for row in rows:
        if row["problem"]:
            output.warn(row["problem"])
    next_in(Path(rows[0]["folder"]), f"kvcli show {rows[0]['folder']}")


def _minute(when: str | None) -> str | None:
    """'2026-11-22 14:26' of the time in run.json."""
    return when and when[:16].replace("T", " ")


_PRINT = {
    "methods": _print_methods, "tasks": _print_tasks, "models": _print_models, "presets": _print_presets,
    "runs": _print_runs,
}  # fmt: skip
