"""Stopped, killed and damaged sweeps: the same command goes on and ends with the records of an undisturbed run."""

from __future__ import annotations

import itertools
import json
import random
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from kvcli.engine.stop import StopRequest
from kvcli.models import loader
from tests.cli import sweeping
from tests.cli.sweeping import (
    TINY,
    Done,
    Started,
    comparable,
    contents,
    lines_written,
    model_folder,
    one_error,
    prompts,
    records,
    typed,
)

GRID = typed(
    "sweep --model testbed --task tb_longgen,tb_recall --method random,snapkv,shotkv --ratio 0.1,0.3 --limit 12"
    " --prefill-batch 4 --decode-batch 2"
)
"""168 records in some thirty decode batches: a few seconds, so that there is a middle to be stopped in."""
TOTAL = 168

SMALL = typed(
    "sweep --model testbed --task tb_recall --method snapkv,shotkv --ratio 0.1 --limit 6"
    " --prefill-batch 4 --decode-batch 2"
)
"""18 records in several decode batches."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GRID without any interruption."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = sweeping.call(*GRID, "--out", folder)
    assert done.code == 0, done.err
    assert lines_written(folder) == TOTAL
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "run"
    done = sweeping.call(*SMALL, "--out", folder)
    assert done.code == 0, done.err
    return folder


@pytest.fixture
def copy(small: Path, tmp_path: Path) -> Path:
    """A copy of SMALL's folder to be damaged."""
    return Path(shutil.copytree(small, tmp_path / "run"))


def assert_same(folder: Path, reference: Path) -> None:
    """The same records byte for byte apart from `seconds`, prompts and kept maps; status done."""
    assert comparable(folder) == comparable(reference)
    assert prompts(folder) == prompts(reference)
    kept, wanted = contents(folder / "kept"), contents(reference / "kept")
    assert {name: data for name, data in kept.items() if name.endswith(".npz")} == wanted
    assert json.loads((folder / "run.json").read_text())["status"] == "done"


# --- stopped from outside ---------------------------------------------------------------------------------------------


def test_killed_twice_and_nothing_is_lost(kvcli, whole, tmp_path):
    """kill -9 by process id, in the middle, twice; then the same command."""
    folder = tmp_path / "run"
    reached = 0
    for more in (10, 50):
        with Started(*GRID, folder=folder) as sweep:
            sweep.wait_for_lines(reached + more)
            sweep.process.kill()
            assert sweep.end().code == -signal.SIGKILL
        assert reached < lines_written(folder) < TOTAL, "killed in the middle"
        reached = lines_written(folder)
    done = kvcli(*GRID, "--out", folder)
    assert done.code == 0, done.err
    assert_same(folder, whole)


def test_sigterm_and_a_second_process(kvcli, whole, tmp_path):
    """A second process is refused while the first works; SIGTERM ends that with 75 and the command to type."""
    folder = tmp_path / "run"
    with Started(*GRID, folder=folder) as sweep:
        sweep.wait_for_lines(10)
        sweep.process.send_signal(signal.SIGSTOP)
        one_error(kvcli(*GRID, "--out", folder), str(folder), f"process {sweep.process.pid}")
        one_error(kvcli(*GRID, "--method", "h2o", "--out", folder), f"process {sweep.process.pid}")
        sweep.process.send_signal(signal.SIGCONT)
        sweep.process.terminate()
        done = sweep.end()
    assert done.code == 75
    assert done.out == ""
    assert "SIGTERM" in done.err and "Traceback" not in done.err
    assert 10 <= lines_written(folder) < TOTAL
    assert json.loads((folder / "run.json").read_text())["status"] == "stopped"
    hint = done.err.splitlines()[-1]
    assert hint.startswith("next: kvcli sweep ")
    again = kvcli(*shlex.split(hint.removeprefix("next: kvcli ").split("     ")[0]))
    assert again.code == 0, again.err
    assert_same(folder, whole)


def test_sigterm_while_starting_up(tmp_path):
    """SLURM's preemption may come at any time; only 75 is run again."""
    with Started(*GRID, folder=tmp_path / "run") as sweep:
        sweep.wait_for_text("results:")
        sweep.process.terminate()
        assert sweep.end().code == 75


def test_ctrl_c(kvcli, whole, tmp_path):
    folder = tmp_path / "run"
    with Started(*GRID, folder=folder) as sweep:
        sweep.wait_for_lines(10)
        sweep.process.send_signal(signal.SIGINT)
        done = sweep.end()
    assert done.code == 130
    assert done.out == "" and "Traceback" not in done.err
    assert done.err.splitlines()[-1].startswith("next: kvcli sweep ")
    assert lines_written(folder) < TOTAL
    assert kvcli(*GRID, "--out", folder).code == 0
    assert_same(folder, whole)


def test_max_time(kvcli, whole, tmp_path, monkeypatch):
    """On a clock that ticks once per question: every turn gets further, until it is done."""
    ticks = itertools.count()
    monkeypatch.setattr(StopRequest.__init__, "__defaults__", (None, lambda: float(next(ticks)), lambda text: None))
    folder, turns = tmp_path / "run", []
    while not turns or turns[-1][0] != 0:
        done = kvcli(*GRID, "--max-time", "9", "--out", folder)
        turns.append((done.code, lines_written(folder)))
        assert len(turns) < 20, turns
        if done.code:
            assert done.out == "" and "--max-time" in done.err
            assert done.err.splitlines()[-1].startswith("next: ")
            assert json.loads((folder / "run.json").read_text())["status"] == "stopped"
    codes, counts = zip(*turns, strict=True)
    assert set(codes[:-1]) == {75} and len(turns) > 2
    assert list(counts) == sorted(set(counts)) and counts[-1] == TOTAL
    assert_same(folder, whole)


def test_a_limit_shorter_than_the_start_up_still_gets_somewhere(kvcli, tmp_path):
    command = (*SMALL, "--decode-batch", "1", "--max-time", "0.000001", "--out", tmp_path / "run")
    done = kvcli(*command)
    first = lines_written(tmp_path / "run")
    assert done.code == 75
    assert first > 0
    assert kvcli(*command).code in (0, 75)
    assert lines_written(tmp_path / "run") > first


# --- cut and damaged files --------------------------------------------------------------------------------------------


def test_cut_off_anywhere(kvcli, small, tmp_path):
    """What kill -9 or a power cut may leave: any number of whole lines and a piece of the next."""
    data = (small / "samples.jsonl").read_bytes()
    draw = random.Random(7)
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    anywhere = [draw.randrange(len(data)) for _ in range(2)]
    for cut in (0, 1, ends[0], ends[0] - 1, ends[6] + 3, *anywhere, len(data) - 1):
        folder = Path(shutil.copytree(small, tmp_path / f"cut{cut}"))
        (folder / "samples.jsonl").write_bytes(data[:cut])
        done = kvcli(*SMALL, "--out", folder)
        assert done.code == 0, done.err
        assert_same(folder, small)
        assert ("cut short" in done.err) == (cut not in (0, *ends)), (cut, done.err)


def test_a_torn_last_line(kvcli, small, copy):
    path = copy / "samples.jsonl"
    data = path.read_bytes()
    path.write_bytes(data[:-30])
    done = kvcli(*SMALL, "--out", copy)
    assert done.code == 0
    assert f"warning: {path}: the last line was cut short" in done.err
    assert_same(copy, small)
    assert (copy / "samples.jsonl.torn").read_bytes().rstrip() == data[:-30].splitlines()[-1], "nothing is thrown away"
    again = kvcli(*SMALL, "--out", copy)
    assert "cut short" not in again.err
    assert again.out == done.out


def test_a_torn_line_of_prompts(kvcli, small, copy):
    path = copy / "prompts.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    samples = copy / "samples.jsonl"
    samples.write_bytes(b"".join(samples.read_bytes().splitlines(keepends=True)[:-2]))
    done = kvcli(*SMALL, "--out", copy)
    assert done.code == 0
    assert "prompts.jsonl" in done.err and "cut short" in done.err
    assert_same(copy, small)


@pytest.mark.parametrize("damage", [b"garbage\n", b'{"half": \n', b"[1, 2]\n", b'{"schema": 1}\n'])
def test_a_broken_line_in_the_middle(kvcli, copy, damage: bytes):
    path = copy / "samples.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], damage, *lines[3:]]))
    before = contents(copy)
    one_error(kvcli(*SMALL, "--out", copy), f"{path}:3", f"kvcli check {copy} --fix")
    assert contents(copy) == before


def test_the_advice_for_a_broken_line_works(kvcli, small, copy):
    path = copy / "samples.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], lines[2][:50] + b"\n", *lines[3:]]))
    assert kvcli(*SMALL, "--out", copy).code == 2
    assert kvcli("check", copy, "--fix").code == 0
    assert kvcli(*SMALL, "--out", copy).code == 0
    assert_same(copy, small)


@pytest.mark.parametrize("damage", ["{", "[]", '{"schema": 99}'])
def test_a_broken_or_newer_run_json(kvcli, copy, damage: str):
    (copy / "run.json").write_text(damage)
    before = contents(copy)
    one_error(kvcli(*SMALL, "--out", copy), str(copy / "run.json"))
    assert contents(copy) == before


# --- another model, data, setting -------------------------------------------------------------------------------------

OTHERS = {
    "dtype": ("--dtype", "float64"),
    "template": ("--template", "raw"),
    "system": ("--system", "note"),
    "truncate": ("--truncate", "left"),
    "max_new_tokens": ("--max-new-tokens", "5"),
    "ignore_eos": ("--ignore-eos",),
    "strict_window": ("--strict-window",),
}


@pytest.mark.parametrize("field, other", OTHERS.items(), ids=OTHERS)
def test_another_setting_is_refused_by_name(kvcli, copy, field: str, other: tuple[str, ...]):
    before = contents(copy)
    one_error(kvcli(*SMALL, *other, "--out", copy), str(copy), field, "--out")
    one_error(kvcli(*SMALL, *other, "--dry-run", "--out", copy), field)
    assert contents(copy) == before


def test_another_model_or_tokenizer_is_refused_by_name(kvcli, tmp_path):
    tiny, folder = model_folder(tmp_path / "tiny"), tmp_path / "run"

    def sweep(model: str, *more: object) -> Done:
        grid = ("--task", "tb_recall", "--method", "snapkv", "--ratio", "0.3", "--limit", "2", "--out", folder)
        return kvcli("sweep", "--model", model, *grid, *more)

    assert sweep(f"random:{tiny}:{TINY},seed=0").code == 0
    before = contents(folder)
    one_error(sweep(f"random:{tiny}:{TINY},seed=1"), "revision")
    one_error(sweep(f"random:{tiny}:{TINY},seed=0,layers=3"), "revision")
    one_error(sweep("testbed"), "model", "testbed")
    one_error(sweep(f"random:{tiny}:{TINY},seed=0", "--tokenizer", tiny), "tokenizer", str(tiny))
    assert contents(folder) == before
    assert sweep(f"random:{tiny}:{TINY},seed=0").code == 0


def test_changed_weights_are_another_model(kvcli, tmp_path):
    model, folder = model_folder(tmp_path / "mine", weights=True), tmp_path / "run"
    command = (*SMALL, "--limit", "1", "--model", model, "--out", folder)
    assert kvcli(*command).code == 0
    weights = model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    one_error(kvcli(*command), "revision", str(folder))


def write_gsm8k(folder: Path, first: int) -> None:
    """Rows made up here; `first` makes them other rows."""
    (folder / "gsm8k").mkdir(parents=True, exist_ok=True)
    for split, count in (("test", 3), ("train", 4)):
        rows = [
            {"question": f"Kim has {first + i} pens, buys {i}. How many?", "answer": f"All.\n#### {first + 2 * i}"}
            for i in range(count)
        ]
        (folder / "gsm8k" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_other_data_is_refused_by_name(kvcli, tmp_path):
    data, folder = tmp_path / "data", tmp_path / "run"
    grid = ("--task", "gsm8k", "--shots", "2", "--data-dir", data, "--max-new-tokens", "4", "--out", folder)
    command = ("sweep", "--model", "testbed", "--method", "snapkv", "--ratio", "0.5", *grid)
    write_gsm8k(data, 3)
    assert kvcli(*command).code == 0
    assert {r["task"] for r in records(folder)} == {"gsm8k"}
    before = contents(folder)
    write_gsm8k(data, 5)
    one_error(kvcli(*command), "other data for gsm8k", str(folder))
    assert contents(folder) == before
    write_gsm8k(data, 3)
    assert kvcli(*command).code == 0


def change_rows(file: Path, keep: str) -> None:
    """Another question in every row but that of sample `keep`."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for number, row in enumerate(rows):
        if str(number) != keep:
            row["question"] = f"Ann too. {row['question']}"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def add_row(file: Path, keep: str) -> None:
    """One row more is another permutation."""
    file.write_text(file.read_text() + json.dumps({"question": "And now?", "answer": "So.\n#### 5"}) + "\n")


@pytest.mark.parametrize("change", [change_rows, add_row])
def test_data_changed_behind_the_first_sample_are_refused_too(kvcli, tmp_path, change: Callable[[Path, str], None]):
    """Else methods would be compared on different questions."""
    data, folder = tmp_path / "data", tmp_path / "run"
    grid = (*typed("--task gsm8k --shots 2 --limit 2 --max-new-tokens 4"), "--data-dir", data, "--out", folder)
    write_gsm8k(data, 3)
    assert kvcli("sweep", "--model", "testbed", "--method", "full", *grid).code == 0
    before = contents(folder)
    change(data / "gsm8k" / "test.jsonl", records(folder)[0]["sample_id"])
    one_error(kvcli("sweep", "--model", "testbed", "--method", "snapkv", "--ratio", "0.5", *grid), "data", "gsm8k")
    assert contents(folder) == before


# --- what changes nothing ---------------------------------------------------------------------------------------------


def test_housekeeping_may_differ(kvcli, copy, monkeypatch: pytest.MonkeyPatch):
    """Options that change no result neither forbid to resume nor measure anything again."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(loader, "load_weights", refuse)
    before = comparable(copy)
    for more in ("--keep-maps 2", "--max-time 100", "--memory 1G", "--store-prompts", "--device cpu"):
        assert kvcli(*SMALL, *typed(more), "--out", copy).code == 0, more
    assert comparable(copy) == before


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """interrupt(n): a failure of the machine at the n-th record from now."""
    from kvcli.results.store import RunStore

    append = RunStore.append

    def at(count: int) -> None:
        left = [count]

        def fail(self: RunStore, record: dict) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise OSError(28, "No space left on device", "samples.jsonl")
            append(self, record)

        monkeypatch.setattr(RunStore, "append", fail)

    return at


def test_a_full_disk_ends_with_4_and_goes_on_later(kvcli, small, tmp_path, interrupt, monkeypatch):
    folder = tmp_path / "run"
    interrupt(8)
    done = kvcli(*SMALL, "--out", folder)
    one_error(done, "disk is full", code=4)
    assert lines_written(folder) == 7
    assert json.loads((folder / "run.json").read_text())["status"] == "failed"
    monkeypatch.undo()
    assert kvcli(*SMALL, "--out", folder).code == 0
    assert_same(folder, small)
