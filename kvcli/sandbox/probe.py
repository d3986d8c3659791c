"""Which means work on this machine: each is tried with a small program that attempts what it must not be able to do."""

from __future__ import annotations

import functools
import socket
import tempfile
from pathlib import Path

from kvcli.sandbox.judging import judge
from kvcli.sandbox.limits import Limits, Program
from kvcli.sandbox.means import SAFE, Means, Name
from kvcli.sandbox.process import StartError

ATTEMPTS = """
def attempts(secret, outside, port):
    import os, socket
    done = []
    def attempt(name, act):
        try:
            act()
        except OSError:
            return
        done.append(name)
    def connect():
        with socket.socket() as s:
            s.settimeout(1)
            s.connect(("127.0.0.1", port))
    def fork():
        if os.fork() == 0:
            os._exit(0)
        os.wait()
    attempt("read a file outside", lambda: open(secret).close())
    attempt("wrote a file outside", lambda: open(outside, "w").close())
    attempt("listed the root's home", lambda: os.listdir("/root"))
    attempt("used the network", connect)
    attempt("started a process", fork)
    attempt("signalled a process", lambda: os.kill(os.getppid() or 1, 0))
    if os.geteuid() == 0:
        done.append("stayed root")
    with open("own", "w") as f:
        f.write("x")
    return done
"""
TEST = """
def check(candidate):
    done = candidate({secret!r}, {outside!r}, {port})
    assert done == [], ", ".join(done)
"""


@functools.cache
def problem(name: Name) -> str:
    """Why a means cannot be used on this machine, '' where it can. Tried once in a process."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as server:
        Path(folder).chmod(0o777)
        server.bind(("127.0.0.1", 0))
        server.listen()
        secret = Path(folder, "secret")
        secret.write_text("secret")
        secret.chmod(0o644)
        places = {"secret": str(secret), "outside": str(Path(folder, "outside")), "port": server.getsockname()[1]}
        program = Program(ATTEMPTS, "attempts", TEST.format(**places))
        try:
            verdict = judge(program, Limits(), Means(name))
        except StartError as error:
            return str(error)
        wrote = Path(folder, "outside").exists()
    if verdict.passed and not wrote:
        return ""
    return verdict.why or verdict.reason


def best() -> Means | None:
    """The strongest means that works here."""
    return next((Means(name) for name in SAFE if not problem(name)), None)
