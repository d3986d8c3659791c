"""Presets: YAML files of settings that come with kvcli, for `--preset NAME`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcli.cli import output
from kvcli.config import read_yaml
from kvcli.errors import KvcliError, unknown

if TYPE_CHECKING:
    from rich.table import Table

FOLDER = Path(__file__).parents[1] / "presets"
NOTE = "note"
"""The one key that is no setting: what is said when a sweep with the preset begins."""


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read(name: str) -> tuple[dict[str, Any], str]:
    """The settings of a preset and its note. Raises KvcliError for a name nobody knows."""
    plain = name.replace("-", "_")
    if plain not in names():
        raise unknown("preset", name, names(), given=f"--preset {name}", listing="kvcli list presets")
    values = read_yaml(path(plain))
    note = values.pop(NOTE, "")
    if not isinstance(note, str):
        raise KvcliError(f"'{NOTE}' must be a text", given=str(path(plain)), fix=f"{NOTE}: one or two sentences")
    return values, " ".join(note.split())


def path(name: str) -> Path:
    return FOLDER / f"{name}.yaml"


def title(name: str) -> str:
    """The first sentence of the comment that a preset begins with."""
    first = path(name).read_text(encoding="utf-8").split("\n", 1)[0]
    return first.lstrip("# ").split(";")[0].rstrip(".")


def rows() -> list[dict[str, Any]]:
    """All presets: what they are and their grids in a few words."""
    return [_row(name) for name in names()]


def whole(name: str) -> dict[str, Any]:
    """One preset with its text and the paper's numbers that it repeats. Raises KvcliError for an unknown name."""
    from dataclasses import asdict

    from kvcli.analysis.tables import published

    read(name)
    plain = name.replace("-", "_")
    tables = published.tables_of(plain)
    scores = [row for row in published.scores() if set(row.tables) & set(tables)]
    letters = sorted({letter for row in scores for letter in row.notes})
    return {
        **_row(plain), "text": path(plain).read_text(encoding="utf-8"), "tables": list(tables),
        "published": [asdict(row) for row in scores], "remarks": {k: published.notes()[k] for k in letters},
    }  # fmt: skip


def _row(name: str) -> dict[str, Any]:
    settings, note = read(name)
    return {"name": name, "about": title(name), "settings": settings, "note": note, "source": str(path(name))}


def print_rows(found: list[dict[str, Any]]) -> None:
    listed = [(row["name"], row["settings"].get("model", "testbed"), row["about"]) for row in found]
    output.result(output.table(("preset", "model", "what it measures"), listed))
    output.note("options beside a preset win over it: --preset NAME --limit 50 --model qwen2.5-7b-instruct")
    output.note("one preset, and the paper's numbers that it repeats: kvcli list presets NAME")
    output.next_command("kvcli sweep --preset demo --dry-run")


def print_one(row: dict[str, Any]) -> None:
    """The file, then the printed numbers: methods beside each other, a line per kept ratio."""
    output.result(f"{row['name']}\n\n{row['text'].strip()}")
    blocks: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for score in row["published"]:
        blocks.setdefault((score["model"], score["task"], score["shots"]), []).append(score)
    for (model, task, shots), scores in blocks.items():
        title = f"printed for {model}, {task}, {shots} shots ({_remarks(scores)})"
        output.result(_table(scores, title.replace(" ()", "")))
    for letter, text in row["remarks"].items():
        output.result(f"({letter}) {text}")
    output.next_command(f"kvcli sweep --preset {row['name']} --limit 20 --dry-run")


def _remarks(scores: list[dict[str, Any]]) -> str:
    letters = sorted({letter for score in scores for letter in score["notes"]})
    return f"remarks {', '.join(letters)}" if letters else ""


def _table(scores: list[dict[str, Any]], title: str) -> Table:
    """Kept ratios and methods; the shorter of the two are the columns."""
    methods = list(dict.fromkeys(_column(s) for s in scores if s["method"] != "full"))
    ratios = [f"{r:g}" for r in sorted({s["ratio"] for s in scores if s["method"] != "full"}, reverse=True)]
    cells = {(_column(s), f"{s['ratio']:g}"): s["printed"] for s in scores}
    full = " / ".join(dict.fromkeys(s["printed"] for s in scores if s["method"] == "full"))
    title = f"{title}; full cache {full}"
    if len(ratios) <= len(methods):
        lines = [(method, *(cells.get((method, ratio)) for ratio in ratios)) for method in methods]
        return output.table(("kept", *ratios), lines, title=title)
    lines = [(ratio, *(cells.get((method, ratio)) for method in methods)) for ratio in ratios]
    return output.table(("kept", *methods), lines, title=title)


def _column(score: dict[str, Any]) -> str:
    return score["method"] + (f" {score['variant']}" if score["variant"] else "")
