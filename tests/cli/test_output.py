"""What is printed, and where: stdout is the result, stderr the rest; bars on terminals, plain lines elsewhere."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys

import pytest

from kvcli.cli import output

BAR = """
import sys, time
from kvcli.cli import output
with output.progress("sweep [x]") as bar:
    for i in range(4):
        bar.update(i + 1, 4, task="tb_[recall]")
        output.note("said [b] once") if i == 1 else None
        time.sleep(0.3)
output.result("the result")
"""


def on_a_terminal(code: str, **env: str) -> tuple[str, str]:
    """(stdout, what a terminal at stderr received)."""
    main, other = pty.openpty()
    env = {**os.environ, "TERM": "xterm", **env}
    done = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=other, text=True, env=env)
    os.close(other)
    seen = b""
    while True:
        try:
            part = os.read(main, 4096)
        except OSError:
            break
        if not part:
            break
        seen += part
    os.close(main)
    return done.communicate()[0], seen.decode()


def test_a_bar_on_a_terminal():
    out, seen = on_a_terminal(BAR)
    assert out == "the result\n"
    assert "sweep [x]" in seen
    assert "4/4" in seen
    assert "tb_[recall]" in seen
    assert "said [b] once" in seen
    assert "\x1b[" in seen


def test_no_colours_where_they_are_not_wanted():
    _, seen = on_a_terminal(BAR, NO_COLOR="1")
    assert "\x1b[3" not in seen, "no colours (the cursor still moves)"
    _, seen = on_a_terminal("from kvcli.cli import output; output.warn('careful')", NO_COLOR="1")
    assert seen == "warning: careful\r\n"


def test_plain_lines_off_a_terminal(capfd, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: now[0])
    with output.progress("sweep") as bar:
        for i in range(100):
            bar.update(i + 1, 100, task="tb_recall", method="h2o")
            now[0] += 0.3
    out, err = capfd.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert lines[0] == "sweep: 1/100 (1 %)  tb_recall h2o"
    assert lines[1].endswith("tb_recall h2o  20 s left")
    assert lines[-1].startswith("sweep: 100/100 (100 %)")
    assert 3 <= len(lines) <= 5


def test_time_left_ignores_what_was_there_before(monkeypatch):
    now, shown = [0.0], []
    monkeypatch.setattr(output.time, "monotonic", lambda: now[0])
    bar = output.Progress(lambda done, total, fields, left: shown.append(left))
    for done in (0, 500, 900):
        bar.update(done, 1000)
        now[0] += 0.01
    now[0] = 10.02
    bar.update(910, 1000)
    assert shown[-1] == "1m30s left"


def test_no_time_left_is_said_before_something_is_known(monkeypatch):
    """The first of 160 comes after 11 seconds with its whole batch behind it: 29 minutes would be said."""
    now, shown = [0.0], []
    monkeypatch.setattr(output.time, "monotonic", lambda: now[0])
    bar = output.Progress(lambda done, total, fields, left: shown.append(left))
    for done, at in ((0, 0.0), (1, 11.0), (7, 11.5), (8, 12.0), (160, 60.0)):
        now[0] = at
        bar.update(done, 160)
    assert shown == ["", "", "", "3m48s left", ""]


@pytest.mark.parametrize(("total", "enough"), [(3, 2), (160, 8), (1_000_000, 20)])
def test_so_much_is_needed_to_say_the_time_left(monkeypatch, total, enough):
    now, shown = [0.0], []
    monkeypatch.setattr(output.time, "monotonic", lambda: now[0])
    bar = output.Progress(lambda done, total, fields, left: shown.append(left))
    for done in range(enough + 1):
        bar.update(done, total)
        now[0] += 1
    assert not any(shown[:-1]) and shown[-1].endswith(" left")


def test_a_verdict_is_as_wide_as_tables_are_off_a_terminal(capfd):
    from kvcli.analysis.marked import Bullets, Paragraph, Section
    from kvcli.cli.tables import VerdictView

    long = "recall: " + "loses much " * 30
    output.result(VerdictView(Section("verdict", "Verdict", (Bullets.of([long]), Paragraph(long)))))
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) > 4 and max(map(len, lines)) <= 120


def test_scripts_of_several_commands_can_do_without_the_next_one(capfd, monkeypatch):
    monkeypatch.setenv("KVCLI_NO_NEXT", "1")
    output.next_command("kvcli report runs/x")
    output.note("said")
    assert capfd.readouterr() == ("", "said\n")


def test_json_is_one_strict_document(capfd):
    output.json_result({"a": float("nan"), "b": [float("inf"), 1.5], "c": {"é"}, "d": (1, 2)})
    text = capfd.readouterr().out
    assert json.loads(text) == {"a": None, "b": [None, 1.5], "c": ["é"], "d": [1, 2]}


def test_tables_are_as_wide_as_they_need_to_be_off_a_terminal(capfd):
    output.result(output.table(("name", "n"), [("x" * 150 + " [bold]", 1), (None, 20)]))
    lines = capfd.readouterr().out.splitlines()
    assert any("x" * 150 + " [bold]" in line for line in lines)
    assert any(line.split() == ["-", "20"] for line in lines)


def test_messages_go_to_stderr(capfd):
    output.note("a [b]")
    output.next_command("kvcli report runs/x")
    assert capfd.readouterr() == ("", "a [b]\nnext: kvcli report runs/x\n")


def test_counts():
    assert [output.count(n, "cell") for n in (0, 1, 7104)] == ["0 cells", "1 cell", "7,104 cells"]


@pytest.mark.parametrize(
    "seconds, text", [(0.4, "0 s"), (59.4, "59 s"), (185, "3m05s"), (7800, "2h10m"), (59.6, "1m00s")]
)
def test_durations(seconds, text):
    assert output.duration(seconds) == text
