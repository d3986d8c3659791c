"""Reads the pages: code blocks, tables, links."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(page: str, language: str = "") -> list[str]:
    """Code blocks of a language ('': those without one)."""
    found = re.findall(r"^```([a-z]*)\n(.*?)^```$", page, re.S | re.M)
    return [code for name, code in found if name == language]


def section(page: str, title: str) -> str:
    """From a heading to the next one of its level or above."""
    match = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^#{{1,6}} |\Z)", page, re.S | re.M)
    assert match, f"no heading '{title}'"
    return match[2]


def rows(part: str) -> list[list[str]]:
    """Cells of every table row below a head."""
    lines = [line for line in part.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [row for row in cells if not all(set(cell) <= {"-", ":"} for cell in row)]


def codes(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def commands(page: str) -> Iterator[str]:
    """Every line of a code block that types kvcli; comments cut off."""
    for block in blocks(page):
        for line in block.splitlines():
            if line.startswith("kvcli ") and not line.startswith("kvcli COMMAND"):
                yield line.partition("  #")[0].strip()


def anchors(page: str) -> set[str]:
    """The names that headings get as link targets."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", page, flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def script(name: str) -> ModuleType:
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
