"""What tells two models of a user's folders apart."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kvcli.models.source import TESTBED_FOLDER, fingerprint, parse_model
from tests.cli import sweeping

ENDS = "generation_config.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TESTBED_FOLDER, tmp_path / "mine"))


def test_the_tokens_that_end_an_answer_are_part_of_a_model(folder: Path) -> None:
    before = fingerprint(parse_model(str(folder)))
    (folder / ENDS).write_text('{"eos_token_id": [1, 2]}')
    after = fingerprint(parse_model(str(folder)))
    assert before["generation_config"] != after["generation_config"]
    assert before["revision"] == after["revision"], "the weights are the same: their head profile holds"


def test_a_folder_without_that_file_is_what_it_was(folder: Path) -> None:
    whole = fingerprint(parse_model(str(folder)))
    (folder / ENDS).unlink()
    assert fingerprint(parse_model(str(folder))) == {k: v for k, v in whole.items() if k != "generation_config"}
    assert "generation_config" not in fingerprint(parse_model("testbed"))


def test_results_with_other_ends_of_an_answer_are_not_mixed(folder: Path, tmp_path: Path) -> None:
    asked = ("sweep", "--model", folder, "--task", "tb_recall", "--method", "snapkv", "--ratio", "0.5", "--limit", "2",
             "--out", tmp_path / "run")  # fmt: skip
    assert sweeping.call(*asked).code == 0
    (folder / ENDS).write_text('{"eos_token_id": 3}')
    done = sweeping.call(*asked)
    assert done.code == 2 and "generation_config" in done.err
