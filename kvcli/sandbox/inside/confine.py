"""Shuts this process in before it runs anything that is not kvcli's: the steps, in the order the kernel needs."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from collections.abc import Mapping
from typing import Any

from kvcli.sandbox.inside import kernel, landlock, namespaces, seccomp

SEARCH = 0b110
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""


def enter(how: Mapping[str, Any], keep: list[int]) -> None:
    """Raises OSError when a step fails that this means cannot do without.

    how: what `Means.confinement` gives. keep: descriptors the process under test needs. Every means but `unsafe`
    needs the seccomp filter; landlock is a must where there are no name spaces and one more wall elsewhere.
    """
    means, work = how["means"], how["work"]
    paths = [(inside, real) for inside, real in how["read"]]
    _end_with_parent(how["parent"] if means != "bubblewrap" else 0)
    if means == "namespaces":
        namespaces.enter(paths, work, how["folder_bytes"], keep)
    os.chdir(work)
    rules = None
    with _may_fail(means != "landlock"):
        rules = landlock.rules([inside for inside, _ in paths], work)
    _give_up_root(how)
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    if rules is not None:
        landlock.restrict(rules)
    _end_with_parent()  # giving up rights undoes the first
    _limit(how)
    with _may_fail(means == "unsafe"):
        seccomp.apply()


def _end_with_parent(parent: int = 0) -> None:
    """The kernel kills this process when its parent ends. parent: who that must still be, 0 for anyone."""
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent and os.getppid() != parent:
        raise OSError("kvcli has ended")


def _may_fail(allowed: bool) -> contextlib.AbstractContextManager[Any]:
    return contextlib.suppress(OSError) if allowed else contextlib.nullcontext()


def _give_up_root(how: Mapping[str, Any]) -> None:
    """Becomes the unprivileged user where this is root, and loses all capabilities.

    Where only root can reach Python's own files, and landlock alone decides what may be opened, the right to pass
    locked folders is kept.
    """
    if os.geteuid() == 0:
        user = how["user"]
        kernel.prctl(kernel.PR_SET_KEEPCAPS, int(how["pass_folders"]))
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    kernel.keep_capabilities(kernel.capabilities() & SEARCH if how["pass_folders"] else 0)


def _limit(how: Mapping[str, Any]) -> None:
    limits = {
        resource.RLIMIT_CPU: how["cpu_seconds"],
        resource.RLIMIT_AS: how["memory_bytes"],
        resource.RLIMIT_FSIZE: how["file_bytes"],
        resource.RLIMIT_NPROC: how["threads"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for kind, most in limits.items():
        _, hard = resource.getrlimit(kind)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a file that is too large is an error, not an end
