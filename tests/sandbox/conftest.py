"""The means of this machine, and a world of things that a program must not reach."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvcli.sandbox import means, probe, process
from kvcli.sandbox.means import SAFE, Means

SECRET = "the secret text 8d1f"
VICTIM = "the victim's text"


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow) if name == "landlock" else name for name in SAFE])
def way(request: pytest.FixtureRequest) -> Means:
    """Each means that works here."""
    why = probe.problem(request.param)
    if why:
        pytest.skip(f"{request.param} does not work on this machine: {why}")
    return Means(request.param)


def pids() -> list[int]:
    return [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()]


@dataclass
class World:
    """Files, a process and servers that nothing but their modes and the sandbox protects."""

    folder: Path
    port: int
    udp: int
    abstract: str
    sleeper: subprocess.Popen[bytes]
    mark: str
    servers: list[socket.socket]

    def constants(self) -> str:
        """Python text that tells a program where everything is."""
        return (
            f"SECRET = {str(self.folder / 'secret')!r}\nVICTIM = {str(self.folder / 'victim')!r}\n"
            f"OUTSIDE = {str(self.folder / 'open' / 'new')!r}\nFOLDER = {str(self.folder)!r}\n"
            f"PORT = {self.port}\nUDP = {self.udp}\nABSTRACT = {self.abstract!r}\n"
            f"SLEEPER = {self.sleeper.pid}\nPARENT = {os.getpid()}\n"
        )

    def unharmed(self) -> None:
        """Fails where anything was changed, used or left behind."""
        assert (self.folder / "secret").read_text() == SECRET
        assert (self.folder / "victim").read_text() == VICTIM
        assert (self.folder / "victim").stat().st_mode & 0o777 == 0o644
        assert sorted(p.name for p in self.folder.iterdir()) == ["open", "secret", "tmp", "victim"]
        assert list((self.folder / "open").iterdir()) == [] and list((self.folder / "tmp").iterdir()) == []
        assert self.sleeper.poll() is None, "the victim process was ended"
        for server in self.servers:
            with pytest.raises(BlockingIOError):
                server.accept() if server.type == socket.SOCK_STREAM else server.recv(1)
        assert self.left() == [], "processes were left behind"

    def left(self) -> list[int]:
        """Processes that came out of a sandbox and live on."""
        until = time.monotonic() + 5
        while found := [pid for pid in pids() if self._marked(pid)]:
            if time.monotonic() > until:
                break
            time.sleep(0.02)
        return found

    def _marked(self, pid: int) -> bool:
        try:
            return self.mark.encode() in Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            return False


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Made for the user that programs run as, so that file modes protect nothing from them."""
    folder = Path(tempfile.mkdtemp(prefix="kvcli-world-", dir="/tmp"))
    folder.chmod(0o755)
    user = means.NOBODY if os.geteuid() == 0 else None
    for name, text in (("secret", SECRET), ("victim", VICTIM)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o644)
    (folder / "open").mkdir()
    (folder / "open").chmod(0o777)
    (folder / "tmp").mkdir()
    (folder / "tmp").chmod(0o755)
    if user is not None:
        for name in ("secret", "victim", "open"):
            os.chown(folder / name, user, user)
    mark = f"kvcli-test-{uuid.uuid4().hex}"
    plain = process.environment
    monkeypatch.setattr(process, "environment", lambda work: {**plain(work), "LC_IDENTIFICATION": mark})
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "tmp"))
    monkeypatch.setenv("HF_TOKEN", SECRET)
    sleeper = subprocess.Popen(["sleep", "300"], user=user, env={"TOKEN": SECRET, "PATH": os.environ["PATH"]})
    tcp, udp, unix = socket.socket(), socket.socket(type=socket.SOCK_DGRAM), socket.socket(socket.AF_UNIX)
    tcp.bind(("127.0.0.1", 0))
    udp.bind(("127.0.0.1", 0))
    unix.bind(f"\0{mark}")
    for server in (tcp, unix):
        server.listen()
    for server in (tcp, udp, unix):
        server.setblocking(False)
    try:
        yield World(folder, tcp.getsockname()[1], udp.getsockname()[1], f"\0{mark}", sleeper, mark, [tcp, udp, unix])
    finally:
        sleeper.kill()
        sleeper.wait()
        for server in (tcp, udp, unix):
            server.close()
        shutil.rmtree(folder)
