"""Values of a YAML file made into typed values: dataclasses, tuples and Literals by their annotations."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import types
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


class BadValue(ValueError):
    """A value of a definition that cannot be used; `fix` says what to write instead."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.fix = fix


def convert(value: Any, annotation: Any, name: str) -> Any:
    """`value` as the annotation wants it; `name` is its place in messages. Raises BadValue.

    Numbers are taken for text, whole numbers for floats, one value for a list of one; a class with a single text field
    (Template) is made from text, any other dataclass from a mapping.
    """
    origin = get_origin(annotation)
    if annotation is Any:
        return value
    if origin in (Union, types.UnionType):
        return _optional(value, annotation, name)
    if origin is Literal:
        return _literal(value, get_args(annotation), name)
    if origin is tuple:
        values = value if isinstance(value, list) else [value]
        return tuple(convert(v, get_args(annotation)[0], f"{name}[{i}]") for i, v in enumerate(values))
    if origin in (dict, Mapping):
        return _mapping(value, get_args(annotation), name)
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return _instance(value, annotation, name)
    return _scalar(value, annotation, name)


def is_scalar(annotation: Any) -> bool:
    """Whether a value can be typed on a command line: text, a number, true or false, one of several, or none."""
    if get_origin(annotation) in (Union, types.UnionType):
        return all(a is type(None) or is_scalar(a) for a in get_args(annotation))
    return annotation in (str, int, float, bool) or get_origin(annotation) is Literal


def from_text(text: str, annotation: Any, name: str) -> Any:
    """A scalar as typed on a command line, made what the annotation wants. Raises BadValue."""
    if get_origin(annotation) in (Union, types.UnionType):
        (inner,) = [a for a in get_args(annotation) if a is not type(None)]
        return None if text == "none" else from_text(text, inner, name)
    if get_origin(annotation) is Literal:
        choices = {to_text(choice): choice for choice in get_args(annotation)}
        return choices[text] if text in choices else _literal(text, get_args(annotation), name)
    if annotation is str:
        return text
    value: Any = {"true": True, "false": False}.get(text.lower(), text)
    for kind in (float, int) if value is text else ():
        with contextlib.suppress(ValueError):
            value = kind(text)
    if isinstance(value, float) and not math.isfinite(value):
        value = text
    return convert(value, annotation, name)


def to_text(value: Any) -> str:
    """The one spelling of a scalar: what `from_text` reads back."""
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def fill(cls: type, values: Mapping[str, Any], name: str) -> Any:
    """An instance of a dataclass from a mapping; `name` is the mapping's place, empty at the top."""
    hints, fields = hints_of(cls), {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise unknown_key(str(key), fields, name)
    missing = [f.name for f in fields.values() if f.name not in values and not _has_default(f)]
    if missing:
        raise BadValue(f"'{_place(name, missing[0])}' is missing", f"add a line {missing[0]}: ...")
    typed = {key: convert(value, hints[key], _place(name, key)) for key, value in values.items()}
    return build(cls, typed, name)


def build(cls: Callable[..., Any], typed: Mapping[str, Any], name: str) -> Any:
    """cls(**typed), with a ValueError of its own checks made a BadValue."""
    try:
        return cls(**typed)
    except BadValue:
        raise
    except ValueError as e:
        raise BadValue(f"'{name}': {e}" if name else str(e), "docs/adding-a-task.md has an example") from e


def unknown_key(key: str, known: Any, name: str = "") -> BadValue:
    close = get_close_matches(key, list(known), n=1, cutoff=0.6)
    fix = f"write {close[0]}" if close else f"remove it; the keys are {', '.join(sorted(known))}"
    return BadValue(f"unknown key '{_place(name, key)}'", fix)


@cache
def hints_of(cls: type) -> dict[str, Any]:
    """Evaluated annotations of a dataclass, inherited fields included."""
    return get_type_hints(cls)


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _place(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _optional(value: Any, annotation: Any, name: str) -> Any:
    """Unions are read as `X | None`."""
    if value is None:
        return None
    (inner,) = [a for a in get_args(annotation) if a is not type(None)]
    return convert(value, inner, name)


def _literal(value: Any, choices: tuple[Any, ...], name: str) -> Any:
    if value not in choices:
        raise BadValue(f"'{name}' cannot be {value!r}", f"write {name}: {' or '.join(map(str, choices))}")
    return value


def _mapping(value: Any, arguments: tuple[Any, ...], name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadValue(f"'{name}' must be a mapping", f"write {name}: {{key: value}}")
    inner = arguments[1] if arguments else Any
    return {str(k): convert(v, inner, f"{name}.{k}") for k, v in value.items()}


def _instance(value: Any, cls: type, name: str) -> Any:
    names = [f.name for f in dataclasses.fields(cls)]
    if names == ["text"]:
        return build(cls, {"text": _scalar(value, str, name)}, name)
    if not isinstance(value, dict):
        raise BadValue(f"'{name}' must be a mapping", f"its keys are {', '.join(names)}")
    return fill(cls, value, name)


def _scalar(value: Any, kind: Any, name: str) -> Any:
    wanted = {str: (str, int, float), int: (int,), float: (int, float), bool: (bool,)}
    if kind not in wanted:
        raise TypeError(f"a task class has a field of a kind YAML cannot give: {name}: {kind}")
    if not isinstance(value, wanted[kind]) or (isinstance(value, bool) and kind is not bool):
        words = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}[kind]
        raise BadValue(f"'{name}' must be {words}, not {value!r}", f"write {name}: followed by {words}")
    return kind(value)
