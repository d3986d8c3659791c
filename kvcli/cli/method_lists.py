"""What `kvcli list methods NAME` prints: one method's definition, declared facts and settings."""

from __future__ import annotations

import inspect
from typing import Any

from kvcli.cli import output
from kvcli.errors import unknown
from kvcli.grammar import Part
from kvcli.methods.base import Merge

Row = dict[str, Any]
KINDS = {
    "evict": "evicts KV pairs",
    "in-prefill": "drops tokens inside the prefill",
    "transform": "stores KV pairs in another form",
    Merge.kind: "folds what an evictor drops into what stays",
    "read": "reads part of the cache, frees nothing",
}
PHASES = {"prefill": "the prompt's cache", "decode": "generated tokens"}
SCOPES = {"head": "each KV head", "layer": "a layer's KV heads together", "model": "all layers and KV heads together"}
SHARING = {
    1: "the prefill that all methods share",
    2: "the shared prefill, and an extra pass over the prompt",
    3: "a prefill of its own per row",
}
DECODING = {
    "unified": "prompt and answer share one pool",
    "separate": "the prompt's part stays, the answer's has a cap of its own",
    "own": "the method's rule goes on: it has no cap",
    None: "every generated token is kept",
}


def row(name: str) -> Row:
    """A method's card with its definition. Raises KvcliError for a name that no method has."""
    from kvcli.methods import catalog

    file = ".py:" in name
    source = name if file else name.replace("-", "_")
    if not file and source not in catalog.names():
        raise unknown("method", name, catalog.names(), given=f"kvcli list methods {name}", listing="kvcli list methods")
    cls = catalog.find(source)
    needs = sorted(catalog.build(source).needs())
    return {
        **cls.card(), "name": source, "needs": needs, "about": _about(cls),
        "open_points": [{"open": asked, "decided": decided} for asked, decided in cls.open_points],
    }  # fmt: skip


def _about(cls: type) -> str:
    """The docstring, each paragraph as one line."""
    text = inspect.cleandoc(cls.__dict__.get("__doc__") or "")
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def print_one(card: Row) -> None:
    """Definition, facts and settings."""
    from rich.text import Text

    title = f"{card['title'] or card['name']} ({card['name']})"
    output.result(Text(title + (f"\n\n{card['about']}" if card["about"] else "")))
    output.result(output.table(("fact", "value"), _facts(card)))
    if card["settings"]:
        headers = ("setting", "default", "range", "the paper's", "meaning")
        output.result(output.table(headers, [_setting(s) for s in card["settings"]]))
    else:
        output.note(f"{card['name']} has no settings")
    known = next((s for s in card["settings"] if _text(s["default"])), None)
    if known:
        text = str(Part(_typed(card), ((known["name"], _text(known["default"])),)))
        quoted = f'"{text}"' if "'" in text else text
        output.note(f"set them as in --method {quoted}")
    output.next_command(f"kvcli sweep --model testbed --method {_used(card)} --dry-run")


def _used(card: Row) -> str:
    """The method as it is typed, with a size where it takes one."""
    sized = card["kind"] == Merge.kind or card["domain"]["kind"] == "continuous"
    return f"{_typed(card)} --ratio 0.3" if sized else _typed(card)


def _typed(card: Row) -> str:
    """The method, behind an evictor where it needs one."""
    return f"snapkv+{card['name']}" if card["kind"] == Merge.kind else str(card["name"])


def _facts(card: Row) -> list[tuple[str, str]]:
    phases = " and ".join(PHASES.get(phase, phase) for phase in card["phases"])
    facts = [
        ("paper", card["paper"] or "-"),
        ("tier", str(card["tier"])),
        ("what it does", KINDS.get(card["kind"], card["kind"])),
        ("acts on", phases),
        ("while generating", "what leaves is folded in" if card["kind"] == Merge.kind else DECODING[card["decoding"]]),
        ("the budget binds", scope(card, SCOPES)),
        ("ratios it can reach", _ratios(card["domain"])),
        ("reads", SHARING[card["sharing"]]),
        ("always keeps", card["protects"]),
        ("random choice", "yes: --seed makes other cells" if card["seeded"] else "no"),
    ]
    return [*facts, *((f"open: {point['open']}", point["decided"]) for point in card["open_points"])]


def scope(card: Row, words: dict[str, str]) -> str:
    """Where the budget binds; '-' for methods that have none."""
    return "-" if card["domain"]["kind"] == "none" else words[card["budget_scope"]]


def _ratios(domain: Row) -> str:
    if domain["kind"] == "none":
        return "none: its own settings decide"
    if domain["floor"]:
        return f"{domain['floor']} and above; below it that much is kept, flagged unreachable and over_budget"
    if domain["points"]:
        return ", ".join(f"{point:g}" for point in domain["points"])
    return f"from {domain['low']:g} up" if domain["low"] else "all"


def _setting(setting: Row) -> tuple[str, str, str, str, str]:
    return (
        setting["name"],
        _text(setting["default"]) or "-",
        _range(setting),
        setting.get("paper") or "-",
        setting["help"],
    )


def _range(setting: Row) -> str:
    """'a or b', '0 to 1', 'at least 1, odd'; '-' where it is not bounded."""
    low, high = setting.get("ge"), setting.get("le")
    if setting.get("choices"):
        return " or ".join(map(str, setting["choices"]))
    if isinstance(setting["default"], bool):
        return "true or false"
    span = f"{low} to {high}" if low is not None and high is not None else ""
    span = span or (f"at least {low}" if low is not None else f"at most {high}" if high is not None else "")
    return ", ".join(filter(None, [span, "odd" if setting.get("odd") else ""])) or "-"


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else "" if value is None else str(value)
