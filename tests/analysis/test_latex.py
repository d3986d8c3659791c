from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kvcli.analysis.contents import contents
from kvcli.analysis.latex import escaped, latex
from kvcli.analysis.load import load_run
from tests.analysis.synthetic import GOLDEN, METHODS, RATIOS, TASKS, Spec, build, small

PAPER = (
    r"\documentclass{article}\usepackage[T1]{fontenc}\usepackage{booktabs}\usepackage{graphicx}"
    r"\begin{document}\input{report}\end{document}"
)
NASTY = 'a_b%c&d#e{f}$g^h~i\\j<k>|"[l] 100…→\u4e2d\U0001f600--x'


def text_of(folder: Path) -> str:
    return latex(contents(load_run(folder)))


def nasty(folder: Path) -> Path:
    build(folder, Spec(TASKS[:2], METHODS[:2], n=10))
    quoted = NASTY.replace("\\", "\\\\").replace('"', '\\"')
    for name in ("run.json", "samples.jsonl"):
        path = folder / name
        path.write_text(path.read_text().replace("streaming_llm", quoted).replace("tb_choice", quoted))
    return folder


def test_latex_matches_golden(tmp_path: Path) -> None:
    """Regenerate after a change that is meant: python -m tests.analysis.synthetic"""
    assert text_of(small(tmp_path / "golden")) == (GOLDEN / "report.tex").read_text(encoding="utf-8")


@pytest.mark.parametrize("make", [small, nasty])
def test_braces_and_environments_are_closed(tmp_path: Path, make: object) -> None:
    text = re.sub(r"^%.*$", "", text_of(make(tmp_path / "run")), flags=re.M)  # type: ignore[operator]
    stack: list[str] = []
    for begin, name in re.findall(r"\\(begin|end)\{(\w+)\}", text):
        stack.append(name) if begin == "begin" else None
        assert begin == "begin" or stack.pop() == name
    assert stack == []
    plain = re.sub(r"\\[{}\\$&#%_]", "", text)
    assert plain.count("{") == plain.count("}")
    assert plain.count("$") % 2 == 0
    for line in re.findall(r"\\toprule(.*?)\\bottomrule", text, re.S):
        counts = {len(re.findall(r"(?<!\\)&", row)) for row in line.split("\n") if r"\\" in row}
        assert len(counts) == 1


def test_nothing_in_a_name_acts_as_latex() -> None:
    drawn = escaped(NASTY, code=True)
    assert r"a\_\allowbreak{}b\%c\&d\#e\{f\}\$g\textasciicircum{}h\textasciitilde{}i\textbackslash{}j" in drawn
    assert r"{[}l]" in drawn and "-{}-x" in drawn
    assert drawn.isascii()


def test_losses_are_bold_and_over_budget_is_marked(tmp_path: Path) -> None:
    text = text_of(build(tmp_path / "run", Spec(TASKS[2:3], METHODS[1:8], RATIOS, n=60)))
    assert r"$\mathbf{-" in text
    assert r"\textsuperscript{o}" in text
    assert r"\label{tab:kv-tb-recall}" in text


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex on this machine")
@pytest.mark.parametrize("make", [small, nasty])
def test_it_compiles(tmp_path: Path, make: object) -> None:
    (tmp_path / "report.tex").write_text(text_of(make(tmp_path / "run")), encoding="utf-8")  # type: ignore[operator]
    (tmp_path / "paper.tex").write_text(PAPER)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False, timeout=120)
    log = found.stdout.decode("utf-8", "replace")
    if "booktabs.sty' not found" in log:
        pytest.skip("this TeX has no booktabs")
    assert found.returncode == 0, log[-2000:]
