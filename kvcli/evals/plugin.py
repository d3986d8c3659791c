"""Code beside a task definition, loaded by path: `file.py:Name`. Never `import tasks`, no change of sys.path."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from kvcli.evals.folder import definitions_folder
from kvcli.evals.schema import BadValue


def load_object(text: str, folder: Path) -> Any:
    """The object behind `file.py:Name`, see `split`. Raises BadValue."""
    path, name = split(text, folder)
    module = _module(path, file_digest(path))
    if not hasattr(module, name):
        raise BadValue(f"no '{name}' in {path}", "check the name behind the colon")
    return getattr(module, name)


def split(text: str, folder: Path) -> tuple[Path, str]:
    """Path and name of `file.py:Name`: a file beside the definition, else one of kvcli's own (`testbed.py`).

    Raises BadValue when the text has another form or there is no such file.
    """
    file, colon, name = text.rpartition(":")
    if not colon or not file.endswith(".py") or not name.isidentifier():
        raise BadValue(f"'{text}' is not a piece of code", "write file.py:Name")
    for place in (folder, definitions_folder()):
        if (place / file).is_file():
            return (place / file).resolve(), name
    raise BadValue(f"no file {folder / file}", "it is looked for beside the definition, then among kvcli's own tasks")


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


@cache
def _module(path: Path, digest: str) -> ModuleType:
    name = f"kvcli_task_{path.stem}_{digest}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise BadValue(f"{path} is not a Python file", "write file.py:Name")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        del sys.modules[name]
        raise BadValue(f"{path} cannot be imported: {type(e).__name__}: {e}", "mend the file") from e
    return module
