"""How much each attention head of a model retrieves: a small file that `kvcli profile-heads` writes, and where it lies.

Methods that treat heads differently name `head_profile` (or `head_profile:PATH`) in `needs()`. Without a path the file
is looked for in the model's own folder, then in the user's cache. Imports no torch. The embedded testbed's own is what
`kvcli profile-heads --model testbed --out kvcli/testbed/weights/head_profile.json` writes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from kvcli.errors import KvcliError
from kvcli.models import bases, places
from kvcli.models.source import ModelSource, fingerprint

NEED = "head_profile"
FILE = "head_profile.json"
FORMAT = "kvcli head profile 1"
TRAINED = "full_attention_heads.tsv"
"""DuoAttention's own file: a line of tab-separated numbers per layer, one gate in 0..1 per KV head."""
CONFIG = "config.json"
"""Beside it: the settings of the training."""
GATES = "@gates:"
"""In place of a path: the gates that `kvcli profile-heads --gates` trained, `@gates:SINKS,RECENT`."""


@dataclass(frozen=True)
class HeadProfile:
    """heads[layer][head]: how much a head retrieves, larger = more; one number per query head (`per` = "query") or per
    KV head (`per` = "kv": trained gates). Only the order and the shares of the numbers mean something."""

    heads: tuple[tuple[float, ...], ...]
    per: str = "query"
    model: dict[str, Any] = field(default_factory=dict)
    samples: int = 0
    how: dict[str, Any] = field(default_factory=dict)

    def fits(self, layers: int, heads: int, kv_heads: int) -> bool:
        width = heads if self.per == "query" else kv_heads
        return len(self.heads) == layers and all(len(row) == width for row in self.heads)

    @cached_property
    def digest(self) -> str:
        """What tells its numbers from another's: `head_profile` of a run's cells."""
        return _digest([self])

    def to_dict(self) -> dict[str, Any]:
        rows = [list(row) for row in self.heads]
        return {"format": FORMAT, "model": self.model, "samples": self.samples, "how": self.how, "heads": rows}


def is_profile(need: str) -> bool:
    return need == NEED or need.startswith(f"{NEED}:")


def profile_of(source: ModelSource, need: str) -> HeadProfile:
    """The profile that a method's need names. Raises KvcliError where there is none, or one of another model."""
    _, _, path = need.partition(":")
    if path.startswith(GATES):
        sinks, recent = map(int, path.removeprefix(GATES).split(","))
        return load_gates(source, sinks, recent)
    return load_profile(source, path or None)


def check_profiles(source: ModelSource, needs: Iterable[str], config: Any = None) -> str | None:
    """Reads the profiles and the files of bases among a method's needs before anything runs; what tells their numbers
    apart, or None.

    config: the model's, once it is loaded: a file of another shape is refused. Raises KvcliError.
    """
    wanted = sorted(needs)
    found = [(need, profile_of(source, need)) for need in filter(is_profile, wanted)]
    files = [bases.header_of(source, need) for need in filter(bases.is_file, wanted)]
    for need, each in found:
        if config is not None:
            layers, heads = config.num_hidden_layers, config.num_attention_heads
            if not each.fits(layers, heads, getattr(config, "num_key_value_heads", None) or heads):
                what = f"the head profile has {len(each.heads)} layers of {len(each.heads[0])} heads, not this model's"
                given = need.partition(":")[2] or str(own_place(source) or cache_place(source))
                raise KvcliError(what, given=given, fix=command(source))
    if config is not None:
        for header in files:
            header.check(config, source)
    digests = [_digest([each for _, each in found])] * bool(found) + [header.digest for header in files]
    return (
        hashlib.sha256(",".join(digests).encode()).hexdigest()[:12] if len(digests) > 1 else next(iter(digests), None)
    )


def _digest(found: Sequence[HeadProfile]) -> str:
    text = json.dumps([[each.per, each.heads] for each in found])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def load_profile(source: ModelSource | str | Path, path: str | None = None) -> HeadProfile:
    """A model's profile: of `path`, else its folder's, else the user's cache.

    A plain path stands for a model's folder. Raises KvcliError: with the command that makes it where there is none,
    and for a file that was found without being asked for and was made for other weights.
    """
    if not isinstance(source, ModelSource):
        source = ModelSource(str(source), "folder", str(source))
    if path is not None:
        return read_profile(Path(path).expanduser())
    for place in filter(None, (own_place(source), cache_place(source))):
        if place.is_file():
            found = read_profile(place)
            if places.revision(found.model) != places.revision(fingerprint(source)):
                what = f"{place} was made for other weights than this model's"
                raise KvcliError(what, given=f"--model {source.text}", fix=f"{command(source)} --out {place}")
            return found
    what = f"no head profile of {source.text}: some methods need to know how much each of its heads retrieves"
    raise KvcliError(what, given=f"--model {source.text}", fix=command(source))


def load_gates(source: ModelSource, sinks: int, recent: int) -> HeadProfile:
    """The gates trained on this model's heads. Raises KvcliError with the command that trains them."""
    place = gates_place(source, sinks, recent)
    if not (place / TRAINED).is_file():
        what = f"no trained gates of {source.text} with {sinks} sinks and {recent} recent tokens"
        fix = f"{command(source)} --gates --sinks {sinks} --recent {recent}"
        raise KvcliError(what, given="heads=optimise", fix=fix)
    return read_profile(place)


def command(source: ModelSource) -> str:
    """What makes this model's profile."""
    return f"kvcli profile-heads --model {source.text}"


def own_place(source: ModelSource) -> Path | None:
    """In the model's own folder; None for a model without one."""
    return places.own(source, FILE)


def cache_place(source: ModelSource) -> Path:
    """In the user's cache, by the model's fingerprint."""
    return places.cached(source, ".json")


def gates_place(source: ModelSource, sinks: int, recent: int) -> Path:
    """The folder of its trained gates in the user's cache."""
    return places.cached(source, f"-gates-{sinks}-{recent}")


def existing(place: Path, source: ModelSource, how: dict[str, Any], *, force: bool) -> HeadProfile | None:
    """The profile that is at `place`, None where there is none. how: settings with which it is to be made.

    Raises KvcliError for one of other weights or settings, unless `force`, and for anything else that is there.
    """
    if place.is_dir() and not (place / TRAINED).is_file():
        if (place / CONFIG).exists():
            what = f"{place} holds the {CONFIG} of something else"
            raise KvcliError(what, given=f"--out {place}", fix="a folder of its own")
        return None
    if not place.exists():
        return None
    have = read_profile(place)
    other = places.otherwise(source, have.model, have.how, how)
    if other and not force:
        what = f"{place} was made otherwise ({'; '.join(other)})"
        raise KvcliError(what, given=f"--model {source.text}", fix="--force replaces it, --out writes elsewhere")
    return have


def read_profile(path: Path) -> HeadProfile:
    """A file of `kvcli profile-heads`, DuoAttention's `full_attention_heads.tsv`, or a folder that holds either."""
    if path.is_dir():
        path = path / (TRAINED if (path / TRAINED).is_file() else FILE)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        reason = "is not text" if isinstance(e, UnicodeDecodeError) else f"cannot be read: {e.strerror}"
        raise KvcliError(f"{path} {reason}", given=f"profile={path}", fix="a file of kvcli profile-heads") from e
    try:
        return _trained(text, path.parent / CONFIG) if path.suffix == ".tsv" else _measured(text)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        what = f"{path} is no head profile: {e}"
        raise KvcliError(what, given=f"profile={path}", fix=f"a file of kvcli profile-heads, or {TRAINED}") from e


def _measured(text: str) -> HeadProfile:
    facts = json.loads(text)
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise ValueError(f'it does not say "format": "{FORMAT}"')
    return HeadProfile(_table(facts["heads"]), "query", dict(facts["model"]), int(facts["samples"]), dict(facts["how"]))


def _trained(text: str, beside: Path) -> HeadProfile:
    """The authors clip their gates to 0..1 when they read them; so here. beside: the training's config.json, where it
    is there, says with how many sinks and recent tokens, and of kvcli's own everything else."""
    rows = [[min(max(float(x), 0.0), 1.0) for x in line.split()] for line in text.splitlines() if line.strip()]
    facts = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    sizes = {name: int(facts[key]) for name, key in (("sinks", "sink_size"), ("recent", "recent_size")) if key in facts}
    own = facts.get("kvcli") or {}
    how = {"score": "trained gates", **sizes, **own.get("how", {})}
    return HeadProfile(_table(rows), "kv", own.get("model", {}), own.get("samples", 0), how)


def _table(rows: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    table = tuple(tuple(float(x) for x in row) for row in rows)
    if not table or not table[0] or len({len(row) for row in table}) > 1:
        raise ValueError("every layer needs the same number of heads")
    if not all(math.isfinite(x) and x >= 0 for row in table for x in row):
        raise ValueError("its numbers must be finite and at least 0")
    return table


def write_profile(profile: HeadProfile, path: Path) -> None:
    """One layer per line. What another program wrote there is not overwritten."""
    if path.exists():
        read_profile(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = profile.to_dict()
    rows = facts.pop("heads")
    head = json.dumps(facts, indent=1)[:-2]
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    places.write(path, f'{head},\n "heads": [\n{lines}\n ]\n}}\n'.encode())


def write_gates(profile: HeadProfile, folder: Path) -> None:
    """In the authors' form, under their names: TRAINED, and beside it the training's settings."""
    how = profile.how
    theirs = {
        "model_name": profile.model.get("model"), "sink_size": how["sinks"], "recent_size": how["recent"],
        "num_steps": how["steps"], "lr": how["rate"], "reg_weight": how["penalty"], "initial_value": 1.0,
        "batch_size": 1, "num_passkeys": 1, "context_length_max": how["prompt_tokens"], "seed": how["seed"],
    }  # fmt: skip
    facts = {**theirs, "kvcli": {"model": profile.model, "samples": profile.samples, "how": how}}
    folder.mkdir(parents=True, exist_ok=True)
    places.write(folder / CONFIG, (json.dumps(facts, indent=1) + "\n").encode())
    rows = "".join("\t".join(f"{x:.18e}" for x in row) + "\n" for row in profile.heads)
    places.write(folder / TRAINED, rows.encode())
