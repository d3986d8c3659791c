"""The grammar of --weights, and what a calibration file may be."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcli.errors import KvcliError
from kvcli.weights.spec import Calibration, SparseGPT, canonical, parse_weights, resolve


def texts(*given: str) -> list[str]:
    return [canonical(value) for value in parse_weights(given)]


def test_settings_belong_to_the_weights_before_them() -> None:
    typed = "dense,sparsegpt:sparsity=0.50,samples=64,sparsegpt:2:4,seed=1,length=512,dense"
    assert texts(typed) == ["dense", "sparsegpt:sparsity=0.5,samples=64", "sparsegpt:2:4,length=512,seed=1"]
    assert parse_weights(["sparsegpt:4:8"]) == [SparseGPT(pattern=(4, 8))]


@pytest.mark.parametrize("text", ["dense", "sparsegpt:sparsity=0.25", "sparsegpt:2:4", "sparsegpt:1:4,damp=0.1,seed=3"])
def test_the_canonical_text_is_its_own(text: str) -> None:
    assert texts(text) == [text]


def test_defaults_are_left_out() -> None:
    assert texts("sparsegpt:damp=0.01,block=128,sparsity=0.5,seed=0") == ["sparsegpt:sparsity=0.5"]


@pytest.mark.parametrize(
    "text",
    ["", "magnitude:sparsity=0.5", "sparsegpt", "sparsegpt:", "sparsegpt:0.5", "sparsegpt:sparsity=0",
     "sparsegpt:sparsity=1", "sparsegpt:sparsity=half", "sparsegpt:sparsity=0.1..0.5:0.1", "sparsegpt:4:2",
     "sparsegpt:0:4", "sparsegpt:2:4:8", "sparsegpt:2:4,sparsity=0.5", "sparsegpt:sparsity=0.5,window=8",
     "sparsegpt:samples=8", "sparsegpt:sparsity=0.5,samples=0", "sparsegpt:sparsity=0.5,seed=-1",
     "sparsegpt:2:4,block=6", "sparsegpt:2:4,damp=0", "sparsegpt:2:4,damp=x", "sparsegpt:sparsity=0.5,sparsity=0.6",
     "dense:sparsity=0.5", "dense,", "sparsegpt:sparsity=0.5,calib=abc"],
)  # fmt: skip
def test_any_other_form_is_refused(text: str) -> None:
    with pytest.raises(KvcliError) as caught:
        parse_weights([text])
    assert caught.value.code == 2 and caught.value.given and caught.value.fix


def test_other_calibration_texts_are_other_weights(tmp_path: Path) -> None:
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    a.write_text("one text")
    b.write_text("another text")
    found = [resolve(["dense", "sparsegpt:2:4"], str(path)) for path in (a, b)]
    assert [w.text for w, _ in found] == ["dense", "dense"]
    assert found[0][1].text != found[1][1].text
    assert found[0][1].facts() != found[1][1].facts()
    moved = tmp_path / "sub.txt"
    moved.write_text("one text")
    assert resolve(["sparsegpt:2:4"], str(moved))[0].facts() == found[0][1].facts()


def test_kinds_of_calibration_files(tmp_path: Path) -> None:
    lines, running, objects = tmp_path / "a.lines", tmp_path / "a.txt", tmp_path / "a.jsonl"
    lines.write_text("one\n\ntwo\n")
    running.write_text("one\n\ntwo\n")
    objects.write_text('{"text": "one\\ntwo"}\n"three"\n')
    assert Calibration.of(str(lines)).texts() == ["one", "two"]
    assert Calibration.of(str(running)).texts() == ["one\n\ntwo\n"]
    assert Calibration.of(str(objects)).texts() == ["one\ntwo", "three"]


@pytest.mark.parametrize(
    "name, content",
    [("gone.txt", None), ("empty.txt", b""), ("blank", b"\n \n"), ("bytes.txt", b"\xff\xfe"), ("a.jsonl", b"{}\n"),
     ("b.jsonl", b'{"text": "x"\n'), ("c.jsonl", b"3\n")],
)  # fmt: skip
def test_files_without_texts_are_refused(tmp_path: Path, name: str, content: bytes | None) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(KvcliError) as caught:
        Calibration.of(str(path))
    assert caught.value.code == 2 and str(path) in caught.value.given
