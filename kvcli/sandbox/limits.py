"""How much a program under test may use, and what came of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

MIB = 1 << 20
Reason = Literal["passed", "wrong", "raised", "timeout", "output", "died"]
"""wrong: a test failed; raised: the program could not be run or raised; timeout: it used up its time; output: it
printed too much or filled its folder; died: its process ended, or what it sent was no answer."""


@dataclass(frozen=True)
class Limits:
    """cpu_seconds: of one process, whole seconds. wall_seconds: from the moment the program starts, for programs that
    wait. threads: of all sandboxed programs of one user at a time. output_bytes: printed. file_bytes: of one file,
    folder_bytes: of the temporary folder."""

    cpu_seconds: int = 3
    wall_seconds: float = 30.0
    start_seconds: float = 60.0
    memory_bytes: int = 1024 * MIB
    threads: int = 64
    output_bytes: int = 4 * MIB
    file_bytes: int = 16 * MIB
    folder_bytes: int = 64 * MIB

    def inside(self) -> dict[str, Any]:
        """What the process itself must know."""
        names = ("cpu_seconds", "memory_bytes", "threads", "file_bytes", "folder_bytes")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Program:
    """A program under test, and its tests.

    source: defines the function `entry`. setup: what the tests may use, run before them in the checker; test: defines
    `check(candidate)`, which raises when a test fails.
    """

    source: str
    entry: str
    test: str
    setup: str = ""


@dataclass(frozen=True)
class Verdict:
    """why: the error in one line. seconds: from starting the processes to the verdict."""

    reason: Reason
    why: str
    seconds: float

    @property
    def passed(self) -> bool:
        return self.reason == "passed"


def longer(limits: Limits, factor: int) -> Limits:
    """The same limits with more CPU time, for the process that runs the tests."""
    return dataclasses.replace(limits, cpu_seconds=limits.cpu_seconds * factor)
