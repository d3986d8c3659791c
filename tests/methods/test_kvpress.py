"""`kvpress:CLASS`: presses run by kvpress itself in a second process.

The contract is tested against a worker written here, which speaks the protocol without kvpress; tests marked `peer` ask
the real one, and compare it with kvpress run on its own.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvcli.cache.budget import Budget
from kvcli.cache.rows import head_positions
from kvcli.engine.selecting import checked
from kvcli.errors import Exit, KvcliError
from kvcli.grammar import parse_methods, round_half_up
from kvcli.kvpress import client
from kvcli.kvpress.presses import PRESSES, VERSION, find
from kvcli.kvpress.shares import removed_share
from kvcli.kvpress.worker import Refused, pairs, server
from kvcli.methods._kvpress import Kvpress, build_press
from kvcli.methods.context import Context

LAYERS, HEADS = 2, 2

FAKE = '''#!{python}
"""Speaks the worker's protocol. Keeps the first pairs, or what MODE says; writes every request down."""
import array, base64, json, os, sys

MODE = {mode!r}
SCORERS = ["ScorerPress"]
if MODE == "mute":
    sys.exit("this is no worker")
if MODE == "parrot":
    for line in sys.stdin:
        sys.stdout.write(line), sys.stdout.flush()
    sys.exit()

def parameter(name, kind, default=None, required=False, choices=None, optional=False):
    return dict(name=name, kind=kind, default=default, required=required, choices=choices, optional=optional)

DESCRIPTIONS = {{
    "SnapKVPress": [parameter("window_size", "int", 64), parameter("kernel_size", "int", 5)],
    "KnormPress": [],
    "ObservedAttentionPress": [],
    "TOVAPress": [],
    "AdaKVPress": [parameter("press", "press", required=True), parameter("alpha_safeguard", "float", 0.2)],
    "CriticalKVPress": [parameter("press", "press", required=True), parameter("epsilon", "float", 1e-4)],
    "KVzipPress": [parameter("layerwise", "bool", False), parameter("n_sink", "int", 4)],
    "RandomPress": [parameter("seed", "int", None, optional=True)],
    "CURPress": [parameter("leverage_type", "str", "key", choices=["key", "value"]),
                 parameter("use_random_leverage", "bool", False), parameter("thing", "other")],
    "DMSPress": [parameter("press", "press", required=True), parameter("threshold", "float", None, optional=True),
                 parameter("decoding", "bool", False)],
    "PerLayerCompressionPress": [parameter("press", "press", required=True),
                                 parameter("compression_ratios", "floats", required=True)],
}}
VERSIONS = {{"python": "3.11.0", "kvpress": "0.5.5", "transformers": "5.2.0", "torch": "2.13.0"}}
VERSIONS.update({versions!r})

def keep(request):
    n, ratio = len(request["ids"]), request["ratio"]
    count = int(n * (1 - ratio)) if ratio is not None else n // 2
    if MODE == "last":
        return [[list(range(n - count, n))] * {heads}] * {layers}
    if MODE == "head":  # the first head has the last token, the second has not
        return [[list(range(n - count, n)), list(range(count))]] * {layers}
    if MODE == "ragged":
        return [[list(range(count - 1)), list(range(count + 1))]] * {layers}
    if MODE == "greedy":
        return [[list(range(count + 3))] * {heads}] * {layers}
    if MODE == "layers":
        return [[list(range(count))] * {heads}]
    return [[list(range(count))] * {heads}] * {layers}

for line in sys.stdin:
    request = json.loads(line)
    open({log!r}, "a").write(json.dumps(dict(request, pid=os.getpid())) + "\\n")
    answer, error = {{}}, None
    if request["do"] == "hello":
        answer = {{"protocol": 1, "versions": VERSIONS}}
    elif request["do"] == "describe":
        answer = {{"parameters": DESCRIPTIONS[request["press"]]}}
    elif request["do"] == "make" and request["press"]["arguments"].get("alpha_safeguard", 0) > 1:
        error = "AssertionError: alpha_safeguard should be in [0, 1]"
    elif request["do"] == "run" and MODE == "crash":
        sys.exit("the machine is full")
    elif request["do"] == "run" and MODE == "fails":
        error = "ValueError: too short"
    elif request["do"] == "run":
        kept = keep(request)
        flat = array.array("i", [p for layer in kept for head in layer for p in head])
        answer = {{"counts": [[len(head) for head in layer] for layer in kept],
                   "positions": base64.b64encode(flat.tobytes()).decode()}}
    out = {{"id": request["id"], "error": error}} if error else {{"id": request["id"], "answer": answer}}
    sys.stdout.write(json.dumps(out) + "\\n")
    sys.stdout.flush()
'''


@dataclasses.dataclass
class Fake:
    """An executable that kvcli takes for kvpress's Python."""

    path: str
    log: Path

    def requests(self, what: str) -> list[dict[str, Any]]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [r for r in map(json.loads, lines) if r["do"] == what]


@pytest.fixture
def fake(tmp_path) -> Iterator[Any]:
    """fake(mode, **versions): kvcli told to use such an interpreter, with a model served."""

    def make(mode: str = "", **versions: str | None) -> Fake:
        file, log = tmp_path / f"python-{mode}", tmp_path / "requests.jsonl"
        file.write_text(FAKE.format(python=sys.executable, mode=mode, versions=versions, heads=HEADS, layers=LAYERS,
                                    log=str(log)))  # fmt: skip
        file.chmod(0o755)
        client.choose(str(file))
        client.serve(client.Place("somewhere"))
        return Fake(str(file), log)

    yield make
    client.serve(None)
    client.choose(None)


def method(text: str) -> Kvpress:
    return build_press(parse_methods([text])[0].parts[0])


def context(n: int, *, sample: str = "s", seed: int = 0, layers: int = LAYERS, heads: int = HEADS) -> Context:
    """A prompt of n tokens whose extra pass is the worker."""
    keys = [torch.zeros(heads, n, 4)] * layers
    return Context(
        n=n, heads=2 * heads, kv_heads=heads, token_ids=list(range(3, n + 3)), regions=[], keys=keys, values=keys,
        column_sums={}, window_queries=[], scaling=[1.0] * layers, sample_id=sample, seed=seed,
        passes={"kvpress": lambda: client.kept},
    )  # fmt: skip


def chosen(text: str, n: int, size: int, **more: Any) -> tuple[list[list[list[int]]], Any]:
    """(positions per layer and head, the selection), held against the engine's contract."""
    ctx, one = context(n, **more), method(text)
    budget = Budget.of_size(size, n, ctx.layers, ctx.kv_heads)
    selection = checked(one.select(ctx, budget), one, ctx, budget)
    return [[p.tolist() for p in head_positions(form, ctx.kv_heads)] for form in selection.kept], selection


# The number of pairs


def test_every_kept_ratio_reaches_kvcli_s_number_of_pairs() -> None:
    for n in range(2, 2001):
        for percent in range(1, 100):
            kept = min(n - 1, max(1, round_half_up(Decimal(percent) / 100 * n)))
            ratio = removed_share(n, kept)
            assert max(1, int(n * (1 - ratio))) == kept
            assert abs(ratio - (1 - kept / n)) < 1e-9


def test_the_plain_quotient_would_lose_pairs() -> None:
    assert int(1000 * (1 - 0.9)) == 99
    lost = [(n, k) for n in range(2, 300) for k in range(1, n) if int(n * (1 - (1 - k / n))) != k]
    assert lost
    assert all(int(n * (1 - removed_share(n, k))) == k for n, k in lost)


@pytest.mark.parametrize("parts", [8, 32, 126 * 8])
def test_budgets_that_heads_share_are_met_in_both_ways_of_counting(parts) -> None:
    for n in range(2, 700, 7):
        for kept in range(1, n, max(1, n // 50)):
            assert int(parts * n * (1 - removed_share(n, kept))) == parts * kept
            assert int(parts * n * removed_share(n, kept, "removed")) == parts * (n - kept)


def test_chunks_are_not_lost_to_the_same_cut() -> None:
    assert int(6 * (1 - (1 - 40 / 120))) == 1
    for chunks in range(2, 400):
        for kept in range(1, chunks):
            assert int(chunks * (1 - removed_share(20 * chunks, 20 * kept))) == kept


def test_no_ratio_keeps_nothing_or_everything() -> None:
    for kept in (0, 10):
        with pytest.raises(ValueError, match="need no compression ratio"):
            removed_share(10, kept)


# Texts


def test_the_page_names_every_press_on_the_right_side() -> None:
    page = (Path(__file__).parents[2] / "docs" / "kvpress.md").read_text(encoding="utf-8")
    measured, refused = page.partition("## The presses")[2].split("| refused | because |")
    for name, press in PRESSES.items():
        here, there = (measured, refused) if not press.refused else (refused, measured)
        assert re.search(rf"\b{name}\b", here), name
        assert name == "DMSPress" or not re.search(rf"^\|.*\b{name}\b", there, re.M), name
        if press.knob:
            assert f"{name} (`{press.knob}`)" in here


@pytest.mark.parametrize("name", [name for name, press in PRESSES.items() if press.refused])
def test_a_refused_press_needs_no_environment_to_say_why(name) -> None:
    client.choose("/no/such/python")
    try:
        with pytest.raises(KvcliError, match=f"{name} cannot be measured: .") as error:
            method(f"kvpress:{name}")
        assert error.value.code == Exit.USAGE
    finally:
        client.choose(None)


def test_an_unknown_press_is_named_with_the_nearest() -> None:
    with pytest.raises(KvcliError, match="unknown press 'SnapPress'") as error:
        find("SnapPress", "--method kvpress:SnapPress")
    assert error.value.fix.startswith("SnapKVPress")


@pytest.mark.parametrize(
    ("typed", "changed"),
    [
        ("kvpress:SnapKVPress", {}),
        ("kvpress:SnapKVPress:window_size=64", {}),
        ("kvpress:SnapKVPress:window_size=8,last=after", {"window_size": "8", "last": "after"}),
        ("kvpress:AdaKVPress:press=SnapKVPress,press.window_size=8",
         {"press": "SnapKVPress", "press.window_size": "8"}),
        ("kvpress:AdaKVPress:press=CriticalKVPress,press.press=KnormPress,press.epsilon=0.0001",
         {"press": "CriticalKVPress", "press.press": "KnormPress"}),
        ("kvpress:RandomPress:seed=none", {}),
        ("kvpress:RandomPress:seed=3", {"seed": "3"}),
        ("kvpress:KVzipPress:layerwise=true", {"layerwise": "true"}),
        ("kvpress:PerLayerCompressionPress:press=KnormPress,compression_ratios='0.5,0.25'",
         {"press": "KnormPress", "compression_ratios": "0.5,0.25"}),
    ],
)  # fmt: skip
def test_changed_settings_make_the_same_press_again(fake, typed, changed) -> None:
    fake()
    one = method(typed)
    assert one.changed() == changed
    part = dataclasses.replace(parse_methods([typed])[0].parts[0], settings=tuple(sorted(changed.items())))
    assert build_press(part) == one
    assert parse_methods([str(part)])[0].parts == (part,)


@pytest.mark.parametrize(
    ("typed", "what"),
    [
        ("SnapKVPress:window=8", "unknown setting of SnapKVPress 'window'"),
        ("SnapKVPress:window_size=x", "must be a whole number"),
        ("SnapKVPress:window_size.x=1", "unknown setting of SnapKVPress"),
        ("SnapKVPress:compression_ratio=0.5", "the ratio is kvcli's"),
        ("SnapKVPress:last=gone", "is not one of its values"),
        ("AdaKVPress", "needs a press that scores"),
        ("AdaKVPress:press=SnapPress", "unknown press 'SnapPress'"),
        ("AdaKVPress:press=ThinKPress", "ThinKPress cannot be measured"),
        ("AdaKVPress:press=ObservedAttentionPress", "does not work with a press that reads attention"),
        ("AdaKVPress:press=CriticalKVPress,press.press=ObservedAttentionPress", "AdaKVPress does not work with"),
        ("AdaKVPress:press=KnormPress,alpha_safeguard=2", "AssertionError: alpha_safeguard should be in"),
        ("AdaKVPress:press=KnormPress,alpha_safeguard=nan", "must be a number"),
        ("AdaKVPress:press=KnormPress,press.window_size=8", "unknown setting of KnormPress 'press.window_size'"),
        ("KVzipPress:layerwise=yes", "must be true or false"),
        ("CURPress:leverage_type=both", "is not one of its values"),
        ("CURPress:thing=1", "unknown setting of CURPress 'thing'"),
        ("DMSPress:press=KnormPress", "DMSPress needs 'threshold'"),
        ("DMSPress:press=KnormPress,threshold=1,decoding=true", "acts while tokens are generated"),
        ("PerLayerCompressionPress:press=KnormPress", "needs 'compression_ratios'"),
    ],
)  # fmt: skip
def test_what_a_press_does_not_take_is_refused_at_the_start(fake, typed, what) -> None:
    log = fake()
    with pytest.raises(KvcliError, match=what.replace("[", r"\[")) as error:
        method(f"kvpress:{typed}")
    assert error.value.code == Exit.USAGE
    assert error.value.fix
    assert not log.requests("load")


def test_the_method_declares_what_its_press_is(fake) -> None:
    fake()
    snap, ada, zipped = map(
        method, ("kvpress:SnapKVPress", "kvpress:AdaKVPress:press=KnormPress", "kvpress:KVzipPress")
    )
    assert (snap.name, snap.budget_scope, snap.domain.kind, snap.keeps_last, snap.seeded) == (
        "kvpress:SnapKVPress", "head", "continuous", True, False)  # fmt: skip
    assert (ada.budget_scope, zipped.budget_scope) == ("layer", "model")
    assert method("kvpress:KVzipPress:layerwise=true").budget_scope == "layer"
    assert method("kvpress:DMSPress:press=KnormPress,threshold=1").domain.kind == "none"
    assert snap.settings() == {"last": "kept", "window_size": 64, "kernel_size": 5, "kvpress": VERSION}
    assert hash(snap) == hash(method("kvpress:SnapKVPress"))


@pytest.mark.parametrize(
    ("text", "random"),
    [
        ("RandomPress", True), ("RandomPress:seed=1", False), ("CURPress", False),
        ("CURPress:use_random_leverage=true", True), ("AdaKVPress:press=RandomPress", True), ("KnormPress", False),
    ],
)  # fmt: skip
def test_only_what_chance_decides_is_seeded(fake, text, random) -> None:
    fake()
    assert method(f"kvpress:{text}").seeded is random


# Selections


def test_a_press_that_keeps_the_last_token_is_taken_as_it_is(fake) -> None:
    log = fake("last")
    kept, selection = chosen("kvpress:KnormPress", 20, 6)
    assert kept == [[list(range(14, 20))] * HEADS] * LAYERS
    assert [len(r["ids"]) for r in log.requests("run")] == [20]
    assert set(selection.notes) == {"compression_ratio"}
    assert selection.kept[0].dim() == 1


def test_where_the_last_token_is_missing_one_pair_makes_room_for_it(fake) -> None:
    log = fake()
    kept, selection = chosen("kvpress:KnormPress", 20, 6)
    assert kept == [[[0, 1, 2, 3, 4, 19]] * HEADS] * LAYERS
    assert [int(20 * (1 - r["ratio"])) for r in log.requests("run")] == [6, 5]
    assert selection.notes["last_added"] == LAYERS * HEADS


def test_heads_with_budgets_of_their_own_make_room_on_their_own(fake) -> None:
    fake("head")
    kept, selection = chosen("kvpress:KnormPress", 20, 6)
    assert kept == [[list(range(14, 20)), [0, 1, 2, 3, 4, 19]]] * LAYERS
    assert selection.notes["last_added"] == LAYERS


def test_heads_that_share_a_budget_make_room_together(fake) -> None:
    fake("head")
    kept, _ = chosen("kvpress:AdaKVPress:press=KnormPress", 20, 6)
    assert kept == [[list(range(15, 20)), [0, 1, 2, 3, 4, 19]]] * LAYERS


def test_the_last_token_may_stay_out_of_the_press_as_in_kvpress_s_own_pipeline(fake) -> None:
    log = fake("last")
    kept, _ = chosen("kvpress:KnormPress:last=after", 20, 6)
    assert kept == [[[14, 15, 16, 17, 18, 19]] * HEADS] * LAYERS
    (run,) = log.requests("run")
    assert len(run["ids"]) == 19
    assert int(19 * (1 - run["ratio"])) == 5


def test_left_free_the_last_token_may_go_and_only_the_prefill_can_speak_first(fake) -> None:
    fake()
    kept, selection = chosen("kvpress:KnormPress:last=free", 20, 6)
    assert kept == [[list(range(6))] * HEADS] * LAYERS
    assert "last_added" not in selection.notes
    assert not method("kvpress:KnormPress:last=free").keeps_last
    assert method("kvpress:TOVAPress:last=free").keeps_last


@pytest.mark.parametrize("last", ["kept", "after"])
def test_a_budget_of_one_is_the_last_token(fake, last) -> None:
    fake()
    assert chosen(f"kvpress:KnormPress:last={last}", 20, 1)[0] == [[[19]] * HEADS] * LAYERS


@pytest.mark.parametrize("last", ["kept", "after", "free"])
def test_a_whole_budget_asks_nobody(fake, last) -> None:
    log = fake()
    assert chosen(f"kvpress:KnormPress:last={last}", 20, 20)[0] == [[list(range(20))] * HEADS] * LAYERS
    assert not log.requests("run")


def test_masked_pairs_become_lists_of_their_own_length(fake) -> None:
    fake("ragged")
    kept, selection = chosen("kvpress:AdaKVPress:press=KnormPress", 20, 6)
    assert [[len(head) for head in layer] for layer in kept] == [[5, 7]] * LAYERS
    assert isinstance(selection.kept[0], list)
    assert not selection.flags


def test_a_head_above_its_own_budget_is_flagged_where_budgets_are_not_shared(fake) -> None:
    fake("ragged")
    assert chosen("kvpress:KnormPress", 20, 6)[1].flags == {"over_budget"}
    fake("greedy")
    assert chosen("kvpress:AdaKVPress:press=KnormPress", 20, 6)[1].flags == {"over_budget"}


def test_a_press_with_a_knob_of_its_own_gets_no_ratio(fake) -> None:
    log = fake()
    kept, selection = chosen("kvpress:DMSPress:press=KnormPress,threshold=1.5", 20, 20)
    assert kept == [[[*range(10), 19]] * HEADS] * LAYERS
    (run,) = log.requests("run")
    assert run["ratio"] is None
    assert run["press"] == {"class": "DMSPress", "arguments": {
        "threshold": 1.5, "press": {"class": "KnormPress", "arguments": {}}}}  # fmt: skip
    assert selection.notes == {"last_added": LAYERS * HEADS}


def test_presses_that_read_attention_get_a_prefill_that_has_it(fake) -> None:
    log = fake("last")
    chosen("kvpress:ObservedAttentionPress", 20, 6)
    chosen("kvpress:CriticalKVPress:press=ObservedAttentionPress", 20, 6)
    chosen("kvpress:KnormPress", 20, 6)
    assert [r["attention"] for r in log.requests("run")] == ["eager", "eager", "sdpa"]


def test_the_worker_is_asked_once_per_prompt_and_size(fake) -> None:
    log = fake("last")
    ctx, one = context(20), method("kvpress:KnormPress")
    for size in (6, 6, 7):
        one.select(ctx, Budget.of_size(size, 20, LAYERS, HEADS))
    assert len(log.requests("run")) == 2
    assert len(log.requests("load")) == 1


def test_seeds_and_samples_draw_differently_and_always_the_same(fake) -> None:
    log = fake("last")
    for seed, sample in ((0, "a"), (1, "a"), (0, "b"), (0, "a")):
        chosen("kvpress:RandomPress", 20, 6, seed=seed, sample=sample)
    drawn = [r["seed"] for r in log.requests("run")]
    assert len(set(drawn)) == 3
    assert drawn[0] == drawn[3]


def test_cells_of_other_seeds_do_not_share_what_was_made_for_a_prompt(fake) -> None:
    log = fake("last")
    ctx, one, budget = context(20), method("kvpress:RandomPress"), Budget.of_size(6, 20, LAYERS, HEADS)
    for seed in (0, 1, 0):
        one.select(dataclasses.replace(ctx, seed=seed), budget)
    assert len({r["seed"] for r in log.requests("run")}) == len(log.requests("run")) == 2


def test_a_model_of_another_shape_is_an_error(fake) -> None:
    fake("layers")
    with pytest.raises(client.WorkerFailed, match="1 layers of 2 KV heads, this one 2 of 2"):
        chosen("kvpress:KnormPress", 20, 6)


# The process


def test_no_interpreter_no_kvpress_and_wrong_versions_are_one_line_each(fake, monkeypatch) -> None:
    monkeypatch.delenv(client.VARIABLE, raising=False)
    client.choose(None)
    cases: list[tuple[Any, str]] = [
        (lambda: None, "none is named"),
        (lambda: client.choose("/no/such/python"), "no Python at /no/such/python: No such file"),
        (lambda: client.choose(str(Path(__file__).parent)), "no Python at .*: Permission denied"),
        (lambda: fake("mute"), "does not run the kvpress worker: this is no worker"),
        (lambda: fake("parrot"), "does not run the kvpress worker"),
        (lambda: fake(kvpress=None), "kvpress is not installed in"),
        (lambda: fake(kvpress="0.5.2"), "kvpress 0.5.2 is not supported, 0.5.5 is"),
        (lambda: fake(transformers="5.4.0"), "kvpress 0.5.5 does not run with transformers 5.4.0"),
        (lambda: fake(transformers="4.55.0"), "kvpress 0.5.5 does not run with transformers 4.55.0"),
    ]
    for arrange, what in cases:
        arrange()
        with pytest.raises(KvcliError, match=what) as error:
            method("kvpress:KnormPress")
        assert error.value.code == Exit.USAGE, what
        assert len(error.value.lines()) == 3, what


def test_what_to_do_is_told_by_whether_kvcli_itself_is_there(fake) -> None:
    """Not by where the interpreter's link ends: two environments made with one Python end at the same."""
    for version, advice in ((None, "-m pip install kvpress==0.5.5 transformers==5.2.0 torch=="), ("1.0", "its own: ")):
        fake(kvpress=None, kvcli=version)
        with pytest.raises(KvcliError, match="kvpress is not installed in") as error:
            method("kvpress:KnormPress")
        assert advice in str(error.value.fix)


def test_the_variable_names_the_interpreter_where_no_option_does(fake, monkeypatch) -> None:
    made = fake()
    client.choose(None)
    monkeypatch.setenv(client.VARIABLE, made.path)
    assert client.current().python == made.path
    assert client.current() is client.current()


def test_what_the_worker_says_is_the_row_s_error_and_it_stays(fake) -> None:
    log = fake("fails")
    for _ in range(2):
        with pytest.raises(client.WorkerFailed, match="ValueError: too short"):
            chosen("kvpress:KnormPress", 20, 6)
    assert len({r["pid"] for r in log.requests("run")}) == 1
    assert len(log.requests("load")) == 1


def test_a_worker_that_ends_is_started_again_a_few_times(fake) -> None:
    log = fake("crash")
    for _ in range(client.MOST_STARTS):
        with pytest.raises(client.WorkerFailed, match="the kvpress worker ended: the machine is full"):
            chosen("kvpress:KnormPress", 20, 6)
    with pytest.raises(client.WorkerFailed, match="ended 3 times, the last time with: the machine is full"):
        chosen("kvpress:KnormPress", 20, 6)
    assert len({r["pid"] for r in log.requests("load")}) == client.MOST_STARTS


def test_another_model_is_loaded_in_place_of_the_first(fake) -> None:
    log = fake("last")
    chosen("kvpress:KnormPress", 20, 6)
    client.serve(client.Place("elsewhere", "abc", "bfloat16", "cuda:1", True, 4))
    chosen("kvpress:KnormPress", 20, 6)
    first, second = log.requests("load")
    assert first["model"] == "somewhere"
    assert {k: second[k] for k in ("model", "revision", "dtype", "device", "trust_remote_code", "threads")} == {
        "model": "elsewhere", "revision": "abc", "dtype": "bfloat16", "device": "cuda:1", "trust_remote_code": True,
        "threads": 4,
    }  # fmt: skip


def test_a_model_that_is_nowhere_on_disk_is_saved_when_it_is_asked_for(fake) -> None:
    class Saves:
        def __init__(self) -> None:
            self.folders: list[str] = []

        def save_pretrained(self, folder: str) -> None:
            assert Path(folder).is_dir()
            self.folders.append(folder)

    log, model, tokenizer = fake("last"), Saves(), Saves()
    client.serve(client.saved(model, tokenizer, client.Place("-")))
    method("kvpress:KnormPress")
    assert not model.folders
    chosen("kvpress:KnormPress", 20, 6)
    chosen("kvpress:KnormPress", 20, 7)
    assert model.folders == tokenizer.folders == [log.requests("load")[0]["model"]]
    alive = weakref.ref(model)
    del model
    assert alive() is None


def test_closing_ends_the_process(fake) -> None:
    fake()
    process = client.current()._process
    assert process is not None
    client.close()
    assert process.poll() is not None


# The script

SCRIPT = Path(client.__file__).with_name("worker")


def start_script() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-E", str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def ask(process: subprocess.Popen[bytes], **request: Any) -> dict[str, Any]:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(request).encode() + b"\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())  # type: ignore[no-any-return]


@pytest.mark.parametrize("file", sorted(SCRIPT.glob("*.py")), ids=lambda file: file.name)
def test_the_script_imports_itself_alone_and_nothing_heavy(file) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names = [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    others = [name for name in names if not f"{name}.".startswith("kvcli.kvpress.worker.")]
    assert {name.partition(".")[0] for name in others} <= set(sys.stdlib_module_names)


def test_the_script_answers_where_kvpress_is_missing_and_ends_with_its_stdin() -> None:
    process = start_script()
    try:
        found = ask(process, id=7, do="hello")
        assert found["id"] == 7
        assert found["answer"]["protocol"] == client.PROTOCOL == server.PROTOCOL
        assert set(found["answer"]["versions"]) == {"python", "kvpress", "transformers", "torch", "kvcli"}
        assert ask(process, id=8, do="describe", press="../x")["error"]
        assert ask(process, id=9, do="dance")["error"] == "KeyError: 'dance'"
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()


def test_the_script_ends_when_the_parent_is_killed(tmp_path) -> None:
    parent = tmp_path / "parent.py"
    parent.write_text(
        "import subprocess, sys, time\n"
        f"p = subprocess.Popen([sys.executable, '-E', {str(SCRIPT)!r}], stdin=subprocess.PIPE,\n"
        "                     stdout=subprocess.PIPE)\n"
        'p.stdin.write(b\'{"id": 1, "do": "hello"}\\n\'); p.stdin.flush(); p.stdout.readline()\n'
        "print(p.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, str(parent)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    for _ in range(100):
        if _ended(child):
            break
        time.sleep(0.1)
    assert _ended(child)


def _ended(pid: int) -> bool:
    """Gone, or a zombie that nobody has collected."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def rows(heads: int, n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(heads, n, 8, generator=torch.Generator().manual_seed(n)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_kept_pairs_are_found_again_in_any_order(dtype) -> None:
    keys, values = rows(3, 40, dtype), rows(3, 41, dtype)[:, 1:]
    picked = torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(h))[:17] for h in range(3)])
    at = picked.unsqueeze(-1).expand(-1, -1, 8)
    found = pairs.positions(keys, values, keys.gather(1, at), values.gather(1, at), "layer 0")
    assert [f.tolist() for f in found] == [sorted(p) for p in picked.tolist()]


def test_equal_pairs_are_told_apart_by_order_and_pairs_that_share_a_key_by_their_values() -> None:
    keys, values = rows(1, 6), rows(1, 7)[:, :6]
    keys[0, 4], values[0, 4] = keys[0, 1], values[0, 1]  # the same pair twice
    keys[0, 5] = keys[0, 2]
    for picked, expected in (([4], [1]), ([4, 1], [1, 4]), ([5], [5]), ([2], [2]), ([3, 5], [3, 5])):
        found = pairs.positions(keys, values, keys[:, picked], values[:, picked], "layer 0")
        assert found[0].tolist() == expected


@pytest.mark.parametrize("change", ["keys", "values", "twice", "more", "heads"])
def test_pairs_that_are_not_the_prompt_s_are_refused(change) -> None:
    keys, values = rows(2, 12), rows(2, 13)[:, :12]
    kept_keys, kept_values = keys[:, 3:8].clone(), values[:, 3:8].clone()
    if change == "keys":
        kept_keys[1, 2, 3] += 1e-6
    elif change == "values":
        kept_values[0, 4, 0] += 1e-6
    elif change == "twice":
        kept_keys[:, 1], kept_values[:, 1] = kept_keys[:, 0], kept_values[:, 0]
    elif change == "more":
        kept_keys, kept_values = torch.cat([keys, keys], 1), torch.cat([values, values], 1)
    else:
        kept_keys, kept_values = kept_keys[:1], kept_values[:1]
    with pytest.raises(Refused, match="layer 5"):
        pairs.positions(keys, values, kept_keys, kept_values, "layer 5")


def test_masked_pairs_are_left_out() -> None:
    masked = (torch.zeros(3, dtype=torch.long), torch.tensor([0, 0, 1]), torch.tensor([2, 0, 4]))
    assert [h.tolist() for h in pairs.not_masked(masked, (1, 2, 5, 8))] == [[1, 3, 4], [0, 1, 2, 3]]


def seen(n: int, masked: tuple[int, ...]) -> pairs.Seen:
    """A layer of two heads that wrote n pairs, of which a press masks these positions in the second head."""
    at = torch.tensor(masked)
    module = SimpleNamespace(layer_idx=3, masked_key_indices=(at * 0, at * 0 + 1, at))
    keys, values = rows(2, n)[None], rows(2, n + 1)[None, :, :n].clone()
    return pairs.Seen(module, {}, keys, values, (keys._version, values._version))


def test_what_an_extra_pass_leaves_behind_the_prompt_is_not_kept() -> None:
    one = seen(6, (0, 4))
    twice = [torch.cat([t, t], 2) for t in (one.keys, one.values)]
    for keys, values in ((one.keys, one.values), twice):
        assert [h.tolist() for h in one.kept(keys, values)] == [[0, 1, 2, 3, 4, 5], [1, 2, 3, 5]]


@pytest.mark.parametrize("change", ["fewer", "keys", "values", "beyond"])
def test_a_press_that_masks_must_leave_the_prompt_whole(change) -> None:
    one = seen(6, (0, 7) if change == "beyond" else (0, 4))
    keys, values = (torch.cat([t, t], 2) for t in (one.keys, one.values))
    if change == "fewer":
        keys, values = keys[:, :, :5], values[:, :, :5]
    elif change == "keys":
        keys[0, 1, 2, 3] += 1e-6
    elif change == "values":
        values[0, 1, 2, 3] += 1e-6
    with pytest.raises(Refused, match="layer 3: the press masks, and what it leaves is not"):
        one.kept(keys, values)


# Beside kvpress itself

PEER = os.environ.get(client.VARIABLE, "")
peer = [
    pytest.mark.peer,
    pytest.mark.skipif(not PEER, reason=f"{client.VARIABLE} names no Python of an environment with kvpress"),
]
"""Marks of a test that asks the real worker."""
WEIGHTS = Path(client.__file__).parents[1] / "testbed" / "weights"
DOWNLOADS = {"DuoAttentionPress", "ExpectedAttentionStatsPress", "FastKVzipPress", "KVzapPress", "LUKVPress",
             "QFilterPress"}  # fmt: skip
"""Presses that need parts trained for a model, which the testbed has none of."""
MEASURED = sorted(name for name, press in PRESSES.items() if not press.refused and name not in DOWNLOADS)
ARGUMENTS: dict[str, dict[str, Any]] = {
    "SnapKVPress": {"window_size": 8}, "PyramidKVPress": {"window_size": 8},
    "DMSPress": {"threshold": -1.0, "sliding_window_size": 10},
    "SimLayerKVPress": {"lazy_threshold": 0.01, "n_recent": 20},
    "PerLayerCompressionPress": {"compression_ratios": [0.5, 0.4, 0.3, 0.2]},
}  # fmt: skip
SNAP = {"class": "SnapKVPress", "arguments": {"window_size": 8}}
N = 120


@pytest.fixture(scope="module")
def real() -> Iterator[client.Worker]:
    running = client.Worker(PEER)
    running.load(client.Place(str(WEIGHTS)))
    yield running
    running.close()


def ids_of(n: int, seed: int = 0) -> list[int]:
    return [1, *torch.randint(4, 450, (n - 1,), generator=torch.Generator().manual_seed(seed)).tolist()]


def described(running: client.Worker, name: str) -> dict[str, Any]:
    """A press with arguments that suit the testbed, around SnapKV where it needs a press."""
    arguments = dict(ARGUMENTS.get(name, {}))
    if any(p["kind"] == "press" and p["required"] for p in running.describe(name)):
        arguments["press"] = SNAP if name != "DMSPress" else {"class": "KnormPress", "arguments": {}}
    return {"class": name, "arguments": arguments}


def peer_test(function: Any) -> Any:
    for mark in peer:
        function = mark(function)
    return function


@peer_test
def test_the_table_has_every_press_of_kvpress() -> None:
    script = "import kvpress, json; print(json.dumps([n for n in kvpress.__all__ if n.endswith('Press')]))"
    done = subprocess.run([PEER, "-c", script], capture_output=True, text=True, check=True)
    assert set(json.loads(done.stdout.splitlines()[-1])) == set(PRESSES)


@peer_test
@pytest.mark.parametrize("name", sorted(name for name, press in PRESSES.items() if not press.refused))
def test_no_constructor_takes_a_setting_of_kvcli_s(real, name) -> None:
    found = {p["name"]: p for p in real.describe(name)}
    assert not {"last", "compression_ratio"} & set(found)
    assert PRESSES[name].knob in ("", *found)


@peer_test
@pytest.mark.parametrize("name", MEASURED)
def test_hooks_replayed_on_a_remembered_prefill_keep_what_a_prefill_of_their_own_keeps(real, name) -> None:
    press, facts = described(real, name), PRESSES[name]
    for kept in (90, 31):
        ratio = None if facts.knob else removed_share(N, kept)
        answers = [
            real.kept(press, ids_of(N), ratio, facts.attention, 3, direct=direct) for direct in (False, True, False)
        ]
        assert answers[0] == answers[1] == answers[2]


@peer_test
@pytest.mark.parametrize("name", MEASURED)
def test_a_press_keeps_as_many_as_it_was_asked_for(real, name) -> None:
    facts = PRESSES[name]
    if facts.knob:
        pytest.skip("it has a knob of its own")
    for kept in (12, 40, 59, 60, 100):
        ratio = removed_share(N, kept, facts.counts)
        found = real.kept(described(real, name), ids_of(N), ratio, facts.attention, 0)
        counts = [[len(head) for head in layer] for layer in found]
        if name == "ChunkKVPress":  # whole chunks of 20, one at least
            assert counts == [[max(1, kept // 20) * 20] * 2] * 4
        elif facts.scope == "head":
            assert counts == [[kept, kept]] * 4
        elif facts.scope == "layer":
            assert [sum(layer) for layer in counts] == [2 * kept] * 4
        else:
            assert sum(map(sum, counts)) == 8 * kept


@peer_test
def test_kvcompose_without_structure_gives_heads_of_the_model_budgets_of_their_own(real) -> None:
    press = {"class": "KVComposePress", "arguments": {"structured": False}}
    for kept in (12, 60, 100):
        counts = [[len(h) for h in layer] for layer in real.kept(press, ids_of(N), removed_share(N, kept), "sdpa", 0)]
        assert sum(map(sum, counts)) == 8 * kept
        assert len({count for layer in counts for count in layer}) > 1


@peer_test
@pytest.mark.parametrize(
    ("press", "what"),
    [
        ({"class": "MergingPress", "arguments": {"press": SNAP}}, "are not the prompt's"),
        ({"class": "KeyRerotationPress", "arguments": {"press": SNAP}}, "are not the prompt's"),
    ],
)
def test_a_press_that_rewrites_pairs_is_caught_by_its_result(real, press, what) -> None:
    for direct in (False, True):
        with pytest.raises(client.WorkerFailed, match=what):
            real.kept(press, ids_of(N), 0.5, "sdpa", 0, direct=direct)


@peer_test
def test_a_press_that_writes_into_the_cache_is_caught_and_leaves_nothing_behind(real) -> None:
    before = real.kept(SNAP, ids_of(N), 0.5, "sdpa", 0)
    think = {"class": "ThinKPress", "arguments": {"key_channel_compression_ratio": 0.5}}
    for direct in (False, True):
        with pytest.raises(client.WorkerFailed, match="writes into the prompt's keys or values"):
            real.kept(think, ids_of(N), None, "sdpa", 0, direct=direct)
    assert real.kept(SNAP, ids_of(N), 0.5, "sdpa", 0) == before


@peer_test
def test_one_prompt_or_press_leaves_nothing_for_the_next(real) -> None:
    alone = real.kept(SNAP, ids_of(N, 1), 0.5, "sdpa", 0, direct=True)
    assert real.kept(SNAP, ids_of(N, 1), 0.5, "sdpa", 0) == alone  # from now on it is remembered
    ada = {"class": "AdaKVPress", "arguments": {"press": SNAP}}
    real.kept(ada, ids_of(N, 2), 0.5, "sdpa", 0)
    real.kept({"class": "KVzipPress", "arguments": {}}, ids_of(N, 2), 0.5, "sdpa", 0)
    assert real.kept(SNAP, ids_of(N, 1), 0.5, "sdpa", 0) == alone


@peer_test
def test_random_presses_follow_their_seed(real) -> None:
    press = {"class": "RandomPress", "arguments": {}}
    one, two, again = (real.kept(press, ids_of(N), 0.5, "sdpa", seed) for seed in (5, 6, 5))
    assert one == again != two


ALONE = """
import json, sys, torch
from transformers import AutoModelForCausalLM, DynamicCache
import kvpress
from kvpress import *
job = json.loads(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
ids = torch.tensor([job["ids"]])
found = []
with torch.no_grad():
    dense = DynamicCache()
    model.model(input_ids=ids, past_key_values=dense)
    for text in job["presses"]:
        cache = DynamicCache()
        with eval(text)(model):
            model.model(input_ids=ids, past_key_values=cache)
        one = []
        for layer, pruned, whole in zip(model.model.layers, cache.layers, dense.layers):
            masked = layer.self_attn.masked_key_indices
            heads = []
            for h in range(whole.keys.shape[1]):
                if masked is not None:
                    gone = {int(p) for b, g, p in zip(*masked) if int(g) == h}
                    heads.append([p for p in range(ids.shape[1]) if p not in gone])
                else:
                    heads.append(sorted(
                        int((whole.keys[0, h] - key).abs().sum(-1).argmin()) for key in pruned.keys[0, h]))
            one.append(heads)
            layer.self_attn.masked_key_indices = None
        found.append(one)
print("KEPT" + json.dumps(found))
"""


@peer_test
def test_the_worker_keeps_what_kvpress_keeps_on_its_own(real) -> None:
    """kvpress run as its pipeline runs it, its cache compared with a dense one key by key."""
    ratio = removed_share(N, 37)
    presses = {
        f"SnapKVPress({ratio!r}, window_size=8)": SNAP,
        f"KnormPress({ratio!r})": {"class": "KnormPress", "arguments": {}},
        f"AdaKVPress(SnapKVPress({ratio!r}, window_size=8))": {"class": "AdaKVPress", "arguments": {"press": SNAP}},
        f"ChunkKVPress(SnapKVPress({ratio!r}, window_size=8), chunk_length=10)": {
            "class": "ChunkKVPress", "arguments": {"press": SNAP, "chunk_length": 10}},
        f"KVzipPress({ratio!r})": {"class": "KVzipPress", "arguments": {}},
        f"ExpectedAttentionPress({ratio!r})": {"class": "ExpectedAttentionPress", "arguments": {}},
    }  # fmt: skip
    job = {"model": str(WEIGHTS), "ids": ids_of(N), "presses": list(presses)}
    done = subprocess.run([PEER, "-c", ALONE, json.dumps(job)], capture_output=True, text=True)
    line = next((line for line in done.stdout.splitlines() if line.startswith("KEPT")), "")
    assert line, done.stderr
    for (text, press), alone in zip(presses.items(), json.loads(line[4:]), strict=True):
        assert real.kept(press, ids_of(N), ratio, "sdpa", 0) == alone, text


@peer_test
def test_snapkv_of_kvpress_and_of_kvcli_keep_the_same_pairs_of_the_testbed() -> None:
    from kvcli.attention.capture import Needs
    from kvcli.methods.snapkv import SnapKV
    from kvcli.models import loader
    from kvcli.models.source import parse_model
    from kvcli.models.wrapper import Model

    source = parse_model("testbed")
    config = loader.load_config(source)
    model = Model(loader.load_weights(config, source, "float32", "cpu"), loader.load_tokenizer(source))
    client.choose(PEER)
    client.serve(client.Place(source.place))
    try:
        theirs, ours = method("kvpress:SnapKVPress:window_size=8"), SnapKV(window=8, kernel=5, pool="avg")
        equal = total = 0
        for seed, n in enumerate((40, 90, 200)):
            ids = ids_of(n, seed)
            dense, done = model.prefill_one(ids, Needs.of(ours.needs()), n - 1, chunk=8192)
            ctx = Context(
                n=n, heads=4, kv_heads=2, token_ids=ids, regions=[], keys=dense.keys, values=dense.values,
                column_sums={}, window_queries=dense.window_queries, scaling=done.capture.scaling, sample_id="s",
                seed=0, passes={"kvpress": lambda: client.kept},
            )  # fmt: skip
            for percent in (40, 50, 70, 90):
                budget = Budget.of_ratio(Decimal(percent) / 100, n, 4, 2)
                for mine, other in zip(ours.select(ctx, budget).kept, theirs.select(ctx, budget).kept, strict=True):
                    pairs = zip(head_positions(mine, 2), head_positions(other, 2), strict=True)
                    for a, b in pairs:
                        assert len(a) == len(b)
                        equal, total = equal + len(set(a.tolist()) & set(b.tolist())), total + len(a)
        assert equal >= 0.999 * total  # two versions of transformers round differently: a tie may fall otherwise
    finally:
        client.serve(None)
        client.choose(None)
