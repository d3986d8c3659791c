"""Requests of lm-eval as a kvcli task: strings in, with regions as far as a string shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvcli.evals.spec import Sample, Score, Segment, Task, Tokens

DELIMITER = "\n\n"
"""lm-eval's own `fewshot_delimiter`: what stands before the last one is description and shots, hence context."""


@dataclass(frozen=True, kw_only=True)
class Requests(Task):
    """Prompts that lm-eval built, and its own judge of the answers: scores here are always 0."""

    asked: tuple[Sample, ...]

    @classmethod
    def of(cls, asked: Sequence[Sample], *, max_new_tokens: int = 1, until: Sequence[str] = ()) -> Requests:
        return cls(
            name="requests", version="1", ability="", metric="none", shots=0, max_new_tokens=max_new_tokens,
            until=tuple(until), chat=False, asked=tuple(asked),
        )  # fmt: skip

    def samples(
        self,
        *,
        shots: int = 0,
        shot_seed: int = 0,
        limit: int | None = None,
        data_dir: str | None = None,
        shot_order: int = 0,
        tokens: Tokens | None = None,
    ) -> list[Sample]:
        return list(self.asked[:limit])

    def score(self, sample: Sample, output: str) -> Score:
        return Score(0.0, None)


def request(number: int, prompt: str, delimiter: str, options: Sequence[str] = ()) -> Sample:
    """One prompt: `context` up to the last delimiter, `question` behind it; all question where there is none."""
    front, mark, question = prompt.rpartition(delimiter) if delimiter else ("", "", prompt)
    segments = [Segment(front + mark, "context")] if mark and question.strip() else []
    segments.append(Segment(question if segments else prompt, "question"))
    return Sample(str(number), tuple(segments), 0 if options else "", options=tuple(options))


def settings_text(method: str, settings: dict[str, Any]) -> str:
    """A method with further settings as `--method` writes them: lm-eval splits its model_args at commas."""
    if not settings:
        return method
    words = {True: "true", False: "false", None: "none"}
    pieces = [f"{k}={words[v] if v is None or isinstance(v, bool) else v}" for k, v in settings.items()]
    return f"{method}{',' if ':' in method else ':'}{','.join(pieces)}"
