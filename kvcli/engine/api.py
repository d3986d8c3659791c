"""A sweep from Python: the same checks, the same folder, no printing."""

from __future__ import annotations

from pathlib import Path

from kvcli.config import SweepConfig
from kvcli.engine.checking import check
from kvcli.engine.session import execute, open_session


def sweep(config: SweepConfig) -> Path:
    """Runs (or resumes) a sweep and returns its result folder; read it with `kvcli.load_run`.

    Raises KvcliError for whatever the command line would refuse. Failed samples are records with status `error`.
    """
    session = open_session(check(config), lambda text: None)
    execute(
        session,
        argv=["python", "kvcli.sweep"],
        passed=config.to_dict(),
        say=lambda text: None,
        warn=lambda text: None,
        progress=lambda done, total, label: None,
        stop=lambda progressed: None,
    )
    return session.folder
