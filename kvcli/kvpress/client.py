"""The worker process from kvcli's side: started when a press is named, asked one thing at a time, ended at exit.

There is one worker per process of kvcli, because a press is named in texts (`--method kvpress:CLASS`) that carry no
interpreter: `choose` says which, `serve` which model, `current` is the worker.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import IO, Any

from kvcli.errors import KvcliError
from kvcli.kvpress.presses import VERSION

VARIABLE = "KVCLI_KVPRESS_PYTHON"
PROTOCOL = 1
HELLO_SECONDS = 60.0
"""How long an interpreter may take to answer at all; a slow disk is slow, but not everything typed is a Python."""
MOST_STARTS = 3
OLDEST, BELOW = (4, 56), (5, 3)
"""Versions of transformers that kvpress 0.5.5 asks for."""


class WorkerFailed(RuntimeError):
    """The worker could not answer; the message is the row's error."""


@dataclass(frozen=True)
class Place:
    """Where the worker finds the model. folder: a folder or hub id, or a call that saves the model and names the folder
    (for weights that are nowhere on disk)."""

    folder: str | Callable[[], str]
    revision: str | None = None
    dtype: str = "float32"
    device: str = "cpu"
    trust_remote_code: bool = False
    threads: int | None = None


class Worker:
    """One process of the worker (`kvcli/kvpress/worker`)."""

    def __init__(self, python: str) -> None:
        self.python = python
        self.given = f"--kvpress-python {python}"
        self.versions: dict[str, str] = {}
        self._loaded: Place | None = None
        self._starts = 0
        self._number = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._answers: queue.Queue[bytes] = queue.Queue()
        self._last: deque[str] = deque(maxlen=20)
        self._listener: threading.Thread | None = None
        self._describe = cache(self._described)
        self._start()

    def describe(self, press: str) -> list[dict[str, Any]]:
        """Parameters of a press's constructor. Raises WorkerFailed."""
        return self._describe(press)

    def _described(self, press: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.ask("describe", press=press)["parameters"]
        return found

    def make(self, press: dict[str, Any]) -> None:
        """Raises WorkerFailed where the press does not take its arguments."""
        self.ask("make", press=press)

    def load(self, place: Place) -> None:
        """The model, unless it is the one that is there."""
        if self._alive() and place == self._loaded:
            return
        folder = place.folder if isinstance(place.folder, str) else place.folder()
        self.ask(
            "load", model=folder, revision=place.revision, dtype=place.dtype, device=place.device,
            trust_remote_code=place.trust_remote_code, threads=place.threads,
        )  # fmt: skip
        self._loaded = place

    def kept(
        self, press: dict[str, Any], ids: Sequence[int], ratio: float | None, attention: str, seed: int, **more: Any
    ) -> list[list[list[int]]]:
        """Positions that the press keeps, per layer and KV head, ascending. Raises WorkerFailed."""
        answer = self.ask("run", press=press, ids=list(ids), ratio=ratio, attention=attention, seed=seed, **more)
        flat = array("i", base64.b64decode(answer["positions"]))
        if sys.byteorder != "little":
            flat.byteswap()
        found, at = [], 0
        for layer in answer["counts"]:
            heads = []
            for count in layer:
                heads.append(flat[at : at + count].tolist())
                at += count
            found.append(heads)
        return found

    def ask(self, what: str, **request: Any) -> dict[str, Any]:
        """One request and its answer. Raises WorkerFailed with the worker's own words, or its last line if it ended."""
        if not self._alive():
            self._again()
        self._number += 1
        line = json.dumps({"id": self._number, "do": what, **request}) + "\n"
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
        answer = self._answer(None)
        if "error" in answer:
            raise WorkerFailed(str(answer["error"]))
        if answer.get("id") != self._number:
            raise WorkerFailed(f"the worker answered request {answer.get('id')} instead of {self._number}")
        found: dict[str, Any] = answer["answer"]
        return found

    def close(self) -> None:
        """Ends the process: it goes when its stdin closes."""
        process, self._process, self._loaded = self._process, None, None
        if process is None:
            return
        with contextlib.suppress(OSError):
            if process.stdin is not None:
                process.stdin.close()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _again(self) -> None:
        """Another process in place of one that ended; what it had loaded is gone."""
        if self._starts >= MOST_STARTS:
            raise WorkerFailed(f"the kvpress worker ended {self._starts} times, the last time with: {self._words()}")
        self.close()
        try:
            self._start()
        except KvcliError as e:
            raise WorkerFailed(e.what) from e

    def _start(self) -> None:
        """Raises KvcliError where this is no Python with the kvpress that the table of presses was read from."""
        self._starts += 1
        folder = Path(__file__).with_name("worker")
        try:
            process = subprocess.Popen(
                [self.python, "-E", str(folder)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
        except OSError as e:
            what = f"no Python at {self.python}: {e.strerror}"
            raise KvcliError(what, given=self.given, fix="the python of kvpress's environment (docs/kvpress.md)") from e
        self._process, self._loaded = process, None
        self._answers, self._last = queue.Queue(), deque(maxlen=20)
        assert process.stdout is not None and process.stderr is not None
        threading.Thread(target=_hear, args=(process.stdout, self._answers), daemon=True).start()
        self._listener = threading.Thread(target=_note, args=(process.stderr, self._last), daemon=True)
        self._listener.start()
        try:
            hello = self._hello()
            self._check(hello)
        except KvcliError:
            self.close()
            raise

    def _hello(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(b'{"id": 0, "do": "hello"}\n')
            self._process.stdin.flush()
            answer = self._answer(HELLO_SECONDS)
            found: dict[str, Any] = answer["answer"]
            assert found["protocol"] == PROTOCOL
        except (OSError, WorkerFailed, KeyError, TypeError, AssertionError) as e:
            what = f"{self.python} does not run the kvpress worker: {self._words()}"
            fix = "a Python 3.10 or newer with kvpress installed (docs/kvpress.md)"
            raise KvcliError(what, given=self.given, fix=fix) from e
        return found

    def _check(self, hello: dict[str, Any]) -> None:
        versions = hello["versions"]
        fix = f"{self.python} -m pip install kvpress=={VERSION} transformers==5.2.0 torch==2.13.0"
        if versions.get("kvcli"):
            fix = "an environment of its own: python3 -m venv kvpress-env (docs/kvpress.md has the lines)"
        for name in ("kvpress", "transformers", "torch"):
            if not versions.get(name):
                raise KvcliError(f"{name} is not installed in {self.python}", given=self.given, fix=fix)
        if versions["kvpress"] != VERSION:
            what = f"kvpress {versions['kvpress']} is not supported, {VERSION} is"
            raise KvcliError(what, given=self.given, fix=fix)
        if not OLDEST <= tuple(int(piece) for piece in versions["transformers"].split(".")[:2]) < BELOW:
            what = f"kvpress {VERSION} does not run with transformers {versions['transformers']}"
            raise KvcliError(what, given=self.given, fix=fix)
        self.versions = dict(versions)

    def _answer(self, seconds: float | None) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=seconds)
        except queue.Empty:
            raise WorkerFailed(f"no answer within {seconds:.0f} s") from None
        if not line:
            raise WorkerFailed(f"the kvpress worker ended: {self._words()}")
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise WorkerFailed(f"the kvpress worker said {line[:80]!r}")
        return found

    def _words(self) -> str:
        """The last line the process wrote, and how it ended where that says more."""
        code = None
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self._process.wait(1)
        if self._listener is not None:
            self._listener.join(1)
        said = self._last[-1] if self._last else ""
        if code is not None and code < 0:
            return f"killed by signal {-code}" + (f" after: {said}" if said else "")
        return said or ("it said nothing" if code is None else f"exit code {code}")


def _hear(stdout: IO[bytes], answers: queue.Queue[bytes]) -> None:
    """Every line, then an empty one."""
    for line in stdout:
        answers.put(line)
    answers.put(b"")


def _note(stderr: IO[bytes], last: deque[str]) -> None:
    for line in stderr:
        text = line.decode("utf-8", "replace").strip()
        if text:
            last.append(text[:300])


class _Chosen:
    """What this process uses."""

    python: str | None = None
    worker: Worker | None = None
    place: Place | None = None


def choose(python: str | None) -> None:
    """The interpreter of --kvpress-python; None: the variable's."""
    if python != _Chosen.python:
        close()
    _Chosen.python = python


def python() -> str:
    """Raises KvcliError where no interpreter was named."""
    found = _Chosen.python or os.environ.get(VARIABLE)
    if not found:
        what = "presses run in an environment of their own, and none is named"
        raise KvcliError(
            what, given="--method kvpress:...", fix=f"--kvpress-python PATH or {VARIABLE} (docs/kvpress.md)"
        )
    return str(Path(found).expanduser())


def current() -> Worker:
    """The worker, started if need be. Raises KvcliError."""
    path = python()
    if _Chosen.worker is not None and _Chosen.worker.python != path:
        close()
    if _Chosen.worker is None:
        _Chosen.worker = Worker(path)
    return _Chosen.worker


def serve(place: Place | None) -> None:
    """Which model prompts are for from now on; it is loaded when the first is asked about."""
    _Chosen.place = place


def ready() -> Worker:
    """The worker with the model loaded. Raises WorkerFailed."""
    if _Chosen.place is None:
        raise WorkerFailed("no model was given to the kvpress worker")
    worker = current()
    worker.load(_Chosen.place)
    return worker


def kept(
    press: dict[str, Any], ids: Sequence[int], ratio: float | None, attention: str, seed: int
) -> list[list[list[int]]]:
    """What a press keeps of a prompt of the model served (see `Worker.kept`). Raises WorkerFailed."""
    return ready().kept(press, ids, ratio, attention, seed)


@atexit.register
def close() -> None:
    """Ends the worker."""
    worker, _Chosen.worker = _Chosen.worker, None
    if worker is not None:
        worker.close()


def saved(model: Any, tokenizer: Any, place: Place) -> Place:
    """The place of a model that is nowhere on disk: saved to a temporary folder when the worker first needs it."""
    held = [(model, tokenizer)]
    folders: list[tempfile.TemporaryDirectory[str]] = []

    def save() -> str:
        if held:
            folder = tempfile.TemporaryDirectory(prefix="kvcli-model-")
            atexit.register(folder.cleanup)
            for each in held[0]:
                each.save_pretrained(folder.name)
            folders.append(folder)
            held.clear()  # the next model may need its memory
        return folders[0].name

    return replace(place, folder=save)
