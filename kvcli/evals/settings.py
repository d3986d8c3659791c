"""Settings of a task: scalar fields that its class adds to Task, set as in `--task niah:length=8192,depth=0.5`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin

from kvcli.errors import KvcliError
from kvcli.evals.schema import BadValue, from_text, hints_of, is_scalar, to_text
from kvcli.evals.spec import Task
from kvcli.grammar import Part

SHOTS = "shots"
"""A setting of every task; it is no part of the name, for records and tables have shots of their own."""
FIXED = ("scorer", "parallel")
"""What only a definition can say: a file of code, which its hash covers, and with which tasks it shares the order."""


def settings_of(task: Task) -> dict[str, Any]:
    """Names of its settings, sorted, to the values it has."""
    facts = {f.name for f in dataclasses.fields(Task)} | set(FIXED)
    own = [f.name for f in dataclasses.fields(task) if f.init and f.name not in facts and not f.name.startswith("_")]
    return {name: getattr(task, name) for name in sorted(own) if is_scalar(hints_of(type(task))[name])}


def kind_of(task: Task, name: str) -> str:
    """What a setting takes, in words."""
    return _words(hints_of(type(task))[name])


def with_settings(task: Task, typed: Sequence[tuple[str, str]], given: str) -> Task:
    """The task with its settings; its name becomes the canonical text: settings sorted, defaults dropped.

    A default is what the definition says. Raises KvcliError for unknown settings and values they cannot have.
    """
    defaults, values = settings_of(task), {}
    for key, text in typed:
        if key == SHOTS:
            task = dataclasses.replace(task, shots_asked=_shots(task, text, given))
            continue
        if key not in defaults:
            raise _no_such(task, key, given)
        try:
            values[key] = from_text(text, hints_of(type(task))[key], key)
        except BadValue as fault:
            fix = f"{kind_of(task, key)}, as in --task {Part(task.name, ((key, to_text(defaults[key])),))}"
            raise KvcliError(f"{task.name}: {fault}", given=given, fix=fix) from fault
    changed = {key: values[key] for key in sorted(values) if values[key] != defaults[key]}
    if not changed:
        return task
    name = str(Part(task.name, tuple((key, to_text(value)) for key, value in changed.items())))
    try:
        return dataclasses.replace(task, name=name, **changed)
    except ValueError as fault:
        fix = f"kvcli list tasks {task.name} shows its settings"
        raise KvcliError(f"{task.name}: {fault}", given=given, fix=fix) from fault


def settings_text(task: Task) -> str:
    """What stands behind the colon to have the task again, the shots too; empty where there is nothing."""
    texts = [task.name.removeprefix(task.base).removeprefix(":")]
    texts += [] if task.shots_asked is None else [f"{SHOTS}={task.shots_asked}"]
    return ",".join(filter(None, texts))


def _shots(task: Task, text: str, given: str) -> int:
    if not text.isdecimal():
        what = f"{task.name}: '{SHOTS}' must be a whole number, not '{text}'"
        raise KvcliError(what, given=given, fix=f"--task {task.name}:{SHOTS}={task.shots}")
    return int(text)


def _no_such(task: Task, key: str, given: str) -> KvcliError:
    known = sorted([*settings_of(task), SHOTS])
    close = get_close_matches(key, known, n=1, cutoff=0.5)
    fix = "".join(f"{name}; " for name in close) + f"the settings of {task.name} are {', '.join(known)}"
    return KvcliError(f"unknown setting '{key}' of {task.name}", given=given, fix=fix)


def _words(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "|".join(map(to_text, get_args(annotation)))
    inner = [a for a in get_args(annotation) if a is not type(None)]
    if inner:
        return f"{_words(inner[0])} or none"
    return {str: "text", int: "a whole number", float: "a number", bool: "true or false"}[annotation]
