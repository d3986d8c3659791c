"""The eight testbed tasks: prompts, regions and scores."""

from __future__ import annotations

import re

import pytest

from kvcli.errors import KvcliError
from kvcli.evals.loader import find_tasks
from kvcli.evals.spec import Sample, Segment, Task
from kvcli.testbed import vocabulary as V

TASKS = {task.name.removeprefix("tb_"): task for task in find_tasks(["testbed"])}
SHOTS = dict.fromkeys(TASKS, 12) | {"needle": 2, "longgen": 1}
CHANCE = dict.fromkeys(TASKS, 0.0) | {
    "knowledge": 0.25, "choice": 0.25, "safety": 0.5, "recall": 1 / len(V.VALUES), "code": 1 / len(V.NUMBERS),
}  # fmt: skip


def some(task: Task, n: int | None = 40, seed: int = 0, shots: int | None = None) -> list[Sample]:
    return task.samples(shots=task.shots if shots is None else shots, shot_seed=seed, limit=n, data_dir=None)


@pytest.fixture(params=V.FAMILIES)
def task(request: pytest.FixtureRequest) -> Task:
    return TASKS[request.param]


def test_facts(task: Task) -> None:
    family = task.name.removeprefix("tb_")
    assert task.chance == pytest.approx(CHANCE[family], abs=1e-6) and task.shots == SHOTS[family]
    assert not task.chat and task.until == () and task.suites == ("testbed",)


def test_400_different_samples_of_the_stated_length(task: Task) -> None:
    samples = some(task, None)
    lengths = [len(s.text.split()) + 1 for s in samples]
    assert len({s.id for s in samples}) == 400 == len({s.text for s in samples})
    assert min(lengths) > 370 and max(lengths) <= 448
    assert [s.id for s in some(task, 5)] == [s.id for s in samples[:5]]


def test_samples_are_the_same_every_time_and_change_with_the_shot_seed(task: Task) -> None:
    assert some(task, 5) == some(task, 5)
    first, other = some(task, 5), some(task, 5, seed=1)
    assert [s.id for s in other] == [f"{s.id}@{task.shots}.1" for s in first], "another question has another name"
    assert first[0].text != other[0].text


def test_segments(task: Task) -> None:
    for sample in some(task, 20):
        *front, last = sample.segments
        assert all(s.text.endswith(" ") and not s.text.endswith("  ") for s in front)
        assert last.region == "question" and last.text == last.text.strip()
        assert sample.text == " ".join(sample.text.split()) and V.BOS not in sample.text
        assert set(sample.text.split()) <= set(V.WORDS)
        shots = [s for s in front if s.region == "shot"]
        assert [s.shot for s in shots] == list(range(task.shots)) and all(s.text.endswith(" <e> ") for s in shots)
        assert front[0].region == "system" and front[0].text.split()[0] == V.TAG[task.name.removeprefix("tb_")]


def test_where_the_rule_and_the_passages_stand() -> None:
    rule = some(TASKS["safety"], 1)[0].segments[0]
    assert re.match(r"\[safety\] rule never ", rule.text) and rule.region == "system"
    for family, mark in (("recall", "note"), ("needle", "secret"), ("longgen", "note")):
        context = [s for s in some(TASKS[family], 1)[0].segments if s.region == "context"]
        assert len(context) == 1 and f"{mark} " in context[0].text


def test_answers_can_be_known_from_the_prompt() -> None:
    for s in some(TASKS["needle"]):
        assert f"secret {s.segments[-1].text.split()[-1]} {s.target} " in s.text
    for s in some(TASKS["recall"]):
        assert f"note {s.segments[-1].text.split()[-1]} {s.target} " in s.text


def test_answers_fit_into_the_new_tokens(task: Task) -> None:
    longest = max(len(s.target.split()) + 1 for s in some(task, None))
    assert longest <= task.max_new_tokens <= 2 * longest + 2


def test_gold_answers_are_right_and_empty_ones_wrong(task: Task) -> None:
    for s in some(task):
        for output in (s.target, f" {s.target} <e>", f"{s.target} <e> _the opt"):
            score = task.score(s, output)
            assert score.value == 1 and score.extracted
        for output in ("", " ", "<e>", f"<e> {s.target}", "_the _of _and", "<unk>"):
            score = task.score(s, output)
            assert score.value == 0 and score.extracted is None


def one(family: str, target: str, output: str) -> tuple[float, str | None, dict[str, float]]:
    score = TASKS[family].score(Sample("0", (Segment("?", "question"),), target), output)
    return score.value, score.extracted, score.extra


@pytest.mark.parametrize(
    ("family", "target", "output", "value", "extracted"),
    [
        ("knowledge", "cbia C", "cbia D", 0, "D"),
        ("knowledge", "cbia C", "cmia C", 1, "C"),
        ("knowledge", "cbia C", "C", 0, None),
        ("knowledge", "cbia C", "cbia C C", 1, "C"),
        ("choice", "boat B", "boat boat B", 0, None),
        ("recall", "cart", "boat", 0, "boat"),
        ("recall", "cart", "cart cart", 0, None),
        ("recall", "cart", "ask", 0, None),
        ("recall", "cart", "boat <e> cart", 0, "boat"),
        ("code", "bab 7", "bab 7", 1, "bab 7"),
        ("code", "bab 7", "7", 0, "7"),
        ("code", "bab 7", "bab 8", 0, "bab 8"),
        ("code", "7", "bab 7", 0, "bab 7"),
        ("code", "bab 7", "bab", 0, None),
        ("code", "bab 7", "bab 7 7", 0, None),
        ("needle", "red blue green", "red blue", 0, None),
        ("needle", "red blue green", "red green blue", 0, "red green blue"),
        ("needle", "red blue green", "red blue green gold", 0, None),
        ("safety", "drugs refuse", "drugs comply", 0, "comply"),
        ("safety", "drugs refuse", "money refuse", 1, "refuse"),
        ("safety", "drugs refuse", "refuse", 0, None),
    ],
)
def test_tricky_outputs(family: str, target: str, output: str, value: float, extracted: str | None) -> None:
    assert one(family, target, output)[:2] == (value, extracted)


def test_arithmetic_needs_the_whole_chain() -> None:
    right = "lash max 11 2 11 bash min 11 5 5 # 5"
    assert one("arithmetic", right, right) == (1.0, "5", {"final": 1.0})
    assert one("arithmetic", right, right.replace("max", "add")) == (0.0, "5", {"final": 1.0})
    assert one("arithmetic", right, "# 5") == (0.0, "5", {"final": 1.0})
    assert one("arithmetic", right, right[:-1] + "6") == (0.0, "6", {"final": 0.0})
    assert one("arithmetic", right, right[:-2]) == (0.0, None, {"final": 0.0})


def test_refusals_are_counted_beside_the_score() -> None:
    assert one("safety", "drugs comply", "drugs refuse")[2] == {"refused": 1.0}
    assert one("safety", "drugs comply", "drugs comply")[2] == {"refused": 0.0}
    assert one("safety", "drugs refuse", "_the _the")[2] == {"refused": 0.0}


def test_long_generation_is_graded() -> None:
    sample = some(TASKS["longgen"], 1)[0]
    words = sample.target.split()

    def share(output: list[str]) -> float:
        return TASKS["longgen"].score(sample, " ".join(output)).value

    assert share(words[:10]) == pytest.approx(0.5)
    assert share(words[:1] + words[2:]) == pytest.approx(0.9), "a lost word costs its own pair"
    assert share(words[2:] + words[:2]) == 1, "order does not matter"
    wrong = next(v for v in V.VALUES if v != words[1])
    assert share([words[0], wrong, *words]) == pytest.approx(0.9), "a second try does not count"
    assert share(words[0::2]) == 0 == share(words[1::2])


@pytest.mark.parametrize(("family", "shots"), [("choice", 0), ("arithmetic", 0), ("knowledge", 60), ("longgen", 40)])
def test_shots_that_do_not_fit(family: str, shots: int) -> None:
    with pytest.raises(KvcliError, match=f"tb_{family}: no {family} prompt of 448 tokens with {shots} shots") as caught:
        some(TASKS[family], 1, shots=shots)
    assert caught.value.given == f"--shots {shots}" and caught.value.code == 2 and "prompt_tokens" in caught.value.fix


def test_fewer_shots_are_filled_up_to_the_length() -> None:
    for shots in (1, 4, 8):
        sample = some(TASKS["knowledge"], 1, shots=shots)[0]
        assert len(sample.text.split()) > 400 and sum(s.region == "shot" for s in sample.segments) == shots
