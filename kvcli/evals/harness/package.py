"""The installed lm-eval: whether it is there, its index of tasks, and its messages kept apart from kvcli's."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from kvcli.errors import KvcliError

TESTED = "0.4.13"
"""The version of lm-eval that this package was tested with."""


def version() -> str:
    """The installed lm-eval's version. Raises KvcliError where there is none."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("lm-eval")
    except PackageNotFoundError as e:
        fix = "pip install 'kvcli[lm-eval]'"
        raise KvcliError("lm-evaluation-harness is not installed", given="lm_eval", fix=fix) from e


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """lm-eval's remarks about defaults of a task's file are not those of a run; its errors stay."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@cache
def index() -> dict[str, Any]:
    """All of lm-eval's tasks, groups and tags by name: entries with `kind`, `yaml_path`, `cfg` and `tags`.

    Reading them takes some seconds. Raises KvcliError for a version without such an index.
    """
    with supported(), quiet():
        from lm_eval.tasks import TaskManager

        return dict(TaskManager().task_index)


def definition(name: str) -> Path | None:
    """The one file of lm-eval that defines a task of this name; None where none or several seem to.

    Found by its text, in a tenth of the time that the whole index takes.
    """
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        return None
    line = re.compile(rb"""^["']?(task|group|tag)["']?:[ \t]*["']?%s["']?[ \t]*\r?$""" % re.escape(name).encode(), re.M)
    found: list[tuple[Path, bytes]] = []
    for path in (Path(spec.origin).parent / "tasks").rglob("*.yaml"):
        found += [(path, match[1]) for match in line.finditer(path.read_bytes())]
    return found[0][0] if [kind for _, kind in found] == [b"task"] else None


@cache
def samples_of(name: str) -> tuple[list[dict[str, Any]], str]:
    """The exemplars written in lm-eval's task of this name (`fewshot_config: {samples: [...]}`), and why there are
    none. Raises nothing: tasks that could use them can do without."""
    if importlib.util.find_spec("lm_eval") is None:
        return [], "lm-evaluation-harness, which has them, is not installed (pip install 'kvcli[lm-eval]')"
    path = definition(name)
    try:
        config = load_yaml(path, functions=False).get("fewshot_config") if path is not None else None
    except KvcliError as e:
        return [], e.what
    rows = config.get("samples") if isinstance(config, dict) else None
    if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
        return rows, ""
    return [], f"the installed lm-eval has none in its task '{name}'"


def load_yaml(path: Path, *, functions: bool = True) -> dict[str, Any]:
    """A task's file with what it includes; its functions imported, or their names."""
    with supported(), quiet():
        from lm_eval.tasks._yaml_loader import load_yaml as load

        return dict(load(path, resolve_func=functions))


@contextlib.contextmanager
def supported() -> Iterator[None]:
    """Turns what another version of lm-eval lacks into one line."""
    found = version()
    try:
        yield
    except (AttributeError, ImportError) as e:
        if found == TESTED and isinstance(e, ImportError):
            what = f"lm-eval needs a package that is not there: {e}"
            raise KvcliError(what, given="lm_eval", fix=f"pip install {e.name or 'it'}") from e
        what = f"lm-eval {found} cannot be used: {e}"
        raise KvcliError(what, given="lm_eval", fix=f"pip install lm-eval=={TESTED}") from e
