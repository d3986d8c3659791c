"""`map_prompts` on the testbed and on random shapes: what it holds is what eager attention and a sweep's cache hold."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kvcli.config import SweepConfig
from kvcli.engine import map_reading, mapping, prefilling
from kvcli.engine.api import sweep
from kvcli.engine.checking import check
from kvcli.engine.map_facts import KINDS
from kvcli.engine.map_numbers import SETS
from kvcli.engine.map_request import Asked, chosen_heads
from kvcli.engine.mapping import Atlas, map_prompts
from kvcli.engine.prepare import prepare
from kvcli.errors import KvcliError
from kvcli.models.loader import load_weights
from kvcli.models.source import TESTBED_FOLDER
from kvcli.results.store import map_path, read_map

FULL = SweepConfig(methods=("full",), ratios=("0.2",), tasks=("tb_arithmetic",), limit=2, first_token=("prefill",))
METHODS = (
    "snapkv", "h2o", "shotkv", "streaming_llm", "adakv:base=snapkv", "pyramidkv", "random", "pyramidinfer", "kivi",
    "knorm+quant",
)  # fmt: skip
"""Kept alike in all heads, per head, raggedly; at random; in the prefill; everything; with a transform behind it."""


def attention(config: SweepConfig) -> list[tuple[np.ndarray, list[Any]]]:
    """Of each prompt: eager attention [L, H, n, n] float64, and its regions."""
    prepared = prepare(check(config), config.limit)
    source = prepared.request.source
    model = load_weights(prepared.model_config, source, prepared.dtype, "cpu")
    model.set_attn_implementation("eager")
    found = []
    for prompts in prepared.prompt_sets.values():
        for prompt in prompts.prompts:
            with torch.no_grad():
                layers = model(torch.tensor([prompt.ids]), output_attentions=True).attentions
            found.append((torch.cat(layers).double().numpy(), prompt.regions))
    return found


@pytest.fixture(scope="module")
def truth() -> list[tuple[np.ndarray, list[Any]]]:
    return attention(FULL)


def close(found: np.ndarray, expected: Any, rtol: float = 1e-5) -> None:
    np.testing.assert_allclose(found, expected, atol=2e-6, rtol=rtol)


def held_against(atlas: Atlas, truth: list[tuple[np.ndarray, list[Any]]]) -> None:
    """Everything an atlas says of attention, computed again from whole maps."""
    layer, head = int(atlas.meta["chosen"]["layer"]), int(atlas.meta["chosen"]["head"])
    for number, (p, regions) in enumerate(truth):
        n = p.shape[-1]
        facts = atlas.meta["prompts"][number]
        assert facts["n"] == n and facts["queries"]["all"] == n
        start = n - facts["queries"]["question"]
        assert start == next(r.start for r in regions if r.kind == "question")
        received = np.stack([p.mean(2), p[:, :, start:].mean(2)])  # [sets, L, H, n]
        for kind_number, kind in enumerate(KINDS):
            mass = sum(received[..., r.start : r.end].sum(-1) for r in regions if r.kind == kind)
            close(atlas.arrays["region_mass"][number, :, kind_number], mass + np.zeros(received.shape[:3]))
        ranked = np.sort(received, -1)[..., ::-1].cumsum(-1).mean(2)  # [sets, L, n]
        at = np.linspace(0, 1, atlas.arrays["curves"].shape[-1])
        for s in range(len(SETS)):
            for each, curve in zip(ranked[s], atlas.arrays["curves"][number, s, 0], strict=True):
                close(curve, np.interp(at, np.arange(n + 1) / n, [0, *each]))
        if not facts["shown"]:
            continue
        seen = np.tril(np.ones((n, n), bool))
        assert facts["block"] == 1
        close(atlas.arrays[f"p{number}.map_mean"][seen], p[layer, head][seen])
        close(atlas.arrays[f"p{number}.received"], received)
        close(atlas.arrays[f"p{number}.token_received"], received.mean((1, 2)))
        shots = sorted({r.index for r in regions if r.kind == "shot"})
        for shot in shots:
            mass = sum(received[..., r.start : r.end].sum(-1) for r in regions if r.label == f"shot {shot}")
            close(atlas.arrays[f"p{number}.shot_mass"][:, shot], mass)
        assert atlas.arrays[f"p{number}.shot_mass"].shape[1] == len(shots)


def test_what_is_captured_is_the_testbed_s_eager_attention(truth: list[tuple[np.ndarray, list[Any]]]) -> None:
    held_against(map_prompts(Asked(FULL)), truth)


def test_prefixes_and_chunks_change_nothing(
    truth: list[tuple[np.ndarray, list[Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both prompts share their shots; 100 tokens at a time."""
    monkeypatch.setattr(map_reading, "CHUNK", 100)
    monkeypatch.setattr(prefilling, "CHUNK", 100)
    held_against(map_prompts(Asked(FULL)), truth)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_random_shapes_of_other_families(family: str, tmp_path: Path) -> None:
    config = json.loads((TESTBED_FOLDER / "config.json").read_text())
    more = {"use_sliding_window": False} if family.startswith("qwen") else {"sliding_window": None}
    config |= {"model_type": family, "architectures": None, "initializer_range": 0.2, **more}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = f"random:{tmp_path}:layers=3,hidden=96,heads=6,kv_heads=2"
    words = str(TESTBED_FOLDER)
    asked = dataclasses.replace(FULL, model=model, limit=1, tasks=("tb_recall",), tokenizer=words)
    atlas = map_prompts(Asked(asked, layer="1", head="4"))
    assert (atlas.meta["model"]["layers"], atlas.meta["model"]["heads"]) == (3, 6)
    held_against(atlas, attention(asked))


def unpacked(atlas: Atlas, prompt: int, entry: dict[str, Any]) -> np.ndarray:
    bits = np.unpackbits(atlas.arrays[entry["array"]], axis=-1)
    return bits[..., : atlas.meta["prompts"][prompt]["n"]].astype(bool)


def test_kept_maps_are_what_a_sweep_stores(tmp_path: Path, truth: list[tuple[np.ndarray, list[Any]]]) -> None:
    """Per layer and KV head, for every form a kept set has; and the attention that went with the rest."""
    config = dataclasses.replace(FULL, methods=METHODS, ratios=("0.2", "0.5"), max_new_tokens=1, seeds=(0, 1))
    run = sweep(dataclasses.replace(config, out=str(tmp_path / "run"), fidelity=False, keep_maps=5))
    cells = json.loads((run / "run.json").read_text())["cells"]
    atlas = map_prompts(Asked(config))
    assert atlas.warnings == []
    compared = 0
    for number, facts in enumerate(atlas.meta["prompts"]):
        for entry in facts["kept"]:
            (cell,) = [
                key for key, cell in cells.items()
                if (cell["method"], cell["ratio"], cell["seed"]) == (entry["method"], entry["ratio"], entry["seed"])
            ]  # fmt: skip
            stored = read_map(map_path(run, "tb_arithmetic", facts["sample"], cell))
            shares = [np.mean([len(head) / facts["n"] for head in layer]) for layer in stored]
            assert entry["by_layer"] == pytest.approx(shares, abs=1e-12)
            assert entry["kept"] == pytest.approx(np.mean(shares), abs=1e-12)
            received = truth[number][0].mean(2)  # [L, H, n]
            start = facts["n"] - facts["queries"]["question"]
            of_question = truth[number][0][:, :, start:].mean(2)
            for layer, heads in enumerate(stored):
                gone = np.ones((2, facts["n"]), bool)
                for kv_head in range(2):
                    gone[kv_head, heads[kv_head if len(heads) > 1 else 0]] = False
                for name, mass in (("all", received), ("question", of_question)):
                    expected = np.mean([mass[layer, h][gone[h // 2]].sum() for h in range(4)])
                    assert entry["thrown_by_layer"][name][layer] == pytest.approx(expected, abs=2e-5)
            if facts["shown"]:
                held = unpacked(atlas, number, entry)
                for layer, heads in enumerate(stored):
                    rows = held[layer] if len(heads) > 1 else held[layer][:1]
                    for row, positions in zip(rows, heads, strict=True):
                        assert np.flatnonzero(row).tolist() == positions.tolist()
                compared += 1
    assert compared == 2 * 8 + 2 * 2 + 1, "two ratios of eight methods, two seeds of random, kivi once"


def test_a_method_s_own_fault_is_that_cell_s_result(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\nfrom kvcli.methods.base import Method\n\n\n@dataclass(frozen=True)\n"
        "class Broken(Method):\n    def select(self, ctx, budget):\n        raise RuntimeError('no such luck')\n"
    )
    asked = dataclasses.replace(FULL, methods=(f"{tmp_path}/mine.py:Broken", "knorm"), limit=1)
    atlas = map_prompts(Asked(asked))
    first, second = atlas.meta["prompts"][0]["kept"]
    assert first["error"] == "RuntimeError: no such luck" and "array" not in first
    assert second["kept"] == pytest.approx(0.2, abs=0.01)
    assert any("no such luck" in warning for warning in atlas.warnings)


def shape(layers: int, heads: int) -> SimpleNamespace:
    return SimpleNamespace(num_hidden_layers=layers, num_attention_heads=heads)


def test_the_paper_s_head_is_drawn_where_there_is_one() -> None:
    usual = chosen_heads(Asked(FULL), shape(32, 32))
    assert (usual.layer, usual.head, usual.note) == ("15", "10", "")
    few = chosen_heads(Asked(FULL), shape(4, 4))
    assert (few.layer, few.head) == ("2", "1") and "4 layers, 4 heads" in few.note
    narrow = chosen_heads(Asked(FULL), shape(32, 8))
    assert (narrow.layer, narrow.head) == ("15", "2") and narrow.note
    one = chosen_heads(Asked(FULL), shape(1, 1))
    assert one.pairs == {(0, 0)}
    mean = chosen_heads(Asked(FULL, layer="mean", head="1"), shape(3, 2))
    assert mean.pairs == {(0, 1), (1, 1), (2, 1)} and mean.note == ""
    half = chosen_heads(Asked(FULL, layer="3"), shape(4, 4))
    assert half.note == "the paper's head 10 scaled to 4 heads", "a layer that was typed is no choice of kvcli's"
    assert "layer 15 is the last of 16" in chosen_heads(Asked(FULL), shape(16, 32)).note


@pytest.mark.parametrize("text", ["4", "-1", "x", ""])
def test_a_layer_that_is_not_there_is_refused(text: str) -> None:
    with pytest.raises(KvcliError, match="--layer must be a number from 0 to 3, or mean"):
        chosen_heads(Asked(FULL, layer=text), shape(4, 4))


def test_samples_by_name() -> None:
    asked = dataclasses.replace(FULL, tasks=("tb_arithmetic", "tb_recall"))
    every = [s.id for s in prepare(check(FULL), 3).prompt_sets.popitem()[1].samples]
    atlas = map_prompts(Asked(asked, samples=(every[2], every[1])))
    of_first = [p["sample"] for p in atlas.meta["prompts"] if p["group"] == 0]
    assert of_first == every[1:3] and all(p["shown"] for p in atlas.meta["prompts"])
    with pytest.raises(KvcliError, match="unknown sample 'nowhere'"):
        map_prompts(Asked(FULL, samples=("nowhere",)))


def test_a_text_is_a_prompt(truth: Any) -> None:
    text = "the fish would go from there . it was not so"
    atlas = map_prompts(Asked(FULL, texts=(("mine", text), ("other", "go fish"))))
    first = atlas.meta["prompts"][0]
    assert (first["sample"], first["regions"][-1][0], first["queries"]["question"]) == ("mine", "context", 1)
    assert "".join(first["tokens"]).split() == text.split()
    assert [p["shown"] for p in atlas.meta["prompts"]] == [True, True]


def test_harmful_prompts_keep_their_words_to_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvcli.evals import loader

    harmful = dataclasses.replace(loader.load_task("tb_safety"), harmful=True)
    monkeypatch.setattr("kvcli.engine.checking.find_tasks", lambda texts: [harmful])
    config = dataclasses.replace(FULL, tasks=("tb_safety",), limit=1)
    hidden = map_prompts(Asked(config)).meta["prompts"][0]
    assert hidden["hidden"] and hidden["tokens"] is None
    assert "words" not in json.dumps(hidden) and "text" not in hidden
    shown = map_prompts(Asked(dataclasses.replace(config, store_prompts=True))).meta["prompts"][0]
    assert not shown["hidden"] and len(shown["tokens"]) == shown["n"]


def test_long_prompts_are_stored_in_units_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = map_prompts(Asked(FULL))
    monkeypatch.setattr(mapping, "UNITS", 100)
    monkeypatch.setattr(mapping, "RECEIVED", 1000)
    coarse = map_prompts(Asked(FULL, blocks=50))
    facts = coarse.meta["prompts"][0]
    n = facts["n"]
    assert (facts["unit"], facts["block"]) == (-(-n // 100), -(-n // 50))
    units = -(-n // facts["unit"])
    mean = whole.arrays["p0.received"].mean(2, keepdims=True)
    edges = np.arange(0, n, facts["unit"])
    assert coarse.arrays["p0.received"].shape == (2, 4, 1, units)
    close(coarse.arrays["p0.received"], np.add.reduceat(mean, edges, -1))
    blocks = coarse.arrays["p0.map_mean"]
    b, fine = facts["block"], whole.arrays["p0.map_mean"]
    close(blocks[4, 1], fine[4 * b : 5 * b, b : 2 * b].mean())
    close(coarse.arrays["p0.map_max"][3, 3], np.nanmax(fine[3 * b : 4 * b, 3 * b : 4 * b]))


def test_the_arrays_hold_nothing_but_finite_numbers_where_there_are_pairs() -> None:
    atlas = map_prompts(Asked(dataclasses.replace(FULL, methods=("snapkv",))))
    for name, values in atlas.arrays.items():
        if name.endswith(("map_mean", "map_max", "small")):
            lower = np.tril(np.ones(values.shape[-2:], bool))
            assert np.isfinite(values[..., lower]).all() and np.isnan(values[..., ~lower]).all(), name
        else:
            assert np.isfinite(values).all(), name
    json.dumps(atlas.meta, allow_nan=False)


def test_kept_maps_of_a_context_without_its_question_are_the_sweep_s(tmp_path: Path) -> None:
    config = dataclasses.replace(FULL, methods=("snapkv", "h2o"), query=("aware", "agnostic"), max_new_tokens=1)
    compressed = dataclasses.replace(config, first_token=("compressed",), query=("agnostic",), keep_maps=5)
    run = sweep(dataclasses.replace(compressed, out=str(tmp_path / "run"), fidelity=False))
    cells = json.loads((run / "run.json").read_text())["cells"]
    atlas = map_prompts(Asked(config))
    facts = atlas.meta["prompts"][0]
    assert [(e["method"], e["query"]) for e in facts["kept"]].count(("snapkv", "agnostic")) == 1
    start = facts["n"] - facts["queries"]["question"]
    unlike = 0
    for entry in (e for e in facts["kept"] if e["query"] == "agnostic"):
        assert entry["of"] == start
        (cell,) = [key for key, cell in cells.items() if cell["method"] == entry["method"]]
        stored = read_map(map_path(run, "tb_arithmetic", facts["sample"], cell))
        held = unpacked(atlas, 0, entry)
        assert held[..., start:].all(), "the question is read afterwards, and kept"
        (aware,) = [e for e in facts["kept"] if (e["method"], e["query"]) == (entry["method"], "aware")]
        unlike += int((unpacked(atlas, 0, aware)[..., :start] != held[..., :start]).any())
        for layer, heads in enumerate(stored):
            for row, positions in zip(held[layer], heads, strict=False):
                assert [i for i in np.flatnonzero(row).tolist() if i < start] == [
                    i for i in positions.tolist() if i < start
                ]
        assert entry["kept"] == pytest.approx(held[..., :start].mean(), abs=1e-6) == pytest.approx(0.2, abs=0.02)
    assert unlike == 2, "a method that has seen the question keeps others"


def test_what_shots_receive_is_there_for_every_prompt() -> None:
    atlas = map_prompts(Asked(FULL))
    close(atlas.arrays["p0.shot_layers"], atlas.arrays["p0.shot_mass"].mean(-1))
    assert atlas.arrays["p1.shot_layers"].shape == atlas.arrays["p0.shot_layers"].shape
    assert "p1.shot_mass" not in atlas.arrays
