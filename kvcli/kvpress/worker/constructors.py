"""What the constructors of presses take, and presses made from a description of it."""

from __future__ import annotations

import importlib
import inspect
import types
import typing
from typing import Any

from kvcli.kvpress.worker import Refused


def press_class(name: str) -> Any:
    kvpress = importlib.import_module("kvpress")
    cls = getattr(kvpress, name, None)
    if not (inspect.isclass(cls) and issubclass(cls, kvpress.BasePress)):
        raise Refused(f"kvpress has no press '{name}'")
    return cls


def make(description: dict[str, Any]) -> Any:
    """A press from {'class': name, 'arguments': {...}}; an argument may be another press."""
    arguments = {
        key: make(value) if isinstance(value, dict) else value for key, value in description["arguments"].items()
    }
    return press_class(description["class"])(**arguments)


def parameters(cls: Any) -> list[dict[str, Any]]:
    """Name, kind, default and choices of what a user may set. The compression ratio is not among them: it is asked for
    with every prompt."""
    found = []
    hints = _hints(cls)
    for name, parameter in list(inspect.signature(cls.__init__).parameters.items())[1:]:
        if name.startswith("_") or name == "compression_ratio":
            continue
        kind, choices, optional = _kind(hints.get(name, parameter.annotation))
        default = parameter.default
        required = default is parameter.empty or (kind == "press" and default is None)
        plain = default if isinstance(default, (bool, int, float, str)) else None
        found.append(
            {"name": name, "kind": kind, "default": plain, "required": required, "choices": choices,
             "optional": optional or (default is None and not required)}
        )  # fmt: skip
    return found


def _hints(cls: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls.__init__)
    except Exception:
        return {}


def _kind(annotation: Any) -> tuple[str, list[str] | None, bool]:
    """(kind, choices, whether None is a value): bool, int, float, str, floats, press, or other."""
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return "str", [str(value) for value in inside], False
    if origin in (typing.Union, types.UnionType):
        kinds = {_kind(a)[:1] for a in inside if a is not type(None)}
        first = next((a for a in inside if a is not type(None)), None)
        kind, choices, _ = _kind(first)
        return (kind if len(kinds) == 1 else "other"), choices, type(None) in inside
    if origin is list and inside == (float,):
        return "floats", None, False
    if annotation in (bool, int, float, str):
        return annotation.__name__, None, False
    base = importlib.import_module("kvpress").BasePress
    if inspect.isclass(annotation) and issubclass(annotation, base):
        return "press", None, False
    return "other", None, False
