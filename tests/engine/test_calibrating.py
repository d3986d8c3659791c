"""Bases of a model: second moments against plain loops over float64 rows; the file, its place, what is refused."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kvcli.attention.capture import Needs
from kvcli.engine import calibrating
from kvcli.engine.calibrating import Texts, check_texts, described, measured, moments_of
from kvcli.engine.needles import PassKeys
from kvcli.engine.needs import GIVEN, strange
from kvcli.engine.profiling import Settings, prepared
from kvcli.errors import KvcliError
from kvcli.models.bases import (
    FILE,
    Header,
    cache_place,
    digest_of,
    existing,
    file_need,
    header_of,
    read_header,
    read_moments,
    write_bases,
)
from kvcli.models.directions import of_file
from kvcli.models.profiles import check_profiles
from kvcli.models.source import TESTBED_FOLDER, ModelSource, fingerprint, parse_model
from kvcli.models.wrapper import Model
from kvcli.weights.spec import Calibration
from tests.engine import tiny
from tests.engine.asks import exact_model

SMALL = f"random:{TESTBED_FOLDER}:layers=2,hidden=32,heads=4,kv_heads=2"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def exact() -> Iterator[Model]:
    with exact_model(kv_heads=4) as model:
        yield model


@pytest.mark.parametrize("group", [1, 2, 3, 4, 9])
def test_moments_are_those_of_all_texts_rows_before_their_rotation(
    exact: Model, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against X^T X of rows put together text by text, keys turned back token by token; long texts come in pieces."""
    monkeypatch.setattr(calibrating, "CHUNK", 16)
    texts = [tiny.prompt(n, n).ids for n in (40, 7, 33)]
    found = moments_of(exact, texts, group)
    means = found.means()
    assert found.tokens == 80 and exact.rope is not None
    blocks = [list(range(first, min(first + group, 4))) for first in range(0, 4, group)]
    assert set(means) == {f"{w}.{i}.{b}" for w in ("keys", "values") for i in range(3) for b in range(len(blocks))}
    for layer in range(3):
        rows: dict[str, list[np.ndarray]] = {"keys": [], "values": []}
        for ids in texts:
            dense, _ = exact.prefill_one(ids, Needs(), len(ids), chunk=4096)
            for at in range(len(ids)):
                place = torch.tensor([at])
                key = exact.rope.move(dense.keys[layer][:, at : at + 1], place, torch.tensor([0]))
                rows["keys"].append(key[:, 0].numpy())
                rows["values"].append(dense.values[layer][:, at].numpy())
        for what, all_rows in rows.items():
            for number, heads in enumerate(blocks):
                x = np.stack([np.concatenate([row[h] for h in heads]) for row in all_rows])
                want = x.T @ x / 80
                got = means[f"{what}.{layer}.{number}"].numpy()
                assert got.dtype == np.float32 and np.allclose(got, want, atol=1e-6 * np.abs(want).max())


def header(moments: dict[str, torch.Tensor], model: dict[str, object], group: int = 4, kv_heads: int = 4) -> Header:
    return Header(model, digest_of(moments), 1, kv_heads, (8, 8), group, 3, 80, {"limit": 3})


def some(kv_heads: int, group: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    found = {}
    for what in ("keys", "values"):
        for block, first in enumerate(range(0, kv_heads, group)):
            wide = 8 * min(group, kv_heads - first)
            x = torch.randn(50, wide, generator=generator) * torch.linspace(0.1, 2, wide)
            found[f"{what}.0.{block}"] = x.T @ x
    return found


def test_the_file_comes_back_and_gives_the_singular_vectors_of_any_group_inside(tmp_path: Path) -> None:
    moments = some(8, 4)
    written = header(moments, {"model": "m", "revision": "1"}, kv_heads=8)
    write_bases(written, moments, tmp_path / "b.st")
    read = read_header(tmp_path / "b.st", wanted=2)
    assert dataclasses.replace(read, path="", wanted=1) == written
    assert all(torch.equal(x, moments[name]) for name, x in read_moments(read).items())
    bases = of_file(read)
    assert bases.name == written.digest
    like = torch.zeros(0, dtype=torch.float64)
    for what, first, heads in (("keys", 0, 4), ("keys", 6, 2), ("values", 5, 1), ("values", 4, 4)):
        basis = bases.of(what, 0, first, heads, 5, like)  # type: ignore[arg-type]
        block, start = divmod(first, 4)
        part = slice(8 * start, 8 * (start + heads))
        own = moments[f"{what}.0.{block}"].double()[part, part]
        u = torch.linalg.svd(own).U[:, :5]
        assert basis.offset is None and basis.elements == 8 * heads * 5
        assert torch.allclose(basis.directions @ basis.directions.T, u @ u.T, atol=1e-9)
    with pytest.raises(ValueError, match="lie in several groups"):
        bases.of("keys", 0, 3, 2, 1, like)


@pytest.mark.parametrize(("kv_heads", "made", "wanted", "fits"), [
    (8, 4, 4, True), (8, 4, 2, True), (8, 4, 1, True), (8, 4, 8, False), (8, 4, 3, False), (2, 4, 3, True),
    (8, 8, 5, True), (6, 3, 2, False),
])  # fmt: skip
def test_which_groups_of_heads_a_file_holds(kv_heads: int, made: int, wanted: int, fits: bool, tmp_path: Path) -> None:
    moments = some(kv_heads, made)
    write_bases(header(moments, {}, made, kv_heads), moments, tmp_path / "b.st")
    need = file_need(wanted, str(tmp_path / "b.st"))
    source = parse_model("testbed")
    if fits:
        bases = of_file(header_of(source, need))
        for first in range(0, kv_heads, wanted):  # every group that a method will ask for is there
            bases.of("keys", 0, first, min(wanted, kv_heads - first), 1, torch.zeros(0))
        return
    with pytest.raises(KvcliError, match=f"groups of {wanted} do not fit into") as e:
        header_of(source, need)
    assert f"--group {wanted} --force" in e.value.fix


def test_it_is_found_by_the_models_weights(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(TESTBED_FOLDER, folder)
    source = parse_model(str(folder))
    before = fingerprint(source)
    with pytest.raises(KvcliError, match="no bases of") as e:
        check_profiles(source, {file_need(4)})
    assert e.value.fix == f"kvcli profile-heads --bases --model {folder} --calib FILE"
    moments, other = some(4, 4), some(4, 2)
    write_bases(header(moments, before), moments, cache_place(source))
    first = check_profiles(source, {file_need(4)})
    assert first == digest_of(moments)
    write_bases(header(other, before, 2), other, folder / FILE)
    assert fingerprint(source) == before, "the file is no part of the weights"
    assert check_profiles(source, {file_need(2)}) == digest_of(other) != first
    write_bases(header(moments, {"model": "x", "revision": "other"}), moments, folder / FILE)
    with pytest.raises(KvcliError, match="other weights"):
        header_of(source, file_need(2))
    assert header_of(source, file_need(2, str(folder / FILE))).digest == digest_of(moments), "what is named is taken"


def test_profiles_and_bases_together_tell_cells_apart(tmp_path: Path) -> None:
    source, moments = parse_model("testbed"), some(4, 4)
    write_bases(header(moments, fingerprint(source)), moments, cache_place(source))
    one, two = check_profiles(source, {"head_profile"}), check_profiles(source, {file_need(4)})
    both = check_profiles(source, {"head_profile", file_need(4)})
    assert len({one, two, both, None}) == 4
    assert check_profiles(source, {"rope", "bases:weights"}) is None


def test_a_file_of_another_shape_is_refused() -> None:
    source, moments = parse_model("testbed"), some(4, 4)
    write_bases(header(moments, fingerprint(source)), moments, cache_place(source))
    config = SimpleNamespace(num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
    with pytest.raises(KvcliError, match="of 1 layers with 4 KV heads, not this model's"):
        check_profiles(source, {file_need(4)}, config)


@pytest.mark.parametrize("content", [b"", b"years of work", b"\xff" * 40, b"\x02" + bytes(7) + b"{}"])
def test_other_files_are_refused_and_not_overwritten(content: bytes, tmp_path: Path) -> None:
    path, moments = tmp_path / "b.st", some(4, 4)
    path.write_bytes(content)
    with pytest.raises(KvcliError, match="is no file of bases"):
        read_header(path)
    with pytest.raises(KvcliError, match="is no file of bases"):
        write_bases(header(moments, {}), moments, path)
    assert path.read_bytes() == content
    with pytest.raises(KvcliError, match="cannot be read"):
        read_header(tmp_path / "none.st")


def test_changed_numbers_are_noticed(tmp_path: Path) -> None:
    path, moments = tmp_path / "b.st", some(4, 4)
    write_bases(header(moments, {}), moments, path)
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)
    with pytest.raises(KvcliError, match="its numbers have changed"):
        of_file(read_header(path))


def test_needs_of_bases_are_known() -> None:
    assert not strange(["bases:weights", "bases:4:", "bases:2:./a b.st"])
    assert strange(["bases", "bases:", "bases:x"]) == ["bases", "bases:", "bases:x"]
    assert GIVEN.fullmatch("bases:4:./x.st")


SOURCE: ModelSource = parse_model(SMALL)


def test_made_of_the_tasks_prompts_or_of_a_files_texts(tmp_path: Path) -> None:
    """The same command gives the same numbers; other texts give others."""
    asked = Settings(limit=3, prompt_tokens=100, threads=1)
    ready = prepared(SOURCE, asked)
    (one, moments), (two, _) = (measured(SOURCE, asked, ready, Texts(group=2)) for _ in range(2))
    assert one == two and (one.layers, one.kv_heads, one.widths, one.group, one.texts) == (2, 2, (8, 8), 2, 3)
    assert one.how["task"] == "tb_needle" and one.model == fingerprint(SOURCE) and one.digest == digest_of(moments)
    path = tmp_path / "texts.txt"
    words = [w for w in ready.tokenizer.get_vocab() if w.isalpha()]
    path.write_text(" ".join(words[i % len(words)] for i in range(400)))
    texts = Texts(Calibration.of(str(path)), 2)
    found, _ = measured(SOURCE, asked, ready, texts)
    assert (found.texts, found.tokens) == (3, 300) and found.digest != one.digest
    assert found.how == {k: v for k, v in described(asked, ready, texts).items() if k != "group"}
    place = tmp_path / "b.st"
    write_bases(one, moments, place)
    assert existing(place, SOURCE, described(asked, ready, Texts(group=2)), force=False) is not None
    with pytest.raises(KvcliError, match="group 2, now 1"):
        existing(place, SOURCE, described(asked, ready, Texts(group=1)), force=False)
    assert existing(place, SOURCE, described(asked, ready, Texts(group=1)), force=True) is not None


def test_pass_keys_alone_are_no_texts() -> None:
    asked = Settings()
    ready = dataclasses.replace(
        prepared(SOURCE, asked),
        task=PassKeys(
            name="pass keys", version="1", ability="x", metric="accuracy", shots=0, max_new_tokens=16, chat=False
        ),
    )
    with pytest.raises(KvcliError, match="texts of the kind the model is used for") as e:
        check_texts(SOURCE, ready, Texts())
    assert "--calib FILE, or --task NAME" in e.value.fix
