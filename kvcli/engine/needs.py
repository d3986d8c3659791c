"""What `Method.needs()` may name, and whether a model can give it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from kvcli.errors import KvcliError
from kvcli.kvpress import client as kvpress
from kvcli.models import bases, profiles
from kvcli.models.source import parse_model

if TYPE_CHECKING:
    from kvcli.models.wrapper import Model

STATISTICS = re.compile(r"column_sum(:question)?|window:\d+|band_sum:[1-9]\d*|q_moments(:\d+)?")
"""Kept by the prefill itself."""
QUESTION = frozenset({"column_sum:question", "answer"})
"""Known only with the question."""
PASSES = frozenset({"reconstruction", "answer", "bands"})
"""Met by an extra pass of the model over the prompt, run when a method asks for it."""
HANDLES = {
    "rope": "rotary positions of the usual kind",
    "o_proj": "an output projection that is known",
}
"""Parts of the model that a method reads, and what a model without them lacks."""
GIVEN = re.compile(r"head_profile(:.+)?|bases:(weights|\d+:.*)|kvpress")
"""Met from outside: a profile of the model's heads, bases of its keys and values, a worker in another environment."""


def strange(names: Iterable[str]) -> list[str]:
    """Those that nothing meets."""
    return [
        name for name in names
        if name not in PASSES and name not in HANDLES and not STATISTICS.fullmatch(name) and not GIVEN.fullmatch(name)
    ]  # fmt: skip


def captured(names: Iterable[str]) -> set[str]:
    """Those that the prefill must keep."""
    return {name for name in names if STATISTICS.fullmatch(name)}


def lacking(model: Model, names: Collection[str]) -> str:
    """What of a method's needs the model cannot give; empty where it gives all."""
    parts = {name.partition(":")[0] for name in names}
    if ("rope" in parts or "q_moments" in parts) and model.rope is None:
        return HANDLES["rope"]
    if "o_proj" in parts and model.o_proj is None:
        return HANDLES["o_proj"]
    if bases.WEIGHTS in names:
        from kvcli.models.projections import key_value_projections

        try:
            key_value_projections(model)
        except ValueError as e:
            return str(e)
    if "q_moments" in parts:
        try:
            _ = model.unrotate
        except KvcliError as e:
            return e.what
    return ""


def require(model: Model, methods: Mapping[str, Collection[str]]) -> None:
    """methods: text -> its needs. Raises KvcliError that names the methods which cannot run on this model."""
    found = {method: lacking(model, names) for method, names in methods.items()}
    missing = {method: why for method, why in found.items() if why}
    if missing:
        why = "; ".join(dict.fromkeys(missing.values()))
        what = f"{', '.join(missing)} cannot run on {model.name}: it lacks {why}"
        others = [method for method in methods if method not in missing and method != "full"]
        fix = f"--method {','.join(others)}" if others else "kvcli list methods"
        raise KvcliError(what, given=f"--model {model.name}", fix=fix)


def given(model: Model, names: Collection[str]) -> dict[str, Callable[[], Any]]:
    """What comes from outside of the run, by the name of the need."""
    found: dict[str, Callable[[], Any]] = {}
    for name in filter(profiles.is_profile, names):
        found[name] = partial(_same, profiles.profile_of(parse_model(model.name), name))
    for name in filter(bases.is_bases, names):
        found[name] = cache(partial(_bases, model, name))
    if "kvpress" in names:
        found["kvpress"] = partial(_same, kvpress.kept)
    return found


def _bases(model: Model, need: str) -> Any:
    from kvcli.models.directions import bases_of

    return bases_of(model, need)


def _same(value: Any) -> Any:
    return value
