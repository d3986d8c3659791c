"""User errors say what is wrong, what was given and what to do; the command line turns them into exit codes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from kvcli.cli import app
from kvcli.errors import Exit, KvcliError, unknown


def test_the_three_lines():
    error = KvcliError("unknown method 'snapvk'", given="--method snapvk", fix="--method snapkv")
    assert error.lines() == ["error: unknown method 'snapvk'", "  given: --method snapvk", "  try:   --method snapkv"]
    assert error.code == Exit.USAGE
    assert KvcliError("x").lines() == ["error: x"]


def test_the_nearest_name_is_offered():
    error = unknown("method", "snapvk", ["h2o", "snapkv"], given="--method snapvk", listing="kvcli list methods")
    assert error.fix == "snapkv     (kvcli list methods shows all)"
    assert (
        unknown("method", "zzz", ["h2o"], given="", listing="kvcli list methods").fix == "kvcli list methods shows all"
    )


def test_exit_codes_are_the_documented_ones():
    assert {e.name: e.value for e in Exit} == {
        "DONE": 0, "BUG": 1, "USAGE": 2, "FAILED_SAMPLES": 3, "ENVIRONMENT": 4, "STOPPED_EARLY": 75, "INTERRUPTED": 130,
    }  # fmt: skip


@pytest.fixture
def failing(monkeypatch):
    """Makes `kvcli status x` raise a given exception."""

    def set_up(error: BaseException) -> None:
        def command(run: str) -> None:
            raise error

        monkeypatch.setattr("kvcli.cli.status.command", command)

    return set_up


def test_user_errors(kvcli, failing):
    failing(KvcliError("no such thing", given="x", fix="y", code=Exit.ENVIRONMENT))
    done = kvcli("status", "x")
    assert (done.code, done.out, done.err) == (4, "", "error: no such thing\n  given: x\n  try:   y\n")


def test_user_errors_with_traceback_on_demand(kvcli, failing, monkeypatch):
    monkeypatch.setenv("KVCLI_DEBUG", "1")
    failing(KvcliError("no such thing"))
    done = kvcli("status", "x")
    assert done.code == 2
    assert "Traceback" in done.err
    assert done.err.endswith("error: no such thing\n")


@pytest.mark.parametrize(
    "error, code, text",
    [
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), 4, "disk is full"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/gone"), 4, "/gone"),
        (PermissionError(errno.EACCES, "Permission denied", "/private"), 4, "/private"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_the_machine_and_ctrl_c(kvcli, failing, error, code, text):
    failing(error)
    done = kvcli("status", "x")
    assert done.code == code
    assert text in done.err
    assert "Traceback" not in done.err


def test_bugs_keep_their_traceback(kvcli, failing):
    failing(ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError):
        kvcli("status", "x")


@pytest.mark.parametrize(
    "args, what, fix",
    [
        (["swep"], "unknown command 'swep'", "kvcli sweep     (kvcli --help shows all)"),
        (["zzz"], "unknown command 'zzz'", "kvcli --help shows all"),
        (["--nope"], "no such option: --nope", "kvcli --help"),
        (["status", "x", "--jsn"], "no such option: --jsn", "--json     (kvcli status --help shows all)"),
        (["status"], "missing argument 'RUN'", "kvcli status --help"),
        (["status", "a", "b"], "unexpected extra argument", "kvcli status --help"),
        (["list", "--folder"], "option '--folder' requires an argument", "kvcli list --help"),
        (["list", "cows"], "unknown kind 'cows'", "kvcli list methods"),
    ],
)
def test_usage_errors_have_the_same_shape(kvcli, tmp_path, monkeypatch, args, what, fix):
    monkeypatch.chdir(tmp_path)  # where no runs lie: else the newest is offered
    done = kvcli(*args)
    first, given, advice = done.err.splitlines()
    assert done.code == 2
    assert done.out == ""
    assert first.lower().startswith(f"error: {what}".lower())
    assert given == f"  given: {'kvcli ' + ' '.join(args)}"
    assert advice == f"  try:   {fix}" or advice.startswith(f"  try:   {fix}")


def test_a_real_process(kvcli_process):
    done = kvcli_process("swep")
    assert done.code == 2
    assert done.err.splitlines()[0] == "error: unknown command 'swep'"


@pytest.mark.parametrize("args", [["--help"], ["list", "models"], ["list", "models", "--json"]])
def test_a_reader_that_leaves_is_no_error(args):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "kvcli", *args], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert "Broken" not in done.stderr


def test_an_ascii_terminal_gets_escapes_instead_of_an_error(kvcli_process):
    done = kvcli_process("list", "models", PYTHONIOENCODING="ascii")
    assert done.code == 0
    assert "testbed" in done.out


def test_full_and_gone_are_told_apart():
    assert app._environment(OSError(errno.EDQUOT, "Disk quota exceeded")).fix.startswith("free some space")
    assert app._environment(OSError(errno.EINVAL, "Invalid argument")) is None
