"""What surrounds `kvcli attn-map`: texts and folders as typed, and the sweep that goes on from it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kvcli.cli import output
from kvcli.errors import KvcliError

if TYPE_CHECKING:
    from kvcli.analysis.attention.data import Atlas
    from kvcli.config import SweepConfig
    from kvcli.engine.map_request import Asked


def given_texts(
    texts: list[str], files: list[Path], task: list[str] | None, sample: list[str] | None
) -> tuple[tuple[str, str], ...]:
    """(name, text) of the prompts given as they are. Raises KvcliError for a file that cannot be read."""
    if (texts or files) and (task or sample):
        other = "--task" if task else "--sample"
        given = f"{'--text' if texts else '--file'} and {other}"
        raise KvcliError("a prompt is a task's sample or a text, not both", given=given, fix="leave one of them out")
    found = [(f"text {i}" if len(texts) > 1 else "text", text) for i, text in enumerate(texts, 1)]
    for path in files:
        try:
            found.append((path.name, path.expanduser().read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError) as e:
            why = e.strerror if isinstance(e, OSError) else "not UTF-8 text"
            raise KvcliError(f"cannot read {path}: {why}", given=f"--file {path}", fix="check the path") from e
    for name, text in found:
        if not text.strip():
            raise KvcliError(f"{name} is empty", given=name, fix='--text "some words"')
    return tuple(found)


def check_out(folder: Path) -> None:
    """Before anything is computed; the folder is made when there is something to write. Raises KvcliError."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        what = f"{folder} is a file" if there == folder else f"cannot write {folder}: {there} is a file"
        raise KvcliError(what, given=f"--out {folder}", fix="--out with a folder")
    if not os.access(there, os.W_OK):
        raise KvcliError(f"cannot write {folder}: no permission", given=f"--out {folder}", fix="another --out")


def say_next(found: Atlas, request: Asked) -> None:
    """A sweep of the same methods and tasks says what the loss of attention costs."""
    import shlex

    config = request.config
    if request.texts:
        return
    tasks = ",".join(dict.fromkeys(g["task"] for g in found.groups))
    methods = ",".join(dict.fromkeys(e["method"] for p in found.prompts for e in p["kept"])) or "tier1"
    words = ["kvcli", "sweep", "--model", config.model, "--task", tasks, "--method", methods]
    for option, value in _settings(config):
        words += [option, value]
    words += ["--strict-window"] * config.strict_window
    output.next_command(shlex.join(words))


def _settings(config: SweepConfig) -> Iterator[tuple[str, str]]:
    """The options that decide prompts and cells, where they are not those of a sweep without them."""
    usual = type(config)()
    for name in ("ratios", "budgets", "query", "seeds", "shots", "shot_seeds", "shot_orders"):
        values = getattr(config, name, ())
        if values and values != getattr(usual, name, None):
            option = {"ratios": "ratio", "budgets": "budget", "seeds": "seed", "shot_seeds": "shot-seed",
                      "shot_orders": "shot-order"}.get(name, name)  # fmt: skip
            yield f"--{option}", ",".join(map(str, values))
    for name in ("tokenizer", "template", "system", "max_prompt_tokens", "truncate", "data_dir"):
        value = getattr(config, name, None)
        if value is not None and value != getattr(usual, name, None):
            yield f"--{name.replace('_', '-')}", str(value)
