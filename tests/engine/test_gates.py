"""DuoAttention's gates: masks and gradients against their definitions, and heads whose gates are known beforehand."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kvcli.attention.patch import patched
from kvcli.attention.reference import probabilities
from kvcli.engine import gates as gates_module
from kvcli.engine.gates import Gated, Training, described, lessons_of, loss_of, streaming, train, trained
from kvcli.engine.needles import Probe
from kvcli.engine.profiling import Settings, prepared
from kvcli.errors import KvcliError
from kvcli.models.profiles import (
    CONFIG,
    TRAINED,
    check_profiles,
    existing,
    gates_place,
    load_gates,
    profile_of,
    read_profile,
    write_gates,
)
from kvcli.models.source import TESTBED_FOLDER, parse_model
from kvcli.models.wrapper import Model
from tests.engine import tiny

ASKED = Training(sinks=2, recent=6, steps=3)
TINY = f"random:{TESTBED_FOLDER}:layers=2,hidden=32,heads=4,kv_heads=2"


@pytest.fixture
def exact() -> Iterator[None]:
    """Norms in float64; transformers' own compute in float32."""
    patch = pytest.MonkeyPatch()
    patch.setattr(LlamaRMSNorm, "forward", tiny.exact_norm)
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def probe(n: int, seed: int, answer: list[int]) -> Probe:
    return Probe(tiny.prompt(n, seed), (3, 3 + len(answer)), answer)


@pytest.mark.parametrize("n, sinks, recent", [(1, 0, 1), (9, 2, 3), (9, 0, 1), (9, 20, 1), (9, 1, 20), (30, 4, 7)])
def test_a_streaming_head_sees_first_and_newest_tokens(n: int, sinks: int, recent: int) -> None:
    visible = streaming(n, sinks, recent)
    for q in range(n):
        for k in range(n):
            assert bool(visible[q, k]) == (k <= q and (k < sinks or q - k < recent)), (q, k)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_gate_mixes_both_attentions_of_its_kv_head(kv_heads: int) -> None:
    torch.manual_seed(1)
    n, heads, width = 20, 4, 8
    query = torch.randn(1, heads, n, width, dtype=torch.double)
    key, value = torch.randn(2, 1, kv_heads, n, width, dtype=torch.double)
    gates = torch.rand(2, kv_heads, dtype=torch.double) * 1.6 - 0.3
    visible = streaming(n, 2, 5)
    out = Gated(gates, visible).attend(1, query, key, value, 0.3)
    for h in range(heads):
        g = h // (heads // kv_heads)
        one = slice(g, g + 1)
        full, part = (
            (probabilities(query[:, h : h + 1], key[:, one], 0.3, mask) @ value[:, one])[0, 0]
            for mask in (torch.ones(n, n).tril().bool(), visible)
        )
        gate = min(max(float(gates[1, g]), 0.0), 1.0)
        torch.testing.assert_close(out[0, h], gate * full + (1 - gate) * part)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_gradients_are_those_of_finite_differences(exact: None, kv_heads: int) -> None:
    model = tiny.tiny_llama(torch.float64, kv_heads=kv_heads)
    (lesson,) = lessons_of(model, [probe(30, 1, [7, 8])], ASKED)
    torch.manual_seed(2)
    at = torch.rand(3, kv_heads, dtype=torch.double) * 0.8 + 0.1
    gates = at.clone().requires_grad_()
    with gates_module.frozen(model.hf):
        loss_of(model, lesson, gates, ASKED).backward()
    assert gates.grad is not None
    small = 1e-6
    for layer in range(3):
        for head in range(kv_heads):
            step = torch.zeros_like(at)
            step[layer, head] = small
            with torch.no_grad():
                up, down = (loss_of(model, lesson, at + s, ASKED) for s in (step, -step))
            assert float(gates.grad[layer, head]) == pytest.approx(float((up - down) / (2 * small)), rel=1e-4, abs=1e-9)
    assert float(gates.grad.abs().max()) > 1e-3
    assert all(p.requires_grad and p.grad is None for p in model.hf.parameters()), "the weights are as they were"


def test_open_gates_leave_the_model_as_it_is_and_cost_the_penalty_only(exact: None) -> None:
    model = tiny.tiny_llama(torch.float64)
    lessons = lessons_of(model, [probe(30, 1, [7, 8]), probe(41, 2, [5])], ASKED)
    hf = model.hf
    for lesson, n, tokens in zip(lessons, (32, 42), (3, 2), strict=True):
        assert lesson.ids.shape == (1, n)
        with torch.no_grad():
            own = hf(lesson.ids, output_hidden_states=True).hidden_states[-1][0, -tokens:]
        torch.testing.assert_close(lesson.states, own)
        with torch.no_grad():
            loss = loss_of(model, lesson, torch.ones(3, 2, dtype=torch.double), ASKED)
        assert float(loss) == pytest.approx(0.05)
    assert lessons[0].ids[0, -2:].tolist() == [7, 8]


def test_the_distance_is_the_mean_over_tokens_and_widths(exact: None) -> None:
    model = tiny.tiny_llama(torch.float64)
    (lesson,) = lessons_of(model, [probe(30, 1, [7, 8])], ASKED)
    shut = torch.zeros(3, 2, dtype=torch.double)
    with torch.no_grad(), patched(model.hf, Gated(shut, streaming(32, 2, 6))):
        mixed = model.hf(lesson.ids, output_hidden_states=True, use_cache=False).hidden_states[-1][0, -3:]
    distance = sum(float((a - b) ** 2) for x, y in zip(mixed, lesson.states, strict=True)
                   for a, b in zip(x, y, strict=True)) / (3 * 64)  # fmt: skip
    assert distance > 0
    with torch.no_grad():
        assert float(loss_of(model, lesson, shut, ASKED)) == pytest.approx(distance)


def test_where_the_window_hides_nothing_the_penalty_shuts_every_gate(exact: None, monkeypatch: Any) -> None:
    model = tiny.tiny_llama(torch.float64)
    asked = Training(sinks=2, recent=6, steps=150)
    (lesson,) = lessons_of(model, [probe(30, 1, [7])], asked)
    monkeypatch.setattr(gates_module, "streaming", lambda n, sinks, recent: torch.ones(n, n).tril().bool())
    assert train(model, [lesson], asked) == ((0.0, 0.0),) * 3


def test_a_head_that_sees_nothing_new_beyond_its_window_is_shut_and_a_planted_retriever_stays_open(exact: None) -> None:
    """One head's values are all that reaches the answer; it looks for the needle's token, whose key is planted. The
    other heads' outputs are cut off, so that their windows change nothing."""
    model = planted(layer=1, kv_head=1)
    needle, n = 12, 60
    lessons = lessons_of(model, [at_needle(n, needle, seed) for seed in range(4)], Training(sinks=2, recent=8))
    asked = Training(sinks=2, recent=8, steps=200, penalty=0.05)
    found = train(model, lessons, asked)
    assert found[1][1] > 0.9
    assert max(x for layer, row in enumerate(found) for head, x in enumerate(row) if (layer, head) != (1, 1)) < 0.01
    wide = dataclasses.replace(asked, recent=55)
    assert train(model, lessons_of(model, [at_needle(n, needle, s) for s in range(4)], wide), wide)[1][1] < 0.01, (
        "with the needle inside of the window nothing needs to be open"
    )


NEEDLE, ASK = 30, 40


def planted(layer: int, kv_head: int) -> Model:
    """A model whose only working part is one KV head, which from the token ASK looks for the token NEEDLE: query and
    key lie in the dimension that RoPE turns least, along the two tokens' embeddings."""
    model = tiny.tiny_llama(torch.float64)
    width, group = 16, 2
    words = model.hf.model.embed_tokens.weight
    with torch.no_grad():
        for number, block in enumerate(model.hf.model.layers):
            attention, out = block.self_attn, torch.zeros(64, dtype=torch.double)
            if number == layer:
                queries = slice(kv_head * group * width, (kv_head + 1) * group * width)
                keys = slice(kv_head * width, (kv_head + 1) * width)
                out[queries] = 1
                attention.q_proj.weight[queries], attention.k_proj.weight[keys] = 0, 0
                for head in range(group):
                    attention.q_proj.weight[queries.start + head * width + 7] = words[ASK] / words[ASK].norm()
                attention.k_proj.weight[keys.start + 7] = words[NEEDLE] / words[NEEDLE].norm()
            attention.o_proj.weight *= out
            block.mlp.down_proj.weight *= 0
    return model


def at_needle(n: int, place: int, seed: int) -> Probe:
    given = tiny.prompt(n, seed)
    ids = [50 + i if i in (NEEDLE, ASK) else i for i in given.ids]
    ids[place], ids[-1] = NEEDLE, ASK
    return Probe(dataclasses.replace(given, ids=ids), (place, place + 1), [7])


def test_training_repeats_exactly_and_follows_its_seed(exact: None) -> None:
    model = tiny.tiny_llama(torch.float64)
    asked = Training(sinks=2, recent=6, steps=12, penalty=0.5)
    lessons = lessons_of(model, [probe(30 + i, i, [7, 8]) for i in range(3)], asked)
    seen: list[tuple[int, int, float]] = []
    one = train(model, lessons, asked, lambda *step: seen.append(step))
    assert one == train(model, lessons, asked)
    assert one != train(model, lessons, dataclasses.replace(asked, seed=1))
    assert [s[:2] for s in seen] == [(i, 12) for i in range(1, 13)]
    assert seen[-1][2] == pytest.approx(sum(map(sum, one)) / 6, abs=1e-5)
    assert all(0 <= x <= 1 for row in one for x in row)


def test_gates_are_finer_than_the_model_s_own_numbers() -> None:
    """A step of half a percent is none in bfloat16."""
    model = tiny.tiny_llama(torch.bfloat16)
    asked = Training(sinks=2, recent=6, steps=1, rate=0.001)
    (lesson,) = lessons_of(model, [probe(30, 1, [7, 8])], asked)
    assert lesson.states.dtype == torch.float32
    assert train(model, [lesson], asked) == ((0.999, 0.999),) * 3
    with torch.no_grad():
        near, shut = (float(loss_of(model, lesson, torch.full((3, 2), x), asked)) for x in (0.999, 0.0))
    assert 0.04 < near < shut


def test_the_rate_warms_up_and_cools_down() -> None:
    """The authors' schedule over 2,000 steps."""
    asked = Training(steps=2000)
    for step, share in ((0, 0.1), (39, 0.1), (199, 0.5), (399, 1), (1600, 1), (1800, 0.5), (1960, 0.1), (1999, 0.1)):
        assert asked.rate_at(step) == pytest.approx(0.02 * share), step
    assert Training(steps=3).rate_at(1) == 0.02


def test_prompts_that_fit_into_the_window_are_refused(exact: None) -> None:
    model = tiny.tiny_llama(torch.float64)
    with pytest.raises(KvcliError, match="longest prompt has 32 tokens") as e:
        lessons_of(model, [probe(30, 1, [7, 8])], Training(sinks=2, recent=30))
    assert "--recent" in e.value.fix
    assert len(lessons_of(model, [probe(30, 1, [7, 8])], Training(sinks=2, recent=29))) == 1


# Files.


def tiny_trained(steps: int = 2, **more: Any) -> tuple[Any, Any, Training]:
    source, asked = parse_model(TINY), Settings(limit=2, prompt_tokens=100)
    training = Training(sinks=4, recent=16, steps=steps, **more)
    return source, trained(source, asked, prepared(source, asked), training), training


def test_gates_are_found_by_weights_and_window(tmp_path: Path) -> None:
    source, profile, _ = tiny_trained()
    need = "head_profile:@gates:4,16"
    with pytest.raises(KvcliError, match="no trained gates") as e:
        profile_of(source, need)
    assert e.value.fix == f"kvcli profile-heads --model {TINY} --gates --sinks 4 --recent 16"
    write_gates(profile, gates_place(source, 4, 16))
    assert profile_of(source, need) == profile == load_gates(source, 4, 16)
    assert check_profiles(source, [need]) == profile.digest
    with pytest.raises(KvcliError, match="4 sinks and 17 recent"):
        load_gates(source, 4, 17)
    with pytest.raises(KvcliError, match="no trained gates"):
        load_gates(parse_model(f"{TINY},seed=4"), 4, 16)


def test_the_files_are_the_authors(tmp_path: Path) -> None:
    """As their load_attn_pattern reads them: numbers between tabs, sink_size and recent_size."""
    _, profile, _ = tiny_trained()
    write_gates(profile, tmp_path / "g")
    rows = [list(map(float, line.split("\t"))) for line in (tmp_path / "g" / TRAINED).read_text().splitlines()]
    assert tuple(map(tuple, rows)) == profile.heads and profile.fits(2, 4, 2) and profile.per == "kv"
    config = json.loads((tmp_path / "g" / CONFIG).read_text())
    assert (config["sink_size"], config["recent_size"], config["reg_weight"], config["lr"]) == (4, 16, 0.05, 0.02)
    assert read_profile(tmp_path / "g") == profile
    assert sorted(p.name for p in (tmp_path / "g").iterdir()) == [CONFIG, TRAINED]


def test_what_was_made_otherwise_is_not_taken_for_it(tmp_path: Path) -> None:
    source, profile, training = tiny_trained()
    place = tmp_path / "g"
    asked = Settings(limit=2, prompt_tokens=100)
    how = described(asked, prepared(source, asked), training)
    assert existing(place, source, how, force=False) is None
    write_gates(profile, place)
    assert existing(place, source, how, force=False) == profile
    with pytest.raises(KvcliError, match="steps 2, now 9"):
        existing(place, source, {**how, "steps": 9}, force=False)
    assert existing(place, source, {**how, "steps": 9}, force=True) == profile
    with pytest.raises(KvcliError, match="other weights"):
        existing(place, parse_model("testbed"), how, force=False)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / CONFIG).write_text("{}")
    with pytest.raises(KvcliError, match="something else"):
        existing(tmp_path / "model", source, how, force=True)
