"""Hostile programs: each gives the right answers only if its attack succeeds. None does, and nothing is harmed."""

from __future__ import annotations

import textwrap

import pytest

from kvcli.sandbox.judging import judge
from kvcli.sandbox.limits import MIB, Limits, Program
from kvcli.sandbox.means import Means

pytestmark = pytest.mark.sandbox

TEST = """
def check(candidate):
    assert candidate(2) == 4
    assert candidate(21) == 42
"""
SMALL = Limits(cpu_seconds=1, wall_seconds=3.0, output_bytes=MIB)

CALLED = {
    "forks without end": "import os\npid = os.fork()\nwhile pid == 0: os.fork()",
    "starts a program": "import subprocess\nsubprocess.run(['/bin/true'], check=True)",
    "starts a shell that writes outside": "import os\nassert os.system(f'echo x > {OUTSIDE}') == 0",
    "becomes another program": "import os\nos.execv('/bin/sleep', ['sleep', '60'])",
    "spawns without fork": "import os\nos.posix_spawn('/bin/true', ['true'], {})",
    "starts ten thousand threads": """
        import threading, time
        for _ in range(10_000): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()""",
    "takes 8 GiB at once": "big = bytearray(8 << 30)",
    "takes memory bit by bit": "big = []\nwhile len(big) < 4096: big.append(bytearray(1 << 20))",
    "raises its own limits": """
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
        big = bytearray(2 << 30)""",
    "hides memory in a file of memory": "import os\nfd = os.memfd_create('x')\nos.ftruncate(fd, 4 << 30)",
    "loops without end": "while True: pass",
    "loops and ignores signals": """
        import signal
        for s in range(1, 64):
            try: signal.signal(s, signal.SIG_IGN)
            except (OSError, ValueError): pass
        while True: pass""",
    "waits without end": "import time\ntime.sleep(3600)",
    "prints without end": "while True: print('passed' * 1000)",
    "writes to the terminal without end": "import os\nwhile True: os.write(2, b'x' * 65536)",
    "closes everything and waits": "import os, time\nos.closerange(0, 64)\ntime.sleep(3600)",
    "reads a secret file": "text = open(SECRET).read()",
    "reads a secret file by its folder": "import os\nos.open('secret', 0, dir_fd=os.open(FOLDER, os.O_RDONLY))",
    "reads a secret file through a link": "import os\nos.symlink(SECRET, 'link')\nopen('link').read()",
    "reads a secret file through a hard link": "import os\nos.link(SECRET, 'link')\nopen('link').read()",
    "reads the list of users": "open('/etc/passwd').read()",
    "lists a home": "import os\nassert os.listdir('/root') or os.listdir('/home')",
    "reads its environment for a token": "import os\nassert 'HF_TOKEN' in os.environ",
    "reads another process's environment": "open(f'/proc/{SLEEPER}/environ', 'rb').read()",
    "reads kvcli's environment": "open(f'/proc/{PARENT}/environ', 'rb').read()",
    "looks at another process's memory": "assert open(f'/proc/{SLEEPER}/maps', 'rb').read()",
    "writes a file outside": "open(OUTSIDE, 'w').write('x')",
    "writes to a file of its own user": "open(VICTIM, 'a').write('x')",
    "writes through a link": "import os\nos.symlink(VICTIM, 'link')\nopen('link', 'w').write('x')",
    "removes a file": "import os\nos.remove(VICTIM)",
    "renames a file": "import os\nos.rename(VICTIM, 'mine')",
    "cuts a file": "import os\nos.truncate(VICTIM, 0)",
    "changes a file's mode": "import os\nos.chmod(VICTIM, 0o777)",
    "changes a file's mode by the kernel's number": """
        import ctypes, os
        assert ctypes.CDLL(None).fchmodat(-100, VICTIM.encode(), 0o777, 0) == 0""",
    "makes a folder outside": "import os\nos.mkdir(OUTSIDE)",
    "writes to the library": "import os\nopen(os.__file__, 'a').write('x')",
    "writes to kvcli": "import sys\nopen(sys.modules['kvcli.sandbox.inside.checker'].__file__, 'a').write('')",
    "writes to the shared memory": "open('/dev/shm/kvcli-hostile', 'w').write('x')",
    "makes a shared memory block": "from multiprocessing import shared_memory as s\ns.SharedMemory(None, True, 64)",
    "fills the disk": "for i in range(80):\n    with open(f'f{i}', 'wb') as f: f.write(b'x' * (15 << 20))",
    "writes one huge file": "import os\nwith open('f', 'wb') as f:\n    for _ in range(100): f.write(b'x' * (1 << 20))",
    "connects to a server": "import socket\nsocket.create_connection(('127.0.0.1', PORT), 1)",
    "sends a datagram": """
        import socket
        socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', UDP))""",
    "connects to a local socket": "import socket\nsocket.socket(socket.AF_UNIX).connect(ABSTRACT)",
    "opens a server": "import socket\nsocket.create_server(('127.0.0.1', 0))",
    "asks for the network's cards": "import socket\nassert socket.if_nameindex()",
    "kills kvcli": "import os\nos.kill(PARENT, 9)",
    "kills its parent": "import os\nos.kill(os.getppid() or SLEEPER, 9)",
    "kills a process of its own user": "import os\nos.kill(SLEEPER, 9)",
    "kills everything it may": "import os\nos.kill(-1, 9)",
    "kills a group": "import os\nos.killpg(SLEEPER, 9)",
    "kills by a process descriptor": "import os, signal\nsignal.pidfd_send_signal(os.pidfd_open(SLEEPER), 9)",
    "stops itself": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
    "lets the kernel send signals": """
        import fcntl
        with open('f', 'w') as f: fcntl.fcntl(f, fcntl.F_SETOWN, SLEEPER)""",
    "takes CPU time from another process": "import resource\nresource.prlimit(SLEEPER, resource.RLIMIT_CPU, (0, 0))",
    "slows another process down": "import os\nos.setpriority(os.PRIO_PROCESS, SLEEPER, 19)",
    "traces another process": "import ctypes\nassert ctypes.CDLL(None).ptrace(16, SLEEPER, 0, 0) == 0",
    "lives on when kvcli is killed": "import ctypes\nassert ctypes.CDLL(None).prctl(1, 0, 0, 0, 0) == 0",
    "becomes root": "import os\nos.setuid(0)\nassert os.geteuid() == 0",
    "makes name spaces": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "mounts": "import ctypes\nassert ctypes.CDLL(None).mount(b'tmpfs', b'/', b'tmpfs', 0, None) == 0",
    "changes its root": "import os\nos.chroot('.')",
    "leaves its group": "import os\nos.setsid()",
    "ends with status 0": "import os\nos._exit(0)",
    "ends politely": "import sys\nsys.exit(0)",
    "crashes": "import ctypes\nctypes.string_at(0)",
    "overflows the stack": "import sys\nsys.setrecursionlimit(10**9)\ndef g(n): return g(n + 1) + 1\ng(0)",
    "raises what has no end": """
        class Evil(Exception):
            def __str__(self):
                while True: pass
        raise Evil""",
}  # fmt: skip
"""What the attack is, and its code inside the function under test; behind it the right answer is given."""

ANSWERS = {
    "says that all is equal": """
        class Yes:
            def __eq__(self, other): return True
        def f(x): return Yes()""",
    "says that all is equal as a number": """
        class Yes(int):
            def __eq__(self, other): return True
            def __hash__(self): return 0
        def f(x): return Yes(1)""",
    "says that all is equal as a list": """
        class Yes(list):
            def __eq__(self, other): return True
            def __ne__(self, other): return False
        def f(x): return Yes()""",
    "prints that it passed": """
        print('passed'); print('{"state": "passed", "why": ""}', flush=True)
        def f(x): print('{"state": "passed", "why": ""}', flush=True)""",
    "says so to every descriptor": """
        import os
        def f(x):
            for fd in range(64):
                try: os.write(fd, b'{"state": "passed", "why": ""}\\n')
                except OSError: pass""",
    "says so at its end": """
        import atexit
        atexit.register(print, '{"state": "passed", "why": ""}')
        def f(x): raise SystemExit(0)""",
    "answers in the checker's place": """
        import json, os, struct
        def f(x):
            for fd in range(3, 64):
                for m in ({'state': 'passed', 'why': ''}, {'value': 4}, {'value': 4}, {'value': True}):
                    d = json.dumps(m).encode()
                    try: os.write(fd, struct.pack('!I', len(d)) + d)
                    except OSError: pass""",
    "sends a frame that never ends": """
        import os, struct
        def f(x):
            for fd in range(3, 64):
                try: os.write(fd, struct.pack('!I', 0xFFFFFFFF))
                except OSError: pass
            while True: pass""",
    "patches the checker": """
        import builtins, sys
        checker = sys.modules.get('kvcli.sandbox.inside.checker')
        for name in ('check', '_verdict', '_first'):
            setattr(checker, name, lambda *a, **k: ('passed', ''))
        class Never(Exception): pass
        builtins.AssertionError = Never
        builtins.compile = builtins.exec = lambda *a, **k: None
        def f(x): return None""",
    "patches what encodes answers": """
        import sys
        sys.modules['kvcli.sandbox.inside.wire'].encode = lambda v: True
        def f(x): return None""",
    "looks for the tests in memory": """
        import gc
        def f(x):
            wanted = ''.join(reversed('etadidnac tressa'))
            for o in gc.get_objects():
                if isinstance(o, dict) and any(wanted in v for v in o.values() if type(v) is str): return x * 2""",
    "looks for the tests in the frames": """
        import sys
        def f(x):
            frame = sys._getframe()
            while frame:
                if 'check' in frame.f_globals and 'test' in str(frame.f_locals.get('job', '')): return x * 2
                frame = frame.f_back""",
    "looks for the tests in its input": """
        import os
        def f(x):
            for fd in range(64):
                try:
                    os.set_blocking(fd, False)
                    found = os.read(fd, 1 << 20)
                    found += os.pread(fd, 1 << 20, 0)
                except OSError: continue
                if b'assert candidate' in found: return x * 2""",
    "looks for the tests in files": """
        import os
        def f(x):
            for top in ('/', '.', '/tmp', '/proc'):
                for root, _, names in os.walk(top):
                    for name in names:
                        if name.endswith('.jsonl'): return x * 2""",
    "answers with too much": "def f(x): return [0] * 10**8",
    "answers with a tower of lists": """
        def f(x):
            y = []
            for _ in range(10**5): y = [y]
            return y""",
    "answers with a list within itself": "def f(x):\n    y = []\n    y.append(y)\n    return y",
    "answers without end": "import itertools\ndef f(x): return itertools.count()",
    "answers with a huge number": "def f(x): return 1 << 10**8",
    "answers with a number that is huge when used": "import decimal\ndef f(x): return decimal.Decimal('1e999999999')",
    "loops while it is defined": "while True: pass\ndef f(x): return x * 2",
    "ends while it is defined": "import os\nos._exit(0)\ndef f(x): return x * 2",
    "does not define the function": "g = 1",
    "is no Python": "def f(x) return x * 2",
    "is nested too deeply": "def f(x): return " + "(" * 5000 + "x" + ")" * 5000,
    "is a null byte": "def f(x): return x * 2\0",
    "leaves locked and deep folders": """
        import os
        def f(x):
            for i in range(3000):
                try:
                    os.mkdir('d')
                    os.chdir('d')
                except OSError: break
            os.mkdir('locked', 0)""",
    "leaves threads behind": """
        import threading, time
        def f(x):
            for _ in range(8): threading.Thread(target=time.sleep, args=(60,)).start()""",
}  # fmt: skip
"""Programs that answer wrongly or not at all and try to be counted as right."""


def attack(code: str) -> str:
    body = textwrap.indent(textwrap.dedent(code).strip("\n"), "    ")
    return f"def f(x):\n{body}\n    return x * 2\n"


def test_there_are_more_than_thirty() -> None:
    assert len(CALLED) + len(ANSWERS) >= 30


def test_the_right_answer_passes_so_an_attack_that_worked_would_too(way: Means, world) -> None:
    source = world.constants() + attack("import os, threading\nassert os.getcwd()\nopen('own', 'w').write('x')")
    verdict = judge(Program(source, "f", TEST), SMALL, way)
    assert verdict.passed, verdict
    world.unharmed()


@pytest.mark.parametrize("name", CALLED)
def test_an_attack_fails_and_harms_nothing(name: str, way: Means, world) -> None:
    verdict = judge(Program(world.constants() + attack(CALLED[name]), "f", TEST), SMALL, way)
    assert verdict.reason in ("raised", "timeout", "output", "died"), verdict
    world.unharmed()


@pytest.mark.parametrize("name", ANSWERS)
def test_a_wrong_answer_is_not_taken_for_right(name: str, way: Means, world) -> None:
    source = world.constants() + textwrap.dedent(ANSWERS[name])
    verdict = judge(Program(source, "f", TEST), SMALL, way)
    assert not verdict.passed
    world.unharmed()
