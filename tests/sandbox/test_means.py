"""Choosing a means, refusing where there is none, and the seccomp filter itself."""

from __future__ import annotations

import os
import re
import struct
import warnings
from pathlib import Path

import pytest

from kvcli import sandbox
from kvcli.errors import Exit, KvcliError
from kvcli.sandbox import means, probe
from kvcli.sandbox.inside import seccomp
from kvcli.sandbox.limits import Program
from kvcli.sandbox.means import SAFE, Means

DOUBLE = Program("def f(x):\n    return x * 2\n", "f", "def check(candidate):\n    assert candidate(2) == 4\n")


@pytest.fixture(autouse=True)
def as_before():
    yield
    sandbox.configure(unsafe=False, warn=warnings.warn)


@pytest.fixture
def no_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "problem", lambda name: f"not for {name}")


@pytest.mark.sandbox
def test_this_machine_has_a_means_and_it_is_the_strongest() -> None:
    """Machines that run these tests have one; CI asks for it by KVCLI_REQUIRE=sandbox."""
    works = [name for name in SAFE if not probe.problem(name)]
    if not works:
        pytest.skip("no means works on this machine")
    assert sandbox.usable() == Means(works[0])


@pytest.mark.parametrize("missing", range(len(SAFE)))
def test_the_next_means_is_taken_where_the_stronger_ones_fail(missing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "problem", lambda name: "no" if name in SAFE[:missing] else "")
    assert sandbox.usable() == Means(SAFE[missing])


def test_without_a_means_it_is_refused(no_means: None) -> None:
    with pytest.raises(KvcliError, match="cannot be run safely on this machine") as caught:
        sandbox.usable()
    assert caught.value.code == Exit.ENVIRONMENT
    for name in SAFE:
        assert f"{name}: not for {name}" in caught.value.given
    assert "bubblewrap" in caught.value.fix and "--unsafe-exec" in caught.value.fix
    with pytest.raises(KvcliError):
        sandbox.run(DOUBLE)


@pytest.mark.sandbox
def test_unsafe_exec_warns_once_and_runs(no_means: None) -> None:
    said: list[str] = []
    sandbox.configure(unsafe=True, warn=said.append)
    assert sandbox.run(DOUBLE).passed
    assert not sandbox.run(Program("def f(x):\n    while True: pass", "f", DOUBLE.test)).passed
    assert len(said) == 1 and said[0].startswith("--unsafe-exec: programs that the model writes run as your user")


@pytest.mark.sandbox
def test_unsafe_exec_says_nothing_where_a_sandbox_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "problem", lambda name: "")
    said: list[str] = []
    sandbox.configure(unsafe=True, warn=said.append)
    assert sandbox.usable() == Means(SAFE[0]) and said == []


@pytest.mark.sandbox
def test_a_means_that_lets_something_through_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its filter and its rules, the landlock means reaches what it must not; the probe sees it."""
    monkeypatch.setattr(Means, "confinement", _as_unsafe(Means.confinement))
    monkeypatch.setattr(means, "BOOT", _without_walls(means.BOOT))
    probe.problem.cache_clear()
    found = probe.problem("landlock")
    probe.problem.cache_clear()
    assert "read a file outside" in found and "used the network" in found


def _as_unsafe(plain):
    return lambda self, limits, work: {**plain(self, limits, work), "means": "unsafe"}


def _without_walls(boot: str) -> str:
    """The inner modules with landlock and seccomp that always fail, which the unsafe means tolerates."""
    head, _, entry = boot.rpartition("import kvcli.sandbox.inside.main")
    cut = "from kvcli.sandbox.inside import landlock, seccomp\ndef no(*a): raise OSError('none')\n"
    return f"{head}{cut}landlock.rules = seccomp.apply = no\nimport kvcli.sandbox.inside.main{entry}"


def test_a_missing_bubblewrap_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    probe.problem.cache_clear()
    assert "bwrap is not installed" in probe.problem("bubblewrap")
    probe.problem.cache_clear()


def test_a_machine_without_a_filter_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "uname", lambda: type("U", (), {"machine": "riscv64"})())
    with pytest.raises(OSError, match="no seccomp filter for riscv64"):
        seccomp.apply()


HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}


@pytest.mark.parametrize("machine", HEADERS)
def test_the_numbers_are_the_kernel_s(machine: str) -> None:
    if not HEADERS[machine].is_file():
        pytest.skip(f"no {HEADERS[machine]}")
    found = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", HEADERS[machine].read_text()))
    column = seccomp.ARCHITECTURES[machine][1]
    for name, numbers in seccomp.table(seccomp.TABLE.replace("\n#", "\n#")).items():
        assert numbers[column] == (int(found[name]) if name in found else None), name


def verdict(machine: str, number: int, *args: int, arch: int | None = None) -> int:
    """What the filter says of a call: classic BPF by its manual (linux Documentation/networking/filter.rst)."""
    arch = seccomp.ARCHITECTURES[machine][0] if arch is None else arch
    data = struct.pack("<IIQ6Q", number, arch, 0, *[*args, 0, 0, 0, 0, 0, 0][:6])
    program, at, value = seccomp.program(machine), 0, 0
    while True:
        code, yes, no, k = program[at]
        at += 1
        if code == seccomp.LOAD:
            (value,) = struct.unpack_from("<I", data, k)
        elif code == seccomp.RETURN:
            return k
        else:
            holds = {seccomp.EQUAL: value == k, seccomp.GREATER_EQUAL: value >= k, seccomp.ANY_BIT: bool(value & k)}
            at += yes if holds[code] else no


@pytest.mark.parametrize("machine", seccomp.ARCHITECTURES)
def test_what_the_filter_lets_through(machine: str) -> None:
    column = seccomp.ARCHITECTURES[machine][1]
    numbers = {name: n[column] for name, n in seccomp.table(seccomp.TABLE).items() if n[column] is not None}
    refused, missing = seccomp.REFUSE | seccomp.EPERM, seccomp.REFUSE | seccomp.ENOSYS
    closer = seccomp.calls(machine)[1]
    assert set(closer) == {"clone", "clone3", "prlimit64", "sched_setaffinity", "fcntl", "ioctl", "prctl"}
    for name, number in numbers.items():
        if name not in closer:
            assert verdict(machine, number) == refused, name
    read_write_mmap = {"x86_64": (0, 1, 9), "aarch64": (63, 64, 222)}[machine]
    assert [verdict(machine, n) for n in read_write_mmap] == [seccomp.ALLOW] * 3
    thread = 0x3D0F00
    assert verdict(machine, numbers["clone"], thread) == seccomp.ALLOW
    assert verdict(machine, numbers["clone"], 17) == refused
    assert verdict(machine, numbers["clone3"]) == missing
    assert verdict(machine, numbers["prlimit64"], 0) == seccomp.ALLOW
    assert verdict(machine, numbers["prlimit64"], 1) == refused
    assert verdict(machine, numbers["fcntl"], 3, 1) == seccomp.ALLOW
    assert verdict(machine, numbers["fcntl"], 3, 8) == refused
    assert verdict(machine, numbers["ioctl"], 0, 0x5401) == seccomp.ALLOW
    assert verdict(machine, numbers["ioctl"], 0, 0x5412) == refused
    assert verdict(machine, numbers["prctl"], 15) == seccomp.ALLOW
    assert verdict(machine, numbers["prctl"], 1) == verdict(machine, numbers["prctl"], 1 | 1 << 32, 9) == refused
    assert verdict(machine, 451) == verdict(machine, 0x40000000 | 39) == missing
    assert verdict(machine, read_write_mmap[0], arch=0x40000003) == seccomp.KILL


def test_the_sandbox_shows_nothing_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert "HF_TOKEN" not in means.environment("/x")
    shown = means.readable()
    assert not any(path in ("/", "/root", "/home", "/tmp", "/etc", "/usr") for path in shown)
    root = str(Path(sandbox.__file__).parents[2])
    assert root not in shown and str(Path.home()) not in shown
