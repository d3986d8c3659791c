"""Options as continuations: the tokens of lm-evaluation-harness, on real tokenizers and templates."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from kvcli.errors import KvcliError
from kvcli.evals.loader import load_task
from kvcli.evals.spec import Sample, Segment
from kvcli.models.prompt import build_prompt
from kvcli.testbed.model import build_tokenizer
from kvcli.testbed.vocabulary import LETTERS
from tests.models.golden.views import GPT2, QWEN2, REAL, VIEWS, View, real

WORDS = (" A", " B", " the quick", " naïve", " 北京", " 1,234")
CONTEXTS = ("Q: What is it?\nAnswer:", "Q: What is it?\nAnswer: ", "Notes.\n\nIt is  ", "été —")
on_each_tokenizer = pytest.mark.parametrize("name", REAL)
in_each_view = pytest.mark.parametrize("view", VIEWS, ids=[view.name for view in VIEWS])
CHATS = [view for view in VIEWS if view.template == "chat"]
in_each_chat = pytest.mark.parametrize("view", CHATS, ids=[view.name for view in CHATS])


def sample(context: str, *options: str) -> Sample:
    return Sample("7", (Segment(context, "question"),), 0, options=options)


def encode_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """What lm-evaluation-harness's rule says, written from its description: TemplateLM._encode_pair, causal models."""
    blanks = context[len(context.rstrip()) :]
    context = context.rstrip()
    special = tokenizer.bos_token is None or not context.startswith(tokenizer.bos_token)
    front = tokenizer(context, add_special_tokens=special)["input_ids"]
    whole = tokenizer(context + blanks + continuation, add_special_tokens=special)["input_ids"]
    return front, whole[len(front) :]


@pytest.mark.shared
@on_each_tokenizer
@pytest.mark.parametrize("context", CONTEXTS)
def test_raw_options_are_lm_evaluation_harness_s(name: str, context: str) -> None:
    tokenizer = real(name)
    options = [word.lstrip() for word in WORDS] if context[-1].isspace() else WORDS
    prompt = build_prompt(sample(context, *options), tokenizer, template="raw")
    for option, ids in zip(options, prompt.options, strict=True):
        assert (prompt.ids, ids) == encode_pair(tokenizer, context, option)


@pytest.mark.shared
@in_each_chat
def test_chat_options_begin_the_answer(view: View) -> None:
    """Without a delimiter, as in lm-evaluation-harness. It also moves the template's last line break into every option;
    here the prompt stays what a generated answer stands behind, and the rest of the option is the same."""
    prompt = view.build(sample("What is it?\nAnswer:", *WORDS))
    plain = view.build(sample("What is it?\nAnswer:"))
    assert prompt.ids == plain.ids
    for word, ids in zip(WORDS, prompt.options, strict=True):
        front, behind = encode_pair(view.tokenizer, plain.text, word.lstrip())
        assert prompt.ids + ids == front + behind
        assert view.tokenizer.decode(ids).strip() == word.strip()


@pytest.mark.shared
@in_each_view
@pytest.mark.parametrize("context", CONTEXTS)
def test_prompt_and_option_joined_are_what_the_model_would_see(view: View, context: str) -> None:
    """The joined ids are the tokenisation of the joined text, and they decode to it."""
    words = [word.lstrip() for word in WORDS] if context[-1].isspace() else WORDS
    prompt = view.build(sample(context, *words))
    text = view.build(sample(context)).text
    brought = view.bos and text.startswith(view.tokenizer.bos_token)
    front = [] if brought else prompt.ids[: view.bos]
    for word, ids in zip(words, prompt.options, strict=True):
        ending = word if view.template == "raw" else word.lstrip()
        joined = prompt.ids + ids
        assert joined == front + view.tokenizer(text + ending, add_special_tokens=False)["input_ids"]
        assert view.tokenizer.decode(joined, clean_up_tokenization_spaces=False).endswith(ending)


@pytest.mark.shared
def test_tokens_of_a_known_case() -> None:
    tokenizer = real(GPT2)
    assert build_prompt(sample("Answer:", " A", " B"), tokenizer).options == [[317], [347]]
    behind = build_prompt(sample("Answer: ", "A", "B"), tokenizer)
    assert behind.options == [[317], [347]] and behind.text == "Answer:"
    assert [(r.label, r.start, r.end) for r in behind.regions] == [("question", 0, 2)]


@pytest.mark.shared
def test_white_space_that_merged_into_the_prompt_is_not_lost() -> None:
    """`:\\n` is one token of Qwen's: moved to the options, the line's end would be nowhere."""
    tokenizer = real(QWEN2)
    prompt = build_prompt(sample("Answer:\n", "A", "B"), tokenizer, template="raw")
    assert prompt.text == "Answer:\n" and tokenizer.convert_ids_to_tokens(prompt.ids) == ["Answer", ":Ċ"]
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in prompt.options] == [["A"], ["B"]]


@pytest.mark.shared
def test_a_prompt_keeps_its_own_tokens_where_an_option_merges_into_it() -> None:
    """`:A` is one token of Qwen's; lm-evaluation-harness takes what is behind as many tokens as the prompt has."""
    tokenizer = real(QWEN2)
    prompt = build_prompt(sample("Answer:", "A cat", " A cat"), tokenizer, template="raw")
    assert prompt.ids == tokenizer("Answer:")["input_ids"]
    assert [tokenizer.decode(ids) for ids in prompt.options] == [" cat", " A cat"]


@pytest.mark.shared
@pytest.mark.parametrize(("option", "view"), [("A", "qwen2.5 raw"), ("", "gpt2 raw"), (" ", "qwen2.5 chat")])
def test_an_option_without_tokens_is_an_error_naming_the_sample(option: str, view: str) -> None:
    shown = next(v for v in VIEWS if v.name == view)
    with pytest.raises(KvcliError, match="option 1 of quiz sample 7 has no tokens of its own") as caught:
        shown.build(sample("Answer:", " B", option), task="quiz")
    assert "blank" in caught.value.fix


@pytest.mark.shared
@in_each_view
def test_options_change_no_token_of_the_prompt_and_are_part_of_its_hash(view: View) -> None:
    with_options = view.build(sample("Q: What is it?\nAnswer:", " A", " B"))
    without = view.build(sample("Q: What is it?\nAnswer:"))
    assert without.options == [] and without.ids[: len(with_options.ids)] == with_options.ids
    assert len({with_options.sha, without.sha, view.build(sample("Q: What is it?\nAnswer:", " A", " C")).sha}) == 3


@pytest.mark.shared
def test_the_longest_option_counts_not_the_tokens_that_might_be_generated() -> None:
    tokenizer = real(GPT2)
    asked = sample("Answer:", " A", " the quick brown fox")
    n = len(build_prompt(asked, tokenizer).ids)
    assert build_prompt(asked, tokenizer, context_limit=n + 4, max_new_tokens=500).options
    with pytest.raises(KvcliError, match=f"{n} tokens and 4 new ones, its context is {n + 3}"):
        build_prompt(asked, tokenizer, context_limit=n + 3, max_new_tokens=1)


def test_options_on_the_testbed() -> None:
    tokenizer, task = build_tokenizer(), load_task("tb_choice")
    letters = tuple(f" {letter}" for letter in LETTERS)
    for drawn in task.samples(shots=task.shots, shot_seed=0, limit=3, data_dir=None):
        plain = build_prompt(drawn, tokenizer, chat_allowed=task.chat)
        prompt = build_prompt(dataclasses.replace(drawn, options=letters), tokenizer, chat_allowed=task.chat)
        assert prompt.ids == plain.ids and all(tokenizer.unk_token_id not in ids for ids in prompt.options)
        assert prompt.options == [tokenizer(option, add_special_tokens=False)["input_ids"] for option in letters]
