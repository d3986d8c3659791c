"""Where results come from: versions, commit, hardware, cluster job. Never tokens, user names or the environment."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import kvcli

PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "numpy", "flash-attn")
SLURM = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT")


def collect() -> dict[str, Any]:
    """All provenance of this process as JSON values. Asks torch for the GPUs only where it is already imported."""
    return {"versions": versions(), "git": git(), "hardware": hardware(), "slurm": slurm()}


def versions() -> dict[str, str]:
    found = {"kvcli": kvcli.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git() -> dict[str, Any] | None:
    """Commit of the checkout kvcli runs from, and whether tracked files were changed; None outside a checkout."""
    root = Path(kvcli.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    commit = _output("git", "-C", str(root), "rev-parse", "HEAD")
    changed = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return None if commit is None else {"commit": commit, "dirty": bool(changed)}


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def hardware() -> dict[str, Any]:
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor() or "unknown",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "gpus": _gpus(),
    }


def _field(path: str, name: str) -> str | None:
    try:
        with Path(path).open(encoding="utf-8", errors="replace") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith(name)), None)
    except OSError:
        return None


def _memory_gib() -> float | None:
    total = _field("/proc/meminfo", "MemTotal")
    return round(int(total.split()[0]) / 2**20, 1) if total else None


def _gpus() -> list[str]:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cards = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    return [_field(str(card), "Model") or "unknown GPU" for card in cards]


def slurm() -> dict[str, str] | None:
    return {name.lower(): os.environ[name] for name in SLURM if name in os.environ} or None
