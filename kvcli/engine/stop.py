"""The one place that asks whether to stop: signals and the time limit."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from kvcli.errors import Exit

_EARLY = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """`with StopRequest(max_time) as stop:` and `stop.asked()` between two pieces of work.

    SIGTERM, SIGUSR1, SIGUSR2 and the end of `max_time` seconds (counted from here) ask for exit code 75, the first
    Ctrl-C for 130: the step in hand is finished, answers that are whole are saved. A second Ctrl-C interrupts at once.
    Outside the main thread, where Python allows no signal handlers, only the time limit counts.
    """

    def __init__(self, max_time: float | None = None, clock: Callable[[], float] = time.monotonic,
                 say: Callable[[str], None] = lambda text: None) -> None:  # fmt: skip
        self._clock, self._say = clock, say
        self._deadline = None if max_time is None else clock() + max_time
        self._asked: tuple[Exit, str] | None = None
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, *_EARLY):
                handler = self._interrupt if number == signal.SIGINT else self._early
                self._old[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._old.clear()

    def _early(self, number: int, frame: FrameType | None) -> None:
        if self._asked is None:
            self._say(f"{signal.Signals(number).name}: stopping after this step; what is finished is saved")
        self._asked = self._asked or (Exit.STOPPED_EARLY, signal.Signals(number).name)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._asked and self._asked[0] is Exit.INTERRUPTED:
            raise KeyboardInterrupt
        self._say("stopping after this step, what is finished is saved; Ctrl-C again ends at once")
        self._asked = (Exit.INTERRUPTED, "Ctrl-C")

    def asked(self, progressed: bool = True) -> Exit | None:
        """The exit code to end with, or None: go on.

        progressed: whether this process has finished any piece of work; before that the time limit does not count, so
        that a limit shorter than the start-up still gets somewhere.
        """
        late = self._deadline is not None and self._clock() >= self._deadline
        if self._asked is None and progressed and late:
            self._asked = (Exit.STOPPED_EARLY, "--max-time")
        return self._asked[0] if self._asked else None

    @property
    def reason(self) -> str:
        """'SIGTERM', 'Ctrl-C', '--max-time'; empty when nothing was asked."""
        return self._asked[1] if self._asked else ""
