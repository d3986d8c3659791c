"""DuoAttention: which heads retrieve and what all of them keep, against plain loops."""

from __future__ import annotations

import random
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from kvcli.cache.budget import Budget
from kvcli.errors import KvcliError
from kvcli.methods.catalog import build
from kvcli.models.profiles import read_profile
from tests.methods.test_headkv import scores_of, with_profile
from tests.oracles.duo_attention import duo_attention
from tests.oracles.harness import budget_for, lists
from tests.oracles.prompts import Prompt, budget, random_prompt

RATIOS = ["0.02", "0.1", "0.25", "0.3", "0.5", "0.77", "0.9", "0.99", "1"]
TEXTS = ["duo_attention", "duo_attention:sinks=2,recent=6", "duo_attention:sinks=0,recent=1",
         "duo_attention:sinks=4,recent=20,reduce=max", "duo_attention:sinks=30,recent=9"]  # fmt: skip


def settings_of(text: str) -> dict[str, Any]:
    pairs = (pair.split("=") for pair in text.partition(":")[2].split(",") if pair)
    return {k: int(v) if v.isdigit() else v for k, v in pairs}


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("n, group", [(1, 1), (7, 2), (40, 2), (90, 4), (200, 1)])
@pytest.mark.parametrize("text", TEXTS)
def test_heads_and_tokens_are_the_oracle_s(
    prompt_of: Callable[..., Prompt], text: str, n: int, group: int, ratio: str
) -> None:
    prompt = prompt_of(n, group)
    for scores in (scores_of(prompt), [[0.5] * prompt.heads] * prompt.layers):
        size = budget_for(prompt, ratio)
        selection = build(text).select(with_profile(text, prompt, scores), size)
        kept, flags, retrieving = duo_attention(prompt, budget(ratio, n), scores, **settings_of(text))
        assert lists(selection, prompt.kv_heads) == kept
        assert set(selection.flags) == flags
        if retrieving == 6 and not size.everything:
            retrieving = 0  # all of the prompt lies in the windows, which go on sliding
        assert (selection.notes["retrieval_heads"], selection.notes["of"]) == (retrieving, 6)
        streams = [slides for layer in selection.facts for slides in layer["streams"].tolist()]
        assert sum(streams) == 6 - retrieving
        heads = [head for layer in kept for head in layer]
        assert all(len(head) == n for head, slides in zip(heads, streams, strict=True) if not slides)
        total = sum(len(head) for layer in kept for head in layer)
        assert total <= size.model_total or "over_budget" in selection.flags
        if size.everything:
            assert kept == [[list(range(n))] * 2] * 3 and not flags


def test_below_the_floor_it_names_the_nearest_ratio_and_that_one_is_reachable() -> None:
    text = "duo_attention:sinks=4,recent=20"
    for n in (61, 70, 90, 200):
        prompt = random_prompt(n)
        ctx = with_profile(text, prompt, scores_of(prompt))
        low = build(text).select(ctx, budget_for(prompt, "0.1"))
        assert low.flags == {"unreachable", "over_budget"}
        assert {len(head) for layer in low.kept for head in layer} == {24}
        nearest = low.notes["nearest_ratio"]
        assert 24 / n <= nearest < 24 / n + 1e-4
        again = build(text).select(ctx, budget_for(prompt, str(nearest)))
        assert not again.flags and "nearest_ratio" not in again.notes
        below = build(text).select(ctx, Budget.of_size(23, n, 3, 2))
        assert below.flags == {"unreachable", "over_budget"}


def test_more_budget_never_takes_a_head_away() -> None:
    prompt = random_prompt(80)
    text = "duo_attention:sinks=2,recent=8"
    ctx, before = with_profile(text, prompt, scores_of(prompt)), 0
    for percent in range(15, 101, 5):
        found = build(text).select(ctx, Budget.of_ratio(Decimal(percent) / 100, 80, 3, 2)).notes["retrieval_heads"]
        assert found >= before
        before = found
    assert before == 6


def test_the_authors_file_is_read_per_kv_head(tmp_path: Path) -> None:
    """Gates as numpy's savetxt writes them; out of 0..1 they are clipped."""
    folder = tmp_path / "lr=0.02-reg=0.05"
    folder.mkdir()
    gates = [[0.6, -0.1], [1.3, 0.0], [0.25, 0.99]]
    (folder / "full_attention_heads.tsv").write_text("".join("\t".join(f"{x:.18e}" for x in r) + "\n" for r in gates))
    text = f"duo_attention:heads=file,profile={folder},sinks=1,recent=4"
    clipped = [[0.6, 0.0], [1.0, 0.0], [0.25, 0.99]]
    assert read_profile(folder).heads == tuple(map(tuple, clipped))
    assert build(text).needs() == {f"head_profile:{folder}"}
    prompt = random_prompt(50)
    selection = build(text).select(with_profile(text, prompt, clipped, "kv"), budget_for(prompt, "0.6"))
    kept, flags, retrieving = duo_attention(prompt, budget("0.6", 50), clipped, sinks=1, recent=4)
    assert (lists(selection, 2), set(selection.flags)) == (kept, flags)
    assert selection.notes["heads"] == "file" and retrieving == 3
    assert [len(head) for layer in kept for head in layer] == [50, 5, 50, 5, 5, 50]


@pytest.mark.parametrize("text, why", [
    ("duo_attention:heads=optimise,profile=x", "by itself"), ("duo_attention:heads=file", "needs the file"),
    ("duo_attention:heads=other", "not one of its values"),
])  # fmt: skip
def test_sources_that_are_not_there_are_refused(text: str, why: str) -> None:
    with pytest.raises(KvcliError, match=why) as e:
        build(text)
    assert "heads=" in e.value.fix


def test_gates_that_kvcli_trained_are_asked_for_by_their_window() -> None:
    text = "duo_attention:heads=optimise,sinks=1,recent=4"
    assert build(text).needs() == {"head_profile:@gates:1,4"}
    prompt, gates = random_prompt(50), [[0.6, 0.0], [1.0, 0.0], [0.25, 0.99]]
    selection = build(text).select(with_profile(text, prompt, gates, "kv"), budget_for(prompt, "0.6"))
    wanted, _, retrieving = duo_attention(prompt, budget("0.6", 50), gates, sinks=1, recent=4)
    assert lists(selection, 2) == wanted and selection.notes["retrieval_heads"] == retrieving == 3
    assert selection.notes["heads"] == "optimise"
    assert [layer["streams"].tolist() for layer in selection.facts] == [[False, True], [False, True], [True, False]]
    with pytest.raises(KvcliError, match="scores of kvcli profile-heads"):
        build(text).select(with_profile(text, prompt, [[0.5] * 4] * 3), budget_for(prompt, "0.6"))


def test_which_profile_it_was_is_noted() -> None:
    prompt, text = random_prompt(50), "duo_attention:sinks=1,recent=4"
    one, two = (
        build(text).select(with_profile(text, prompt, scores_of(prompt, seed)), budget_for(prompt, "0.6")).notes
        for seed in (0, 1)
    )
    assert one["profile"] != two["profile"] and len(one["profile"]) == 12


def test_scores_of_another_kind_than_named_are_refused() -> None:
    prompt = random_prompt(20)
    gates = [[0.5, 0.1]] * 3
    with pytest.raises(KvcliError, match="trained gates"):
        build("duo_attention").select(with_profile("duo_attention", prompt, gates, "kv"), budget_for(prompt, "0.5"))
    text = "duo_attention:heads=file,profile=x.json"
    with pytest.raises(KvcliError, match="scores of kvcli profile-heads"):
        build(text).select(with_profile(text, prompt, [[0.5] * 4] * 3), budget_for(prompt, "0.5"))


def test_scores_only_rank() -> None:
    prompt, rng = random_prompt(60), random.Random(4)
    scores = [[rng.random() for _ in range(4)] for _ in range(3)]
    scaled = [[7 * x for x in row] for row in scores]
    text = "duo_attention:sinks=2,recent=10"
    one, two = (
        lists(build(text).select(with_profile(text, prompt, s), budget_for(prompt, "0.5")), 2) for s in (scores, scaled)
    )
    assert one == two
