"""KVzip: the scores of its extra pass against transformers' eager attention, its selection against plain loops."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kvcli.attention import received
from kvcli.attention.capture import Dense, Needs
from kvcli.cache.budget import Budget
from kvcli.errors import KvcliError
from kvcli.methods.catalog import build
from kvcli.methods.context import Context
from kvcli.models.reconstruction import PART, WHOLE, Reconstruction, reconstruction, repeated_span
from kvcli.models.wrapper import Model
from kvcli.spans import Region
from kvcli.testbed.model import build_tokenizer
from tests.engine import tiny
from tests.models.test_families import SUPPORTED, random_model
from tests.oracles.harness import context_for, lists
from tests.oracles.kvzip import kvzip, most_received, repeated
from tests.oracles.prompts import Prompt, budget, layout, random_prompt

RATIOS = ["0.02", "0.1", "0.25", "0.3", "0.5", "0.77", "0.9", "1"]
END = 2
"""The end token of the tiny models: the separator of a tokenizer that does not know the request's words."""


@pytest.fixture
def exact() -> Iterator[None]:
    """Norms in float64; transformers' own compute in float32."""
    patch = pytest.MonkeyPatch()
    patch.setattr(LlamaRMSNorm, "forward", tiny.exact_norm)
    yield
    patch.undo()


def dense_of(model: Model, ids: list[int]) -> Dense:
    return model.prefill([ids], Needs(), [len(ids) - 1]).dense(0)


def eager_scores(
    model: Model, ids: list[int], start: int, end: int, chunk: int, request: tuple[list[int], list[int]], tail: int = 0
) -> list[Tensor]:
    """Per layer [H_kv, n], from transformers' eager attention over context, request and chunk in one forward pass each.

    tail: template tokens at the end of the prompt, which follow the request. A softmax over some of the keys is the
    softmax over all, divided by its sum over these.
    """
    hf, before = model.hf, model.hf.config._attn_implementation
    hf.set_attn_implementation("eager")
    scores = [torch.zeros(heads, len(ids), dtype=torch.float64) for heads in model.shapes.kv_heads]
    for a in range(start, end, chunk):
        b = min(a + chunk, end)
        asked = request[0] if a == start else [*request[1], *ids[a - min(8, a - start) : a]]
        text = [*ids[:end], *asked, *ids[len(ids) - tail :], *ids[a:b]]
        sinks = max(start, min(4, a))
        columns = [*range(sinks), *range(a, b), *range(end, len(text))]
        with torch.no_grad():
            maps = hf(torch.tensor([text]), output_attentions=True).attentions
        for seen, attention in zip(scores, maps, strict=True):
            part = attention[0, :, end:, columns].double()
            most = (part / part.sum(-1, keepdim=True)).amax(1)
            most = most.unflatten(0, (seen.shape[0], -1)).amax(1)
            seen[:, :start] = torch.maximum(seen[:, :start], most[:, :start])
            seen[:, a:b] = most[:, sinks : sinks + b - a]
    hf.set_attn_implementation(before)
    return scores


@pytest.mark.parametrize("n", [7, 40, 120])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("chunk", [2000, 33, 16])
def test_scores_equal_eager_attention(exact: None, chunk: int, kv_heads: int, n: int) -> None:
    """One chunk is attention over everything in one shot; several see the front, the chunk and themselves."""
    model = tiny.tiny_llama(torch.float64, kv_heads=kv_heads)
    prompt = tiny.prompt(n, 1)
    done = reconstruction(model, dense_of(model, prompt.ids), prompt.ids, prompt.regions, chunk=chunk)
    start, end = done.start, done.end
    assert end == prompt.regions[-1].start, "the question is not repeated"
    assert 0 < start < end
    assert not done.worded
    assert done.chunks == -(-(end - start) // chunk)
    truth = eager_scores(model, prompt.ids, start, end, chunk, ([END], [END]))
    for got, want in zip(done.scores, truth, strict=True):
        torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)  # eager's softmax is float32


@pytest.mark.parametrize("family", ["qwen3", "phi3", "gpt_neox", "gpt2", "opt"])
def test_scores_equal_eager_attention_in_other_families(family: str) -> None:
    model = Model(random_model(family, SUPPORTED[family]), build_tokenizer(), name=family)
    prompt = tiny.prompt(50, 2)
    for chunk in (2000, 20):
        done = reconstruction(model, dense_of(model, prompt.ids), prompt.ids, prompt.regions, chunk=chunk)
        truth = eager_scores(model, prompt.ids, done.start, done.end, chunk, ([END], [END]))
        for got, want in zip(done.scores, truth, strict=True):
            assert got.dtype == torch.float32
            torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=1e-4)


def test_scores_do_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = tiny.tiny_llama(torch.float64), tiny.prompt(150, 3)
    dense = dense_of(model, prompt.ids)
    whole = reconstruction(model, dense, prompt.ids, prompt.regions).scores
    monkeypatch.setattr(received, "_BLOCK_BYTES", 1)
    for got, want in zip(reconstruction(model, dense, prompt.ids, prompt.regions).scores, whole, strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def test_the_pass_leaves_the_prompt_as_it_was_and_behind_a_shared_prefix_finds_the_same() -> None:
    model, prompt = tiny.tiny_llama(torch.float64), tiny.prompt(90, 4)
    dense = dense_of(model, prompt.ids)
    before = [k.clone() for k in (*dense.keys, *dense.values)]
    first = reconstruction(model, dense, prompt.ids, prompt.regions)
    assert all(torch.equal(a, b) for a, b in zip((*dense.keys, *dense.values), before, strict=True))
    assert model.hf.config._attn_implementation != "kvcli"
    prefix = dense_of(model, prompt.ids[:50])
    behind = model.prefill([prompt.ids[50:]], Needs(), [30], prefix).dense(0)
    again = reconstruction(model, behind, prompt.ids, prompt.regions)
    for a, b in zip(first.scores, again.scores, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads, group", [(1, 1), (2, 2), (1, 4), (3, 1)])
def test_maxima_agree_with_plain_loops(kv_heads: int, group: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(5)
    for own, before in ((1, 0), (1, 6), (9, 1), (20, 12)):
        queries, keys = (
            rng.standard_normal((kv_heads * group, own, 4)),
            rng.standard_normal((kv_heads, before + own, 4)),
        )
        q, k = (torch.tensor(x).to(dtype) for x in (queries, keys))
        got = received.most_received(q, k, 0.7)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        want = most_received(q.double().numpy(), k.double().numpy(), 0.7, own)
        room = 1e-12 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(got.double(), torch.tensor(want, dtype=torch.float64), atol=room, rtol=0)


# What the model is given to read.


def words_tokenizer() -> PreTrainedTokenizerFast:
    """Knows the request's words, as ids 10.."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = dict.fromkeys([*WHOLE.split(), *PART.split()])
    core = Tokenizer(models.WordLevel({"<unk>": 3, "<e>": 2, **{w: 10 + i for i, w in enumerate(words)}}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<e>", unk_token="<unk>")


def with_template(n: int, behind: int) -> tuple[list[int], list[Region]]:
    """A prompt whose last `behind` tokens are the template's."""
    prompt = tiny.prompt(n, 6)
    *rest, last = prompt.regions
    return prompt.ids, [*rest, Region("question", last.start, n - behind), Region("special", n - behind, n)]


def read(model: Model, ids: list[int], regions: list[Region], chunk: int) -> tuple[Reconstruction, list[Any]]:
    """The pass, and the token ids and positions of each of its forward calls."""
    dense, calls = dense_of(model, ids), []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        calls.append((args[0][0].tolist(), kwargs["position_ids"][0].tolist()))

    handle = model.hf.register_forward_pre_hook(note, with_kwargs=True)
    try:
        return reconstruction(model, dense, ids, regions, chunk=chunk), calls
    finally:
        handle.remove()


def test_the_request_stands_behind_the_context_and_quotes_eight_tokens() -> None:
    """As in the authors' code: context, request (with the last 8 tokens repeated before), template, chunk."""
    model = tiny.tiny_llama()
    model.tokenizer = words_tokenizer()
    ids, regions = with_template(60, 3)
    done, calls = read(model, ids, regions, 30)
    start, end = done.start, done.end
    assert (end, done.worded, done.chunks) == (regions[-2].start, True, 2)
    assert end < 57
    whole, part = (model.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (WHOLE, PART))
    assert len(whole) == 5 and len(part) == 10
    cut = start + 30
    wanted = [[*whole, *ids[57:], *ids[start:cut]], [*part, *ids[cut - 8 : cut], *ids[57:], *ids[cut:end]]]
    assert [text for text, _ in calls] == wanted
    assert [positions for _, positions in calls] == [list(range(end, end + len(text))) for text in wanted]
    truth = eager_scores(model, ids, start, end, 30, (whole, part), tail=3)
    for got, want in zip(done.scores, truth, strict=True):
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=0)
        assert not got[:, end:].any(), "the question is not there while the context is repeated"


def test_a_tokenizer_without_the_words_separates_with_the_end_token() -> None:
    ids, regions = with_template(60, 0)
    done, calls = read(tiny.tiny_llama(), ids, regions[:-1], 30)
    assert not done.worded
    assert calls[0][0][:2] == [END, ids[done.start]]
    assert calls[1][0][:9] == [END, *ids[done.start + 22 : done.start + 30]]


def test_chunks_shrink_to_the_models_context() -> None:
    """gpt2 has 256 learned positions: context, separator, quoted tokens and chunk must fit."""
    model = Model(random_model("gpt2", SUPPORTED["gpt2"]), build_tokenizer(), name="gpt2")
    ids = tiny.prompt(240, 7).ids
    done, calls = read(model, ids[:200], [Region("context", 0, 200)], 2000)
    assert done.chunks == -(-200 // (256 - 200 - 9))
    assert max(p for _, positions in calls for p in positions) == 255
    with pytest.raises(KvcliError, match="leaves no room to repeat it"):
        read(model, ids, [Region("context", 0, 240)], 2000)


@pytest.mark.parametrize("kind", ["shots", "context", "mixed", "union", "open", "plain"])
@pytest.mark.parametrize("n", [1, 2, 5, 40])
def test_what_is_repeated(kind: str, n: int) -> None:
    for back in range(min(n, 3)):
        regions = layout(kind, n)
        if back:
            kept = [(k, a, min(b, n - back), i) for k, a, b, i in regions if a < n - back]
            regions = [*kept, ("special", n - back, n, -1)]
        assert repeated_span([Region(*r) for r in regions]) == repeated(regions), regions


# What it keeps.


def context_with(prompt: Prompt, scores: list[Tensor], sinks: int = 4) -> Context:
    start, end = repeated(prompt.layout)
    context = context_for(build("snapkv"), prompt)
    found = Reconstruction(scores, start, end, chunks=1, worded=True)
    return dataclasses.replace(context, passes={"reconstruction": lambda: found}, _made={})


def size_of(prompt: Prompt, ratio: str, strict: bool = False) -> Budget:
    return Budget.of_ratio(Decimal(ratio), prompt.n, prompt.layers, prompt.kv_heads, strict)


def random_scores(prompt: Prompt, values: int, seed: int = 0) -> list[Tensor]:
    """Scores out of so many values: few of them tie often."""
    rng = np.random.default_rng([prompt.n, values, seed])
    shape = (prompt.layers, prompt.kv_heads, prompt.n)
    return list(torch.tensor(rng.integers(0, values, shape) / values))


def assert_selects(prompt: Prompt, scores: list[Tensor], ratio: str, sinks: int, strict: bool = False) -> None:
    size = size_of(prompt, ratio, strict)
    selection = build(f"kvzip:sinks={sinks}").select(context_with(prompt, scores), size)
    table = [s.tolist() for s in scores]
    kept, flags = kvzip(prompt, table, budget(ratio, prompt.n), sinks=sinks, strict=strict)
    where = f"{prompt.name} {prompt.layout} at {ratio}, sinks {sinks}"
    assert lists(selection, prompt.kv_heads) == kept, where
    assert selection.flags == flags, where
    total = sum(len(head) for layer in kept for head in layer)
    assert total == size.model_total or "over_budget" in flags, where
    assert all(head[-1] == prompt.n - 1 for layer in kept for head in layer)


@pytest.mark.parametrize("values", [1, 3, 10**9])
@pytest.mark.parametrize("n", [1, 2, 9, 64])
@pytest.mark.parametrize("kind", ["shots", "context", "plain", "open"])
def test_selection_agrees_with_plain_loops(kind: str, n: int, values: int) -> None:
    for kv_heads, group, layers in ((1, 2, 1), (2, 2, 3), (3, 1, 2)):
        prompt = random_prompt(n, kv_heads=kv_heads, group=group, layers=layers, regions=kind)
        for ratio in RATIOS:
            for sinks in (0, 4):
                assert_selects(prompt, random_scores(prompt, values), ratio, sinks)
                assert_selects(prompt, random_scores(prompt, values), ratio, sinks, strict=True)


@given(
    n=st.integers(1, 40), front=st.integers(0, 8), back=st.integers(0, 5), values=st.sampled_from([1, 2, 1000]),
    percent=st.integers(1, 100), seed=st.integers(0, 5), strict=st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None, derandomize=True)
def test_arbitrary_frames_agree(
    n: int, front: int, back: int, values: int, percent: int, seed: int, strict: bool
) -> None:
    """System text in front, question and template behind, of any length."""
    front, back = min(front, n - 1), min(back, max(0, n - 1 - front))
    asked = n - back - (n - back - front) // 4
    regions = [("system", 0, front, -1), ("context", front, asked, -1)]
    regions += [("question", asked, n - back, -1), ("special", n - back, n, -1)]
    prompt = dataclasses.replace(random_prompt(n, layers=2), layout=[r for r in regions if r[2] > r[1]])
    assert_selects(prompt, random_scores(prompt, values, seed), f"{percent / 100:.2f}", 4, strict)


def test_ties_keep_the_first_positions_of_all_heads() -> None:
    prompt = random_prompt(20, layers=2, regions="plain")
    selection = build("kvzip").select(context_with(prompt, random_scores(prompt, 1)), size_of(prompt, "0.5"))
    assert lists(selection, 2) == [[[0, 1, 2, 3, 4, 5, 6, 7, 8, 19]] * 2] * 2


def test_layers_and_heads_compete_for_one_budget() -> None:
    prompt = random_prompt(20, layers=2, regions="plain")
    scores = [torch.zeros(2, 20, dtype=torch.float64) for _ in range(2)]
    scores[1][0] = 0.5
    kept = build("kvzip:sinks=0").select(context_with(prompt, scores), size_of(prompt, "0.3")).kept
    assert [[len(h) for h in layer] for layer in kept] == [[2, 2], [18, 2]]
    assert kept[0][0].tolist() == [0, 19]


def test_the_pass_runs_once_for_all_ratios_and_seeds() -> None:
    prompt = random_prompt(30, layers=2)
    runs = []
    context = context_with(prompt, random_scores(prompt, 1000))
    found = context.passes["reconstruction"]()
    context.passes = {"reconstruction": lambda: runs.append(1) or found}
    for ratio in RATIOS:
        build("kvzip").select(dataclasses.replace(context, seed=len(ratio)), size_of(prompt, ratio))
    build("kvzip:sinks=0").select(context, size_of(prompt, "0.5"))
    assert len(runs) == 1


def test_a_prompt_through_pass_and_selection() -> None:
    """The whole way on a real model; the kept total is exact, heads differ, two prompts in a row do not mix."""
    model = tiny.tiny_llama()

    def kept_of(n: int) -> list[list[list[int]]]:
        prompt = tiny.prompt(n, n)
        dense = dense_of(model, prompt.ids)
        found = reconstruction(model, dense, prompt.ids, prompt.regions)
        context = Context(
            n=n, heads=4, kv_heads=2, token_ids=prompt.ids, regions=prompt.regions, keys=dense.keys,
            values=dense.values, column_sums={}, window_queries=[], scaling=[], sample_id="s", seed=0,
            passes={"reconstruction": lambda: found},
        )  # fmt: skip
        size = Budget.of_ratio(Decimal("0.4"), n, 3, 2)
        selection = build("kvzip").select(context, size)
        assert selection.notes == {"chunks": 1, "worded": False}
        kept = lists(selection, 2)
        assert sum(len(h) for layer in kept for h in layer) == size.model_total
        return kept

    first = kept_of(80)
    assert len({len(h) for layer in first for h in layer}) > 1
    kept_of(60)
    assert kept_of(80) == first
