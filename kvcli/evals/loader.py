"""Finds tasks: definitions `tasks/NAME.yaml`, their suites, those of other packages, of lm-evaluation-harness, and a
user's own file. Imports no torch and no datasets."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from kvcli.errors import KvcliError, unknown
from kvcli.evals import packages
from kvcli.evals.definition import make_task, read_definition
from kvcli.evals.folder import definitions_folder
from kvcli.evals.settings import settings_of, settings_text, with_settings
from kvcli.evals.spec import Task
from kvcli.grammar import LM_EVAL, NotASetting, Part, parse_tasks

LISTING = "kvcli list tasks"


def find_tasks(texts: Sequence[str]) -> list[Task]:
    """The tasks of `--task NAME|SUITE|GLOB|./file.yaml|lm_eval:NAME` options (each a comma list, each with settings
    behind a colon), in order, without repeats.

    Raises KvcliError for a name nobody knows, a setting a task does not have, and a definition that cannot be used.
    """
    tasks: dict[str, Task] = {}
    for text in texts:
        given = f"--task {text}"
        for part in _parts(text):
            for found in _find(part.source, given):
                task = with_settings(found, part.settings, given)
                other = tasks.setdefault(task.name, task)
                if other.source != task.source:
                    raise _same_name(task, other.source)
                if other.usual_shots != task.usual_shots:
                    fix = f"--task {task.name} --shots {other.usual_shots},{task.usual_shots}"
                    raise KvcliError(f"two numbers of shots for {task.name}", given=given, fix=fix)
    return list(tasks.values())


def _parts(text: str) -> list[Part]:
    """Raises KvcliError with the likely spelling where a value stands without its key."""
    try:
        return parse_tasks([text])
    except NotASetting as fault:
        close = f"{fault.source}_{fault.text}".replace("-", "_")
        fix = fault.fix
        if fault.source and close in task_names():
            fix = f"--task {close}"
        elif fault.source in task_names() and not fault.text.isdecimal():
            settings = settings_of(load_task(fault.source))
            if settings.get("dataset_name") and fault.text.isidentifier():
                fix = (
                    f"{fault.source}:dataset_name={fault.text} for that part of the data set; {fix.partition('; ')[2]}"
                )
        raise KvcliError(fault.what, given=fault.given, fix=fix) from None


def own_names() -> list[str]:
    """The tasks that come with kvcli, sorted."""
    return sorted(path.stem for path in definitions_folder().glob("*.yaml"))


def task_names() -> list[str]:
    """All tasks known by name, sorted: kvcli's own and those of installed packages."""
    return sorted({*own_names(), *packages.offers()})


def suites() -> dict[str, list[str]]:
    """Suite names to the names of their tasks. kvcli's own suites have only kvcli's own tasks."""
    own: dict[str, list[str]] = {}
    for name in own_names():
        for suite in load_task(name).suites:
            own.setdefault(suite, []).append(name)
    others: dict[str, list[str]] = {}
    for name in sorted(set(packages.offers()) - set(own_names())):
        for suite in load_task(name).suites:
            if suite not in own:
                others.setdefault(suite, []).append(name)
    return dict(sorted({**own, **others}.items()))


def load_task(name: str) -> Task:
    """The task of a name (hyphens count as underscores). Raises KvcliError when there is none."""
    plain = name.replace("-", "_")
    if plain not in own_names():
        offers = packages.offers()
        if plain not in offers:
            raise _unknown(name, task_names(), f"--task {name}")
        return offers[plain].load()
    path = definitions_folder() / f"{plain}.yaml"
    return _own(path, path.stat().st_mtime_ns)


@cache
def _own(path: Path, written: int) -> Task:
    """A task of kvcli's own; `written` so that an edited file is read again."""
    task = make_task(read_definition(path))
    if task.name != path.stem:
        what = f"{path}: 'task: {task.name}' is not the file's name"
        raise KvcliError(what, given=str(path), fix=f"task: {path.stem}")
    return task


def text_of(task: Task) -> str:
    """The text of --task that finds the task again: its name, or the path of a user's own file with its settings."""
    return ":".join(filter(None, (bare_text_of(task), settings_text(task))))


def bare_text_of(task: Task) -> str:
    """The same without settings."""
    return task.base if task.base.startswith(LM_EVAL) or task.base in task_names() else task.source


def own_digest(task: Task) -> str | None:
    """Hash of a task that does not come with kvcli, so that an edited one is another cell; kvcli's have versions."""
    return None if task.base in own_names() else task.digest


def package_of(name: str) -> str | None:
    """The package a task comes from; None for kvcli's own."""
    return None if name in own_names() else packages.offers()[name].package


def _find(source: str, given: str) -> list[Task]:
    if source.startswith(LM_EVAL):
        return _of_harness(source.removeprefix(LM_EVAL), given)
    if source[0] in "./~" or source.endswith((".yaml", ".yml")):
        return [_from_file(Path(source).expanduser(), given)]
    if source in own_names():
        return [load_task(source)]
    names = task_names()
    if source in names:
        return [load_task(source)]
    groups = suites()
    if source in groups:
        return [load_task(member) for member in groups[source]]
    matches = [n for n in names if fnmatchcase(n, source)] if set(source) & set("*?[") else []
    if not matches:
        raise _unknown(source, [*names, *groups], given)
    return [load_task(match) for match in matches]


def _unknown(name: str, known: Sequence[str], given: str) -> KvcliError:
    error = unknown("task", name, known, given=given, listing=LISTING)
    if packages.problems():
        error.fix += f"; {packages.problems()[0]}"
    return error


def _of_harness(name: str, given: str) -> list[Task]:
    """A task of lm-evaluation-harness, or all of a group. Raises KvcliError where that package is not installed."""
    from kvcli.evals.harness.tasks import find

    try:
        return [*find(name)]
    except KvcliError as e:
        e.given = given
        raise


def _from_file(path: Path, given: str) -> Task:
    if not path.is_file():
        raise KvcliError(f"no file {path}", given=given, fix="check the path; it is read from the current folder")
    task = make_task(read_definition(path))
    if task.name in own_names() and path.resolve().parent != definitions_folder():
        raise _same_name(task, f"{task.name}.yaml of kvcli")
    offer = packages.offers().get(task.name)
    if offer is not None and path.resolve() != offer.made_of:
        raise _same_name(task, f"package {offer.package}")
    return task


def _same_name(task: Task, other: str) -> KvcliError:
    what = f"{task.source}: the name '{task.name}' is taken by {other}"
    return KvcliError(what, given=task.source, fix=f"write task: my_{task.base}")
