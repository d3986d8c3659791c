"""--help: switches without a type, defaults in plain words, examples that can be copied at any width."""

from __future__ import annotations

import re
from typing import Any

import pytest

from kvcli.cli import app

EVERY = (*app.COMMANDS, "testbed train", "testbed accuracy")


def helps(kvcli: Any, name: str) -> str:
    done = kvcli(*name.split(), "--help")
    assert done.code == 0
    return str(done.out)


@pytest.mark.parametrize("name", EVERY)
def test_switches_and_defaults_are_in_plain_words(kvcli, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "160")
    text = helps(kvcli, name)
    assert "--help" in text and "bool" not in text and "[default: (" not in text


def test_a_default_in_words_is_still_said(kvcli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert "[default: RUN/report.md; of several runs RUN/report-vs-OTHER.md]" in " ".join(
        helps(kvcli, "report").split()
    )
    assert "[default: 4]" in helps(kvcli, "attn-map")


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("name", EVERY)
def test_examples_break_before_an_option_and_can_be_copied(kvcli, monkeypatch, name, width):
    monkeypatch.setenv("COLUMNS", "400")
    whole = examples(helps(kvcli, name))
    monkeypatch.setenv("COLUMNS", str(width))
    text = helps(kvcli, name)
    assert examples(text) == whole
    assert max(map(len, text.splitlines())) <= width


def examples(text: str) -> list[str]:
    """The commands of a help as a shell reads them: a backslash at a line's end joins it with the next."""
    after = text.partition("Examples:")[2].partition("\n\u256d")[0]
    joined = re.sub(r"\s*\\\s*\n\s*", " ", after)
    return [line.strip() for line in joined.splitlines() if line.strip()]


def test_a_quoted_text_is_not_broken():
    line = '  kvcli attn-map --text "the cat sat on the mat" --layer mean'
    assert list(app._broken(line, 40)) == [
        "  kvcli attn-map \\",
        '      --text "the cat sat on the mat" \\',
        "      --layer mean",
    ]


def test_the_newest_folder_is_offered_where_none_is_named(kvcli, tmp_path, monkeypatch):
    import os

    monkeypatch.chdir(tmp_path)
    assert "try:   kvcli report --help" in kvcli("report").err
    for age, name in ((5, "older"), (1, "newer"), (9, "oldest")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.json").write_text("{}")
        os.utime(tmp_path / "runs" / name / "run.json", (1e9 - age, 1e9 - age))
    for command in ("report", "show", "status"):
        done = kvcli(command)
        assert done.code == 2 and f"try:   kvcli {command} runs/newer     (the newest" in done.err
