"""Scorers and filters against lm-evaluation-harness' rules."""

from __future__ import annotations

import re
import time

import pytest

from kvcli.evals.extract import Filter, Step, cut, letter, select
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


LETTERS = {
    "A": "a|A.|(a)|The answer is A.|The answer is a.|The answer is A because of B.|A. B. C. D.",
    "B": r"B| B|(B)|[B]|**B**|_B_|`B`|$B$|B.|B)|b|(b).|B。|B) Paris|B. Paris|B: Paris|B - Paris|B – Paris|**B.** Paris"
    r"|**B**. Paris|b) paris|\boxed{B}|$\boxed{\text{B}}$|The answer is \boxed{B}.|Answer: \boxed{\text{B}}",
    "C": "Answer: C.|**Answer: C**|**Answer:** C|Answer C|answer: c|The answer is (C).|The correct answer is: **C**"
    "|The correct answer is option C.|The best answer is C) Paris|The right choice is C.|The answer choice is C."
    "|The answer to the question is C.|Option C is correct.|C is the correct answer.|C is correct because B is not."
    "|Options A and B are wrong. The answer is C.|The answer is not B. The answer is C|The answer is C, not B.",
    None: "| |...|Answer:|Apple|Dog.|bank|BB|ABCD|A B C D|5|-7|A dog|A dog is a mammal.|The answer is A dog."
    "|The answer is a dog.|C'est|C’est|B or C|B and C|B, C|B/C|A, B, and C|Both A and C|The answer is B or C.|E"
    "|E. other|The answer is E.|The answer is not B.|None of the above|vitamin C.|Ｂ|<think>|Answer: 3|答案是 B",
}


@pytest.mark.parametrize(("found", "text"), [(f, text) for f, texts in LETTERS.items() for text in texts.split("|")])
def test_the_letter_of_an_answer(found: str | None, text: str) -> None:
    assert letter(text, "ABCD") == found
    if re.search(r"\w", text):
        assert letter(f"\n \n{text}\nD", "ABCD") == found, "the first line with words is read, and no other"


def test_a_line_without_words_is_passed_over() -> None:
    assert letter("\n---\nB\nC", "ABCD") == "B" and letter("\n\n", "ABCD") is None is letter("...", "ABCD")


def test_the_letters_are_those_of_the_options() -> None:
    assert letter("E. other", "ABCDE") == "E" and letter("The answer is B", "XYZ") is None
    assert Filter("letter", (Step("letter", letters="AB"),))("The answer is B.") == "B"
    with pytest.raises(ValueError, match="capital letters"):
        Step("letter", letters="ab")


@pytest.mark.parametrize(
    "text",
    ["answer " * 5000, " " * 30000, "*" * 30000, "A" + " " * 30000, "answer is " * 5000, "answer to " + "x " * 20000,
     "A ) " * 20000, "answer" + "*" * 30000 + "x", "answer " + "is the correct best one " * 5000, "boxed{" * 5000],
    ids=range(10),
)  # fmt: skip
def test_broken_outputs_are_read_fast(text: str) -> None:
    """What heavy compression makes models write must not hang the search."""
    start = time.monotonic()
    letter(text, "ABCDE")
    assert time.monotonic() - start < 1


def test_white_space_and_what_is_left_of_it() -> None:
    stripped = Filter("line", (Step("regex", r"^(.*?)(?=\n|$)"), Step("remove_whitespace"), Step("take_first")))
    assert stripped("  B \nC") == "B" and stripped(" \nB") is None and stripped("") is None
    assert exact_match(" \n", ["B"], Rules((stripped,), Metric("m"))) == Score(0.0, None)
