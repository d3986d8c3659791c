"""Prompts on real tokenizers: spans by round trip, one BOS, chat templates, limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcli.errors import KvcliError
from kvcli.evals.loader import load_task
from kvcli.evals.spec import Sample, Segment
from kvcli.models.prompt import Prompt, build_prompt
from kvcli.testbed.model import build_tokenizer
from tests.models.golden.views import VIEWS, View
from tests.models.golden.views import real as cached

FOLDER = Path(__file__).parents[3] / "shared" / "tokenizers"
REAL = ("gpt2", "TinyLlama-1.1B-Chat-v1.0", "Qwen2.5-0.5B-Instruct", "Qwen3-8B")
WITH_TEMPLATE = REAL[1:]

SAMPLE = Sample(
    "7",
    (
        Segment("Answer the question.\n\n", "system"),
        Segment("Zoë lives in 北京. 🙂 She has 3 dogs.\n", "context"),
        Segment("  The dogs are  old.\n\n", "context"),
        Segment("Q: How many dogs?\nA: There are 3. The answer is 3.\n\n", "shot", 0),
        Segment("Q: Is a dog naïve?\nA: It's not. The answer is 0.\n\n", "shot", 1),
        Segment("Q: What's 1,234 + 5?\nA:", "question"),
    ),
    "1239",
)
SHOTS = [s.text for s in SAMPLE.segments if s.region == "shot"]


def real(name: str) -> Any:
    if not (FOLDER / name).is_dir():
        pytest.skip(f"no tokenizer files in {FOLDER / name}")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER / name)


@pytest.fixture(scope="module", params=REAL)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return real(request.param)


@pytest.fixture(scope="module", params=WITH_TEMPLATE)
def chatty(request: pytest.FixtureRequest) -> Any:
    return real(request.param)


@pytest.fixture(scope="module")
def testbed() -> Any:
    return build_tokenizer()


def covered(prompt: Prompt) -> bool:
    """Regions cover all tokens in order without gaps, and each character of the text belongs to one token."""
    edges = [r.start for r in prompt.regions] + [len(prompt.ids)]
    gapless = edges[0] == 0 and all(r.end == edge for r, edge in zip(prompt.regions, edges[1:], strict=True))
    whole = "".join(prompt.token_text(i) for i in range(len(prompt.ids)))
    return gapless and all(len(r) > 0 for r in prompt.regions) and prompt.text.startswith(whole)


def texts(prompt: Prompt, *kinds: str) -> list[str]:
    return [prompt.span_text((r.start, r.end)) for r in prompt.regions if r.kind in kinds]


@pytest.mark.shared
def test_raw_round_trip(tokenizer: Any) -> None:
    prompt = build_prompt(SAMPLE, tokenizer, template="raw")
    assert covered(prompt) and prompt.text == SAMPLE.text
    assert texts(prompt, "system") == ["Answer the question.\n\n"]
    assert texts(prompt, "context") == [SAMPLE.segments[1].text + SAMPLE.segments[2].text]
    assert texts(prompt, "shot") == SHOTS and texts(prompt, "question") == [SAMPLE.segments[-1].text]
    assert [r.label for r in prompt.regions if r.kind == "shot"] == ["shot 0", "shot 1"]


@pytest.mark.shared
def test_decoding_a_regions_tokens_gives_its_text(tokenizer: Any) -> None:
    prompt = build_prompt(SAMPLE, tokenizer, template="raw")
    words = [r for r in prompt.regions if r.kind != "special"]
    decoded = [tokenizer.decode(prompt.ids[r.start : r.end], clean_up_tokenization_spaces=False) for r in words]
    assert [d.strip() for d in decoded] == [prompt.span_text((r.start, r.end)).strip() for r in words]
    first = words[0].start
    assert tokenizer.decode(prompt.ids[first:], clean_up_tokenization_spaces=False) == SAMPLE.text


@pytest.mark.shared
def test_raw_ids_are_the_tokenizers_own(tokenizer: Any) -> None:
    assert build_prompt(SAMPLE, tokenizer, template="raw").ids == tokenizer(SAMPLE.text)["input_ids"]


@pytest.mark.shared
def test_chat_round_trip(chatty: Any) -> None:
    prompt = build_prompt(SAMPLE, chatty)
    assert covered(prompt) and SAMPLE.text in prompt.text
    assert texts(prompt, "shot") == SHOTS and texts(prompt, "question") == [SAMPLE.segments[-1].text]
    assert [prompt.regions[0].kind, prompt.regions[-1].kind] == ["special", "special"]
    assert texts(prompt, "system") == ["Answer the question.\n\n"]


@pytest.mark.shared
@pytest.mark.parametrize("template", ["raw", "chat"])
@pytest.mark.parametrize("name", WITH_TEMPLATE)
def test_exactly_one_bos_where_the_model_knows_one(name: str, template: Any) -> None:
    tokenizer = real(name)
    prompt = build_prompt(SAMPLE, tokenizer, template=template)
    expected = 1 if name.startswith("TinyLlama") else 0
    assert expected == (0 if tokenizer.bos_token_id is None else prompt.ids.count(tokenizer.bos_token_id))
    assert tokenizer.eos_token_id != prompt.ids[-1]


@pytest.mark.shared
def test_a_bos_that_the_text_brings_is_not_doubled() -> None:
    tokenizer = real("TinyLlama-1.1B-Chat-v1.0")
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}{% endfor %}"
    assert build_prompt(SAMPLE, tokenizer).ids.count(1) == 1
    marked = Sample("1", (Segment("<s>Q: 1\nA:", "question"),), "1")
    assert build_prompt(marked, tokenizer, template="raw").ids.count(1) == 1


@pytest.mark.shared
def test_gpt2_has_no_template_and_no_bos() -> None:
    tokenizer = real("gpt2")
    prompt = build_prompt(SAMPLE, tokenizer)
    assert prompt.text == SAMPLE.text and tokenizer.bos_token_id not in prompt.ids
    with pytest.raises(KvcliError, match="it has none"):
        build_prompt(SAMPLE, tokenizer, template="chat")


@pytest.mark.shared
def test_chat_with_a_system_message(chatty: Any) -> None:
    prompt = build_prompt(SAMPLE, chatty, system="Be brief.")
    assert covered(prompt)
    assert texts(prompt, "system") == ["Be brief.", "Answer the question.\n\n"]
    assert prompt.text.index("Be brief.") < prompt.text.index("Answer")


@pytest.mark.shared
def test_qwen3_thinks_only_where_asked() -> None:
    prompt = build_prompt(SAMPLE, real("Qwen3-8B"))
    assert prompt.text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert build_prompt(SAMPLE, real("Qwen3-8B"), thinking=True).text.endswith("<|im_start|>assistant\n")


NO_SYSTEM = {
    "raises": "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}",
    "takes turns": "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}",
    "leaves it out": "",
}
USER_ONLY = "{% for m in messages if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]{% endfor %}"


@pytest.mark.shared
@pytest.mark.parametrize("refusal", NO_SYSTEM.values(), ids=NO_SYSTEM)
def test_a_template_without_a_system_message_gets_it_in_the_users(refusal: str) -> None:
    tokenizer = real("gpt2")
    tokenizer.chat_template = refusal + USER_ONLY
    prompt = build_prompt(SAMPLE, tokenizer, system="Be brief.")
    assert covered(prompt) and prompt.text.startswith("[INST] Be brief.\n\nAnswer the question.\n\n")
    assert [r.label for r in prompt.regions][:3] == ["special", "system", "context"]
    assert texts(prompt, "question") == [SAMPLE.segments[-1].text]
    assert "Be brief" not in build_prompt(SAMPLE, tokenizer).text


@pytest.mark.shared
@pytest.mark.parametrize("view", VIEWS, ids=[view.name for view in VIEWS])
def test_a_system_text_comes_first_and_brings_no_second_bos(view: View) -> None:
    prompt = view.build(SAMPLE, system="  Be brief — 北京.\n")
    assert covered(prompt) and prompt.text.count("Be brief") == 1
    assert view.bos == (prompt.ids.count(view.tokenizer.bos_token_id) if view.tokenizer.bos_token else 0)
    first = next(r for r in prompt.regions if r.kind == "system")
    assert prompt.span_text((first.start, first.end)).strip().startswith("Be brief — 北京.")
    assert texts(prompt, "shot") == SHOTS
    plain = view.build(SAMPLE)
    assert texts(plain, "shot", "question") == texts(prompt, "shot", "question")
    assert build_prompt(SAMPLE, view.tokenizer, template=view.template, thinking=view.thinking, system="") == plain


PARTS = [
    "a",
    " ",
    "\n",
    "\n\n",
    "  ",
    "Q:",
    " the dog",
    "🙂",
    "北京",
    "é",
    "e\u0301",
    "1,234",
    "'s",
    "<s>",
    "</s>",
    ".",
    "",
]
SEGMENTS = st.lists(
    st.tuples(st.lists(st.sampled_from(PARTS), max_size=6).map("".join), st.sampled_from(["context", "question"])),
    min_size=1,
    max_size=6,
)


@pytest.mark.shared
@pytest.mark.parametrize("name", REAL)
@given(parts=SEGMENTS)
def test_a_token_belongs_to_the_segment_its_first_character_stands_in(name: str, parts: list[tuple[str, str]]) -> None:
    """Told token by token: white space at its front aside, and never back to an earlier segment."""
    sample = Sample("1", tuple(Segment(*part) for part in parts), "")
    tokenizer = cached(name)
    if not sample.text:
        return
    prompt = build_prompt(sample, tokenizer, template="raw")
    encoded = tokenizer(sample.text, add_special_tokens=False, return_offsets_mapping=True)
    owners, reached = ["special"] * (len(prompt.ids) - len(encoded["input_ids"])), 0
    for start, end in encoded["offset_mapping"]:
        inked = [c for c in range(start, end) if not sample.text[c].isspace()]
        reached = max(reached, inked[0] if inked else start)
        at = 0
        for text, region in parts:
            if text and at <= min(reached, len(sample.text) - 1):
                owner = region
            at += len(text)
        owners.append(owner)
    assert [r.label for r in prompt.regions for _ in range(len(r))] == owners


@pytest.mark.shared
def test_a_template_that_strips_the_message(chatty: Any) -> None:
    before = chatty.chat_template
    padded = Sample("1", (Segment("  \n Hi.\n\n", "system"), Segment("Q: 1\nA: \n", "question")), "1")
    try:
        chatty.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}Go:"
        prompt = build_prompt(padded, chatty)
    finally:
        chatty.chat_template = before
    assert covered(prompt) and "<user>Hi.\n\nQ: 1\nA:</>Go:" in prompt.text
    assert [r.kind for r in prompt.regions] == ["special", "system", "question", "special"]
    assert texts(prompt, "question")[0].startswith("Q: 1\nA")


@pytest.mark.shared
@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('no such models') }}", "no such models"),
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}", "0 times"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "0 times"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "2 times"),
        ("{% for m in messages %}{{ m.content | replace('Q:', 'X:') }}{% endfor %}", "changes the text"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_be_used(template: str, why: str) -> None:
    tokenizer = real("gpt2")
    tokenizer.chat_template = template
    with pytest.raises(KvcliError, match=why) as caught:
        build_prompt(SAMPLE, tokenizer, system="Be brief.")
    assert "--template raw" in caught.value.fix


@pytest.mark.shared
def test_a_task_may_forbid_the_template(chatty: Any) -> None:
    for template in ("auto", "chat", "raw"):
        prompt = build_prompt(SAMPLE, chatty, template=template, chat_allowed=False)
        assert prompt.text == SAMPLE.text


@pytest.mark.shared
def test_gsm8k_shots_on_real_tokenizers(tokenizer: Any) -> None:
    data = FOLDER.parent / "data"
    if not data.is_dir():
        pytest.skip(f"no data in {data}")
    for sample in load_task("gsm8k").samples(shots=8, shot_seed=0, limit=3, data_dir=str(data)):
        for template in ("auto", "raw"):
            prompt = build_prompt(sample, tokenizer, template=template)
            assert covered(prompt)
            assert texts(prompt, "shot") == [s.text for s in sample.segments if s.region == "shot"]
            assert texts(prompt, "question") == [sample.segments[-1].text]


def test_testbed_round_trip(testbed: Any) -> None:
    for name in ("tb_safety", "tb_recall", "tb_longgen", "tb_code"):
        task = load_task(name)
        for sample in task.samples(shots=task.shots, shot_seed=0, limit=5, data_dir=None):
            prompt = build_prompt(sample, testbed, chat_allowed=task.chat)
            assert covered(prompt) and prompt.ids == testbed(sample.text)["input_ids"]
            assert prompt.ids.count(testbed.bos_token_id) == 1 and prompt.regions[0].label == "special"
            by_segment = [testbed(s.text, add_special_tokens=False)["input_ids"] for s in sample.segments]
            assert [prompt.ids[r.start : r.end] for r in prompt.regions[1:]] == by_segment


def test_same_prompt_same_sha_and_another_another(testbed: Any) -> None:
    task = load_task("tb_knowledge")
    first, second = (task.samples(shots=2, shot_seed=0, limit=2, data_dir=None) for _ in range(2))
    shas = [build_prompt(s, testbed).sha for s in (*first, *second)]
    assert shas[:2] == shas[2:] and shas[0] != shas[1]
    joined = Sample("x", (Segment(first[0].text, "question"),), "")
    assert build_prompt(joined, testbed).sha != shas[0], "other regions are another prompt"


def test_too_long_for_the_model_or_for_the_limit(testbed: Any) -> None:
    sample = load_task("tb_knowledge").samples(shots=12, shot_seed=0, limit=1, data_dir=None)[0]
    n = len(build_prompt(sample, testbed).ids)
    assert len(build_prompt(sample, testbed, context_limit=n + 6, max_new_tokens=6, max_prompt_tokens=n).ids) == n
    with pytest.raises(KvcliError, match=rf"tb_knowledge sample {sample.id} .* {n} tokens and 7 new ones.* {n + 6}"):
        build_prompt(sample, testbed, context_limit=n + 6, max_new_tokens=7, task="tb_knowledge")
    with pytest.raises(KvcliError, match=rf"sample {sample.id} has {n} tokens, more than --max-prompt-tokens {n - 1}"):
        build_prompt(sample, testbed, max_prompt_tokens=n - 1)


def test_a_slow_tokenizer_is_refused_by_name() -> None:
    class SlowTokenizer:
        is_fast, name_or_path = False, "some/model"

    with pytest.raises(KvcliError, match="slow tokenizer SlowTokenizer some/model"):
        build_prompt(SAMPLE, SlowTokenizer())


def test_an_empty_prompt_is_refused(testbed: Any) -> None:
    with pytest.raises(KvcliError, match="is empty"):
        build_prompt(Sample("1", (), ""), build_tokenizer_without_bos())


def build_tokenizer_without_bos() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
