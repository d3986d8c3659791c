from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kvcli.analysis.marked import Grid, Section
from kvcli.analysis.reading.load import load_run
from kvcli.analysis.reports.contents import contents
from kvcli.analysis.reports.latex import latex
from kvcli.analysis.reports.latex_text import escaped, section
from tests.analysis.synthetic import GOLDEN, METHODS, RATIOS, TASKS, Spec, build, small
from tests.analysis.tables_of import cell, folder_of, right, tasks

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


def test_sections_that_the_text_speaks_of_are_there_and_notes_are_no_warnings(tmp_path: Path) -> None:
    text = text_of(small(tmp_path / "run"))
    heads = re.findall(r"\\subsubsection\*\{(.*?)\}", text)
    assert heads == [
        "Verdict", "Sanity warnings", "Method against method, at the same bytes",
        "Mean over tasks: share kept of what full has above chance", "The paper's six findings, on this run",
        "First token: compressed against prefill",
    ]  # fmt: skip
    assert "in a section of its own" in text
    lines = cell("t", "full", "1", right(30, 60)) + cell("t", "a", "0.1", right(10, 60))
    facts = tasks(t={"too_long": 2, "reference": {"testbed": 0.9}})
    text = text_of(folder_of(tmp_path / "notes", lines, tasks=facts))
    assert "Note: 2 prompts of the task left out" in text and "Warning: 2 prompts" not in text
    assert "Warning: full scores 0.500" in text
    assert text.index("Sanity warnings") < text.index(r"\begin{table}")


def test_flags_stand_above_and_shares_unlike_fulls_behind_a_difference(tmp_path: Path) -> None:
    lines = cell("t", "full", "1", right(50, 50))
    for ratio, flags in (("0.1", ["fallback", "simulated"]), ("0.3", ["noop"]), ("0.5", ["unreachable"])):
        lines += cell("t", "a", ratio, right(30, 50), flags=flags, incoherent=True)
    text = text_of(folder_of(tmp_path / "run", lines))
    assert re.findall(r"textsuperscript\{(\w+)\}", text) == ["fs", "n", "u"]
    assert "f: fallback" in text and r"\textasciitilde{}100" in text
    assert "(no answer 0 \\%, incoherent 0 \\%, cut 0 \\%)" in text


def test_relative_change_and_what_was_kept_have_a_table(tmp_path: Path) -> None:
    lines = cell("t", "full", "1", right(50, 50)) + cell("t", "a", "0.1", right(40, 50))
    text = text_of(folder_of(tmp_path / "run", lines, tasks=tasks(t={"chance": 0.5})))
    table = text.split(r"\label{tab:kv-t-relative}")[1]
    assert r"a & $-20.0$ \% \\" in table
    assert r"{\footnotesize 60 \% {[}" in table


def test_provenance_and_commands_are_comments(tmp_path: Path) -> None:
    text = text_of(small(tmp_path / "run"))
    assert "\n% kvcli sweep --model testbed" in text
    assert "\n% commit of kvcli: 456def" in text
    assert "\n% - Model: testbed" in text


def test_one_table_over_all_tasks_for_each_size(tmp_path: Path) -> None:
    text = text_of(small(tmp_path / "run"))
    found = re.findall(r"\\begin\{table\*\}.*?\\end\{table\*\}", text, re.S)
    assert [re.search(r"kept ratio ([\d.]+)", table)[1] for table in found] == ["0.1", "0.3", "0.7"]  # type: ignore[index]
    assert "n = 59-60" in found[0] and "unadjusted" in found[0]
    rows = [line for line in found[0].split(r"\midrule")[1].splitlines() if line.endswith(r"\\")]
    assert rows[0].startswith("full & ") and rows[-1].startswith("random"), "controls last"
    assert r"0.14, $\mathbf{-84.7}$\textsuperscript{n}" in found[0]
    assert "0.80, $-18.6$" in found[0], "by itself established, not with all comparisons"
    assert text.index("Verdict") < text.index(r"\begin{table*}") < text.index("Sanity warnings")


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


def test_points_of_the_findings_stand_under_them_and_those_of_the_verdict_are_in_tables(tmp_path: Path) -> None:
    text = text_of(small(tmp_path / "run"))
    verdict, found = (part_of(text, title) for title in ("Verdict", "The paper's six findings, on this run"))
    assert verdict.count(r"\begin{itemize}") == 1
    assert found.count(r"\begin{itemize}") > 1 and "1. Loss depends on the task" in found and "Needs:" in found


def test_the_paper_s_numbers_and_its_notes_are_in_it(tmp_path: Path) -> None:
    lines = cell("gsm8k", "full", "1", right(50, 60)) + cell("gsm8k", "snapkv", "0.1", right(40, 60))
    run = load_run(folder_of(tmp_path / "run", lines, model="llama3.1-8b-instruct"))
    found = part_of(latex(contents(run, paper="kvfundabench")), "Beside the numbers printed in KVFundaBench")
    found = found.split(r"\begin{table}")[0]
    assert found.count(r"\toprule") == 1 and "snapkv" in found and "Its prompts, templates and settings" in found
    assert "Beside the numbers" not in latex(contents(run))


def test_a_long_grid_goes_on_in_another_table_and_its_words_have_room(tmp_path: Path) -> None:
    words = " ".join(["word"] * 40)
    grid = Grid(("task", "n", "said"), [[f"t{i}", str(i), words] for i in range(30)], frozenset({1}))
    text = "\n".join(section(Section("key", "title", [grid])))
    assert text.count(r"\begin{tabular}{lrp{0.80\linewidth}}") == text.count(r"\end{tabular}") > 1
    assert [f"t{i} & {i} & " in text for i in range(30)] == [True] * 30


def part_of(text: str, title: str) -> str:
    """The section of that title."""
    return text.split(rf"\subsubsection*{{{title}", 1)[1].split(r"\subsubsection*", 1)[0]
