"""One self-contained page to explore attention: maps, grids, tokens with what they receive and what methods keep.

Everything is in the file: no request leaves it (its Content-Security-Policy forbids any). Texts reach it as JSON and
are written with textContent, so nothing in a prompt is ever read as HTML. docs/attn-map.md describes the page.
"""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np

from kvcli.analysis.attention.curves import curve_panels
from kvcli.analysis.attention.data import TITLES, Atlas, Floats, cell_label, kinds_there, region_title
from kvcli.analysis.attention.even import even_shots
from kvcli.analysis.attention.sheet import THROWN
from kvcli.analysis.attention.shots import shot_panels, with_shots
from kvcli.analysis.attention.times import furthest
from kvcli.analysis.figures.style import DARK, LIGHT

UNITS = 2048
"""Tokens, or groups of them, that are written out."""
RECEIVED, SMALL, KEPT, LARGE, SHOTS = 800_000, 1_050_000, 500_000, 300_000, 150_000
"""Numbers of each kind in a page, which stays under 5 MB. Beyond, up to TOGETHER tokens are taken together, then heads
averaged, then more tokens taken together."""
TOGETHER = 4
LARGEST = 256
"""Blocks of the chosen head's map."""
DECADES, SMALL_DECADES = 8, 5
"""Of the logarithmic scales that numbers are stored in: 16 bit for what tokens receive, 8 bit for maps."""


def page(atlas: Atlas) -> str:
    """The HTML text."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("kvcli"), autoescape=True, keep_trailing_newline=True)
    template = environment.get_template("attention.html.j2")
    title = f"Attention of {atlas.model}"
    return template.render(title=title, thrown=THROWN, data=script_json(page_data(atlas)))


def script_json(value: Any) -> str:
    """JSON that can stand inside a script element whatever it holds."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def page_data(atlas: Atlas) -> dict[str, Any]:
    """What the page's script reads."""
    meta, model = atlas.meta, atlas.meta["model"]
    return {
        "model": atlas.model, "layers": model["layers"], "heads": model["heads"], "kvHeads": model["kv_heads"],
        "dtype": model["dtype"], "chosen": meta["chosen"],
        "sets": [[name, atlas.queries(name)] for name in meta["sets"]],
        "decades": DECADES, "smallDecades": SMALL_DECADES, "sinks": meta["sinks"], "local": meta["local"],
        "groups": [{"label": g["label"], "n": g["samples"]} for g in atlas.groups], "grids": _grids(atlas),
        "curves": [_curves(atlas, name) for name in meta["sets"]],
        "shotLayers": [_shot_layers(atlas, name) for name in meta["sets"]],
        "times": [list(theme.losses) for theme in (LIGHT, DARK)],
        "prompts": [_prompt(atlas, i) for i in atlas.shown],
    }  # fmt: skip


def _grids(atlas: Atlas) -> list[dict[str, Any]]:
    """Measures [group][set][layer][head] under their titles, mean over prompts."""
    groups, sets = range(len(atlas.groups)), atlas.meta["sets"]
    every = []
    for number, name in enumerate(atlas.meta["measures"]):
        values = [[_rounded(atlas.mean("measures", group, s)[number]) for s in sets] for group in groups]
        every.append({"title": TITLES[name], "values": values})
    none = np.full((atlas.meta["model"]["layers"], atlas.meta["model"]["heads"]), None).tolist()
    for kind in kinds_there(atlas):
        masses = [[atlas.region_mass(kind, group, s) for s in sets] for group in groups]
        values = [[none if mass is None else _rounded(mass) for mass in of_group] for of_group in masses]
        every.append({"title": region_title(kind), "values": values})
    return every


def _prompt(atlas: Atlas, prompt: int) -> dict[str, Any]:
    facts, count = atlas.prompts[prompt], len(atlas.shown)
    received = atlas.of(prompt, "received").astype(float)  # [S, L, H or 1, units]
    if -(-received.size * count // RECEIVED) > TOGETHER:
        received = received.mean(2, keepdims=True)
    unit = facts["unit"]
    more = -(-received.size * count // RECEIVED)
    received, unit = _wider(received, more), unit * more
    small = atlas.of(prompt, "small").astype(float)
    if small.size * count > SMALL:
        small = small.mean(1, keepdims=True)
    return {
        "name": atlas.named(prompt), "group": facts["group"], "n": facts["n"], "unit": unit, "small": facts["small"],
        "hidden": facts["hidden"], "regions": facts["regions"], "tokens": _texts(facts, unit),
        "queries": facts["queries"], "received": _packed(received, DECADES, np.uint16),
        "map": _packed(small, SMALL_DECADES, np.uint8), **_large(atlas, prompt, small.shape[-1]),
        **_shots(atlas, prompt), "unknown": facts.get("unknown", []), "kept": _kept(atlas, prompt, unit),
    }  # fmt: skip


def _large(atlas: Atlas, prompt: int, least: int) -> dict[str, Any]:
    """The chosen head's own map, where it is finer than the small ones: in blocks of whole blocks of the data."""
    facts, mean = atlas.prompts[prompt], atlas.of(prompt, "map_mean").astype(float)
    most = min(LARGEST, int((LARGE / len(atlas.shown)) ** 0.5))
    step = -(-len(mean) // most)
    if -(-len(mean) // step) <= least:
        return {}
    pairs = _pairs(len(mean), facts["block"], facts["n"])
    with np.errstate(invalid="ignore"):
        pooled = _blocks(np.nan_to_num(mean) * pairs, step) / _blocks(pairs, step)
    return {"large": _packed(pooled, SMALL_DECADES, np.uint8), "largeBlock": facts["block"] * step}


def _pairs(count: int, block: int, n: int) -> Floats:
    """[count, count]: pairs of a query and a key it sees in each block; nothing here is as long as the prompt."""
    long = np.minimum(block, n - block * np.arange(count)).astype(float)
    return np.tril(np.outer(long, np.full(count, block)), -1) + np.diag(long * (long + 1) / 2)


def _blocks(values: Floats, step: int) -> Floats:
    edges = np.arange(0, len(values), step)
    return np.asarray(np.add.reduceat(np.add.reduceat(values, edges, 0), edges, 1))


def _shots(atlas: Atlas, prompt: int) -> dict[str, Any]:
    """What each shot receives per layer and head, and what it would receive of evenly spread attention."""
    mass = atlas.of(prompt, "shot_mass").astype(float)  # [S, shots, L, H]
    if not mass.shape[1] or mass.size * len(atlas.shown) > SHOTS:
        return {}
    even = [np.round(even_shots(atlas, prompt, name), 6).tolist() for name in atlas.meta["sets"]]
    return {"shots": _packed(mass, SMALL_DECADES, np.uint16), "shotsEven": even}


def _shot_layers(atlas: Atlas, queries: str) -> dict[str, Any]:
    """Of each group with shots [layer][shot], times evenly spread attention; top: how far colours reach."""
    panels = shot_panels(atlas, queries)
    return {
        "top": furthest([panel.values for panel in panels]),
        "panels": [
            {"label": p.label, "n": p.prompts, "group": group, "values": np.round(p.values, 3).tolist()}
            for group, p in zip(with_shots(atlas), panels, strict=True)
        ],
    }


def _curves(atlas: Atlas, queries: str) -> list[dict[str, Any]]:
    """The panels of cumulative curves: [points] in percent, per group and of evenly spread attention."""
    return [
        {"title": p.title, "subtitle": p.subtitle, "even": np.round(p.even, 2).tolist(),
         "lines": [{"label": line.label, "y": np.round(line.y, 2).tolist()} for line in p.lines]}
        for p in curve_panels(atlas, queries)
    ]  # fmt: skip


def _texts(facts: dict[str, Any], unit: int) -> list[str] | None:
    """The text of each unit; None where it must not be shown."""
    tokens = facts["tokens"]
    if tokens is None:
        return None
    return ["".join(tokens[i : i + unit]) for i in range(0, len(tokens), unit)]


def _kept(atlas: Atlas, prompt: int, unit: int) -> list[dict[str, Any]]:
    entries = list(atlas.entries(prompt))
    found = []
    for entry in entries:
        held = atlas.kept(prompt, entry)
        share = _wider(held.astype(float), unit) / _wider(np.ones(held.shape[-1]), unit)
        if share.size * len(entries) * len(atlas.shown) > KEPT:
            share = share.mean(1, keepdims=True)
        found.append({
            "label": cell_label(entry), "flags": entry["flags"], "kept": round(entry["kept"], 6),
            "byLayer": _rounded(np.array(entry["by_layer"])),
            "thrown": [_rounded(np.array(entry["thrown_by_layer"][name])) for name in atlas.meta["sets"]],
            "share": {"shape": list(share.shape), "data": _base64(np.rint(255 * share).astype(np.uint8))},
        })  # fmt: skip
    return found


def _wider(values: Floats, unit: int) -> Floats:
    """Sums over units of so many entries of the last axis."""
    padded = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, -values.shape[-1] % unit)])
    return np.asarray(padded.reshape(*values.shape[:-1], -1, unit).sum(-1))


def _packed(values: Floats, decades: int, kind: Any) -> dict[str, Any]:
    """Numbers on a logarithmic scale below 1: 0 for none, then from 10^-decades to 1."""
    top = np.iinfo(kind).max
    with np.errstate(divide="ignore", invalid="ignore"):
        place = 1 + (top - 1) * np.clip(np.log10(values) / decades + 1, 0, 1)
    packed = np.where(np.nan_to_num(values) > 0, np.rint(np.nan_to_num(place)), 0).astype(kind)
    return {"shape": list(values.shape), "data": _base64(packed)}


def _base64(values: Any) -> str:
    return base64.b64encode(np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<")).tobytes()).decode()


def _rounded(values: Floats) -> Any:
    return np.round(values.astype(float), 4).tolist()
