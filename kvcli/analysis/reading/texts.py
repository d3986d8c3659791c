"""Whole records of chosen rows: outputs, answers, targets, hashes of prompts: what `load_run` leaves out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

from kvcli.analysis.reading.line import parse
from kvcli.analysis.reading.load import Run
from kvcli.errors import KvcliError


def whole_records(run: Run, rows: Iterable[int]) -> Iterator[dict[str, Any]]:
    """The records of `rows`, in that order, read from where they stand in their files.

    Raises KvcliError where something else stands there now: the files were compacted since.
    """
    with ExitStack() as stack:
        files = [stack.enter_context((run.folder / name).open("rb")) for name in run.files]
        for row in rows:
            file = files[run.file[row]]
            file.seek(int(run.offset[row]))
            yield _same(run, row, file.readline())


def _same(run: Run, row: int, line: bytes) -> dict[str, Any]:
    key = (run.cells[run.cell[row]].cell_id, run.samples[run.sample[row]])
    try:
        record = parse(line)
        if (str(record["cell_id"]), str(record["sample_id"])) == key:
            return record
    except (ValueError, KeyError, TypeError):
        pass
    name = run.files[run.file[row]]
    raise KvcliError(f"{name} was changed while it was read", given=f"RUN {run.folder}", fix="type the command again")
