"""Signals and the time limit ask; the work in hand is finished; old handlers come back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from kvcli.engine.stop import StopRequest
from kvcli.errors import Exit

WORK = """
import sys, time
from kvcli.engine.stop import StopRequest
with StopRequest() as stop:
    print("ready", flush=True)
    for i in range(2000):
        time.sleep(0.01)
        if stop.asked():
            print(stop.reason, flush=True)
            sys.exit(int(stop.asked()))
"""


@pytest.mark.parametrize(
    "number, code, reason",
    [
        (signal.SIGTERM, 75, "SIGTERM"),
        (signal.SIGUSR1, 75, "SIGUSR1"),
        (signal.SIGUSR2, 75, "SIGUSR2"),
        (signal.SIGINT, 130, "Ctrl-C"),
    ],
)
def test_signals_end_a_process_in_order(number, code, reason):
    process = subprocess.Popen([sys.executable, "-c", WORK], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.communicate(timeout=30)[0] == f"{reason}\n"
    assert process.returncode == code


def test_handlers_are_put_back():
    before = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    }
    with StopRequest():
        assert all(signal.getsignal(number) != handler for number, handler in before.items())
    assert {number: signal.getsignal(number) for number in before} == before


def test_handlers_are_put_back_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), StopRequest():
        raise RuntimeError
    assert signal.getsignal(signal.SIGTERM) == before


def test_nothing_asked():
    with StopRequest() as stop:
        assert stop.asked() is None
        assert stop.reason == ""


def test_a_second_ctrl_c_interrupts_at_once():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked() == Exit.INTERRUPTED
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_counts_after_sigterm():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked() == Exit.STOPPED_EARLY
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked() == Exit.INTERRUPTED


def test_the_time_limit():
    now = [100.0]
    with StopRequest(60, clock=lambda: now[0]) as stop:
        now[0] = 159.9
        assert stop.asked() is None
        now[0] = 160.0
        assert stop.asked() == Exit.STOPPED_EARLY
        assert stop.reason == "--max-time"


def test_outside_the_main_thread_only_time_counts():
    found = []

    def work() -> None:
        with StopRequest(0) as stop:
            found.append(stop.asked())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [Exit.STOPPED_EARLY]
