"""One program under test: two confined processes, the program's and the checker's, and the verdict of the second.

The program's process never sees the tests; its only ways out are the answers to the checker's calls. What is believed
is one line on a pipe that only the checker has.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kvcli.sandbox.limits import Limits, Program, Reason, Verdict, longer
from kvcli.sandbox.means import Means, packages
from kvcli.sandbox.process import Confined, Descriptors, StartError, remove, start, too_large

CHECKER_SHARE = 4
"""How many times as much CPU time the tests may use as the program."""
LOOK = 0.05
"""Seconds between two looks at a temporary folder."""
KILLED = {-signal.SIGKILL, -signal.SIGXCPU, 128 + signal.SIGKILL, 128 + signal.SIGXCPU}


@dataclass
class _Watch:
    """What the two processes have said so far."""

    told: bytes = b""
    started: float | None = None
    states: list[tuple[str, str]] = field(default_factory=list)
    open: set[int] = field(default_factory=set)

    def take(self, data: bytes) -> None:
        *lines, self.told = (self.told + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if message["state"] == "started":
                self.started = time.monotonic()
            else:
                self.states.append((message["state"], message["why"]))


def judge(program: Program, limits: Limits, means: Means) -> Verdict:
    """Runs a program and its tests.

    Raises StartError when the machine could not, or when the tests themselves are broken.
    """
    began = time.monotonic()
    with Descriptors() as ends:
        calls, answers, verdict = ends.pipe(), ends.pipe(), ends.pipe()
        common: dict[str, Any] = {"entry": program.entry, "packages": packages()}
        running: list[Confined] = []
        try:
            job = {**common, "role": "candidate", "link": [calls[0], answers[1]], "source": program.source}
            candidate = start(means, job, limits, job["link"])
            running.append(candidate)
            job = {**common, "role": "checker", "link": [answers[0], calls[1]], "verdict": verdict[1]}
            job |= {"test": program.test, "setup": program.setup}
            checker = start(means, job, longer(limits, CHECKER_SHARE), [*job["link"], verdict[1]])
            running.append(checker)
            ends.close(*calls, *answers, verdict[1])
            reason, why = _Judging(candidate, checker, verdict[0], limits).outcome()
        finally:
            for one in running:
                one.kill()
            for one in running:
                _drain(one)
                os.close(one.output)
                remove(one.work)
    return Verdict(reason, why, time.monotonic() - began)


class _Judging:
    """The wait for the verdict, and the limits that only an outsider can hold."""

    def __init__(self, candidate: Confined, checker: Confined, verdict: int, limits: Limits) -> None:
        self.candidate, self.checker, self.verdict, self.limits = candidate, checker, verdict, limits
        self.watch = _Watch()
        self.began = time.monotonic()

    def outcome(self) -> tuple[Reason, str]:
        with selectors.DefaultSelector() as selector:
            selector.register(self.verdict, selectors.EVENT_READ, self._verdict)
            for one in (self.candidate, self.checker):
                selector.register(one.output, selectors.EVENT_READ, one.take_output)
            while True:
                over = self._over()
                if over is not None:
                    return over
                for key, _ in selector.select(self._patience()):
                    read: Callable[[], bool] = key.data
                    if not read():
                        selector.unregister(key.fd)
                        if key.fd == self.verdict:
                            return self._no_verdict()
                if self.watch.states:
                    return self._told(*self.watch.states[0])

    def _verdict(self) -> bool:
        data = os.read(self.verdict, 1 << 16)
        self.watch.take(data)
        return bool(data)

    def _patience(self) -> float:
        return LOOK if self.candidate.work else max(0.0, self._deadline() - time.monotonic())

    def _deadline(self) -> float:
        if self.watch.started is None:
            return self.began + self.limits.start_seconds
        return self.watch.started + self.limits.wall_seconds

    def _over(self) -> tuple[Reason, str] | None:
        """What the program has used too much of."""
        if time.monotonic() >= self._deadline():
            if self.watch.started is None:
                raise StartError(f"not started after {self.limits.start_seconds:g} s")
            return "timeout", f"no end after {self.limits.wall_seconds:g} s"
        for one in (self.candidate, self.checker):
            if one.printed > self.limits.output_bytes:
                return "output", f"it printed more than {self.limits.output_bytes} bytes"
            if one.work and too_large(one.work, self.limits.folder_bytes):
                return "output", f"its folder holds more than {self.limits.folder_bytes} bytes, or cannot be looked at"
        return None

    def _told(self, state: str, why: str) -> tuple[Reason, str]:
        if state == "not started":
            raise self._not_started(self.candidate)
        if state == "broken":
            raise StartError(f"the tests cannot be run: {why}")
        if state == "gone":
            code = self._exit(self.candidate)
            if code in KILLED:
                return "timeout", f"ended at its limit of {self.limits.cpu_seconds} s of CPU time"
            return "died", f"its process ended with {code}"
        reasons: dict[str, Reason] = {"passed": "passed", "wrong": "wrong", "raised": "raised"}
        return reasons[state], why

    def _no_verdict(self) -> tuple[Reason, str]:
        """The checker ended without one."""
        if self.watch.started is None:
            raise self._not_started(self.checker)
        code = self._exit(self.checker)
        if code in KILLED:
            return "timeout", "the tests ended at their limit of CPU time"
        return "died", f"the tests' process ended with {code}"

    def _not_started(self, one: Confined) -> StartError:
        code = self._exit(one)
        _drain(one)
        return StartError(f"a sandboxed process ended with {code} before it began: {one.last_line()}")

    def _exit(self, one: Confined) -> int | None:
        """Its exit status; None when it has closed its pipes and lives on."""
        try:
            return one.process.wait(1.0)
        except subprocess.TimeoutExpired:
            return None


def _drain(one: Confined, most: float = 2.0) -> None:
    """Reads to the end, which comes when the last process of the group is gone."""
    until = time.monotonic() + most
    with selectors.DefaultSelector() as selector:
        selector.register(one.output, selectors.EVENT_READ)
        while (left := until - time.monotonic()) > 0:
            if selector.select(left) and not one.take_output():
                return
