"""Sequences of token ids that a model reads before it is pruned."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from kvcli.errors import KvcliError
from kvcli.weights.spec import Calibration, SparseGPT

LEAST_TOKENS = 8
"""A shorter text says next to nothing of how words go together."""


def sequences(pruning: SparseGPT, file: Calibration | None, tokenizer: Any, context: int | None,
              testbed: Path | None) -> list[list[int]]:  # fmt: skip
    """Token ids of the calibration texts, drawn by the pruning's seed; none longer than `length` or the context.

    testbed: the folder of a model of the testbed language, which needs no file. Raises KvcliError where a file holds
    no text long enough.
    """
    length = min(pruning.length, context or pruning.length)
    if file is not None:
        return _from_file(pruning, file, tokenizer, length)
    if testbed is None:
        raise ValueError("a model without texts of its own needs a calibration file")
    return [ids[:length] for ids in islice(_episodes(pruning.seed, length, testbed), pruning.samples)]


def _from_file(pruning: SparseGPT, file: Calibration, tokenizer: Any, length: int) -> list[list[int]]:
    """A running text is tokenised whole and cut, its rest left out; other texts are cut off at `length`."""
    every = [list(tokenizer(text)["input_ids"]) for text in file.texts()]
    if file.kind == "text":
        (ids,) = every
        every = [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)] or [ids]
    usable = [ids[:length] for ids in every if len(ids) >= LEAST_TOKENS]
    if not usable:
        what = f"{file.path} holds no text of at least {LEAST_TOKENS} tokens"
        raise KvcliError(what, given=f"--calib {file.path}", fix="longer texts of the kind the model is used for")
    rng = random.Random(f"calibration:{pruning.seed}")
    return [usable[i] for i in sorted(rng.sample(range(len(usable)), min(pruning.samples, len(usable))))]


def _episodes(seed: int, length: int, folder: Path) -> Iterator[list[int]]:
    """Training episodes of the testbed language, families in turn. Seeds of training are numbers and those of exams
    begin otherwise, so no random number is shared with either."""
    from kvcli.testbed import language
    from kvcli.testbed import vocabulary as V

    recipe = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
    dialect = language.Dialect(**recipe.get("dialect", {}))
    rng = random.Random(f"testbed-calibration:{seed}")
    for family in cycle(V.FAMILIES):
        words, _ = language.training_episode(rng, family, length, dialect).tokens()
        yield [V.ID[word] for word in words]
