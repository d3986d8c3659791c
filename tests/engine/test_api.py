"""The Python API: `import kvcli` is light, and a sweep gives the folder that the command line would."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import kvcli
from kvcli.errors import KvcliError


def test_sweep_and_load_run(tmp_path: Path) -> None:
    config = kvcli.SweepConfig(
        methods=("h2o",), ratios=("0.3",), tasks=("tb_recall",), limit=3, out=str(tmp_path / "run")
    )
    folder = kvcli.sweep(config)
    assert folder == tmp_path / "run"
    lines = (folder / "samples.jsonl").read_text().splitlines()
    assert len(lines) == 6
    kvcli.sweep(config)
    assert (folder / "samples.jsonl").read_text().splitlines() == lines
    assert kvcli.load_run(folder)
    with pytest.raises(KvcliError, match="unknown method"):
        kvcli.sweep(kvcli.SweepConfig(methods=("h3o",)))


def test_import_is_light_and_names_are_known() -> None:
    code = (
        "import sys, kvcli\nassert not {'torch', 'transformers', 'numpy', 'yaml', 'typer'} & sys.modules.keys()\n"
        "assert all(getattr(kvcli, n) is not None for n in dir(kvcli))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError):
        kvcli.nothing
