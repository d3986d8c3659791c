"""Texts of --method, --task and --ratio: what they mean, that they survive a round trip, and how mistakes are named."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcli.errors import Exit, KvcliError
from kvcli.grammar import (
    MethodText,
    NotASetting,
    Part,
    parse_methods,
    parse_ratios,
    parse_tasks,
    ratio_text,
    round_half_up,
    split_tasks,
    task_base,
)

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
        ("snapkv,,h2o", "empty", "--method snapkv,h2o, without the extra comma"),
        ("snapkv,", "empty", "--method snapkv, without the extra comma"),
        ("snapkv h2o", "not a method", "--method snapkv,h2o"),
        ("snapkv@0.3", "not a method", "--method snapkv --ratio 0.3"),
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


task_names = st.from_regex(r"[a-z_*?][a-z0-9_*?]{0,12}", fullmatch=True)
task_files = st.from_regex(r"(\.{1,2}/|~/|/)([A-Za-z0-9_. -]{1,8}/)?[a-z]{1,8}\.ya?ml", fullmatch=True)
task_parts = st.builds(Part, task_names | task_files | names.map("lm_eval:{}".format), settings)


@given(st.lists(task_parts, min_size=1, max_size=4, unique=True))
def test_a_list_of_tasks_survives_a_round_trip(several):
    texts = [str(part) for part in several]
    assert parse_tasks([",".join(texts)]) == parse_tasks(texts) == several
    assert split_tasks([",".join(texts)]) == texts


@given(st.text(alphabet="abk=:,*[]'\". ~/yml_-", max_size=25))
def test_any_text_for_tasks_is_parsed_or_refused_clearly(text):
    try:
        parsed = parse_tasks([text])
    except KvcliError as e:
        assert e.code == Exit.USAGE and e.fix and e.given == f"--task {text}"
    else:
        assert parse_tasks(map(str, parsed)) == parsed


@pytest.mark.parametrize(
    "text, expected",
    [
        ("niah:length=8192,depth=0.5,lg_gsm8k:k=30", ["niah:length=8192,depth=0.5", "lg_gsm8k:k=30"]),
        ("long-context,tb_*", ["long_context", "tb_*"]),
        ("gsm[0-9]k", ["gsm[0-9]k"]),
        ("./my-tasks/a.yaml:k=2,gsm8k", ["./my-tasks/a.yaml:k=2", "gsm8k"]),
        ("/x/it's/a.yml", ["/x/it's/a.yml"]),
        ("mine.yaml", ["mine.yaml"]),
        ("./folder", ["./folder"]),
        ("lm_eval:arc-challenge,gsm8k", ["lm_eval:arc-challenge", "gsm8k"]),
        ("lm-eval:x:k=1", ["lm_eval:x:k=1"]),
        ("niah:text='a, b'", ["niah:text='a, b'"]),
        ("gsm8k, gsm8k ", ["gsm8k"]),
    ],
)
def test_texts_of_tasks(text, expected):
    assert split_tasks([text]) == expected


@pytest.mark.parametrize(
    "text, what, fix",
    [
        ("", "empty task name", "comma"),
        ("gsm8k,,mmlu", "empty task name", "comma"),
        ("k=30", "no task before", "niah:k=30"),
        ("niah:", "no setting after", "niah:KEY=VALUE"),
        ("niah:length", "not a setting", "KEY=VALUE"),
        ("niah:k=1,k=2", "given twice", "k="),
        ("niah:k='a", "quote is not closed", "'"),
        ("lm_eval:", "no setting after", "lm_eval"),
        ("gs@m", "not a task", "kvcli list tasks"),
        ("gsm8k,", "empty task name", "--task gsm8k, without the extra comma"),
        ("gsm8k:8", "'8' is not a setting of gsm8k", "gsm8k:shots=8"),
        ("mmlu:anatomy", "'anatomy' is not a setting of mmlu", "kvcli list tasks mmlu"),
    ],
)
def test_mistakes_in_tasks(text, what, fix):
    with pytest.raises(KvcliError) as caught:
        parse_tasks([text])
    assert what in caught.value.what and fix in caught.value.fix


@pytest.mark.parametrize(
    "name, base",
    [
        ("niah", "niah"),
        ("niah:depth=0.5,length=9", "niah"),
        ("lm_eval:arc", "lm_eval:arc"),
        ("lm_eval:arc:k=1", "lm_eval:arc"),
    ],
)
def test_the_base_of_a_task_s_name(name, base):
    assert task_base(name) == base


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


@pytest.mark.parametrize(
    "text, fix",
    [
        ("30", "--ratio 0.3 keeps 30 %"),
        ("12.5", "--ratio 0.125 keeps 12.5 %"),
        ("30%", "--ratio 0.3, which keeps 30%"),
        ("0,3", "--ratio 0.3, with a point"),
        ("0.1-0.9", "--ratio 0.1..0.9:0.1"),
        ("1.5", "--ratio 0.2 keeps 20 %"),
        ("300%", "--ratio 0.1,0.5"),
        ("nan%", "--ratio 0.1,0.5"),
    ],
)
def test_ratios_in_other_spellings_are_refused_with_the_right_one(text, fix):
    with pytest.raises(KvcliError) as caught:
        parse_ratios([text])
    assert fix in caught.value.fix


def test_what_stands_where_a_setting_should_is_said_with_its_source():
    for text, source, typed in (("a+b:2,c", "b", "2"), ("a:x=1,b:-", "b", "-"), ("b=2", "", "b=2")):
        with pytest.raises(NotASetting) as caught:
            parse_methods([text])
        assert (caught.value.source, caught.value.text) == (source, typed)


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
