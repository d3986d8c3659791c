"""kvcli new-method: a working method with its test, to begin one's own from."""

from __future__ import annotations

import importlib.util
import keyword
import re
import sys
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from kvcli.cli import output
from kvcli.errors import KvcliError

TEMPLATES = Path(__file__).parents[1] / "templates"
NAME = re.compile(r"[a-z][a-z0-9_]*\Z")


def command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the method: small letters, digits and _.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write into.")] = Path(),
    package: Annotated[
        bool, typer.Option("--package", help="Write a package that others can install and name by NAME.")
    ] = False,
) -> None:
    """Write a working method and its test, to begin your own from.

    \b
    Examples:
      kvcli new-method mine
      kvcli sweep --method ./mine.py:Mine,tier1 --ratio 0.1,0.3
      kvcli new-method mine --package
    """
    from kvcli.methods import catalog

    name = name.replace("-", "_")
    given = f"kvcli new-method {name}"
    if not NAME.match(name) or keyword.iskeyword(name):
        raise KvcliError(
            f"'{name}' is no name for a method", given=given, fix="small letters, digits and _, as in my_method"
        )
    if name in (*catalog.names(), "all", "kvpress") or re.fullmatch(r"tier\d+", name):
        raise KvcliError(f"there is a method '{name}' already", given=given, fix=f"kvcli new-method my_{name}")
    class_name = "".join(word.capitalize() for word in name.split("_"))
    files = _package(name, class_name) if package else _single(name, class_name)
    paths = [(out / place, text) for place, text in files.items()]
    for path, _ in paths:
        if path.exists():
            raise KvcliError(f"{path} exists", given=given, fix="another NAME, or another --out")
    if not package and (name in sys.stdlib_module_names or importlib.util.find_spec(name) is not None):
        what = f"a file {name}.py would stand in the way of Python's own '{name}'"
        raise KvcliError(what, given=given, fix=f"kvcli new-method my_{name}")
    for path, text in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as e:
            raise KvcliError(f"cannot write {path}: {e.strerror}", given=given, fix="another --out") from e
        output.result(str(path))
    pytest = "python -m pytest"
    if importlib.util.find_spec("pytest") is None:
        pytest = f"pip install pytest && {pytest}"  # only kvcli[dev] brings it
    if package:
        place = out / f"kvcli-{name.replace('_', '-')}"
        output.note(f"pip install -e {place}   then --method {name}")
        output.next_command(f"pip install -e {place} && {pytest} {place}")
        return
    output.note(f"its test: {pytest} {out / f'test_{name}.py'}")
    source = f"{_relative(out)}/{name}.py:{class_name}"
    output.next_command(f"kvcli sweep --method {source},tier1 --ratio 0.1,0.3 --limit 20")


def _relative(folder: Path) -> str:
    """A path as --method wants it: it begins with . or /."""
    text = str(folder)
    return text if text.startswith((".", "/", "~")) else f"./{text}"


def _single(name: str, class_name: str) -> dict[str, str]:
    words = _words(name, class_name)
    here = "f\"{__file__.rpartition('/')[0]}/" + f'{name}.py:{class_name}"'
    test = _filled("test_method.py.txt", {**words, "source": "\0"}).replace('"\0"', here)
    return {f"{name}.py": _filled("method.py.txt", words), f"test_{name}.py": test}


def _package(name: str, class_name: str) -> dict[str, str]:
    words = _words(name, class_name)
    root = f"kvcli-{words['dashed']}"
    return {
        f"{root}/pyproject.toml": _filled("pyproject.toml.txt", words),
        f"{root}/kvcli_{name}/__init__.py": _filled("method.py.txt", words),
        f"{root}/tests/test_{name}.py": _filled("test_method.py.txt", {**words, "source": name}),
    }


def _words(name: str, class_name: str) -> dict[str, str]:
    return {"name": name, "class_name": class_name, "title": class_name, "dashed": name.replace("_", "-")}


def _filled(template: str, words: dict[str, str]) -> str:
    return Template((TEMPLATES / template).read_text(encoding="utf-8")).substitute(words)
