"""Writes the generated parts of the pages here: from `<!-- generated: NAME ... -->` to `<!-- end: NAME -->`.

    python docs/build.py             writes them
    python docs/build.py --check     changes nothing; exit code 1 where a page is not up to date

The reference of commands comes from what `--help` prints from, not from its text, so it does not depend on the width of
a terminal or on the version of a library.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import typer
from typer.main import get_command

from kvcli.cli.app import COMMANDS
from kvcli.cli.method_lists import scope
from kvcli.config import GRID, SweepConfig
from kvcli.engine import bench_run
from kvcli.engine.session import full_identity
from kvcli.methods import catalog
from kvcli.results.schema import FIELDS

DOCS = Path(__file__).resolve().parent
PART = re.compile(r"(<!-- generated: (?P<name>[a-z-]+) [^\n]*-->\n).*?(<!-- end: (?P=name) -->\n)", re.S)
PLURAL = {name: f"{name}s" for name in ("method", "ratio", "budget", "task", "seed", "decode_ratio", "decode_budget")}
"""Options whose key in a config file has another name."""
ANSWERS = {"unified": "one pool with the prompt", "separate": "apart from the prompt", "own": "its own rule", None: "-"}
SHARING = {1: "the shared prefill", 2: "the shared prefill and an extra pass", 3: "a prefill of its own"}
SCOPES = {"head": "KV head", "layer": "layer", "model": "model"}


def commands() -> dict[str, Any]:
    """Every command with its parameters; those of a group by both words."""
    found = {}
    for name, (place, _) in COMMANDS.items():
        module = import_module(place)
        app = getattr(module, "app", None)
        if app is None:
            app = typer.Typer(add_completion=False)
            app.command(name)(module.command)
        command = get_command(app)
        members = getattr(command, "commands", None)
        found.update({f"{name} {word}": c for word, c in members.items()} if members else {name: command})
    return found


def reference() -> str:
    """All commands: what they do, examples, options."""
    return "\n".join(_command(name, command) for name, command in commands().items())


def _command(name: str, command: Any) -> str:
    text, _, examples = (command.help or "").replace("\b", "").partition("Examples:")
    arguments = [p for p in command.params if _is_argument(p)]
    options = [p for p in command.params if not _is_argument(p)]
    usage = " ".join(["kvcli", name, *(_argument(p) for p in arguments), "[OPTIONS]"])
    lines = [f"### kvcli {name}\n", *(f"{_one_line(part)}\n" for part in text.strip().split("\n\n"))]
    shown = [usage, "", *(line.strip() for line in examples.strip().splitlines())]
    lines += ["```", *shown, "```\n"]
    lines += [f"- `{_argument(p)}`: {_one_line(p.help)}" for p in arguments] + [""] * bool(arguments)
    panels: dict[str, list[Any]] = {}
    for option in options:
        panels.setdefault(option.rich_help_panel or "Options", []).append(option)
    for panel, members in panels.items():
        lines += [f"| {panel} | meaning |", "| --- | --- |"]
        lines += [f"| {_names(p)} | {_cell(_one_line(p.help))}{_default(p)} |" for p in members] + [""]
    return "\n".join(lines)


def _is_argument(param: Any) -> bool:
    return not param.opts[0].startswith("-")


def _argument(param: Any) -> str:
    name = param.metavar or param.name.upper()
    return name if param.required else f"[{name}]"


def _names(option: Any) -> str:
    long = next(name for name in option.opts if name.startswith("--"))
    value = "" if option.is_flag else " " + _cell(option.metavar or long.removeprefix("--").replace("-", "_").upper())
    names = [f"`{long}{value}`", *(f"`{name}`" for name in option.opts if name != long)]
    return ", ".join([*names, *(f"`{name}`" for name in option.secondary_opts)])


def _default(option: Any) -> str:
    if option.required:
        return " [required]"
    if isinstance(option.show_default, str):
        return f" [default: {option.show_default}]"
    if not option.show_default or option.default in (None, False, ""):
        return ""
    if option.is_flag:
        return f" [default: {option.opts[0].removeprefix('--')}]"
    return f" [default: {option.default}]"


def settings() -> str:
    """Keys of a config file: the option, the default, and what a folder with results takes."""
    options = {PLURAL.get(p.name, p.name): p for p in commands()["sweep"].params}
    request = SimpleNamespace(config=SweepConfig())
    fixed = {"model", "dtype", *full_identity(SimpleNamespace(request=request, identity={}))}  # type: ignore[arg-type]
    lines = ["| key | option | default | in a folder with results |", "| --- | --- | --- | --- |"]
    for field in dataclasses.fields(SweepConfig):
        option = f"`{options[field.name].opts[0]}`" if field.name in options else "-"
        rule = "may grow" if field.name in GRID else "must be the same" if field.name in fixed else "may differ"
        lines.append(f"| `{field.name}` | {option} | {_value(field.default)} | {rule} |")
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        value = ",".join(map(str, value)) or None
    if isinstance(value, bool):
        value = str(value).lower()
    return "-" if value is None else f"`{value}`"


def fields(meanings: dict[str, str]) -> str:
    """A record's fields."""
    rows = [f"| `{name}` | {_cell(meaning)} |" for name, meaning in meanings.items()]
    return "\n".join(["| field | meaning |", "| --- | --- |", *rows]) + "\n"


def methods() -> str:
    """All methods shipped: where they act, what the budget binds, what they read."""
    lines = ["| method | tier | answers (`--decode-ratio`) | budget per | reads | source |", "| --- " * 6 + "|"]
    for card in catalog.cards():
        cells = [f"`{card['name']}`", str(card["tier"]), ANSWERS[card["decoding"]], scope(card, SCOPES)]
        lines.append(f"| {' | '.join([*cells, SHARING[card['sharing']], card['paper'] or '-'])} |")
    return "\n".join(lines) + "\n"


def _one_line(text: str | None) -> str:
    """One line without the backslashes that keep rich from reading `[...]` as markup."""
    return " ".join((text or "").replace("\\[", "[").split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


PARTS: dict[str, Callable[[], str]] = {
    "commands": reference,
    "methods": methods,
    "settings": settings,
    "record-fields": lambda: fields(FIELDS),
    "bench-fields": lambda: fields(bench_run.FIELDS),
}


def built(page: str) -> str:
    """A page's text with its generated parts made anew. Raises KeyError for a part that nothing makes."""
    return PART.sub(lambda m: f"{m[1]}\n{PARTS[m['name']]()}\n{m[3]}", page)


def stale() -> Iterator[tuple[Path, str]]:
    """Pages that are not up to date, with the text they should have."""
    for page in sorted(DOCS.glob("*.md")):
        old = page.read_text(encoding="utf-8")
        new = built(old)
        if new != old:
            yield page, new


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--check"]):
        sys.stderr.write(f"{__doc__}")
        return 2
    found = list(stale())
    for page, text in found:
        if not arguments:
            page.write_text(text, encoding="utf-8")
        sys.stdout.write(f"{page.name}: {'not up to date: python docs/build.py' if arguments else 'written'}\n")
    return int(bool(found and arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
