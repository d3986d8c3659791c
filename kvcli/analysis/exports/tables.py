"""A run as two tables in CSV or Parquet: one row per cell and sample, and one row per cell with its statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvcli.analysis.exports.shared import AXES, TABLES, Wanted, axes_of, hidden, replacing
from kvcli.analysis.reading.load import FIGURES, Run
from kvcli.analysis.reading.texts import whole_records
from kvcli.analysis.reports.contents import Contents, contents
from kvcli.analysis.tables.cells import rows_of_cells
from kvcli.analysis.tables.table import FULL, CellSummary, TaskTable
from kvcli.errors import KvcliError

if TYPE_CHECKING:
    import pyarrow as pa

ROWS = 50_000
"""Rows that are in memory together while a table is written."""
TEXTS = ("output", "extracted", "target")
_WHOLE = ("budget", "shots", "shot_seed", "shot_order", "seed", "draw")
_YES = ("incoherent", "identical")
_COUNTS = ("n_new", "cut", "context_tokens", "bytes_full", "bytes_prefill", "bytes_end", "bytes_read", "bytes_match")


def write_tables(run: Run, out: Path, form: str, wanted: Wanted) -> list[Path]:
    """`out` is a folder for samples.FORM and cells.FORM, or the file of the samples: cells then stand beside it as
    NAME-cells.FORM."""
    if out.suffix == f".{form}":
        samples, cells = out, out.with_name(f"{out.stem}-cells.{form}")
    elif out.suffix.removeprefix(".") in TABLES:
        fix = f"--out {out.with_suffix(f'.{form}')}"
        raise KvcliError(f"{out} does not end as --format {form}", given=f"--out {out}", fix=fix)
    else:
        samples, cells = out / f"samples.{form}", out / f"cells.{form}"
    with _writing(samples, _sample_schema(run, wanted), form) as write:
        for rows in _portions(run):
            write(_sample_columns(run, rows, wanted))
    made = contents(run, margin=wanted.margin)
    summary = [row for table in made.tables for row in _cell_rows(table, made)]
    schema = _cell_schema(summary)
    with _writing(cells, schema, form) as write:
        write({name: [row.get(name) for row in summary] for name in schema.names})
    return [samples, cells]


@contextmanager
def _writing(path: Path, schema: pa.Schema, form: str) -> Iterator[Any]:
    """A function that appends columns (name -> values) to the file."""
    import pyarrow as pa
    from pyarrow import csv, parquet

    with replacing(path) as part:
        opened = parquet.ParquetWriter(part, schema) if form == "parquet" else csv.CSVWriter(part, schema)
        with opened as file:

            def write(columns: dict[str, Any]) -> None:
                arrays = [pa.array(columns[field.name], field.type, from_pandas=True) for field in schema]
                file.write_table(pa.Table.from_arrays(arrays, schema=schema))

            yield write


def _portions(run: Run) -> Iterator[NDArray[np.int64]]:
    """Row numbers cell by cell, of a task full first; the samples of a cell by name."""
    rows, tasks = rows_of_cells(run), list(dict.fromkeys(cell.task for cell in run.cells))
    codes = sorted(range(len(rows)), key=lambda c: (tasks.index(run.cells[c].task), run.cells[c].method != FULL, c))
    order = np.concatenate([rows[code] for code in codes])
    yield from (order[start : start + ROWS] for start in range(0, len(order), ROWS))


def _axis_fields() -> list[tuple[str, Any]]:
    import pyarrow as pa

    kinds = {**dict.fromkeys(_WHOLE, pa.int64()), "ratio": pa.float64()}
    return [(name, kinds.get(name, pa.string())) for name in AXES]


def _sample_schema(run: Run, wanted: Wanted) -> pa.Schema:
    import pyarrow as pa

    text, number, whole, yes = pa.string(), pa.float64(), pa.int64(), pa.bool_()
    fields = [("model", text), ("cell_id", text), ("sample_id", text), *_axis_fields(), ("status", text)]
    fields += [("score", number), ("metric", text), ("cluster", text), ("measured_ratio", number), ("n_prompt", whole)]
    fields += [("answered", yes), ("cut_at_limit", yes), ("flags", text)]
    fields += [(name, yes if name in _YES else whole if name in _COUNTS else number) for name in FIGURES]
    fields += [(f"extra.{name}", number) for name in run.extra]
    return pa.schema(fields + [(name, text) for name in TEXTS if wanted.outputs])


def _sample_columns(run: Run, rows: NDArray[np.int64], wanted: Wanted) -> dict[str, Any]:
    cells = [run.cells[code] for code in run.cell[rows].tolist()]
    axes = [_typed(axes_of(cell)) for cell in run.cells]
    by_cell = [axes[code] for code in run.cell[rows].tolist()]
    flags = {mask: _flags(run, mask) for mask in np.unique(run.flags[rows]).tolist()}
    columns: dict[str, Any] = {
        "model": [run.model] * len(rows), "cell_id": [cell.cell_id for cell in cells],
        "sample_id": [run.samples[code] for code in run.sample[rows].tolist()],
        **{name: [axis[name] for axis in by_cell] for name in AXES},
        "status": ["error" if failed else "ok" for failed in np.isnan(run.score[rows]).tolist()],
        "score": run.score[rows], "metric": [_named(run.metrics, code) for code in run.metric[rows].tolist()],
        "cluster": [_named(run.clusters, code) for code in run.cluster[rows].tolist()],
        "measured_ratio": run.measured_ratio[rows], "n_prompt": run.n_prompt[rows], "answered": run.answered[rows],
        "cut_at_limit": run.truncated[rows], "flags": [flags[mask] for mask in run.flags[rows].tolist()],
        **{name: run.figures[name][rows] for name in FIGURES if name not in _YES},
        **{name: [None if np.isnan(v) else bool(v) for v in run.figures[name][rows].tolist()] for name in _YES},
        **{f"extra.{name}": column[rows] for name, column in run.extra.items()},
    }  # fmt: skip
    return columns | (_texts(run, rows, wanted) if wanted.outputs else {})


def _texts(run: Run, rows: NDArray[np.int64], wanted: Wanted) -> dict[str, list[str | None]]:
    shown = {cell.task: wanted.harmful or not hidden(run, cell.task) for cell in run.cells}
    found: dict[str, list[str | None]] = {name: [] for name in TEXTS}
    for row, record in zip(rows.tolist(), whole_records(run, rows.tolist()), strict=True):
        for name in TEXTS:
            value = record.get(name) if shown[run.cells[run.cell[row]].task] else None
            found[name].append(_text(value))
    return found


def _text(value: Any) -> str | None:
    """Lone surrogates, which neither format can hold, become their escapes."""
    return None if value is None else str(value).encode("utf-8", "backslashreplace").decode("utf-8")


def _typed(axes: dict[str, Any]) -> dict[str, Any]:
    return {**axes, "ratio": None if axes["ratio"] is None else float(axes["ratio"])}


def _named(names: tuple[str, ...], code: int) -> str | None:
    return names[code] if code >= 0 else None


def _flags(run: Run, mask: int) -> str:
    return " ".join(name for bit, name in enumerate(run.flag_names) if mask >> bit & 1)


def _cell_rows(table: TaskTable, made: Contents) -> Iterator[dict[str, Any]]:
    """full first. What seeds and draws share is one row, as in the report."""
    for cell in ([table.full] if table.full else []) + table.cells():
        extra = {f"extra.{name}": value for name, value in cell.extra.items()}
        yield {**_about(table, cell), **_difference(cell), **_judged(table, cell, made), **extra}


def _about(table: TaskTable, cell: CellSummary) -> dict[str, Any]:
    ends = cell.interval
    return {
        "task": table.task, "ability": table.ability, "metric": table.metric, "chance": table.chance,
        "first_token": table.first_token, "query": table.query, "weights": table.weights, "shots": table.shots,
        "shot_seed": table.shot_seed, "shot_order": table.shot_order, "method": cell.method, "asked": cell.column,
        "measured_ratio": cell.measured_ratio, "n": cell.n,
        "seeds": cell.repeats[0], "draws": cell.repeats[1], "records": cell.records, "errors": cell.errors,
        "score": None if np.isnan(cell.score) else cell.score, "low": ends and ends.low, "high": ends and ends.high,
        "interval": ends and ends.method, "no_answer": cell.no_answer, "incoherent": cell.incoherent,
        "cut_at_limit": cell.truncated, "kl": cell.kl, "top1": cell.top1,
        "flags": " ".join(f"{name}={count}" for name, count in cell.flags.items()),
        "cell_ids": " ".join(cell.cell_ids),
    }  # fmt: skip


def _difference(cell: CellSummary) -> dict[str, Any]:
    """Of this comparison alone."""
    change = cell.difference
    if change is None:
        return {}
    ends = change.interval
    return {
        "difference": change.value, "difference_low": ends and ends.low, "difference_high": ends and ends.high,
        "difference_interval": ends and ends.method, "p": change.p, "test": change.test, "pairs": change.n,
        "better": change.better, "worse": change.worse, "relative": cell.relative,
        "established_alone": cell.verdict,
    }  # fmt: skip


def _judged(table: TaskTable, cell: CellSummary, made: Contents) -> dict[str, Any]:
    """All comparisons of the sweep considered; and what was kept above chance."""
    verdict, kept = made.verdict(cell), made.kept(table, cell)
    ends = verdict and verdict.interval
    kept_ends = kept and kept.interval
    return {
        "verdict": made.judged.said(cell) or None, "p_holm": verdict and verdict.p,
        "simultaneous_low": ends and ends.low, "simultaneous_high": ends and ends.high,
        "family": verdict and verdict.family, "margin": verdict and verdict.margin,
        "detectable": made.detectable(cell.difference),
        "retention": kept and kept.value, "retention_low": kept_ends and finite(kept_ends.low),
        "retention_high": kept_ends and finite(kept_ends.high),
    }  # fmt: skip


def finite(value: float) -> float | None:
    """None for an end that the data do not hold."""
    return value if np.isfinite(value) else None


_NUMBERS = (
    "chance", "measured_ratio", "score", "low", "high", "no_answer", "incoherent", "cut_at_limit", "difference",
    "difference_low", "difference_high", "p", "relative", "p_holm", "simultaneous_low", "simultaneous_high", "margin",
    "detectable", "retention", "retention_low", "retention_high", "kl", "top1",
)  # fmt: skip
_NAMES = ("difference_interval", "test", "established_alone", "verdict")
_INTEGERS = (
    "shots", "shot_seed", "shot_order", "n", "seeds", "draws", "records", "errors", "pairs", "better", "worse",
    "family",
)  # fmt: skip


def _cell_schema(rows: list[dict[str, Any]]) -> pa.Schema:
    import pyarrow as pa

    names = list(dict.fromkeys(name for row in rows for name in row if not name.startswith("extra.")))
    names += [name for name in (*_NUMBERS, *_INTEGERS, *_NAMES) if name not in names]
    names += sorted({name for row in rows for name in row if name.startswith("extra.")})
    kinds = dict.fromkeys(_NUMBERS, pa.float64()) | dict.fromkeys(_INTEGERS, pa.int64())
    extra = pa.float64()
    return pa.schema([(n, extra if n.startswith("extra.") else kinds.get(n, pa.string())) for n in names])
