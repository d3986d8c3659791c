"""Text and blocks that a report is made of, written once and drawn as Markdown, HTML or LaTeX.

A text is a plain string in which names of users and models stand between marks (private-use characters). Writers
escape by kind, so no name can act as markup in any format.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_OPEN = {"code": "\ue001", "strong": "\ue002", "user": "\ue003", "raised": "\ue004"}
_CLOSE = "\ue000"
_KINDS = {mark: kind for kind, mark in _OPEN.items()}
_SPAN = re.compile("([\ue001-\ue004])([^\ue000]*)\ue000")
_MARKS = re.compile("[\ue000-\ue004]")


def code(text: object) -> str:
    """A name as it is typed: a method, a task, an option."""
    return _marked("code", text)


def strong(text: object) -> str:
    return _marked("strong", text)


def user(text: object) -> str:
    """Words of a user, a task file or a model."""
    return _marked("user", text)


def raised(text: object) -> str:
    """Letters above the line: flags of a cell."""
    return _marked("raised", text)


def _marked(kind: str, text: object) -> str:
    plain = " ".join(_MARKS.sub("", str(text)).split())
    return f"{_OPEN[kind]}{plain}{_CLOSE}" if plain else ""


def pieces(text: str) -> list[tuple[str, str]]:
    """(words, kind) in order; kind: code, strong, user, raised, or empty for the report's own words."""
    found, at = [], 0
    for match in _SPAN.finditer(text):
        found += [(text[at : match.start()], "")] if match.start() > at else []
        found.append((match[2], _KINDS[match[1]]))
        at = match.end()
    return [*found, (text[at:], "")] if at < len(text) else found


def plain(text: str) -> str:
    """The words alone."""
    return "".join(words for words, _ in pieces(text))


@dataclass(frozen=True)
class Paragraph:
    text: str
    warning: bool = False


@dataclass(frozen=True)
class Bullets:
    """Points, each with those under it."""

    items: Sequence[tuple[str, Sequence[str]]]

    @classmethod
    def of(cls, texts: Sequence[str]) -> Bullets:
        return cls([(text, ()) for text in texts])


@dataclass(frozen=True)
class Grid:
    """A table. right: columns of numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Command:
    """A command line to copy."""

    text: str


Block = Paragraph | Bullets | Grid | Command


@dataclass(frozen=True)
class Section:
    """key: a short fixed name for links."""

    key: str
    title: str
    blocks: Sequence[Block]


def section(key: str, title: str, *blocks: Block | None) -> Section:
    return Section(key, title, [block for block in blocks if block is not None])
