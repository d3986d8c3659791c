"""Presses of NVIDIA's kvpress as methods: `kvpress:CLASS`, run by kvpress itself in an environment of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from kvcli.errors import KvcliError, unknown
from kvcli.grammar import Part
from kvcli.kvpress import client
from kvcli.kvpress.presses import PREFIX, VERSION, Description, find
from kvcli.kvpress.shares import removed_share
from kvcli.methods.base import Domain, Method, Selection, setting

if TYPE_CHECKING:
    from torch import Tensor

    from kvcli.cache.budget import Budget
    from kvcli.methods.context import Context

LAST = "last"
MODES = ("kept", "after", "free")
Positions = list[list["Tensor"]]


@dataclass(frozen=True)
class Kvpress(Method):
    """What a press of kvpress keeps of the prompt. Its class runs in a second process, over the same model and token
    ids, and this cache is evicted to the positions it kept. Pairs hidden behind fake keys are gone here, so that KV
    heads keep lists of different lengths.

    A press sees the whole prompt and need not keep its last token. `last=kept`: where a KV head's choice lacks it, the
    press is asked for one pair less and the last token is added. `last=after`: the press compresses the prompt without
    its last token, which stays behind it, as kvpress's pipeline does with a question. `last=free`: as the press
    chooses.

    Source: NVIDIA/kvpress 0.5.5, kvpress/presses. Differs: pairs are really evicted where kvpress masks them; the ratio
    is chosen so that kvpress's float truncation keeps as many as kvcli's rounding; a random press is seeded by the
    cell's seed and the sample.
    """

    tier = 2
    paper = "github.com/NVIDIA/kvpress"
    last: str = setting("kept", choices=MODES, help="the prompt's last token: kept, fed after the press, or free to go")
    press: Description = field(default=Description(""), metadata={"hidden": True})

    @property
    def name(self) -> str:  # type: ignore[override]
        return PREFIX + self.press.name

    @property
    def title(self) -> str:  # type: ignore[override]
        return f"{self.press.name} (kvpress)"

    @property
    def protects(self) -> str:  # type: ignore[override]
        return "what the press protects" if self.last == "free" else "the last token, and what the press protects"

    @property
    def keeps_last(self) -> bool:  # type: ignore[override]
        return self.last != "free" or self.press.facts.keeps_last

    @property
    def budget_scope(self) -> str:  # type: ignore[override]
        return self.press.scope

    @property
    def domain(self) -> Domain:  # type: ignore[override]
        return Domain("none") if self.press.facts.knob else Domain()

    @property
    def seeded(self) -> bool:  # type: ignore[override]
        return self.press.random

    def needs(self) -> frozenset[str]:
        return frozenset({"kvpress"})

    def settings(self) -> dict[str, Any]:
        return {LAST: self.last, **self.press.flat("arguments"), "kvpress": VERSION}

    def changed(self) -> dict[str, str]:
        """Settings that are not defaults, as text."""
        own = {} if self.last == "kept" else {LAST: self.last}
        return {**own, **{key: _text(value) for key, value in self.press.flat("typed").items()}}

    def select(self, ctx: Context, budget: Budget) -> Selection:
        import torch

        sized = self.domain.kind == "continuous"
        if sized and budget.everything:
            return Selection([torch.arange(ctx.n)] * ctx.layers)
        size = budget.per_head if sized else None
        notes: dict[str, Any] = {}
        if self.last == "after":
            kept = self._with_last(ctx, self._kept(ctx, ctx.n - 1, size and size - 1, notes))
        else:
            kept = self._kept(ctx, ctx.n, size, notes)
            lacking = sum(int(head[-1:].sum()) != ctx.n - 1 for layer in kept for head in layer)
            if lacking and self.last == "kept":
                notes["last_added"] = lacking
                kept = self._making_room(ctx, kept, size)
        over = sized and _most(kept, self.budget_scope) > budget.total(self.budget_scope)
        return Selection([_form(layer) for layer in kept], frozenset({"over_budget"} if over else ()), notes=notes)

    def _making_room(self, ctx: Context, kept: Positions, size: int | None) -> Positions:
        """The last token added. Where heads share a budget all are asked for one pair less, else those that lack it."""
        fewer = kept if size is None else self._kept(ctx, ctx.n, size - 1, {})
        room = self._with_last(ctx, fewer)
        if self.budget_scope != "head":
            return room
        pairs = zip(kept, room, strict=True)
        return [
            [head if int(head[-1]) == ctx.n - 1 else other for head, other in zip(mine, others, strict=True)]
            for mine, others in pairs
        ]

    def _with_last(self, ctx: Context, kept: Positions) -> Positions:
        import torch

        last = torch.tensor([ctx.n - 1])
        return [[torch.cat([head[head != last], last]) for head in layer] for layer in kept]

    def _kept(self, ctx: Context, n: int, size: int | None, notes: dict[str, Any]) -> Positions:
        """Per layer and KV head the positions that the press keeps of the first n tokens, asked for `size` pairs per
        head (None: it has no size)."""
        import torch

        if n < 1 or size == 0:
            return [[torch.arange(0)] * ctx.kv_heads] * ctx.layers
        if size == n:
            return [[torch.arange(n)] * ctx.kv_heads] * ctx.layers
        ratio = None
        if size is not None:
            ratio = notes["compression_ratio"] = removed_share(n, size, self.press.facts.counts)
        seed = ctx.generator(self.name).initial_seed() if self.seeded else 0

        def ask() -> Positions:
            keep = ctx.extra("kvpress")
            found = keep(self.press.to_json(), ctx.token_ids[:n], ratio, self.press.attention, seed)
            if len(found) != ctx.layers or any(len(layer) != ctx.kv_heads for layer in found):
                what = f"the worker's model has {len(found)} layers of {len(found[0])} KV heads"
                raise client.WorkerFailed(f"{what}, this one {ctx.layers} of {ctx.kv_heads}")
            return [[torch.tensor(head, dtype=torch.long) for head in layer] for layer in found]

        return ctx.once((self.name, repr(self.press), n, ratio, seed), ask)


def _form(heads: list[Tensor]) -> Tensor | list[Tensor]:
    """One set for all heads, one number per head, or a list of their own."""
    import torch

    if len({len(head) for head in heads}) > 1:
        return list(heads)
    whole = torch.stack(list(heads))
    return whole[0] if bool((whole == whole[0]).all()) else whole


def _most(kept: Positions, scope: str) -> int:
    """KV pairs that the budget is about."""
    counts = [[len(head) for head in layer] for layer in kept]
    if scope == "head":
        return max(count for layer in counts for count in layer)
    return max(map(sum, counts)) if scope == "layer" else sum(map(sum, counts))


def build_press(part: Part) -> Kvpress:
    """The method of a part `kvpress:CLASS:...`. Raises KvcliError for an unknown or refused press, wrong settings, and
    an environment that does not have kvpress."""
    find(part.source.removeprefix(PREFIX), f"--method {part}")  # without an environment, so that it costs nothing
    return _built(part, client.python())


@cache
def _built(part: Part, python: str) -> Kvpress:
    given = f"--method {part}"
    own = {key: value for key, value in part.settings if key == LAST}
    if own and own[LAST] not in MODES:
        raise KvcliError(
            f"'{LAST}={own[LAST]}' is not one of its values", given=given, fix=f"{LAST}={' | '.join(MODES)}"
        )
    rest = tuple((key, value) for key, value in part.settings if key != LAST)
    worker = client.current()
    try:
        press = _described(worker, part.source.removeprefix(PREFIX), rest, "", given)
        _check_together(press, given)
        worker.make(press.to_json())
    except client.WorkerFailed as e:
        raise KvcliError(f"kvpress does not make this press: {e}", given=given, fix="docs/kvpress.md") from e
    return Kvpress(**own, press=press)


def _described(
    worker: client.Worker, name: str, settings: Sequence[tuple[str, str]], path: str, given: str
) -> Description:
    """A press with typed arguments. path: `press.` for one inside another."""
    find(name, given)
    parameters = {p["name"]: p for p in worker.describe(name) if p["kind"] != "other"}
    for key, _ in settings:
        head = key.partition(".")[0]
        if key == "compression_ratio":
            what = "the ratio is kvcli's: it counts what is kept"
            raise KvcliError(what, given=given, fix="--ratio 0.3 for compression_ratio=0.7")
        if head not in parameters or ("." in key and parameters[head]["kind"] != "press"):
            known = [path + p for p in parameters] + [LAST] * (not path)
            raise unknown(f"setting of {name}", path + key, known, given=given, listing="docs/kvpress.md")
    plain = {key: value for key, value in settings if "." not in key}
    typed: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    inner: dict[str, Description] = {}
    for key, parameter in parameters.items():
        below = [(k.partition(".")[2], v) for k, v in settings if k.startswith(f"{key}.")]
        if parameter["kind"] == "press":
            if key in plain:
                inner[key] = _described(worker, plain[key], below, f"{path}{key}.", given)
            elif parameter["required"]:
                what = f"{name} needs a press that scores"
                raise KvcliError(what, given=given, fix=f"{path}{key}=SnapKVPress")
            elif below:
                fix = f"{path}{key}=CLASS before {path}{key}.{below[0][0]}"
                raise KvcliError(f"'{path}{key}' is not given", given=given, fix=fix)
            continue
        arguments[key] = parameter["default"]
        if key in plain:
            value = _value(parameter, path + key, plain[key], given)
            arguments[key] = value
            if value != parameter["default"] or parameter["required"]:
                typed[key] = value
        elif parameter["required"]:
            raise KvcliError(f"{name} needs '{path}{key}'", given=given, fix=f"{path}{key}=...")
    return Description(name, typed, arguments, inner)


def _value(parameter: dict[str, Any], name: str, text: str, given: str) -> Any:
    """A setting's text in the type of the constructor's argument."""
    kind, choices = parameter["kind"], parameter["choices"]
    if parameter["optional"] and text.lower() == "none":
        return None
    try:
        if kind == "bool":
            value: Any = {"true": True, "false": False}[text.lower()]
        elif kind == "floats":
            value = [float(piece) for piece in text.split(",")]
        else:
            value = {"int": int, "float": float, "str": str}[kind](text)
    except (KeyError, ValueError):
        words = {"bool": "true or false", "int": "a whole number", "floats": "a list of numbers in quotes"}
        fix = f"{name}={_text(parameter['default'])}"
        raise KvcliError(f"'{name}={text}' must be {words.get(kind, 'a number')}", given=given, fix=fix) from None
    if value != value:
        raise KvcliError(f"'{name}={text}' must be a number", given=given, fix=f"{name}={_text(parameter['default'])}")
    if choices and value not in choices:
        fix = f"{name}={' | '.join(choices)}"
        raise KvcliError(f"'{name}={text}' is not one of its values", given=given, fix=fix)
    return value


def _check_together(press: Description, given: str) -> None:
    """Raises KvcliError for what kvpress itself would refuse only in the middle of a run."""
    for each in press.tree():
        if not each.facts.any_attention and each.attention == "eager":
            what = f"{each.name} does not work with a press that reads attention weights"
            raise KvcliError(what, given=given, fix="press=SnapKVPress")
        knob = each.facts.knob
        if knob and each.arguments.get(knob) is None:
            raise KvcliError(f"{each.name} needs '{knob}'", given=given, fix=f"{knob}=...")
        if each.arguments.get("decoding"):
            what = f"{each.name} with decoding=true acts while tokens are generated, which kvcli does itself"
            raise KvcliError(what, given=given, fix="decoding=false")


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
