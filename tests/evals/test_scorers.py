"""Scorers and filters against lm-evaluation-harness' rules."""

from __future__ import annotations

import pytest

from kvcli.evals.extract import Filter, Step, cut, select
from kvcli.evals.scorers import Metric, Rules, contains, exact_match
from kvcli.evals.spec import Score

PLAIN = Rules((), Metric("exact_match"))


@pytest.mark.parametrize(
    ("pattern", "text", "which", "answer"),
    [
        (r"\d+", "1 22 333", 0, "1"),
        (r"\d+", "1 22 333", -1, "333"),
        (r"\d+", "1 22 333", 5, None),
        (r"\d+", "none", 0, None),
        (r"(a)|(b)", "b a", 0, "b"),
        (r"(x?)y", "y", 0, ""),
        (r"(a?)(b?)c", "c", 0, None),
        (r"answer:(.*)", "answer:  B ", 0, "B"),
    ],
)
def test_regex_filter(pattern: str, text: str, which: int, answer: str | None) -> None:
    assert select(pattern, text, which) == answer


def test_filters_run_in_a_chain() -> None:
    letter = Filter("letter", (Step("regex", r"answer is (.*)"), Step("regex", r"([A-D])"), Step("take_first")))
    assert letter("the answer is (B).") == "B" and letter("B") is None and letter("the answer is E") is None


def test_cut_at_the_first_stop() -> None:
    assert cut("a\n\nQ: b", ["Q:", "\n\n"]) == "a" and cut("abc", []) == "abc" and cut("abc", [""]) == "abc"


def test_exact_match_normalises_both_sides() -> None:
    rules = Rules((), Metric("m", ignore_case=True, ignore_punctuation=True, regexes_to_ignore=(r"\$", r"\.$")))
    for output in (" the Hague.", "The Hague!", "$The-Hague"):
        assert exact_match(output, ["The Hague" if "-" not in output else "TheHague"], rules).value == 1
    assert exact_match("The Hague", ["Den Haag", "the hague"], rules).value == 1
    assert exact_match("Hague", ["The Hague"], rules).value == 0
    assert exact_match("the hague", ["The Hague"], PLAIN).value == 0


def test_several_filters_the_first_is_the_score() -> None:
    filters = (Filter("last", (Step("regex", r"\d+", -1),)), Filter("first", (Step("regex", r"\d+", 0),)))
    assert exact_match("1 then 2", ["1"], Rules(filters, Metric("m"))) == Score(0.0, "2", {"last": 0.0, "first": 1.0})


@pytest.mark.parametrize("scorer", [exact_match, contains])
@pytest.mark.parametrize("output", ["", " ", "\n\n"])
def test_nothing_is_no_answer(scorer: object, output: str) -> None:
    assert scorer(output, ["a"], PLAIN) == Score(0.0, None)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("output", "value"),
    [("It is Oslo.", 1), ("OSLO", 1), ("Oslofjord", 0), ("no slo", 0), ("Bergen, not\nOslo", 1), ("Os lo", 0)],
)
def test_contains_whole_words(output: str, value: int) -> None:
    assert contains(output, ["Oslo"], PLAIN).value == value


def test_contains_symbols_and_filters() -> None:
    assert contains("it costs $5 (five)", ["$5"], PLAIN).value == 1 and contains("C+", ["C++"], PLAIN).value == 0
    rules = Rules((Filter("line", (Step("regex", r"A: (.*)"),)),), Metric("m"))
    assert contains("Oslo\nA: Bergen", ["Oslo"], rules) == Score(0.0, "Bergen")
    assert contains("Oslo", ["Oslo"], rules) == Score(0.0, None)
