"""Texts of a task definition that are filled in from a row: jinja2 templates or bare field names."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

_FIELD = re.compile(r"[A-Za-z_]\w*\Z")


@dataclass(frozen=True)
class Template:
    """`Q: {{question}}` or the bare name of a field, as in lm-evaluation-harness.

    Beside jinja2's own filters: `regex_replace(pattern, replacement)` as in lm-evaluation-harness, and `after(mark)`,
    the text behind the last mark, an error where there is no mark.
    """

    text: str

    def __post_init__(self) -> None:
        """Raises ValueError when the text is not a template."""
        import jinja2

        if self.text.strip() == "":
            raise ValueError("it is empty")
        try:
            _environment().parse(self.text)
        except jinja2.TemplateSyntaxError as e:
            raise ValueError(f"not a template: {e.message}") from e

    @property
    def is_field(self) -> bool:
        return bool(_FIELD.match(self.text))

    def value(self, row: Mapping[str, Any]) -> Any:
        """The field as it is, or the rendered text. Raises ValueError naming the missing or unusable field."""
        return self._field(row) if self.is_field else _render(self.text, row)

    def render(self, row: Mapping[str, Any]) -> str:
        """The filled-in text. Raises ValueError as `value` does, for a field that is no text, and for blank text."""
        text = self.value(row)
        if not isinstance(text, str):
            raise ValueError(f"field '{self.text}' is {_kind(text)}, not text")
        if not text.strip():
            raise ValueError(f"'{_shortened(self.text)}' gives no text")
        return text

    def listed(self, row: Mapping[str, Any]) -> list[Any]:
        """The field, or the list that the rendered text writes, as `doc_to_choice` of lm-evaluation-harness is read.

        Raises ValueError when it is no list.
        """
        if self.is_field:
            value = self._field(row)
        else:
            text = _render(self.text, row, checked=False)
            try:
                value = ast.literal_eval(text.strip())
            except (ValueError, SyntaxError, MemoryError, RecursionError) as e:
                raise ValueError(f"'{_shortened(self.text)}' gives {_shortened(text)!r}, not a list") from e
        if not isinstance(value, list):
            raise ValueError(f"'{_shortened(self.text)}' is {_kind(value)}, not a list")
        return value

    def _field(self, row: Mapping[str, Any]) -> Any:
        if self.text not in row:
            raise ValueError(f"no field '{self.text}'")
        return row[self.text]


@cache
def template(text: str) -> Template:
    """The template of a text, parsed once."""
    return Template(text)


def _render(text: str, row: Mapping[str, Any], *, checked: bool = True) -> str:
    import jinja2

    try:
        rendered: str = _compiled(text, checked).render(**row)
    except jinja2.UndefinedError as e:
        missing = re.match(r"'(\w+)' is undefined", str(e))
        raise ValueError(f"no field '{missing[1]}'" if missing else str(e)) from e
    except (jinja2.TemplateError, TypeError, LookupError, ArithmeticError, re.error) as e:
        raise ValueError(f"{type(e).__name__}: {e}") from e
    return rendered


@cache
def _environment(checked: bool = True) -> Environment:
    """Sandboxed: a task file may come from a stranger. Strict: a missing field is an error, not an empty text.

    checked: null, lists and mappings are errors too.
    """
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
        finalize=_printable if checked else None,
    )
    environment.filters["regex_replace"] = regex_replace
    environment.filters["after"] = after
    return environment


@cache
def _compiled(text: str, checked: bool) -> Any:
    return _environment(checked).from_string(text)


def regex_replace(text: str, pattern: str, replacement: str, count: int = 0) -> str:
    """As lm-evaluation-harness `lm_eval/utils.py` regex_replace."""
    return re.sub(pattern, replacement, text, count=count)


def after(text: str, mark: str) -> str:
    """The text behind the last `mark`, without white space around it."""
    _, found, tail = text.rpartition(mark)
    if not found:
        raise ValueError(f"no '{mark}' in the field")
    return tail.strip()


def _printable(value: Any) -> Any:
    """Python's way of writing null, lists and mappings never belongs in a prompt."""
    if value is None or isinstance(value, list | dict):
        raise ValueError(f"a field of the template is {_kind(value)}, not text")
    return value


def _kind(value: Any) -> str:
    names = {
        "NoneType": "null",
        "list": "a list",
        "dict": "a mapping",
        "int": "a number",
        "float": "a number",
        "str": "text",
    }
    return names.get(type(value).__name__, type(value).__name__)


def _shortened(text: str, most: int = 40) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 3] + "..."
