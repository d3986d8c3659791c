"""Oracles for what the methods' own files leave out: every base of the wrappers, sentences as units, and pairs that
moved to other positions. float64."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
import torch

from kvcli.config import SweepConfig
from kvcli.methods._units import positions, units
from kvcli.methods.catalog import build
from tests.engine import asks, tiny
from tests.engine.asks import exact_model
from tests.methods.test_audit_properties import whole_context
from tests.oracles.adakv import Scores, adakv
from tests.oracles.criticalkv import criticalkv
from tests.oracles.expected_attention import expected_attention
from tests.oracles.harness import budget_for, context_for, lists
from tests.oracles.lagkv import lagkv
from tests.oracles.picks import Top
from tests.oracles.prompts import Prompt, budget, random_prompt

RATIOS = ["0.02", "0.1", "0.25", "0.5", "0.77", "0.9", "1"]


# Wrappers over every base that ranks keys: the base's own oracle gives the scores.


def received_by_head(prompt: Prompt, per_head: list[np.ndarray], newest: int) -> Scores:
    """[layer][KV head][key before the newest]: mean over the group of the query heads' numbers."""
    group = prompt.group
    return [
        [
            [
                sum(float(rows[h, p]) for h in range(g * group, (g + 1) * group)) / group
                for p in range(prompt.n - newest)
            ]
            for g in range(prompt.kv_heads)
        ]
        for rows in per_head
    ]


def base_scores(base: str, prompt: Prompt, ctx: Any, size: int) -> tuple[Scores, int, int, set[str]]:
    """(scores of the keys in the contest, newest tokens and sinks that are not in it, flags)."""
    if base == "h2o":
        newest = max(1, size // 2)
        return received_by_head(prompt, prompt.column_sums(), newest), newest, 0, set()
    if base == "oracle":
        found = [s.numpy() for s in ctx.extra("answer").sums]
        return received_by_head(prompt, found, 1), 1, 0, set()
    dim = prompt.keys[0].shape[2]
    frequencies = [1e4 ** -(2 * j / dim) for j in range(dim // 2)]
    answer = expected_attention(prompt, size, frequencies, vnorm="false")
    first = next(pick for layer in answer.picks for pick in layer if isinstance(pick, Top))
    sinks = len(first.forced) - 1
    scores = [
        [[pick.scores[p] for p in range(sinks, prompt.n - 1)] for pick in layer if isinstance(pick, Top)]
        for layer in answer.picks
    ]
    return scores, 1, sinks, answer.flags


BASES = {"h2o": "base=h2o", "oracle": "base=oracle", "expected": "base=expected_attention,base.vnorm=false"}


@pytest.mark.parametrize("n", [2, 9, 40])
@pytest.mark.parametrize("rule", ["floor", "safeguard"])
@pytest.mark.parametrize("base", BASES)
def test_head_budgets_over_any_base_agree(base: str, rule: str, n: int) -> None:
    method = build(f"adakv:{BASES[base]},rule={rule}")
    for kv_heads, group in ((2, 2), (3, 1), (1, 4)):
        prompt = random_prompt(n, kv_heads=kv_heads, group=group, layers=2, dim=4, seed=6)
        ctx = whole_context(method, prompt)
        for ratio in RATIOS:
            size = budget(ratio, n)
            scores, newest, sinks, flags = base_scores(base, prompt, ctx, size)
            sizes = [max(0, size - newest - sinks)] * prompt.layers
            wanted = adakv(scores, sizes, newest, sinks, n, flags, rule=rule)
            selection = method.select(ctx, budget_for(prompt, ratio))
            for layer, picks in zip(lists(selection, kv_heads), wanted.picks, strict=True):
                for actual, pick in zip(layer, picks, strict=True):
                    assert not pick.objection(actual), (base, rule, prompt.name, ratio, pick.objection(actual))
            assert selection.flags == wanted.flags


@pytest.mark.parametrize("n", [2, 9, 40])
@pytest.mark.parametrize("heads", ["even", "adaptive"])
@pytest.mark.parametrize("base", ["h2o", "oracle"])
def test_second_stages_over_any_base_agree(base: str, heads: str, n: int) -> None:
    method = build(f"criticalkv:{BASES[base]},heads={heads}")
    for kv_heads, group in ((2, 2), (1, 4)):
        prompt = random_prompt(n, kv_heads=kv_heads, group=group, layers=2, dim=4, seed=7)
        ctx = whole_context(method, prompt)
        assert ctx.o_proj is not None
        matrices = [ctx.o_proj(layer).numpy() for layer in range(2)]
        for ratio in RATIOS:
            size = budget(ratio, n)
            scores, newest, _, flags = base_scores(base, prompt, ctx, size)
            sizes = [max(0, size - newest)] * 2
            wanted = criticalkv(prompt, matrices, scores, sizes, newest, flags, heads=heads)
            selection = method.select(ctx, budget_for(prompt, ratio))
            for layer, picks in zip(lists(selection, kv_heads), wanted.picks, strict=True):
                for actual, pick in zip(layer, picks, strict=True):
                    assert not pick.objection(actual), (base, heads, prompt.name, ratio, pick.objection(actual))


def test_lagkv_as_a_base_shares_out_ranks() -> None:
    """adakv over LagKV's ranks at floor=1 is LagKV: every head keeps the same number of each partition."""
    plain, wrapped = build("lagkv:sinks=2,lag=8"), build("adakv:base=lagkv,base.sinks=2,base.lag=8,floor=1")
    for n in (11, 30, 60):
        prompt = random_prompt(n, kv_heads=3, group=2, layers=2, dim=4)
        for ratio in RATIOS:
            size = budget_for(prompt, ratio)
            found = wrapped.select(whole_context(wrapped, prompt), size)
            alone = plain.select(whole_context(plain, prompt), size)
            assert lists(found, 3) == lists(alone, 3) and found.flags == alone.flags
            wanted = lagkv(prompt, budget(ratio, n), sinks=2, lag=8)
            assert not any(
                pick.objection(head)
                for layer, picks in zip(lists(found, 3), wanted.picks, strict=True)
                for head, pick in zip(layer, picks, strict=True)
            )


# Positions inside the cache.


@pytest.mark.parametrize("first_token", ["compressed", "prefill"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_rerotated_pairs_generate_what_the_kept_tokens_alone_generate(
    kv_heads: int, first_token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a model of one layer a pair depends on its token and its position only: then the streaming cache with moved
    keys is the cache of a prompt of the kept tokens, and goes on at its length."""
    monkeypatch.setattr("kvcli.engine.asking.end_tokens", lambda model: frozenset())
    text, prompts = "streaming_llm:rerotate=true", asks.of_length(tiny.prompt_set([60, 41]), 12)
    config = SweepConfig(methods=(text, "streaming_llm"), ratios=("0.4",), first_token=(first_token,))
    with exact_model(layers=1, kv_heads=kv_heads) as model:
        sink, outcome = tiny.run(model, config, prompts)
        assert outcome.errors == 0
        model.hf.set_attn_implementation("sdpa")
        model.hf.generation_config.eos_token_id = None
        unlike = 0
        for record in sink.records:
            if record["method"] == "full":
                continue
            (places,) = sink.maps[record["cell_id"], record["sample_id"]][0]
            ids = [prompts.prompts[int(record["sample_id"][1:])].ids[p] for p in places]
            out = record["output_ids"]
            begun = ids if first_token == "compressed" else [*ids, out[0]]
            done = model.hf.generate(torch.tensor([begun]), max_new_tokens=12, do_sample=False, pad_token_id=0)
            wanted = done[0, len(ids) :].tolist()[:12]
            if record["method"] == text:
                assert out == wanted
            else:
                unlike += out != wanted
    assert unlike, "with their original positions the pairs say something else"


# Sentences as units, where a prompt has passages and no shots.

TEXT = (
    'He said "Hi." Then he left (as above). Really? She asked! It ended. Pi is 3.14 here... and so on.\n'
    "A new line.  Two blanks before. No end"
)


def sentences(text: str) -> list[str]:
    """One character after the other: a sentence ends behind . ! or ? and its closing marks, where a blank follows."""
    out, begin, i = [], 0, 0
    while i < len(text):
        if text[i] in ".!?":
            j = i + 1
            while j < len(text) and text[j] in ".!?\"')]":
                j += 1
            if j == len(text) or text[j].isspace():
                out.append(text[begin:j])
                begin = j
            i = j
        else:
            i += 1
    return [*out, text[begin:]] if text[begin:].strip() else out


def pieces(text: str, style: str) -> list[str]:
    """Tokens: words with the blank in front, or behind, or blanks of their own; marks together or one by one."""
    pattern = {"front": r"\s*[A-Za-z0-9]+|\s*[^\sA-Za-z0-9]+|\s+", "behind": r"[A-Za-z0-9]+\s*|[^\sA-Za-z0-9]+\s*|\s+",
               "apart": r"[A-Za-z0-9]+|[^\sA-Za-z0-9]+|\s+",
               "single": r"\s*[A-Za-z0-9]+|\s*[^\sA-Za-z0-9]|\s+"}[style]  # fmt: skip
    found = re.findall(pattern, text)
    assert "".join(found) == text
    return found


@pytest.mark.parametrize("style", ["front", "behind", "apart", "single"])
def test_passages_compete_in_whole_sentences(style: str) -> None:
    tokens = pieces(TEXT, style)
    n = len(tokens) + 4
    layout = [("special", 0, 1, -1), ("context", 1, n - 3, -1), ("question", n - 3, n, -1)]
    prompt = dataclasses.replace(random_prompt(n, layers=2), layout=layout)
    method = build("shotkv")
    ctx = dataclasses.replace(context_for(method, prompt), token_text=lambda i: tokens[i - 1] if 0 < i < n - 3 else "x")
    found = ["".join(tokens[p - 1] for p in positions([span])) for (span,) in units(ctx)]
    assert [x.strip() for x in found] == [x.strip() for x in sentences(TEXT)]
    assert "".join(found) == TEXT
    spans = [set(positions(unit)) for unit in units(ctx)]
    means = [
        [float(np.mean([prompt.column_sums()[layer][:, p].sum() for p in sorted(unit)])) for unit in spans]
        for layer in range(2)
    ]
    for ratio in RATIOS:
        kept = lists(method.select(ctx, budget_for(prompt, ratio)), 2)
        fixed = {0, n - 3, n - 2, n - 1}
        for layer in range(2):
            room, wanted = budget(ratio, n) - len(fixed), set(fixed)
            for unit in sorted(range(len(spans)), key=lambda u, layer=layer: (-means[layer][u], u)):
                if len(spans[unit]) <= room:
                    wanted |= spans[unit]
                    room -= len(spans[unit])
            assert kept[layer] == [sorted(wanted)] * 2, ratio


def test_a_passage_without_sentences_competes_in_blocks_of_16_and_each_passage_alone() -> None:
    layout = [("context", 0, 40, -1), ("context", 40, 50, -1), ("question", 50, 52, -1)]
    prompt = dataclasses.replace(random_prompt(52, layers=1), layout=layout)
    words = ["w "] * 44 + ["end. "] + ["w "] * 7
    ctx = dataclasses.replace(context_for(build("shotkv"), prompt), token_text=lambda i: words[i])
    assert units(ctx) == [[(0, 16)], [(16, 32)], [(32, 40)], [(40, 45)], [(45, 50)]]
