"""Everything a user may type wrongly: one clear message, exit code 2, no traceback, nothing written."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvcli.models import loader
from tests.cli.sweeping import TINY, Done, call, contents, model_folder, one_error, typed

GOOD = {"--task": "tb_recall", "--method": "snapkv", "--ratio": "0.3", "--limit": "2", "--out": "out"}

CASES: dict[str, tuple[dict[str, str | None], tuple[str, ...]]] = {
    # what differs from GOOD (None: left out) -> words of the message
    "method": ({"--method": "snapvk"}, ("unknown method 'snapvk'", "try:   snapkv", "kvcli list methods")),
    "method, nothing near": ({"--method": "qqqqqq"}, ("unknown method 'qqqqqq'", "kvcli list methods")),
    "base": (
        {"--method": "adakv:base=nope"},
        ("unknown base 'nope'", "given: --method adakv:base=nope", "base=expected_attention | h2o"),
    ),
    "method empty": ({"--method": "snapkv,,h2o"}, ("empty method",)),
    "method missing": ({"--method": ""}, ("empty method",)),
    "setting": ({"--method": "snapkv:windw=3"}, ("windw", "window")),
    "setting negative": ({"--method": "snapkv:window=-1"}, ("window=-1", "at least 1")),
    "setting no number": ({"--method": "snapkv:window=x"}, ("window=x", "whole number")),
    "setting even": ({"--method": "snapkv:kernel=4"}, ("kernel=4", "odd")),
    "setting no choice": ({"--method": "snapkv:pool=sum"}, ("pool=sum", "max | avg")),
    "setting twice": ({"--method": "snapkv:window=3,window=4"}, ("window", "twice")),
    "setting empty": ({"--method": "snapkv:"}, ("snapkv:", "KEY=VALUE")),
    "setting without key": ({"--method": "quant:int4"}, ("'int4' is not a setting of quant", "quant:dtype=int4")),
    "setting without key in a sum": ({"--method": "snapkv+kivi:2"}, ("of kivi", "try:   --method snapkv+kivi:bits=2")),
    "setting with a colon": ({"--method": "snapkv:window:8"}, ("'window:8'", "try:   --method snapkv:window=8")),
    "setting that is a base": ({"--method": "adakv:h2o"}, ("of adakv", "adakv:base=h2o")),
    "setting that is any number": ({"--method": "snapkv:16"}, ("try:   --method snapkv:window=16", "kernel, pool")),
    "setting without value": ({"--method": "snapkv:window"}, ("try:   --method snapkv:window=32",)),
    "setting that is a ratio": (
        {"--method": "snapkv:0.3,h2o", "--ratio": None},
        ("'0.3' is not a setting of snapkv", "try:   --method snapkv,h2o --ratio 0.3"),
    ),
    "setting that is a share": ({"--method": "streaming-llm:30%"}, ("try:   --method streaming-llm --ratio 0.3",)),
    "method is a ratio": ({"--method": "snapkv=0.3"}, ("of snapkv", "try:   --method snapkv --ratio 0.3")),
    "method at a ratio": ({"--method": "snapkv@0.3"}, ("try:   --method snapkv --ratio 0.3",)),
    "ratio of what has none": ({"--method": "quant:0.3"}, ("of quant", "it takes no ratio", "dtype, backend")),
    "settings joined by a colon": (
        {"--method": "snapkv:window=8:kernel=5"}, ("joined by commas", "try:   snapkv:window=8,kernel=5"),
    ),
    "setting of a base": ({"--method": "adakv:window=16"}, ("setting of its base", "adakv:base.window=16")),
    "setting of nothing known": ({"--method": "snapvk:3"}, ("unknown method 'snapvk'", "snapkv")),
    "setting of a group without key": ({"--method": "tier1:3"}, ("'3' is not a setting of tier1",)),
    "setting of a file without key": ({"--method": "./mine.py:Mine:3"}, ("'3' is not a setting of ./mine.py:Mine",)),
    "task part without key": ({"--task": "mmlu:anatomy"}, ("of mmlu", "try:   mmlu:dataset_name=anatomy")),
    "task family": ({"--task": "mgsm:de"}, ("'de' is not a setting of mgsm", "try:   --task mgsm_de")),
    "task in capitals": ({"--task": "GSM8K"}, ("unknown task 'GSM8K'", "try:   gsm8k")),
    "weights without key": ({"--weights": "sparsegpt:0.5"}, ("'0.5'", "--weights sparsegpt:sparsity=0.5")),
    "weights without name": ({"--weights": "2:4"}, ("'2:4'", "try:   --weights sparsegpt:2:4")),
    "task of another testbed": (
        {"--task": "tbd_choice"}, ("--model testbed --task tbd_choice", "--model testbed-deep, or --task testbed"),
    ),
    "method, extra comma": ({"--method": "snapkv,"}, ("an empty method name", "--method snapkv, without the extra")),
    "methods without comma": ({"--method": "snapkv h2o"}, ("not a method", "try:   --method snapkv,h2o")),
    "ratio in percent": ({"--ratio": "30"}, ("ratio 30 is out of range", "--ratio 0.3 keeps 30 %")),
    "ratio with a comma": ({"--ratio": "0,3"}, ("ratio 0", "--ratio 0.3, with a point")),
    "task setting without key": ({"--task": "mmlu:anatomy"}, ("'anatomy' is not a setting of mmlu", "list tasks mmlu")),
    "setting without method": ({"--method": "window=3"}, ("window=3",)),
    "setting of a group": ({"--method": "tier1:window=3"}, ("tier1",)),
    "setting of none": ({"--method": "full:window=3"}, ("full has no settings",)),
    "quote": ({"--method": "snapkv:pool='max"}, ("quote",)),
    "sum": ({"--method": "snapkv+h2o"}, ("snapkv+h2o", "cannot be combined")),
    "plugin file": ({"--method": "./nowhere.py:Mine"}, ("no file ./nowhere.py",)),
    "plugin class": ({"--method": "./mine.py:Mine"}, ("no method class 'Mine' in ./mine.py",)),
    "plugin without class": ({"--method": "./mine.py"}, ("./mine.py", "./mine.py:MyMethod")),
    "plugin that breaks": ({"--method": "./broken.py:Mine"}, ("./broken.py cannot be imported", "ZeroDivisionError")),
    "ratio 0": ({"--ratio": "0"}, ("ratio 0 is out of range", "above 0 and at most 1")),
    "ratio 1.5": ({"--ratio": "1.5"}, ("ratio 1.5 is out of range",)),
    "ratio negative": ({"--ratio": "-0.1"}, ("-0.1",)),
    "ratio abc": ({"--ratio": "abc"}, ("'abc' is not a number",)),
    "ratio nan": ({"--ratio": "nan"}, ("'nan' is not a number",)),
    "ratio empty": ({"--ratio": "0.1,,0.2"}, ("not a number",)),
    "ratio descending": ({"--ratio": "0.9..0.1:0.1"}, ("0.9..0.1:0.1", "descends", "0.1..0.9:0.1")),
    "ratio without step": ({"--ratio": "0.1..0.9"}, ("no step",)),
    "ratio step 0": ({"--ratio": "0.1..0.9:0"}, ("step 0",)),
    "ratio end": ({"--ratio": "0.1..0.95:0.1"}, ("does not end on 0.95", "0.1..0.9:0.1")),
    "ratio and budget": ({"--budget": "40"}, ("--ratio", "--budget", "exclude")),
    "budget 0": ({"--ratio": None, "--budget": "0"}, ("--budget", "at least 1")),
    "budget in parts": ({"--ratio": None, "--budget": "64.5,128"}, ("try:   --budget 64,128",)),
    "budget below one": ({"--ratio": None, "--budget": "0.5"}, ("given: --budget 0.5", "try:   --budget 64,128")),
    "budget x": ({"--ratio": None, "--budget": "x"}, ("--budget x",)),
    "limit -3": ({"--limit": "-3"}, ("--limit must be at least 1", "given: --limit -3")),
    "limit 0": ({"--limit": "0"}, ("--limit must be at least 1", "given: --limit 0")),
    "limit x": ({"--limit": "x"}, ("'--limit'", "valid integer", "--limit x")),
    "shots -1": ({"--shots": "-1"}, ("--shots -1",)),
    "shots x": ({"--shots": "0,x"}, ("--shots 0,x",)),
    "shots that do not fit": ({"--shots": "60", "--task": "tb_choice"}, ("tb_choice", "--shots 60", "--shots 12")),
    "seed x": ({"--seed": "x"}, ("--seed x", "whole numbers")),
    "seed -1": ({"--seed": "-1"}, ("--seed -1",)),
    "shot seed": ({"--shot-seed": "x"}, ("--shot-seed x", "whole numbers")),
    "shot order": ({"--shot-order": "-1"}, ("--shot-order -1", "negative")),
    "query": ({"--query": "bot"}, ("--query bot", "aware | agnostic | both")),
    "truncate": ({"--truncate": "right"}, ("--truncate right", "middle | left")),
    "first token": ({"--first-token": "bot"}, ("--first-token bot", "compressed | prefill | both")),
    "dtype": ({"--dtype": "int8"}, ("--dtype int8", "float32")),
    "device": ({"--device": "tpu9"}, ("--device tpu9", "cpu")),
    "template": ({"--template": "markdown"}, ("--template markdown", "auto | chat | raw")),
    "no chat template": (
        {"--template": "chat", "--task": "gsm8k", "--data-dir": "data"}, ("chat template", "--template raw"),
    ),
    "attention": ({"--attn": "magic"}, ("--attn magic", "reference")),
    "memory": ({"--memory": "lots"}, ("--memory lots", "8G")),
    "threads": ({"--threads": "0"}, ("--threads must be at least 1",)),
    "decode batch": ({"--decode-batch": "0"}, ("--decode-batch must be at least 1",)),
    "prefill batch": ({"--prefill-batch": "-2"}, ("--prefill-batch must be at least 1",)),
    "answer length": ({"--max-new-tokens": "0"}, ("--max-new-tokens must be at least 1",)),
    "answer too long": ({"--max-new-tokens": "700"}, ("tb_recall", "does not fit", "700", "1024", "--max-new-tokens")),
    "prompt too long": ({"--max-prompt-tokens": "100"}, ("tb_recall", "--max-prompt-tokens 100")),
    "task": ({"--task": "tb_recal"}, ("unknown task 'tb_recal'", "tb_recall", "kvcli list tasks")),
    "task empty": ({"--task": "tb_recall,"}, ("empty task",)),
    "task file": ({"--task": "./nowhere.yaml"}, ("nowhere.yaml",)),
    "task pattern": ({"--task": "zz_*"}, ("zz_*",)),
    "data": ({"--task": "gsm8k", "--data-dir": "nowhere"}, ("nowhere",)),
    "data of another set": ({"--task": "gsm8k", "--data-dir": "tiny"}, ("gsm8k", "tiny")),
    "preset": ({"--preset": "dem"}, ("unknown preset 'dem'", "demo")),
    "file missing": ({"-c": "nowhere.yaml"}, ("cannot read nowhere.yaml",)),
    "file is a folder": ({"-c": "tiny"}, ("cannot read tiny",)),
    "file broken": ({"-c": "broken.yaml"}, ("broken.yaml:3", "not YAML")),
    "file of other things": ({"-c": "list.yaml"}, ("list.yaml", "not a mapping")),
    "file with unknown setting": ({"-c": "unknown.yaml"}, ("unknown setting 'ratio'", "unknown.yaml", "ratios")),
    "file with wrong type": (
        {"-c": "type.yaml", "--limit": None},
        ("'limit' must be a whole number", "type.yaml", "three"),
    ),
    "file with bad method": ({"-c": "method.yaml", "--method": None}, ("unknown method 'snapvk'",)),
    "out is a file": ({"--out": "type.yaml"}, ("type.yaml is not a folder", "--out type.yaml")),
    "out below a file": ({"--out": "type.yaml/run"}, ("type.yaml is not a folder",)),
    "out cannot be made": ({"--out": "/proc/kvcli"}, ("cannot write to /proc/kvcli",)),
    "model": ({"--model": "testbet"}, ("unknown model 'testbet'", "testbed", "kvcli list models")),
    "model folder": ({"--model": "./nowhere"}, ("no model folder nowhere",)),
    "model folder empty": ({"--model": "./data"}, ("no config.json in data",)),
    "model config broken": ({"--model": "./brokenmodel"}, ("brokenmodel",)),
    "no tokenizer": ({"--model": "./notokenizer"}, ("no tokenizer files in notokenizer", "--tokenizer FOLDER")),
    "tokenizer": ({"--tokenizer": "./nowhere"}, ("no tokenizer folder ./nowhere",)),
    "random nowhere": ({"--model": "random:./nowhere:layers=2"}, ("no model folder nowhere",)),
    "random size": ({"--model": "random:./tiny:layer=2"}, ("unknown size of a random model 'layer'", "layers")),
    "random 0": ({"--model": "random:./tiny:layers=0"}, ("layers=0",)),
    "random x": ({"--model": "random:./tiny:hidden=big"}, ("hidden=big",)),
    "random heads": ({"--model": "random:./tiny:hidden=63"}, ("hidden=63", "do not fit")),
    "random kv heads": ({"--model": "random:./tiny:heads=4,kv_heads=3"}, ("kv_heads=3", "do not fit")),
    "random vocabulary": ({"--model": "random:./tiny:vocab=10"}, ("vocab=10", "450")),
    "random positions": ({"--model": "random:./tiny:positions=100"}, ("does not fit", "100")),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with everything the cases name."""
    top = tmp_path_factory.mktemp("place")
    model_folder(top / "tiny")
    (top / "data").mkdir()
    (top / "notokenizer").mkdir()
    (top / "notokenizer" / "config.json").write_bytes((top / "tiny" / "config.json").read_bytes())
    model_folder(top / "brokenmodel")
    (top / "brokenmodel" / "config.json").write_text('{"model_type": "llama", ')
    (top / "data" / "gsm8k").mkdir()
    row = json.dumps({"question": "How many?", "answer": "One.\n#### 1"}) + "\n"
    for split in ("test", "train"):
        (top / "data" / "gsm8k" / f"{split}.jsonl").write_text(row * 9)
    (top / "mine.py").write_text("class Mine: pass\n")
    (top / "broken.py").write_text("1 / 0\n")
    (top / "broken.yaml").write_text("limit: 3\nratios: [0.1\nshots: 3\n")
    (top / "list.yaml").write_text("- limit\n")
    (top / "unknown.yaml").write_text("ratio: 0.1\n")
    (top / "type.yaml").write_text("limit: three\n")
    (top / "method.yaml").write_text("methods: [snapvk]\n")
    return top


def command(**changes: str | None) -> list[str]:
    return [text for name, value in {**GOOD, **changes}.items() if value is not None for text in (name, value)]


@pytest.mark.parametrize("changes, words", CASES.values(), ids=CASES)
def test_bad_input(kvcli, place, monkeypatch, changes: dict[str, str | None], words: tuple[str, ...]):
    monkeypatch.chdir(place)
    monkeypatch.setattr(loader, "load_weights", weights_loaded)
    before = contents(place)
    one_error(kvcli("sweep", *command(**changes)), *words)
    assert contents(place) == before
    assert not (place / "out").exists() and not (place / "runs").exists()


def weights_loaded(*_: object, **__: object) -> None:
    raise AssertionError("weights were loaded before the input was checked")


def test_the_good_input_is_good(kvcli, place, monkeypatch):
    """What the cases differ from runs."""
    monkeypatch.chdir(place)
    assert kvcli("sweep", *command(), "--dry-run").code == 0


@pytest.mark.parametrize("shots", ["63", "200"])
def test_more_shots_than_the_testbed_has_keys(kvcli, tmp_path, shots: str):
    done = kvcli("sweep", *command(**{"--shots": shots, "--limit": None, "--out": str(tmp_path / "out")}), "--dry-run")
    one_error(done, "tb_recall", f"--shots {shots}")


NOT_CHECKED: dict[str, tuple[dict[str, str | None], tuple[str, ...]]] = {
    "maps": ({"--keep-maps": "-1"}, ("--keep-maps",)),
    "time": ({"--max-time": "-1"}, ("--max-time",)),
}


@pytest.mark.parametrize("changes, words", NOT_CHECKED.values(), ids=NOT_CHECKED)
def test_bad_input_not_yet_refused(kvcli, place, monkeypatch, changes: dict[str, str | None], words: tuple[str, ...]):
    monkeypatch.chdir(place)
    one_error(kvcli("sweep", *command(**changes), "--dry-run"), *words)


RUN_NOT_CHECKED = (
    "--task testbed --method h2o --ratio 0.1",
    "--task tb_recall,tb_code --method h2o --ratio 0.1",
    "--task tb_recall --method tier1 --ratio 0.1",
    "--task tb_recall --method h2o --budget 40,50",
)


@pytest.mark.parametrize("text", RUN_NOT_CHECKED)
def test_run_is_for_one_cell(kvcli, text: str):
    one_error(kvcli("run", *typed(text), "--limit", "1", "--dry-run"), "one", "sweep")


USAGE = {
    "swep --limit 1": ("swep", "kvcli sweep"),
    "sweep --ratoi 0.1": ("--ratoi", "--ratio"),
    "sweep tb_recall": ("tb_recall",),
    "sweep --ratio": ("--ratio",),
    "run --method h2o --ratio 0.1": ("--task",),
    "run --task tb_recall --method h2o,snapkv --ratio 0.1": ("one method", "sweep"),
    "run --task tb_recall --method h2o --ratio 0.1,0.2": ("one ratio", "sweep"),
    "run --task tb_recall --method h2o": ("--ratio",),
}


@pytest.mark.parametrize("text, words", USAGE.items())
def test_bad_usage(kvcli, tmp_path, monkeypatch, text: str, words: tuple[str, ...]):
    monkeypatch.chdir(tmp_path)
    one_error(kvcli(*typed(text)), *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "variable, value, words",
    [
        ("KVCLI_LIMIT", "-3", ("limit", "-3")),
        ("KVCLI_LIMIT", "many", ("limit", "many")),
        ("KVCLI_METHODS", "snapvk", ("snapvk",)),
    ],
)
def test_bad_variables(kvcli, tmp_path, monkeypatch, variable: str, value: str, words: tuple[str, ...]):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(variable, value)
    one_error(kvcli("sweep", "--task", "tb_recall"), *words)
    assert not list(tmp_path.iterdir())


def test_a_variable_that_is_not_yaml(kvcli, monkeypatch):
    monkeypatch.setenv("KVCLI_MODEL", "[testbed")
    try:
        done = kvcli("sweep", "--task", "tb_recall", "--dry-run")
    except Exception as e:
        pytest.fail(f"a traceback: {e}")
    one_error(done, "unknown model", "[testbed")


# --- found out only when the model is built ---------------------------------------------------------------------------

FAMILIES = {
    "falcon": ({"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}, ("'falcon'",)),
    "bloom": ({"hidden_size": 32, "n_layer": 2, "n_head": 2}, ("'bloom'",)),
    "gemma2": (
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
         "intermediate_size": 64, "sliding_window": 64, "max_position_embeddings": 1024},
        ("'gemma2'", "sliding-window"),
    ),
    "gpt_oss": (
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
         "intermediate_size": 64, "num_local_experts": 2, "num_experts_per_tok": 1, "max_position_embeddings": 1024},
        ("'gpt_oss'",),
    ),
}  # fmt: skip
"""Families the patch does not support: configs of transformers' own, and words of the refusal."""


def refusals(tmp_path: Path) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Models that are refused only once they are to be built: --model and words of the message."""
    found = {}
    for family, (sizes, words) in FAMILIES.items():
        folder = model_folder(tmp_path / family, model_type=family, **sizes)
        found[family] = (f"random:{folder}", (*words, "not supported"))
    bare = model_folder(tmp_path / "bare")
    found["too big"] = (f"random:{bare}:layers=60,hidden=65536,heads=512", ("GiB", "free"))
    found["no weights"] = (str(bare), ("cannot be loaded", str(bare)))
    return found


REFUSED = [*FAMILIES, "too big", "no weights"]


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Done, Path, tuple[str, ...]]]:
    """refused(which): what came of a sweep of that model, its result folder, words to look for. Run once each."""
    top = tmp_path_factory.mktemp("refused")
    models, seen = refusals(top), {}

    def run(which: str) -> tuple[Done, Path, tuple[str, ...]]:
        model, words = models[which]
        out = top / f"out-{which.replace(' ', '-')}"
        if which not in seen:
            seen[which] = call("sweep", *command(**{"--model": model, "--out": str(out)}))
        return seen[which], out, words

    return run


@pytest.mark.parametrize("which", REFUSED)
def test_models_that_cannot_be_used(refused, which: str):
    done, _, words = refused(which)
    one_error(done, *words)


@pytest.mark.parametrize("which", REFUSED)
def test_a_refused_model_leaves_no_folder(refused, which: str):
    _, out, _ = refused(which)
    assert not out.exists()


def test_a_model_that_is_too_big_takes_no_memory(kvcli, tmp_path, monkeypatch):
    """Refused from its sizes: no parameter is made."""
    from torch import nn

    made = []
    init = nn.Parameter.__new__

    def count(cls, data=None, requires_grad=True):
        if data is not None and data.device.type != "meta":
            made.append(data.shape)
        return init(cls, data, requires_grad)

    monkeypatch.setattr(nn.Parameter, "__new__", count)
    bare = model_folder(tmp_path / "bare")
    huge = {"--model": f"random:{bare}:layers=60,hidden=65536,heads=512", "--out": str(tmp_path / "out")}
    one_error(kvcli("sweep", *command(**huge)), "GiB")
    assert not made


# --- as processes of their own ----------------------------------------------------------------------------------------


def test_no_traceback_in_a_real_process(kvcli_process, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one_error(kvcli_process("sweep", "--method", "snapvk"), "unknown method 'snapvk'", "snapkv")
    one_error(kvcli_process("sweep", "--ratio", "1.5"), "ratio 1.5")
    one_error(kvcli_process("sweep", "--limit", "-3"), "--limit -3")
    one_error(kvcli_process("sweep", "--no-such-option"), "--no-such-option")
    one_error(kvcli_process("run"), "--task")
    assert not list(tmp_path.iterdir())


def test_a_prompt_too_long_in_a_real_process(kvcli_process, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one_error(kvcli_process("sweep", *command(), "--max-new-tokens", "700"), "700 new ones", "1024")
    assert not list(tmp_path.iterdir())


def test_a_hub_that_cannot_be_reached(kvcli_process, tmp_path, monkeypatch):
    """At an address that refuses connections: a message within 20 s, and no chatter of the hub's client."""
    monkeypatch.chdir(tmp_path)
    began = time.monotonic()
    address = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}
    done = kvcli_process("sweep", *command(), "--model", "org/name", **address)
    assert time.monotonic() - began < 20
    one_error(done, "--model org/name", "org/name")
    assert "Retrying" not in done.err
    assert not (tmp_path / "out").exists()


def test_the_hub_switched_off(kvcli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one_error(kvcli("sweep", *command(), "--model", "org/name"), "--model org/name", "cannot be reached")
    assert not (tmp_path / "out").exists()


def test_a_random_model_of_a_supported_family_is_fine(kvcli, tmp_path):
    tiny = model_folder(tmp_path / "tiny")
    assert kvcli("sweep", *command(), "--model", f"random:{tiny}:{TINY}", "--out", tmp_path / "run").code == 0
