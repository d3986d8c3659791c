"""Segments of text to token ids: chat template or raw, exactly one BOS, every token in one region."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any, Protocol

from kvcli.config import stable_hash
from kvcli.errors import KvcliError
from kvcli.spans import Region, Segment, Span

TEMPLATE_DATE = "26 Jul 2024"
"""Llama 3 templates print a date; a fixed one (their own default) keeps prompts the same tomorrow."""


class Source(Protocol):
    """What is needed of a sample (kvcli.evals.spec.Sample)."""

    @property
    def id(self) -> str: ...
    @property
    def segments(self) -> tuple[Segment, ...]: ...


@dataclass(frozen=True)
class Piece:
    """Text of one kind: a segment's, or `special` for the template's own."""

    text: str
    kind: str
    index: int = -1


@dataclass(frozen=True)
class Prompt:
    """A prompt of n = len(ids) tokens; regions cover 0..n-1 in order without gaps.

    text: what was tokenised (a BOS that was put in front is not part of it). offsets[i]: where token i ends in `text`.
    """

    ids: list[int]
    regions: list[Region]
    text: str
    offsets: list[int]
    sha: str

    def token_text(self, i: int) -> str:
        """The text of one token with white space before it; empty for BOS and for all but one byte of a character."""
        return self.span_text((i, i + 1))

    def span_text(self, span: Span) -> str:
        start, end = span
        return "" if start == end else self.text[self.offsets[start - 1] if start else 0 : self.offsets[end - 1]]


def build_prompt(
    sample: Source,
    tokenizer: Any,
    *,
    template: str = "auto",
    chat_allowed: bool = True,
    max_prompt_tokens: int | None = None,
    context_limit: int | None = None,
    max_new_tokens: int = 0,
    system: str | None = None,
    task: str = "",
) -> Prompt:
    """Token ids and regions of a sample.

    template: auto (the tokenizer's chat template where it has one), chat or raw; raw in any case where
    chat_allowed=False (a task with `chat: false`). Raises KvcliError for a slow tokenizer, a template that is missing
    or changes the text, and a prompt longer than max_prompt_tokens or than context_limit - max_new_tokens; nothing is
    ever cut off.
    """
    _check_tokenizer(tokenizer)
    chat = chat_allowed and template != "raw" and (template == "chat" or bool(tokenizer.chat_template))
    pieces = _chat_pieces(sample, tokenizer, system) if chat else _raw_pieces(sample, system)
    text = "".join(piece.text for piece in pieces)
    ids, spans = _tokenise(text, tokenizer)
    regions = _regions(_owners(pieces, text, spans), pieces)
    _check_length(len(ids), f"{task} sample {sample.id}".strip(), max_prompt_tokens, context_limit, max_new_tokens)
    ends = list(accumulate((end for _, end in spans), max))
    sha = stable_hash([ids, [[r.label, r.start, r.end] for r in regions]], 16)
    return Prompt(ids, regions, text, ends, sha)


def _check_tokenizer(tokenizer: Any) -> None:
    if not getattr(tokenizer, "is_fast", False):
        name = f"{type(tokenizer).__name__} {getattr(tokenizer, 'name_or_path', '')}".strip()
        fix = "--tokenizer FOLDER with a tokenizer.json (a fast tokenizer)"
        raise KvcliError(f"the slow tokenizer {name} gives no token offsets", given=name, fix=fix)


def _raw_pieces(sample: Source, system: str | None) -> list[Piece]:
    """System text, a blank line, then the segments as they are."""
    front = [Piece(f"{system}\n\n", "system")] if system else []
    return front + [Piece(s.text, s.region, s.shot) for s in sample.segments]


def _chat_pieces(sample: Source, tokenizer: Any, system: str | None) -> list[Piece]:
    """One user message with all segments (and a system message) inside the rendered template.

    The template is rendered twice: with marks for the messages, which shows its own text before, between and behind
    them, and with the messages themselves. Some templates strip white space off a message; the pieces follow.
    """
    content = "".join(s.text for s in sample.segments)
    marks = ["kvcliSYSTEMmark", "kvcliUSERmark"] if system else ["kvcliUSERmark"]
    own = _own_text(tokenizer, marks)
    whole = _render(tokenizer, [system, content] if system else [content])
    for head in _stripped(system or ""):
        for user in _stripped(content):
            front = [Piece(own[0], "special"), Piece(head, "system"), Piece(own[1], "special")]
            front = front if system else [Piece(own[0], "special")]
            if "".join(p.text for p in front) + user + own[-1] == whole:
                return [*front, *_trimmed(sample.segments, content, user), Piece(own[-1], "special")]
    raise _bad_template(tokenizer, "it changes the text of the messages")


def _stripped(text: str) -> list[str]:
    return list(dict.fromkeys((text, text.strip(), text.rstrip(), text.lstrip())))


def _own_text(tokenizer: Any, marks: list[str]) -> list[str]:
    """The template's own text before, between and behind messages that are nothing but marks."""
    rest, parts = _render(tokenizer, marks), []
    for mark in marks:
        if rest.count(mark) != 1:
            raise _bad_template(tokenizer, f"it shows a message {rest.count(mark)} times")
        before, _, rest = rest.partition(mark)
        parts.append(before)
    return [*parts, rest]


def _trimmed(segments: Sequence[Segment], content: str, kept: str) -> list[Piece]:
    """The segments as pieces of `kept`, which is `content` with white space taken off its ends."""
    left = 0 if content.startswith(kept) else len(content) - len(content.lstrip())
    pieces, start = [], 0
    for s in segments:
        end = start + len(s.text)
        pieces.append(Piece(kept[max(0, start - left) : max(0, end - left)], s.region, s.shot))
        start = end
    return pieces


def _render(tokenizer: Any, messages: list[str]) -> str:
    """The chat template's text: generation prompt at the end, Qwen3's thinking off."""
    import jinja2

    roles = ["system", "user"][-len(messages) :]
    chat = [{"role": role, "content": text} for role, text in zip(roles, messages, strict=True)]
    if not tokenizer.chat_template:
        raise _bad_template(tokenizer, "it has none")
    try:
        rendered: str = tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True, enable_thinking=False, date_string=TEMPLATE_DATE
        )
    except jinja2.TemplateError as e:
        raise _bad_template(tokenizer, f"{type(e).__name__}: {e}") from e
    return rendered


def _bad_template(tokenizer: Any, why: str) -> KvcliError:
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    return KvcliError(f"the chat template of {name} cannot be used: {why}", given=name, fix="--template raw")


def _tokenise(text: str, tokenizer: Any) -> tuple[list[int], list[Span]]:
    """Ids and character spans: one BOS where the tokenizer uses one, unless the text brings it; no EOS."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False)
    ids, spans = list(encoded["input_ids"]), [(int(a), int(b)) for a, b in encoded["offset_mapping"]]
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:1] != [bos] and tokenizer("a")["input_ids"][:1] == [bos]:
        return [bos, *ids], [(0, 0), *spans]
    return ids, spans


def _owners(pieces: Sequence[Piece], text: str, spans: Sequence[Span]) -> list[int]:
    """The piece each token belongs to, -1 for a BOS that is not in the text.

    A token belongs to the piece its first character lies in; white space at its front does not count (` Q` begins
    a question though the blank still stood in the shot before), unless the token is nothing but white space.
    """
    starts = list(accumulate((len(p.text) for p in pieces), initial=0))[:-1]
    owners, reached = [], 0
    for i, (start, end) in enumerate(spans):
        if i == 0 and start == end:
            owners.append(-1)
            continue
        inked = next((c for c in range(start, end) if not text[c].isspace()), start)
        reached = max(reached, min(inked, len(text) - 1))
        owners.append(bisect_right(starts, reached) - 1)
    return owners


def _regions(owners: Sequence[int], pieces: Sequence[Piece]) -> list[Region]:
    """Runs of tokens of the same kind and shot."""
    labels = [("special", -1) if i < 0 else (pieces[i].kind, pieces[i].index) for i in owners]
    regions, start = [], 0
    for (kind, index), run in groupby(labels):
        end = start + len(list(run))
        regions.append(Region(kind, start, end, index))
        start = end
    return regions


def _check_length(n: int, which: str, most: int | None, context: int | None, new: int) -> None:
    if n == 0:
        raise KvcliError(f"the prompt of {which} is empty", given=which, fix="give the task some text")
    if context is not None and n + new > context:
        what = f"the prompt of {which} does not fit the model: {n} tokens and {new} new ones, its context is {context}"
        fix = "fewer --shots, a smaller --max-new-tokens, or a model with a longer context"
        raise KvcliError(what, given=which, fix=fix)
    if most is not None and n > most:
        what = f"the prompt of {which} has {n} tokens, more than --max-prompt-tokens {most}"
        raise KvcliError(what, given=f"--max-prompt-tokens {most}", fix=f"--max-prompt-tokens {n}, or fewer --shots")
