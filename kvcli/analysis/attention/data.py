"""What `kvcli attn-map` found, as files and as the figures and the page read it. docs/attn-map.md lists the arrays."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcli.errors import KvcliError

NAME = "attn-map"
SCHEMA = 1
TEXT = "text"
"""The task of a user's own texts."""
Floats = NDArray[np.floating[Any]]

TITLES = {
    "keys_90": "share of keys with 90 %", "keys_95": "share of keys with 95 %", "entropy": "entropy (nats)",
    "entropy_share": "entropy (1: evenly spread)",
    "sink_mass": "mass of the sinks", "local_mass": "local mass",
}  # fmt: skip
QUERIES = {"all": "all queries", "question": "the question's queries"}


@dataclass(frozen=True)
class Atlas:
    """meta: attn-map.json; arrays: attn-map.npz."""

    meta: dict[str, Any]
    arrays: Mapping[str, Floats]

    @property
    def model(self) -> str:
        """The model's name, fit for a title."""
        return str(self.meta["model"]["short"])

    @property
    def groups(self) -> list[dict[str, Any]]:
        return list(self.meta["groups"])

    @property
    def prompts(self) -> list[dict[str, Any]]:
        return list(self.meta["prompts"])

    @property
    def shown(self) -> list[int]:
        """Numbers of the prompts that are drawn."""
        return [i for i, prompt in enumerate(self.prompts) if prompt["shown"]]

    def of(self, prompt: int, name: str) -> Floats:
        """An array of one prompt that is drawn."""
        return np.asarray(self.arrays[f"p{prompt}.{name}"])

    def members(self, group: int) -> list[int]:
        return [i for i, prompt in enumerate(self.prompts) if prompt["group"] == group]

    def mean(self, name: str, group: int, queries: str) -> Floats:
        """An array that every prompt has, averaged over the prompts of a group: without its first two axes."""
        stack = np.asarray(self.arrays[name])[self.members(group), self.meta["sets"].index(queries)]
        return np.asarray(stack.astype(float).mean(0))

    def region_mass(self, kind: str, group: int, queries: str) -> Floats | None:
        """[L, H]: what a kind of region receives in a group; None where no prompt of it has such a region."""
        labels = {label.partition(" ")[0] for i in self.members(group) for label, _, _ in self.prompts[i]["regions"]}
        if kind not in labels:
            return None
        return np.asarray(self.mean("region_mass", group, queries)[self.meta["kinds"].index(kind)])

    def kept(self, prompt: int, entry: Mapping[str, Any]) -> NDArray[np.bool_]:
        """[L, H_kv or 1, n]: which pairs of a prompt that is drawn a method keeps."""
        bits = np.unpackbits(self.arrays[entry["array"]].astype(np.uint8), axis=-1)
        return bits[..., : self.prompts[prompt]["n"]].astype(bool)

    def entries(self, prompt: int) -> Iterator[dict[str, Any]]:
        """What methods keep of a prompt, those that failed left out."""
        return (entry for entry in self.prompts[prompt]["kept"] if "error" not in entry)

    def whose(self) -> str:
        """'layer 15, head 10'; 'mean of all heads of layer 3'."""
        layer, head = self.meta["chosen"]["layer"], self.meta["chosen"]["head"]
        if head == "mean":
            return "mean over all layers and heads" if layer == "mean" else f"layer {layer}, mean over heads"
        return f"head {head}, mean over layers" if layer == "mean" else f"layer {layer}, head {head}"

    def named(self, prompt: int) -> str:
        """'gsm8k, sample 12'; the name of a user's own text."""
        facts = self.prompts[prompt]
        if self.groups[facts["group"]]["task"] == TEXT:
            return str(facts["sample"])
        return f"{self.groups[facts['group']]['label']}, sample {facts['sample']}"

    def queries(self, name: str) -> str:
        """Whose attention it is: 'all queries', 'the question's queries'."""
        last = name == "question" and "question" not in kinds_there(self)
        return "the last token's query" if last else QUERIES[name]

    def measured(self, name: str) -> str:
        """Whose attention the measures are of: '256 of 2,884 queries' where only some were looked at."""
        every = [(p["measured"][name], p["queries"][name]) for p in self.prompts]
        if all(some >= whole - self.meta["sinks"] for some, whole in every):
            return self.queries(name)
        ranges = [sorted({pair[i] for pair in every}) for i in (0, 1)]
        some, whole = (" to ".join(f"{v:,}" for v in dict.fromkeys((r[0], r[-1]))) for r in ranges)
        return f"{some} of {whole} queries" if name == "all" else f"{some} of the question's {whole} queries"

    def counted(self, group: int | None = None) -> str:
        """'n = 4 prompts', of one group or of each."""
        counts = [g["samples"] for g in self.groups] if group is None else [self.groups[group]["samples"]]
        low, high = min(counts), max(counts)
        tasks = [g["task"] for g in self.groups]
        each = "" if len(counts) == 1 else " per task" if len(set(tasks)) == len(tasks) else " each"
        if low != high:
            return f"n = {low} to {high} prompts{each}"
        return f"n = {low} prompt{'s' * (low != 1)}{each}"


def cell_label(entry: Mapping[str, Any]) -> str:
    """'snapkv, ratio 0.2'; 'snapkv, ratio 0.2, agnostic' of what was chosen before the question was known."""
    size = f", ratio {entry['ratio']}" if entry["ratio"] not in (None, "1") else ""
    size += f", budget {entry['budget']}" if entry["budget"] else ""
    size += f", seed {entry['seed']}" if entry["seed"] else ""
    return f"{entry['method']}{size}" + (", agnostic" if entry.get("query") == "agnostic" else "")


def write(atlas: Atlas, folder: Path) -> list[Path]:
    """attn-map.json and attn-map.npz; the same data give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    meta, data = folder / f"{NAME}.json", folder / f"{NAME}.npz"
    meta.write_text(json.dumps(atlas.meta, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    held = io.BytesIO()
    np.savez_compressed(held, **atlas.arrays)  # type: ignore[arg-type]
    data.write_bytes(held.getvalue())
    return [meta, data]


def load(folder: Path) -> Atlas:
    """What `write` wrote. Raises KvcliError for a folder without it and for one of another version."""
    meta, data = folder / f"{NAME}.json", folder / f"{NAME}.npz"
    fix = "a folder that kvcli attn-map wrote"
    try:
        facts = json.loads(meta.read_text(encoding="utf-8"))
        with np.load(data, allow_pickle=False) as arrays:
            found = dict(arrays)
    except (OSError, ValueError) as e:
        raise KvcliError(f"cannot read {NAME} in {folder}: {e}", given=str(folder), fix=fix) from e
    if facts.get("schema") != SCHEMA:
        what = f"{meta} is of schema {facts.get('schema')}, this kvcli reads {SCHEMA}"
        raise KvcliError(what, given=str(folder), fix="run kvcli attn-map again")
    return Atlas(facts, found)


def region_title(kind: str) -> str:
    """'mass of the context'."""
    named = {"special": "mass of special tokens", "system": "mass of the system text", "shot": "mass of all shots"}
    return named.get(kind, f"mass of the {kind}")


def kinds_there(atlas: Atlas) -> list[str]:
    """The kinds of regions that prompts have, in order."""
    there = {label.partition(" ")[0] for prompt in atlas.prompts for label, _, _ in prompt["regions"]}
    return [kind for kind in atlas.meta["kinds"] if kind in there]
