"""Where a model comes from: the text of --model, checked and taken apart without torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvcli.errors import KvcliError, unknown
from kvcli.models.aliases import ALIASES, TESTBED, TESTBEDS

TESTBED_FOLDERS = {name: Path(__file__).parents[1] / "testbed" / place for name, (place, _) in TESTBEDS.items()}
TESTBED_FOLDER = TESTBED_FOLDERS[TESTBED]
REMEMBERED = 256 << 20
"""Bytes above which the hash of a weight file is kept in the user's cache folder."""
RANDOM_SETTINGS = ("layers", "hidden", "heads", "kv_heads", "vocab", "positions", "seed")


@dataclass(frozen=True)
class ModelSource:
    """kind: testbed, folder, hub or random. place: folder or hub id. settings: sizes of a random model."""

    text: str
    kind: str
    place: str
    revision: str | None = None
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def suite(self) -> str | None:
        """The suite of tasks it was made for; None for a model of ordinary text."""
        return TESTBEDS[self.text][1] if self.kind == "testbed" else None

    @property
    def short(self) -> str:
        """A name fit for a folder."""
        name = self.text if self.kind in ("testbed",) or self.text in ALIASES else Path(self.place).name
        clean = "".join(c if c.isalnum() or c in "-_." else "-" for c in name).strip(".-")
        return f"random-{clean}" if self.kind == "random" else clean


def parse_model(text: str) -> ModelSource:
    """ALIAS | ORG/NAME[@REV] | ./FOLDER | random:FOLDER[:layers=2,...]. Raises KvcliError for anything else."""
    given = f"--model {text}"
    if text in TESTBEDS:
        return ModelSource(text, "testbed", str(TESTBED_FOLDERS[text]))
    if text.startswith("random:"):
        return _random(text, given)
    if text.startswith((".", "/", "~")):
        return ModelSource(text, "folder", str(_folder(text, given)))
    name, _, revision = text.partition("@")
    if name in ALIASES:
        return ModelSource(text, "hub", ALIASES[name], revision or None)
    if name.count("/") == 1 and all(name.split("/")):
        if Path(name).is_dir():
            fix = f"--model ./{name} for the folder here"
            raise KvcliError(f"'{name}' is both a folder and a hub id", given=given, fix=fix)
        return ModelSource(text, "hub", name, revision or None)
    raise unknown("model", text, [*TESTBEDS, *ALIASES], given=given, listing="kvcli list models")


def _folder(text: str, given: str) -> Path:
    path = Path(text).expanduser()
    if not (path / "config.json").is_file():
        what = "no config.json in" if path.is_dir() else "no model folder"
        raise KvcliError(f"{what} {path}", given=given, fix="a folder written by save_pretrained, or a hub id")
    return path


def _random(text: str, given: str) -> ModelSource:
    place, _, rest = text.removeprefix("random:").partition(":")
    settings = {}
    for piece in filter(None, rest.split(",")):
        key, equals, value = piece.partition("=")
        if key not in RANDOM_SETTINGS or not equals:
            raise unknown("size of a random model", key, RANDOM_SETTINGS, given=given, listing="docs/cli.md")
        if not (value.isdigit() and (int(value) > 0 or key == "seed")) and (key, value) != ("vocab", "auto"):
            raise KvcliError(f"'{piece}' is not a positive whole number", given=given, fix=f"{key}=2")
        settings[key] = value
    return ModelSource(text, "random", str(_folder(place or ".", given)), settings=settings)


def fingerprint(source: ModelSource) -> dict[str, Any]:
    """What tells two models apart: hub id and revision, or hashes of config and weight files of a folder.

    A user's folder with a `generation_config.json` has its hash beside them, under a key of its own: that file says
    which tokens end an answer, and nothing of the weights.
    """
    if source.kind == "hub":
        return {"model": source.place, "revision": source.revision or "main"}
    folder = Path(source.place)
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    if source.kind == "random":
        digest.update(json.dumps(source.settings, sort_keys=True).encode())
        return {"model": f"random:{folder.name}", "revision": digest.hexdigest()[:12]}
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        digest.update(f"{file.name}:{_whole_hash(file)}".encode())
    found = {"model": source.text if source.kind == "testbed" else folder.name, "revision": digest.hexdigest()[:12]}
    ends = folder / "generation_config.json"
    if source.kind == "folder" and ends.is_file():
        found["generation_config"] = hashlib.sha256(ends.read_bytes()).hexdigest()[:12]
    return found


def _whole_hash(file: Path) -> str:
    """SHA-256 of a weight file. Large ones are remembered by path, size and time, so that gigabytes are read once."""
    facts = file.stat()
    key = f"{file.resolve()}:{facts.st_size}:{facts.st_mtime_ns}"
    memory = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kvcli" / "weight-hashes"
    place = memory / hashlib.sha256(key.encode()).hexdigest()
    if facts.st_size > REMEMBERED and place.is_file():
        return place.read_text()
    with file.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if facts.st_size > REMEMBERED:
        with contextlib.suppress(OSError):
            memory.mkdir(parents=True, exist_ok=True)
            place.write_text(found)
    return found
