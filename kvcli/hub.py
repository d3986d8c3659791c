"""Whether the hub can be reached, asked once and without retries: its own clients try again for minutes."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Literal

SECONDS = 12.0
"""How long an unreachable hub is waited for; with the imports it stays under 20 s."""

os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "10")
os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "5")


def unreachable(kind: Literal["model", "dataset"], name: str, revision: str | None) -> str:
    """Why the hub cannot be reached, empty when it answers (even with a refusal)."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"

    def ask() -> str:
        api = HfApi()
        info = api.dataset_info if kind == "dataset" else api.model_info
        try:
            info(name, revision=revision, timeout=SECONDS * 0.8)
        except HfHubHTTPError as e:
            status = e.response.status_code if e.response is not None else 0
            return f"it answers with status {status}" if status >= 500 or status == 407 else ""
        except Exception as e:
            return str(e).split("\n")[0] or type(e).__name__
        return ""

    return _within(SECONDS, ask, f"no answer within {SECONDS:.0f} s")


def _within(seconds: float, ask: Callable[[], str], late: str) -> str:
    answers: list[str] = []
    thread = threading.Thread(target=lambda: answers.append(ask()), daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else late


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """The hub client and `datasets` (where it is in use) look at the local cache only."""
    import huggingface_hub.constants as hub

    places = [hub] + ([sys.modules["datasets"].config] if "datasets" in sys.modules else [])
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places:
        place.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value
