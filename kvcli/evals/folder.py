"""Where task definitions are: the checkout's `tasks/`, or the wheel's copy of it."""

from __future__ import annotations

from pathlib import Path

import kvcli


def definitions_folder() -> Path:
    """`tasks/` beside the package in a checkout, else the copy in the wheel.

    An editable install may hold a stale copy, so the checkout comes first; a `tasks` folder that another package put
    beside an installed kvcli is not one.
    """
    package = Path(kvcli.__file__).resolve().parent
    checkout = package.parent / "tasks"
    installed = package.parent.name in ("site-packages", "dist-packages")
    return checkout if not installed and any(checkout.glob("*.yaml")) else package / "_tasks"
