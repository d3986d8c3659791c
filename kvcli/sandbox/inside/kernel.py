"""System calls that Python's os module lacks. Every function raises OSError where the kernel refuses."""

from __future__ import annotations

import ctypes
import os
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 8, 22, 38
CAPSET, CAPGET, PIVOT_ROOT = (90, 91, 41) if os.uname().machine == "aarch64" else (126, 125, 155)
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1, 2, 4, 8, 32, 4096, 16384, 1 << 18,
)  # fmt: skip
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
MNT_DETACH = 2
CAPABILITIES = 0x20080522
"""Version 3 of the structure: two words of 32 bits."""


def _done(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def syscall(number: int, *args: Any, what: str) -> int:
    plain = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    return _done(_libc.syscall(ctypes.c_long(number), *plain), what)


def prctl(option: int, *args: Any) -> None:
    plain = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in (*args, 0, 0, 0, 0)[:4]]
    _done(_libc.prctl(option, *plain), f"prctl {option}")


def unshare(flags: int) -> None:
    _done(_libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    args = [text.encode() if text else None for text in (source, target, kind)]
    _done(_libc.mount(*args, ctypes.c_ulong(flags), data.encode() if data else None), f"mount {target}")


def mount_read_only(target: str) -> None:
    """Makes a mount and all below it read-only, without set-user-id programs and devices."""
    attributes = (ctypes.c_uint64 * 4)(MS_RDONLY | MS_NOSUID | MS_NODEV, 0, 0, 0)
    syscall(442, -100, target.encode(), 0x8000, ctypes.byref(attributes), 32, what=f"read-only {target}")


def pivot_root(new: str, old: str) -> None:
    syscall(PIVOT_ROOT, new.encode(), old.encode(), what="pivot_root")


def unmount(target: str) -> None:
    _done(_libc.umount2(target.encode(), MNT_DETACH), f"umount {target}")


def capabilities() -> int:
    """The capabilities this process may use, as bits 0..31."""
    data = (ctypes.c_uint32 * 6)()
    syscall(CAPGET, ctypes.byref((ctypes.c_uint32 * 2)(CAPABILITIES, 0)), ctypes.byref(data), what="capget")
    return data[1]


def keep_capabilities(bits: int) -> None:
    """Gives all capabilities up but these."""
    data = (ctypes.c_uint32 * 6)(bits, bits, 0, 0, 0, 0)
    syscall(CAPSET, ctypes.byref((ctypes.c_uint32 * 2)(CAPABILITIES, 0)), ctypes.byref(data), what="capset")
