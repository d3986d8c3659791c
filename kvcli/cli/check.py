"""kvcli check: finds damage in a result folder; with --fix it sets broken lines aside and drops replaced ones."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from kvcli.cli import output
from kvcli.cli.following import next_in
from kvcli.errors import Exit, KvcliError
from kvcli.results import store
from kvcli.results.schema import KEY, SCHEMA, check_record


@dataclass(frozen=True)
class Problem:
    """Something wrong at one place. fixable: `--fix` mends it."""

    where: str
    what: str
    fixable: bool = False


@dataclass
class Checked:
    """What one pass over a folder found. replaced: lines whose key has a later line."""

    records: int
    errors: int
    replaced: int
    problems: list[Problem]


def command(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A result folder, its name or a unique beginning of it.")],
    fix: Annotated[
        bool, typer.Option("--fix", help="Save broken lines to FILE.torn and rewrite the files without them.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Check a result folder for damage and compact its records.

    Nothing is changed without --fix. Exit code 2 when problems remain. A sample whose record was set aside is
    measured again by the same sweep.

    Examples:
      kvcli check runs/demo
      kvcli check runs/demo --fix
    """
    folder = store.find_run(run)
    found = check(folder)
    fixed: list[str] = []
    if fix:
        fixed = compact(folder)
        found = check(folder)
    if as_json:
        output.json_result({"folder": str(folder), "fixed": fixed, **asdict(found)})
    else:
        _print(folder, found, fixed)
    if found.problems:
        raise typer.Exit(Exit.USAGE)


def check(folder: Path) -> Checked:
    """Reads every line of every file of a result folder."""
    problems, cells = _check_run(folder)
    records, errors, lines = 0, 0, 0
    shas = set()
    for path in store.prompt_files(folder):
        for line in store.read_lines(path, ("sha",)):
            shas.add((line.value or {}).get("sha"))
            if line.value is None:
                problems.append(_broken(path, line))
    for path in store.record_files(folder):
        last: dict[store.Key, str] = {}
        for line in store.read_lines(path, KEY):
            if line.value is None:
                problems.append(_broken(path, line))
                continue
            lines += 1
            last[store.key_of(line.value)] = str(line.value.get("status"))
            problems += (Problem(f"{path}:{line.number}", what) for what in _faults(line.value, cells, shas))
        records += len(last)
        errors += sum(status != "ok" for status in last.values())
    return Checked(records, errors, lines - records, problems)


def _check_run(folder: Path) -> tuple[list[Problem], dict[str, Any] | None]:
    try:
        return [], store.read_run(folder).get("cells", {})
    except KvcliError as e:
        return [Problem(str(folder / store.RUN), e.what)], None


def _broken(path: Path, line: store.Line) -> Problem:
    kind = "torn last line" if line.torn else "broken line"
    return Problem(f"{path}:{line.number}", f"{kind} ({len(line.raw)} bytes)", fixable=True)


def _faults(record: dict[str, Any], cells: dict[str, Any] | None, shas: set[Any]) -> list[str]:
    """What is wrong with one record that is whole JSON."""
    faults = []
    if record.get("schema") != SCHEMA:
        faults.append(f"schema {record.get('schema')}, this kvcli reads {SCHEMA}")
    try:
        check_record(record)
    except ValueError as e:
        faults.append(str(e))
    if cells is not None and record["cell_id"] not in cells:
        faults.append(f"cell {record['cell_id']} is not in {store.RUN}")
    score = record.get("score")
    if record.get("status") == "ok" and not (isinstance(score, int | float) and 0 <= score <= 1):
        faults.append(f"score {json.dumps(score)} is not in 0..1")
    if record.get("prompt_sha") is not None and record["prompt_sha"] not in shas:
        faults.append(f"prompt {record['prompt_sha']} is not in {store.PROMPTS}")
    return faults


def compact(folder: Path) -> list[str]:
    """Rewrites files that hold broken or replaced lines; what is broken goes to FILE.torn. Returns what was done.

    Raises KvcliError while a sweep writes to the folder.
    """
    done = []
    locks = []
    try:
        files = store.record_files(folder)
        locks = [store.lock_records(path) for path in files]
        for path in files:
            done += _compact_file(path, KEY)
        for path in store.prompt_files(folder):
            done += _compact_file(path, ("sha",))
    finally:
        for lock in locks:
            lock.release()
    return done


def _compact_file(path: Path, keys: tuple[str, ...]) -> list[str]:
    """Keeps the last line of each key, in the order in which the keys first came."""
    whole: dict[tuple[Any, ...], bytes] = {}
    broken, lines = [], 0
    for line in store.read_lines(path, keys):
        if line.value is None:
            broken.append(line.raw)
        else:
            lines += 1
            whole[tuple(line.value[key] for key in keys)] = line.raw
    replaced = lines - len(whole)
    if not broken and not replaced:
        return []
    if broken:
        store.set_aside(path, broken)
    store.write_atomic(path, b"".join(whole.values()))
    parts = [f"{output.count(len(broken), 'broken line')} moved to {path.name}.torn"] * bool(broken)
    parts += [f"{output.count(replaced, 'replaced line')} dropped"] * bool(replaced)
    return [f"{path}: {', '.join(parts)}"]


def _print(folder: Path, found: Checked, fixed: list[str]) -> None:
    for text in fixed:
        output.note(f"fixed {text}")
    if found.problems:
        shown = found.problems[:50]
        output.result(output.table(("where", "problem"), [(p.where, p.what) for p in shown]))
        if len(found.problems) > len(shown):
            output.note(f"and {len(found.problems) - len(shown)} more")
    failed = f", {found.errors} of failed samples" if found.errors else ""
    replaced = f", {output.count(found.replaced, 'replaced line')}" if found.replaced else ""
    problems = output.count(len(found.problems), "problem") if found.problems else "no problems"
    output.result(f"{folder}: {output.count(found.records, 'record')}{failed}{replaced}, {problems}")
    if any(p.fixable for p in found.problems) or (found.replaced and not found.problems):
        output.next_command(f"kvcli check {folder} --fix")
    else:
        next_in(folder, f"kvcli status {folder}")
