"""Writes a card per method, docs/methods/NAME.md, and their overview, docs/methods/README.md.

python docs/cards.py             writes them from the methods' docstrings and docs/methods/evidence.json
python docs/cards.py --measure   runs the methods' tests and a small sweep first, and writes evidence.json (minutes)
python docs/cards.py --check     changes nothing; exit code 1 where a page is not up to date
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from kvcli.methods import catalog
from kvcli.methods.base import Method

ROOT = Path(__file__).resolve().parents[1]
CARDS = ROOT / "docs" / "methods"
EVIDENCE = CARDS / "evidence.json"
TESTS = (
    "tests/methods",
    "tests/engine/test_equalities.py",
    "tests/engine/test_generating.py",
    "tests/engine/test_generating_own.py",
    "tests/engine/test_duo_generating.py",
    "tests/engine/test_merge_generating.py",
    "tests/engine/test_stored.py",
)
RATIOS = tuple(f"0.{i}" for i in range(1, 10))
TASK, SAMPLES = "tb_recall", 8
SHARING = {
    1: "the prefill that all methods share",
    2: "the shared prefill, and an extra pass over the prompt, once for all ratios",
    3: "a prefill of its own per row",
}  # fmt: skip
SCOPES = {"head": "each KV head", "layer": "a layer's KV heads together", "model": "all layers and KV heads together"}
KINDS = {
    "evict": "evicts KV pairs", "in-prefill": "drops tokens inside the prefill",
    "transform": "stores KV pairs in another form",
    "merge": "folds what an evictor drops into what stays", "read": "reads part of the cache, frees nothing",
}  # fmt: skip
DECODING = {
    "unified": "prompt and answer share one pool",
    "separate": "the prompt's part stays, the answer's has a cap of its own",
    "own": "the method's rule goes on: it has no cap",
    None: "every generated token is kept",
}  # fmt: skip


def words(name: str) -> tuple[str, str, str]:
    """(definition, source, what differs) out of a method's docstring."""
    text = inspect.cleandoc(catalog.find(name).__doc__ or "")
    text = "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))
    text, _, differs = text.partition("Differs: ")
    match = re.search(r"Source: (.*?)(?=\n\n|\Z)", text, re.S)
    source = match[1].strip() if match else ""
    definition = text.replace(match[0], "").strip() if match else text.strip()
    return definition, source, differs.strip()


def card(name: str, evidence: dict[str, Any]) -> str:
    facts, (definition, source, differs) = catalog.find(name).card(), words(name)
    mine = evidence["methods"].get(name, {})
    lines = [f"# {facts['title'] or name}", "", f"`--method {name}`. [All methods](README.md)", "", definition, ""]
    lines += ["| | |", "| --- | --- |"]
    lines += [f"| {what} | {value} |" for what, value in _facts(facts, source)]
    lines += ["", "## Settings", ""]
    if facts["settings"]:
        lines += ["| setting | default | range | meaning | the paper's |", "| --- | --- | --- | --- | --- |"]
        lines += [_setting(setting) for setting in facts["settings"]]
    else:
        lines += ["None."]
    lines += ["", "## What differs from the source", "", differs or "Nothing that is known.", ""]
    if catalog.find(name).open_points:
        lines += ["## What the paper leaves open", "", "| open | decided here |", "| --- | --- |"]
        lines += [f"| {asked} | {decided} |" for asked, decided in catalog.find(name).open_points]
        lines += [""]
    lines += ["## Checked against", "", *_checks(name, mine), ""]
    lines += ["## Measured against asked for", "", *_measured(mine), ""]
    return "\n".join(lines)


def _facts(facts: dict[str, Any], source: str) -> Iterator[tuple[str, str]]:
    yield "source", _linked(source or facts["paper"]) or "-"
    yield "what it does", KINDS[facts["kind"]]
    yield (
        "acts on",
        " and ".join({"prefill": "the prompt's cache", "decode": "generated tokens"}[p] for p in facts["phases"]),
    )
    folded = "what leaves is folded in" if facts["kind"] == "merge" else DECODING[facts["decoding"]]
    yield "while generating (`--decode-ratio`)", folded
    if facts["domain"]["kind"] != "none":
        yield "the budget binds", SCOPES[facts["budget_scope"]]
    yield "ratios it can reach", _domain(facts["domain"])
    yield "reads", SHARING[facts["sharing"]]
    yield "always keeps", facts["protects"]
    yield "random", "yes: `--seed` makes other cells" if facts["seeded"] else "no"


def _linked(text: str) -> str:
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def _domain(domain: dict[str, Any]) -> str:
    if domain["kind"] == "continuous":
        if domain["floor"]:
            return f"{domain['floor']} and above; below it that much is kept, flagged `unreachable` and `over_budget`"
        return "all" if not domain["low"] else f"from {domain['low']} up"
    if domain["kind"] == "none":
        return "none: its own settings decide, `--ratio` does not; it is drawn at its measured ratio"
    return ", ".join(map(str, domain["points"]))


def _setting(setting: dict[str, Any]) -> str:
    low, high = setting.get("ge"), setting.get("le")
    span = " or ".join(f"`{c}`" for c in setting.get("choices") or ())
    if not span and (low is not None or high is not None):
        span = f"{'' if low is None else low} ..{'' if high is None else f' {high}'}" + (
            ", odd" if setting.get("odd") else ""
        )
    default = setting["default"]
    text = str(default).lower() if isinstance(default, bool) else str(default)
    cells = [
        f"`{setting['name']}`",
        f"`{text}`" if text else "-",
        span or "-",
        setting["help"],
        setting.get("paper") or "-",
    ]
    return f"| {' | '.join(str(c).replace('|', chr(92) + '|') for c in cells)} |"


def _checks(name: str, mine: dict[str, Any]) -> list[str]:
    lines = []
    for oracle in mine.get("oracles", []):
        lines.append(f"- a slow independent implementation of the definition: [`{oracle}`](../../{oracle})")
    for module, count in mine.get("tests", {}).items():
        about = (ast_doc(ROOT / module) or "").strip().splitlines()
        lines.append(f"- [`{module}`](../../{module}): {count} tests pass. {about[0] if about else ''}".rstrip())
    return lines or ["Nothing yet."]


def ast_doc(path: Path) -> str | None:
    import ast

    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) if path.is_file() else None


def _measured(mine: dict[str, Any]) -> list[str]:
    found = mine.get("measured", {})
    if not found:
        return ["It has no ratio of its own to measure."]
    about = (
        f"On the embedded model, `{TASK}`, {SAMPLES} prompts of about 446 tokens: bytes of the prompt's kept cache over"
        " bytes of the 16-bit full one. A testbed shows that a method does what it says. It does not show how methods"
        " rank on a language model ([what it cannot show](../testbed.md#what-it-cannot-show))."
    )
    lines = [about, "", "| asked for | measured | flags |", "| --- | --- | --- |"]
    return lines + [
        f"| {asked} | {row['ratio']:.4f} | {', '.join(row['flags']) or '-'} |" for asked, row in found.items()
    ]


def overview(evidence: dict[str, Any]) -> str:
    lines = [
        "# Methods", "",
        "One card per method: definition, source, settings, what differs from the paper, what it was checked against,"
        " and what it really keeps. Written by `make cards` from the code and its tests.", "",
        "| method | tier | what it does | paper | budget binds | measured at 0.1, 0.5 | tests |", "| --- " * 7 + "|",
    ]  # fmt: skip
    for facts in catalog.cards():
        name = facts["name"]
        mine = evidence["methods"].get(name, {})
        found = mine.get("measured", {})
        rates = [f"{found[r]['ratio']:.3f}" for r in ("0.1", "0.5") if r in found] or [
            f"{row['ratio']:.3f}" for row in found.values()
        ]
        scope = SCOPES[facts["budget_scope"]] if facts["domain"]["kind"] != "none" else "-"
        tests = str(sum(mine.get("tests", {}).values()))
        cells = [f"[`{name}`]({name}.md)", str(facts["tier"]), KINDS[facts["kind"]], _linked(facts["paper"]) or "-"]
        cells += [scope, ", ".join(rates) or "-", tests]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def pages() -> dict[Path, str]:
    evidence = json.loads(EVIDENCE.read_text(encoding="utf-8")) if EVIDENCE.exists() else {"methods": {}}
    found = {CARDS / f"{name}.md": card(name, evidence) for name in catalog.own_names()}
    return {**found, CARDS / "README.md": overview(evidence)}


def measure() -> dict[str, Any]:
    names = catalog.own_names()
    evidence: dict[str, Any] = {name: {} for name in names}
    for name, modules in _passed(names).items():
        evidence[name]["tests"] = dict(sorted(modules.items()))
    for name in names:
        oracles = [
            f"tests/oracles/{stem}.py"
            for stem in (name, f"{name}_method")
            if (ROOT / f"tests/oracles/{stem}.py").is_file()
        ]
        evidence[name]["oracles"] = oracles
        evidence[name]["measured"] = {}
    for name, asked, row in _ratios(names):
        evidence[name]["measured"][asked] = row
    return {"task": TASK, "samples": SAMPLES, "methods": evidence}


def _passed(names: tuple[str, ...]) -> dict[str, dict[str, int]]:
    """Per method and test file the tests that name it and pass. Raises where a test fails."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        there = [t for t in TESTS if (ROOT / t).exists()]
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-n", "2", *there, f"--junitxml={report}"]
        done = subprocess.run(command, cwd=ROOT, check=False)
        if done.returncode:
            raise SystemExit("some tests failed: no evidence was written")
        cases = ET.parse(report).iter("testcase")
        found: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        for case in cases:
            if case.find("skipped") is not None:
                continue
            module = case.get("classname", "").replace(".", "/") + ".py"
            about = f"{Path(module).stem.removeprefix('test_')} {case.get('name', '')}"
            for name in names:
                if re.search(rf"(?<![a-z0-9_]){name}(?![a-z0-9_])", about):
                    found[name][module] += 1
    return {name: dict(modules) for name, modules in found.items()}


def _ratios(names: tuple[str, ...]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(method, ratio asked for or 'its own', mean measured ratio and flags)."""
    import kvcli

    swept = tuple(name for name in names if name != "full" and _can_stand_alone(catalog.find(name)))
    with tempfile.TemporaryDirectory() as folder:
        config = kvcli.SweepConfig(
            methods=swept, ratios=RATIOS, tasks=(TASK,), limit=SAMPLES, first_token=("prefill",), fidelity=False,
            out=f"{folder}/run",
        )  # fmt: skip
        lines = (kvcli.sweep(config) / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for record in map(json.loads, lines):
        if record["status"] != "ok":
            raise SystemExit(f"{record['method']}: {record['error']}")
        if record["method"] != "full":
            groups[record["method"], "its own" if record["ratio"] is None else f"{record['ratio']:g}"].append(record)
    for (method, asked), records in sorted(groups.items()):
        mean = sum(r["measured_ratio"] for r in records) / len(records)
        yield method, asked, {"ratio": round(mean, 6), "flags": sorted({f for r in records for f in r["flags"]})}


def _can_stand_alone(cls: type[Method]) -> bool:
    return cls.kind != "merge"


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--check"], ["--measure"]):
        sys.stderr.write(f"{__doc__}")
        return 2
    if arguments == ["--measure"]:
        CARDS.mkdir(exist_ok=True)
        EVIDENCE.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    wanted = pages()
    stale = [p for p, text in wanted.items() if not p.exists() or p.read_text(encoding="utf-8") != text]
    extra = [p for p in CARDS.glob("*.md") if p not in wanted]
    for page in [*stale, *extra]:
        if arguments != ["--check"]:
            page.unlink() if page in extra else page.write_text(wanted[page], encoding="utf-8")
        sys.stdout.write(f"{page.name}: {'not up to date: make cards' if arguments == ['--check'] else 'written'}\n")
    return int(bool((stale or extra) and arguments == ["--check"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
