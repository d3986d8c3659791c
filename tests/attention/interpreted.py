"""A process that runs the Triton kernels in Triton's interpreter, for tests on machines without a GPU.

Triton reads TRITON_INTERPRET when it is imported, so the kernels of a test process that may have imported Triton before
cannot be interpreted: they run here. Requests and answers are pickled (function of triton_sums, arguments) and results,
each behind its length.
"""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import traceback
from pathlib import Path
from typing import IO, Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def send(pipe: IO[bytes], message: Any) -> None:
    buffer = io.BytesIO()
    torch.save(message, buffer)
    pipe.write(struct.pack("<q", buffer.tell()) + buffer.getvalue())
    pipe.flush()


def receive(pipe: IO[bytes]) -> Any:
    head = pipe.read(8)
    if len(head) < 8:
        raise EOFError("the interpreter process ended; its message is above")
    return torch.load(io.BytesIO(pipe.read(struct.unpack("<q", head)[0])), weights_only=False)


class Interpreter:
    """The other process, seen from a test: interpreter.column_sums(...) as triton_sums.column_sums(...)."""

    def __init__(self) -> None:
        env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)

    def column_sums(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert self.process.stdin and self.process.stdout
        send(self.process.stdin, (args, kwargs))
        result = receive(self.process.stdout)
        if isinstance(result, str):
            raise AssertionError(result)
        return result

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(timeout=30)


def multiply_bfloat16() -> None:
    """Triton's interpreter stores bfloat16 as 16-bit integers and multiplies these; here it widens them first."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    class Widened:
        def __init__(self, handle: Any) -> None:
            self.data = (handle.data.astype(np.uint32) << 16).view(np.float32)
            self.dtype = tl.float32

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        wide = [Widened(x) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)]
        return original(self, *wide, *rest)

    original = interpreter.InterpreterBuilder.create_dot
    interpreter.InterpreterBuilder.create_dot = create_dot


def main() -> None:
    answers, requests = os.fdopen(os.dup(1), "wb"), sys.stdin.buffer
    os.dup2(2, 1)  # what a library prints must not mix with the answers
    from kvcli.attention import triton_sums

    torch.set_num_threads(1)
    multiply_bfloat16()
    while True:
        try:
            args, kwargs = receive(requests)
        except EOFError:
            return
        try:
            send(answers, triton_sums.column_sums(*args, **kwargs))
        except Exception:  # whatever it is, the test that asked shows it
            send(answers, traceback.format_exc())


if __name__ == "__main__":
    main()
