"""The examples of docs/adding-a-method.md, results.md and statistics.md, run as printed there."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import statistics
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from kvcli.grammar import round_half_up
from kvcli.methods import catalog
from kvcli.results.store import key_of, map_path, read_map
from tests.conftest import Done
from tests.docs.pages import blocks, codes, commands, rows, section, text

METHOD = text("docs/adding-a-method.md")
RESULTS = text("docs/results.md")
EXAMPLE = blocks(METHOD, "python")[0]
CURVES = 2 + len(catalog.expand(["tier1"]))
"""Of the page's first command: full, the page's method, tier 1; all at one ratio."""


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


def records(place: Path, run: str = "runs/first") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / run / "samples.jsonl").read_text().splitlines()]


def ran(place: Path, name: str, limit: int) -> list[dict[str, Any]]:
    """What the page's example file of this name gives with its own command, on fewer samples."""
    (code,) = [
        c for c in blocks(METHOD, "python") if c.startswith('"""') and f"`{name}`" in METHOD.partition(c)[0][-160:]
    ]
    (place / name).write_text(code, encoding="utf-8")
    (command,) = [c for c in commands(METHOD) if f"./{name}:" in c]
    done = kvcli_in(place, *shlex.split(command)[1:], "--limit", str(limit), "--out", f"runs/{name}")
    assert done.code == 0, done.err
    return records(place, f"runs/{name}")


def test_the_method_is_shorter_than_30_lines() -> None:
    assert len(EXAMPLE.splitlines()) < 30


def test_the_method_runs_beside_the_others_and_keeps_its_budget(place: Path) -> None:
    found = records(place)
    assert len(found) == len({key_of(r) for r in found}) == CURVES * 2 * 2
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


def test_the_method_that_evicts_while_generating_holds_the_cap(place: Path) -> None:
    mine = [r for r in ran(place, "peak.py", 3) if r["method"] == "./peak.py:Peak"]
    grown = {r["sample_id"]: r for r in mine if r["decode"] is None}
    held = {r["sample_id"]: r for r in mine if r["decode"] == {"ratio": "0.3", "interval": 1}}
    assert len(grown) == len(held) == 3 and len(mine) == 6
    for sample, record in held.items():
        n, pair = record["n_prompt"], record["kv_bytes"]["full"] // record["n_prompt"]
        assert (record["status"], record["n_new"] > 10) == ("ok", True)
        assert record["kv_bytes"]["end"] == pair * round_half_up(Decimal("0.3") * (n + record["n_new"] - 1))
        same = grown[sample]
        assert record["kv_bytes"]["prefill"] == same["kv_bytes"]["prefill"] == pair * round_half_up(Decimal("0.3") * n)
        assert same["kv_bytes"]["end"] == same["kv_bytes"]["prefill"] + pair * (same["n_new"] - 1)


def test_the_method_that_drops_inside_the_prefill_keeps_its_budget(place: Path) -> None:
    found = ran(place, "early.py", 2)
    mine = [r for r in found if r["method"] == "./early.py:EarlyExit"]
    assert len(mine) == 2 * 2
    for record in mine:
        assert (record["status"], record["first_token"], record["flags"]) == ("ok", "n/a", [])
        assert record["ratio"] - 0.01 < record["measured_ratio"] <= record["ratio"] + 0.001
        kept = read_map(map_path(place / "runs/early.py", record["task"], record["sample_id"], record["cell_id"]))
        first, *others = [len(layer[0]) for layer in kept]
        assert first == record["n_prompt"] and len(set(others)) == 1 and others[0] < first
        assert record["fidelity"]["kl"] >= 0


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


def test_what_the_page_says_of_decoding_is_there() -> None:
    from kvcli.methods.base import Method
    from kvcli.methods.generating import Generating

    part = section(METHOD, "Evicting while generating")
    named = {re.match(r"\w+", code.removeprefix("view."))[0] for row in rows(part) for code in codes(row[0])}  # type: ignore[index]
    hooks = {name for name in vars(Method) if name.startswith("decod")}
    fields = {"view", *Generating.__annotations__, "per_kv_head", "all_heads_alike"} - {"layer", "heads"}
    assert named == hooks | fields


def test_needs_of_the_page_are_known() -> None:
    from kvcli.attention.capture import Needs
    from kvcli.engine.needs import HANDLES, PASSES, strange

    wanted = set(re.findall(r"`([a-z_:]+?)(?::w)?`", " ".join(re.findall(r"Needs (`[^.|;(]*)", METHOD)))) | {"bands"}
    sums = {"column_sum", "column_sum:question", "window", "band_sum", "q_moments"}
    assert wanted == {*sums, *PASSES, *HANDLES, "head_profile"}
    assert not strange(name + ":8" * (name in ("window", "band_sum")) for name in wanted)
    assert strange(["window", "nothing"]) == ["window", "nothing"]
    assert Needs.of({"column_sum", "column_sum:question", "window:8"}).window == 8


def printed(code: str, place: Path) -> list[str]:
    out = io.StringIO()
    with contextlib.chdir(place), contextlib.redirect_stdout(out):
        exec(compile(code, "docs/results.md", "exec"), {})
    return out.getvalue().splitlines()


def test_python_on_the_page_of_results(place: Path) -> None:
    scores, arrays, kept = blocks(RESULTS, "python")
    assert all(line.startswith("tb_") for line in printed(arrays, place))
    lines = printed(scores, place)
    assert len(lines) == 2 * CURVES
    assert "tb_recall full 1.0 1.0" in lines
    lines = printed(kept, place)
    assert len(lines) == 2 * CURVES
    cells = json.loads((place / "runs/first/run.json").read_text())["cells"]
    full = next(cell for cell, facts in cells.items() if facts["task"] == "tb_recall" and facts["method"] == "full")
    assert any(re.fullmatch(rf"{full} \[(\d+)(, \1)*\]", line) for line in lines)


def test_python_on_the_page_of_statistics(place: Path) -> None:
    (code,) = blocks(text("docs/statistics.md"), "python")
    lines = printed(code, place)
    assert len(lines) == 2 * (CURVES - 1)
    mine = [r for r in records(place) if (r["task"], r["method"]) == ("tb_code", "random")]
    figures = {name: statistics.mean(r["fidelity"][name] for r in mine) for name in ("kl", "top1", "nll")}
    (line,) = [line for line in lines if line.startswith("tb_code random 0.3 ")]
    assert f"kl {figures['kl']:.3f} (" in line
    assert line.endswith(f"top1 {figures['top1']:.3f}  nll {figures['nll']:+.3f}")


def documented(title: str) -> Iterator[str]:
    for row in rows(section(RESULTS, title))[1:]:
        yield from codes(row[0])


def test_keys_of_run_json_and_prompts(place: Path) -> None:
    folder = place / "runs/first"
    later = {"weights", "rescored"}  # only where some were pruned, or scored again
    assert set(documented("run.json")) - later == json.loads((folder / "run.json").read_text()).keys()
    prompt = json.loads((folder / "prompts.jsonl").read_text().splitlines()[0])
    assert set(documented("prompts.jsonl")) - {"thinking"} == set(prompt)


def test_keys_of_batching_and_of_fidelity(place: Path) -> None:
    (row,) = [row for row in rows(section(RESULTS, "run.json")) if codes(row[0]) == ["batching"]]
    run = json.loads((place / "runs/first/run.json").read_text())
    assert set(codes(row[1])) == {*run["batching"], "out_of_memory"}
    said = set(codes(section(RESULTS, "samples.jsonl")))
    assert {name for r in records(place) for name in r["fidelity"]} <= said


def test_the_folder_has_the_files_of_the_page(place: Path) -> None:
    names = {path.name for path in (place / "runs/first").iterdir() if not path.name.startswith(".")}
    assert names == {"run.json", "samples.jsonl", "prompts.jsonl", "kept"}
    assert {name for name in names if name not in RESULTS} == set()
