"""Values between the process under test and the checker: frames of JSON, plain data only.

A value arrives as an object of the built-in type that the text names, whatever class it had before: an object whose
`__eq__` always says yes cannot be sent.
"""

from __future__ import annotations

import collections
import json
import os
import struct
from collections.abc import Iterable, Iterator
from typing import Any

MOST = 16 << 20
"""Bytes of the longest frame that is read."""
KINDS: tuple[Any, ...] = (list, tuple, set, frozenset)
MAKERS = {kind.__name__: kind for kind in KINDS}
PLAIN = 1 << 63
"""Whole numbers from here on travel in base 16, which takes linear time."""


class Closed(Exception):
    """The other side is gone."""


class NotPlain(TypeError):
    """A value that is no plain data."""


class Link:
    """Two file descriptors: one to read frames from, one to write frames to."""

    def __init__(self, read: int, write: int) -> None:
        self.read, self.write = read, write

    def send(self, message: Any) -> None:
        data = json.dumps(message).encode()
        data = struct.pack("!I", len(data)) + data
        try:
            while data:
                data = data[os.write(self.write, data) :]
        except OSError as e:
            raise Closed(str(e)) from e

    def receive(self) -> Any:
        """The next message. Raises Closed at the end, ValueError for a frame that is too long or is not JSON."""
        (size,) = struct.unpack("!I", self._exactly(4))
        if size > MOST:
            raise ValueError(f"a message of {size} bytes")
        return json.loads(self._exactly(size))

    def _exactly(self, size: int) -> bytes:
        parts = []
        while size:
            part = os.read(self.read, min(size, 1 << 16))
            if not part:
                raise Closed("end of the pipe")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


def encode(value: Any) -> Any:
    """JSON for a value. Subclasses of built-in types become these; iterators become one over the same items.

    Raises NotPlain for anything else, RecursionError for a list within itself.
    """
    if value is None or isinstance(value, bool | float | str):
        return value
    if isinstance(value, int):
        return value if -PLAIN < value < PLAIN else ["int", hex(value)]
    for kind in KINDS:
        if isinstance(value, kind):
            return [kind.__name__, [encode(item) for item in kind.__iter__(value)]]
    if isinstance(value, dict):
        return ["dict", [[encode(k), encode(v)] for k, v in dict.items(value)]]
    if isinstance(value, bytes | bytearray):
        return [("bytes" if isinstance(value, bytes) else "bytearray"), value.hex()]
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, range):
        return ["range", [encode(n) for n in (value.start, value.stop, value.step)]]
    return _rarer(value)


def _rarer(value: Any) -> Any:
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    if name in ("decimal.Decimal", "fractions.Fraction"):
        return [name, str(value)]
    if name.startswith("numpy.") and getattr(value, "ndim", None) == 0:
        return encode(value.item())
    views = collections.abc.MappingView | collections.deque | Iterator
    if isinstance(value, views) and isinstance(value, Iterable):
        return ["iterator", [encode(item) for item in value]]
    raise NotPlain(f"a {name} is not plain data")


def decode(data: Any) -> Any:
    """The value of `encode`. Raises ValueError (or TypeError) for data that nothing encodes to."""
    if not isinstance(data, list):
        if isinstance(data, dict):
            raise ValueError("a bare JSON object")
        return data
    kind, *rest = data
    if not isinstance(kind, str):
        raise ValueError("no kind")
    if kind in MAKERS:
        return MAKERS[kind](decode(item) for item in rest[0])
    if kind == "iterator":
        return iter([decode(item) for item in rest[0]])
    if kind == "dict":
        return {decode(k): decode(v) for k, v in rest[0]}
    if kind == "int":
        return int(rest[0], 16)
    if kind in ("bytes", "bytearray"):
        return (bytes if kind == "bytes" else bytearray).fromhex(rest[0])
    if kind == "complex":
        return complex(*rest)
    if kind == "range":
        return range(*(decode(n) for n in rest[0]))
    if kind == "decimal.Decimal":
        from decimal import Decimal

        return Decimal(rest[0])
    if kind == "fractions.Fraction":
        from fractions import Fraction

        return Fraction(rest[0])
    raise ValueError(f"unknown kind {str(kind)[:20]!r}")
