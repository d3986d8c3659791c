"""Begins the worker: the folder is run by path with another interpreter, where kvcli is not installed."""

from __future__ import annotations

import sys
import types
from pathlib import Path


def main() -> None:
    here = Path(__file__).resolve().parent
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != here]  # its modules have one name each
    for name, folder in (("kvcli", here.parents[1]), ("kvcli.kvpress", here.parent)):
        package = sys.modules[name] = types.ModuleType(name)  # without the code above this folder
        package.__path__ = [str(folder)]
    from kvcli.kvpress.worker import server

    server.main()


if __name__ == "__main__":
    main()
