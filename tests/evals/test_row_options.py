"""multiple_choice of row tasks: options and right ones as lm-evaluation-harness resolves them, groups of exemplars."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvcli.errors import KvcliError
from kvcli.evals.loader import find_tasks
from kvcli.evals.spec import Sample, Task

HEAD = 'task: mine\noutput_type: multiple_choice\ndoc_to_text: "{{q}}\\nAnswer:"\n'
LETTERS = HEAD + "doc_to_choice: [A, B, C]\ndoc_to_target: gold\n"
FIELD = HEAD + "doc_to_choice: texts\ndoc_to_target: gold\n"


class Place:
    def __init__(self, root: Path) -> None:
        self.root = root

    def split(self, name: str, rows: list[dict[str, Any]]) -> Path:
        path = self.root / "data" / "mine" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def task(self, yaml: str) -> Task:
        (self.root / "mine.yaml").write_text(yaml)
        return find_tasks([str(self.root / "mine.yaml")])[0]

    def samples(self, yaml: str, shots: int = 0, **more: Any) -> list[Sample]:
        made = {"shot_seed": 0, "limit": None, "data_dir": str(self.root / "data"), **more}
        return sorted(self.task(yaml).samples(shots=shots, **made), key=lambda s: int(s.id))

    def one(self, yaml: str, **row: Any) -> Sample:
        self.split("test", [row])
        return self.samples(yaml)[0]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.mark.parametrize(
    ("yaml", "row", "options", "target"),
    [
        (LETTERS, {"gold": 2}, (" A", " B", " C"), 2),
        (LETTERS, {"gold": "B"}, (" A", " B", " C"), 1),
        (FIELD, {"gold": 0, "texts": ["no", "yes"]}, (" no", " yes"), 0),
        (FIELD, {"gold": True, "texts": ["no", "yes"]}, (" no", " yes"), 1),
        (FIELD, {"gold": "yes", "texts": ["no", "yes"]}, (" no", " yes"), 1),
        (FIELD, {"gold": "7", "texts": [5, 7]}, (" 5", " 7"), 1),
        (FIELD, {"gold": 1, "texts": ["é", 'it\'s "so"\n']}, (" é", ' it\'s "so"\n'), 1),
        (
            HEAD + 'doc_to_choice: "{{c.text}}"\ndoc_to_target: "{{c.label.index(gold)}}"\n',
            {"gold": "2", "c": {"label": ["1", "2", "3", "4"], "text": ["a", "b's", 'c"', "d"]}},
            (" a", " b's", ' c"', " d"),
            1,
        ),
        (HEAD + 'doc_to_choice: "{{[x, y]}}"\ndoc_to_target: "{{x}}"\n', {"x": "l", "y": "r"}, (" l", " r"), 0),
        (HEAD + "doc_to_choice: \"['{{x}}', 'not']\"\ndoc_to_target: \"1\"\n", {"x": "so"}, (" so", " not"), 1),
        (LETTERS + 'target_delimiter: ""\n', {"gold": 0}, ("A", "B", "C"), 0),
        (HEAD + "doc_to_choice: [1, 2]\ndoc_to_target: gold\n", {"gold": 1}, (" 1", " 2"), 1),
    ],
)
def test_options_and_the_right_one(
    place: Place, yaml: str, row: dict[str, Any], options: tuple[str, ...], target: int
) -> None:
    sample = place.one(yaml, q="which?", **row)
    assert (sample.options, sample.target) == (options, target)
    assert sample.text == "which?\nAnswer:", "the blank belongs to the option"


@pytest.mark.parametrize(
    ("yaml", "row", "what"),
    [
        (LETTERS, {"gold": 3}, "the right answer is option 3, and the options are 0 to 2"),
        (LETTERS, {"gold": -1}, "the right answer is option -1"),
        (LETTERS, {"gold": "D"}, "the right answer 'D' is none of the options A, B, C"),
        (LETTERS, {"gold": ""}, "the right answer '' is none of"),
        (LETTERS, {"gold": None}, "the right answer None is none of"),
        (LETTERS, {"gold": 1.5}, "the right answer 1.5 is none of"),
        (LETTERS, {"gold": [0, 1]}, "is none of the options"),
        (LETTERS, {}, "no field 'gold'"),
        (FIELD, {"gold": 0}, "no field 'texts'"),
        (FIELD, {"gold": 0, "texts": "ab"}, "'texts' is text, not a list"),
        (FIELD, {"gold": 0, "texts": None}, "'texts' is null, not a list"),
        (FIELD, {"gold": 0, "texts": ["a"]}, "the number of options is 1"),
        (FIELD, {"gold": 0, "texts": []}, "the number of options is 0"),
        (FIELD, {"gold": 0, "texts": ["a", None]}, "an option is None, not text"),
        (FIELD, {"gold": 0, "texts": ["a", " "]}, "an option is ' ', not text"),
        (FIELD, {"gold": "1", "texts": ["a", "b"]}, "the right answer '1' is none of"),
        (HEAD + 'doc_to_choice: "{{q}}"\ndoc_to_target: "0"\n', {}, "gives 'which.', not a list"),
        (HEAD + 'doc_to_choice: "{{c.text}}"\ndoc_to_target: "0"\n', {"c": {}}, "has no attribute 'text'"),
        (
            HEAD + 'doc_to_choice: "{{c.text}}"\ndoc_to_target: "{{c.label.index(gold)}}"\n',
            {"gold": "E", "c": {"label": ["A", "B"], "text": ["a", "b"]}},
            "'E' is not in list",
        ),
    ],
)
def test_rows_without_usable_options_are_named(place: Place, yaml: str, row: dict[str, Any], what: str) -> None:
    path = place.split("test", [{"q": "which?", **row}])
    with pytest.raises(KvcliError, match=what) as caught:
        place.samples(yaml)
    assert caught.value.what.startswith(f"{path}:1: ") and caught.value.code == 2 and "\n" not in caught.value.what


def test_a_harmful_row_is_not_quoted(place: Place) -> None:
    place.split("test", [{"q": "secret words", "gold": "secret words"}])
    with pytest.raises(KvcliError, match="the templates do not fit this row") as caught:
        place.samples(LETTERS + "harmful: true\n")
    assert "secret" not in " ".join(caught.value.lines())


@pytest.mark.parametrize(
    ("yaml", "what"),
    [
        (HEAD + "doc_to_target: gold\n", "needs a line doc_to_choice"),
        (LETTERS + "metric_list: [{metric: f1}]\n", "can hold acc and acc_norm"),
        (LETTERS.replace("[A, B, C]", "'{{texts'"), "not a template"),
        (LETTERS.replace("[A, B, C]", "[yes, no]"), "must be text, not True"),
        (LETTERS.replace("[A, B, C]", "['', b]"), "empty option"),
        (LETTERS + 'description: "{{"\n', "not a template"),
    ],
)
def test_definitions_that_cannot_work(place: Place, yaml: str, what: str) -> None:
    with pytest.raises(KvcliError, match=what) as caught:
        place.task(yaml)
    assert caught.value.code == 2 and "mine.yaml" in caught.value.what


def test_metrics_of_a_choice(place: Place) -> None:
    """acc: the likeliest option; acc_norm: per character, which favours the long one here."""
    lls, row = [-2.0, -3.0], {"q": "?", "gold": 1, "texts": ["a", "a long one"]}
    sample = place.one(FIELD, **row)
    for extra, metric, value, chosen in (
        ("", "acc", 0.0, "a"),
        ("metric_list: [{metric: acc}]\n", "acc", 0.0, "a"),
        ("metric_list: [{metric: acc_norm}, {metric: acc}]\n", "acc_norm", 1.0, "a long one"),
    ):
        task = place.task(FIELD + extra)
        score = task.choose(sample, lls)
        assert (task.metric, score.value, score.extracted) == (metric, value, chosen)
        assert score.extra == {"acc": 0.0, "acc_norm": 1.0} and task.output_type == "multiple_choice"


def test_the_answer_of_a_shot_is_the_choice(place: Place) -> None:
    place.split("train", [{"q": "t?", "gold": 1, "texts": ["no", "yes"], "why": "since so, yes"}])
    place.split("test", [{"q": "which?", "gold": 0, "texts": ["l", "r"]}])
    for extra, text in (
        ("", "t?\nAnswer: yes\n\nwhich?\nAnswer:"),
        ("fewshot_config: {doc_to_choice: [N, Y]}\n", "t?\nAnswer: Y\n\nwhich?\nAnswer:"),
        ("fewshot_config: {doc_to_target: why}\n", "t?\nAnswer: since so, yes\n\nwhich?\nAnswer:"),
    ):
        (sample,) = place.samples(FIELD + "fewshot_split: train\n" + extra, shots=1)
        assert sample.text == text and sample.options == (" l", " r")


def test_generated_answers_of_rows_with_options(place: Place) -> None:
    """`generate_until` with doc_to_choice: the right answer is the option's text; a letter out of range is an error."""
    yaml = LETTERS.replace("multiple_choice", "generate_until")
    sample = place.one(yaml, q="?", gold=1)
    assert (sample.target, sample.options) == ("B", ()) and place.task(yaml).score(sample, " B").value == 1
    place.split("test", [{"q": "?", "gold": 0}, {"q": "?", "gold": 3}])
    with pytest.raises(KvcliError, match=r"test\.jsonl:2: the right answer is option 3"):
        place.samples(yaml)


GROUPED = LETTERS + "fewshot_split: dev\nfewshot_config: {sampler: first_n, group: topic}\n"


def grouped(place: Place) -> None:
    place.split("dev", [{"q": f"{t}{i}", "gold": i % 3, "topic": t} for i in range(4) for t in ("x", "y")])
    place.split("test", [{"q": "?", "gold": 0, "topic": t} for t in ("y", "x", "y")])


def shots_of(sample: Sample) -> list[str]:
    return [s.text[:2] for s in sample.segments if s.region == "shot"]


def test_exemplars_of_the_rows_own_group(place: Place) -> None:
    grouped(place)
    samples = place.samples(GROUPED, shots=3)
    assert [shots_of(s) for s in samples] == [["y0", "y1", "y2"], ["x0", "x1", "x2"], ["y0", "y1", "y2"]]
    assert samples[0].segments[:-1] is not samples[2].segments[:-1] and samples[0].segments[0] is samples[2].segments[0]
    assert [shots_of(s)[:2] for s in samples] == [shots_of(s) for s in place.samples(GROUPED, shots=2)]
    seeded = place.samples(GROUPED, shots=4, shot_seed=3)
    assert sorted(shots_of(seeded[0])) == ["y0", "y1", "y2", "y3"] != shots_of(seeded[0])
    turned = place.samples(GROUPED, shots=4, shot_order=1)
    assert sorted(shots_of(turned[0])) == ["y0", "y1", "y2", "y3"] != shots_of(turned[0])
    assert [s.shot for s in turned[0].segments[:-1]] == [0, 1, 2, 3]


def test_a_group_with_too_few_exemplars(place: Place) -> None:
    grouped(place)
    with pytest.raises(KvcliError, match=r"4 exemplars of '[xy]' in dev for this row") as caught:
        place.samples(GROUPED, shots=5)
    assert caught.value.given == "--shots 5" and caught.value.fix == "--shots 4 or fewer"
    path = place.split("test", [{"q": "?", "gold": 0, "topic": "z"}])
    with pytest.raises(KvcliError, match="0 exemplars of 'z'") as caught:
        place.samples(GROUPED, shots=1)
    assert caught.value.what.startswith(f"{path}:1: ") and "--shots 0" in caught.value.fix
    place.split("test", [{"q": "?", "gold": 0}])
    with pytest.raises(KvcliError, match="no field 'topic'"):
        place.samples(GROUPED, shots=1)
    assert place.samples(GROUPED)[0].text == "?\nAnswer:", "without shots no group is asked for"


def test_a_description_over_the_row(place: Place) -> None:
    grouped(place)
    text = "description: \"About {{topic|replace('x', 'the ex')}}.\\n\\n\"\n"
    samples = place.samples(GROUPED + text)
    assert [s.segments[0].text for s in samples[:2]] == ["About y.\n\n", "About the ex.\n\n"]
    assert {s.segments[0].region for s in samples} == {"system"}
    assert place.samples(GROUPED + "description: topic\n")[1].text == "x?\nAnswer:"
    assert place.samples(GROUPED + "description: 'Answer. '\n")[1].text == "Answer. ?\nAnswer:"
    with pytest.raises(KvcliError, match=r"test\.jsonl:\d: no field 'theme'"):
        place.samples(GROUPED + 'description: "{{theme}}"\n')


def test_a_row_and_its_copies_are_never_its_exemplars(place: Place) -> None:
    rows = [{"q": f"q{i}", "gold": 0, "topic": "x"} for i in (0, 0, 1, 2, 3)]
    place.split("test", rows)
    yaml = LETTERS + "fewshot_split: test\nfewshot_config: {group: topic}\n"
    for sample in place.samples(yaml, shots=3):
        assert sample.segments[-1].text[:2] not in shots_of(sample)
    with pytest.raises(KvcliError, match="3 exemplars of 'x' in test for this row"):
        place.samples(yaml, shots=4)


def test_parallel_tasks_take_the_same_rows_and_shots(place: Place) -> None:
    place.split("test", [{"q": f"q{i}", "gold": 0} for i in range(30)])
    place.split("train", [{"q": f"t{i}", "gold": 0} for i in range(30)])

    def chosen(name: str, extra: str) -> list[tuple[str, str, list[str]]]:
        yaml = LETTERS.replace("task: mine", f"task: {name}") + "fewshot_split: train\ndataset_path: me/mine\n" + extra
        (place.root / "mine.yaml").write_text(yaml)
        (task,) = find_tasks([str(place.root / "mine.yaml")])
        data_dir = str(place.root / "data")
        samples = task.samples(shots=3, shot_seed=1, limit=5, data_dir=data_dir)
        return [(s.id, s.cluster, shots_of(s)) for s in samples]

    first, second = chosen("one", "parallel: both\n"), chosen("two", "parallel: both\n")
    assert first == second and {c for _, c, _ in first} == {f"both/{i}" for i, _, _ in first}
    assert [i for i, _, _ in chosen("one", "")] != [i for i, _, _ in first]
    assert [(i, s) for i, _, s in chosen("both", "")] == [(i, s) for i, _, s in first], "as the task of that name"
    assert {c for _, c, _ in chosen("two", "parallel: both\ncluster: gold\n")} == {"0"}
