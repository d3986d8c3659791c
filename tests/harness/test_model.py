"""`lm_eval --model kvcli`: requests answered through the compressed cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvcli.errors import KvcliError
from tests.harness import reference
from tests.harness.reference import NO_HARNESS

pytest.importorskip("lm_eval", reason=NO_HARNESS)

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from kvcli.harness.model import KvcliLM

pytestmark = [pytest.mark.shared, pytest.mark.slow]
SIZES = {"layers": 2, "hidden": 64, "heads": 4, "positions": 4096, "seed": 3}
PROMPT = "Question: one or two?\nAnswer: two\n\nQuestion: red or green or blue, and what else is there?\nAnswer:"


def model(**arguments: Any) -> KvcliLM:
    source = f"random:{reference.shared('configs') / 'gpt2'}"
    tokenizer = str(reference.shared("tokenizers") / "gpt2")
    sizes = ",".join(f"{key}={value}" for key, value in SIZES.items())
    return KvcliLM(pretrained=f"{source}:{sizes}", tokenizer=tokenizer, device="cpu", **arguments)


def own(kvcli_model: KvcliLM) -> Any:
    pytest.importorskip("accelerate", reason="lm-eval's Hugging Face model needs accelerate")
    pytest.importorskip("peft", reason="lm-eval's Hugging Face model needs peft")
    from lm_eval.models.huggingface import HFLM

    hf = kvcli_model.engine.model.hf
    return HFLM(pretrained=hf, tokenizer=kvcli_model.tokenizer, batch_size=1, max_length=4096)


def asked(kind: str, *arguments: Any) -> list[Any]:
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


def test_it_is_registered() -> None:
    assert get_model("kvcli") is KvcliLM


def test_full_gives_what_lm_eval_s_own_model_gives(tmp_path: Path) -> None:
    """gsm8k, mmlu and arc, 20 samples each: log-likelihoods, greedy or not, texts, every metric."""
    data, mine = reference.first_rows(tmp_path), model()
    hf = own(mine)
    for name, shots in (("gsm8k", 5), ("mmlu_anatomy", 5), ("arc_challenge", 0)):
        task = reference.own_task(name, shots, data, tmp_path)
        for instance in task.instances:
            if instance.request_type == "generate_until":
                instance.args[1]["max_gen_toks"] = 24
        ids = list(dict.fromkeys(str(instance.doc_id) for instance in task.instances))[:20]
        theirs, ours = reference.judged(task, hf, ids), reference.judged(task, mine, ids)
        for number in ids:
            a, b = theirs[number].pop("resps"), ours[number].pop("resps")
            if name == "gsm8k":
                assert a == b
            else:
                assert [value for value, _ in b] == pytest.approx([value for value, _ in a], abs=1e-4)
                assert [greedy for _, greedy in b] == [greedy for _, greedy in a]
            assert theirs[number] == ours[number]
    assert mine.get_model_info()["kvcli"]["measured_ratio"] == 1


def test_the_greedy_continuation_is_known_as_such() -> None:
    """As lm-eval's own model says it; a second pass finds it, which can be left out."""
    lm = model()
    prompts = [f"{PROMPT} {word}" for word in "so it red this green".split()]
    texts = lm.generate_until(
        asked("generate_until", *[(prompt, {"until": [], "max_gen_toks": 1}) for prompt in prompts])
    )
    prompt, text = next(pair for pair in zip(prompts, texts, strict=True) if pair[1].startswith(" "))
    requests = asked("loglikelihood", (prompt, text), (prompt, text + " cat"), (prompt, " cat"))
    found = lm.loglikelihood(requests)
    assert [greedy for _, greedy in found] == [True, False, False]
    assert [greedy for _, greedy in own(lm).loglikelihood(requests, disable_tqdm=True)] == [True, False, False]
    unasked = model(greedy=False).loglikelihood(requests)
    assert [value for value, _ in unasked] == pytest.approx([value for value, _ in found], abs=1e-5)
    assert not any(greedy for _, greedy in unasked)


def test_a_compressed_cache_answers_otherwise() -> None:
    """Settings of a method may follow as arguments of their own: lm-eval splits model_args at commas."""
    requests = asked("loglikelihood", *[(PROMPT, f" {word}") for word in ("two", "green", "blue")])
    full = [value for value, _ in model().loglikelihood(requests)]
    lm = model(method="streaming_llm", ratio=0.2, sinks=2)
    little = [value for value, _ in lm.loglikelihood(requests)]
    assert max(abs(a - b) for a, b in zip(full, little, strict=True)) > 1e-3
    facts = lm.get_model_info()["kvcli"]
    assert facts["method"] == "streaming_llm:sinks=2" and facts["ratio"] == "0.2" and facts["measured_ratio"] < 0.25


@pytest.mark.parametrize("arguments", [{"first_token": "prefill"}, {"query": "agnostic"}, {"budget": 8}])
def test_other_ways_of_compressing(arguments: dict[str, Any]) -> None:
    size = {} if "budget" in arguments else {"ratio": 0.3}
    requests = asked("loglikelihood", (PROMPT, " two"), (PROMPT, " green"))
    plain = model(method="snapkv", ratio=0.3).loglikelihood(requests)
    found = model(method="snapkv", **size, **arguments).loglikelihood(requests)
    assert [v for v, _ in found] != pytest.approx([v for v, _ in plain], abs=1e-6)


def test_requests_keep_their_order_and_kinds() -> None:
    lm = model()
    prompts = [PROMPT, PROMPT.replace("red", "pink"), PROMPT]
    kinds = [{"until": ["\n\n"], "max_gen_toks": 5}, {"until": [], "max_gen_toks": 2}, {"max_new_tokens": 4}]
    together = lm.generate_until(asked("generate_until", *zip(prompts, kinds, strict=True)))
    alone = [lm.generate_until(asked("generate_until", each))[0] for each in zip(prompts, kinds, strict=True)]
    assert together == alone
    assert together[0].startswith(together[2]) and len(together[0]) > len(together[2]) and together[1] != together[0]


def test_drawn_answers_differ_between_repeats_and_come_again() -> None:
    drawn = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    requests = asked("generate_until", (PROMPT, drawn), (PROMPT, drawn))
    first, second = model().generate_until(requests)
    assert first != second and [first, second] == model().generate_until(requests)
    greedy = {**drawn, "do_sample": False}
    assert len(set(model().generate_until(asked("generate_until", (PROMPT, greedy), (PROMPT, greedy))))) == 1


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"method": "snapkv"}, "needs a ratio or a budget"), ({"method": "snapvk", "ratio": 0.2}, "unknown method"),
        ({"method": "snapkv", "ratio": 0.2, "winow": 3}, "unknown setting"),
        ({"method": "snapkv", "ratio": 2}, "ratio"),
        ({"method": "snapkv", "ratio": 0.2, "budget": 3}, "exclude each other"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(arguments: dict[str, Any], why: str) -> None:
    with pytest.raises(KvcliError, match=why):
        model(**arguments)


def test_what_it_cannot_answer_is_refused() -> None:
    lm = model()
    with pytest.raises(KvcliError, match="perplexity of whole texts"):
        lm.loglikelihood_rolling(asked("loglikelihood_rolling", ("a text",)))
    with pytest.raises(KvcliError, match="there is no prompt to compress"):
        lm.loglikelihood(asked("loglikelihood", ("", " a")))
    with pytest.raises(KvcliError, match="does not generate with num_beams=4"):
        lm.generate_until(asked("generate_until", (PROMPT, {"num_beams": 4})))
    with pytest.raises(KvcliError, match="does not fit the model"):
        lm.generate_until(asked("generate_until", ("word " * 4000, {"max_gen_toks": 256})))


@pytest.mark.slow
def test_lm_eval_s_own_command(tmp_path: Path) -> None:
    """`python -m kvcli.harness run --model kvcli ...` on a task of the user's own, with its results file."""
    reference.write(tmp_path / "rows.jsonl", [{"q": f"{i} + 1 =", "a": i % 2} for i in range(6)])
    task = {
        "task": "sums", "dataset_path": "json", "test_split": "train", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": str(tmp_path / "rows.jsonl"), "cache_dir": str(tmp_path / "cache")},
        "doc_to_text": "Say yes or no.\n\n{{q}}", "doc_to_choice": ["yes", "no"], "doc_to_target": "a",
    }  # fmt: skip
    (tmp_path / "sums.yaml").write_text(json.dumps(task))
    sizes = ",".join(f"{key}={value}" for key, value in SIZES.items())
    arguments = f"pretrained=random:{reference.shared('configs') / 'gpt2'}:{sizes},method=snapkv,window=2,ratio=0.5"
    arguments += f",tokenizer={reference.shared('tokenizers') / 'gpt2'}"
    command = [sys.executable, "-m", "kvcli.harness", "run", "--model", "kvcli", "--tasks", str(tmp_path / "sums.yaml")]
    command += ["--output_path", str(tmp_path / "out"), "--device", "cpu", "--model_args"]

    def call(text: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
        return subprocess.run([*command, text], capture_output=True, text=True, timeout=170, env=env, cwd=tmp_path)

    done = call(arguments)
    assert done.returncode == 0, done.stderr
    results = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())
    assert 0 <= results["results"]["sums"]["acc,none"] <= 1
    assert results["config"]["kvcli"]["method"] == "snapkv:window=2" and results["config"]["model"] == "kvcli"
    assert 0.4 < results["config"]["kvcli"]["measured_ratio"] < 0.7
    refused = call(arguments.replace("snapkv", "snapvk"))
    assert refused.returncode == 2 and refused.stderr.rstrip().splitlines()[-3].startswith("error: unknown method")
