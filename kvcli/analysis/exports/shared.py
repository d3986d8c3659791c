"""Result folders in the formats of others: what the exporters share, and which texts may leave a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcli.analysis.reading.load import Cell, Run
from kvcli.analysis.reading.texts import whole_records
from kvcli.analysis.statistics.verdicts import MARGIN
from kvcli.analysis.tables.cells import incoherent_share
from kvcli.errors import KvcliError, unknown
from kvcli.results.store import prompt_files, read_lines

TABLES = ("csv", "parquet")
FORMATS = (*TABLES, "lm-eval", "every-eval-ever")
AXES = (
    "task", "ability", "method", "ratio", "budget", "match", "first_token", "query", "decode", "weights", "shots",
    "shot_seed", "shot_order", "seed", "draw",
)  # fmt: skip
"""What a cell is, in the order of columns."""
_PLAIN = {"first_token": ("compressed", "n/a"), "query": ("aware",), "weights": ("dense",), "draw": (0,),
          "decode_interval": (1,)}  # fmt: skip
"""Values that a variant's name leaves out."""
_DECODE = {"ratio": "decode_ratio", "budget": "decode_budget", "interval": "decode_interval"}
"""Settings of compression while generating, as they are named on the command line."""
_SHOTS = ("shots", "shot_seed", "shot_order")


@dataclass(frozen=True)
class Wanted:
    """What to export. outputs: tables get the texts too; harmful: texts of harmful tasks leave the folder as others
    do; organization and relationship: who measured, for Every Eval Ever; margin: of the verdicts in tables."""

    outputs: bool = False
    harmful: bool = False
    organization: str = "unknown"
    relationship: str = "other"
    margin: float = MARGIN


def export(run: Run, form: str, out: Path | None = None, wanted: Wanted | None = None) -> list[Path]:
    """Writes a run in one of FORMATS and returns the files.

    out: a folder, or with tables a file (the summary then stands beside it). None: `exports/FORMAT` in the run's
    folder. Raises KvcliError for an unknown format, or where the place cannot be written.
    """
    if form not in FORMATS:
        raise unknown("format", form, FORMATS, given=f"--format {form}", listing="kvcli export --help")
    out = out or run.folder / "exports" / form
    try:
        return _writer(form)(run, out, wanted or Wanted())
    except (FileExistsError, NotADirectoryError, PermissionError) as e:
        reason = (e.strerror or str(e)).lower()
        raise KvcliError(
            f"cannot write to {out}: {reason}", given=f"--out {out}", fix="--out with another place"
        ) from e


def _writer(form: str) -> Callable[[Run, Path, Wanted], list[Path]]:
    if form == "lm-eval":
        from kvcli.analysis.exports.lm_eval import write_lm_eval

        return write_lm_eval
    if form == "every-eval-ever":
        from kvcli.analysis.exports.every_eval_ever import write_every_eval_ever

        return write_every_eval_ever
    from kvcli.analysis.exports.tables import write_tables

    return lambda run, out, wanted: write_tables(run, out, form, wanted)


def hidden(run: Run, task: str) -> bool:
    """True for a harmful task, and for one of which run.json does not say whether it is: its texts stay."""
    return bool(run.task_facts(task).get("harmful", True))


def axes_of(cell: Cell) -> dict[str, Any]:
    return {name: getattr(cell, name) for name in AXES}


def rows_of_tasks(run: Run, rows_of: Sequence[NDArray[np.int64]]) -> dict[str, NDArray[np.int64]]:
    """For each task the numbers of its records."""
    found: dict[str, list[NDArray[np.int64]]] = {}
    for cell, rows in zip(run.cells, rows_of, strict=True):
        found.setdefault(cell.task, []).append(rows)
    return {task: np.concatenate(parts) for task, parts in found.items()}


@dataclass(frozen=True)
class Variant:
    """Cells that differ by their task alone: what other formats call one model. cells: task -> number of the cell."""

    settings: dict[str, Any]
    cells: dict[str, int]

    @property
    def text(self) -> str:
        """'method=snapkv,ratio=0.2', with what else is not as usual."""
        return ",".join(f"{name}={value}" for name, value in self.settings.items())


def variants(run: Run) -> list[Variant]:
    """In the order of the records. Numbers of shots, their seeds and orders belong to a variant only where one task was
    run with several of them; a cell that nothing else tells apart from another one (other code) has its id there."""
    several = {axis for axis in _SHOTS if _differs(run, axis)}
    found: dict[str, Variant] = {}
    for code, cell in enumerate(run.cells):
        settings = _settings(cell, several)
        if cell.task in found.get(Variant(settings, {}).text, Variant({}, {})).cells:
            settings = {**settings, "cell": cell.cell_id}
        variant = Variant(settings, {})
        found.setdefault(variant.text, variant).cells[cell.task] = code
    return list(found.values())


def _differs(run: Run, axis: str) -> bool:
    per_task: dict[str, set[Any]] = {}
    for cell in run.cells:
        per_task.setdefault(cell.task, set()).add(getattr(cell, axis))
    return any(len(values) > 1 for values in per_task.values())


def _settings(cell: Cell, several: set[str]) -> dict[str, Any]:
    values = {name: value for name, value in axes_of(cell).items() if name not in ("task", "ability", "decode")}
    values |= {_DECODE.get(name, name): value for name, value in json.loads(cell.decode or "{}").items()}
    return {
        name: value
        for name, value in values.items()
        if value is not None and value not in _PLAIN.get(name, ()) and (name not in _SHOTS or name in several)
    }


@dataclass(frozen=True)
class Scored:
    """One cell's finished records. mean and error: of its scores; error is None where one score says nothing of it."""

    rows: NDArray[np.int64]
    failed: int
    mean: float
    error: float | None


def scored(run: Run, rows: NDArray[np.int64]) -> Scored:
    """error: sample standard deviation over the root of n, as lm-evaluation-harness's mean_stderr has it."""
    done = rows[~np.isnan(run.score[rows])]
    values = run.score[done]
    n = len(values)
    error = float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else None
    return Scored(done, len(rows) - n, float(values.mean()) if n else float("nan"), error)


def mean_of(values: NDArray[np.float64]) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def shares_of(run: Run, rows: NDArray[np.int64]) -> dict[str, float | None]:
    """What a score is to be read with: shares of its outputs, null where nothing was generated."""
    return {
        "no_answer": float(1 - run.answered[rows].mean()), "incoherent": incoherent_share(run, rows),
        "cut_at_limit": float(run.truncated[rows].mean()),
    }  # fmt: skip


def metric_of(run: Run, rows: NDArray[np.int64]) -> str:
    """What most of the records say the score is."""
    codes = run.metric[rows]
    known = codes[codes >= 0]
    return run.metrics[int(np.bincount(known).argmax())] if len(known) else "score"


def prompts_of(run: Run) -> dict[str, str]:
    """Stored texts of prompts by their hash; of harmful prompts only where the sweep stored them."""
    texts: dict[str, str] = {}
    for path in prompt_files(run.folder):
        for line in read_lines(path, ("sha",)):
            if line.value is not None and isinstance(line.value.get("text"), str):
                texts.setdefault(line.value["sha"], line.value["text"])
    return texts


def records_of(run: Run, rows: NDArray[np.int64], shown: bool, prompts: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Whole records with their `prompt`; without any text where they are not to be shown."""
    for record in whole_records(run, rows.tolist()):
        if shown:
            yield {**record, "prompt": prompts.get(record.get("prompt_sha") or "")}
        else:
            yield {**record, **dict.fromkeys(("output", "extracted", "target", "prompt", "output_ids", "error"))}


def when(run: Run, key: str) -> datetime:
    """A time of run.json, else when the records were written last."""
    try:
        return datetime.fromisoformat(str(run.meta.get(key)))
    except ValueError:
        newest = max((run.folder / name).stat().st_mtime for name in run.files)
        return datetime.fromtimestamp(newest, UTC)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write beside `path`; it takes its place when the block ends well, and goes away when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def write_json(path: Path, value: Any) -> Path:
    """Strict JSON; raises ValueError for NaN."""
    with replacing(path) as part:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=2)
        part.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
    return path


def json_line(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"
