"""Verdicts, limits, and what is left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from kvcli.sandbox import means as means_module
from kvcli.sandbox import process
from kvcli.sandbox.judging import judge
from kvcli.sandbox.limits import MIB, Limits, Program
from kvcli.sandbox.means import Means
from kvcli.sandbox.process import StartError

pytestmark = pytest.mark.sandbox

TEST = "def check(candidate):\n    assert candidate(2) == 4, 'two'\n    assert candidate([1]) == [1, 1]\n"
DOUBLE = "def f(x):\n    return x * 2\n"
SMALL = Limits(cpu_seconds=1, wall_seconds=3.0, output_bytes=MIB)


def of(source: str, way: Means, test: str = TEST, setup: str = "", limits: Limits = SMALL):
    return judge(Program(source, "f", test, setup), limits, way)


def test_a_right_program_passes(way: Means) -> None:
    verdict = of(DOUBLE, way)
    assert verdict.passed and verdict.reason == "passed" and 0 < verdict.seconds < 60


@pytest.mark.parametrize(
    ("source", "reason", "why"),
    [
        ("def f(x):\n    return x + 2\n", "raised", "TypeError: can only concatenate list"),
        ("def f(x):\n    return x\n", "wrong", "AssertionError: two"),
        ("def f(x):\n    pass\n", "wrong", "AssertionError: two"),
        ("def f(x):\n    raise KeyError('k')\n", "raised", "KeyError"),
        ("def f(x):\n    return object()\n", "raised", "TypeError|NotPlain"),
        ("def g(x):\n    return x * 2\n", "raised", "NameError: the program defines no f"),
        ("def f(x) return x", "raised", "SyntaxError"),
        ("  return 1", "raised", "IndentationError"),
        ("f = 7", "raised", "TypeError: 'int' object is not callable"),
        ("import os\nos._exit(0)", "died", "ended with 0"),
        ("def f(x):\n    while True: pass\n", "timeout", "1 s of CPU time"),
        ("import time\ntime.sleep(99)", "timeout", "no end after 3 s"),
        ("while True: print('x' * 9999)", "output", "it printed more than 1048576 bytes"),
    ],
)
def test_reasons(source: str, reason: str, why: str, way: Means) -> None:
    verdict = of(source, way)
    assert verdict.reason == reason and not verdict.passed
    assert re.search(why, verdict.why), verdict.why


def test_a_test_may_expect_an_exception(way: Means) -> None:
    test = "def check(candidate):\n    try: candidate(0)\n    except ZeroDivisionError: return\n    assert False\n"
    assert of("def f(x):\n    return 1 / x\n", way, test).passed
    assert of("def f(x):\n    return 1\n", way, test).reason == "wrong"


def test_a_test_cannot_take_the_end_of_a_program_for_an_answer(way: Means) -> None:
    test = "def check(candidate):\n    try: candidate(0)\n    except BaseException: pass\n    candidate(1)\n"
    assert of("import os\ndef f(x):\n    os._exit(0)\n", way, test).reason == "died"


def test_setup_is_there_for_the_tests_and_cannot_be_changed_by_the_program(way: Means) -> None:
    setup, test = "def right(x):\n    return x * 2\n", "def check(candidate):\n    assert candidate(3) == right(3)\n"
    assert of("def right(x):\n    return 0\ndef f(x):\n    return right(x)\n", way, test, setup).reason == "wrong"
    assert of(DOUBLE, way, test, setup).passed


def test_tests_that_are_broken_say_nothing_about_the_program(way: Means) -> None:
    for test in ("def check(candidate:\n", "x = 1\n", "import no_such_module_at_all\n"):
        with pytest.raises(StartError, match=r"the tests cannot be run: (SyntaxError|KeyError|ModuleNotFoundError)"):
            of(DOUBLE, way, test)


def test_a_printing_program_and_printing_tests_still_pass(way: Means) -> None:
    noisy = "import sys\nprint('x' * 100_000)\ndef f(x):\n    print(x, file=sys.stderr)\n    return x * 2\n"
    assert of(noisy, way, "print('y')\n" + TEST).passed


def test_numpy_can_be_used(way: Means) -> None:
    source = "import numpy as np\ndef f(x):\n    return (np.array(x) * 2).tolist() if x == 2 else x + x\n"
    assert of(source, way, limits=Limits(wall_seconds=60.0)).passed


def test_other_packages_are_not_there(way: Means) -> None:
    verdict = of("import pytest\n" + DOUBLE, way)
    assert verdict.reason == "raised" and "ModuleNotFoundError" in verdict.why


def test_the_temporary_folder_can_be_written_and_is_gone_afterwards(way: Means, world) -> None:
    source = """
import os, tempfile
def f(x):
    with tempfile.NamedTemporaryFile("w", dir=".", delete=False) as t: t.write("text")
    os.makedirs("a/b", exist_ok=True)
    assert open(t.name).read() == "text"
    return x * 2
"""
    assert of(source, way).passed
    world.unharmed()


def test_an_object_keeps_its_state_between_calls(way: Means) -> None:
    source = "n = 0\ndef f(x):\n    global n\n    n += 1\n    return n\n"
    assert of(source, way, "def check(candidate):\n    assert [candidate(0) for _ in range(3)] == [1, 2, 3]\n").passed


def test_many_at_once(way: Means, world) -> None:
    sources = [DOUBLE if i % 2 else DOUBLE.replace("2", "3") for i in range(12)]
    with ThreadPoolExecutor(4) as pool:
        passed = list(pool.map(lambda source: of(source, way, limits=Limits()).passed, sources))
    assert passed == [bool(i % 2) for i in range(12)]
    world.unharmed()


def test_no_descriptors_and_no_zombies_are_left(way: Means) -> None:
    of(DOUBLE, way)
    before, born = len(list(Path("/proc/self/fd").iterdir())), _children()
    for source in (DOUBLE, "x", "import os\nos._exit(3)"):
        of(source, way)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert _children() <= born


def _children() -> set[str]:
    """Children of this process, zombies too; another test's may be among them."""
    found = set()
    for place in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended meanwhile
            if int(place.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.add(place.parent.name)
    return found


def test_a_process_that_cannot_be_started_is_no_verdict(way: Means, monkeypatch: pytest.MonkeyPatch, world) -> None:
    """Neither a missing program, nor an end before the start, nor a start that takes for ever."""
    python = means_module.interpreter()
    for command, why in (
        (["/nowhere/python"], "No such file"),
        ([python, "-c", "raise SystemExit('no memory left')"], "before it began: no memory left"),
        (["sleep", "60"], "not started after 1 s"),
    ):
        monkeypatch.setattr(Means, "command", lambda self, limits, command=command: command)
        with pytest.raises(StartError, match=why):
            of(DOUBLE, way, limits=Limits(start_seconds=1.0))
    world.unharmed()


def test_a_checker_that_cannot_be_started_is_no_verdict(monkeypatch: pytest.MonkeyPatch, way: Means, world) -> None:
    real, calls = process.subprocess.Popen, []

    def second_fails(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise OSError("too many processes")
        return real(*args, **kwargs)

    monkeypatch.setattr(process.subprocess, "Popen", second_fails)
    with pytest.raises(StartError, match="too many processes"):
        of(DOUBLE, way)
    monkeypatch.setattr(process.subprocess, "Popen", real)
    world.unharmed()


OUTLIVES = """
import ctypes, threading, time
libc = ctypes.CDLL(None)
libc.prctl(1, 0, 0, 0, 0)
def again(): libc.prctl(1, 0, 0, 0, 0); time.sleep(600)
threading.Thread(target=again).start()
time.sleep(0.2)
libc.prctl(15, b'did what it can', 0, 0, 0)
time.sleep(600)
"""
"""Waits, and tells the kernel not to end it with its parent; its name says that it has done so."""


@pytest.mark.parametrize("program", [OUTLIVES, "import time\ntime.sleep(600)"], ids=["asks to", "waits"])
def test_nothing_outlives_kvcli(program: str, way: Means, world) -> None:
    """kvcli is killed while a program waits."""
    code = f"""
from kvcli.sandbox import process
from kvcli.sandbox.judging import judge
from kvcli.sandbox.limits import Limits, Program
from kvcli.sandbox.means import Means
plain = process.environment
process.environment = lambda work: {{**plain(work), "LC_IDENTIFICATION": {world.mark!r}}}
judge(Program({program!r}, "f", {TEST!r}), Limits(wall_seconds=600.0), Means({way.name!r}))
"""
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(root), "TMPDIR": str(world.folder / "tmp")}
    kvcli = subprocess.Popen([sys.executable, "-c", code], cwd=root, env=env)
    until = time.monotonic() + 60
    while not _waiting(world, "did what it can" if program == OUTLIVES else ""):
        assert time.monotonic() < until, "the program never began"
        time.sleep(0.05)
    time.sleep(0.3)
    os.kill(kvcli.pid, signal.SIGKILL)
    kvcli.wait()
    assert world.left() == []


def _waiting(world, name: str) -> bool:
    """Whether both processes are there, in their temporary folders, and one has that name."""
    marked = [p for p in Path("/proc").iterdir() if p.name.isdigit() and world._marked(int(p.name))]
    named = not name or any((p / "comm").read_text().strip() == name for p in marked)
    return named and sum("kvcli-program" in os.path.realpath(p / "cwd") for p in marked) >= 2
