"""Scorers: one output against the right answers. Each cites the official rule it follows."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from kvcli.evals.extract import Filter
from kvcli.evals.spec import Score

Scorer = Callable[[str, Sequence[str], "Rules"], Score]
Judge = Callable[[str, Sequence[str]], Score]
"""A user's own scorer (`scorer: file.py:function`): output and right answers to a Score."""


@dataclass(frozen=True)
class Metric:
    """An entry of `metric_list`; the settings are those of lm-evaluation-harness `exact_match`."""

    metric: str
    aggregation: Literal["mean"] = "mean"
    higher_is_better: bool = True
    ignore_case: bool = False
    ignore_punctuation: bool = False
    regexes_to_ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.higher_is_better:
            raise ValueError("a score of 1 is the best one in kvcli; turn the metric round")
        for pattern in self.regexes_to_ignore:
            try:
                re.compile(pattern)
            except re.error as e:
                raise ValueError(f"{pattern!r} of regexes_to_ignore is not a regular expression: {e}") from e

    def normal(self, text: str) -> str:
        """Rule: `exact_match_hf_evaluate` of lm-evaluation-harness `lm_eval/api/metrics.py`, in its order.

        Differs: white space at both ends is dropped.
        """
        for pattern in self.regexes_to_ignore:
            text = re.sub(pattern, "", text)
        if self.ignore_case:
            text = text.lower()
        if self.ignore_punctuation:
            text = text.translate(str.maketrans("", "", string.punctuation))
        return text.strip()


@dataclass(frozen=True)
class Rules:
    """How a definition wants outputs judged."""

    filters: tuple[Filter, ...]
    metric: Metric


def exact_match(output: str, golds: Sequence[str], rules: Rules) -> Score:
    """1 when the answer equals one of the right ones after normalisation.

    With several filters the first one's answer is scored and each one's 0 or 1 goes to `extra` under its name.
    """
    answers = {f.name: f(output) for f in rules.filters} or {"whole": output.strip() or None}
    right = {rules.metric.normal(gold) for gold in golds}
    values = {name: float(a is not None and rules.metric.normal(a) in right) for name, a in answers.items()}
    first = next(iter(answers))
    return Score(values[first], answers[first], values if len(values) > 1 else {})


def contains(output: str, golds: Sequence[str], rules: Rules) -> Score:
    """1 when a right answer stands in the output as whole words; case is ignored. For short answers in free text.

    With a filter only what the first one finds is searched.
    """
    answer = rules.filters[0](output) if rules.filters else output.strip() or None
    hit = answer is not None and any(_stands_in(rules.metric.normal(g), rules.metric.normal(answer)) for g in golds)
    return Score(float(hit), answer)


def _stands_in(gold: str, text: str) -> bool:
    return bool(re.search(rf"(?<!\w){re.escape(gold)}(?!\w)", text, re.IGNORECASE))


SCORERS: dict[str, Scorer] = {"exact_match": exact_match, "contains": contains}
