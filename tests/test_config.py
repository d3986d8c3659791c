"""The config: YAML round trip, hashes, and mistakes in files."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcli.config import GRID, HOUSEKEEPING, SweepConfig, folder_hash, read_yaml, stable_hash
from kvcli.errors import Exit, KvcliError

VALUES = {
    "str": st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=12),
    "int": st.integers(-(2**40), 2**40),
    "float": st.floats(allow_nan=False, allow_infinity=False),
    "bool": st.booleans(),
}


def values_of(annotation: str) -> st.SearchStrategy:
    kind = annotation.removesuffix("| None").strip()
    if kind.startswith("tuple["):
        return st.lists(VALUES[kind[6:-1].split(",")[0]], max_size=4).map(tuple)
    found = VALUES[kind]
    return found | st.none() if annotation.endswith("| None") else found


configs = st.fixed_dictionaries({f.name: values_of(str(f.type)) for f in dataclasses.fields(SweepConfig)}).map(
    lambda values: SweepConfig(**values)
)


@given(configs)
def test_yaml_round_trip(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("config") / "c.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert SweepConfig.from_yaml(path) == config


@given(configs)
def test_dict_round_trip(config):
    assert SweepConfig.from_dict(config.to_dict(), "test") == config


def test_a_file_may_be_as_short_as_a_person_writes_it(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("methods: snapkv\nratios: [0.1, 0.5]\nmax_time: 60\nlimit: 20\n")
    config = SweepConfig.from_yaml(path)
    assert (config.methods, config.ratios, config.max_time, config.limit) == (("snapkv",), ("0.1", "0.5"), 60.0, 20)
    assert dataclasses.replace(config, methods=(), ratios=(), max_time=None, limit=None) == SweepConfig()


@pytest.mark.parametrize(
    "text, what, fix",
    [
        ("method: snapkv", "unknown setting 'method'", "methods"),
        ("limit: many", "'limit' must be a whole number", "whole number"),
        ("limit: true", "'limit' must be a whole number", "whole number"),
        ("limit: 1.5", "'limit' must be a whole number", "whole number"),
        ("full: 1", "'full' must be true or false", "true or false"),
        ("methods: [[a]]", "'methods' must be a text", "a text"),
        ("seeds: [a]", "'seeds' must be a whole number", "whole number"),
        ("- a", "not a mapping", "name: value"),
        ("a: [", "c.yaml:", "line"),
    ],
)
def test_mistakes_in_a_file(tmp_path, text, what, fix):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(KvcliError) as caught:
        SweepConfig.from_yaml(path)
    assert what in caught.value.what
    assert fix in caught.value.fix
    assert str(path) in caught.value.given
    assert caught.value.code == Exit.USAGE


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_bytes(b"a: \xff\xfe")])
def test_files_that_cannot_be_read(tmp_path, make):
    path = tmp_path / "c.yaml"
    make(path)
    with pytest.raises(KvcliError) as caught:
        read_yaml(path)
    assert str(path) in caught.value.what


def test_the_folder_hash_ignores_the_grid_and_housekeeping():
    base = SweepConfig()
    assert {*GRID, *HOUSEKEEPING} <= {f.name for f in dataclasses.fields(SweepConfig)}
    for field in dataclasses.fields(SweepConfig):
        value = getattr(base, field.name)
        changed = "x" if isinstance(value, str) else not value if isinstance(value, bool) else ("x",)
        other = folder_hash(dataclasses.replace(base, **{field.name: changed}))
        assert (other == folder_hash(base)) == (field.name in GRID + HOUSEKEEPING), field.name
    assert len(folder_hash(base)) == 8


def test_hashes_do_not_depend_on_order_or_process():
    assert stable_hash({"a": 1, "b": [1, "é"]}) == stable_hash({"b": [1, "é"], "a": 1})
    assert stable_hash({"a": 1}) != stable_hash({"a": 2})
    code = "from kvcli.config import *; print(folder_hash(SweepConfig()), stable_hash({'é': 1}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [folder_hash(SweepConfig()), stable_hash({"é": 1})]
