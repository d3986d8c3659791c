"""Segments of text to token ids: chat template or raw, exactly one BOS, every token in one region."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import Any, Protocol

from kvcli.config import stable_hash
from kvcli.errors import KvcliError
from kvcli.models.chat import Piece, chat_pieces, raw_pieces
from kvcli.models.truncation import CUTTABLE, kept_tokens
from kvcli.spans import Region, Segment, Span


class Source(Protocol):
    """What is needed of a sample (kvcli.evals.spec.Sample)."""

    @property
    def id(self) -> str: ...
    @property
    def segments(self) -> tuple[Segment, ...]: ...
    @property
    def options(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Prompt:
    """A prompt of n = len(ids) tokens; regions cover 0..n-1 in order without gaps.

    text: what the tokens stand for (a BOS that was put in front is not part of it). offsets[i]: where token i ends in
    `text`. options: the tokens of each of the sample's options behind the prompt. truncated: tokens that were cut.
    """

    ids: list[int]
    regions: list[Region]
    text: str
    offsets: list[int]
    sha: str
    options: list[list[int]] = field(default_factory=list)
    truncated: int = 0

    def token_text(self, i: int) -> str:
        """The text of one token with white space before it; empty for BOS and for all but one byte of a character."""
        return self.span_text((i, i + 1))

    def span_text(self, span: Span) -> str:
        start, end = span
        return "" if start == end else self.text[self.offsets[start - 1] if start else 0 : self.offsets[end - 1]]


@dataclass(frozen=True)
class Tokens:
    """A text's tokens: ids, and the characters [start, end) each stands for; `front` 1 where a BOS was put in front."""

    text: str
    ids: list[int]
    spans: list[Span]
    front: int = 0


@dataclass(frozen=True)
class Limit:
    """How long the prompt of `which` may be: at most `most` tokens, and with `new` ones at most `context`."""

    which: str
    most: int | None
    context: int | None
    new: int

    @property
    def tokens(self) -> int | None:
        given = [self.most, None if self.context is None else self.context - self.new]
        return min((limit for limit in given if limit is not None), default=None)


class TooLong(KvcliError):
    """A prompt longer than --max-prompt-tokens."""


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
    truncate: str | None = None,
    thinking: bool = False,
    task: str = "",
) -> Prompt:
    """Token ids and regions of a sample, and the ids of its options.

    template: auto (the tokenizer's chat template where it has one), chat or raw; raw in any case where
    chat_allowed=False (a task with `chat: false`). A prompt longer than max_prompt_tokens or than context_limit
    without what comes behind it (the longest option, or max_new_tokens) is refused, or with truncate `middle` or
    `left` (kvcli.models.truncation) loses tokens. thinking: what templates that ask are told (Qwen3).

    Raises KvcliError for a slow tokenizer, a template that is missing or changes the text, an option without tokens,
    and a prompt that is too long (TooLong where only max_prompt_tokens is in its way).
    """
    _check_tokenizer(tokenizer)
    which = f"{task} sample {sample.id}".strip()
    chat = chat_allowed and template != "raw" and (template == "chat" or bool(tokenizer.chat_template))
    pieces = chat_pieces(sample.segments, tokenizer, system, thinking) if chat else raw_pieces(sample.segments, system)
    text = "".join(piece.text for piece in pieces)
    # lm-evaluation-harness, lm_eval/api/task.py: no target delimiter behind a chat template
    endings = [option.lstrip() for option in sample.options] if chat else sample.options
    tokens, options = (
        _with_options(text, endings, tokenizer, which, chat) if endings else (_tokenise(text, tokenizer), [])
    )
    labels = _labels(pieces, tokens)
    new = max(map(len, options)) if options else max_new_tokens
    kept = _kept(labels, tokens.spans, Limit(which, max_prompt_tokens, context_limit, new), truncate)
    ids, regions = [tokens.ids[i] for i in kept], _regions([labels[i] for i in kept])
    left, ends = _text_of(kept, tokens)
    shown = [[r.label, r.start, r.end] for r in regions]
    sha = stable_hash([ids, shown, options] if options else [ids, shown], 16)
    return Prompt(ids, regions, left, ends, sha, options, len(tokens.ids) - len(ids))


def _check_tokenizer(tokenizer: Any) -> None:
    if not getattr(tokenizer, "is_fast", False):
        name = f"{type(tokenizer).__name__} {getattr(tokenizer, 'name_or_path', '')}".strip()
        fix = "--tokenizer FOLDER with a tokenizer.json (a fast tokenizer)"
        raise KvcliError(f"the slow tokenizer {name} gives no token offsets", given=name, fix=fix)


def _tokenise(text: str, tokenizer: Any) -> Tokens:
    """Ids and character spans: one BOS where the tokenizer uses one, unless the text brings it; no EOS."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False)
    ids, spans = list(encoded["input_ids"]), list(encoded["offset_mapping"])
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:1] != [bos] and tokenizer("a")["input_ids"][:1] == [bos]:
        return Tokens(text, [bos, *ids], [(0, 0), *spans], 1)
    return Tokens(text, ids, spans)


def _with_options(
    text: str, options: Sequence[str], tokenizer: Any, which: str, chat: bool
) -> tuple[Tokens, list[list[int]]]:
    """The prompt's tokens, and those of each option behind it.

    Rule: lm-evaluation-harness, `TemplateLM._encode_pair` (lm_eval/api/model.py). White space at the end of the
    prompt moves to the front of the options; prompt and option are tokenised together, and the option's tokens are
    those behind as many as the prompt alone has. Where a token reaches across the border, the prompt keeps its own.
    Differs: white space stays in the prompt where it has merged into a token of the prompt, so that moving it would
    lose it, and everywhere behind a chat template, whose last line break would else be the first token of every option:
    a letter's own token must be what the prompt predicts. Either way only where the prompt's tokens with it are the
    beginning of all joined texts.
    """
    joined = [text + option for option in options]
    wholes = tokenizer(joined, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    prompt = _tokenise(text.rstrip(), tokenizer)
    if prompt.text != text and (chat or not _all_begin(wholes, prompt)):
        unmoved = _tokenise(text, tokenizer)
        prompt = unmoved if _all_begin(wholes, unmoved) else prompt
    found = [list(whole[len(prompt.ids) - prompt.front :]) for whole in wholes]
    for number, (option, ids) in enumerate(zip(options, found, strict=True)):
        if not ids or not option:
            fix = "options with text that begin with a blank, so that they cannot merge into the prompt"
            raise KvcliError(f"option {number} of {which} has no tokens of its own", given=which, fix=fix)
    return prompt, found


def _all_begin(wholes: Sequence[list[int]], tokens: Tokens) -> bool:
    own = tokens.ids[tokens.front :]
    return all(whole[: len(own)] == own for whole in wholes)


Label = tuple[str, int]
"""Region and shot number of a token."""


def _labels(pieces: Sequence[Piece], tokens: Tokens) -> list[Label]:
    """What each token belongs to: the piece its first character lies in.

    White space at a token's front does not count (` Q` begins a question though the blank still stood in the shot
    before), unless the token is nothing but white space. A BOS that the text lacks is `special`.
    """
    ends = list(accumulate((end for _, end in tokens.spans), max))
    starts = list(accumulate((len(p.text) for p in pieces), initial=0))[:-1]
    first = [tokens.front, *(_first_token(start, tokens, ends) for start in starts[1:]), len(tokens.ids)]
    borders = list(accumulate(first, max))
    labels: list[Label] = [("special", -1)] * tokens.front
    for piece, begin, end in zip(pieces, borders, borders[1:], strict=False):
        labels += [(piece.kind, piece.index)] * (end - begin)
    return labels


def _first_token(start: int, tokens: Tokens, ends: Sequence[int]) -> int:
    """The first token whose first character stands at `start` or behind it."""
    at = bisect_left(ends, start)
    while at < len(ends) and _inked(tokens, at) < start:
        at += 1
    return at


def _inked(tokens: Tokens, i: int) -> int:
    """Where token i's first character that is not white space stands."""
    start, end = tokens.spans[i]
    return next((c for c in range(start, end) if not tokens.text[c].isspace()), start)


def _regions(labels: Sequence[Label]) -> list[Region]:
    """Runs of tokens of the same region and shot."""
    regions, start = [], 0
    for (kind, index), run in groupby(labels):
        end = start + len(list(run))
        regions.append(Region(kind, start, end, index))
        start = end
    return regions


def _text_of(kept: Sequence[int], tokens: Tokens) -> tuple[str, list[int]]:
    """The text of the tokens that are left, and where each of them ends in it."""
    ends = list(accumulate((end for _, end in tokens.spans), max))
    if len(kept) == len(ends):
        return tokens.text, ends
    edges = [0, *ends]
    parts = [tokens.text[edges[i] : edges[i + 1]] for i in kept]
    return "".join(parts), list(accumulate(map(len, parts)))


def _kept(labels: Sequence[Label], spans: Sequence[Span], limit: Limit, truncate: str | None) -> Sequence[int]:
    """Which tokens the prompt keeps. Raises KvcliError for an empty prompt and for one that stays too long."""
    if not labels:
        raise KvcliError(f"the prompt of {limit.which} is empty", given=limit.which, fix="give the task some text")
    most = limit.tokens
    if most is None or len(labels) <= most:
        return range(len(labels))
    kept = kept_tokens([kind for kind, _ in labels], spans, most, truncate) if truncate else None
    if kept is None:
        raise _too_long(len(labels), sum(kind not in CUTTABLE for kind, _ in labels), limit, truncate)
    return kept


def _too_long(n: int, fixed: int, limit: Limit, truncate: str | None) -> KvcliError:
    """The message for a prompt of n tokens, `fixed` of which are never cut."""
    least = fixed if truncate else n
    stays = f", {fixed} of which are never cut" if truncate else ""
    cutting = limit.tokens is not None and fixed <= limit.tokens and not truncate
    beyond = limit.most is not None and least > limit.most
    if limit.context is not None and least + limit.new > limit.context and not beyond:
        what = f"the prompt of {limit.which} does not fit the model: {n} tokens{stays} and {limit.new} new ones, "
        ways = ["fewer --shots", "a smaller --max-new-tokens", "a model with a longer context"]
        return KvcliError(f"{what}its context is {limit.context}", given=limit.which, fix=_either(ways, cutting))
    what = f"the prompt of {limit.which} has {n} tokens{stays}, more than --max-prompt-tokens {limit.most}"
    fix = _either([f"--max-prompt-tokens {least}", "fewer --shots"], cutting)
    return TooLong(what, given=f"--max-prompt-tokens {limit.most}", fix=fix)


def _either(ways: list[str], cutting: bool) -> str:
    *others, last = [*ways, "--truncate middle"] if cutting else ways
    return f"{', '.join(others)}, or {last}"
