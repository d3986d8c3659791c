"""The generated parts of docs/*.md are what docs/build.py makes of the code today."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable

import pytest

from kvcli.errors import Exit
from kvcli.results.schema import FIELDS
from tests.conftest import Done
from tests.docs.pages import PAGES, codes, commands, rows, script, section, text

build = script("build")


def test_pages_are_up_to_date() -> None:
    assert [page.name for page, _ in build.stale()] == [], "python docs/build.py"


def test_the_check_changes_nothing_and_says_so(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(build, "DOCS", tmp_path)
    page = tmp_path / "page.md"
    old = "before\n<!-- generated: record-fields (python docs/build.py) -->\nold\n<!-- end: record-fields -->\nafter\n"
    page.write_text(old)
    assert build.main(["--check"]) == 1
    assert page.read_text() == old
    assert build.main([]) == 0
    new = page.read_text()
    assert new.startswith("before\n<!-- generated") and new.endswith("<!-- end: record-fields -->\nafter\n")
    assert "old" not in new and "| `schema` |" in new
    assert build.main(["--check"]) == 0
    assert capsys.readouterr().out == "page.md: not up to date: python docs/build.py\npage.md: written\n"
    assert build.main(["--chek"]) == 2
    page.write_text("<!-- generated: nonsense -->\n<!-- end: nonsense -->\n")
    with pytest.raises(KeyError):
        build.main([])


def test_the_width_of_the_terminal_does_not_matter(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    narrow = build.reference()
    monkeypatch.setenv("COLUMNS", "200")
    assert build.reference() == narrow


def test_every_command_and_option_of_the_help_is_in_the_reference(monkeypatch, kvcli: Callable[..., Done]) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    page = text("docs/cli.md")
    for name in build.commands():
        help_text = re.sub(r"\x1b\[[0-9;]*m", "", kvcli(*name.split(), "--help").out)
        there = section(page, f"kvcli {name}")
        words, _, panels = help_text.partition("╭")
        options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", panels)) - {"--help"}
        assert options, name
        assert {option for option in options if f"`{option}" not in there} == set(), name
        examples = " ".join(words.partition("Examples:")[2].split())
        assert examples and examples in " ".join(there.split())


def test_fields_of_the_record() -> None:
    table = rows(section(text("docs/results.md"), "samples.jsonl"))
    assert [codes(row[0])[0] for row in table[1:]] == list(FIELDS)


def test_exit_codes() -> None:
    table = rows(section(text("docs/cli.md"), "Exit codes"))
    assert [int(row[0]) for row in table[1:]] == [int(code) for code in Exit]


def test_commands_on_the_pages_have_the_options_they_are_shown_with() -> None:
    known = build.commands()
    seen = 0
    for page in PAGES:
        for line in commands(page.read_text(encoding="utf-8")):
            words = shlex.split(line)[1:]
            name = next((n for n in known if words[: len(n.split())] == n.split()), None)
            assert name, f"{page.name}: {line}"
            options = {o for p in known[name].params for o in (*p.opts, *p.secondary_opts)}
            used = {word.partition("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)}
            assert used <= options, f"{page.name}: {line}: {used - options}"
            seen += 1
    assert seen > 40
