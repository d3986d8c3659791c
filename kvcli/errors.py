"""User errors and exit codes: what is wrong, what was given, what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from enum import IntEnum


class Exit(IntEnum):
    """Exit codes of every command (docs/cli.md)."""

    DONE = 0
    BUG = 1
    USAGE = 2
    FAILED_SAMPLES = 3
    ENVIRONMENT = 4
    STOPPED_EARLY = 75
    INTERRUPTED = 130


class KvcliError(Exception):
    """One clear message instead of a traceback.

    what: the fault in a few words; given: the input it is about; fix: what to type or change.
    """

    def __init__(self, what: str, *, given: str = "", fix: str = "", code: Exit = Exit.USAGE) -> None:
        super().__init__(what)
        self.what, self.given, self.fix, self.code = what, given, fix, code

    def lines(self) -> list[str]:
        """The message as printed, without colour."""
        out = [f"error: {self.what}"]
        if self.given:
            out.append(f"  given: {self.given}")
        if self.fix:
            out.append(f"  try:   {self.fix}")
        return out


def unknown(kind: str, name: str, known: Iterable[str], *, given: str, listing: str) -> KvcliError:
    """The error for a name that is not in a registry, with the nearest known name."""
    names = sorted(known)
    plain = {name.lower(): name for name in names}
    close = [plain[found] for found in get_close_matches(name.lower(), plain, n=1, cutoff=0.5)]
    fix = f"{close[0]}     ({listing} shows all)" if close else f"{listing} shows all"
    return KvcliError(f"unknown {kind} '{name}'", given=given, fix=fix)
