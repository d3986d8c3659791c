"""Where files about a model lie, by its weights: in its own folder or in the user's cache. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from kvcli.models.source import ModelSource, fingerprint


def own(source: ModelSource, name: str) -> Path | None:
    """The file `name` in the model's own folder; None for a model without one."""
    return Path(source.place) / name if source.kind in ("testbed", "folder") else None


def cached(source: ModelSource, ending: str) -> Path:
    """A file or folder in the user's cache, by the model's fingerprint."""
    facts = fingerprint(source)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "kvcli" / "head-profiles" / f"{source.short}-{digest}{ending}"


def revision(facts: dict[str, Any]) -> Any:
    """What tells weights apart: of folders the hash alone, so that a folder may be moved or renamed."""
    return facts if "/" in str(facts.get("model", "")) else facts.get("revision")


def otherwise(source: ModelSource, model: dict[str, Any], made: dict[str, Any], how: dict[str, Any]) -> list[str]:
    """In words, how a file of `model`, made with the settings `made`, differs from one of this model made with `how`;
    settings that the file does not name are not compared."""
    weights = ["other weights"] * (revision(model) != revision(fingerprint(source)))
    return weights + [f"{k} {made[k]}, now {v}" for k, v in how.items() if k in made and made[k] != v]


def write(path: Path, content: bytes) -> None:
    """All of it or nothing."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_bytes(content)
    temporary.replace(path)
