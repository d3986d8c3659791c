"""The checker's process: runs the tests, calling the program under test in its own process, and gives the verdict.

The program shares no interpreter, memory or descriptor with this process but the two pipes of the calls: what it can
do is answer, as any function can. The verdict goes to a third pipe.
"""

from __future__ import annotations

import builtins
import json
import os
from collections.abc import Mapping
from typing import Any

from kvcli.sandbox.inside import wire


class Gone(BaseException):
    """The process under test ended. No test catches this one."""


class Proxy:
    """Stands for the function under test."""

    def __init__(self, link: wire.Link, entry: str) -> None:
        self.link, self.__name__ = link, entry
        self.raised: list[BaseException] = []
        """What the program raised, or what was wrong with an answer."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            self.link.send({"args": wire.encode(list(args)), "kwargs": wire.encode(kwargs)})
            answer = self.link.receive()
            if "error" in answer:
                raise self._error(answer["error"])
            return wire.decode(answer["value"])
        except wire.Closed as e:
            raise Gone from e
        except BaseException as error:
            self.raised.append(error)
            raise

    def _error(self, told: Any) -> BaseException:
        """The built-in exception of that name, so that a test may expect it."""
        name, text = str(told[0]), str(told[1])
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, UnicodeError):
            return kind(text)
        return RuntimeError(f"{name}: {text}")


def check(job: Mapping[str, Any]) -> None:
    """Waits for the program, runs the tests, tells the verdict: one line of JSON."""
    link = wire.Link(*job["link"])
    try:
        _first(link, "ready")
    except (wire.Closed, ValueError, KeyError, TypeError):
        _tell(job, "not started", "")
        return
    _tell(job, "started", "")
    try:
        tests: dict[str, Any] = {}
        exec(compile(job["setup"], "setup.py", "exec", dont_inherit=True), tests)
        exec(compile(job["test"], "test.py", "exec", dont_inherit=True), tests)
        proxy = Proxy(link, job["entry"])
        tests[job["entry"]] = proxy
        run = tests["check"]
    except BaseException as error:
        _tell(job, "broken", _named(error))
        return
    _tell(job, *_verdict(link, proxy, run))


def _verdict(link: wire.Link, proxy: Proxy, run: Any) -> tuple[str, str]:
    try:
        told = _first(link, "defined")
        if told:
            return "raised", told
        run(proxy)
    except (Gone, wire.Closed):
        return "gone", ""
    except BaseException as error:
        return ("raised" if any(error is e for e in proxy.raised) else "wrong"), _named(error)
    return "passed", ""


def _first(link: wire.Link, what: str) -> str:
    """Takes that message; an error told instead is returned as text. Raises for anything else."""
    message = link.receive()
    if "error" in message:
        return ": ".join(str(part) for part in message["error"])
    if message[what] is not True:
        raise ValueError("not a message of this protocol")
    return ""


def _named(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:300]
    except BaseException:
        return type(error).__name__


def _tell(job: Mapping[str, Any], state: str, why: str) -> None:
    line = json.dumps({"state": state, "why": why}) + "\n"
    os.write(job["verdict"], line.encode())
