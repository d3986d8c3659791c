"""docs/tasks.md is what docs/task_page.py makes of the definitions today, and has every task."""

from __future__ import annotations

import pytest

from kvcli.evals import loader
from tests.docs.pages import codes, rows, script, section, text

page = script("task_page")


def test_the_page_is_up_to_date() -> None:
    assert page.PAGE.read_text(encoding="utf-8") == page.page(), "python docs/task_page.py"


def test_every_task_stands_on_it_once() -> None:
    part = text("docs/tasks.md").partition("## All tasks\n")[2].partition("## Settings\n")[0]
    names = [codes(row[0])[0] for row in rows(part) if row[0] != "task"]
    assert sorted(names) == loader.own_names()


def test_every_suite_stands_on_it() -> None:
    listed = {codes(row[0])[0]: int(row[1]) for row in rows(section(text("docs/tasks.md"), "Suites"))[1:]}
    assert listed == {name: len(members) for name, members in loader.suites().items()}


@pytest.mark.parametrize("name", loader.own_names())
def test_a_definition_says_in_a_sentence_what_the_task_is(name: str) -> None:
    said = page.sentence(loader.load_task(name))
    assert 10 < len(said) < 160 and not said.endswith(","), said


def test_the_check_changes_nothing_and_says_so(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(page, "PAGE", tmp_path / "tasks.md")
    assert page.main(["--check"]) == 1 and not (tmp_path / "tasks.md").exists()
    assert page.main([]) == 0 and page.main(["--check"]) == 0 and page.main(["--chek"]) == 2
    assert capsys.readouterr().out == "tasks.md: not up to date: python docs/task_page.py\ntasks.md: written\n"
