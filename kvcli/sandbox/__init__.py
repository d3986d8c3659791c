"""Runs programs that a model wrote, shut in: docs/sandbox.md."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from kvcli.errors import Exit, KvcliError
from kvcli.sandbox import probe
from kvcli.sandbox.judging import judge
from kvcli.sandbox.limits import Limits as Limits
from kvcli.sandbox.limits import Program as Program
from kvcli.sandbox.limits import Verdict as Verdict
from kvcli.sandbox.means import SAFE, Means
from kvcli.sandbox.process import StartError as StartError

WARNING = (
    "--unsafe-exec: programs that the model writes run as your user with limits on time and memory only; "
    "they can read and change your files and use the network. No sandbox works on this machine: {0}"
)


class _Settings:
    """What the command line said. One command, one process."""

    unsafe = False
    warned = False
    warn: Callable[[str], None] = staticmethod(warnings.warn)


def configure(*, unsafe: bool, warn: Callable[[str], None] | None = None) -> None:
    """Says whether programs may run without a sandbox where none works, and who is told (once in a process)."""
    _Settings.warned = _Settings.warned and unsafe == _Settings.unsafe
    _Settings.unsafe = unsafe
    if warn is not None:
        _Settings.warn = staticmethod(warn)


def usable() -> Means:
    """The strongest means that works on this machine.

    Raises KvcliError where none does, unless `configure(unsafe=True)` was called: then the user is warned once.
    """
    found = probe.best()
    if found is not None:
        return found
    problems = "; ".join(f"{name}: {probe.problem(name)}" for name in SAFE)
    if not _Settings.unsafe:
        what = "programs that a model wrote cannot be run safely on this machine"
        fix = "install bubblewrap (the program bwrap), or --unsafe-exec in a container or machine you can lose"
        raise KvcliError(what, given=problems, fix=fix, code=Exit.ENVIRONMENT)
    if not _Settings.warned:
        _Settings.warned = True
        _Settings.warn(WARNING.format(problems))
    return Means("unsafe")


def run(program: Program, limits: Limits | None = None) -> Verdict:
    """Runs a program and its tests in the sandbox.

    Raises KvcliError where the machine has no means, StartError when the sandbox could not be started this time or
    when the tests themselves are broken: neither says anything about the program.
    """
    return judge(program, limits or Limits(), usable())
