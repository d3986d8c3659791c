"""niah: prompts of the asked length for any tokenizer, the needle at its depth, and its two scores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcli.errors import KvcliError
from kvcli.evals.haystack import filler, haystack, made_up, sentence_starts, words
from kvcli.evals.lengths import fitted
from kvcli.evals.loader import find_tasks
from kvcli.evals.spec import Sample, Task

SHARED = Path(__file__).parents[3] / "shared"
TOKENIZERS = ["gpt2", "TinyLlama-1.1B-Chat-v1.0", "Qwen2.5-0.5B-Instruct", "Qwen3-8B"]
CITY = "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day."


def characters(text: str) -> int:
    return len(text)


def niah(settings: str = "") -> Task:
    return find_tasks([f"niah:{settings}" if settings else "niah"])[0]


def some(task: Task, limit: int | None = 12, data_dir: str | None = None, **options: Any) -> list[Sample]:
    return task.samples(shots=0, shot_seed=0, limit=limit, data_dir=data_dir, **options)


def counting(name: str) -> Callable[[str], int]:
    from transformers import AutoTokenizer

    if not (SHARED / "tokenizers" / name).is_dir():
        pytest.skip(f"no tokenizer in {SHARED / 'tokenizers' / name}")
    tokenizer = AutoTokenizer.from_pretrained(str(SHARED / "tokenizers" / name))
    return lambda text: len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


@pytest.mark.shared
@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("length", [128, 4096])
@pytest.mark.parametrize("own", [True, False])
def test_a_prompt_is_at_most_8_tokens_shorter_than_asked(name: str, length: int, own: bool) -> None:
    tokens = counting(name)
    if not own and not (SHARED / "data" / "niah_haystack").is_dir():
        pytest.skip("no haystack texts")
    data_dir = None if own else str(SHARED / "data")
    for sample in some(niah(f"length={length}"), 3, data_dir, tokens=tokens):
        assert length - 8 <= tokens(sample.text) <= length
        assert sample.id.endswith("-own") == own


@pytest.mark.shared
def test_the_prompt_reaches_the_model_at_that_length() -> None:
    from transformers import AutoTokenizer

    from kvcli.models.prompt import build_prompt

    tokens = counting("Qwen3-8B")
    loaded = AutoTokenizer.from_pretrained(str(SHARED / "tokenizers" / "Qwen3-8B"))
    for sample in some(niah("length=512"), 5, tokens=tokens):
        raw = build_prompt(sample, loaded, template="raw", max_new_tokens=0)
        assert 504 <= len(raw.ids) <= 512
        assert [r.kind for r in raw.regions] == ["system", "context", "question"]
        chat = build_prompt(sample, loaded, max_new_tokens=0)
        assert len(raw.ids) < len(chat.ids) < len(raw.ids) + 30


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
def test_the_needle_stands_at_its_depth_between_two_sentences(depth: float) -> None:
    for sample in some(niah(f"length=20000,depth={depth},repeats=8"), None, tokens=characters):
        text = sample.segments[1].text
        assert sample.text.count(CITY) == 1
        at = text.index(CITY)
        assert depth == pytest.approx(at / (len(text) - len(CITY)), abs=0.01)
        assert at == 0 or text[:at].rstrip().endswith((".", "!", "?", '"')) or depth == 1
        if depth == 1:
            assert text.endswith(CITY)
        assert sample.meta == {"depth": depth, "length": 20000}


def test_a_repeat_has_one_text_and_needle_at_all_depths() -> None:
    task = niah("length=6000,needle=number,repeats=3")
    by_repeat: dict[str, list[Sample]] = {}
    for sample in some(task, None, tokens=characters):
        by_repeat.setdefault(sample.cluster, []).append(sample)
    assert len(by_repeat) == 3 and {len(each) for each in by_repeat.values()} == {11}
    answers = set()
    for each in by_repeat.values():
        assert len({s.target for s in each}) == 1 and len({s.meta["depth"] for s in each}) == 11
        needle = f"The special magic number of San Francisco is {each[0].target}."
        texts = [" ".join(s.segments[1].text.replace(needle, " ").split())[:5000] for s in each]
        assert len(set(texts)) == 1
        answers.add(each[0].target)
    assert len(answers) == 3


def test_ids_are_unique_and_limits_nested() -> None:
    task = niah("length=3000")
    ids = [s.id for s in some(task, None, tokens=characters)]
    assert len(set(ids)) == 110 and [s.id for s in some(task, 7, tokens=characters)] == ids[:7]


def test_without_a_tokenizer_the_right_answers_are_the_same() -> None:
    """Stored outputs can be judged again where there is no tokenizer."""
    task = niah("length=2000,needle=number")
    there, here = some(task, None, tokens=characters), some(task, None)
    assert [(s.id, s.target, s.meta) for s in there] == [(s.id, s.target, s.meta) for s in here]


def test_gold_answers_score_1_and_nothing_scores_0() -> None:
    for settings in ("length=2000", "length=2000,needle=number"):
        task = niah(settings)
        for sample in some(task, 20, tokens=characters):
            good = task.score(sample, f"You should {sample.target}.")
            assert good.value == 1 and good.extra == {"depth": sample.meta["depth"], "length": 2000}
            assert (task.score(sample, " \n").value, task.score(sample, "").extracted) == (0, None)


@pytest.mark.parametrize(
    ("output", "value"),
    [
        ("EAT A SANDWICH, and sit in Dolores Park on a sunny day!", 1),
        ("Dolores Park, sunny day: sit; eat sandwich", 1),
        ("sit in Dolores Park", 3 / 7),
        ("a and in on a and in on", 0),
        ("Visit the Golden Gate Bridge in the evening and on Sunday", 0),
        ("sandwiches", 0),
    ],
)
def test_the_share_of_the_answer_s_words(output: str, value: float) -> None:
    task = niah("length=1000")
    assert task.score(some(task, 1, tokens=characters)[0], output).value == pytest.approx(value)


def test_settings_that_cannot_work_are_refused() -> None:
    for text in ("niah:depth=1.5", "niah:length=0", "niah:needle=pin", "niah:repeats=0"):
        with pytest.raises(KvcliError):
            find_tasks([text])
    with pytest.raises(KvcliError, match="no prompt has as few as 50 tokens") as caught:
        some(niah("length=50"), 1, tokens=characters)
    assert "niah:length=" in caught.value.fix
    with pytest.raises(KvcliError, match="has no exemplars"):
        niah().samples(shots=1, shot_seed=0, limit=1, data_dir=None)


def test_haystacks_come_from_the_data_folder(tmp_path: Path) -> None:
    assert haystack(str(tmp_path)).own and haystack(None).text == filler()
    folder = tmp_path / "niah_haystack"
    folder.mkdir()
    with pytest.raises(KvcliError, match="no text in"):
        haystack(str(tmp_path))
    (folder / "b.txt").write_text("Two.\n")
    (folder / "a.txt").write_text("One.")
    assert haystack(str(tmp_path)).text == "One.\n\nTwo." and not haystack(str(tmp_path)).own
    (sample, *_) = some(niah("length=900"), 3, str(tmp_path), tokens=characters)
    assert sample.segments[1].text.count("One.") > 5 and not sample.id.endswith("own")
    (folder / "c.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(KvcliError, match=r"cannot read .*c\.txt"):
        haystack(str(tmp_path))


def test_kvcli_s_own_text_says_little() -> None:
    """No digits, no needle, hardly a sentence twice, long enough for 128k tokens."""
    text = filler()
    assert len(text) > 600_000 and not any(c.isdigit() for c in text)
    assert "San Francisco" not in text and "magic" not in text
    sentences = text.replace("\n", " ").split(". ")
    assert len(set(sentences)) > 0.99 * len(sentences)
    assert len(sentence_starts(text)) == len(sentences)


def test_made_up_words_differ_and_longer_lists_begin_with_shorter_ones() -> None:
    assert len(set(made_up(9000))) == 9000 and made_up(9000)[:500] == made_up(500)


def test_word_lists_come_from_the_data_folder_then_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "ruler" / "words"
    folder.mkdir(parents=True)
    for name, text in (("nounlist", "cat\ndog\n"), ("adjectivelist", "big\n"), ("verblist", "run\n")):
        (folder / f"{name}.txt").write_text(text)
    found = words(str(tmp_path))
    assert (found.nouns, found.adjectives, found.verbs, found.own) == (("cat", "dog"), ("big",), ("run",), False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert words(None).own and len(words(None).nouns) == 6800


@given(
    most=st.integers(1, 5000), guess=st.integers(1, 9000), least=st.integers(1, 50),
    rate=st.floats(0.2, 9), fixed=st.integers(0, 300), slack=st.integers(0, 9),
)  # fmt: skip
def test_fitting_finds_the_largest_that_fits(
    most: int, guess: int, least: int, rate: float, fixed: int, slack: int
) -> None:
    """Against trying every n: without slack the largest one, with it one at most that many tokens short."""
    calls: list[int] = []

    def tokens(text: str) -> int:
        calls.append(len(text))
        return fixed + int(rate * len(text))

    n = fitted(lambda n: "x" * n, tokens, most, guess, least, slack)
    used = len(calls)
    fits = [k for k in range(least, int((most + 1) / rate) + least + 2) if fixed + int(rate * k) <= most]
    best = max(fits, default=least - 1)
    assert n == best or (n in fits and most - (fixed + int(rate * n)) <= slack)
    assert used <= 24


def test_fitting_ends_where_a_text_stops_growing() -> None:
    assert fitted(lambda n: "x" * min(n, 10), len, 50, 1) > 5000
