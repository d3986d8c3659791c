"""Head scores against transformers' eager attention and plain loops; needles, probes; profiles in files and folders."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kvcli.engine import profiling
from kvcli.engine.needles import (
    SEED,
    SENTENCES,
    PassKeys,
    Probe,
    answer_ids,
    default_task,
    needle_of,
    probes_of,
)  # fmt: skip
from kvcli.engine.profiling import Settings, head_scores, measure, needle_share, profile
from kvcli.errors import KvcliError
from kvcli.evals.loader import load_task
from kvcli.evals.spec import Sample, Segment
from kvcli.models import loader, profiles
from kvcli.models.profiles import (
    HeadProfile,
    cache_place,
    check_profiles,
    load_profile,
    profile_of,
    read_profile,
    write_profile,
)
from kvcli.models.prompt import Prompt, build_prompt
from kvcli.models.source import TESTBED_FOLDER, fingerprint, parse_model
from kvcli.models.wrapper import Model
from kvcli.testbed.model import build_tokenizer
from tests.engine import tiny


@pytest.fixture
def exact() -> Iterator[None]:
    """Norms in float64; transformers' own compute in float32."""
    patch = pytest.MonkeyPatch()
    patch.setattr(LlamaRMSNorm, "forward", tiny.exact_norm)
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def testbed() -> Model:
    source = parse_model("testbed")
    config = loader.load_config(source)
    return Model(loader.load_weights(config, source, "float32", "cpu"), loader.load_tokenizer(source), name="testbed")


def eager_scores(model: Model, ids: list[int], needle: tuple[int, int], answer: list[int]) -> list[list[float]]:
    """The definition in plain loops over one pass of the unmodified model, attention maps and all."""
    hf, before = model.hf, model.hf.config._attn_implementation
    hf.set_attn_implementation("eager")
    with torch.no_grad():
        maps = hf(torch.tensor([[*ids, *answer[:-1]]]), output_attentions=True).attentions
    hf.set_attn_implementation(before)
    start, end = needle
    out = []
    for layer in maps:
        out.append([0.0] * layer.shape[1])
        for head in range(layer.shape[1]):
            for step in range(len(answer)):
                row = layer[0, head, len(ids) - 1 + step].tolist()
                best = sorted(range(len(row)), key=lambda p: -row[p])[: end - start]
                out[-1][head] += sum(row[p] for p in best if start <= p < end)
            out[-1][head] /= (end - start) * len(answer)
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("n, needle, answer", [
    (30, (4, 9), [7, 8, 9]), (80, (70, 80), [5]), (80, (0, 3), [5, 17, 4, 4, 30]), (2, (0, 2), [9, 9]),
])  # fmt: skip
def test_scores_are_the_definition_s(
    exact: None, kv_heads: int, n: int, needle: tuple[int, int], answer: list[int]
) -> None:
    model, prompt = tiny.tiny_llama(torch.float64, kv_heads=kv_heads), tiny.prompt(n, 1)
    scores, _ = head_scores(model, Probe(prompt, needle, answer))
    wanted = eager_scores(model, prompt.ids, needle, answer)
    assert scores.shape == (3, 4)
    torch.testing.assert_close(scores, torch.tensor(wanted, dtype=torch.double), atol=1e-6, rtol=1e-5)
    assert float(scores.max()) > 0
    assert model.hf.config._attn_implementation != "kvcli"


def test_scores_do_not_depend_on_chunks(exact: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = tiny.tiny_llama(torch.float64), tiny.prompt(90, 2)
    probe = Probe(prompt, (20, 26), [4, 5, 6])
    whole, _ = head_scores(model, probe)
    monkeypatch.setattr(profiling, "CHUNK", 32)
    torch.testing.assert_close(head_scores(model, probe)[0], whole, atol=1e-12, rtol=0)


def test_only_the_most_attended_keys_count() -> None:
    """By hand: two steps, a needle of two tokens; the second step looks elsewhere more than at its second token."""
    attention = torch.tensor([[[0.1, 0.5, 0.3, 0.1], [0.4, 0.35, 0.05, 0.2]]])
    assert needle_share(attention, (1, 3)).tolist() == pytest.approx([(0.5 + 0.3 + 0.35) / 4])


def test_an_answer_is_right_when_greedy_generation_gives_it(testbed: Model) -> None:
    task = load_task("tb_needle")
    probes, read = probes_of(task, testbed, 6)
    assert (len(probes), read) == (6, 6)
    for probe in probes:
        assert head_scores(testbed, probe)[1]
        generated = testbed.hf.generate(
            torch.tensor([probe.prompt.ids]), max_new_tokens=len(probe.answer), do_sample=False, pad_token_id=0
        )
        assert generated[0, len(probe.prompt.ids) :].tolist() == probe.answer
        wrong = dataclasses.replace(probe, answer=[*probe.answer[:-1], probe.answer[0]])
        assert not head_scores(testbed, wrong)[1]


def test_the_needle_is_the_answer_s_tokens_in_the_passage(testbed: Model) -> None:
    for probe in probes_of(load_task("tb_needle"), testbed, 5)[0]:
        start, end = probe.needle
        assert probe.prompt.ids[start:end] == probe.answer
        before = testbed.tokenizer.convert_ids_to_tokens(probe.prompt.ids[start - 2])
        assert before == "secret"


def test_profiled_prompts_are_no_exam_s(testbed: Model) -> None:
    task = load_task("tb_needle")
    exam = {s.text for s in task.samples(shots=task.shots, shot_seed=0, limit=None, data_dir=None)}
    mine = {probe.prompt.text for probe in probes_of(task, testbed, 64)[0]}
    assert len(mine) == 64 and not mine & exam


def text_prompt(*segments: tuple[str, str]) -> Prompt:
    """The tokenizer knows one token per word."""
    parts = tuple(Segment(text, region, 0 if region == "shot" else -1) for region, text in segments)
    return build_prompt(Sample("0", parts, ""), build_tokenizer(), template="raw")


def test_an_answer_that_stands_twice_or_in_the_question_is_no_needle() -> None:
    context = ("context", "note k1 v1 note k2 v22 ")
    assert needle_of(text_prompt(context, ("question", "ask k1")), "v1") == (3, 4)
    assert needle_of(text_prompt(context, ("question", "ask k1")), "k2 v22") == (5, 7)
    assert needle_of(text_prompt(context, ("question", "ask k1")), "v2") is None, "v22 is another word"
    assert needle_of(text_prompt(context, ("question", "ask v1")), "v1") is None
    assert needle_of(text_prompt(context, ("question", "ask v3")), "v3") is None
    assert needle_of(text_prompt(context, ("shot", "ask k1 v1 <e> "), ("question", "ask k2")), "v22") == (6, 7)
    assert needle_of(text_prompt(context, ("shot", "ask k3 v3 <e> "), ("question", "ask k2")), "v3") == (9, 10)


def test_the_answer_s_tokens_follow_the_prompt() -> None:
    tokenizer = build_tokenizer()
    prompt = text_prompt(("context", "note k1 v1 "), ("question", "ask k1"))
    assert answer_ids(prompt, "v1 v2", tokenizer) == tokenizer.convert_tokens_to_ids(["v1", "v2"])


def test_pass_keys_have_about_the_length_asked_for_and_hold_the_answer_once() -> None:
    words = lambda text: len(text.split())  # noqa: E731
    task = PassKeys(
        name="pass keys", version="1", ability="", metric="accuracy", shots=0, max_new_tokens=8, prompt_tokens=400,
        count=words,
    )  # fmt: skip
    samples = task.samples(shots=0, shot_seed=SEED, limit=20, data_dir=None)
    assert len({s.text for s in samples}) == 20
    assert len({s.text.index(s.target) // 200 for s in samples}) > 4, "at any depth"
    for sample in samples:
        assert 380 <= words(sample.text) <= 400
        assert sample.text.count(sample.target) == 1
        door = sample.segments[1].text.split()[5]
        assert f"the {door} door is {sample.target}." in sample.segments[0].text
        assert sample.segments[1].text.endswith("door is")
        assert task.score(sample, f"{sample.target} and").value == 1
    assert samples == task.samples(shots=0, shot_seed=SEED, limit=20, data_dir=None)


def test_a_model_of_the_testbed_s_language_gets_needles_and_any_other_pass_keys() -> None:
    needle = default_task(build_tokenizer(), None, 1024)
    assert (needle.name, needle.prompt_tokens) == ("tb_needle", 448)  # type: ignore[attr-defined]
    assert default_task(build_tokenizer(), 200, 1024).prompt_tokens == 200  # type: ignore[attr-defined]

    class Other:
        def get_vocab(self) -> dict[str, int]:
            return {"river": 0}

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [0] * len(text.split())}

    keys = default_task(Other(), None, 512)
    assert isinstance(keys, PassKeys) and keys.prompt_tokens == 448 and not keys.chat
    (sample,) = keys.samples(shots=0, shot_seed=1, limit=1, data_dir=None)
    assert 420 < len(sample.text.split()) <= 448


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A small byte-level BPE, as Llama 3's and GPT-2's are: words carry the blank before them."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="<s>")


def test_any_other_model_is_profiled_on_pass_keys() -> None:
    """Down to the tokens, with a tokenizer that cuts numbers into pieces."""
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=600,
    )  # fmt: skip
    torch.manual_seed(3)
    model = Model(LlamaForCausalLM(config).eval(), tokenizer)
    task = default_task(tokenizer, None, 600)
    assert isinstance(task, PassKeys)
    probes, read = probes_of(task, model, 6)
    assert len(probes) == read == 6
    for probe, sample in zip(probes, task.samples(shots=0, shot_seed=SEED, limit=6, data_dir=None), strict=True):
        ids, (start, end) = probe.prompt.ids, probe.needle
        assert tokenizer.decode(ids[start:end]).strip() == sample.target == tokenizer.decode(probe.answer).strip()
        assert ids[start - 1 : end] == probe.answer and end - start == 5, "the blank before it is a token of its own"
        assert 500 < len(ids) <= 600
    made = profile(model, task, 6, identity={}, wrong_too=True)
    assert made.fits(2, 4, 2) and made.samples == 6 and made.how["task"] == "pass keys"


# The whole command's engine.


def test_the_shipped_profile_is_the_testbed_s_and_made_by_the_plain_command() -> None:
    source = parse_model("testbed")
    shipped = load_profile(source)
    again = measure(source, Settings(limit=12))
    assert shipped.model == fingerprint(source) == again.model
    assert shipped.fits(4, 4, 2) and shipped.samples == 64
    assert {**shipped.how, "limit": 12, "with_needle": 12, "right": 12, "dtype": "float32"} == again.how
    best = [
        max((x, layer, h) for layer, row in enumerate(p.heads) for h, x in enumerate(row)) for p in (shipped, again)
    ]
    assert best[0][1:] == best[1][1:] and best[0][0] == pytest.approx(best[1][0], rel=0.05)


def test_a_profile_repeats_exactly(testbed: Model) -> None:
    task = load_task("tb_needle")
    one, two = (profile(testbed, task, 4, identity={}) for _ in range(2))
    assert one == two


def test_only_right_answers_count_unless_all_are_wanted() -> None:
    model, task = tiny.tiny_llama(), load_task("tb_needle")
    with pytest.raises(KvcliError, match="answers none of 3 prompts"):
        profile(model, task, 3, identity={})
    every = profile(model, task, 3, identity={}, wrong_too=True)
    assert every.samples == 3 and every.how["right"] == 0
    probes, _ = probes_of(task, model, 3)
    mean = sum(head_scores(model, p)[0] for p in probes) / 3
    torch.testing.assert_close(torch.tensor(every.heads, dtype=torch.double), mean, rtol=1e-5, atol=0)


def test_a_task_whose_answers_are_not_quoted_is_refused(testbed: Model) -> None:
    with pytest.raises(KvcliError, match="no prompt of tb_knowledge holds its answer"):
        profile(testbed, load_task("tb_knowledge"), 3, identity={})


@pytest.mark.parametrize("asked, why", [
    (Settings(task="testbed"), "made on one task"), (Settings(task="gsm8k", prompt_tokens=100), "its own lengths"),
    (Settings(task="tb_nothing"), "unknown task"),
])  # fmt: skip
def test_tasks_that_cannot_be_profiled_are_refused(asked: Settings, why: str) -> None:
    with pytest.raises(KvcliError, match=why):
        measure(parse_model("testbed"), asked)


# Files.

SOME = HeadProfile(((0.25, 0.0), (1e-7, 3.0)), "query", {"model": "m", "revision": "r"}, 5, {"score": "s"})


def test_a_profile_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "p.json"
    write_profile(SOME, path)
    assert read_profile(path) == SOME
    write_profile(dataclasses.replace(SOME, samples=6), path)
    assert json.loads(path.read_text())["samples"] == 6
    assert [p.name for p in path.parent.iterdir()] == ["p.json"]
    assert SOME.fits(2, 2, 1) and not SOME.fits(2, 4, 2) and not SOME.fits(3, 2, 1)


@pytest.mark.parametrize("text", [
    "", "[]", "{}", '{"format": "other"}', '{"format": "kvcli head profile 1"}',
    '{"format": "kvcli head profile 1", "model": {}, "samples": 1, "how": {}, "heads": []}',
    '{"format": "kvcli head profile 1", "model": {}, "samples": 1, "how": {}, "heads": [[1], [1, 2]]}',
    '{"format": "kvcli head profile 1", "model": {}, "samples": 1, "how": {}, "heads": [[NaN]]}',
    '{"format": "kvcli head profile 1", "model": {}, "samples": 1, "how": {}, "heads": [[-1]]}',
    '{"format": "kvcli head profile 1", "model": {}, "samples": 1, "how": {}, "heads": [["x"]]}',
])  # fmt: skip
def test_what_is_no_profile_is_refused_and_not_overwritten(tmp_path: Path, text: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(KvcliError, match="is no head profile"):
        read_profile(path)
    with pytest.raises(KvcliError, match="is no head profile"):
        write_profile(SOME, path)
    assert path.read_text() == text


def test_places_are_asked_in_order(tmp_path: Path) -> None:
    """The path a method names, the model's own folder, the user's cache."""
    folder = tmp_path / "mine"
    shutil.copytree(TESTBED_FOLDER, folder)
    (folder / profiles.FILE).unlink()
    source = parse_model(str(folder))
    with pytest.raises(KvcliError, match="no head profile") as e:
        load_profile(source)
    assert e.value.fix == f"kvcli profile-heads --model {folder}" and e.value.code == 2
    facts = fingerprint(source)
    cached, own, other = (HeadProfile(((x,),), model=facts, how={}) for x in (1.0, 2.0, 3.0))
    write_profile(cached, cache_place(source))
    assert profile_of(source, "head_profile") == cached
    write_profile(own, folder / profiles.FILE)
    assert profile_of(source, "head_profile") == load_profile(folder) == own
    write_profile(dataclasses.replace(other, model={"model": "base", "revision": "x"}), tmp_path / "o.json")
    assert profile_of(source, f"head_profile:{tmp_path / 'o.json'}").heads == ((3.0,),), "what is named is taken"
    with pytest.raises(KvcliError, match="cannot be read"):
        profile_of(source, f"head_profile:{tmp_path / 'none.json'}")


def test_a_profile_of_other_weights_is_refused_and_a_moved_folder_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(TESTBED_FOLDER, folder)
    assert load_profile(parse_model(str(folder))) == load_profile(parse_model("testbed"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    with pytest.raises(KvcliError, match="other weights") as e:
        load_profile(parse_model(str(folder)))
    assert f"--out {folder / profiles.FILE}" in e.value.fix


def test_random_models_of_other_sizes_have_other_profiles(tmp_path: Path) -> None:
    """Their folder's own profile is not theirs."""
    texts = [f"random:{TESTBED_FOLDER}:layers=2", f"random:{TESTBED_FOLDER}:layers=3", "gpt2-org/gpt2", "a/gpt2"]
    places = {cache_place(parse_model(text)) for text in texts}
    assert len(places) == 4 and all(p.parent == tmp_path / "cache" / "kvcli" / "head-profiles" for p in places)
    with pytest.raises(KvcliError, match="no head profile"):
        load_profile(parse_model(texts[0]))


def test_needs_are_checked_before_anything_runs(tmp_path: Path) -> None:
    source, config = parse_model("testbed"), loader.load_config(parse_model("testbed"))
    assert check_profiles(source, {"window:8", "reconstruction"}, config) is None
    plain = check_profiles(source, {"window:8", "head_profile"}, config)
    assert plain and plain == check_profiles(source, ["head_profile"])
    write_profile(SOME, tmp_path / "p.json")
    need = f"head_profile:{tmp_path / 'p.json'}"
    assert check_profiles(source, [need]) not in (None, plain), "other numbers"
    with pytest.raises(KvcliError, match="2 layers of 2 heads, not this model's"):
        check_profiles(source, [need], config)
    with pytest.raises(KvcliError, match="no head profile"):
        check_profiles(parse_model(f"random:{TESTBED_FOLDER}:layers=2"), ["head_profile"])
