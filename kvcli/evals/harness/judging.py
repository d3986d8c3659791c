"""lm-eval's filters and metrics for one answer, as `evaluate` of its `evaluator.py` applies them to all."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any, Protocol

from kvcli.errors import KvcliError
from kvcli.evals.extract import cut
from kvcli.evals.harness import package
from kvcli.evals.harness.live import Asked, Live
from kvcli.evals.spec import Score

NOTHING = "[invalid]"
"""What lm-eval's filters give where they find no answer: `fallback` of its `filters/extraction.py`."""


class Wanted(Protocol):
    """What of a task decides its score (kvcli.evals.harness.task.HarnessTask)."""

    @property
    def name(self) -> str: ...
    @property
    def metric(self) -> str: ...
    @property
    def until(self) -> tuple[str, ...]: ...
    @property
    def filter_name(self) -> str: ...


class NoScore(ValueError):
    """What a metric gave is not the score of a sample."""


def judged(live: Live, doc: Any, responses: Sequence[Any], wanted: Wanted) -> Score:
    """The score of one sample: its generated text, or (log-likelihood, greedy?) of each option.

    Every metric under every filter goes to `extra`, named `metric` or `metric,filter` where there are several. Raises
    NoScore where the task's metric is no number in [0, 1].
    """
    responses = [cut(r, wanted.until) if isinstance(r, str) else r for r in responses]
    found: dict[str, tuple[list[Any], dict[str, Any]]] = {}
    with package.quiet():
        for filters in live.task._filters:
            results = _filtered(live, filters, doc, responses)
            found[filters.name] = results, live.task.process_results(dict(doc), results)
    chosen = wanted.filter_name or next(iter(found))
    if chosen not in found:
        what = f"{wanted.name} has no filter '{chosen}'"
        raise KvcliError(what, given=f"filter_name={chosen}", fix=" or ".join(found))
    results, metrics = found[chosen]
    extra = {}
    for name, (_, values) in found.items():
        numbers = {metric: _number(value) for metric, value in values.items()}
        for metric, number in numbers.items():
            if number is not None:
                extra[metric if len(found) == 1 else f"{metric},{name}"] = number
    return Score(_value(metrics, wanted), _answer(results), extra)


def probe(live: Live, asked: Asked, wanted: Wanted) -> None:
    """Judges an empty and a right answer to see whether the metric gives scores, before any model is loaded.

    Raises KvcliError where it does not. An answer its code cannot judge says nothing: real ones may be judged.
    """
    gold = live.gold(asked.doc)
    texts = ["", gold if isinstance(gold, str) else ""]
    tries = [[(-1.0 - i, False) for i in range(len(asked.options))]] if asked.options else [[text] for text in texts]
    for responses in tries:
        try:
            with contextlib.suppress(ArithmeticError, LookupError, AttributeError, TypeError, AssertionError):
                judged(live, asked.doc, responses, wanted)
        except NoScore as e:
            raise KvcliError(str(e), given=f"--task {wanted.name}", fix="a task with a score per sample") from e
        except ImportError as e:
            what = f"the metric of {wanted.name} needs a package that is not there: {e}"
            raise KvcliError(what, given=f"--task {wanted.name}", fix=f"pip install {e.name or 'it'}") from e
        except ValueError:
            continue


def _filtered(live: Live, filters: Any, doc: Any, responses: Sequence[Any]) -> list[Any]:
    from lm_eval.api.instance import Instance

    kind = "loglikelihood" if live.chooses else "generate_until"
    instances = [Instance(kind, doc, ("", ""), i, resps=[r]) for i, r in enumerate(responses)]
    filters.apply(instances)
    return [instance.filtered_resps[filters.name] for instance in instances]


def _value(metrics: dict[str, Any], wanted: Wanted) -> float:
    value = _number(metrics.get(wanted.metric))
    if value is None:
        there = ", ".join(metrics) or "nothing"
        raise NoScore(f"{wanted.name} gives no number '{wanted.metric}' for a sample (it gives {there})")
    if not 0 <= value <= 1:
        raise NoScore(f"'{wanted.metric}' of {wanted.name} is {value:g}; scores lie in 0..1")
    return value


def _number(value: Any) -> float | None:
    """A finite number, NumPy's included; None for anything else."""
    try:
        number = float(value) if not isinstance(value, str | list | tuple) else math.nan
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _answer(results: list[Any]) -> str | None:
    """The filtered text; None where the filters found nothing, and for options."""
    first = results[0] if results else None
    text = first if isinstance(first, str) else None if isinstance(first, tuple) or first is None else str(first)
    return text if text and text.strip() and text != NOTHING else None
