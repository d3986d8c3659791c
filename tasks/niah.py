"""A needle in a haystack: one sentence hidden at a given depth of a long text, asked for at the end.

Needle, question and the place at the break of a sentence: gkamradt/LLMTest_NeedleInAHaystack
(llm_needle_haystack_tester.py). Its haystack, essays under copyright, is replaced by texts of `--data-dir`, or by
sentences that kvcli makes.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from dataclasses import dataclass
from typing import Literal

from kvcli.errors import KvcliError
from kvcli.evals.data import first_of
from kvcli.evals.haystack import Haystack, haystack, sentence_starts
from kvcli.evals.lengths import counter, fitted
from kvcli.evals.spec import Sample, Score, Segment, Task, Tokens

SYSTEM = "You are a helpful AI bot that answers questions for a user. Keep your response short and direct.\n\n"
QUESTION = "\n\nQuestion: {} Don't give information outside the document or repeat your findings.\nAnswer:"
PLACE = "San Francisco"
DOING = "eat a sandwich and sit in Dolores Park on a sunny day"
SMALL_WORDS = {"a", "and", "in", "on"}
SLACK = 8
"""A prompt is at most this many tokens shorter than `length`, and never longer."""


@dataclass(frozen=True, kw_only=True)
class Niah(Task):
    """Every depth `repeats` times. length: tokens of the prompt, without those of a chat template; depth: one depth
    instead of `depths`; 0 is the beginning of the text, 1 its end. Repeat r has the same text and needle at all depths.

    needle: city is the original sentence, which is always the same; number a magic number, another one each repeat.
    """

    length: int = 4096
    depth: float | None = None
    depths: tuple[float, ...] = (0.0, 0.5, 1.0)
    repeats: int = 10
    needle: Literal["city", "number"] = "city"
    conditions: tuple[str, ...] = ("depth", "length")

    def __post_init__(self) -> None:
        """Raises ValueError for settings that cannot work."""
        if self.length < 1 or self.repeats < 1:
            raise ValueError("'length' and 'repeats' must be at least 1")
        if not self._depths or not all(0 <= d <= 1 for d in self._depths):
            raise ValueError("a depth is between 0 and 1")

    def samples(
        self,
        *,
        shots: int,
        shot_seed: int,
        limit: int | None,
        data_dir: str | None,
        shot_order: int = 0,
        tokens: Tokens | None = None,
    ) -> list[Sample]:
        """Needs no data. Raises KvcliError where `length` has no room for needle and question."""
        if shots:
            raise KvcliError(f"{self.base} has no exemplars", given=f"--shots {shots}", fix="--shots 0")
        hay, count = haystack(data_dir), counter(tokens)
        starts = sentence_starts(hay.text)
        grid = [(depth, repeat) for repeat in range(self.repeats) for depth in self._depths]
        return [self._sample(*grid[i], hay, starts, count) for i in first_of(self.name, len(grid), limit)]

    def score(self, sample: Sample, output: str) -> Score:
        """number: 1 if the output has it. city: the share of the answer's words the output has, in any order.

        Rule for city: FranxYao/Long-Context-Data-Engineering eval/needle (the original asks another model). Differs:
        case and punctuation do not count, nor do `a`, `and`, `in` and `on`, which any English text has.
        """
        place = {"depth": sample.meta["depth"], "length": float(self.length)}
        if self.needle == "number":
            found = str(sample.target) in output
        wanted = set(_words(sample.target)) - SMALL_WORDS
        value = float(found) if self.needle == "number" else len(wanted & set(_words(output))) / len(wanted)
        return Score(value, output.strip() or None, place)

    @property
    def _depths(self) -> tuple[float, ...]:
        return self.depths if self.depth is None else (self.depth,)

    def _sample(self, depth: float, repeat: int, hay: Haystack, starts: list[int], tokens: Tokens) -> Sample:
        rng = random.Random(f"kvcli:{self.base}:{repeat}")
        needle, question, answer = _needle(self.needle, rng)
        start = starts[rng.randrange(len(starts))]
        text = hay.text[start:] + "\n" + hay.text[:start]
        text *= 1 + 12 * self.length // len(text)  # no tokenizer needs more characters a token for plain text
        breaks = sentence_starts(text[: 12 * self.length])

        def context(n: int) -> str:
            body = text[:n].rsplit(None, 1)[0] if n < len(text) else text
            if depth == 1:
                return f"{body.rstrip()} {needle}"
            at = breaks[bisect_right(breaks, int(depth * len(body))) - 1]
            return f"{body[:at]}{needle} {body[at:]}"

        asked = QUESTION.format(question)
        size = fitted(lambda n: SYSTEM + context(n) + asked, tokens, self.length, 4 * self.length, 20, SLACK)
        if size < 20:
            least = tokens(SYSTEM + context(20) + asked)
            raise KvcliError(
                f"{self.base}: no prompt has as few as {self.length} tokens",
                given=f"length={self.length}", fix=f"--task {self.base}:length={least} or more",
            )  # fmt: skip
        segments = (Segment(SYSTEM, "system"), Segment(context(size), "context"), Segment(asked, "question"))
        name = f"{self.length}-{depth:g}-{repeat}" + ("-own" if hay.own else "")
        return Sample(name, segments, answer, f"text {repeat}", {"depth": depth, "length": self.length})


def _needle(kind: str, rng: random.Random) -> tuple[str, str, str]:
    """(sentence, question, answer)."""
    if kind == "city":
        return f"The best thing to do in {PLACE} is {DOING}.", f"What is the best thing to do in {PLACE}?", DOING
    value = str(rng.randrange(1_000_000, 10_000_000))
    return f"The special magic number of {PLACE} is {value}.", f"What is the special magic number of {PLACE}?", value


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
