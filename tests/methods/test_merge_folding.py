"""Merging while generating: pairs that leave a batch of rows against an explicit merge, pair by pair."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from kvcli.methods import _folding
from kvcli.methods.base import Merge
from kvcli.methods.catalog import build
from kvcli.methods.composed import merge_of
from kvcli.methods.context import Context
from kvcli.methods.generating import Generating
from tests.oracles import merging as oracle
from tests.oracles.harness import context_for
from tests.oracles.prompts import random_prompt


def merging(text: str) -> Merge:
    made = merge_of(build(f"h2o+{text}"))
    assert made is not None
    return made


WAYS = ["merge", "merge:weights=cosine", "merge:beta=0.25", "merge:style=cam", "merge:style=cam,window=4"]
GROUP, KV_HEADS, DIM = 2, 2, 6


class Rows:
    """Rows of one layer as the engine holds them: slots in no order, NaN in empty ones; and as the oracle does."""

    def __init__(self, text: str, sizes: Sequence[int], slots: int, seed: int, tied: bool = False) -> None:
        self.made, self.rng, self.tied = merging(text), np.random.default_rng(seed), tied
        self.style = "cam" if "cam" in text else "d2o"
        self.keys, self.values = (np.full((len(sizes), KV_HEADS, slots, DIM), np.nan) for _ in range(2))
        self.position = np.full((len(sizes), KV_HEADS, slots), -1)
        self.n, self.t = np.array(sizes), 0
        for r, size in enumerate(sizes):
            for g in range(KV_HEADS):
                for p, slot in enumerate(self.rng.permutation(slots)[:size]):
                    self._place(r, g, slot, p)
        begun = [self.made.decode_facts(self._context(r), 0, [torch.arange(int(n))] * 2) for r, n in enumerate(sizes)]
        self.facts = {name: torch.stack([facts[name] for facts in begun]) for name in begun[0]}
        self.oracles = [self._oracle(text, r) for r in range(len(sizes))]

    def _context(self, r: int) -> Context:
        """Of a prompt that was kept whole: nothing was merged yet."""
        prompt = random_prompt(int(self.n[r]), kv_heads=KV_HEADS, group=GROUP, layers=1, dim=DIM, seed=r)
        return dataclasses.replace(context_for(self.made, prompt), sample_id=f"row {r}")

    def _oracle(self, text: str, r: int) -> oracle.Merging:
        if self.style == "cam":
            return oracle.CaM([self.facts["merge_key"][r].tolist()], [], 4 if "window" in text else 32)
        settings = {"weights": "cosine"} if "cosine" in text else {"beta": 0.25} if "beta" in text else {}
        return oracle.D2O(**settings)  # type: ignore[arg-type]

    def _place(self, r: int, g: int, slot: int, p: int) -> None:
        """Tied keys are a few directions with other lengths, so that many cosines are equal."""
        way = np.zeros(DIM)
        way[self.rng.integers(3)] = 2.0 ** self.rng.integers(-2, 3)
        self.keys[r, g, slot] = way if self.tied else self.rng.standard_normal(DIM)
        self.values[r, g, slot] = self.rng.standard_normal(DIM)
        self.position[r, g, slot] = p

    def grow(self) -> None:
        """One more token for each row."""
        for r in range(len(self.n)):
            for g in range(KV_HEADS):
                self._place(r, g, int(np.argmin(self.position[r, g])), int(self.n[r]) + self.t)
        self.t += 1

    def attention(self) -> np.ndarray:
        weights = self.rng.random((len(self.n), KV_HEADS * GROUP, self.position.shape[2])) ** 3
        weights *= np.repeat(self.position >= 0, GROUP, 1)
        return weights / weights.sum(-1, keepdims=True)

    def view(self, attention: np.ndarray, rows: Sequence[int]) -> Generating:
        which = list(rows)
        position = torch.tensor(self.position[which])
        newest = torch.tensor(self.n[which] + self.t - 1)[:, None, None]
        return Generating(
            layer=0, heads=KV_HEADS * GROUP, position=position, competing=position >= 0,
            attention=torch.tensor(attention[which]) if self.made.decode_reads else None,
            n=torch.tensor(self.n[which])[:, None, None], newest=newest, cap=newest, counts=newest >= 0,
            keys=torch.tensor(self.keys[which]), values=torch.tensor(self.values[which]),
            facts={name: figures[which].clone() for name, figures in self.facts.items()},
        )  # fmt: skip

    def step(self, gone: np.ndarray) -> None:
        """Folds in one batch, in a batch of one for each row, and by hand; compares the three."""
        attention = self.attention()
        every = range(len(self.n))
        view = self.view(attention, every)
        assert view.keys is not None and view.values is not None
        self.made.decode_fold(view, torch.tensor(gone))
        for r in every:
            alone = self.view(attention, [r])
            self.made.decode_fold(alone, torch.tensor(gone[[r]]))
            assert close(alone.keys[0], view.keys[r]) and close(alone.values[0], view.values[r])  # type: ignore[index]
            assert all(close(alone.facts[name][0], view.facts[name][r]) for name in view.facts)
            self._compare(r, gone[r], attention[r], view)
        self.keys, self.values, self.facts = view.keys.numpy(), view.values.numpy(), view.facts
        self.position[gone] = -1
        self.keys[gone] = self.values[gone] = np.nan

    def _compare(self, r: int, gone: np.ndarray, attention: np.ndarray, view: Generating) -> None:
        slots = [{int(p): s for s, p in enumerate(self.position[r, g]) if p >= 0} for g in range(KV_HEADS)]
        held = [{p: (self.keys[r, g, s], self.values[r, g, s]) for p, s in slots[g].items()} for g in range(KV_HEADS)]
        row = [{p: float(attention[h, s]) for p, s in slots[h // GROUP].items()} for h in range(KV_HEADS * GROUP)]
        leaving = [sorted(p for p, s in slots[g].items() if gone[g, s]) for g in range(KV_HEADS)]
        self.oracles[r].step(0, held, leaving, row, int(self.n[r]) + self.t - 1)
        for g in range(KV_HEADS):
            assert sorted(held[g]) == sorted(set(slots[g]) - set(leaving[g]))
            for p, pair in held[g].items():
                for found, wanted in zip((view.keys, view.values), pair, strict=True):
                    assert np.allclose(found[r, g, slots[g][p]].numpy(), wanted, rtol=0, atol=1e-12)  # type: ignore[index]


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(-7), b.nan_to_num(-7))


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.double(), b.double(), rtol=0, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("text", WAYS)
def test_what_leaves_is_folded_as_by_hand_whoever_is_in_the_batch(text: str, tied: bool) -> None:
    """Many steps: now and then a row or a head loses nothing, or several at once, or all but one."""
    rows = Rows(text, [12, 5, 20], 26, seed=4, tied=tied)
    folded = 0
    for step in range(14):
        rows.grow()
        gone = np.zeros(rows.position.shape, dtype=bool)
        for r in range(3):
            for g in range(KV_HEADS):
                filled = np.flatnonzero(rows.position[r, g] >= 0)
                most = len(filled) - 1 if step == 9 else 3
                count = 0 if step % 4 == r else min(len(filled) - 1, int(rows.rng.integers(0, most + 1)))
                gone[r, g, rows.rng.permutation(filled)[:count]] = True
        folded += gone.sum()
        rows.step(gone)
    assert folded > 40


@pytest.mark.parametrize("text", WAYS)
def test_where_nothing_leaves_not_a_bit_changes(text: str) -> None:
    rows = Rows(text, [12, 5], 20, seed=1)
    rows.grow()
    gone = np.zeros(rows.position.shape, dtype=bool)
    gone[0, 1, np.flatnonzero(rows.position[0, 1] >= 0)[0]] = True
    before = rows.view(rows.attention(), [1])
    rows.step(gone)
    after = rows.view(rows.attention(), [1])
    assert same(before.keys, after.keys) and same(before.values, after.values)  # type: ignore[arg-type]
    assert all(same(before.facts[name], after.facts[name]) for name in before.facts)
    whole = rows.view(rows.attention(), [0, 1])
    kept = [whole.keys.clone(), whole.values.clone()]  # type: ignore[union-attr]
    rows.made.decode_fold(whole, torch.zeros_like(whole.position, dtype=torch.bool))
    assert same(kept[0], whole.keys) and same(kept[1], whole.values)  # type: ignore[arg-type]


def test_the_threshold_begins_with_the_prompts_mean_and_moves() -> None:
    """By hand: the prompt's cosines 1 and 0.6; then one of 0 leaves, and is not merged; then one of 1."""
    made = merging("merge:beta=0.5")
    ctx = context_for(made, random_prompt(5, kv_heads=1, group=1, layers=1, dim=2, regions="plain"))
    ctx.keys[0] = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.6, 0.8], [-1.0, 0.1], [0.0, 5.0]]]).double()
    kept = [torch.tensor([0, 3, 4])]
    alone = made.decode_facts(ctx, 0, kept)
    made.fold(ctx, 0, kept)
    facts = {name: figure[None] for name, figure in made.decode_facts(ctx, 0, kept).items()}
    assert torch.equal(alone["merge_threshold"], facts["merge_threshold"][0])
    assert torch.allclose(facts["merge_threshold"], torch.tensor([[0.8]]).double())
    keys = torch.tensor([[[[1.0, 0.0], [0.0, 3.0], [4.0, 0.0]]]]).double()
    for gone, threshold, first in ((1, 0.4, [1.0, 0.0]), (2, 0.7, [2.5, 0.0])):
        view = _view(keys, torch.tensor([[[0, 6, 7]]]) if gone == 1 else torch.tensor([[[0, -1, 7]]]), facts)
        made.decode_fold(view, torch.arange(3)[None, None] == gone)
        assert torch.allclose(facts["merge_threshold"], torch.tensor([[threshold]]).double())
        assert torch.allclose(keys[0, 0, 0], torch.tensor(first).double())
        assert torch.equal(view.values, torch.cat([keys[:, :, :1], view.values[:, :, 1:]], 2))  # type: ignore[index, arg-type]


def _view(keys: Tensor, position: Tensor, facts: dict[str, Tensor]) -> Generating:
    """Of one row whose values are its keys."""
    one = torch.ones(1, 1, 1, dtype=torch.int64)
    return Generating(
        layer=0, heads=1, position=position, competing=position >= 0, attention=None, n=5 * one, newest=7 * one,
        cap=one, counts=one > 0, keys=keys, values=keys.clone(), facts=facts,
    )  # fmt: skip


def test_a_prompt_that_lost_nothing_has_no_threshold_yet() -> None:
    made = merging("merge")
    ctx = context_for(made, random_prompt(9, layers=1, dim=2, regions="plain"))
    for kept in (torch.arange(9), torch.tensor([8])):
        assert made.decode_facts(ctx, 0, [kept] * 2)["merge_threshold"].isnan().all()


def test_draws_are_uniform_and_each_heads_and_places_own() -> None:
    keys = torch.tensor([3, -5, 1 << 61])[:, None]
    drawn = _folding.uniform(keys, torch.arange(4000))
    for key, row in zip(keys[:, 0].tolist(), drawn, strict=True):
        assert row[:50].tolist() == [oracle.uniform(key, p) for p in range(50)]
    assert bool((drawn >= 0).all()) and bool((drawn < 1).all())
    assert torch.allclose(drawn.mean(1), torch.tensor(0.5), atol=0.02)
    assert torch.allclose(drawn.var(1), torch.tensor(1 / 12), atol=0.005)
    assert abs(float(torch.corrcoef(drawn)[0, 1])) < 0.05
    assert len(set(drawn.flatten().tolist())) > 11_900


def test_keys_of_the_draws_are_the_samples_the_seeds_and_the_layers_own() -> None:
    made = merging("merge:style=cam")
    ctx = context_for(made, random_prompt(9, layers=2, dim=8, regions="plain"))
    found = [
        made.decode_facts(dataclasses.replace(ctx, **more), layer, [])["merge_key"].tolist()  # type: ignore[arg-type]
        for more in ({}, {"seed": 1}, {"sample_id": "other"})
        for layer in (0, 1)
    ]
    assert len({key for keys in found for key in keys}) == 12
    assert found[0] == made.decode_facts(ctx, 0, [])["merge_key"].tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("text", ["merge", "merge:style=cam"])
def test_16_bit_pairs_are_folded_in_float32(text: str, dtype: torch.dtype) -> None:
    rows = Rows(text, [12, 9], 14, seed=2)
    rows.grow()
    gone = torch.tensor(rows.position >= 0) & torch.tensor(rows.rng.random(rows.position.shape) < 0.3)
    view = rows.view(rows.attention(), [0, 1])
    assert view.keys is not None and view.values is not None
    low = dataclasses.replace(view, keys=view.keys.to(dtype), values=view.values.to(dtype))
    low.facts = {name: figures.clone() for name, figures in view.facts.items()}
    exact = dataclasses.replace(view, keys=low.keys.double(), values=low.values.double())  # type: ignore[union-attr]
    rows.made.decode_fold(low, gone)
    rows.made.decode_fold(exact, gone)
    changed = 0
    for a, b, before in ((low.keys, exact.keys, view.keys), (low.values, exact.values, view.values)):
        assert a is not None and b is not None and a.dtype == dtype
        assert torch.allclose(a.double(), b, rtol=torch.finfo(dtype).eps, atol=1e-6, equal_nan=True)
        changed += int((b != before.to(dtype).double()).sum() - b.isnan().sum())
    assert changed > 0


def test_rows_compared_one_by_one_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows("merge", [12, 9, 15], 16, seed=3)
    gone = torch.tensor((rows.position >= 0) & (rows.rng.random(rows.position.shape) < 0.4))
    views = []
    for block in (_folding._BLOCK_BYTES, 1):
        monkeypatch.setattr(_folding, "_BLOCK_BYTES", block)
        view = rows.view(rows.attention(), range(3))
        rows.made.decode_fold(view, gone)
        views.append(view)
    one, other = views
    assert close(one.keys, other.keys) and close(one.values, other.values)  # type: ignore[arg-type]
    assert not close(one.values, torch.tensor(rows.values))  # type: ignore[arg-type]


def test_pairs_that_are_all_alike_are_all_folded_in() -> None:
    """Their mean cosine must not come out above each of them by rounding."""
    made, rng = merging("merge"), torch.Generator().manual_seed(5)
    for _ in range(60):
        keys = torch.randn(1, 1, 4, 3, generator=rng, dtype=torch.float64)
        keys[:, :, 2:] = keys[:, :, 1:2]
        view = _view(keys, torch.arange(4)[None, None], {"merge_threshold": torch.full((1, 1), torch.nan).double()})
        own, other = keys[0, 0, 0].clone(), keys[0, 0, 1].clone()
        weight = torch.nn.functional.cosine_similarity(own, other, 0).exp()
        made.decode_fold(view, torch.arange(4)[None, None] > 0)
        assert torch.allclose(keys[0, 0, 0], (torch.e * own + 3 * weight * other) / (torch.e + 3 * weight))
