"""Tasks of other packages, by the entry-point group `kvcli.tasks`.

An entry point names a package (its folder holds definitions `NAME.yaml`), the text or path of such a folder, a class
derived from Task, or a function without arguments that gives one of these.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

from kvcli.errors import KvcliError
from kvcli.evals.definition import make_task, read_definition
from kvcli.evals.spec import Task

GROUP = "kvcli.tasks"


@dataclass(frozen=True)
class Offer:
    """A task that an installed package offers: its definition's file, or its class."""

    name: str
    package: str
    version: str
    made_of: Path | type[Task]

    def load(self) -> Task:
        """Raises KvcliError for a definition or a class that cannot be used."""
        if isinstance(self.made_of, Path):
            task = make_task(read_definition(self.made_of))
            if task.name != self.name:
                what = f"{self.made_of}: 'task: {task.name}' is not the file's name"
                raise KvcliError(what, given=f"--task {self.name}", fix=f"task: {self.name}")
            return dataclasses.replace(task, digest=_hash(self.version, task.digest, *_code(self.made_of.parent)))
        return self._of_class(self.made_of)

    def _of_class(self, cls: type[Task]) -> Task:
        given, fix = f"--task {self.name}", "every field of the class needs a default"
        try:
            task = cls()  # type: ignore[call-arg]
        except (TypeError, ValueError) as e:
            raise KvcliError(f"{self.package}: {cls.__name__} cannot be made: {e}", given=given, fix=fix) from e
        if task.name != self.name:
            what = f"{self.package}: the name of {cls.__name__} is '{task.name}', its entry point's '{self.name}'"
            raise KvcliError(what, given=given, fix=f"name = '{self.name}' in the class")
        source = Path(inspect.getfile(cls))
        digest = _hash(self.version, source.read_text(encoding="utf-8"), *_code(source.parent))
        return dataclasses.replace(task, source=task.source or str(source), digest=digest)


def offers() -> dict[str, Offer]:
    """Task names to what installed packages offer; of two packages with one name the first by name."""
    return _read()[0]


def problems() -> list[str]:
    """What is wrong with packages that cannot be used; the others stay usable."""
    return _read()[1]


@cache
def _read() -> tuple[dict[str, Offer], list[str]]:
    from importlib.metadata import entry_points

    found: dict[str, Offer] = {}
    wrong: list[str] = []
    for point in sorted(entry_points(group=GROUP), key=lambda p: (p.dist.name if p.dist else "", p.name)):
        package, version = (point.dist.name, point.dist.version) if point.dist else (point.value, "")
        try:
            offered = {name: Offer(name, package, version, made) for name, made in _members(point).items()}
        except Exception as e:
            wrong.append(f"tasks of package {package} cannot be read: {type(e).__name__}: {e}")
            continue
        for name, offer in offered.items():
            other = found.setdefault(name, offer)
            if other is not offer:
                wrong.append(f"task '{name}' of package {package} is left out: {other.package} has one of that name")
    return found, wrong


def _members(point: EntryPoint) -> dict[str, Path | type[Task]]:
    """What an entry point offers. Raises anything a package can raise."""
    value = point.load()
    if inspect.isclass(value):
        return {point.name: _checked(value)}
    if callable(value):
        value = value()
    if inspect.isclass(value):
        return {point.name: _checked(value)}
    return {path.stem: path for path in _definitions(_place(value))}


def _place(value: Any) -> Path:
    if isinstance(value, ModuleType):
        if not hasattr(value, "__path__"):  # its folder is where all packages lie
            raise TypeError(f"{value.__name__} is a module: name a package, whose folder holds the definitions")
        return Path(str(value.__file__)).parent
    if isinstance(value, str | Path):
        return Path(value)
    raise TypeError(f"{value!r} is neither a folder nor a class derived from kvcli.evals.spec.Task")


def _definitions(place: Path) -> list[Path]:
    found = [place] if place.suffix == ".yaml" and place.is_file() else sorted(place.glob("*.yaml"))
    if not found:
        raise FileNotFoundError(f"no .yaml file in {place}")
    return found


def _checked(cls: type) -> type[Task]:
    if not issubclass(cls, Task) or not dataclasses.is_dataclass(cls):
        raise TypeError(f"{cls.__name__} is not a frozen dataclass derived from kvcli.evals.spec.Task")
    return cls


def _code(folder: Path) -> list[str]:
    """The code of the package that a folder is; nothing for a folder that is none."""
    files = sorted(folder.rglob("*.py")) if (folder / "__init__.py").is_file() else []
    return [file.read_text(encoding="utf-8") for file in files]


def _hash(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]
