"""The commands of docs/findings.md: what they give is enough to test the findings on the testbeds."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from kvcli.analysis import findings
from kvcli.analysis.findings import Data, Outcome
from kvcli.analysis.marked import plain
from kvcli.analysis.reading.load import load_run
from kvcli.analysis.tables.build import summarise
from kvcli.analysis.tables.scores import SampleScores
from tests.conftest import Done

PAGE = Path(__file__).parents[2] / "docs" / "findings.md"
COMMANDS = re.findall(r"^kvcli (sweep .*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def with_option(command: str, name: str, value: str) -> list[str]:
    words = shlex.split(command)
    words[words.index(name) + 1] = value
    return words


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_the_documented_command_can_be_run(command: str, tmp_path: Path, kvcli: Callable[..., Done]) -> None:
    done = kvcli(*with_option(command, "--out", str(tmp_path / "run")), "--dry-run")
    assert done.code == 0, done.err


def test_the_first_command_has_what_five_findings_need() -> None:
    words = shlex.split(COMMANDS[0])
    tasks, shots, methods, ratios = (words[words.index(name) + 1].split(",") for name in
                                     ("--task", "--shots", "--method", "--ratio"))  # fmt: skip
    assert len(tasks) > findings.FEWEST_TASKS
    assert {"0", "1", str(findings.MANY_SHOTS)} == set(shots)
    assert {"chunkkv", "shotkv", "h2o", "snapkv"} == set(methods)
    assert len(ratios) > 1


@pytest.mark.slow
def test_the_testbed_decides_findings_one_and_six(tmp_path: Path, kvcli: Callable[..., Done]) -> None:
    """What docs/findings.md reports of the smaller model, with three of its tasks and the shots that 6 is tested at."""
    command = next(text for text in COMMANDS if "--task testbed " in text)
    for name, value in (("--task", "tb_longgen,tb_recall,tb_knowledge"), ("--shots", "12"),
                        ("--out", str(tmp_path / "run"))):  # fmt: skip
        command = shlex.join(with_option(command, name, value))
    done = kvcli(*shlex.split(command))
    assert done.code == 0, done.err
    run = load_run(tmp_path / "run")
    found = {one.number: one for one in findings.findings([Data(run, summarise(run), SampleScores(run))])}
    assert found[1].outcome is Outcome.HOLDS
    assert found[6].outcome is Outcome.NOT
    assert "keep tokens: holds" in plain(found[6].said)
    assert "Whole shots against tokens: does not hold" in plain(found[6].said)
