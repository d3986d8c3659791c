"""Values across the border between a program and its tests."""

from __future__ import annotations

import collections
import json
import math
import os
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcli.sandbox.inside.wire import Closed, Link, NotPlain, decode, encode


def sent(value: Any) -> Any:
    return decode(json.loads(json.dumps(encode(value))))


HASHABLE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3),
    max_leaves=6,
)
PLAIN = st.recursive(
    HASHABLE | st.complex_numbers(allow_nan=False) | st.decimals(allow_nan=False) | st.fractions(),
    lambda inner: st.lists(inner) | st.dictionaries(HASHABLE, inner) | st.tuples(inner) | st.sets(HASHABLE),
    max_leaves=12,
)


def types(value: Any) -> Any:
    """The types of a value and of all in it."""
    if isinstance(value, dict):
        return dict, [(types(k), types(v)) for k, v in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [types(item) for item in value]
    return type(value)


@given(PLAIN)
def test_plain_values_arrive_equal_and_of_the_same_type(value: Any) -> None:
    got = sent(value)
    assert got == value and types(got) == types(value)


EDGES = [math.nan, -0.0, math.inf, "\ud800", 1 << 100_000, -(1 << 63), (1 << 63) - 1, bytearray(b"x"), range(3, 9, 2)]


@pytest.mark.parametrize("value", EDGES, ids=range(len(EDGES)))
def test_edges_arrive_as_they_are(value: Any) -> None:
    got = sent(value)
    assert type(got) is type(value) and (got == value or (got != got and value != value))
    if value == 0:
        assert math.copysign(1, got) == -1


def test_subclasses_become_the_type_below_them() -> None:
    class Yes(int):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = int.__hash__

    class Sneaky(list[int]):
        def __iter__(self) -> Any:
            return iter([1, 2, 3])

    assert type(sent(Yes(1))) is int and sent(Yes(1)) != 2
    assert sent(Sneaky()) == []
    assert type(sent(collections.OrderedDict(a=1))) is dict and sent(collections.Counter("aab")) == {"a": 2, "b": 1}
    assert sent(np.float64(0.5)) == 0.5 and sent(np.bool_(True)) is True and sent(np.int32(7)) == 7
    point = collections.namedtuple("point", "x y")(1, 2)
    assert sent(point) == (1, 2) and type(sent(point)) is tuple


def test_iterators_stay_iterators() -> None:
    got = sent(n * n for n in range(4))
    assert got != [0, 1, 4, 9] and list(got) == [0, 1, 4, 9]
    assert sorted(sent({"b": 1, "a": 2}.keys())) == ["a", "b"]
    assert sum(sent(collections.deque([1, 2]))) == 3


@pytest.mark.parametrize("value", [object(), len, int, np.zeros(3), Exception("x"), {1: object()}, [lambda: 0]])
def test_what_is_no_plain_data_is_refused(value: Any) -> None:
    with pytest.raises(NotPlain):
        encode(value)


def test_a_list_within_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(RecursionError):
        encode(loop)


@pytest.mark.parametrize(
    "data", [{"a": 1}, ["nothing", 1], ["list"], ["int", "x"], [["list"], []], ["dict", [[1]]], []]
)
def test_what_nothing_encodes_to_is_refused(data: Any) -> None:
    with pytest.raises((ValueError, TypeError, IndexError, LookupError)):
        decode(data)


def test_rare_numbers() -> None:
    assert sent(Decimal("0.10")) == Decimal("0.10") and sent(Fraction(1, 3)) == Fraction(1, 3)


def test_a_frame_too_long_or_cut_is_an_error() -> None:
    read, write = os.pipe()
    link = Link(read, write)
    link.send({"a": [1, 2]})
    assert link.receive() == {"a": [1, 2]}
    os.write(write, b"\xff\xff\xff\xff")
    with pytest.raises(ValueError, match="a message of 4294967295 bytes"):
        link.receive()
    os.write(write, b"\0\0\0\x09{")
    os.close(write)
    with pytest.raises(Closed):
        link.receive()
    os.close(read)
