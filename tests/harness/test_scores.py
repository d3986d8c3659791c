"""`full` scores as lm-eval's own Hugging Face model does on the same weights and samples; an emptied cache does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvcli.config import SweepConfig
from tests.harness import reference
from tests.harness.reference import NO_HARNESS

pytest.importorskip("lm_eval", reason=NO_HARNESS)
pytest.importorskip("accelerate", reason="lm-eval's Hugging Face model needs accelerate")
pytest.importorskip("peft", reason="lm-eval's Hugging Face model needs peft")

from kvcli.engine.api import sweep
from kvcli.engine.checking import check
from kvcli.engine.prepare import prepare
from kvcli.engine.reweighting import Models
from kvcli.results.store import read_records
from kvcli.weights.spec import DENSE

LIMIT, NEW = 20, 24
TASKS = {"gsm8k": 5, "mmlu_anatomy": 5, "arc_challenge": 0}
MODELS = {"gpt2": "positions=4096", "TinyLlama-1.1B-Chat-v1.0": "kv_heads=2,positions=4096"}
"""Without a BOS, and with one."""
pytestmark = [pytest.mark.shared, pytest.mark.slow]


def config(model: str, data: Path, out: Path, **more: Any) -> SweepConfig:
    sizes = f"layers=2,hidden=64,heads=4,{MODELS[model]},seed=3"
    values = {
        "model": f"random:{reference.shared('configs') / model}:{sizes}", "device": "cpu", "data_dir": str(data),
        "tokenizer": str(reference.shared("tokenizers") / model), "limit": LIMIT, "max_new_tokens": NEW,
        "methods": ("full",), "fidelity": False, "out": str(out),
    }  # fmt: skip
    return SweepConfig(**{**values, **more})


def own_model(wanted: SweepConfig) -> Any:
    """lm-eval's HFLM on the same weights."""
    from lm_eval.models.huggingface import HFLM

    prepared = prepare(check(wanted), 1)
    model = Models(prepared, lambda text: None, lambda name, facts: None, lambda: False).enter(DENSE)
    return HFLM(pretrained=model.hf, tokenizer=prepared.tokenizer, batch_size=1, max_length=4096)


@pytest.mark.parametrize("model", MODELS)
def test_full_gives_lm_eval_s_own_scores(model: str, tmp_path: Path) -> None:
    """20 samples each: the options' log-likelihoods, the generated texts, every metric under every filter."""
    data = reference.first_rows(tmp_path)
    lm = None
    for name, shots in TASKS.items():
        wanted = config(model, data, tmp_path / name, tasks=(f"lm_eval:{name}",), shots=(shots,))
        records = {r["sample_id"]: r for r in read_records(sweep(wanted))}
        assert len(records) == LIMIT and {r["status"] for r in records.values()} == {"ok"}
        lm = lm or own_model(wanted)
        task = reference.own_task(name, shots, data, tmp_path)
        for instance in task.instances:
            if instance.request_type == "generate_until":
                instance.args[1]["max_gen_toks"] = NEW
        first = next(iter(task.higher_is_better()))
        for number, own in reference.judged(task, lm, list(records)).items():
            record = records[number]
            own_scores = {key: float(value) for key, value in own.items() if key != "resps"}
            if record["options"]:
                assert record["options"] == pytest.approx([value for value, _ in own["resps"]], abs=1e-4)
                assert record["extra"] == {key.removesuffix(",none"): value for key, value in own_scores.items()}
            else:
                assert record["output"] == own["resps"][0]
                assert record["extra"] == own_scores
            assert record["score"] == next(v for k, v in own_scores.items() if k.partition(",")[0] == first)


def test_a_method_that_keeps_little_changes_the_choice(tmp_path: Path) -> None:
    """Options are judged through the compressed cache, not through the prompt."""
    data = reference.first_rows(tmp_path)
    tasks = ("lm_eval:mmlu_anatomy", "lm_eval:gsm8k")
    more = {"tasks": tasks, "shots": (5,), "methods": ("streaming_llm",), "ratios": ("0.1",), "limit": 5}
    records = list(read_records(sweep(config("gpt2", data, tmp_path / "run", **more))))
    answers: dict[tuple[str, str], dict[str, Any]] = {}
    for record in records:
        answers.setdefault((record["task"], record["sample_id"]), {})[record["method"]] = record
    assert len(answers) == 10
    for (task, _), both in answers.items():
        full, little = (both[method] for method in sorted(both))
        assert little["measured_ratio"] < 0.11
        if task.endswith("anatomy"):
            assert max(abs(a - b) for a, b in zip(full["options"], little["options"], strict=True)) > 1e-3
            assert {f"shot {i}" for i in range(5)} < set(full["kept_by_region"])


def test_the_command_line_and_a_resume(kvcli: Any, tmp_path: Path) -> None:
    """kvcli sweep --task lm_eval:NAME; the same command again finds its samples done; a setting is another cell."""
    data = reference.first_rows(tmp_path)
    wanted = config("gpt2", data, tmp_path / "run")
    command = [
        "sweep", "--model", wanted.model, "--tokenizer", wanted.tokenizer, "--device", "cpu", "--data-dir", data,
        "--method", "full", "--limit", 2, "--max-new-tokens", 4, "--out", tmp_path / "run", "--shots", 1,
    ]  # fmt: skip
    assert kvcli(*command, "--task", "lm_eval:gsm8k,lm_eval:mmlu_anatomy").code == 0
    first = {(r["cell_id"], r["sample_id"]) for r in read_records(tmp_path / "run")}
    assert len(first) == 4
    assert kvcli(*command, "--task", "lm_eval:gsm8k,lm_eval:mmlu_anatomy").code == 0
    assert {(r["cell_id"], r["sample_id"]) for r in read_records(tmp_path / "run")} == first
    assert kvcli(*command, "--task", "lm_eval:gsm8k:filter_name=flexible-extract").code == 0
    records = list(read_records(tmp_path / "run"))
    assert len(records) == 6
    assert {r["task"] for r in records} == {
        "lm_eval:gsm8k", "lm_eval:mmlu_anatomy", "lm_eval:gsm8k:filter_name=flexible-extract",
    }  # fmt: skip
    refused = kvcli(*command, "--task", "lm_eval:wikitext")
    assert refused.code == 2 and "perplexity of whole texts" in refused.err
