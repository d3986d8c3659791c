"""Finds tasks: definitions `tasks/NAME.yaml`, their suites, and a user's own file. Imports no torch and no datasets."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from kvcli.errors import KvcliError, unknown
from kvcli.evals.definition import make_task, read_definition
from kvcli.evals.folder import definitions_folder
from kvcli.evals.spec import Task

LISTING = "kvcli list tasks"


def find_tasks(texts: Sequence[str]) -> list[Task]:
    """The tasks of `--task NAME|SUITE|GLOB|./file.yaml` options (each a comma list), in order, without repeats.

    Raises KvcliError for a name nobody knows, and for a definition that cannot be used.
    """
    tasks: dict[str, Task] = {}
    for text in texts:
        for piece in text.split(","):
            for task in _find(piece.strip(), text):
                if tasks.setdefault(task.name, task).source != task.source:
                    raise _same_name(task, tasks[task.name].source)
    return list(tasks.values())


def task_names() -> list[str]:
    """All tasks known by name, sorted."""
    return sorted(path.stem for path in definitions_folder().glob("*.yaml"))


def suites() -> dict[str, list[str]]:
    """Suite names to the names of their tasks."""
    out: dict[str, list[str]] = {}
    for name in task_names():
        for suite in load_task(name).suites:
            out.setdefault(suite, []).append(name)
    return dict(sorted(out.items()))


def load_task(name: str) -> Task:
    """The task of a name (hyphens count as underscores). Raises KvcliError when there is none."""
    plain = name.replace("-", "_")
    path = definitions_folder() / f"{plain}.yaml"
    if plain not in task_names():
        raise unknown("task", name, task_names(), given=f"--task {name}", listing=LISTING)
    task = make_task(read_definition(path))
    if task.name != plain:
        raise KvcliError(f"{path}: 'task: {task.name}' is not the file's name", given=str(path), fix=f"task: {plain}")
    return task


def _find(piece: str, text: str) -> list[Task]:
    given = f"--task {text}"
    if not piece:
        raise KvcliError("an empty task name", given=given, fix="remove the extra comma")
    if piece[0] in "./~" or piece.endswith((".yaml", ".yml")):
        return [_from_file(Path(piece).expanduser(), given)]
    name, names = piece.replace("-", "_"), task_names()
    if name in names:
        return [load_task(name)]
    groups = suites()
    if name in groups:
        return [load_task(member) for member in groups[name]]
    matches = [n for n in names if fnmatchcase(n, name)] if set(name) & set("*?[") else []
    if not matches:
        raise unknown("task", piece, [*names, *groups], given=given, listing=LISTING)
    return [load_task(match) for match in matches]


def _from_file(path: Path, given: str) -> Task:
    if not path.is_file():
        raise KvcliError(f"no file {path}", given=given, fix="check the path; it is read from the current folder")
    task = make_task(read_definition(path))
    if task.name in task_names() and path.resolve().parent != definitions_folder():
        raise _same_name(task, f"{task.name}.yaml of kvcli")
    return task


def _same_name(task: Task, other: str) -> KvcliError:
    what = f"{task.source}: the name '{task.name}' is taken by {other}"
    return KvcliError(what, given=task.source, fix=f"write task: my_{task.name}")
