"""The file of a model's bases: second moments of its keys before rotation and of its values over calibration texts.

`kvcli profile-heads --bases` writes it. Per layer and group of neighbouring KV heads it holds X^T X / tokens, with
X [tokens, heads * width] of the heads side by side: the leading eigenvectors of any part of it are the right singular
vectors of that part's X. It is a safetensors file under another ending, because a model's folder is told apart by its
safetensors files.

Methods name `bases:GROUP:` or `bases:GROUP:PATH` in `needs()`, GROUP the KV heads they take together; without a path
the file is looked for in the model's own folder, then in the user's cache. `bases:weights` needs no file. Imports no
torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcli.errors import KvcliError
from kvcli.models import places
from kvcli.models.source import ModelSource, fingerprint

if TYPE_CHECKING:
    from torch import Tensor

NEED = "bases:"
WEIGHTS = "bases:weights"
FILE = "kv_bases.st"
FORMAT = "kvcli bases 1"
_LONGEST_HEADER = 64 << 20


@dataclass(frozen=True)
class Header:
    """What a file of bases says of itself. widths: elements of one head's key and value; group: KV heads taken together
    when it was made; digest: of its numbers, part of a run's cells."""

    model: dict[str, Any]
    digest: str
    layers: int
    kv_heads: int
    widths: tuple[int, int]
    group: int
    texts: int
    tokens: int
    how: dict[str, Any] = field(default_factory=dict)
    path: str = ""
    wanted: int = 1
    """KV heads that the method takes together."""

    def check(self, config: Any, source: ModelSource) -> None:
        """Raises KvcliError for a file of another model's shape."""
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        if (self.layers, self.kv_heads) != (config.num_hidden_layers, heads):
            what = f"the bases are of {self.layers} layers with {self.kv_heads} KV heads, not this model's"
            raise KvcliError(what, given=self.path, fix=command(source))

    def holds(self, group: int) -> bool:
        """Whether every group of that many neighbouring heads lies inside one of the file's."""
        return self.group >= self.kv_heads or (group <= self.group and self.group % group == 0)

    def to_dict(self) -> dict[str, Any]:
        facts = asdict(self)
        for name in ("path", "wanted"):
            del facts[name]
        return {"format": FORMAT, **facts, "widths": list(self.widths)}


def file_need(group: int, path: str = "") -> str:
    return f"{NEED}{group}:{path}"


def is_bases(need: str) -> bool:
    return need.startswith(NEED)


def is_file(need: str) -> bool:
    return is_bases(need) and need != WEIGHTS


def command(source: ModelSource) -> str:
    """What makes this model's file."""
    texts = "" if source.kind == "testbed" else " --calib FILE"
    return f"kvcli profile-heads --bases --model {source.text}{texts}"


def own_place(source: ModelSource) -> Path | None:
    return places.own(source, FILE)


def cache_place(source: ModelSource) -> Path:
    return places.cached(source, "-bases.st")


def header_of(source: ModelSource, need: str) -> Header:
    """What the file says that a need names. Raises KvcliError with the command that makes it: where there is none, for
    one that was found without being named and is of other weights, for one of smaller groups of heads."""
    group, _, path = need.removeprefix(NEED).partition(":")
    found = read_header(Path(path).expanduser(), int(group)) if path else _found(source, int(group))
    if not found.holds(int(group)):
        what = f"the bases are of groups of {found.group} KV heads, which groups of {group} do not fit into"
        fix = f"group={found.group}, or {command(source)} --group {group} --force"
        raise KvcliError(what, given=f"group={group}, {found.path}", fix=fix)
    return found


def _found(source: ModelSource, group: int) -> Header:
    for place in filter(None, (own_place(source), cache_place(source))):
        if place.is_file():
            found = read_header(place, group)
            if places.revision(found.model) != places.revision(fingerprint(source)):
                what = f"{place} was made for other weights than this model's"
                raise KvcliError(what, given=f"--model {source.text}", fix=f"{command(source)} --out {place}")
            return found
    what = f"no bases of {source.text}: directions of its keys and values over calibration texts"
    raise KvcliError(what, given=f"--model {source.text}", fix=command(source))


def read_header(path: Path, wanted: int = 1) -> Header:
    """Raises KvcliError for a file that is not there or is none of bases."""
    fix = "a file of kvcli profile-heads --bases"
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if length <= _LONGEST_HEADER else b""
        facts = json.loads(json.loads(text)["__metadata__"]["kvcli"])
        if facts.pop("format") != FORMAT:
            raise ValueError
        return Header(**{**facts, "widths": tuple(facts["widths"])}, path=str(path), wanted=wanted)
    except OSError as e:
        raise KvcliError(f"{path} cannot be read: {e.strerror}", given=f"basis={path}", fix=fix) from e
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise KvcliError(f"{path} is no file of bases", given=f"basis={path}", fix=fix) from e


def existing(place: Path, source: ModelSource, how: dict[str, Any], *, force: bool) -> Header | None:
    """What is at `place`, None where nothing is. how: settings with which it is to be made.

    Raises KvcliError for a file of other weights or settings, unless `force`, and for anything else that is there.
    """
    if not place.exists():
        return None
    have = read_header(place)
    other = places.otherwise(source, have.model, {**have.how, "group": have.group}, how)
    if other and not force:
        what = f"{place} was made otherwise ({'; '.join(other)})"
        raise KvcliError(what, given=f"--model {source.text}", fix="--force replaces it, --out writes elsewhere")
    return have


def digest_of(moments: Mapping[str, Tensor]) -> str:
    """Of the numbers, by their names' order."""
    found = hashlib.sha256()
    for name in sorted(moments):
        found.update(name.encode() + moments[name].contiguous().numpy().tobytes())
    return found.hexdigest()[:12]


def write_bases(header: Header, moments: Mapping[str, Tensor], path: Path) -> None:
    """moments: `name_of` -> float32 on the CPU. What another program wrote there is not overwritten."""
    from safetensors.torch import save

    if path.exists():
        read_header(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    places.write(path, save(dict(moments), {"kvcli": json.dumps(header.to_dict())}))


def read_moments(header: Header) -> dict[str, Tensor]:
    """The numbers behind a header. Raises KvcliError where they are not those it was written with."""
    from safetensors.torch import load_file

    try:
        moments: dict[str, Tensor] = load_file(header.path)
    except Exception as e:
        raise KvcliError(f"{header.path} is damaged: {e}", given=header.path, fix="make it again") from e
    if digest_of(moments) != header.digest:
        raise KvcliError(f"{header.path} is damaged: its numbers have changed", given=header.path, fix="make it again")
    return moments


def name_of(what: str, layer: int, block: int) -> str:
    """what: keys or values; block: number of the group of heads."""
    return f"{what}.{layer}.{block}"
