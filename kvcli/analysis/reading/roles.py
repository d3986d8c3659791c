"""Which of kvcli's methods and tasks a word stands for: `token`, `chunk`, `shot`, `control`, `long_generation`."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

_FILE = Path(__file__).parents[2] / "presets" / "roles.json"


@cache
def names_of(role: str) -> tuple[str, ...]:
    """Names of methods; of tasks, forms such as `lg_*`."""
    return tuple(json.loads(_FILE.read_text(encoding="utf-8"))[role])
