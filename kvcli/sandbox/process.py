"""Starts a sandboxed process with its job, and ends it with all that it started."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvcli.sandbox.limits import Limits
from kvcli.sandbox.means import NOBODY, WORK, Means, environment

MOST_ENTRIES = 10_000
"""Files and folders in a temporary folder that is looked through."""


class StartError(Exception):
    """A sandboxed process could not be started: a fault of the machine, not of the program."""


@dataclass
class Confined:
    """A running process. `output`: the descriptor its prints come from; `work`: its real temporary folder, if any."""

    process: subprocess.Popen[bytes]
    output: int
    work: str | None
    printed: int = 0
    tail: bytes = field(default=b"")
    ended: bool = False

    def take_output(self) -> bool:
        """Reads what there is. False at the end."""
        try:
            data = os.read(self.output, 1 << 16)
        except BlockingIOError:
            return True
        self.printed += len(data)
        self.tail = (self.tail + data)[-2000:]
        return bool(data)

    def last_line(self) -> str:
        lines = self.tail.decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def kill(self) -> None:
        """Ends the whole group and waits for it; number 1 of a process name space takes all others along."""
        if not self.ended:
            self.ended = True
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
            self.process.wait()


def start(means: Means, job: Mapping[str, Any], limits: Limits, descriptors: Sequence[int]) -> Confined:
    """Raises StartError when the process cannot be made."""
    work = WORK if means.own_files else _folder()
    real = None if means.own_files else work
    whole = {**job, "confine": means.confinement(limits, work)}
    try:
        read, write = os.pipe()
        os.set_blocking(read, False)
        task = os.memfd_create("job")
        try:
            with open(task, "wb", closefd=False) as f:
                f.write(json.dumps(whole).encode())
            os.lseek(task, 0, os.SEEK_SET)
            process = subprocess.Popen(
                means.command(limits), stdin=task, stdout=write, stderr=write, pass_fds=descriptors,
                env=environment(work), cwd="/", start_new_session=True,
            )  # fmt: skip
        except BaseException:
            os.close(read)
            raise
        finally:
            os.close(task)
            os.close(write)
    except OSError as e:
        remove(real)
        raise StartError(f"{means.name}: {e}") from e
    except BaseException:
        remove(real)
        raise
    return Confined(process, read, real)


def _folder() -> str:
    folder = tempfile.mkdtemp(prefix="kvcli-program-")
    if os.geteuid() == 0:
        os.chown(folder, NOBODY, NOBODY)
    return folder


def too_large(folder: str, most: int) -> bool:
    """Whether a temporary folder holds more than that, or more files than can be looked through."""
    size, entries, waiting = 0, 0, [folder]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as found:
                for entry in found:
                    entries += 1
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    size += entry.stat(follow_symlinks=False).st_size
                    if size > most or entries > MOST_ENTRIES:
                        return True
        except FileNotFoundError:
            continue
        except OSError:
            return True  # locked, or too deep
    return False


def remove(folder: str | None) -> None:
    """Removes a temporary folder however deep it is and whatever its folders' modes are."""
    if folder is None:
        return
    with contextlib.suppress(OSError):
        Path(folder).rmdir()  # nearly all are empty
        return
    for command in (["chmod", "-R", "u+rwx", folder], ["rm", "-rf", folder]):
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)


class Descriptors:
    """Pipes of one judgement: each end is closed once, at the latest at the end."""

    def __init__(self) -> None:
        self.open: set[int] = set()

    def __enter__(self) -> Descriptors:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(*self.open)

    def pipe(self) -> tuple[int, int]:
        ends = os.pipe()
        self.open |= set(ends)
        return ends

    def close(self, *ends: int) -> None:
        for end in ends:
            self.open.discard(end)
            os.close(end)
