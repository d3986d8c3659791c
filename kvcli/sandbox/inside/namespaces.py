"""A file system, process numbers and a network of its own, without bubblewrap: Linux name spaces and mounts.

As root the name spaces are made with root's rights and these are given up afterwards; others get a user name space
first. Sources: man 7 user_namespaces, man 7 mount_namespaces, man 2 pivot_root.
"""
# Importing pathlib would cost each start more than all of this.
# ruff: noqa: PTH102, PTH103, PTH110, PTH112, PTH120, PTH123

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Sequence

from kvcli.sandbox.inside import kernel
from kvcli.sandbox.inside.kernel import (
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    MS_REMOUNT,
)

BASE = "/tmp"
"""A folder that every machine has, covered while mounts are made."""
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
OTHERS = kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS


def enter(read: Sequence[tuple[str, str]], work: str, size: int, keep: Sequence[int]) -> None:
    """Returns in the new process, number 1 of its name space; the old one waits for it and ends as it ends.

    read: (path inside, real path) to be seen there, read-only. work: the path of an empty file system of `size` bytes.
    keep: descriptors that only the new process needs.
    """
    if os.geteuid() == 0:
        kernel.unshare(OTHERS)
    else:
        _unshare_as_user()
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    child = os.fork()
    if child:
        for descriptor in keep:
            os.close(descriptor)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        os._exit(code if code >= 0 else 128 - code)
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    _mounts(read, work, size)


def _unshare_as_user() -> None:
    user, group = os.geteuid(), os.getegid()
    kernel.unshare(kernel.CLONE_NEWUSER | OTHERS)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as f:
            f.write(text)


def _mounts(read: Sequence[tuple[str, str]], work: str, size: int) -> None:
    kernel.mount("none", "/", flags=MS_REC | MS_PRIVATE)
    kernel.mount("tmpfs", BASE, "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755,size=1m")
    os.mkdir(f"{BASE}/old")
    os.mkdir(f"{BASE}/new")
    kernel.mount("tmpfs", f"{BASE}/new", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755,size=1m")
    kernel.pivot_root(BASE, f"{BASE}/old")
    os.chdir("/")
    for inside, real in [*read, *((device, device) for device in DEVICES)]:
        _bind(f"/old{real}", f"/new{inside}", device=inside in DEVICES)
    os.makedirs(f"/new{work}", exist_ok=True)
    kernel.mount("tmpfs", f"/new{work}", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, f"mode=1777,size={size}")
    os.chdir("/new")
    kernel.pivot_root(".", ".")
    kernel.unmount(".")
    os.chdir("/")
    kernel.mount("none", "/", flags=MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def _bind(source: str, target: str, device: bool) -> None:
    """Shows one path, read-only unless it is a device. Missing sources are left out."""
    if not os.path.exists(source):
        return
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
    kernel.mount(source, target, flags=MS_BIND | MS_REC)
    if not device:
        _read_only(target)


def _read_only(target: str) -> None:
    """With all mounts below it; before Linux 5.12 only the mount itself, whose other flags must be named again."""
    try:
        kernel.mount_read_only(target)
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        had = os.statvfs(target).f_flag & (MS_NODEV | MS_NOEXEC)
        kernel.mount("none", target, flags=MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | had)
