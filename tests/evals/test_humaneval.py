"""humaneval: prompts, what is run, and verdicts on the canonical solutions, on wrong ones and on none."""

from __future__ import annotations

import ast
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvcli import sandbox
from kvcli.errors import KvcliError
from kvcli.evals.loader import load_task
from kvcli.evals.spec import Sample
from kvcli.sandbox import probe
from kvcli.sandbox.process import StartError

SHARED = Path(__file__).parents[3] / "shared" / "data"
TASK, INSTRUCT = load_task("humaneval"), load_task("humaneval_instruct")

ROW = {
    "task_id": "Own/0",
    "prompt": 'from typing import List\n\n\ndef twice(x: int) -> int:\n    """Two times x.\n    twice(2)\n    """\n',
    "canonical_solution": "    y = x\n    return x + y\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-3) == -6\n",
    "entry_point": "twice",
}


@pytest.fixture(scope="module")
def shared() -> str:
    if not (SHARED / "humaneval").is_dir():
        pytest.skip(f"no real rows in {SHARED / 'humaneval'}")
    return str(SHARED)


@pytest.fixture(scope="module")
def safe() -> None:
    if probe.best() is None:
        pytest.skip("no sandbox works on this machine")


@pytest.fixture
def own(tmp_path: Path) -> Sample:
    (tmp_path / "humaneval").mkdir()
    (tmp_path / "humaneval" / "test.jsonl").write_text(json.dumps(ROW) + "\n")
    return TASK.samples(shots=0, shot_seed=0, limit=None, data_dir=str(tmp_path))[0]


def samples(shared: str, task=TASK, shots: int = 0, seed: int = 0, limit: int | None = None, order: int = 0):
    return task.samples(shots=shots, shot_seed=seed, limit=limit, data_dir=shared, shot_order=order)


def values(task, outputs: list[tuple[Sample, str]]) -> list[float]:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda pair: task.score(*pair).value, outputs))


@pytest.mark.shared
def test_the_prompt_is_the_problem_s_text(shared: str) -> None:
    rows = [json.loads(line) for line in (SHARED / "humaneval" / "test.jsonl").read_text().splitlines()]
    built = samples(shared)
    assert len(built) == 164 and {int(s.id) for s in built} == set(range(164))
    for s in built:
        assert s.text == rows[int(s.id)]["prompt"] and [x.region for x in s.segments] == ["question"]
        assert s.target == rows[int(s.id)]["canonical_solution"]
    assert (TASK.until, TASK.max_new_tokens, TASK.shots) == (("\nclass", "\ndef", "\n#", "\nif", "\nprint"), 1024, 0)
    assert not TASK.chat and INSTRUCT.chat and TASK.metric == "pass@1"


@pytest.mark.shared
def test_eight_shots_are_eight_problems_with_their_solutions(shared: str) -> None:
    rows = [json.loads(line) for line in (SHARED / "humaneval" / "test.jsonl").read_text().splitlines()]
    blocks = {f"{r['prompt']}{r['canonical_solution'].rstrip()}\n\n\n": i for i, r in enumerate(rows)}
    built = samples(shared, shots=8)
    common = [x.text for x in built[0].segments[:-1]]
    own = {blocks[text] for s in built for text in (x.text for x in s.segments[:-1])}
    assert len(own) == 9, "eight problems, and a ninth for those among them"
    ninth = (own - {blocks[text] for text in next(_shots(s) for s in built if int(s.id) not in own)}).pop()
    for s in built:
        numbers = [blocks[text] for text in _shots(s)]
        assert len(set(numbers)) == 8 and int(s.id) not in numbers
        assert (ninth in numbers) == (int(s.id) in own - {ninth})
        assert [x.shot for x in s.segments] == [*range(8), -1] and s.segments[0].region == "shot"
        assert s.text.endswith(rows[int(s.id)]["prompt"])
    assert len(common) == 8


def _shots(sample: Sample) -> list[str]:
    return [x.text for x in sample.segments[:-1]]


@pytest.mark.shared
def test_shots_are_nested_and_seeded_and_can_be_reordered(shared: str) -> None:
    eight = _shots(samples(shared, shots=8, limit=1)[0])
    assert _shots(samples(shared, shots=2, limit=1)[0]) == eight[:2]
    assert _shots(samples(shared, shots=8, seed=1, limit=1)[0]) != eight
    other = _shots(samples(shared, shots=8, limit=1, order=1)[0])
    assert sorted(other) == sorted(eight) and other != eight
    with pytest.raises(KvcliError, match="humaneval has 164 problems"):
        samples(shared, shots=164)
    with pytest.raises(KvcliError, match="negative"):
        samples(shared, shots=-1)


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.sandbox
def test_all_canonical_solutions_pass(shared: str, safe: None) -> None:
    built = samples(shared)
    assert [s.id for s, v in zip(built, values(TASK, [(s, s.target) for s in built]), strict=True) if v != 1] == []


@pytest.mark.shared
@pytest.mark.sandbox
def test_canonical_solutions_in_chat_form_pass(shared: str, safe: None) -> None:
    """As a block with the whole function, for a part of them: the rule is another, the sandbox the same."""
    built = samples(shared, INSTRUCT, limit=40)
    answers = [f"Sure!\n\n```python\n{s.meta['prompt']}{s.target}```\nIt works." for s in built]
    assert values(INSTRUCT, list(zip(built, answers, strict=True))) == [1.0] * 40


CHANGED = """

_right = {0}
def {0}(*args):
    value = _right(*args)
    if isinstance(value, bool) or value is None: return not value
    if isinstance(value, (int, float)): return value + 1
    if isinstance(value, str): return value + "x"
    return (*value, 0)
"""


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.sandbox
def test_all_changed_solutions_fail(shared: str, safe: None) -> None:
    """The canonical function with each result changed a little. (No stop text may stand in the output: `score`
    would cut there, so this goes to the sandbox itself.)"""
    built = samples(shared)

    def passed(sample: Sample) -> bool:
        m = sample.meta
        source = m["prompt"] + sample.target + CHANGED.format(m["entry_point"])
        return sandbox.run(sandbox.Program(source, m["entry_point"], m["test"], m["prompt"])).passed

    with ThreadPoolExecutor(2) as pool:
        assert [s.id for s, ok in zip(built, pool.map(passed, built), strict=True) if ok] == []


class Mutant(ast.NodeTransformer):
    """Changes the first comparison, operator or number it can."""

    OTHER = {
        ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
        ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Mod: ast.Mult,
    }  # fmt: skip
    done = False

    def visit(self, node: ast.AST) -> ast.AST:
        if not self.done and type(node) in self.OTHER:
            self.done = True
            return self.OTHER[type(node)]()
        if not self.done and isinstance(node, ast.Constant) and type(node.value) is int:
            self.done = True
            return ast.copy_location(ast.Constant(node.value + 1), node)
        return self.generic_visit(node)


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.sandbox
def test_solutions_with_one_operator_changed_nearly_all_fail(shared: str, safe: None) -> None:
    """A few such programs are as right as before, or slip through HumanEval's own tests."""
    outputs = []
    for s in samples(shared):
        mutant = Mutant()
        tree = ast.fix_missing_locations(mutant.visit(ast.parse(s.meta["prompt"] + s.target)))
        if mutant.done:
            outputs.append((s, ast.unparse(tree)))
    judged = values(INSTRUCT, [(s, f"```python\n{text}\n```") for s, text in outputs])
    assert len(outputs) > 130 and sum(judged) <= 0.1 * len(outputs)


@pytest.mark.shared
@pytest.mark.sandbox
def test_empty_and_idle_outputs_score_nothing(shared: str, safe: None) -> None:
    built = samples(shared, limit=12)
    for s in built:
        for output in ("", "\n\n", "\ndef x(): pass"):
            assert TASK.score(s, output).value == 0 and TASK.score(s, output).extracted is None
    assert values(TASK, [(s, "    pass\n") for s in built]) == [0.0] * 12


@pytest.mark.sandbox
@pytest.mark.parametrize(
    ("output", "value", "extracted"),
    [
        ("    return x * 2\n", 1, "    return x * 2\n"),
        ("   return x * 2\n", 1, "    return x * 2\n"),
        (" return x * 2", 1, "    return x * 2"),
        ("   y = x\n    return x + y", 1, "    y = x\n    return x + y"),
        ("return x * 2", 0, "return x * 2"),
        ("    y = x\n   return x + y", 0, "    y = x\n   return x + y"),
        ("    return x * 2\n\n\ndef other():\n    boom(", 1, "    return x * 2\n\n"),
        ("    return x * 2\n# done\nassert False", 1, "    return x * 2"),
        ("    return x * 2\nprint(twice(2))", 1, "    return x * 2"),
        ("    return x * 2\nif __name__ == '__main__':\n    boom", 1, "    return x * 2"),
        ("    return x * 2\nassert twice(2) == 5", 0, None),
        ("    return x * 2.0", 1, None),
        ("    return str(x * 2)", 0, None),
        ("    import numpy as np\n    return np.int64(x) * 2", 1, None),
        ("```python\n    return x * 2\n```", 0, None),
        ("    return List and x * 2", 1, None),
        ("\n    return x * 2", 1, "\n    return x * 2"),
    ],
)
def test_what_is_run_for_a_completion(own: Sample, safe: None, output: str, value: int, extracted: str | None) -> None:
    """openai/human-eval's rule: prompt + completion up to a stop text; and blanks that decoding lost."""
    score = TASK.score(own, output)
    assert score.value == value
    if extracted is not None:
        assert score.extracted == extracted


FULL = "def twice(x: int) -> int:\n    return x * 2\n"


@pytest.mark.sandbox
@pytest.mark.parametrize(
    ("output", "value", "extracted"),
    [
        (f"Here it is:\n```python\n{FULL}```\nDone.", 1, "\n" + FULL),
        (f"```\n{FULL}```", 1, "\n" + FULL),
        (f"```py\n{FULL}", 1, "\n" + FULL),
        (f"  ```python\r\n{FULL}  ```", 1, "\n" + FULL),
        (f"Use this:\n```bash\npip install x\n```\n```python\n{FULL}```", 1, "\n" + FULL),
        (f"```python\n{FULL}```\nor\n```python\ndef twice(x):\n    return 0\n```", 1, "\n" + FULL),
        ("```python\n    return x * 2\n```", 1, "    return x * 2\n"),
        (FULL, 1, "\n" + FULL),
        ("    return x * 2", 1, "    return x * 2"),
        ("```python\nhelp = 2\ndef twice(x: List) -> int:\n    return x * help\nprint(twice(4))\n```", 1, None),
        ("I cannot do that.", 0, None),
        ("```python\ndef once(x):\n    return x\n```", 0, None),
        ("``` ```", 0, None),
    ],
)
def test_what_is_run_for_an_answer(own: Sample, safe: None, output: str, value: int, extracted: str | None) -> None:
    score = INSTRUCT.score(own, output)
    assert score.value == value
    if extracted is not None:
        assert score.extracted == extracted


@pytest.mark.sandbox
def test_extra_figures_tell_wrong_from_broken_from_endless(own: Sample, safe: None) -> None:
    assert TASK.score(own, "    return x").extra == {"runs": 1.0, "timeout": 0.0}
    assert TASK.score(own, "    return y").extra == {"runs": 0.0, "timeout": 0.0}
    assert TASK.score(own, "    while True: pass").extra == {"runs": 0.0, "timeout": 1.0}
    assert TASK.score(own, "").extra == {"runs": 0.0, "timeout": 0.0}


def test_chat_form_asks_for_the_problem(own: Sample, tmp_path: Path) -> None:
    second = ROW | {"task_id": "Own/1", "prompt": ROW["prompt"].replace("twice", "double"), "entry_point": "double"}
    (tmp_path / "humaneval" / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (ROW, second)))
    ask = "Write a solution to the following problem and make sure that it passes the tests:\n```python\n{0}\n```\n"
    (asked, _) = sorted(samples(str(tmp_path), INSTRUCT), key=lambda s: s.id)
    assert asked.text == ask.format(ROW["prompt"])
    (shown, _) = sorted(samples(str(tmp_path), INSTRUCT, shots=1), key=lambda s: s.id)
    done = second["prompt"] + second["canonical_solution"]
    answer = f"Here is the completed function:\n```python\n{done}```\n\n"
    assert shown.text == ask.format(second["prompt"]) + answer + ask.format(ROW["prompt"])


@pytest.mark.parametrize("field", ROW)
@pytest.mark.parametrize("value", [None, "", 7])
def test_a_bad_row_is_named(tmp_path: Path, field: str, value: object) -> None:
    (tmp_path / "humaneval").mkdir()
    bad = ROW | {field: value}
    (tmp_path / "humaneval" / "test.jsonl").write_text(json.dumps(ROW) + "\n" + json.dumps(bad) + "\n")
    with pytest.raises(KvcliError, match=rf"test\.jsonl:2: the field '{field}' is missing, empty or no text"):
        samples(str(tmp_path))


def test_tests_without_check_are_named(tmp_path: Path) -> None:
    (tmp_path / "humaneval").mkdir()
    (tmp_path / "humaneval" / "test.jsonl").write_text(json.dumps(ROW | {"test": "x = 1"}) + "\n")
    with pytest.raises(KvcliError, match=r"test\.jsonl:1: the field 'test' defines no function check"):
        samples(str(tmp_path))


def test_check_refuses_where_there_is_no_sandbox(monkeypatch: pytest.MonkeyPatch, own: Sample) -> None:
    monkeypatch.setattr(probe, "problem", lambda name: "none here")
    with pytest.raises(KvcliError, match="cannot be run safely"):
        TASK.check()
    with pytest.raises(KvcliError, match="cannot be run safely"):
        TASK.score(own, "    return x * 2")


@pytest.mark.sandbox
def test_a_sandbox_that_fails_midway_is_an_error_and_no_score(
    own: Sample, safe: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert TASK.score(own, "    return x * 2").value == 1
    monkeypatch.setattr("kvcli.sandbox.means.Means.command", lambda self, limits: ["/nowhere/python"])
    with pytest.raises(StartError):
        TASK.score(own, "    return x * 2")
