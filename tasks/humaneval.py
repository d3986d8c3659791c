"""HumanEval: Python functions from their descriptions, judged by running them in a sandbox (kvcli/sandbox).

Source: Chen et al., arXiv:2107.03374; openai/human-eval `human_eval/execution.py` for what is run; the prompts of
lm-evaluation-harness `lm_eval/tasks/humaneval`. humaneval.yaml and humaneval_instruct.yaml say what differs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from kvcli import sandbox
from kvcli.errors import KvcliError
from kvcli.evals.data import DataSet, Row, bad_row, first_of, permutation, read_split, reordered
from kvcli.evals.extract import cut
from kvcli.evals.spec import Sample, Score, Segment, Task

FIELDS = ("task_id", "prompt", "canonical_solution", "test", "entry_point")
FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
"""A block of code; the last one may lack its end."""
ASK = "Write a solution to the following problem and make sure that it passes the tests:\n```python\n{0}\n```\n"
ANSWER = "Here is the completed function:\n```python\n{0}{1}```\n\n"


@dataclass(frozen=True, kw_only=True)
class HumanEval(Task):
    """style: complete, where the output goes on where the prompt ends; instruct, where it is an answer with a block
    of code. cpu_seconds: time a program has for all its tests."""

    dataset_path: str
    revision: str | None = None
    test_split: str = "test"
    style: Literal["complete", "instruct"] = "complete"
    cpu_seconds: int = 3

    def __post_init__(self) -> None:
        if self.cpu_seconds < 1:
            raise ValueError("'cpu_seconds' must be at least 1")

    def check(self) -> None:
        """Raises KvcliError where no sandbox works on this machine."""
        sandbox.usable()

    def samples(
        self, *, shots: int, shot_seed: int, limit: int | None, data_dir: str | None, shot_order: int = 0, **_: Any
    ) -> list[Sample]:
        """Samples carry what judging needs in `meta`; `target` is the canonical solution."""
        rows = read_split(DataSet("humaneval", self.dataset_path, None, self.revision), self.test_split, data_dir)
        for row in rows:
            self._check_row(row)
        exemplars = self._exemplars(rows, shots, shot_seed)
        chosen = [rows[i] for i in first_of("humaneval", len(rows), limit)]
        return [self._sample(row, exemplars, shots, shot_order) for row in chosen]

    def score(self, sample: Sample, output: str) -> Score:
        """1 when the program passes all tests. extracted: the program's text behind the prompt, None for blank output.

        extra: `runs`, whether it came to an end without an error of its own (it may still be wrong); `timeout`.
        Raises what `kvcli.sandbox.run` raises: then the program was not judged.
        """
        code = self._code(sample, output)
        if not code.strip():
            return Score(0.0, None, {"runs": 0.0, "timeout": 0.0})
        facts = sample.meta
        program = sandbox.Program(facts["prompt"] + code, facts["entry_point"], facts["test"], facts["prompt"])
        verdict = sandbox.run(program, sandbox.Limits(cpu_seconds=self.cpu_seconds))
        runs = verdict.reason in ("passed", "wrong")
        return Score(float(verdict.passed), code, {"runs": float(runs), "timeout": float(verdict.reason == "timeout")})

    def _code(self, sample: Sample, output: str) -> str:
        """What is run behind the prompt."""
        output = cut(output, self.until)
        if self.style == "complete":
            return indented(output, sample.meta["prompt"])
        return block(output, sample.meta["entry_point"], sample.meta["prompt"])

    def _check_row(self, row: Row) -> None:
        for name in FIELDS:
            value = row.values.get(name)
            if not isinstance(value, str) or not value.strip():
                raise bad_row(row, f"the field '{name}' is missing, empty or no text", self.name, self.source)
        if "def check(" not in row.values["test"]:
            raise bad_row(row, "the field 'test' defines no function check", self.name, self.source)

    def _exemplars(self, rows: list[Row], shots: int, shot_seed: int) -> list[Row]:
        """`shots` problems and one to spare, in an order fixed by the seed: 2 shots are the first 2 of 8."""
        if shots < 0:
            raise KvcliError("shots cannot be negative", given=f"--shots {shots}", fix="--shots 0")
        if shots == 0:
            return []
        if shots >= len(rows):
            what, fix = f"{self.name} has {len(rows)} problems to take shots from", f"--shots {len(rows) - 1} or fewer"
            raise KvcliError(what, given=f"--shots {shots}", fix=fix)
        return [rows[i] for i in permutation(f"kvcli:shots:humaneval:{shot_seed}", len(rows))[: shots + 1]]

    def _sample(self, row: Row, exemplars: list[Row], shots: int, shot_order: int) -> Sample:
        others = reordered([e for e in exemplars if e.where != row.where][:shots], shot_order)
        segments = [Segment(self._shot(e), "shot", i) for i, e in enumerate(others)]
        segments.append(Segment(self._question(row), "question"))
        meta = {name: row.values[name] for name in FIELDS} | {"where": row.where}
        return Sample(str(row.index), tuple(segments), row.values["canonical_solution"], meta=meta)

    def _question(self, row: Row) -> str:
        prompt: str = row.values["prompt"]
        return prompt if self.style == "complete" else ASK.format(prompt)

    def _shot(self, row: Row) -> str:
        prompt, solution = row.values["prompt"], row.values["canonical_solution"].rstrip("\n") + "\n"
        if self.style == "complete":
            return f"{prompt}{solution}\n\n"
        return ASK.format(prompt) + ANSWER.format(prompt, solution)


def indented(completion: str, prompt: str) -> str:
    """The completion, its first line put back to the function's indentation where it lost some blanks.

    A first line that is indented, but less than the text above it, is an error in every Python program, so this
    changes no program that would run.
    """
    body = re.search(r"^( +)\S.*\s*\Z", prompt, re.MULTILINE)
    width = len(body[1]) if body else 0
    lost = re.match(r"( +)(?=[^\s])", completion)
    if prompt.endswith("\n") and lost and len(lost[1]) < width:
        return " " * (width - len(lost[1])) + completion
    return completion


def block(output: str, entry: str, prompt: str) -> str:
    """The code of an answer: the first block that defines the function, else the first, else the whole output.

    What does not define the function itself is taken as its body, or as going on where the prompt ends.
    """
    blocks = FENCE.findall(output)
    defines = re.compile(rf"^(?:async )?def {re.escape(entry)}\b", re.MULTILINE)
    code: str = next((b for b in blocks if defines.search(b)), blocks[0] if blocks else output)
    return "\n" + code if defines.search(code) else indented(code, prompt)
