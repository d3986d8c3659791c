"""Starting is quick, and light commands import nothing heavy."""

from __future__ import annotations

import ast
import importlib.util
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvcli import __version__
from kvcli.cli.app import COMMANDS

HEAVY = {
    "torch", "transformers", "tokenizers", "datasets", "safetensors", "numpy", "scipy", "matplotlib", "pandas", "yaml",
    "jinja2", "huggingface_hub", "pyarrow", "msgspec",
}  # fmt: skip
THIRD_PARTY = {
    "typer", "annotated_doc", "shellingham",
    "rich", "markdown_it", "mdurl", "pygments", "attr", "attrs",
}  # fmt: skip
"""All that `kvcli --help` imports from outside the standard library. rich brings the second line."""

IMPORTED = """
import sys
from kvcli.cli.app import main
code = main(sys.argv[1:])
print(*sys.modules, file=sys.stderr)
sys.exit(code)
"""


def imported_by(*args: str) -> set[str]:
    """Top-level modules in memory after one command line."""
    done = subprocess.run([sys.executable, "-c", IMPORTED, *args], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in done.stderr.splitlines()[-1].split()}


def test_help_imports_only_a_short_list():
    outside = {name for name in imported_by("--help") - sys.stdlib_module_names if not name.startswith("_")}
    assert outside - {"kvcli"} <= THIRD_PARTY


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_imports_nothing_heavy(name):
    assert not imported_by(name, "--help") & (HEAVY | {"pydantic"})


def test_importing_kvcli_imports_nothing_else():
    code = "import sys; before = set(sys.modules); import kvcli; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    found = set(done.stdout.split())
    assert {name for name in found if name.partition(".")[0] not in sys.stdlib_module_names} == {"kvcli"}


@pytest.mark.parametrize("args, limit", [(["--help"], 0.3), (["sweep", "--help"], 0.5)])
def test_help_is_quick(args, limit, tmp_path):
    """Best of 5, byte code cached as it is for a user. On a machine with too much to do, its own CPU time counts."""
    env = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    runs = [seconds_of([sys.executable, "-m", "kvcli", *args], env) for _ in range(6)][1:]
    wall, cpu = (min(times) for times in zip(*runs, strict=True))
    busy = os.getloadavg()[0] > (os.cpu_count() or 1) - 1
    assert (min(wall, cpu) if busy else wall) < limit


def seconds_of(command: list[str], env: dict[str, str]) -> tuple[float, float]:
    """(wall, CPU) seconds of a process."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, env=env, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - start, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("name", COMMANDS)
def test_the_summary_in_the_top_help_is_the_first_line_of_the_command_s_help(name):
    module, summary = COMMANDS[name]
    tree = ast.parse(Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8"))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    if "command" in functions:
        text = ast.get_docstring(functions["command"])
    else:  # a group: the help of its app
        text = importlib.import_module(module).app.info.help
    assert text.strip().splitlines()[0] == summary
    assert len(summary) <= 2 * 64, "two lines of an 80-column help"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_examples(name, kvcli):
    """A group of commands has them in the help of each."""
    app = getattr(importlib.import_module(COMMANDS[name][0]), "app", None)
    members = [info.name or info.callback.__name__.replace("_", "-") for info in app.registered_commands] if app else []
    for line in [[name, member] for member in members] or [[name]]:
        for flag in ("--help", "-h"):
            done = kvcli(*line, flag)
            assert done.code == 0
            assert f"kvcli {' '.join(line)}" in done.out.partition("Examples:")[2]


def test_a_group_without_a_command_prints_its_help(kvcli):
    done = kvcli("testbed")
    assert done.code == 0
    assert "train" in done.out
    assert done.err == ""


def test_bare_kvcli_prints_the_help(kvcli):
    bare, asked = kvcli(), kvcli("--help")
    assert (bare.code, asked.code) == (0, 0)
    assert bare.out.split() == asked.out.split()
    for name, (_, summary) in COMMANDS.items():
        start = " ".join(summary.split()[:4])
        assert any(line.strip("│ ").split()[:1] == [name] and start in line for line in asked.out.splitlines())


def test_version(kvcli):
    assert kvcli("--version").out == f"kvcli {__version__}\n"


@pytest.mark.parametrize("word, expected", [("kvcli st", "status"), ("kvcli list --j", "--json")])
def test_completion(word, expected):
    env = {**os.environ, "_KVCLI_COMPLETE": "complete_bash", "COMP_WORDS": word, "COMP_CWORD": str(word.count(" "))}
    done = subprocess.run([sys.executable, "-c", IMPORTED], env=env, capture_output=True, text=True)
    assert done.stdout.split() == [expected]
