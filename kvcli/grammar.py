"""The grammar of --method, --task and --ratio (docs/cli.md). Knows texts only: no registry, no torch.

METHODS := METHOD ("," METHOD)*      METHOD := PART ("+" PART)*      PART := SOURCE [":" SETTING ("," SETTING)*]
TASKS := PART ("," PART)*
A comma piece that begins with `KEY=` belongs to the part before it; any other piece begins a new method or task.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal, InvalidOperation

from kvcli.errors import KvcliError

_KEY = re.compile(r"\s*[A-Za-z_][\w.]*\s*=")
_FILE = re.compile(r"(?P<source>(?:[.~]|/).*?\.py:[A-Za-z_]\w*)(?::(?P<rest>.*))?\Z", re.S)
_KVPRESS = re.compile(r"(?P<source>kvpress:[A-Za-z_]\w*)(?::(?P<rest>.*))?\Z", re.S)
_NAME = re.compile(r"(?P<source>[A-Za-z_][\w-]*)(?::(?P<rest>.*))?\Z", re.S)
LM_EVAL = "lm_eval:"
_TASK_FILE = re.compile(r"(?P<source>.+?\.ya?ml)(?::(?P<rest>.*))?\Z", re.S)
_TASK_PATH = re.compile(r"(?P<source>[.~/].*)(?P<rest>\Z)", re.S)
_TASK_LM_EVAL = re.compile(r"(?P<source>lm[_-]eval:[^:,=\s]+)(?::(?P<rest>.*))?\Z", re.S)
_TASK_NAME = re.compile(r"(?P<source>[\w*?!\[\]-]+)(?::(?P<rest>.*))?\Z", re.S)
_MOST_DIGITS = 12
_AT = re.compile(r"(?P<source>[A-Za-z_][\w-]*)@(?P<size>0?\.\d+|1)\Z")
_SPAN = re.compile(r"(?P<low>[\d.]+)\s*(?:-|to|:)\s*(?P<high>[\d.]+)\Z")
_PLAIN = re.compile(r"[^,+|'\"\s]+\Z")


class NotASetting(KvcliError):
    """`text` stands where KEY=VALUE should, behind `source:` or (source empty) alone. Whoever knows what settings
    there are can say which one was meant."""

    def __init__(self, what: str, *, given: str, fix: str, source: str, text: str) -> None:
        super().__init__(what, given=given, fix=fix)
        self.source, self.text = source, text


@dataclass(frozen=True)
class Part:
    """One method name (or file:class) with the settings typed for it, as text."""

    source: str
    settings: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        if not self.settings:
            return self.source
        return self.source + ":" + ",".join(f"{k}={_quote(v)}" for k, v in self.settings)


@dataclass(frozen=True)
class MethodText:
    """Parts joined by '+', applied left to right."""

    parts: tuple[Part, ...]

    def __str__(self) -> str:
        return "+".join(str(part) for part in self.parts)


def _quote(value: str) -> str:
    if _PLAIN.match(value):
        return value
    return f"'{value}'" if "'" not in value else f'"{value}"'


def _split(text: str, separator: str, given: str) -> list[str]:
    """Splits at a separator outside quotes. A quote opens where a value begins: a path may hold an apostrophe."""
    pieces, start, quote = [], 0, ""
    for i, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"" and text[:i].rstrip().endswith("="):
            quote = char
        elif char == separator:
            pieces.append(text[start:i])
            start = i + 1
    if quote:
        raise KvcliError("a quote is not closed", given=given, fix=f"add the missing {quote}")
    return [*pieces, text[start:]]


def _setting(text: str, source: str, given: str, kind: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    key, value = key.strip(), value.strip()
    if not equals or not key or not value:
        typed = text.strip()
        fix = _how_to_set(source, typed, kind)
        what = f"'{typed}' is not a setting of {source}"
        raise NotASetting(what, given=given, fix=fix, source=source, text=typed)
    if value[0] in "'\"":
        if len(value) < 2 or value[-1] != value[0] or value[0] in value[1:-1]:
            raise KvcliError(f"the quotes of '{text.strip()}' do not match", given=given, fix="write KEY='VALUE'")
        return key, value[1:-1]
    if "'" in value or '"' in value:
        raise KvcliError(f"the quotes of '{text.strip()}' do not match", given=given, fix="write KEY='VALUE'")
    return key, value


def _how_to_set(source: str, typed: str, kind: str) -> str:
    if kind == "method":
        return "write KEY=VALUE, as in snapkv:window=16"
    shots = typed if typed.isdecimal() and len(typed) < 3 else "4"  # a setting of every task
    return f"write KEY=VALUE, as in {source}:shots={shots}; kvcli list tasks {source} shows its settings"


def _part(text: str, given: str) -> Part:
    text = text.strip()
    for pattern in (_FILE, _KVPRESS, _NAME):
        match = pattern.match(text)
        if match:
            break
    else:
        hint = "a file method needs its class, as in ./mine.py:MyMethod" if ".py" in text else "kvcli list methods"
        if ".py:" in text:
            hint = f"./{text}"
        at, words = _AT.match(text), text.split()
        if at:
            hint = f"--method {at['source']} --ratio {at['size']}"
        elif len(words) > 1 and all(map(_NAME.match, words)):
            hint = f"--method {','.join(words)}"
        raise KvcliError(f"'{text}' is not a method", given=given, fix=hint)
    source = match["source"]
    return Part(
        source.replace("-", "_") if pattern is _NAME else source, _settings(source, match["rest"], given, "method")
    )


def _settings(source: str, rest: str | None, given: str, kind: str) -> tuple[tuple[str, str], ...]:
    """The settings behind the colon; None: there is no colon."""
    if rest is None:
        return ()
    if not rest.strip():
        raise KvcliError(f"no setting after '{source}:'", given=given, fix=f"{source} or {source}:KEY=VALUE")
    settings = [_setting(piece, source, given, kind) for piece in _split(rest, ",", given)]
    keys = [k for k, _ in settings]
    for key in keys:
        if keys.count(key) > 1:
            raise KvcliError(f"setting '{key}' is given twice", given=given, fix=f"keep one {key}=")
    return tuple(settings)


def _grouped(text: str, given: str, kind: str) -> list[str]:
    """The texts of a comma list; a piece that begins with `KEY=` goes with the one before it."""
    whole: list[str] = []
    for piece in _split(text, ",", given):
        if not piece.strip():
            names = [other.strip() for other in _split(text, ",", given) if other.strip()]
            named = f"--{kind} {','.join(names)}" if names else f"a name before or behind it: kvcli list {kind}s"
            raise KvcliError(f"an empty {kind} name", given=given, fix=f"{named}, without the extra comma")
        if _KEY.match(piece) and whole:
            whole[-1] += "," + piece
        elif _KEY.match(piece):
            fix = f"niah:{piece}" if kind == "task" else f"snapkv:{piece}"
            what = f"setting '{piece}' has no {kind} before it"
            raise NotASetting(what, given=given, fix=fix, source="", text=piece.strip())
        else:
            whole.append(piece)
    return whole


def parse_methods(texts: Iterable[str]) -> list[MethodText]:
    """All methods of one or more --method options, in order, duplicates dropped.

    Raises KvcliError for text outside the grammar.
    """
    methods: list[MethodText] = []
    for text in texts:
        given = f"--method {text}"
        for method in _grouped(text, given, "method"):
            parsed = MethodText(tuple(_part(part, given) for part in _split(method, "+", given)))
            if parsed not in methods:
                methods.append(parsed)
    return methods


def parse_tasks(texts: Iterable[str]) -> list[Part]:
    """All tasks of one or more --task options, in order, duplicates dropped: NAME, SUITE, GLOB, PATH.yaml or
    lm_eval:NAME, each with its settings as typed.

    Raises KvcliError for text outside the grammar.
    """
    tasks: list[Part] = []
    for text in texts:
        given = f"--task {text}"
        for piece in _grouped(text, given, "task"):
            part = _task(piece.strip(), given)
            if part not in tasks:
                tasks.append(part)
    return tasks


def split_tasks(texts: Iterable[str]) -> list[str]:
    """The same, each as one text again."""
    return [str(part) for part in parse_tasks(texts)]


def _task(text: str, given: str) -> Part:
    for pattern in (_TASK_LM_EVAL, _TASK_FILE, _TASK_PATH, _TASK_NAME):
        match = pattern.match(text)
        if match:
            break
    else:
        fix = "a name of kvcli list tasks, ./FILE.yaml or lm_eval:NAME"
        raise KvcliError(f"'{text}' is not a task", given=given, fix=fix)
    source = match["source"]
    if pattern is _TASK_LM_EVAL:
        source = LM_EVAL + source[len(LM_EVAL) :]  # of its names hyphens are not underscores
    elif pattern is _TASK_NAME:
        source = source.replace("-", "_") if "[" not in source else source
    return Part(source, _settings(source, match["rest"] if pattern is not _TASK_PATH else None, given, "task"))


def task_base(name: str) -> str:
    """A task's name without the settings behind it: 'niah' of 'niah:depth=0.5', 'lm_eval:x' of 'lm_eval:x'."""
    first, colon, rest = name.partition(":")
    return f"{LM_EVAL}{rest.partition(':')[0]}" if first + colon == LM_EVAL else first


def _decimal(text: str, option: str, given: str) -> Decimal:
    try:
        value = Decimal(text.strip())
    except InvalidOperation:
        value = Decimal("NaN")
    if not value.is_finite():
        fix = _written(text.strip(), option) or f"{option} 0.1,0.5 or {option} 0.1..0.9:0.1"
        raise KvcliError(f"'{text.strip()}' is not a number", given=given, fix=fix)
    if -int(value.as_tuple().exponent) > _MOST_DIGITS:
        fix = f"at most {_MOST_DIGITS} digits after the point"
        raise KvcliError(f"'{text.strip()}' has too many digits", given=given, fix=fix)
    return value


def _written(text: str, option: str) -> str:
    """The right spelling of a share in percent or of a range with a dash; empty for anything else."""
    span = _SPAN.match(text)
    if span:
        return f"{option} {span['low']}..{span['high']}:0.1"
    try:
        share = Decimal(text.removesuffix("%").strip()) / 100
    except InvalidOperation:
        return ""
    fits = share.is_finite() and 0 < share <= 1
    return f"{option} {ratio_text(share)}, which keeps {text}" if fits and text.endswith("%") else ""


def _in_range(value: Decimal, option: str, given: str) -> Decimal:
    if not 0 < value <= 1:
        meant = f"{option} {ratio_text(value / 100)} keeps {value} %" if 2 <= value <= 100 else ""
        fix = f"a kept ratio is above 0 and at most 1: {meant or f'{option} 0.2 keeps 20 %'}"
        raise KvcliError(f"ratio {value} is out of range", given=given, fix=fix)
    return value.normalize()


def parse_ratios(texts: Iterable[str], option: str = "--ratio") -> list[Decimal]:
    """Kept ratios, ascending, exact decimals: `0.1,0.5` and `0.1..0.9:0.1` (both ends included)."""
    found: set[Decimal] = set()
    for text in texts:
        given = f"{option} {text}"
        comma = re.fullmatch(r"\s*0,(\d+)\s*", text)
        if comma:
            raise KvcliError("ratio 0 is out of range", given=given, fix=f"{option} 0.{comma[1]}, with a point")
        for piece in text.split(","):
            if ".." not in piece:
                found.add(_in_range(_decimal(piece, option, given), option, given))
                continue
            ends, colon, step_text = piece.partition(":")
            low_text, _, high_text = ends.partition("..")
            low, high = (_in_range(_decimal(t, option, given), option, given) for t in (low_text, high_text))
            if not colon:
                raise KvcliError(f"range '{piece}' has no step", given=given, fix=f"{option} {low}..{high}:0.1")
            step = _decimal(step_text, option, given)
            if low > high:
                raise KvcliError(f"range '{piece}' descends", given=given, fix=f"{option} {high}..{low}:{abs(step)}")
            if step <= 0:
                raise KvcliError(f"step {step} is not above 0", given=given, fix=f"{option} {low}..{high}:0.1")
            count = int((high - low) / step)
            if count > 1000:
                raise KvcliError(f"range '{piece}' has {count + 1} ratios", given=given, fix="a larger step")
            if low + count * step != high:
                fix = f"{option} {low}..{low + count * step}:{step}"
                raise KvcliError(f"range '{piece}' does not end on {high}", given=given, fix=fix)
            found.update((low + i * step).normalize() for i in range(count + 1))
    return sorted(found)


def ratio_text(ratio: Decimal) -> str:
    """'0.1', '1': the one spelling used in ids, records and tables."""
    return format(ratio.normalize(), "f")


def round_half_up(value: Decimal) -> int:
    """Rounds an exact decimal, .5 upwards: the one rounding rule of budgets."""
    return int(value.quantize(Decimal(1), rounding=ROUND_HALF_UP))
