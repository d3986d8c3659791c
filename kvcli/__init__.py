"""kvcli: measures what KV cache compression does to language models. Importing it imports nothing heavy."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

_API = {
    "SweepConfig": "kvcli.config",
    "sweep": "kvcli.engine.api",
    "load_run": "kvcli.analysis.reading.load",
    "Method": "kvcli.methods.base",
    "RankedMethod": "kvcli.methods._ranked",
    "Transform": "kvcli.methods.base",
    "Merge": "kvcli.methods.base",
    "Selection": "kvcli.methods.base",
    "Domain": "kvcli.methods.base",
    "setting": "kvcli.methods.base",
}
"""Public name -> module; imported when first used."""

__all__ = ["__version__", *_API]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module 'kvcli' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_API[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
