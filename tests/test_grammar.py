"""Texts of --method and --ratio: what they mean, that they survive a round trip, and how mistakes are named."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcli.errors import Exit, KvcliError
from kvcli.grammar import MethodText, Part, parse_methods, parse_ratios, ratio_text, round_half_up

names = st.from_regex(r"[a-z_][a-z0-9_]{0,12}", fullmatch=True)
keys = st.from_regex(r"[a-z_]\w{0,6}(\.[a-z_]\w{0,6})?", fullmatch=True)
folders = st.lists(st.from_regex(r"[A-Za-z0-9_. -]{1,8}", fullmatch=True), max_size=3)
classes = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)


def quotable(text: str) -> bool:
    """Texts without both kinds of quotes, not blank at an end: what the grammar can hold."""
    return not ("'" in text and '"' in text)


plain = st.from_regex(r"[A-Za-z0-9_./:=-]{1,10}", fullmatch=True)
quoted = st.text(st.characters(codec="utf-8"), min_size=1, max_size=15).filter(quotable)
settings = st.lists(st.tuples(keys, plain | quoted), max_size=4, unique_by=lambda pair: pair[0]).map(tuple)


@st.composite
def files(draw: st.DrawFn) -> str:
    start = draw(st.sampled_from(["./", "../", "~/", "/"]))
    return f"{start}{''.join(f + '/' for f in draw(folders))}{draw(names)}.py:{draw(classes)}"


sources = names | files() | classes.map("kvpress:{}".format)
parts = st.builds(Part, sources, settings)
methods = st.builds(MethodText, st.lists(parts, min_size=1, max_size=3).map(tuple))


@given(methods)
def test_one_method_survives_a_round_trip(method):
    assert parse_methods([str(method)]) == [method]


@given(st.lists(methods, min_size=1, max_size=4, unique=True))
def test_a_list_of_methods_survives_a_round_trip(several):
    assert parse_methods([",".join(map(str, several))]) == several
    assert parse_methods(map(str, several)) == several


@given(st.text(alphabet="abk=:,+'\". ~/py", max_size=25))
def test_any_text_is_parsed_or_refused_clearly(text):
    try:
        parsed = parse_methods([text])
    except KvcliError as e:
        assert e.code == Exit.USAGE
        assert e.given
        assert e.fix
    else:
        assert parse_methods([",".join(map(str, parsed))]) == parsed


def test_a_comma_piece_with_a_key_belongs_to_the_part_before_it():
    first, second = parse_methods(["snapkv:window=8,kernel=7,h2o"])
    assert first.parts == (Part("snapkv", (("window", "8"), ("kernel", "7"))),)
    assert second.parts == (Part("h2o"),)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("snapkv+kivi:bits=2", ["snapkv+kivi:bits=2"]),
        ("adakv:base=snapkv,base.window=16", ["adakv:base=snapkv,base.window=16"]),
        ("streaming-llm", ["streaming_llm"]),
        (" snapkv , h2o ", ["snapkv", "h2o"]),
        ("snapkv,snapkv", ["snapkv"]),
        ("a:x='1,2+3',b", ["a:x='1,2+3'", "b"]),
        ('a:x="it\'s"', ['a:x="it\'s"']),
        ("a:x='plain'", ["a:x=plain"]),
        ("./my-methods/mine.py:My,h2o", ["./my-methods/mine.py:My", "h2o"]),
        ("./mine.py:My:window=3", ["./mine.py:My:window=3"]),
        ("~/x.py:My+h2o", ["~/x.py:My+h2o"]),
        ("kvpress:KnormPress:alpha=1", ["kvpress:KnormPress:alpha=1"]),
        ("tier1,all", ["tier1", "all"]),
    ],
)
def test_texts(text, expected):
    assert [str(m) for m in parse_methods([text])] == expected


@pytest.mark.parametrize(
    "text, what, fix",
    [
        ("", "empty", "comma"),
        ("snapkv,,h2o", "empty", "comma"),
        ("window=8", "no method before", "snapkv:window=8"),
        ("snapkv:", "no setting", "snapkv:KEY=VALUE"),
        ("snapkv:window", "not a setting", "KEY=VALUE"),
        ("snapkv:window=", "not a setting", "KEY=VALUE"),
        ("snapkv:window=1,window=2", "given twice", "window="),
        ("snapkv:x='a", "quote is not closed", "'"),
        ("snapkv:x=a'b'", "quotes", "KEY='VALUE'"),
        ("./mine.py", "not a method", "./mine.py:MyMethod"),
        ("snapkv+", "not a method", "list methods"),
        ("sn@pkv", "not a method", "list methods"),
    ],
)
def test_mistakes_in_methods(text, what, fix):
    with pytest.raises(KvcliError) as caught:
        parse_methods([text])
    assert what in caught.value.what
    assert fix in caught.value.fix
    assert text in caught.value.given


@pytest.mark.parametrize(
    "text, expected",
    [
        ("0.1", ["0.1"]),
        ("0.5,0.1", ["0.1", "0.5"]),
        ("0.1..0.9:0.1", [f"0.{i}" for i in range(1, 10)]),
        ("0.1..0.3:0.1,1,0.2", ["0.1", "0.2", "0.3", "1"]),
        ("1.0,1,1.00", ["1"]),
        ("0.05..0.2:0.05", ["0.05", "0.1", "0.15", "0.2"]),
        ("0.3..0.3:0.1", ["0.3"]),
        ("1e-1", ["0.1"]),
    ],
)
def test_ratios(text, expected):
    assert [ratio_text(r) for r in parse_ratios([text])] == expected


def test_ratios_of_several_options_are_joined():
    assert parse_ratios(["0.5", "0.1,0.5"]) == [Decimal("0.1"), Decimal("0.5")]


@pytest.mark.parametrize(
    "text, what",
    [
        ("0", "out of range"),
        ("1.5", "out of range"),
        ("-0.1", "out of range"),
        ("abc", "not a number"),
        ("", "not a number"),
        ("0.1,", "not a number"),
        ("nan", "not a number"),
        ("inf", "not a number"),
        ("0.1..0.9", "no step"),
        ("0.9..0.1:0.1", "descends"),
        ("0.1..0.9:0", "not above 0"),
        ("0.1..0.9:-0.1", "not above 0"),
        ("0.1..0.9:0.3", "does not end"),
        ("0.1..1.5:0.1", "out of range"),
        ("0.1..0.9:1e-9", "ratios"),
        ("1e-999999", "too many digits"),
        ("0.1..0.9:1e-999999", "too many digits"),
    ],
)
def test_mistakes_in_ratios(text, what):
    with pytest.raises(KvcliError) as caught:
        parse_ratios([text])
    assert what in caught.value.what
    assert caught.value.given == f"--ratio {text}"
    assert caught.value.fix
    assert caught.value.code == Exit.USAGE


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=6))
def test_ratio_texts_survive_a_round_trip(thousandths):
    ratios = sorted({Decimal(i) / 1000 for i in thousandths})
    assert parse_ratios([",".join(map(ratio_text, ratios))]) == ratios


@given(low=st.integers(1, 50), count=st.integers(0, 20), step=st.integers(1, 20))
def test_ranges_have_both_ends_and_exact_steps(low, count, step):
    high = low + count * step
    if high > 1000:
        return
    text = f"{Decimal(low) / 1000}..{Decimal(high) / 1000}:{Decimal(step) / 1000}"
    found = parse_ratios([text])
    assert [r * 1000 for r in found] == [low + i * step for i in range(count + 1)]


def test_half_is_rounded_up():
    assert [round_half_up(Decimal(text)) for text in ("0.5", "1.5", "2.5", "2.4999", "0.15")] == [1, 2, 3, 2, 0]
