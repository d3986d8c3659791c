"""The options of a row and which of them is right: `doc_to_choice` and `doc_to_target` of lm-evaluation-harness.

Source: `ConfigurableTask.doc_to_choice`, `doc_to_target` and `process_results` in its `lm_eval/api/task.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvcli.evals.template import template


def check(doc_to_choice: Sequence[str]) -> None:
    """Raises ValueError for a definition whose options cannot work."""
    if len(doc_to_choice) == 1:
        template(doc_to_choice[0])
    elif any(not option.strip() for option in doc_to_choice):
        raise ValueError("'doc_to_choice' has an empty option")


def choices_of(doc_to_choice: Sequence[str], row: Mapping[str, Any]) -> list[str]:
    """The options as texts: those written in the definition, or the list that its one text names or renders to.

    Raises ValueError for a row without a list of two or more texts or numbers.
    """
    if len(doc_to_choice) > 1:
        return list(doc_to_choice)
    choices = template(doc_to_choice[0]).listed(row)
    if len(choices) < 2:
        raise ValueError(f"the number of options is {len(choices)}, and 2 is the least")
    for choice in choices:
        if isinstance(choice, bool) or not isinstance(choice, str | int | float) or not str(choice).strip():
            raise ValueError(f"an option is {choice!r}, not text")
    return [str(choice) for choice in choices]


def right_one(target: Any, choices: Sequence[str], *, rendered: bool) -> int:
    """The index of the right option.

    A number is the index from 0, and so are digits that a template rendered; any other text is one of the options
    (a letter where the options are letters). Raises ValueError for anything else; lm-evaluation-harness takes such a
    row along with a warning, as one that nobody can get right.
    """
    if isinstance(target, str) and rendered and target.strip().isdecimal():
        target = int(target)
    if isinstance(target, int):
        if not 0 <= target < len(choices):
            raise ValueError(f"the right answer is option {int(target)}, and the options are 0 to {len(choices) - 1}")
        return int(target)
    if not isinstance(target, str) or target not in choices:
        raise ValueError(f"the right answer {target!r} is none of the options {', '.join(choices)[:80]}")
    return list(choices).index(target)
