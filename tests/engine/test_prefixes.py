"""Shared prefixes: found right, and without any effect on statistics, selections and tokens."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kvcli.attention.capture import Dense, Needs
from kvcli.config import SweepConfig
from kvcli.engine import prefixes
from kvcli.engine.needs import GIVEN
from kvcli.engine.prefixes import PrefixCache, shared_cuts
from kvcli.methods import catalog
from kvcli.models.prompt import Prompt
from kvcli.spans import Region
from tests.engine import tiny


def behind(prefix: list[int], n: int, seed: int) -> Prompt:
    """A prompt: the shared few-shot block, then a question of its own."""
    own = tiny.prompt(n, seed).ids[1:]
    at = len(prefix)
    shots = [Region("shot", a, b, i) for i, (a, b) in enumerate([(1, at // 2), (at // 2, at)])]
    regions = [Region("special", 0, 1), *shots, Region("question", at, at + len(own))]
    return Prompt(prefix + own, regions, "", list(range(at + len(own))), f"sha-{seed}")


@pytest.mark.parametrize("attn", ["blockwise", "sdpa", "reference"])
@pytest.mark.parametrize("lengths", [(5, 40, 17), (80, 3)])
def test_statistics_behind_a_prefix_equal_those_of_one_prefill(
    attn: str, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys, column sums and windows (which reach back into the prefix), float64."""
    monkeypatch.setattr(LlamaRMSNorm, "forward", tiny.exact_norm)
    model = tiny.tiny_llama(torch.float64)
    model.attn = attn
    needs = Needs(frozenset({"all", "question"}), 24)
    head = tiny.prompt(50, 9).ids
    prompts = [behind(head, n, n) for n in lengths]
    first = model.prefill([head[:20]], needs, [20]).dense(0)
    prefix = model.prefill([head[20:]], needs, [30], first).dense(0)  # a prefix built on a prefix
    shared = model.prefill([p.ids[50:] for p in prompts], needs, [0] * len(prompts), prefix)
    for row, prompt in enumerate(prompts):
        alone = model.prefill([prompt.ids], needs, [50])
        a, b = alone.dense(0), shared.dense(row)
        for name in ("keys", "values", "window_queries"):
            for x, y in zip(getattr(a, name), getattr(b, name), strict=True):
                torch.testing.assert_close(x, y, atol=1e-10, rtol=0)
        for name, sums in a.column_sums.items():
            for x, y in zip(sums, b.column_sums[name], strict=True):
                torch.testing.assert_close(x, y, atol=1e-10, rtol=0)
        torch.testing.assert_close(alone.logits[0], shared.logits[row], atol=1e-5, rtol=0)  # kept in float32


def test_a_sweep_behind_a_shared_block_gives_the_records_of_whole_prefills(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaRMSNorm, "forward", tiny.exact_norm)
    model = tiny.tiny_llama(torch.float64)
    blocks = [tiny.prompt(70, 1).ids, tiny.prompt(70, 1).ids[:40] + tiny.prompt(60, 2).ids[1:]]
    prompts = tiny.prompt_set([9] * 7)
    prompts.prompts = [behind(blocks[i % 3 == 0], 8 + 3 * i, i) for i in range(7)]
    config = SweepConfig(
        methods=tuple(
            n
            for n in catalog.names()
            if n != "full"
            and not any(map(GIVEN.fullmatch, catalog.build(n).needs()))
            and catalog.find(n).kind != "merge"
        ),
        ratios=("0.3",),
    )
    calls: list[int] = []
    whole = model.prefill
    # a pass that reads a whole prompt again for its bands shares nothing
    monkeypatch.setattr(
        model, "prefill",
        lambda ids, needs, *a: calls.append(0 if needs.bands else sum(map(len, ids))) or whole(ids, needs, *a),
    )  # fmt: skip
    shared, _ = tiny.run(model, config, prompts, prefill_rows=4)
    tokens_shared = sum(calls)
    calls.clear()
    monkeypatch.setattr(prefixes, "LEAST", 10**6)
    monkeypatch.setattr(prefixes.shared_cuts, "__defaults__", (10**6,))
    separate, _ = tiny.run(model, config, prompts, prefill_rows=4)
    assert tokens_shared < 0.5 * sum(calls)
    truth = {key: tiny.same(r) for key, r in separate.by_key().items()}
    assert {key: tiny.same(r) for key, r in shared.by_key().items()} == truth
    assert shared.maps == separate.maps


@given(st.integers(0, 10**6))
def test_cuts_lie_on_tokens_that_others_share(seed: int) -> None:
    rng = random.Random(seed)
    roots = [[rng.randrange(3) for _ in range(rng.randrange(4, 20))] for _ in range(3)]
    prompts = [rng.choice(roots) + [rng.randrange(3) for _ in range(rng.randrange(1, 12))] for _ in range(8)]
    limits = [rng.randrange(1, len(p)) for p in prompts]
    cuts = shared_cuts(prompts, limits, least=4)
    for i, mine in enumerate(cuts):
        assert list(mine) == sorted(set(mine))
        assert all(b - a >= 4 for a, b in zip((0, *mine), mine, strict=False))
        for cut in mine:
            assert cut <= limits[i]
            others = [j for j, p in enumerate(prompts) if j != i and p[:cut] == prompts[i][:cut]]
            assert any(cut in cuts[j] for j in others)


def test_one_common_block_is_found_and_the_question_stays_out() -> None:
    head = list(range(100))
    prompts = [[*head, 7, 1, i] for i in range(5)]
    assert shared_cuts(prompts, [100] * 5) == [(100,)] * 5
    assert shared_cuts(prompts[:1], [100]) == [()]
    tree = [[*head, *[1] * 50, i] for i in range(2)] + [[*head, *[2] * 50, i] for i in range(2)]
    assert shared_cuts(tree, [150] * 4) == [(100, 150)] * 4


def test_the_cache_builds_step_by_step_and_forgets_the_oldest() -> None:
    built: list[tuple[int, int]] = []

    def extend(ids: object, parent: Dense | None) -> Dense:
        before = 0 if parent is None else parent.n
        built.append((before, len(ids)))  # type: ignore[arg-type]
        return Dense([torch.zeros(1, before + len(ids), 1)], [], {}, [])  # type: ignore[arg-type]

    cache = PrefixCache(extend, kept=2)
    ids = list(range(20))
    assert cache.get(ids, ()) is None
    assert cache.get(ids, (5, 12)).n == 12  # type: ignore[union-attr]
    cache.get(ids, (5, 12))
    assert built == [(0, 5), (5, 7)]
    cache.get([99, *ids], (9,))
    cache.get(ids, (5,))
    assert built == [(0, 5), (5, 7), (0, 9), (0, 5)]
