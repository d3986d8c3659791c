"""Made-up attention in the form that `kvcli attn-map` finds it, without a model.

python -m tests.analysis.attention_atlas     writes the golden file anew, after a change that is meant
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import numpy as np

from kvcli.analysis.attention.curves import curve_panels
from kvcli.analysis.attention.data import SCHEMA, Atlas
from kvcli.analysis.attention.grids import Grid, measures, regions, regions_against_even
from kvcli.analysis.attention.shots import shot_panels
from tests.analysis.synthetic import GOLDEN

SETS, KINDS = ("all", "question"), ("special", "system", "context", "shot", "question")
MEASURES = ("keys_90", "keys_95", "entropy", "entropy_share", "sink_mass", "local_mass")
WORDS = (" the", " fish", "\n", " ", "<b>", " $x$", "é", "", " go", " &amp;")
SIZES = np.array([1, 1, 4, 1, 0.001, 1])[:, None, None]
"""Of the measures: entropy is in nats, and few heads may look at the sinks."""
GOLDEN_FILE = GOLDEN / "attention.json"


def made(
    groups: tuple[tuple[str, int], ...] = (("tb_arithmetic", 2), ("tb_safety", 1)),
    *, n: int = 40, layers: int = 3, heads: int = 4, kv_heads: int = 2, block: int = 1, methods: int = 2,
    context: bool = True, hidden: bool = False, words: tuple[str, ...] = WORDS, model: str = "made",
    unknown: tuple[int, ...] = (), query: str = "aware",
) -> Atlas:  # fmt: skip
    """Two groups of prompts; the first of each is drawn. With `context` the second group has a passage and no shots."""
    rng = np.random.default_rng(11)
    arrays: dict[str, Any] = {}
    prompts: list[dict[str, Any]] = []
    stacks: dict[str, list[Any]] = {"measures": [], "region_mass": [], "curves": []}
    for group, (_, count) in enumerate(groups):
        for index in range(count):
            found = _prompt(group, index, n, block, hidden, words, passage=context and group == 1, unknown=unknown)
            number = len(prompts)
            received = rng.gamma(0.4, size=(2, layers, heads, n))
            received /= received.sum(-1, keepdims=True)
            stacks["measures"].append(rng.random((2, 6, layers, heads)) * SIZES)
            mass = np.zeros((2, 5, layers, heads))
            for label, start, end in found["regions"]:
                mass[:, KINDS.index(label.partition(" ")[0])] += received[..., start:end].sum(-1)
            stacks["region_mass"].append(mass)
            stacks["curves"].append(_curves(received))
            shots = _shot_mass(received, found["regions"])
            arrays[f"p{number}.shot_layers"] = shots.mean(-1).astype(np.float32)
            if found["shown"]:
                arrays[f"p{number}.shot_mass"] = shots.astype(np.float32)
                arrays.update(_drawn(number, n, block, received, rng))
                found["kept"] = [
                    _kept(number, i, n, layers, kv_heads, received, arrays, rng, query) for i in range(methods)
                ]
            prompts.append(found)
    arrays |= {name: np.stack(values).astype(np.float32) for name, values in stacks.items()}
    meta = {
        "schema": SCHEMA, "chosen": {"layer": "1", "head": "2", "note": ""}, "sinks": 4, "local": 32,
        "shares": [0.9, 0.95], "measures": list(MEASURES), "sets": list(SETS), "kinds": list(KINDS),
        "curves": ["with", "without", "without, of all"],
        "model": {"name": model, "short": model, "dtype": "float32", "layers": layers, "heads": heads,
                  "kv_heads": kv_heads},
        "groups": [{"task": name, "label": name, "ability": "", "shots": 2, "harmful": hidden, "samples": count}
                   for name, count in groups],
        "prompts": prompts,
    }  # fmt: skip
    return Atlas(meta, arrays)


def _prompt(
    group: int, index: int, n: int, block: int, hidden: bool, words: Any, *, passage: bool, unknown: tuple[int, ...]
) -> dict[str, Any]:  # fmt: skip
    cuts = [0, 1, 3, *(3 + (n - 8) * k // 3 for k in (1, 2)), n - 5, n]
    middle = ("context",) * 3 if passage else ("shot 0", "shot 1", "shot 2")
    labels = ("special", "system", *middle, "question")
    spans = [[label, a, b] for label, a, b in zip(labels, cuts, cuts[1:], strict=False)]
    if passage:
        spans = [*spans[:2], ["context", cuts[2], cuts[5]], spans[-1]]
    return {
        "group": group, "sample": f"s{index}", "n": n, "shown": index == 0, "hidden": hidden, "regions": spans,
        "tokens": None if hidden or index else [words[i % len(words)] for i in range(n)], "block": block, "small": 5,
        "unit": 1, "measured": {"all": n - 4, "question": 5}, "queries": {"all": n, "question": 5}, "truncated": 0,
        "unknown": list(unknown), "kept": [],
    }  # fmt: skip


def _curves(received: Any) -> Any:
    at = np.linspace(0, 1, 201)

    def ranked(values: Any) -> Any:
        sums = np.sort(values, -1)[..., ::-1].cumsum(-1).mean(-2)
        flat = sums.reshape(-1, sums.shape[-1])
        lines = [np.interp(at, np.linspace(0, 1, flat.shape[1] + 1), [0, *each]) for each in flat]
        return np.reshape(lines, (*sums.shape[:-1], len(at)))

    rest = received[..., 4:]
    return np.stack([ranked(received), ranked(rest / rest.sum(-1, keepdims=True)), ranked(rest)], 1)


def _shot_mass(received: Any, spans: Any) -> Any:
    shots = [received[..., a:b].sum(-1) for label, a, b in spans if label.startswith("shot")]
    return np.stack(shots, 1) if shots else np.zeros((2, 0, *received.shape[1:3]))


def _drawn(number: int, n: int, block: int, received: Any, rng: Any) -> dict[str, Any]:
    count, small = -(-n // block), -(-n // 5)
    layers, heads = received.shape[1:3]
    rows = [rng.dirichlet(np.full(i + 1, 0.3)) for i in range(count)]
    mean = np.full((count, count), np.nan)
    for i, row in enumerate(rows):
        mean[i, : i + 1] = row
    coarse = np.where(np.tril(np.ones((small, small), bool)), rng.random((layers, heads, small, small)), np.nan)
    named = {
        "map_mean": mean, "map_max": np.minimum(1, 2 * mean), "small": coarse, "received": received,
        "token_received": received.mean((1, 2)),
    }  # fmt: skip
    return {f"p{number}.{name}": value.astype(np.float32) for name, value in named.items()}


def _kept(
    number: int, cell: int, n: int, layers: int, kv_heads: int, received: Any, arrays: Any, rng: Any, query: str
) -> Any:
    held = rng.random((layers, 1 if cell else kv_heads, n)) < 0.3
    held[..., -1] = True
    group = received.shape[2] // held.shape[1]
    thrown = (received * ~np.repeat(held, group, 1)).sum(-1)
    name = f"p{number}.kept.{cell}"
    arrays[name], arrays[f"{name}.thrown"] = np.packbits(held, axis=-1), thrown.astype(np.float32)
    return {
        "method": ("first:window=8", "second")[cell % 2], "ratio": f"0.{2 + cell}", "budget": None, "seed": None,
        "query": query, "of": n, "flags": ["over_budget"] if cell else [], "kept": float(held.mean()),
        "by_layer": held.mean((1, 2)).tolist(), "array": name,
        "thrown_by_layer": {s: thrown[i].mean(-1).tolist() for i, s in enumerate(SETS)},
    }  # fmt: skip


def behind_the_figures(atlas: Atlas) -> dict[str, Any]:
    """The numbers that the curves and grids draw."""

    def listed(grid: Grid) -> dict[str, Any]:
        values = None if grid.values is None else grid.values.tolist()
        return {"name": grid.name, "group": grid.group, "highest": grid.highest, "values": values}

    curves = [asdict(panel) for panel in curve_panels(atlas, "question")]
    for panel in curves:
        panel["x"] = panel["x"][::20]
        for line in panel["lines"]:
            line |= {name: line[name] and list(line[name][::20]) for name in ("y", "low", "high")}
        panel["even"] = panel["even"][::20]
    grids = [*measures(atlas, "all"), *regions(atlas, "all"), *regions_against_even(atlas, "all")]
    shots = [{"label": p.label, "n": p.prompts, "values": p.values.tolist()} for p in shot_panels(atlas, "all")]
    return json.loads(json.dumps({"curves": curves, "grids": [listed(grid) for grid in grids], "shots": shots}))


if __name__ == "__main__":
    GOLDEN_FILE.write_text(json.dumps(behind_the_figures(made()), indent=1) + "\n", encoding="utf-8")
