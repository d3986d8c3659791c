"""What bench plans, and how it runs its processes; no model is loaded here."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from kvcli.config import SweepConfig
from kvcli.engine import bench, bench_run
from kvcli.engine.bench import Job, Plan, Sizes
from kvcli.engine.caches import storage_of
from kvcli.errors import Exit, KvcliError
from kvcli.methods import catalog
from kvcli.models.source import parse_model


def config(**changes: Any) -> SweepConfig:
    return SweepConfig(**{"model": "testbed", "methods": ("snapkv",), "ratios": ("0.2",), **changes})


def planned(tmp_path: Path, sizes: Sizes | None = None, **changes: Any) -> Plan:
    return bench.plan(config(out=str(tmp_path / "out"), **changes), sizes or Sizes())


def job(method: str = "snapkv", ratio: str | None = "0.3", **changes: Any) -> Job:
    given = {"batches": (1,), "prompt_tokens": 96, "new_tokens": 6, "repeats": 2, **changes}
    return Job(model="tiny", method=method, ratio=ratio, **given)


def test_the_full_cache_is_measured_first_and_once(tmp_path):
    plan = planned(tmp_path, methods=("h2o,full,snapkv",), ratios=("0.4,0.2",))
    assert [(j.method, j.ratio) for j in plan.jobs] == [
        ("full", "1"), ("h2o", "0.2"), ("h2o", "0.4"), ("snapkv", "0.2"), ("snapkv", "0.4"),
    ]  # fmt: skip


def test_all_processes_of_a_plan_differ_in_method_and_ratio_alone(tmp_path):
    plan = planned(tmp_path, Sizes(batch="2,max", repeats=5, seed=3, memory="1G"), methods=("tier1",))
    assert len({dataclasses.replace(j, method="", ratio=None) for j in plan.jobs}) == 1
    assert plan.jobs[0].batches == (2, "max") and plan.jobs[0].memory == 1 << 30


def test_measurements_count_batches_and_rounds(tmp_path):
    assert planned(tmp_path, Sizes(batch="1,4", rounds=3)).measurements == 2 * 2 * 3


@pytest.mark.parametrize(
    "sizes, model, expected",
    [
        (Sizes(), "testbed", (512, 128)),
        (Sizes(), "org/name", (4096, 256)),
        (Sizes(preset="8192/4096"), "testbed", (8192, 4096)),
        (Sizes(preset="4096/4096", new_tokens=7), "org/name", (4096, 7)),
        (Sizes(prompt_tokens=99), "testbed", (99, 128)),
    ],
)
def test_what_is_typed_wins_over_the_preset_and_the_preset_over_the_default(tmp_path, sizes, model, expected):
    first = planned(tmp_path, sizes, model=model).jobs[0]
    assert (first.prompt_tokens, first.new_tokens) == expected


def test_the_default_folder_is_named_after_the_model():
    assert bench.plan(config(), Sizes()).file == Path("runs/bench-testbed/bench.jsonl")


def test_a_method_without_a_ratio_is_measured_once(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from kvcli.methods.base import Domain, Method\n"
        "@dataclass(frozen=True)\n"
        "class Own(Method):\n"
        "    domain = Domain('none')\n"
        "    def select(self, ctx, budget): ...\n"
        "@dataclass(frozen=True)\n"
        "class Other(Method):\n"
        "    kind = 'transform'\n"
        "    def select(self, ctx, budget): ...\n"
    )
    own, other = (f"{tmp_path}/mine.py:{name}" for name in ("Own", "Other"))
    plan = planned(tmp_path, methods=(own,), ratios=("0.1,0.2",))
    assert [(j.method, j.ratio) for j in plan.jobs] == [("full", "1"), (own, None)]
    plan = planned(tmp_path, methods=(f"snapkv,{other}",))
    assert [j.method for j in plan.jobs] == ["full", "snapkv", other] and not plan.left_out


def test_methods_of_all_kinds_are_measured_as_a_sweep_would_decode_them(tmp_path):
    asked = ("kivi,snapkv+kivi:bits=4,quest,h2o+merge,pyramidinfer,kvzip,fastgen",)
    plan = planned(tmp_path, methods=asked, ratios=("0.3",))
    assert [(j.method, j.ratio) for j in plan.jobs[1:]] == [
        ("kivi", None), ("snapkv+kivi:bits=4", "0.3"), ("quest", None), ("h2o+merge", "0.3"), ("pyramidinfer", "0.3"),
        ("kvzip", "0.3"), ("fastgen", None),
    ]  # fmt: skip
    storage = [storage_of(catalog.build(j.method), j.decode) for j in plan.jobs[1:]]
    assert storage == ["stored", "stored", "read", "pairs", "pairs", "pairs", "pairs"]


def test_presses_are_left_out_because_another_process_does_their_work(tmp_path, monkeypatch):
    needs = type(catalog.build("snapkv")).needs
    monkeypatch.setattr(type(catalog.build("snapkv")), "needs", lambda self: needs(self) | {"kvpress"})
    plan = planned(tmp_path, methods=("snapkv,h2o",))
    assert [j.method for j in plan.jobs] == ["full", "h2o"] and list(plan.left_out) == ["snapkv"]
    with pytest.raises(KvcliError, match="process of their own"):
        planned(tmp_path, methods=("snapkv",))


def test_compression_while_generating_is_an_axis(tmp_path):
    plan = planned(tmp_path, methods=("h2o,snapkv,quest",), ratios=("0.3",), decode_ratios=("off", "same", "0.5"))
    assert [(j.label, j.decode) for j in plan.jobs] == [
        ("full", None), ("h2o 0.3", None), ("h2o 0.3, decode ratio 0.3", {"ratio": "0.3", "interval": 1}),
        ("h2o 0.3, decode ratio 0.5", {"ratio": "0.5", "interval": 1}), ("snapkv 0.3", None), ("quest", None),
    ]  # fmt: skip
    assert storage_of(catalog.build("h2o"), plan.jobs[2].decode) == "pool"
    assert plan.decode_words == ["--decode-ratio", "off,same,0.5"]
    assert Job.from_json(plan.jobs[3].to_json()) == plan.jobs[3]
    with pytest.raises(KvcliError, match="none of these methods compresses generated tokens"):
        planned(tmp_path, methods=("kivi",), decode_ratios=("0.5",))


@pytest.mark.parametrize("text, found", [("1", (1,)), ("4,1,4", (4, 1)), ("1, max", (1, "max")), ("max", ("max",))])
def test_batches(text, found):
    assert bench.parse_batches(text) == found


@pytest.mark.parametrize("text", ["0", "-1", "x", "", "1,,2", "1.5", "maximum"])
def test_batches_that_are_none(text):
    with pytest.raises(KvcliError, match="not a batch size"):
        bench.parse_batches(text)


def test_a_job_survives_the_way_to_its_process():
    whole = job(batches=(1, "max"), memory=5, threads=2)
    assert Job.from_json(whole.to_json()) == whole


@pytest.mark.parametrize(
    "model, fix",
    [
        ("testbed", "positions=1101"),
        ("random:FOLDER:layers=2,positions=1100", "FOLDER:layers=2,positions=1101"),
    ],
)
def test_tokens_that_do_not_fit_the_context_are_refused_with_a_way_out(model, fix):
    folder = parse_model("testbed").place
    with pytest.raises(KvcliError, match="1000 prompt \\+ 101 new tokens do not fit the context of 1") as e:
        bench.target(
            dataclasses.replace(job(), model=model.replace("FOLDER", folder), prompt_tokens=1000, new_tokens=101)
        )
    assert fix.replace("FOLDER", folder) in e.value.fix
    words = e.value.fix.partition("--model ")[2]
    done = bench.target(dataclasses.replace(job(), model=words, prompt_tokens=1000, new_tokens=101))
    assert done.config.max_position_embeddings == 1101


def test_a_folder_with_nothing_but_a_config_will_do(tmp_path):
    text = (Path(parse_model("testbed").place) / "config.json").read_text()
    (tmp_path / "config.json").write_text(text)
    on = bench.target(dataclasses.replace(job(), model=f"random:{tmp_path}:layers=2"))
    assert (on.config.num_hidden_layers, on.config.vocab_size) == (2, json.loads(text)["vocab_size"])


class Actor:
    """A child that says what a script tells it to."""

    script: dict[str, list[dict[str, Any]]] = {}
    started: list[str] = []

    def __init__(self, job: Job) -> None:
        self.job = job
        self.started.append(job.label)

    def __enter__(self) -> Actor:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def messages(self, stop: Any) -> Any:
        yield from self.script.get(
            self.job.method, [{"record": {"status": "ok", "batch_asked": b}} for b in self.job.batches]
        )

    def failure(self) -> str:
        return "killed by SIGKILL: probably out of memory"


@pytest.fixture
def actor(monkeypatch: pytest.MonkeyPatch) -> type[Actor]:
    monkeypatch.setattr(bench_run, "Child", Actor)
    monkeypatch.setattr(Actor, "script", {})
    monkeypatch.setattr(Actor, "started", [])
    return Actor


def lines(plan: Plan) -> list[dict[str, Any]]:
    return [json.loads(line) for line in plan.file.read_text().splitlines()]


def test_rounds_go_over_all_methods_before_the_first_comes_again(tmp_path, actor):
    plan = planned(tmp_path, Sizes(rounds=2), methods=("snapkv,h2o",))
    outcome = bench_run.run(plan)
    assert actor.started == ["full", "snapkv 0.2", "h2o 0.2"] * 2
    assert [r["round"] for r in lines(plan)] == [0, 0, 0, 1, 1, 1] and not outcome.failed


def test_the_same_command_adds_lines(tmp_path, actor):
    plan = planned(tmp_path)
    bench_run.run(plan)
    bench_run.run(plan)
    assert [r["method"] for r in lines(plan)] == ["full", "snapkv"] * 2
    assert all(list(r) == list(bench_run.FIELDS) for r in lines(plan))


def test_a_process_that_dies_leaves_a_line_per_missing_batch_and_the_rest_goes_on(tmp_path, actor):
    actor.script["snapkv"] = [{"record": {"status": "ok", "batch_asked": 1}}]
    said: list[str] = []
    plan = planned(tmp_path, Sizes(batch="1,2,max"), methods=("snapkv,h2o",))
    outcome = bench_run.run(plan, warn=said.append)
    found = [(r["method"], r["batch_asked"], r["status"]) for r in lines(plan)]
    assert found[3:6] == [("snapkv", 1, "ok"), ("snapkv", 2, "error"), ("snapkv", "max", "error")]
    assert [status for _, _, status in found[6:]] == ["ok"] * 3
    assert {r["error"] for r in outcome.failed} == {"killed by SIGKILL: probably out of memory"}
    assert said[0] == "snapkv 0.2, batch 2: killed by SIGKILL: probably out of memory"


def test_what_the_first_process_finds_wrong_with_the_command_ends_it(tmp_path, actor):
    problem = {"what": "no CUDA device", "given": "--device cuda", "fix": "--device cpu", "code": 2}
    actor.script["full"] = [{"problem": problem}]
    plan = planned(tmp_path)
    with pytest.raises(KvcliError, match="no CUDA device"):
        bench_run.run(plan)
    assert actor.started == ["full"] and not plan.folder.exists()


def test_what_a_later_process_finds_wrong_is_its_own_error(tmp_path, actor):
    actor.script["snapkv"] = [{"problem": {"what": "keys cannot be moved", "given": "", "fix": "", "code": 2}}]
    outcome = bench_run.run(planned(tmp_path, methods=("snapkv,h2o",)))
    assert [(r["method"], r["error"]) for r in outcome.failed] == [("snapkv", "keys cannot be moved")]


def test_a_process_that_was_killed_is_told_from_one_that_ended():
    with bench_run.Child(job()) as child:
        child._process.kill()
        assert list(child.messages(lambda: None)) == []
        assert child.failure() == "killed by SIGKILL: probably out of memory"
    with bench_run.Child(dataclasses.replace(job(), model="testbed", prompt_tokens=2000)) as child:
        (message,) = child.messages(lambda: None)
        assert "do not fit the context of 1024" in message["problem"]["what"]
        assert message["problem"]["code"] == Exit.USAGE


def test_a_stop_ends_the_command_between_and_within_processes(tmp_path, actor):
    plan = planned(tmp_path, methods=("snapkv,h2o",))
    answers = iter([None, None, Exit.STOPPED_EARLY])
    outcome = bench_run.run(plan, stop=lambda: next(answers, Exit.STOPPED_EARLY))
    assert outcome.stopped is Exit.STOPPED_EARLY
    assert actor.started == ["full"] and [r["method"] for r in outcome.records] == ["full"]
