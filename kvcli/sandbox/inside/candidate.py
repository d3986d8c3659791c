"""The process under test: defines what the program defines, then answers calls of its function."""

from __future__ import annotations

import sys
import types
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from typing import Any

from kvcli.sandbox.inside import wire

LONGEST = 200
"""Characters of an error's text."""


class Packages:
    """Finds the few packages that programs may use beside the standard library."""

    def __init__(self, folders: Mapping[str, str]) -> None:
        self.folders = folders

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        folder = self.folders.get(name)
        if folder is None:
            return None
        return spec_from_file_location(name, f"{folder}/__init__.py", submodule_search_locations=[folder])


def serve(job: Mapping[str, Any]) -> None:
    """Runs the program and answers until the checker hangs up. Nothing of the tests is in this process."""
    link = wire.Link(*job["link"])
    sys.meta_path.append(Packages(job["packages"]))
    link.send({"ready": True})
    try:
        function = _defined(job["source"], job["entry"])
    except BaseException as error:
        link.send({"error": _told(error)})
        return
    link.send({"defined": True})
    while True:
        try:
            call = link.receive()
        except wire.Closed:
            return
        link.send(_answer(function, call))


def _defined(source: str, entry: str) -> Any:
    module = types.ModuleType("program")
    sys.modules["program"] = module
    exec(compile(source, "program.py", "exec", dont_inherit=True), module.__dict__)
    if entry not in module.__dict__:
        raise NameError(f"the program defines no {entry}")
    return module.__dict__[entry]


def _answer(function: Any, call: Any) -> dict[str, Any]:
    try:
        args, kwargs = wire.decode(call["args"]), wire.decode(call["kwargs"])
        return {"value": wire.encode(function(*args, **kwargs))}
    except BaseException as error:
        return {"error": _told(error)}


def _told(error: BaseException) -> list[str]:
    try:
        text = str(error)[:LONGEST]
    except BaseException:
        text = ""
    return [type(error).__name__, text]
