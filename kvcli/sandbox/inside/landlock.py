"""Landlock: this process may only open files below named paths. Needs no rights and no name spaces.

Source: linux Documentation/userspace-api/landlock.rst. It guards opening, making and removing files, not their
attributes: the seccomp filter refuses calls that change these.
"""
# Importing pathlib would cost each start more than all of this.
# ruff: noqa: PTH112

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable

from kvcli.sandbox.inside import kernel

CREATE, ADD_RULE, RESTRICT = 444, 445, 446
VERSION_FLAG, PATH_BENEATH = 1, 1
WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR, REMOVE_FILE = 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 5
MAKE_DIR, MAKE_REG, MAKE_SYM, TRUNCATE = 1 << 7, 1 << 8, 1 << 12, 1 << 14
OF_FILES = WRITE_FILE | READ_FILE | TRUNCATE
ALL_OF_VERSION = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
"""File system rights by the version that brought the last of them."""
TCP, SCOPES = 3, 3
"""Binding and connecting (version 4); abstract sockets and signals (version 6)."""
ENOUGH = 3
"""The first version that also guards the cutting of files."""
READ = READ_FILE | READ_DIR
OWN = READ | WRITE_FILE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | MAKE_SYM | TRUNCATE


def version() -> int:
    """The kernel's. Raises OSError where it has none."""
    return kernel.syscall(CREATE, None, 0, VERSION_FLAG, what="landlock")


def rules(read: Iterable[str], own: str) -> int:
    """A set of rules: `read` may be read, in `own` everything may be done. Returns its descriptor.

    Raises OSError where the kernel has no landlock, or one that is too old.
    """
    found = version()
    if found < ENOUGH:
        raise OSError(f"landlock version {found}, {ENOUGH} is needed")
    handled = ALL_OF_VERSION[max(v for v in ALL_OF_VERSION if v <= found)]
    fields = [handled, TCP if found >= 4 else 0, SCOPES if found >= 6 else 0][: 1 + (found >= 4) + (found >= 6)]
    attributes = struct.pack(f"={len(fields)}Q", *fields)
    ruleset = kernel.syscall(CREATE, attributes, len(attributes), 0, what="landlock rules")
    for path in read:
        _allow(ruleset, path, READ)
    _allow(ruleset, own, OWN)
    _allow(ruleset, "/dev/null", READ_FILE | WRITE_FILE)
    return ruleset


def restrict(ruleset: int) -> None:
    """Holds this process to the rules, for good."""
    kernel.syscall(RESTRICT, ruleset, 0, what="landlock")
    os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        rights = rights if os.path.isdir(path) else rights & OF_FILES
        rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, folder), 12)
        kernel.syscall(ADD_RULE, ruleset, PATH_BENEATH, rule, 0, what=f"landlock {path}")
    finally:
        os.close(folder)
