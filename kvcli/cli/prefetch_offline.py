"""What a dry run of `kvcli prefetch` can say of a model while the hub cannot be reached: what lies in the cache."""

from __future__ import annotations

from pathlib import Path

AWAY = "the hub cannot be reached"
"""What messages about a hub that gives no answer say."""
LANDMARKS = ("config.json", "tokenizer_config.json", "tokenizer.json")
"""Files of which a model or a tokenizer has at least one."""


def reason(message: str) -> str:
    """Why the hub cannot be reached: what stands behind the name in such a message."""
    return message.partition(AWAY)[2].partition(": ")[2]


def cached(name: str, revision: str | None) -> tuple[str | None, dict[str, int]]:
    """The commit of a model that the local cache holds, and its files there with their sizes; None without one."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = [try_to_load_from_cache(name, file, revision=revision) for file in LANDMARKS]
    except ValueError:  # a name that no model can have
        return None, {}
    folder = next((Path(file).parent for file in found if isinstance(file, str)), None)
    if folder is None:
        return None, {}
    return folder.name, {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}


def unknown(names: list[str], why: str) -> str:
    """The one line that says what a dry run does not know."""
    rest = "files and sizes" if len(names) == 1 else "files and sizes of each"
    return f"{AWAY} ({why}): the {rest} cannot be known, only what the cache holds of {', '.join(names)}"
