"""Methods as tables and figures name them: of a file method its class, where that says which one it is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kvcli.errors import KvcliError
from kvcli.grammar import MethodText, Part, parse_methods


def shown(methods: Iterable[str]) -> dict[str, str]:
    """Every method of one run -> its name to show: `./value_norm.py:ValueNorm:recent=64` is `ValueNorm:recent=64`.

    The path stays where two files of the run have a class of that name, where a class is written like a method of
    kvcli (in lower case), and in texts outside the grammar.
    """
    parsed = {text: _parsed(text) for text in dict.fromkeys(methods)}
    sources = {part.source for method in parsed.values() if method for part in method.parts}
    known = [_class_of(source) for source in sources]
    return {
        text: "+".join(_part(part, known) for part in method.parts) if method else text
        for text, method in parsed.items()
    }


def files(methods: Iterable[str]) -> dict[str, str]:
    """Class as shown -> the file method it stands for; only those that `shown` shortens."""
    parsed = (_parsed(text) for text in methods)
    names = shown(part.source for method in parsed if method for part in method.parts)
    return {name: source for source, name in names.items() if name != source}


def spellings(method: str) -> set[str]:
    """What a user may type for a recorded method: it as recorded and as shown, with and without its settings."""
    parsed = _parsed(method)
    bare = method if parsed is None else str(MethodText(tuple(Part(part.source) for part in parsed.parts)))
    return {text for name in (method, bare) for text in (name, *shown([name]).values())}


def _parsed(text: str) -> MethodText | None:
    """None where the text is not that of one method."""
    try:
        found = parse_methods([text])
    except KvcliError:
        return None
    return found[0] if len(found) == 1 and str(found[0]) == text else None


def _part(part: Part, known: list[str]) -> str:
    name = _class_of(part.source)
    if not _is_file(part.source) or known.count(name) > 1 or name == name.lower():
        return str(part)
    return str(Part(name, part.settings))


def _class_of(source: str) -> str:
    return source.rpartition(":")[2] if _is_file(source) else source


def _is_file(source: str) -> bool:
    return Path(source.rpartition(":")[0]).suffix == ".py"


def decoding(decode: Mapping[str, Any] | None, ratio: str | None = None) -> str:
    """How generated tokens were compressed, in few words; empty where they were all kept.

    ratio: the cell's kept ratio, where `--decode-ratio same` was asked for: cells with it as r_d make one curve.
    """
    if not decode:
        return ""
    if "ratio" in decode:
        words = "r_d = r_p" if ratio is not None and decode["ratio"] == ratio else f"r_d {decode['ratio']}"
    elif "budget" in decode:
        words = f"{decode['budget']} generated kept"
    elif decode.get("cap") == "fixed":
        words = "fixed cap"
    elif "rule" in decode:
        words = "its own rule while generating"
    else:
        words = f"decode {json.dumps(decode, sort_keys=True)}"
    every = decode.get("interval", 1)
    return words if every == 1 else f"{words}, every {every}"
