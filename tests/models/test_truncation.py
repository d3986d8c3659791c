"""Prompts that are cut: which tokens go, what stays consistent, and what is never cut."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcli.errors import KvcliError
from kvcli.evals.loader import load_task
from kvcli.evals.spec import Sample, Segment
from kvcli.models.prompt import Prompt, build_prompt
from kvcli.models.truncation import CUTTABLE, SIDES, kept_tokens
from kvcli.testbed.model import build_tokenizer
from tests.models.golden.views import GPT2, REAL, VIEWS, View, real

FIXED = ("special", "system", "question")
on_each_side = pytest.mark.parametrize("side", SIDES)
in_each_view = pytest.mark.parametrize("view", VIEWS, ids=[view.name for view in VIEWS])

LONG = Sample(
    "7",
    (
        Segment("Answer from the notes.\n\n", "system"),
        Segment("".join(f"Note {i}: the {i}th dog of 北京 is {i} years old 🙂.\n" for i in range(40)), "context"),
        Segment("Q: How old is dog 3?\nA: 3\n\n", "shot", 0),
        Segment("Q: How old is dog 5?\nA: 5\n\n", "shot", 1),
        Segment("Q: How old is the naïve dog?\nA:", "question"),
    ),
    "7",
)


def characters(n: int) -> list[tuple[int, int]]:
    """Spans of n tokens of one character each."""
    return [(i, i + 1) for i in range(n)]


def texts(prompt: Prompt, *kinds: str) -> str:
    return "".join(prompt.span_text((r.start, r.end)) for r in prompt.regions if r.kind in kinds)


def ids_of(prompt: Prompt, *kinds: str) -> list[int]:
    return [i for r in prompt.regions if r.kind in kinds for i in prompt.ids[r.start : r.end]]


def longbench(n: int, most: int) -> list[int]:
    """pred.py: half of max_length from the front and half from the back."""
    half = int(most / 2)
    return list(range(n))[:half] + list(range(n))[-half:]


@pytest.mark.parametrize(("n", "most"), [(100, 40), (101, 40), (100, 98), (7, 2)])
def test_the_middle_is_longbench_s(n: int, most: int) -> None:
    assert kept_tokens(["context"] * n, characters(n), most, "middle") == longbench(n, most)
    framed = ["system"] * (most // 4) + ["context"] * (n - most // 2) + ["question"] * (most // 2 - most // 4)
    assert kept_tokens(framed, characters(n), most, "middle") == longbench(n, most), "instructions count as tokens kept"


def test_an_odd_limit_is_used_up() -> None:
    assert kept_tokens(["context"] * 10, characters(10), 5, "middle") == [0, 1, 7, 8, 9]


def test_left_takes_the_earliest_tokens_that_may_go() -> None:
    kinds = ["special", "system", "context", "context", "system", "shot", "shot", "question"]
    assert kept_tokens(kinds, characters(8), 5, "left") == [0, 1, 4, 6, 7]
    assert kept_tokens(kinds, characters(8), 4, "left") == [0, 1, 4, 7]
    assert kept_tokens(kinds, characters(8), 3, "left") is None


def test_the_middle_goes_round_what_is_never_cut_and_moves_where_an_end_has_too_little() -> None:
    round_it = [*["context"] * 4, *["system"] * 2, *["context"] * 4]
    assert kept_tokens(round_it, characters(10), 6, "middle") == [0, 1, 2, 4, 5, 9]
    late = [*["shot"] * 6, *["question"] * 4]
    assert kept_tokens(late, characters(10), 6, "middle") == [0, 1, 6, 7, 8, 9]
    early = [*["special"] * 6, *["shot"] * 4]
    assert kept_tokens(early, characters(10), 7, "middle") == [0, 1, 2, 3, 4, 5, 9]


@on_each_side
def test_a_character_stays_whole_or_goes(side: str) -> None:
    """Tokens 2, 3, 4 are bytes of one character."""
    spans = [(0, 1), (1, 2), (2, 3), (2, 3), (2, 3), (3, 4), (4, 5)]
    for most in range(1, 7):
        kept = kept_tokens(["context"] * 7, spans, most, side)
        assert kept is not None and len(kept) <= most
        assert len({2, 3, 4} & set(kept)) in (0, 3), most


KINDS = st.lists(st.sampled_from([*CUTTABLE, *FIXED]), min_size=1, max_size=30)


@given(KINDS, st.integers(1, 30), st.sampled_from(SIDES))
def test_what_is_kept_of_any_prompt(kinds: list[str], most: int, side: str) -> None:
    n, fixed = len(kinds), [i for i, kind in enumerate(kinds) if kind in FIXED]
    most = min(most, n)
    kept = kept_tokens(kinds, characters(n), most, side)
    if kept is None:
        assert len(fixed) > most
        return
    assert len(kept) == most and kept == sorted(set(kept)) and set(fixed) <= set(kept)
    free = [i for i in range(n) if i not in fixed]
    gone = [at for at, i in enumerate(free) if i not in kept]
    assert gone == list(range(gone[0], gone[0] + len(gone))) if gone else True, "one stretch of what may be cut"


@pytest.mark.shared
@on_each_side
@in_each_view
def test_a_cut_prompt_is_consistent(view: View, side: str) -> None:
    whole = view.build(LONG, system="Be brief.")
    most = len(whole.ids) - 300
    prompt = view.build(LONG, system="Be brief.", max_prompt_tokens=most, truncate=side)
    assert most - 8 <= len(prompt.ids) <= most and prompt.truncated == len(whole.ids) - len(prompt.ids)
    for kind in FIXED:
        assert ids_of(prompt, kind) == ids_of(whole, kind) and texts(prompt, kind) == texts(whole, kind)
    edges = [r.start for r in prompt.regions] + [len(prompt.ids)]
    assert edges[0] == 0 and all(r.end == e > r.start for r, e in zip(prompt.regions, edges[1:], strict=True))
    assert len(prompt.offsets) == len(prompt.ids) and prompt.offsets[-1] == len(prompt.text)
    assert "".join(prompt.token_text(i) for i in range(len(prompt.ids))) == prompt.text
    assert prompt.sha != whole.sha


@pytest.mark.shared
@on_each_side
@pytest.mark.parametrize("name", REAL)
def test_text_and_tokens_agree_at_the_seam(name: str, side: str) -> None:
    """Each token has the text it had; decoded, the tokens that are left are the text that is left."""
    tokenizer = real(name)
    whole = build_prompt(LONG, tokenizer, template="raw")
    for most in range(len(whole.ids) - 12, len(whole.ids) - 3):
        prompt = build_prompt(LONG, tokenizer, template="raw", max_prompt_tokens=most, truncate=side)
        decoded = tokenizer.decode(prompt.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert "\ufffd" not in decoded and decoded.strip() == prompt.text.strip()
        pairs = [(whole.ids[i], whole.token_text(i)) for i in range(len(whole.ids))]
        left = [(prompt.ids[i], prompt.token_text(i)) for i in range(len(prompt.ids))]
        at = next(i for i, pair in enumerate(left) if pair != pairs[i])
        assert left == pairs[:at] + pairs[at + prompt.truncated :], "one stretch was cut, nothing else changed"


@pytest.mark.shared
def test_a_shot_that_lost_a_part_is_that_shot_and_a_lost_one_is_gone() -> None:
    shots = [Segment(f"Q: Is {i} a number?\nA: Yes, {i} is one.\n\n", "shot", i) for i in range(5)]
    sample = Sample("1", (*shots, Segment("Q: Is 9?\nA:", "question")), "")
    whole = build_prompt(sample, real(GPT2))
    size = len(whole.regions[0])
    prompt = build_prompt(sample, real(GPT2), max_prompt_tokens=len(whole.ids) - size - 4, truncate="left")
    assert [(r.label, len(r)) for r in prompt.regions[:2]] == [("shot 1", size - 4), ("shot 2", size)]
    assert [r.label for r in prompt.regions] == ["shot 1", "shot 2", "shot 3", "shot 4", "question"]
    middle = build_prompt(sample, real(GPT2), max_prompt_tokens=len(whole.ids) - 2 * size, truncate="middle")
    assert "shot 0" in {r.label for r in middle.regions} and "shot 2" not in {r.label for r in middle.regions}
    cut = build_prompt(sample, real(GPT2), max_prompt_tokens=len(whole.regions[-1]), truncate="left")
    assert [r.label for r in cut.regions] == ["question"] and cut.text == "Q: Is 9?\nA:"


@pytest.mark.shared
@on_each_side
def test_room_is_left_for_the_answer_and_for_the_longest_option(side: str) -> None:
    tokenizer = real(GPT2)
    asked = Sample("1", LONG.segments, 0, options=(" 7", " the naïve one"))
    longest = max(map(len, build_prompt(asked, tokenizer).options))
    prompt = build_prompt(asked, tokenizer, context_limit=300, max_new_tokens=100, truncate=side)
    assert 292 <= len(prompt.ids) + longest <= 300
    assert prompt.options == build_prompt(asked, tokenizer).options
    generated = build_prompt(LONG, tokenizer, context_limit=300, max_new_tokens=100, truncate=side)
    assert 192 <= len(generated.ids) <= 200
    both = build_prompt(LONG, tokenizer, context_limit=300, max_new_tokens=100, max_prompt_tokens=150, truncate=side)
    assert 142 <= len(both.ids) <= 150


@pytest.fixture(scope="module")
def testbed() -> Any:
    return build_tokenizer()


@on_each_side
def test_a_prompt_that_fits_loses_nothing(testbed: Any, side: str) -> None:
    sample = load_task("tb_knowledge").samples(shots=4, shot_seed=0, limit=1, data_dir=None)[0]
    whole = build_prompt(sample, testbed)
    n = len(whole.ids)
    assert build_prompt(sample, testbed, truncate=side) == whole and whole.truncated == 0
    assert build_prompt(sample, testbed, truncate=side, max_prompt_tokens=n, context_limit=n) == whole
    assert build_prompt(sample, testbed, truncate=side, max_prompt_tokens=n - 1).truncated == 1


def test_what_must_stay_is_too_long(testbed: Any) -> None:
    sample = load_task("tb_knowledge").samples(shots=4, shot_seed=0, limit=1, data_dir=None)[0]
    whole = build_prompt(sample, testbed)
    n, fixed = len(whole.ids), sum(len(r) for r in whole.regions if r.kind in FIXED)
    with pytest.raises(
        KvcliError, match=rf"{n} tokens, {fixed} of which are never cut, more than .* {fixed - 1}$"
    ) as e:
        build_prompt(sample, testbed, max_prompt_tokens=fixed - 1, truncate="left")
    assert e.value.fix == f"--max-prompt-tokens {fixed}, or fewer --shots"
    with pytest.raises(KvcliError, match=rf"{n} tokens, {fixed} of which .* and 9 new ones, its context is {fixed}$"):
        build_prompt(sample, testbed, context_limit=fixed, max_new_tokens=9, truncate="middle")
    assert len(build_prompt(sample, testbed, max_prompt_tokens=fixed, truncate="left").ids) == fixed


def test_without_truncate_the_message_names_it_where_it_helps(testbed: Any) -> None:
    sample = load_task("tb_knowledge").samples(shots=4, shot_seed=0, limit=1, data_dir=None)[0]
    n = len(build_prompt(sample, testbed).ids)
    with pytest.raises(KvcliError, match="more than --max-prompt-tokens") as caught:
        build_prompt(sample, testbed, max_prompt_tokens=n - 1)
    assert caught.value.fix == f"--max-prompt-tokens {n}, fewer --shots, or --truncate middle"
    with pytest.raises(KvcliError, match="does not fit the model") as caught:
        build_prompt(sample, testbed, context_limit=n, max_new_tokens=1)
    assert caught.value.fix.endswith("a model with a longer context, or --truncate middle")
    with pytest.raises(KvcliError, match="more than --max-prompt-tokens") as caught:
        build_prompt(Sample("1", (Segment(sample.text, "question"),), ""), testbed, max_prompt_tokens=3)
    assert "--truncate" not in caught.value.fix
