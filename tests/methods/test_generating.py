"""Eviction while generating: every method's figures and ranks against its paper's rule in plain loops.

A pool in plain Python plays the engine's part on random attention: slots in no order, freed slots used again, rows of
different prompts, budgets and ages. The masked model that the engine is compared with is checked here too.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kvcli.errors import KvcliError
from kvcli.methods.base import Method
from kvcli.methods.catalog import build, find, names
from kvcli.methods.generating import Generating
from tests.oracles.generating import H2O, RULES, Heads, Masked, Row, Rule, cap, evicted, masked_generate, rule_of
from tests.oracles.harness import context_for, select
from tests.oracles.prompts import Array, Prompt, random_prompt, tied_prompt

LAYER = 1
ALIKE = {"tova", "shotkv"}
"""Methods that rank all KV heads of a layer alike, and so rely on equal slots."""
TEXTS = [
    "h2o", "h2o:reduce=max", "streaming_llm", "streaming_llm:sinks=0", "streaming_llm:sinks=9", "tova",
    "scissorhands", "scissorhands:history=7,recent=3", "scissorhands:history=8,recent=1,reduce=max",
    "scissorhands:history=17", "scissorhands:history=1", "shotkv", "shotkv:recent=3", "shotkv:queries=window,window=4",
    "scope", "scope:recent=2", "scope:prefill=snapkv,recent=1,reduce=max",
]  # fmt: skip


@dataclass
class PoolRow:
    """One row's layer. position, state: per KV head and slot, as the engine holds them; visible: what the rule left."""

    prompt: Prompt
    rule: Rule
    limits: dict[str, Any]
    fed_again: bool
    position: torch.Tensor
    state: dict[str, torch.Tensor]
    last: dict[str, torch.Tensor]
    """Figures of the prompt's last token, for the slot it gets when it is fed again."""
    visible: Heads
    newest: int = field(init=False)

    def __post_init__(self) -> None:
        self.newest = self.prompt.n - (2 if self.fed_again else 1)

    def cap(self, t: int) -> int:
        return cap(t, self.prompt.n, self.rule.separate, least=self.rule.least, **self.limits)

    def held(self) -> Heads:
        return [sorted(p for p in head if p >= 0) for head in self.position.tolist()]


class Pool:
    """Rows of one method. attention(rng) makes one weight."""

    def __init__(self, method: Method, rng: random.Random, attention: Any, slots: int, interval: int = 1) -> None:
        self.method, self.rng, self.attention, self.slots, self.interval = method, rng, attention, slots, interval
        self.alike = method.name in ALIKE

    def enter(
        self, text: str, prompt: Prompt, ratio: str, limits: dict[str, Any], fed_again: bool, sums: list[Array] | None
    ) -> PoolRow:
        kept = select(text, prompt, ratio, **({"column_sums": sums} if sums else {}))[0][LAYER]
        ctx = context_for(self.method, prompt, column_sums=sums)
        start = self.method.decode_start(ctx, LAYER)
        n, heads = prompt.n, prompt.kv_heads
        position = torch.full((heads, self.slots), -1)
        state = {name: torch.full((len(f), self.slots, *f.shape[2:]), 77, dtype=f.dtype) for name, f in start.items()}
        stored = [[p for p in head if not (fed_again and p == n - 1)] for head in kept]
        order = self.rng.sample(range(self.slots), self.slots)
        for g, positions in enumerate(stored):
            own = order if self.alike else self.rng.sample(range(self.slots), self.slots)
            for slot, p in zip(own, positions, strict=False):
                position[g, slot] = p
                for name, figures in start.items():
                    for x in self._members(len(figures), heads, g):
                        state[name][x, slot] = figures[x, p]
        rule = rule_of(text, prompt.heads, heads)
        rule.start(LAYER, prompt.attention[LAYER])
        if sums and isinstance(rule, H2O):
            for h in range(prompt.heads):
                rule.sums[LAYER, h] = {p: float(sums[LAYER][h, p]) for p in range(n)}
        last = {name: figures[:, n - 1].clone() for name, figures in start.items()}
        return PoolRow(prompt, rule, {"ratio": ratio, **limits}, fed_again, position, state, last, stored)

    def step(self, rows: list[PoolRow]) -> None:
        """One new token for each of these rows, in one batch."""
        seen = [self._store(row) for row in rows]
        limits = [row.cap(row.newest - row.prompt.n + 1) for row in rows]
        position = torch.stack([row.position for row in rows])
        n, newest = (torch.tensor([[[x]] for x in xs]) for xs in ([r.prompt.n for r in rows], [r.newest for r in rows]))
        state = {name: torch.stack([row.state[name] for row in rows]) for name in rows[0].state}
        view = Generating(
            layer=LAYER, heads=rows[0].prompt.heads, position=position,
            competing=(position >= 0) & (position >= n if self.method.decoding == "separate" else True),
            attention=torch.stack([self._slots(row, s) for row, s in zip(rows, seen, strict=True)])
            if self.method.decode_reads else None,
            n=n, newest=newest, cap=torch.tensor([[[x]] for x in limits]), counts=newest >= n, state=dict(state),
        )  # fmt: skip
        self.method.decode_update(view)
        rank = self.method.decode_rank(view)
        assert rank.shape == position.shape and rank.is_floating_point()
        for r, (row, limit) in enumerate(zip(rows, limits, strict=True)):
            row.state = {name: tensor[r] for name, tensor in state.items()}  # what was changed in place
            t = row.newest - row.prompt.n + 1
            if t > 0:
                row.rule.see(LAYER, row.newest, seen[r])
            if t > 0 and t % self.interval == 0:
                row.visible = evicted(row.rule, LAYER, seen[r], row.visible, row.prompt.n, limit)
                for g in range(row.prompt.kv_heads):
                    self._evict(row, g, rank[r, g].tolist(), view.competing[r, g].tolist(), limit)

    def _evict(self, row: PoolRow, g: int, rank: list[float], competing: list[bool], limit: int) -> None:
        places = [s for s in range(self.slots) if competing[s]]
        leaving = sorted(places, key=lambda s: (rank[s], -int(row.position[g, s])))[: max(0, len(places) - limit)]
        for slot in leaving:
            assert rank[slot] < float("inf")
            row.position[g, slot] = -1

    def _store(self, row: PoolRow) -> Row:
        """Gives the newest token a slot per KV head, and its query's attention over what the row holds."""
        row.newest += 1
        chosen = None
        for g in range(row.prompt.kv_heads):
            free = [slot for slot, p in enumerate(row.position[g].tolist()) if p < 0]
            slot = chosen if chosen is not None and self.alike else self.rng.choice(free)
            chosen = slot
            row.position[g, slot] = row.newest
            for name, figures in row.state.items():
                for x in self._members(len(figures), row.prompt.kv_heads, g):
                    figures[x, slot] = row.last[name][x] if row.newest < row.prompt.n else 0
            row.visible[g].append(row.newest)
        assert row.held() == [sorted(head) for head in row.visible]
        group = row.prompt.group
        return [{p: self.attention(self.rng) for p in row.visible[h // group]} for h in range(row.prompt.heads)]

    def _slots(self, row: PoolRow, seen: Row) -> torch.Tensor:
        """[H, S]"""
        held, group = row.position.tolist(), row.prompt.group
        out = [[weights[p] if p >= 0 else 0.0 for p in held[h // group]] for h, weights in enumerate(seen)]
        return torch.tensor(out, dtype=torch.float64)

    @staticmethod
    def _members(x: int, kv_heads: int, g: int) -> range:
        """Which of X figures belong to KV head g."""
        return range(g * x // kv_heads, (g + 1) * x // kv_heads)


def any_weight(rng: random.Random) -> float:
    return rng.random() ** 4


def few_weights(rng: random.Random) -> float:
    """Sums and means of these are exact: many pairs tie."""
    return rng.choice([0.0, 0.03125, 0.0625, 0.25])


def play(
    text: str, group: int, limits: dict[str, Any], *, tied: bool = False, interval: int = 1, steps: int = 34,
    entering: tuple[int, ...] = (0, 0, 5, 11),
) -> list[PoolRow]:  # fmt: skip
    """Lets rows enter at these steps and generate until the first has `steps` tokens; every step is compared."""
    method = build(text)
    rng = random.Random(f"{text} {group} {limits} {tied} {interval}")
    pool = Pool(method, rng, few_weights if tied else any_weight, 80, interval)
    rows: list[PoolRow] = []
    lengths, ratios = [30, 13, 44, 22], ["0.5", "0.3", "0.25", "1"]
    for step in range(steps):
        for i in [i for i, at in enumerate(entering) if at == step]:
            prompt = (tied_prompt if tied else random_prompt)(lengths[i], group=group)
            sums = None
            if tied and method.needs() & {"column_sum"}:
                draw = np.random.default_rng(i)
                sums = [draw.integers(0, 3, (prompt.heads, prompt.n)).astype(float) for _ in range(prompt.layers)]
            rows.append(pool.enter(text, prompt, ratios[i], limits, i % 2 == 0, sums))
        pool.step(rng.sample(rows, len(rows)))  # in any order of the batch
        for row in rows:
            assert row.held() == row.visible, f"{text}, step {step}, prompt of {row.prompt.n}"
    return rows


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("limits", [{"decode_ratio": "0.5"}, {"decode_budget": 6}, {"decode_ratio": "0.1"}])
@pytest.mark.parametrize("text", TEXTS)
def test_pairs_leave_as_the_paper_says(text: str, limits: dict[str, Any], group: int) -> None:
    rows = play(text, group, limits)
    t = [row.newest - row.prompt.n + 1 for row in rows]
    assert max(t) >= 33 and len(set(t)) > 2
    for row, done in zip(rows, t, strict=True):
        competing = [[p for p in head if not row.rule.separate or p >= row.prompt.n] for head in row.visible]
        assert {len(head) for head in competing} == {row.cap(done)}


@pytest.mark.parametrize("text", ["h2o", "streaming_llm", "tova", "scissorhands:history=9"])
def test_pairs_leave_a_pool_that_does_not_grow(text: str) -> None:
    for row in play(text, 2, {"fixed": True}):
        assert {len(head) for head in row.visible} == {row.cap(0)}


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("text", TEXTS)
def test_of_equal_pairs_the_newest_leaves(text: str, group: int) -> None:
    """Weights and sums of few exact values: without the rule for ties the sets would differ."""
    play(text, group, {"decode_ratio": "0.5"}, tied=True)
    play(text, group, {"decode_budget": 5}, tied=True, steps=25)


@pytest.mark.parametrize("interval", [3, 8])
@pytest.mark.parametrize("text", TEXTS)
def test_pairs_leave_together_at_an_interval(text: str, interval: int) -> None:
    """Between two evictions the figures go on and nothing leaves; then several leave at once."""
    play(text, 2, {"decode_ratio": "0.5"}, interval=interval)


@pytest.mark.parametrize("text", TEXTS)
def test_a_row_alone_evicts_as_its_rule_says(text: str) -> None:
    for number in range(4):
        alone = tuple(0 if i == number else 1000 for i in range(4))
        assert len(play(text, 2, {"decode_ratio": "0.25"}, entering=alone, steps=15)) == 1


@pytest.mark.parametrize("text", TEXTS)
def test_nothing_leaves_when_everything_is_kept(text: str) -> None:
    prompt, method = random_prompt(20), build(text)
    pool = Pool(method, random.Random(1), any_weight, 60)
    row = pool.enter(text, prompt, "1", {"decode_ratio": "1"}, True, None)
    for _ in range(20):
        pool.step([row])
    assert row.visible == [list(range(39))] * 2


def test_sinks_take_at_most_half_of_the_cap() -> None:
    """A prompt kept whole, shorter than its sinks: they are cut once something must leave."""
    method, prompt = build("streaming_llm:sinks=9"), random_prompt(5)
    pool = Pool(method, random.Random(3), any_weight, 30)
    row = pool.enter("streaming_llm:sinks=9", prompt, "1", {"decode_ratio": "0.1"}, False, None)
    for _ in range(15):
        pool.step([row])
        assert row.held() == row.visible
    assert row.visible == [[0, 1, 15, 16, 17, 18, 19]] * 2


def test_the_comparison_notices_a_wrong_rank_and_a_wrong_sum() -> None:
    """H2O ranked as TOVA; H2O that counts the query fed again twice."""
    with pytest.raises(AssertionError):
        _play_with("h2o", lambda method: _exchange(method, "decode_rank", build("tova").decode_rank))
    with pytest.raises(AssertionError):
        _play_with("h2o", lambda method: _exchange(method, "decode_update", _counts_always))


def _exchange(method: Method, name: str, value: Any) -> None:
    object.__setattr__(method, name, value)


def _counts_always(view: Generating) -> None:
    assert view.attention is not None
    view.state["received"] += view.attention


def _play_with(text: str, change: Any) -> None:
    prompt, method = random_prompt(40), build(text)
    change(method)
    pool = Pool(method, random.Random(2), any_weight, 100)
    row = pool.enter(text, prompt, "0.5", {"decode_ratio": "0.5"}, True, None)
    for _ in range(30):
        pool.step([row])
        assert row.held() == row.visible


def test_scissorhands_takes_a_query_back_when_it_falls_out_of_the_history() -> None:
    """By hand: history 2, three queries, one key that only the first finds unimportant."""
    method = build("scissorhands:history=2")
    state = {"count": torch.zeros(1, 1, 2, dtype=torch.int32), "low": torch.zeros(1, 1, 2, 1, dtype=torch.uint8)}
    counts = []
    for newest, weight in [(10, 0.01), (11, 0.9), (12, 0.9)]:
        view = Generating(
            layer=0, heads=1, position=torch.tensor([[[3, -1]]]), competing=torch.tensor([[[True, False]]]),
            attention=torch.tensor([[[weight, 0.0]]]), n=torch.tensor([[[5]]]), newest=torch.tensor([[[newest]]]),
            cap=torch.tensor([[[1]]]), counts=torch.tensor([[[True]]]), state=dict(state),
        )  # fmt: skip
        method.decode_update(view)
        counts.append(state["count"][0, 0].tolist())
    assert counts == [[1, 0], [1, 0], [0, 0]]


def test_every_method_that_compresses_generated_tokens_has_a_rule() -> None:
    decoding = {name for name in names() if find(name).decoding}
    assert decoding - set(RULES) <= {"pyramidinfer", "rkv", "fastgen", "duo_attention"}, "these have files of their own"
    assert {name: find(name).decoding for name in RULES} == {
        "h2o": "unified", "streaming_llm": "unified", "tova": "unified", "scissorhands": "unified",
        "shotkv": "separate", "scope": "separate",
    }  # fmt: skip
    for name in RULES:
        assert find(name).phases == ("prefill", "decode")


def test_settings_that_turn_the_decode_phase_off() -> None:
    assert build("streaming_llm").decodes() and not build("streaming_llm:rerotate=true").decodes()
    assert build("shotkv").decodes() and not build("shotkv:decode=off").decodes()
    assert not build("snapkv").decodes()
    assert [build(t).decode_least() for t in ("shotkv", "shotkv:recent=4", "scope")] == [1, 5, 1]


@pytest.mark.parametrize("text", ["shotkv:window=16", "shotkv:queries=question,window=5", "shotkv:decode=off,recent=2"])
def test_a_setting_without_effect_is_refused(text: str) -> None:
    with pytest.raises(KvcliError, match="has no effect without"):
        build(text)


# The caps of the oracle, by hand.


def test_caps() -> None:
    half = {"ratio": "0.5", "decode_ratio": "0.5"}
    assert [cap(t, 9, False, **half) for t in range(4)] == [5, 5, 6, 6]
    assert [cap(t, 9, False, budget=3, decode_ratio="0.5") for t in range(4)] == [3, 4, 4, 5]
    assert [cap(t, 9, False, ratio="0.5", decode_budget=2) for t in range(4)] == [5, 6, 7, 7]
    assert [cap(t, 9, False, ratio="0.5", fixed=True) for t in range(4)] == [5, 5, 5, 5]
    assert [cap(t, 9, True, **half) for t in range(6)] == [1, 1, 1, 2, 2, 3]
    assert [cap(t, 9, True, least=3, **half) for t in (1, 6, 7)] == [3, 3, 4]
    assert cap(5, 9, True, ratio="0.5", decode_budget=7) == 7
    assert cap(1000, 1000, False, ratio="0.1", decode_ratio="0.1") == 200
    assert cap(0, 4, False, ratio="0.1", decode_ratio="0.1") == 1


@pytest.mark.parametrize("n", [1, 7, 100])
def test_at_ratio_one_the_cap_is_everything(n: int) -> None:
    for t in range(200):
        assert cap(t, n, False, ratio="1", decode_ratio="1") == n + t
        assert cap(t, n, True, ratio="1", decode_ratio="1") == max(1, t)
        assert cap(t, n, True, ratio="1", decode_budget=200) >= t


# The masked model itself.


def _exact_norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


@pytest.fixture
def llama() -> Iterator[Any]:
    """llama(kv_heads): a random float64 Llama of 2 layers and 4 heads."""
    patch = pytest.MonkeyPatch()
    patch.setattr(LlamaRMSNorm, "forward", _exact_norm)

    def make(kv_heads: int) -> Any:
        config = LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=kv_heads, initializer_range=0.3, eos_token_id=None, bos_token_id=None,
        )  # fmt: skip
        torch.manual_seed(11)
        return LlamaForCausalLM(config).double().eval()

    yield make
    patch.undo()


def _ids(n: int) -> list[int]:
    return [random.Random(n * 7 + i).randrange(50) for i in range(n)]


@pytest.mark.parametrize("first_token", ["compressed", "prefill"])
def test_the_masked_model_sees_everything_at_first(llama: Any, first_token: str) -> None:
    """Nothing evicted: the tokens of transformers' own generate."""
    hf, ids = llama(2), _ids(20)
    everything = [[list(range(20))] * 2] * 2
    rule = rule_of("h2o", 4, 2)
    run = masked_generate(hf, ids, everything, rule, 12, lambda t: 20 + t, first_token=first_token)
    plain = hf.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert run.tokens == plain[0, 20:].tolist()
    assert hf.config._attn_implementation != "oracle_masking"


def _sdpa_logits(hf: Any, ids: list[int], run: Masked) -> torch.Tensor:
    """Logits of each fed token by the unmodified model over the whole text, under one additive mask per layer."""
    text = ids[: run.first] + run.fed
    hooks = []
    for number, layer in enumerate(hf.model.layers):
        mask = torch.full((1, 4, len(text), len(text)), float("-inf"), dtype=torch.float64)
        mask[:] = mask[0, 0].triu(1)
        for i, visible in enumerate(run.visible):
            mask[:, :, run.first + i] = float("-inf")
            for h in range(4):
                mask[0, h, run.first + i, visible[number][h * len(visible[number]) // 4]] = 0

        def give(module: object, args: Any, kwargs: Any, mask: torch.Tensor = mask) -> Any:
            return args, {**kwargs, "attention_mask": mask}

        hooks.append(layer.self_attn.register_forward_pre_hook(give, with_kwargs=True))
    hf.set_attn_implementation("sdpa")
    try:
        with torch.no_grad():
            return hf(torch.tensor([text]), use_cache=False).logits[0, run.first :]
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("first_token", ["compressed", "prefill"])
@pytest.mark.parametrize("name", sorted(RULES))
def test_the_masked_model_is_one_pass_with_those_positions_masked(
    llama: Any, name: str, first_token: str, kv_heads: int
) -> None:
    """Step by step as in a single pass of the plain model under masks made of what each query saw."""
    hf, ids = llama(kv_heads), _ids(24)
    kept = [
        [[0, 1, 5, 8, 9, 13, 17, 20, 22, 23]] * kv_heads,
        [[*range(0, 24, 3), 22, 23]] * kv_heads,
    ]
    rule = rule_of(name, 4, kv_heads)

    def limit(t: int) -> int:
        return cap(t, 24, rule.separate, budget=10, decode_ratio="0.4", least=rule.least)

    run = masked_generate(hf, ids, kept, rule, 14, limit, first_token=first_token)
    assert torch.allclose(torch.stack(run.logits), _sdpa_logits(hf, ids, run), rtol=0, atol=1e-10)
    assert run.tokens[-len(run.logits) :] == [int(x.argmax()) for x in run.logits]
    t = 13
    assert [len(head) - (10 if rule.separate else 0) for head in run.after[0]] == [limit(t)] * kv_heads
    forced = masked_generate(
        hf, ids, kept, rule_of(name, 4, kv_heads), 14, limit, first_token=first_token, forced=run.tokens
    )
    assert forced.visible == run.visible and forced.tokens == run.tokens
