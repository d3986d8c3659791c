"""kvcli attn-map as typed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvcli.analysis.attention.data import load
from kvcli.models.source import TESTBED_FOLDER

TINY = f"random:{TESTBED_FOLDER}:layers=2,hidden=32,heads=2,kv_heads=1"
QUICK = ("--limit", "1", "--format", "png")


def test_figures_data_and_page_of_the_testbed(kvcli: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "maps"
    done = kvcli(
        "attn-map", "--task", "tb_arithmetic,tb_safety", "--method", "snapkv,shotkv", "--ratio", "0.2", "--html",
        "--out", out, "--limit", "2", "--format", "png",
    )  # fmt: skip
    assert done.code == 0, done.err
    named = [Path(line) for line in done.out.splitlines()]
    assert {path.name for path in named} == {
        "map.png", "measures.png", "regions.png", "regions-even.png", "shots.png", "shots-heads.png",
        "curves.png", "attn-map.json", "attn-map.npz",
        "attn-map.html", *(f"kept-{path.stem.removeprefix('kept-')}.png" for path in named if "kept-" in path.name),
    }  # fmt: skip
    assert sum(path.name.startswith("kept-tb_") for path in named) == 2
    assert sorted(out.iterdir()) == sorted(named), "what it names is what it wrote"
    assert all(path.stat().st_size > 5000 for path in named)
    assert (out / "attn-map.html").stat().st_size < 1_000_000
    assert "map: layer 2, head 1 (the paper's layer 15, head 10 scaled to 4 layers, 4 heads)" in done.err
    again = "kvcli sweep --model testbed --task tb_arithmetic,tb_safety --method snapkv,shotkv --ratio 0.2"
    assert f"next: {again}" in done.err
    atlas = load(out)
    assert [g["samples"] for g in atlas.groups] == [2, 2]
    assert [[e["method"] for e in atlas.entries(i)] for i in atlas.shown] == [["snapkv", "shotkv"]] * 2


def test_json_names_the_files_and_nothing_else(kvcli: Callable[..., Any], tmp_path: Path) -> None:
    done = kvcli("attn-map", "--model", TINY, "--text", "go fish", "--out", tmp_path, "--json", *QUICK[2:])
    facts = json.loads(done.out)
    assert facts["folder"] == str(tmp_path) and facts["pages"] == []
    assert [Path(p).name for p in facts["data"]] == ["attn-map.json", "attn-map.npz"]
    assert {Path(p).name for p in facts["figures"]} == {
        "map.png",
        "measures.png",
        "regions.png",
        "regions-even.png",
        "curves.png",
    }
    assert "next:" not in done.err, "a text is no task of a sweep"


@pytest.mark.slow
def test_the_folder_hangs_on_what_is_asked(
    kvcli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for text in ("go fish", "go fish", "fish go"):
        assert kvcli("attn-map", "--model", TINY, "--text", text, *QUICK[2:]).code == 0
    folders = sorted((tmp_path / "attn-maps").iterdir())
    assert len(folders) == 2 and all(folder.name.startswith("random-weights-") for folder in folders)


@pytest.mark.slow
def test_the_same_command_writes_the_same_bytes(kvcli: Callable[..., Any], tmp_path: Path) -> None:
    for name in ("a", "b"):
        command = ("attn-map", "--model", TINY, "--task", "tb_recall", "--method", "h2o", "--html", *QUICK)
        assert kvcli(*command, "--out", tmp_path / name).code == 0
    for path in (tmp_path / "a").iterdir():
        if path.suffix != ".json":
            assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_files_samples_and_means(kvcli: Callable[..., Any], tmp_path: Path) -> None:
    note = tmp_path / "note.txt"
    note.write_text("the fish would go from there")
    done = kvcli("attn-map", "--model", TINY, "--file", note, "--layer", "mean", "--head", "1", "--out", tmp_path / "a",
                 *QUICK[2:])  # fmt: skip
    assert done.code == 0, done.err
    atlas = load(tmp_path / "a")
    assert (atlas.prompts[0]["sample"], atlas.whose()) == ("note.txt", "head 1, mean over layers")
    assert "map: layer" not in done.err, "it was asked for, so it needs no reason"
    first = kvcli("attn-map", "--model", TINY, "--task", "tb_recall", "--out", tmp_path / "b", *QUICK)
    assert first.code == 0
    sample = load(tmp_path / "b").prompts[0]["sample"]
    again = kvcli("attn-map", "--model", TINY, "--task", "tb_recall", "--sample", sample, "--out", tmp_path / "c",
                  "--format", "svg")  # fmt: skip
    assert again.code == 0, again.err
    assert [p["sample"] for p in load(tmp_path / "c").prompts] == [sample]


def test_harmful_prompts_are_not_shown_unless_stored(
    kvcli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvcli.engine import checking

    find = checking.find_tasks
    monkeypatch.setattr(
        checking, "find_tasks", lambda names: [dataclasses.replace(t, harmful=True) for t in find(names)]
    )
    command = ("attn-map", "--task", "tb_safety", "--html", "--limit", "1", "--format", "svg", "--method", "knorm")
    secret = "[safety]"
    for name, more, held in (("a", (), False), ("b", ("--store-prompts",), True)):
        done = kvcli(*command, "--out", tmp_path / name, *more)
        assert done.code == 0, done.err
        texts = [path for path in (tmp_path / name).iterdir() if secret.encode() in path.read_bytes()]
        assert [path.name for path in sorted(texts)] == (["attn-map.html", "attn-map.json"] if held else [])
        assert secret not in done.out + done.err


@pytest.mark.parametrize("args, why", [
    (("--model", "testbet"), "unknown model"), (("--task", "tb_nothing"), "unknown task"),
    (("--task", "tb_recall", "--text", "x"), "not both"), (("--text", " "), "is empty"),
    (("--file", "nowhere.txt"), "cannot read nowhere.txt"), (("--layer", "9"), "--layer must be a number from 0 to 3"),
    (("--head", "x"), "--head must be a number from 0 to 3"), (("--queries", "some"), "--queries"),
    (("--format", "jpg"), "unknown format"), (("--blocks", "0"), "--blocks"), (("--limit", "0"), "--limit"),
    (("--sample", "nowhere"), "unknown sample"), (("--method", "snapvk"), "unknown method"),
    (("--ratio", "2", "--method", "h2o"), "--ratio"), (("--style", "poster"), "unknown style"),
    (("--theme", "blue"), "unknown theme"), (("--query", "some"), "--query"), (("--attn", "quick"), "--attn"),
])  # fmt: skip
def test_bad_input_is_one_message_and_code_2(
    kvcli: Callable[..., Any], tmp_path: Path, args: tuple[str, ...], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = args if "--text" in args or "--file" in args or "--task" in args else ("--task", "tb_recall", *args)
    done = kvcli("attn-map", *given)
    assert (done.code, done.out) == (2, "")
    assert "error: " in done.err and why in done.err and "Traceback" not in done.err
    assert list(tmp_path.iterdir()) == [], "wrong input leaves no empty folder"


def test_the_example_of_the_page_reads_what_was_written(
    kvcli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.docs.pages import blocks, text

    monkeypatch.chdir(tmp_path)
    command = ("attn-map", "--model", TINY, "--task", "tb_recall", "--method", "h2o", "--ratio", "0.3", *QUICK)
    assert kvcli(*command, "--out", "attn-maps/mine").code == 0
    page = text("docs/attn-map.md")
    (example,) = blocks(page, "python")
    found: dict[str, Any] = {}
    exec(example, found)
    assert found["kept"].shape == (2, 1, found["prompt"]["n"])
    assert found["kept"].mean() == pytest.approx(found["entry"]["kept"]) == pytest.approx(0.3, abs=0.01)
    named = {name.replace("p0.", "pI.").replace("kept.0", "kept.J") for name in found["arrays"]}
    assert {name for name in named if f"`{name}`" not in page} == set(), "every array is described"


@pytest.mark.slow
def test_the_next_command_has_what_was_typed(kvcli: Callable[..., Any], tmp_path: Path) -> None:
    done = kvcli(
        "attn-map", "--model", TINY, "--task", "tb_arithmetic", "--method", "random", "--budget", "40",
        "--shots", "1,2", "--seed", "3", "--query", "agnostic", "--tokenizer", TESTBED_FOLDER,
        "--out", tmp_path, *QUICK,
    )  # fmt: skip
    assert done.code == 0, done.err
    (line,) = [line for line in done.err.splitlines() if line.startswith("next: ")]
    for words in ("--budget 40", "--shots 1,2", "--seed 3", "--query agnostic", f"--tokenizer {TESTBED_FOLDER}"):
        assert words in line
    assert "--ratio" not in line
    atlas = load(tmp_path)
    assert [g["label"] for g in atlas.groups] == ["tb_arithmetic, 1 shot", "tb_arithmetic, 2 shots"]
    assert [(e["seed"], e["query"]) for e in atlas.entries(0)] == [(3, "agnostic")]


def test_a_text_of_unknown_words_says_so(kvcli: Callable[..., Any], tmp_path: Path) -> None:
    for text, said in (("the cat sat on the mat", True), ("red fish black goat white wolf", False)):
        done = kvcli("attn-map", "--text", text, "--out", tmp_path / str(said), "--format", "svg")
        assert done.code == 0, done.err
        assert ("the model sees <unk> instead" in done.err) == said
        assert ("⟨unk⟩" in (tmp_path / str(said) / "map.svg").read_text(encoding="utf-8")) == said


@pytest.mark.slow
def test_style_and_theme(kvcli: Callable[..., Any], tmp_path: Path) -> None:
    command = ("attn-map", "--model", TINY, "--text", "go fish", "--style", "paper", "--theme", "dark")
    assert kvcli(*command, "--out", tmp_path / "a").code == 0
    assert {path.suffix for path in (tmp_path / "a").iterdir()} == {".pdf", ".json", ".npz"}
    assert kvcli(*command, "--out", tmp_path / "b", "--format", "svg").code == 0
    drawn = (tmp_path / "b" / "measures.svg").read_text()
    assert f'width="{6.75 * 72:g}pt"' in drawn and "#0d1117" in drawn
