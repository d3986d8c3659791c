"""kvcli profile-heads as typed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvcli.models.profiles import cache_place, gates_place, load_profile, read_profile
from kvcli.models.source import TESTBED_FOLDER, parse_model

TINY = f"random:{TESTBED_FOLDER}:layers=2,hidden=32,heads=4,kv_heads=2"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_profile_goes_where_methods_find_it(kvcli: Callable[..., Any]) -> None:
    done = kvcli("profile-heads", "--model", TINY, "--limit", "3", "--wrong-too", "--prompt-tokens", "100")
    assert done.code == 0, done.err
    place = cache_place(parse_model(TINY))
    assert str(place) in done.out
    found = load_profile(parse_model(TINY))
    assert found.fits(2, 4, 2) and found.samples == 3 and found.how["prompt_tokens"] == 100
    assert f"next: kvcli sweep --model {TINY} --method" in done.err and "profile=" not in done.err


def test_json_is_the_file_s_content(kvcli: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    done = kvcli("profile-heads", "--limit", "2", "--out", out, "--json", "--dtype", "float64", "--threads", "1")
    facts = json.loads(done.out)
    assert facts.pop("file") == str(out)
    assert facts.pop("head_profile") == read_profile(out).digest
    assert facts == json.loads(out.read_text()) == read_profile(out).to_dict()
    assert facts["model"]["model"] == "testbed" and facts["samples"] == 2
    assert f":profile={out}" in done.err


def test_the_same_command_writes_the_same_bytes(kvcli: Callable[..., Any], tmp_path: Path) -> None:
    out, texts = tmp_path / "p.json", []
    for _ in range(2):
        assert kvcli("profile-heads", "--limit", "3", "--out", out, "--force").code == 0
        texts.append(out.read_bytes())
    assert texts[0] == texts[1]


@pytest.mark.parametrize("args, why", [
    (("--model", "testbet"), "unknown model"),
    (("--task", "tb_knowledge", "--limit", "2"), "no prompt of tb_knowledge"),
    (("--task", "tb_needle,tb_recall"), "made on one task"), (("--limit", "0"), "--limit"),
    (("--model", TINY, "--limit", "2"), "answers none of 2 prompts"), (("--out", "."), "is a folder"),
    (("--prompt-tokens", "4000", "--limit", "1"), "context is 1024"), (("--attn", "flash"), "flash"),
    (("--sinks", "3"), "only --gates"), (("--gates", "--wrong-too"), "no right answers"),
    (("--gates", "--limit", "2", "--recent", "500"), "no head would differ"),
])  # fmt: skip
def test_bad_input_is_one_message_and_code_2(kvcli: Callable[..., Any], args: tuple[str, ...], why: str) -> None:
    done = kvcli("profile-heads", *args)
    assert (done.code, done.out) == (2, "")
    assert done.err.count("error: ") == 1 and why in done.err
    assert "Traceback" not in done.err


def test_another_file_is_not_overwritten(kvcli: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "thesis.txt"
    out.write_text("years of work")
    done = kvcli("profile-heads", "--limit", "1", "--out", out)
    assert done.code == 2 and "is no head profile" in done.err
    assert out.read_text() == "years of work"


QUICK = ("profile-heads", "--model", TINY, "--limit", "2", "--wrong-too", "--prompt-tokens", "100")


def test_what_is_there_already_is_kept(kvcli: Callable[..., Any]) -> None:
    """The same settings: said, and not measured again."""
    first = kvcli(*QUICK)
    place = cache_place(parse_model(TINY))
    time = place.stat().st_mtime_ns
    again = kvcli(*QUICK)
    assert again.code == 0 and place.stat().st_mtime_ns == time
    assert "kept as it is" in again.err and "profiling:" not in again.err
    assert again.out == first.out and read_profile(place).digest in first.out


def test_a_file_of_other_settings_is_replaced_only_when_asked(kvcli: Callable[..., Any], tmp_path: Path) -> None:
    kvcli(*QUICK)
    place = cache_place(parse_model(TINY))
    before = place.read_bytes()
    held = read_profile(place).digest
    refused = kvcli(*QUICK[:-1], "120")
    assert refused.code == 2 and place.read_bytes() == before
    assert f"{place} was made otherwise (prompt_tokens 100, now 120)" in " ".join(refused.err.split())
    assert "--force replaces it" in refused.err
    assert kvcli(*QUICK[:-1], "120", "--out", tmp_path / "other.json").code == 0
    forced = kvcli(*QUICK[:-1], "120", "--force")
    assert forced.code == 0 and f"is replaced: it held head profile {held}" in forced.err
    assert load_profile(parse_model(TINY)).how["prompt_tokens"] == 120


def test_a_file_of_other_weights_is_replaced_only_when_asked(kvcli: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    assert kvcli(*QUICK, "--out", out).code == 0
    done = kvcli("profile-heads", "--model", f"{TINY},seed=4", *QUICK[3:], "--out", out)
    assert done.code == 2 and "other weights" in done.err


GATES = ("profile-heads", "--gates", "--model", TINY, "--limit", "2", "--prompt-tokens", "100", "--steps", "3",
         "--sinks", "4", "--recent", "16")  # fmt: skip


def test_gates_are_trained_and_read_by_the_method(kvcli: Callable[..., Any], tmp_path: Path) -> None:
    sweep = ("sweep", "--model", TINY, "--method", "duo_attention:heads=optimise,sinks=4,recent=16", "--ratio", "0.7",
             "--task", "tb_needle", "--limit", "2", "--out", tmp_path / "run")  # fmt: skip
    before = kvcli(*sweep)
    assert before.code == 2 and f"kvcli profile-heads --model {TINY} --gates --sinks 4 --recent 16" in before.err
    done = kvcli(*GATES)
    assert done.code == 0, done.err
    place = gates_place(parse_model(TINY), 4, 16)
    found = read_profile(place)
    assert str(place) in done.out and found.digest in done.out and "training gates" in done.err
    assert "duo_attention:heads=optimise,sinks=4,recent=16 --ratio 0.6" in done.err
    assert found.fits(2, 4, 2) and found.how["steps"] == 3
    assert "kept as it is" in kvcli(*GATES).err
    refused = kvcli(*GATES, "--seed", "1")
    assert refused.code == 2 and "seed 0, now 1" in refused.err


def test_gates_in_a_folder_of_one_s_own(kvcli: Callable[..., Any], tmp_path: Path) -> None:
    folder, model = tmp_path / "gates", tmp_path / "model"
    done = kvcli(*GATES, "--out", folder, "--json")
    facts = json.loads(done.out)
    assert done.code == 0 and sorted(p.name for p in folder.iterdir()) == ["config.json", "full_attention_heads.tsv"]
    assert facts["head_profile"] == read_profile(folder).digest and facts["how"]["sinks"] == 4
    assert f"duo_attention:heads=file,profile={folder},sinks=4,recent=16" in done.err
    model.mkdir()
    (model / "config.json").write_text("{}")
    assert "holds the config.json of something else" in kvcli(*GATES, "--out", model, "--force").err
    assert (model / "config.json").read_text() == "{}"
    (tmp_path / "file").write_text("x")
    assert "is a file" in kvcli(*GATES, "--out", tmp_path / "file").err


def test_finding_a_profile_needs_no_torch() -> None:
    code = (
        "import sys; from kvcli.models.profiles import load_profile; from kvcli.models.source import parse_model;"
        "load_profile(parse_model('testbed')); assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
