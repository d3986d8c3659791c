"""kvcli profile-heads as typed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvcli.models.profiles import cache_place, load_profile, read_profile
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
    assert facts == json.loads(out.read_text()) == read_profile(out).to_dict()
    assert facts["model"]["model"] == "testbed" and facts["samples"] == 2
    assert f":profile={out}" in done.err


def test_the_same_command_writes_the_same_bytes(kvcli: Callable[..., Any], tmp_path: Path) -> None:
    out, texts = tmp_path / "p.json", []
    for _ in range(2):
        assert kvcli("profile-heads", "--limit", "3", "--out", out).code == 0
        texts.append(out.read_bytes())
    assert texts[0] == texts[1]


@pytest.mark.parametrize("args, why", [
    (("--model", "testbet"), "unknown model"),
    (("--task", "tb_knowledge", "--limit", "2"), "no prompt of tb_knowledge"),
    (("--task", "tb_needle,tb_recall"), "made on one task"), (("--limit", "0"), "--limit"),
    (("--model", TINY, "--limit", "2"), "answers none of 2 prompts"), (("--out", "."), "is a folder"),
    (("--prompt-tokens", "4000", "--limit", "1"), "context is 1024"), (("--attn", "flash"), "flash"),
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


def test_finding_a_profile_needs_no_torch() -> None:
    code = (
        "import sys; from kvcli.models.profiles import load_profile; from kvcli.models.source import parse_model;"
        "load_profile(parse_model('testbed')); assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
