"""Sweeps for the tests of the command line: in this process or as one of their own, and what they leave behind."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcli.models.source import TESTBED_FOLDER

TINY = "layers=2,hidden=32,heads=2,kv_heads=1"
"""Sizes of a random model small enough for any test."""


@dataclass(frozen=True)
class Done:
    """What a command line did."""

    code: int
    out: str
    err: str


def typed(text: str) -> tuple[str, ...]:
    """Words of a command line as a user types it."""
    return tuple(shlex.split(text))


def call(*args: object) -> Done:
    """The command line inside this process; for fixtures that outlive one test (else: the fixture `kvcli`)."""
    from kvcli.cli.app import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(arg) for arg in args])
    return Done(code, out.getvalue(), err.getvalue())


class Started:
    """A command line running as a process of its own, killed at the end of the `with` block."""

    def __init__(self, *args: object, folder: Path) -> None:
        self.folder = folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._out, self._err = (folder.with_name(f"{folder.name}.{n}").open("w+") for n in ("stdout", "stderr"))
        command = [sys.executable, "-m", "kvcli", *map(str, args), "--out", str(folder)]
        self.process = subprocess.Popen(command, stdout=self._out, stderr=self._err)

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._out.close()
        self._err.close()

    def wait_for_lines(self, count: int, seconds: float = 100) -> None:
        """Returns once `count` records are written."""
        end = time.monotonic() + seconds
        while lines_written(self.folder) < count:
            assert self.process.poll() is None, f"it ended with {self.process.returncode}: {self._text(self._err)}"
            assert time.monotonic() < end, f"no {count} records after {seconds} s: {self._text(self._err)}"
            time.sleep(0.005)

    def wait_for_text(self, text: str, seconds: float = 60) -> None:
        """Returns once `text` stands on its stderr."""
        end = time.monotonic() + seconds
        while text not in self._text(self._err):
            assert self.process.poll() is None and time.monotonic() < end, self._text(self._err)
            time.sleep(0.005)

    def end(self, seconds: float = 60) -> Done:
        code = self.process.wait(timeout=seconds)
        return Done(code, self._text(self._out), self._text(self._err))

    def _text(self, file: Any) -> str:
        return Path(file.name).read_text()


def lines_written(folder: Path) -> int:
    path = folder / "samples.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def records(folder: Path) -> list[dict[str, Any]]:
    """All lines of samples.jsonl, replaced ones too, in order."""
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def prompts(folder: Path) -> dict[str, dict[str, Any]]:
    entries = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    found = {entry["sha"]: entry for entry in entries}
    assert len(found) == len(entries), "a prompt is stored twice"
    return found


def comparable(folder: Path, *without: str) -> list[str]:
    """The records as sorted texts without `seconds` (and the fields `without`): equal texts, equal bytes."""
    texts = []
    for line in (folder / "samples.jsonl").read_text().splitlines():
        record = {k: v for k, v in json.loads(line).items() if k not in ("seconds", *without)}
        texts.append(json.dumps(record, ensure_ascii=False))
    assert len(texts) == len({(r["cell_id"], r["sample_id"]) for r in records(folder)}), "a record is there twice"
    return sorted(texts)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes, locks left out."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def one_error(done: Done, *words: str, code: int = 2) -> None:
    """The command ended with one clear message: what is wrong, what was given, what to do; and nothing on stdout."""
    assert done.code == code, done.err
    assert done.out == ""
    lines = done.err.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    assert len(starts) == 1, done.err
    message = lines[starts[0] :]
    assert [line[:9] for line in message[1:]] == ["  given: ", "  try:   "], done.err
    assert all(len(line) > 9 for line in message)
    assert "Traceback" not in done.err
    for word in words:
        assert word in "\n".join(message), done.err


def model_folder(path: Path, *, weights: bool = False, **changes: Any) -> Path:
    """A copy of the testbed model's folder with another config, by default without weights."""
    path.mkdir(parents=True)
    for file in TESTBED_FOLDER.iterdir():
        if file.suffix == ".json" or (weights and file.suffix == ".safetensors"):
            (path / file.name).write_bytes(file.read_bytes())
    config = json.loads((path / "config.json").read_text())
    if "model_type" in changes:  # another family: nothing of the testbed's config but its ids and vocabulary
        config = {k: v for k, v in config.items() if k in ("vocab_size", "bos_token_id", "eos_token_id")}
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    return path


PLUGIN = '''
"""A method file as a user writes it."""

from dataclasses import dataclass
from pathlib import Path

import torch

from kvcli.methods.base import Method, Selection, setting


@dataclass(frozen=True)
class Recent(Method):
    """The newest tokens; fails while a file `broken` with the sample's name lies beside this one."""

    skip: int = setting(0, ge=0, help="so many fewer than allowed")

    def select(self, ctx, budget):
        broken = Path(__file__).with_name("broken")
        if broken.exists() and ctx.sample_id in broken.read_text().split():
            raise ValueError(f"cannot do sample {ctx.sample_id}")
        newest = torch.arange(ctx.n - max(1, budget.per_head - self.skip), ctx.n)
        return Selection([newest] * ctx.layers)


@dataclass(frozen=True)
class Greedy(Method):
    """Breaks the contract: keeps more than it was given."""

    def select(self, ctx, budget):
        return Selection([torch.arange(ctx.n)] * ctx.layers)
'''


def without_kvcli_variables() -> None:
    """A developer's own KVCLI_* settings have no say in tests."""
    for name in [name for name in os.environ if name.startswith("KVCLI_") and name != "KVCLI_REQUIRE"]:
        del os.environ[name]


without_kvcli_variables()
