"""The text of a prompt in pieces: raw, or inside the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvcli.errors import KvcliError
from kvcli.spans import Segment

TEMPLATE_DATE = "26 Jul 2024"
"""Llama 3 templates print a date; a fixed one (their own default) keeps prompts the same tomorrow."""
SYSTEM_MARK, USER_MARK = "kvcliSYSTEMmark", "kvcliUSERmark"


@dataclass(frozen=True)
class Piece:
    """Text of one kind: a segment's, or `special` for the template's own."""

    text: str
    kind: str
    index: int = -1


def raw_pieces(segments: Sequence[Segment], system: str | None) -> list[Piece]:
    """System text, a blank line, then the segments as they are."""
    front = [Piece(f"{system}\n\n", "system")] if system else []
    return front + [Piece(s.text, s.region, s.shot) for s in segments]


def chat_pieces(segments: Sequence[Segment], tokenizer: Any, system: str | None, thinking: bool = False) -> list[Piece]:
    """One user message with all segments, and a system message, inside the rendered template.

    The template is rendered twice: with marks for the messages, which shows its own text before, between and behind
    them, and with the messages themselves. Some templates strip white space off a message; the pieces follow. A
    template without a system message (Mistral 7B v0.1, Gemma) gets the system text and a blank line at the front of
    the user message, as mistral-common does. Raises KvcliError for a template that is missing or changes the text.
    """
    own = _own_text_with_system(tokenizer, thinking) if system else None
    inside = raw_pieces(segments, None if own else system)
    head = system if own and system else ""
    own = own or _own_text(tokenizer, [USER_MARK], thinking)
    content = "".join(p.text for p in inside)
    whole = _render(tokenizer, [head, content] if head else [content], thinking)
    for kept_head in _stripped(head):
        front = [Piece(own[0], "special"), Piece(kept_head, "system"), Piece(own[1], "special")] if head else []
        front = front or [Piece(own[0], "special")]
        before = "".join(p.text for p in front)
        for kept in _stripped(content):
            if before + kept + own[-1] == whole:
                return [*front, *_trimmed(inside, content, kept), Piece(own[-1], "special")]
    raise _bad_template(tokenizer, "it changes the text of the messages")


def _stripped(text: str) -> list[str]:
    return list(dict.fromkeys((text, text.strip(), text.rstrip(), text.lstrip())))


def _own_text_with_system(tokenizer: Any, thinking: bool) -> list[str] | None:
    """The template's own text around a system and a user message; None where it shows no system message."""
    try:
        return _own_text(tokenizer, [SYSTEM_MARK, USER_MARK], thinking)
    except KvcliError:
        return None


def _own_text(tokenizer: Any, marks: list[str], thinking: bool) -> list[str]:
    """The template's own text before, between and behind messages that are nothing but marks."""
    rest, parts = _render(tokenizer, marks, thinking), []
    for mark in marks:
        if rest.count(mark) != 1:
            raise _bad_template(tokenizer, f"it shows a message {rest.count(mark)} times")
        before, _, rest = rest.partition(mark)
        parts.append(before)
    return [*parts, rest]


def _trimmed(pieces: Sequence[Piece], content: str, kept: str) -> list[Piece]:
    """The pieces of `content` as pieces of `kept`, which is `content` with white space taken off its ends."""
    left = 0 if content.startswith(kept) else len(content) - len(content.lstrip())
    trimmed, start = [], 0
    for piece in pieces:
        end = start + len(piece.text)
        trimmed.append(Piece(kept[max(0, start - left) : max(0, end - left)], piece.kind, piece.index))
        start = end
    return trimmed


def _render(tokenizer: Any, messages: list[str], thinking: bool) -> str:
    """The chat template's text with the generation prompt at its end."""
    import jinja2

    roles = ["system", "user"][-len(messages) :]
    chat = [{"role": role, "content": text} for role, text in zip(roles, messages, strict=True)]
    if not tokenizer.chat_template:
        raise _bad_template(tokenizer, "it has none")
    try:
        rendered: str = tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True, enable_thinking=thinking, date_string=TEMPLATE_DATE
        )
    except jinja2.TemplateError as e:
        raise _bad_template(tokenizer, f"{type(e).__name__}: {e}") from e
    return rendered


def _bad_template(tokenizer: Any, why: str) -> KvcliError:
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    return KvcliError(f"the chat template of {name} cannot be used: {why}", given=name, fix="--template raw")
