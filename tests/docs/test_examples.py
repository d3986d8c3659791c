"""The examples of docs/adding-a-method.md and docs/results.md, run as printed there."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvcli.results.store import key_of, map_path, read_map
from tests.conftest import Done
from tests.docs.pages import blocks, codes, commands, rows, section, text

METHOD = text("docs/adding-a-method.md")
RESULTS = text("docs/results.md")
EXAMPLE = blocks(METHOD, "python")[0]


def kvcli_in(folder: Path, *args: str) -> Done:
    from kvcli.cli.app import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(args)
    return Done(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page's mine.py, and what its first command leaves in runs/first (few samples, two tasks)."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "mine.py").write_text(EXAMPLE, encoding="utf-8")
    first = next(commands(METHOD))
    assert first == "kvcli sweep --method ./mine.py:ValueNorm,tier1 --ratio 0.3"
    few = ("--task", "tb_recall,tb_code", "--limit", "2", "--out", "runs/first")
    done = kvcli_in(folder, *shlex.split(first)[1:], *few)
    assert done.code == 0, done.err
    assert "ValueNorm" in done.out
    return folder


def records(place: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / "runs/first/samples.jsonl").read_text().splitlines()]


def test_the_method_is_shorter_than_30_lines() -> None:
    assert len(EXAMPLE.splitlines()) < 30


def test_the_method_runs_beside_the_others_and_keeps_its_budget(place: Path) -> None:
    found = records(place)
    assert len(found) == len({key_of(r) for r in found}) == (1 + 1 + 8) * 2 * 2
    mine = [r for r in found if r["method"] == "./mine.py:ValueNorm"]
    assert len(mine) == 4
    for record in mine:
        size = int(0.3 * record["n_prompt"] + 0.5)
        assert (record["status"], record["flags"], record["settings"]) == ("ok", [], {"recent": 16})
        assert record["kept"] == size
        assert record["measured_ratio"] == pytest.approx(size / record["n_prompt"], abs=1e-6)
        kept = read_map(map_path(place / "runs/first", record["task"], record["sample_id"], record["cell_id"]))
        newest = set(range(record["n_prompt"] - 16, record["n_prompt"]))
        assert all(len(head) == size and newest <= set(head.tolist()) for layer in kept for head in layer)
        assert any((layer[0] != layer[1]).any() for layer in kept), "each head has its own"


def test_the_error_on_the_page_is_the_error_printed(place: Path) -> None:
    (shown,) = [block for block in blocks(METHOD) if block.startswith("error:")]
    given = re.search(r"given: --method (.*)", shown)
    assert given
    done = kvcli_in(place, "sweep", "--method", given[1], "--ratio", "0.3")
    assert (done.code, done.err) == (2, shown)


def test_the_error_on_the_page_of_the_command_line(kvcli: Callable[..., Done]) -> None:
    (shown,) = [block for block in blocks(text("docs/cli.md")) if block.startswith("error:")]
    assert kvcli("sweep", "--method", "snapvk").err == shown


def test_methods_on_the_page_of_the_command_line() -> None:
    from kvcli.methods import catalog

    table = rows(section(text("docs/cli.md"), "Methods: `--method`"))
    names = [str(m) for m in catalog.expand([codes(table[1][0])[0], codes(table[2][0])[0]])]
    assert names == ["snapkv:window=8", "h2o", "streaming_llm"], "a setting at its default is dropped"


def test_what_the_page_says_a_method_has_is_there() -> None:
    from kvcli.cache.budget import Budget
    from kvcli.methods.base import Method
    from kvcli.methods.context import Context

    for title, owner, prefix in (
        ("What `select` may read: `ctx`", Context, "ctx."),
        ("How much may stay: `budget`", Budget, "budget."),
        ("What is declared: class attributes", Method, ""),
    ):
        table = rows(section(METHOD, title))[1:]
        named = {re.match(r"\w+", code.removeprefix(prefix))[0] for row in table for code in codes(row[0])}  # type: ignore[index]
        assert named and named <= {*dir(owner), *owner.__annotations__}, title


def test_needs_of_the_page_are_known() -> None:
    from kvcli.attention.capture import Needs

    wanted = set(re.findall(r"Needs `([a-z_:]+?)(?::w)?`", METHOD))
    assert wanted == {"column_sum", "column_sum:question", "window"}
    assert Needs.of({"column_sum", "column_sum:question", "window:8"}).window == 8


def printed(code: str, place: Path) -> list[str]:
    out = io.StringIO()
    with contextlib.chdir(place), contextlib.redirect_stdout(out):
        exec(compile(code, "docs/results.md", "exec"), {})
    return out.getvalue().splitlines()


def test_python_on_the_page_of_results(place: Path) -> None:
    scores, kept = blocks(RESULTS, "python")
    lines = printed(scores, place)
    assert len(lines) == 2 * 10
    assert "tb_recall full 1.0 1.0" in lines
    lines = printed(kept, place)
    assert len(lines) == 2 * 10
    cells = json.loads((place / "runs/first/run.json").read_text())["cells"]
    full = next(cell for cell, facts in cells.items() if facts["task"] == "tb_recall" and facts["method"] == "full")
    assert any(re.fullmatch(rf"{full} \[(\d+)(, \1)*\]", line) for line in lines)


def documented(title: str) -> Iterator[str]:
    for row in rows(section(RESULTS, title))[1:]:
        yield from codes(row[0])


def test_keys_of_run_json_and_prompts(place: Path) -> None:
    folder = place / "runs/first"
    assert sorted(documented("run.json")) == sorted(json.loads((folder / "run.json").read_text()))
    prompt = json.loads((folder / "prompts.jsonl").read_text().splitlines()[0])
    assert sorted(documented("prompts.jsonl")) == sorted(prompt)


def test_the_folder_has_the_files_of_the_page(place: Path) -> None:
    names = {path.name for path in (place / "runs/first").iterdir() if not path.name.startswith(".")}
    assert names == {"run.json", "samples.jsonl", "prompts.jsonl", "kept"}
    assert {name for name in names if name not in RESULTS} == set()
