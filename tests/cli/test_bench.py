"""kvcli bench as a user types it: real processes at tiny sizes, its tables, bad input, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from kvcli.analysis.tables.bench import tables
from kvcli.cli import output
from kvcli.cli.bench_tables import BenchView
from kvcli.engine.bench_run import FIELDS
from tests.cli.sweeping import TINY, Done, Started, call, model_folder, one_error, typed
from tests.docs.pages import codes, rows, section, text

DIES = '''
import os
from dataclasses import dataclass

from kvcli.methods.base import Method


@dataclass(frozen=True)
class Dies(Method):
    """Ends its process after a last word."""

    def select(self, ctx, budget):
        os.write(2, b"something is wrong here\\n")
        os._exit(9)
'''
SMALL = ("--prompt-tokens", "64", "--new-tokens", "4", "--repeats", "2")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, list[dict[str, Any]]]:
    """Two batch sizes of `full`, a method, and a method whose process dies; what was printed and written."""
    top = tmp_path_factory.mktemp("bench")
    (top / "dies.py").write_text(DIES)
    model = f"random:{model_folder(top / 'tiny')}:{TINY}"
    methods = f"snapkv:window=8,{top}/dies.py:Dies"
    done = call(
        "bench", "--model", model, "-M", methods, "-r", "0.3", *SMALL, "-b", "1,2", "--out", top / "out", "--json"
    )
    return done, [json.loads(line) for line in (top / "out" / "bench.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_each_method_ratio_and_batch_has_a_line(measured):
    done, records = measured
    assert done.code == 3, done.err
    found = [(r["method"].rpartition(":")[2], r["batch_asked"], r["status"]) for r in records]
    assert found == [
        ("full", 1, "ok"), ("full", 2, "ok"), ("window=8", 1, "ok"), ("window=8", 2, "ok"), ("Dies", 1, "error"),
        ("Dies", 2, "error"),
    ]  # fmt: skip


@pytest.mark.slow
def test_a_process_that_dies_is_named_with_its_last_line(measured):
    done, records = measured
    assert {r["error"] for r in records[4:]} == {"something is wrong here"}
    assert "warning: " in done.err and "Dies 0.3, batch 1: something is wrong here" in done.err
    assert "Traceback" not in done.err


@pytest.mark.slow
def test_lines_have_the_fields_of_the_page_and_say_whose_times_they_are(measured):
    _, records = measured
    table = rows(section(text("docs/bench.md"), "bench.jsonl"))[1:]
    assert [codes(row[0])[0] for row in table] == list(FIELDS)
    for record in records:
        assert list(record) == list(FIELDS)
        assert (record["kind"], record["shared"], record["first_token"]) == ("bench", False, "prefill")
    good = records[:4]
    assert all(value is not None for r in good for key, value in r.items() if key not in ("error", "decode"))
    assert [(r["method_kind"], r["storage"], r["buffer_bytes"]) for r in good] == [("evict", "pairs", 0)] * 4
    assert {(r["prompt_tokens"], r["new_tokens"], r["dtype"], r["device"], r["threads"]) for r in good} == {
        (64, 4, "float32", "cpu", 1)
    }


@pytest.mark.slow
def test_the_figures_of_a_line_are_those_of_its_batch(measured):
    _, (one, two, *_) = measured
    _, records = measured
    token = 2 * 1 * (16 + 16) * 2  # layers, KV heads, key and value, 16 bit
    assert one["kv_bytes"] == {"full": 64 * token, "kept": 64 * token, "end": 68 * token, "read": None}
    assert one["alloc_bytes"] == two["alloc_bytes"] == (64 + 4) * token * 2  # float32, with room
    assert records[2]["kv_bytes"]["kept"] == 19 * token and records[2]["measured_ratio"] == pytest.approx(19 / 64)
    for record in records[:4]:
        seconds = record["seconds"]
        assert all(len(f["all"]) == 2 and 0 < f["min"] <= f["median"] <= f["max"] for f in seconds.values())
        assert record["tokens_per_second"]["median"] > 0
    assert (one["batch"], two["batch"]) == (1, 2)


@pytest.mark.slow
def test_json_is_one_document_with_every_method_against_full(measured):
    done, _ = measured
    document = json.loads(done.out)
    assert Path(document["out"]).name == "bench.jsonl"
    assert [t["batch_asked"] for t in document["tables"]] == [1, 2]
    full, snapkv = document["tables"][0]["lines"]
    assert full["against"]["tokens_per_second"] == full["against"]["kv_bytes"] == 1
    assert snapkv["against"]["kv_bytes"] == pytest.approx(19 / 64)
    assert snapkv["against"]["tokens_per_second"] == pytest.approx(
        snapkv["tokens_per_second"]["median"] / full["tokens_per_second"]["median"]
    )
    assert [f[2] for f in document["tables"][1]["failed"]] == ["something is wrong here"]


@pytest.mark.slow
def test_it_ends_with_the_command_that_measures_what_the_savings_cost(measured):
    done, _ = measured
    last = done.err.splitlines()[-1]
    assert last.startswith("next: kvcli sweep --model ") and "--ratio 0.3" in last


def child_of(process: int) -> int:
    """The one process it started."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                words = status.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(words[1]) == process:
                return int(status.parent.name)
        time.sleep(0.01)
    raise AssertionError("it started no process")


def is_gone(process: int, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize(
    "number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_a_command_that_is_stopped_takes_its_process_with_it(tmp_path, number: int, code: int):
    with Started("bench", *SMALL, "-M", "snapkv", folder=tmp_path / "out") as started:
        started.wait_for_text("starting")
        child = child_of(started.process.pid)
        os.kill(started.process.pid, number)
        done = started.end()
        assert done.code == code and "Traceback" not in done.err
        assert is_gone(child)
    assert not (tmp_path / "out").exists()


BAD: dict[str, tuple[str, ...]] = {
    "--method snapvk": ("unknown method 'snapvk'", "snapkv"),
    "--ratio 1.5": ("ratio 1.5 is out of range",),
    "--model testbet": ("unknown model 'testbet'", "testbed"),
    "--preset 4096": ("unknown preset '4096'", "4096/4096 or 8192/4096"),
    "--prompt-tokens 15": ("--prompt-tokens must be at least 16", "--prompt-tokens 15"),
    "--new-tokens 1": ("--new-tokens must be at least 2", "--new-tokens 1"),
    "--prompt-tokens x": ("'--prompt-tokens'", "valid integer"),
    "--batch 0": ("'0' is not a batch size", "--batch 1,4 or --batch max"),
    "--batch 1,many": ("'many' is not a batch size",),
    "--repeats 0": ("--repeats must be at least 1",),
    "--rounds 0": ("--rounds must be at least 1",),
    "--seed -1": ("--seed must be at least 0",),
    "--threads 0": ("--threads must be at least 1",),
    "--dtype int8": ("--dtype int8", "float32"),
    "--attn magic": ("--attn magic",),
    "--batch max --memory lots": ("--memory lots", "8G"),
    "--memory 1G": ("--memory limits the largest batch", "--batch max"),
    "--out file": ("file is not a folder", "--out file"),
    "--task gsm8k": ("no such option", "--task"),
    "--method snapkv --decode-ratio 0.5": ("none of these methods compresses generated tokens", "h2o"),
    "--method h2o --decode-ratio 0.5 --cap fixed": ("exclude each other", "keep one of them"),
    "--method h2o --decode-budget x": ("'x' is not a list of whole numbers",),
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_clear_message(kvcli, tmp_path, monkeypatch, words: str):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    one_error(kvcli("bench", *typed(words)), *BAD[words])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_tokens_that_do_not_fit_are_refused_before_anything_is_written(kvcli, tmp_path):
    done = kvcli("bench", "--new-tokens", "600", "--method", "snapkv", "--out", tmp_path / "out")
    one_error(done, "512 prompt + 600 new tokens do not fit the context of 1024", "positions=1112")
    assert not (tmp_path / "out").exists()


def test_variables_are_heard(kvcli, monkeypatch):
    monkeypatch.setenv("KVCLI_MODEL", "testbet")
    one_error(kvcli("bench"), "unknown model 'testbet'")


def test_a_dry_run_says_what_would_run_and_writes_nothing(kvcli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("bench", "--method", "snapkv,h2o", "--ratio", "0.1,0.2", "--batch", "1,max", "--rounds", "2", "--dry-run")
    done = kvcli(*words)
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines() == [
        "10 processes: full, snapkv 0.1, snapkv 0.2, h2o 0.1, h2o 0.2",
        "testbed (float32 on cpu), 512 prompt + 128 new tokens, batch 1, max",
        "20 measurements of 3 repeats after a warm-up",
        "a full cache takes 1.25 MiB per row at its end",
        "results: runs/bench-testbed/bench.jsonl",
    ]
    document = json.loads(kvcli(*words, "--json").out)
    assert (document["processes"], document["measurements"]) == (10, 20)
    assert document["full_cache_bytes"] == 640 * 4 * 2 * 64 * 4
    assert not list(tmp_path.iterdir())


def test_a_dry_run_names_methods_of_every_kind_and_how_they_compress_while_generating(kvcli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("bench", "--method", "h2o,kivi,quest,snapkv+kivi:bits=4", "--ratio", "0.3", "--decode-ratio", "off,0.5")
    done = kvcli(*words, "--dry-run")
    assert done.code == 0, done.err
    assert (
        done.out.splitlines()[0] == "6 processes: full, h2o 0.3, h2o 0.3 (r_d 0.5), kivi, quest, snapkv+kivi:bits=4 0.3"
    )
    cells = json.loads(kvcli(*words, "--dry-run", "--json").out)["cells"]
    assert cells[2] == {"method": "h2o", "ratio": "0.3", "decode": {"ratio": "0.5", "interval": 1}}


def figure(*values: float) -> dict[str, Any]:
    return {"median": sorted(values)[len(values) // 2], "min": min(values), "max": max(values), "all": list(values)}


def record(method: str, ratio: float | None, step: float, kept: float, **changes: Any) -> dict[str, Any]:
    """A line whose decode steps take about `step` seconds and whose cache holds the share `kept`."""
    batch = changes.get("batch", 1)
    seconds = {
        "prefill": 0.5, "select": 0.01, "build": 0.002, "compress": 0.012, "first_step": step, "decode": 255 * step,
        "first_token": 0.512 + step, "per_token_p90": 1.2 * step, "total": 0.512 + 255 * step,
    }  # fmt: skip
    return {
        **dict.fromkeys(FIELDS), "status": "ok", "model": "llama3-8b", "method": method, "ratio": ratio, "flags": [],
        "batch": batch, "batch_asked": batch, "prompt_tokens": 4096, "new_tokens": 256, "repeats": 3, "round": 0,
        "seed": 0, "dtype": "bfloat16", "device": "cuda", "device_name": "NVIDIA A40", "threads": 8, "attn": "auto",
        "seconds": {**{k: figure(v) for k, v in seconds.items()}, "per_token": figure(0.97 * step, step, 1.03 * step)},
        "tokens_per_second": figure(*(batch / (step * f) for f in (0.97, 1, 1.03))), "cpu_share": 1.0,
        "memory": {"source": "cuda: max_memory_allocated", "idle": 15 << 30, "prefill": 17 << 30, "compress": 17 << 30,
                   "decode": int((15 + kept * batch / 2) * 2**30), "limit": None},
        "kv_bytes": {"full": 512 << 20, "kept": int(kept * (512 << 20))},
        "alloc_bytes": int((kept + 1 / 16) * (512 << 20)), **changes,
    }  # fmt: skip


def records() -> list[dict[str, Any]]:
    largest = {"batch_asked": "max"}
    return [
        record("full", 1.0, 0.030, 1.0),
        record("snapkv", 0.2, 0.024, 0.2),
        record("shotkv", 0.1, 0.0295, 0.13, flags=["over_budget"]),
        {**record("h2o", 0.2, 0.02, 0.2), "status": "error", "error": "out of memory with a batch of 1"},
        record("full", 1.0, 0.060, 1.0, batch=40, **largest),
        record("snapkv", 0.2, 0.070, 0.2, batch=180, **largest),
    ]


GOLDEN = {
    80: """\
llama3-8b  4,096 prompt + 256 new tokens
bfloat16 on cuda: NVIDIA A40

batch 1
                                       first     per          tokens       vs
method    ratio   prefill   compress   token   token    p90    per s     full
─────────────────────────────────────────────────────────────────────────────
full          1       500       12.0     542    30.0   36.0     33.3        -
snapkv      0.2       500       12.0     536    24.0   28.8     41.7    1.25x
shotkv!     0.1       500       12.0     542    29.5   35.4     33.9   ~1.02x

                    KV      of             peak     peak      vs
method    ratio   kept    full   held   prefill   decode    full
────────────────────────────────────────────────────────────────
full          1    512   100 %    544     2,048      512       -
snapkv      0.2    102    20 %    134     2,048      102   0.20x
shotkv!     0.1   66.6    13 %   98.6     2,048     66.6   0.13x
failed: h2o 0.2: out of memory with a batch of 1

largest batch that fits
                                              first     per   tokens      vs
method   ratio   batch   prefill   compress   token   token    per s    full
────────────────────────────────────────────────────────────────────────────
full         1      40       500       12.0     572    60.0      667       -
snapkv     0.2     180       500       12.0     582    70.0    2,571   3.86x

                           KV      of             peak     peak   rows vs
method   ratio   batch   kept    full   held   prefill   decode      full
─────────────────────────────────────────────────────────────────────────
full         1      40    512   100 %    544     2,048   20,480         -
snapkv     0.2     180    102    20 %    134     2,048   18,432     4.50x

times in ms, median of 3 repeats
first token: prefill, compression and first decode step
per token: median step of a repeat; p90: 90 % of a repeat's steps take no longer
vs full: tokens per second, then peak while decoding
memory in MiB; kept (16-bit), held: per row; peaks: whole batch, above the model
(cuda: max_memory_allocated)
~  its repeats and those of full overlap: no difference was measured
!  shotkv 0.1 over_budget
""",
    120: """\
llama3-8b  4,096 prompt + 256 new tokens
bfloat16 on cuda: NVIDIA A40

batch 1
                                       first     per                       tokens       vs
method    ratio   prefill   compress   token   token     min..max    p90    per s     full
──────────────────────────────────────────────────────────────────────────────────────────
full          1       500       12.0     542    30.0   29.1..30.9   36.0     33.3        -
snapkv      0.2       500       12.0     536    24.0   23.3..24.7   28.8     41.7    1.25x
shotkv!     0.1       500       12.0     542    29.5   28.6..30.4   35.4     33.9   ~1.02x

                    KV      of             peak     peak      vs
method    ratio   kept    full   held   prefill   decode    full
────────────────────────────────────────────────────────────────
full          1    512   100 %    544     2,048      512       -
snapkv      0.2    102    20 %    134     2,048      102   0.20x
shotkv!     0.1   66.6    13 %   98.6     2,048     66.6   0.13x
failed: h2o 0.2: out of memory with a batch of 1

largest batch that fits
                                              first     per                       tokens      vs
method   ratio   batch   prefill   compress   token   token     min..max    p90    per s    full
────────────────────────────────────────────────────────────────────────────────────────────────
full         1      40       500       12.0     572    60.0   58.2..61.8   72.0      667       -
snapkv     0.2     180       500       12.0     582    70.0   67.9..72.1   84.0    2,571   3.86x

                           KV      of             peak     peak   rows vs
method   ratio   batch   kept    full   held   prefill   decode      full
─────────────────────────────────────────────────────────────────────────
full         1      40    512   100 %    544     2,048   20,480         -
snapkv     0.2     180    102    20 %    134     2,048   18,432     4.50x

times in ms, median of 3 repeats
first token: prefill, compression and first decode step
per token: median step of a repeat; min..max of the repeats; p90: 90 % of a repeat's steps take no longer
vs full: tokens per second, then peak while decoding
memory in MiB; kept (16-bit), held: per row; peaks: whole batch, above the model (cuda: max_memory_allocated)
~  its repeats and those of full overlap: no difference was measured
!  shotkv 0.1 over_budget
""",
}
"""Tables of records() by width."""


def kinds() -> list[dict[str, Any]]:
    """A stored form, a composition, a reader and an evictor that goes on while generating."""
    mebi = 1 << 20
    sizes = {"full": 512 * mebi, "kept": 512 * mebi, "end": 544 * mebi, "read": None}
    stored = {"storage": "stored", "method_kind": "transform", "buffer_bytes": 17 * mebi}
    return [
        {**record("full", 1.0, 0.030, 1.0), "kv_bytes": sizes},
        record("kivi", None, 0.050, 0.24, **stored, kv_bytes={**sizes, "kept": 120 * mebi, "end": 140 * mebi}),
        record("snapkv+kivi:bits=4", 0.3, 0.04, 0.1, **stored, kv_bytes={**sizes, "kept": 49 * mebi, "end": 60 * mebi}),
        record("quest", None, 0.035, 1.0, storage="read", flags=["simulated"], kv_bytes={**sizes, "read": 130 * mebi}),
        record("h2o", 0.3, 0.026, 0.3, kv_bytes={**sizes, "kept": 154 * mebi, "end": 186 * mebi}),
        record("h2o", 0.3, 0.028, 0.3, storage="pool", decode={"cap": "fixed", "interval": 1},
               kv_bytes={**sizes, "kept": 154 * mebi, "end": 154 * mebi}),
    ]  # fmt: skip


def shown(found: list[dict[str, Any]], width: int, monkeypatch: Any, capsys: Any) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(width))
    output.result(BenchView({**found[0], "memory_source": "cuda: max_memory_allocated"}, tables(found)))
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("width", [80, 100, 120])
def test_every_kind_of_method_has_its_line_and_what_its_figures_do_not_say_is_said(width, monkeypatch, capsys):
    lines = shown(kinds(), width, monkeypatch, capsys)
    assert max(map(len, lines)) <= width and not any("…" in line for line in lines)
    (quest,) = [x for x in lines if x.startswith("quest!") and " 100 % " in x]
    assert quest.split()[:5] == ["quest!", "512", "100", "%", "544"]
    kivi = [x.split() for x in lines if x.startswith("kivi* ")]
    assert kivi[1][:5] == ["kivi*", "120", "23.4", "%", "140"]
    (fixed,) = [x for x in lines if x.startswith("h2o fixed") and "30.1 %" in x]
    assert "154" in fixed and " 0.3 " in fixed
    said = " ".join(" ".join(lines).split())
    assert "held counts one layer written out for attention (17.0 MiB per row)" in said
    assert "!  quest simulated".replace("  ", " ") in said
    assert "simulated: all pairs stay in memory" in said and "no fused kernel" in said
    assert "KV end: prompt and answer at the last token" in said


@pytest.mark.parametrize("width", [80, 100])
def test_the_largest_batch_of_every_kind_fits_the_width_too(width, monkeypatch, capsys):
    lines = shown([{**r, "batch_asked": "max", "batch": 40} for r in kinds()], width, monkeypatch, capsys)
    assert max(map(len, lines)) <= width and not any("…" in line for line in lines)
    assert sum(line.startswith("kivi*") for line in lines) == 2


def test_cells_that_differ_while_generating_are_lines_of_their_own():
    (table,) = tables([*kinds(), {**kinds()[-1], "status": "error", "error": "out of memory", "round": 1}])
    assert [(line.method, line.asked) for line in table.lines[-2:]] == [("h2o", "0.3"), ("h2o", "0.3 (fixed cap)")]
    assert table.failed == [("h2o", 0.3, "fixed cap: out of memory")]
    assert table.lines[1].against["kv_bytes"] == pytest.approx(120 / 512)


def drawn(width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(width))
    header = {**records()[0], "memory_source": "cuda: max_memory_allocated"}
    output.result(BenchView(header, tables(records())))
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("width", [80, 120])
def test_the_tables(width, monkeypatch, capsys):
    lines = drawn(width, monkeypatch, capsys)
    assert max(map(len, lines)) <= width
    assert lines == GOLDEN[width].splitlines()


def test_a_difference_within_the_spread_of_the_repeats_is_marked(monkeypatch, capsys):
    lines = drawn(80, monkeypatch, capsys)
    (snapkv,) = [x for x in lines if x.startswith("snapkv ") and x.endswith("1.25x")]
    (shotkv,) = [x for x in lines if x.startswith("shotkv! ") and x.endswith("1.02x")]
    assert " 1.25x" in snapkv and " ~1.02x" in shotkv


def test_rounds_are_taken_together():
    first, second = records()[0], record("full", 1.0, 0.040, 1.0, round=1)
    (table,) = tables([first, second])
    (line,) = table.lines
    assert line.repeats == 6
    assert line.seconds["per_token"].low == pytest.approx(0.97 * 0.03)
    assert line.seconds["per_token"].high == pytest.approx(1.03 * 0.04)


def test_measurements_on_a_busy_machine_say_so(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    busy = [record("full", 1.0, 0.03, 1.0, device="cpu", cpu_share=0.99),
            record("snapkv", 0.2, 0.04, 0.2, device="cpu", cpu_share=0.6)]  # fmt: skip
    header = {**busy[0], "memory_source": "rss: VmHWM"}
    output.result(BenchView(header, tables(busy)))
    said = " ".join(capsys.readouterr().out.split())
    assert "busy machine: other work took CPU time from snapkv 0.2; these times say little" in said


def test_memory_that_cannot_be_read_is_a_dash(monkeypatch, capsys):
    none = {"source": "none", "idle": None, "prefill": None, "compress": None, "decode": None, "limit": None}
    found = [{**r, "memory": none} for r in records()[:2]]
    output.result(BenchView({**found[0], "memory_source": "none"}, tables(found)))
    (snapkv,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("snapkv") and "102" in x]
    assert snapkv.split()[-3:] == ["-", "-", "-"]
