"""Real questions and real tokenizers of ../shared through small random models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kvcli.results.schema import check_record
from tests.cli.sweeping import Done, prompts, records, typed
from tests.conftest import ROOT

SHARED = ROOT.parent / "shared"
SIZES = "layers=2,hidden=64,heads=4,kv_heads=2"

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not (SHARED / "data/gsm8k/test.jsonl").is_file(), reason=f"no real data in {SHARED}/data"),
]


def sweep(kvcli: Callable[..., Done], out: Path, name: str, sizes: str, *more: object) -> Done:
    for kind in ("configs", "tokenizers"):
        if not (SHARED / kind / name).is_dir():
            pytest.skip(f"no {SHARED}/{kind}/{name}")
    model = f"random:{SHARED / 'configs' / name}:{sizes}"
    data = ("--task", "gsm8k", "--data-dir", SHARED / "data", "--max-new-tokens", "8", "--out", out)
    return kvcli("sweep", "--model", model, "--tokenizer", SHARED / "tokenizers" / name, *data, *more)


def test_ten_questions_and_three_methods(kvcli, tmp_path):
    out = tmp_path / "run"
    grid = typed("--method snapkv,h2o,shotkv --ratio 0.3 --limit 10")
    done = sweep(kvcli, out, "Qwen2.5-0.5B-Instruct", SIZES, *grid)
    assert done.code == 0, done.err
    rows, stored = records(out), prompts(out)
    assert len(rows) == 40
    assert {r["method"] for r in rows} == {"full", "snapkv", "h2o", "shotkv"}
    for record in rows:
        check_record(record)
        assert record["status"] == "ok" and record["shots"] == 8
        assert record["target"].replace(",", "").lstrip("-").isdigit()
        assert 1 <= record["n_new"] <= 8
        if record["method"] in ("snapkv", "h2o"):
            assert record["measured_ratio"] == pytest.approx(0.3, abs=0.01)
        assert record["measured_ratio"] <= 1
    assert "gsm8k" in done.out and "shotkv" in done.out

    assert len(stored) == 10
    for entry in stored.values():
        text, offsets, regions = entry["text"], entry["offsets"], entry["regions"]
        assert [start for _, start, _ in regions] == [0, *(end for _, _, end in regions[:-1])], "regions without gaps"
        assert regions[-1][2] == entry["n"] == len(offsets)
        parts = {label: text[offsets[start - 1] if start else 0 : offsets[end - 1]] for label, start, end in regions}
        shots = [parts[f"shot {i}"] for i in range(8)]
        assert all(shot.strip().startswith("Q: ") and "The answer is " in shot for shot in shots), "whole exemplars"
        assert len(set(shots)) == 8
        question = parts["question"].strip()
        assert question.startswith("Q: ") and question.endswith("A:")
    share = [r["kept_by_region"]["shot 3"] for r in rows if r["method"] == "shotkv"]
    assert all(value in (0.0, 0.5, 1.0) for value in share), "a shot is kept whole or dropped, in each of two layers"


def test_a_real_run_resumes(kvcli, tmp_path):
    out = tmp_path / "run"
    command = (kvcli, out, "Qwen2.5-0.5B-Instruct", SIZES, *typed("--method snapkv --ratio 0.3 --limit 2"))
    assert sweep(*command).code == 0
    before = (out / "samples.jsonl").read_bytes()
    done = sweep(*command)
    assert done.code == 0 and "loading" not in done.err
    assert (out / "samples.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "name, sizes, context",
    [
        ("TinyLlama-1.1B-Chat-v1.0", SIZES, ()),
        ("gpt2", "layers=2,hidden=64,heads=4", ("--shots", "4")),
    ],
)
def test_other_tokenizers(kvcli, tmp_path, name: str, sizes: str, context: tuple[str, ...]):
    """SentencePiece with a chat template; byte-level BPE with learned positions and 1,024 of them."""
    out = tmp_path / "run"
    done = sweep(kvcli, out, name, sizes, *typed("--method shotkv,streaming_llm --ratio 0.5 --limit 2"), *context)
    assert done.code == 0, done.err
    rows = records(out)
    assert len(rows) == 6 and {r["status"] for r in rows} == {"ok"}
    for entry in prompts(out).values():
        shots = 4 if context else 8
        assert {label for label, _, _ in entry["regions"]} >= {"question", *(f"shot {i}" for i in range(shots))}


def test_a_prompt_longer_than_gpt2_takes(kvcli, tmp_path):
    out = tmp_path / "run"
    done = sweep(kvcli, out, "gpt2", "layers=2,hidden=64,heads=4,positions=600", "--method", "h2o", "--ratio", "0.5")
    assert done.code == 2 and "does not fit the model" in done.err and "Traceback" not in done.err
    assert not out.exists()
