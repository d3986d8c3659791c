"""The ways to shut a process in, strongest first, and how each one's processes are started."""

from __future__ import annotations

import functools
import os
import shutil
import stat
import sys
import sysconfig
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from kvcli.sandbox.limits import Limits

Name = Literal["bubblewrap", "namespaces", "landlock", "unsafe"]
SAFE: tuple[Name, ...] = ("bubblewrap", "namespaces", "landlock")
WORK = "/kvcli-program"
"""The temporary folder where the process has a file system of its own."""
NOBODY = 65534
SYSTEM = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/nix/store")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
PACKAGES = ("numpy",)
"""What programs may import beside the standard library: what openai/human-eval itself requires of use to them."""
HERE = Path(__file__).resolve().parent
BOOT = """
import sys, types
for name, path in (("kvcli", {0!r}), ("kvcli.sandbox", {1!r})):
    module = sys.modules[name] = types.ModuleType(name)
    module.__path__ = [path]
import kvcli.sandbox.inside.main
"""
"""Loads kvcli/sandbox/inside without the packages above it, which a sandbox does not show."""


@dataclass(frozen=True)
class Means:
    """One way. It is known by trying only (`kvcli.sandbox.probe`)."""

    name: Name

    @property
    def own_files(self) -> bool:
        """Whether the process has a file system of its own; else a real temporary folder."""
        return self.name in ("bubblewrap", "namespaces")

    def command(self, limits: Limits) -> list[str]:
        """The command line of a sandboxed process. Raises FileNotFoundError where a program is missing."""
        code = BOOT.format(str(HERE.parent), str(HERE))
        python = [interpreter(), "-S", "-s", "-P", "-B", "-c", code]
        return _bubblewrap(limits) + python if self.name == "bubblewrap" else python

    def confinement(self, limits: Limits, work: str) -> dict[str, Any]:
        """What the process must know to shut itself in (`inside/confine.py`)."""
        read = readable()
        locked = not self.own_files and not all(open_to_all(path) for path in [*read, work])
        return {
            "means": self.name, "work": work, "user": NOBODY, "pass_folders": locked, "parent": os.getpid(),
            "read": [(path, os.path.realpath(path)) for path in read], **limits.inside(),
        }  # fmt: skip


def _bubblewrap(limits: Limits) -> list[str]:
    """As root it keeps the rights to become another user, which the process inside does at once."""
    program = shutil.which("bwrap")
    if program is None:
        raise FileNotFoundError("bwrap is not installed")
    command = [program, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    if os.geteuid() == 0:
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user"]
    command += ["--die-with-parent", "--new-session"]
    above = {str(part) for path in readable() for part in Path(path).parents}
    for folder in sorted(above - {"/"}):
        command += ["--dir", folder]  # made here, they may be passed by every user
    for path in readable():
        command += ["--ro-bind-try", os.path.realpath(path), path]
    for device in DEVICES:
        command += ["--dev-bind", device, device]
    command += ["--perms", "1777", "--size", str(limits.folder_bytes), "--tmpfs", WORK, "--remount-ro", "/"]
    return [*command, "--chdir", WORK, "--"]


@functools.cache
def interpreter() -> str:
    """The Python itself, behind the links of a virtual environment."""
    return os.path.realpath(sys.executable)


@functools.cache
def readable() -> tuple[str, ...]:
    """What a sandboxed process may read: Python, its libraries, the system's, and the few packages."""
    paths = {interpreter(), str(HERE / "inside")}
    paths |= {sysconfig.get_path(name) for name in ("stdlib", "platstdlib")}
    if sys.base_prefix != "/usr":
        paths |= {str(Path(sys.base_prefix) / "lib")}
    for folder in packages().values():
        paths |= {folder, f"{folder}.libs"}
    there = {path for path in {*paths, *SYSTEM} if Path(path).exists()}
    return tuple(sorted(path for path in there if not there & {str(part) for part in Path(path).parents}))


@functools.cache
def packages() -> dict[str, str]:
    """Folders of the packages that are installed."""
    found = {name: find_spec(name) for name in PACKAGES}
    return {name: str(Path(spec.origin).parent) for name, spec in found.items() if spec and spec.origin}


def environment(work: str) -> dict[str, str]:
    """Nothing of the user's own environment but where the loader finds Python's library."""
    own = {
        "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": work, "TMPDIR": work, "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
    }  # fmt: skip
    return own | {k: os.environ[k] for k in ("LD_LIBRARY_PATH",) if k in os.environ}


def open_to_all(path: str) -> bool:
    """Whether every user can reach a path: all folders above it may be passed."""
    real = Path(path).resolve()
    return all(part.stat().st_mode & stat.S_IXOTH for part in real.parents)
