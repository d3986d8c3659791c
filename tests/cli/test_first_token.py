"""Where the first answer token comes from decides whether a loss is seen at all; both modes share one kept set."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kvcli.results import store
from tests.cli import sweeping
from tests.cli.sweeping import Done, records

GRID = sweeping.typed(
    "sweep --model testbed --task tb_recall --method streaming_llm --ratio 0.1,0.3 --limit 24"
    " --first-token compressed,prefill"
)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    folder = tmp_path_factory.mktemp("both") / "run"
    done = sweeping.call(*GRID, "--out", folder)
    assert done.code == 0, done.err
    return folder, done


def rows(folder: Path, first_token: str, ratio: float | None, method: str = "streaming_llm") -> dict[str, dict]:
    found = [r for r in records(folder) if (r["method"], r["first_token"]) == (method, first_token)]
    return {r["sample_id"]: r for r in found if ratio is None or r["ratio"] == ratio}


def mean(found: dict[str, dict]) -> float:
    assert len(found) == 24
    return sum(r["score"] for r in found.values()) / 24


@pytest.mark.parametrize("ratio", [0.1, 0.3])
def test_the_prefills_token_hides_the_loss(both, ratio: float):
    folder, _ = both
    assert mean(rows(folder, "prefill", ratio)) >= 0.9
    assert mean(rows(folder, "compressed", ratio)) < 0.3


def test_full_is_the_same_in_both_modes(both):
    folder, _ = both
    full = {mode: rows(folder, mode, None, "full") for mode in ("compressed", "prefill")}
    outputs = [{s: r["output_ids"] for s, r in found.items()} for found in full.values()]
    assert outputs[0] == outputs[1] and mean(full["prefill"]) >= 0.95


@pytest.mark.parametrize("ratio", [0.1, 0.3])
def test_both_modes_share_one_kept_set(both, ratio: float):
    """Equal maps, equal bytes, equal shares; only what is made of them differs."""
    folder, _ = both
    compressed, prefill = (rows(folder, mode, ratio) for mode in ("compressed", "prefill"))
    compared = 0
    for sample, one in compressed.items():
        other = prefill[sample]
        assert one["cell_id"] != other["cell_id"]
        for name in ("measured_ratio", "kept", "kept_by_region", "flags", "prompt_sha", "n_prompt"):
            assert one[name] == other[name], name
        assert one["kv_bytes"]["prefill"] == other["kv_bytes"]["prefill"]
        paths = [store.map_path(folder, "tb_recall", sample, r["cell_id"]) for r in (one, other)]
        if paths[0].exists():
            maps = [[[head.tolist() for head in layer] for layer in store.read_map(path)] for path in paths]
            assert maps[0] == maps[1]
            compared += 1
    assert compared == 5


def test_the_prefills_first_token_is_full_s(both):
    """Taken from the dense logits it is what `full` says, whatever was thrown away; through the cache it is not."""
    folder, _ = both
    full = rows(folder, "prefill", None, "full")
    same = {
        mode: sum(r["output_ids"][0] == full[s]["output_ids"][0] for s, r in rows(folder, mode, 0.1).items())
        for mode in ("compressed", "prefill")
    }
    assert same["prefill"] == 24
    assert same["compressed"] < 12


def test_the_modes_are_never_mixed_in_the_table(both, kvcli: Callable[..., Done]):
    folder, done = both
    for mode in ("compressed", "prefill"):
        assert done.out.count(f"first token {mode}") == 1
    tables = json.loads(kvcli(*GRID, "--json", "--out", folder).out)
    assert sorted(table["first_token"] for table in tables) == ["compressed", "prefill"]
    for table in tables:
        for cell in (table["full"], *table["cells"]):
            mine = {r["cell_id"] for r in records(folder) if r["first_token"] == table["first_token"]}
            assert set(cell["cell_ids"]) <= mine
            assert cell["n"] == 24
        ratios = {c["column"]: c["score"] for c in table["cells"]}
        assert set(ratios) == {"0.1", "0.3"}
        hidden = table["first_token"] == "prefill"
        assert all((score >= 0.9) == hidden for score in ratios.values())
