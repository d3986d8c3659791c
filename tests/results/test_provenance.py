"""Provenance holds versions and hardware, and nothing private; it needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys

from kvcli.results import provenance


def test_versions_and_hardware():
    found = provenance.collect()
    assert {"kvcli", "python", "torch", "transformers", "numpy"} <= found["versions"].keys()
    assert found["hardware"]["cores"] >= 1
    assert found["hardware"]["memory_gib"] > 0
    assert json.loads(json.dumps(found)) == found


def test_no_torch_is_imported():
    code = "import sys; from kvcli.results import provenance; provenance.collect(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_the_cluster_job_is_named_and_secrets_are_not(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("SLURM_JWT", "eyJsecret")
    found = provenance.collect()
    assert found["slurm"] == {"slurm_job_id": "4711", "slurm_array_task_id": "3"}
    assert "secret" not in json.dumps(found)
    monkeypatch.delenv("SLURM_JOB_ID")
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    assert provenance.slurm() is None


def test_no_git_outside_a_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(provenance.kvcli, "__file__", str(tmp_path / "kvcli" / "__init__.py"))
    assert provenance.git() is None
    (tmp_path / ".git").mkdir()
    assert provenance.git() is None, "a broken checkout is no reason to stop"
