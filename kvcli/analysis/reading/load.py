"""Reads a result folder into columns: run.json, samples.jsonl, shards/*.jsonl. Needs neither torch nor the model.

Texts (prompts, outputs) are not read, and repeated texts are stored once: a million records take seconds and a few
hundred megabytes (benchmarks/report_speed.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcli.analysis.reading.columns import FIGURES as FIGURES
from kvcli.analysis.reading.columns import Columns, counted
from kvcli.analysis.reading.line import Line, parse, reader
from kvcli.errors import KvcliError
from kvcli.grammar import ratio_text
from kvcli.results.planned import planned
from kvcli.results.store import find_run as find_run
from kvcli.results.store import record_files


@dataclass(frozen=True)
class Cell:
    """What one cell measures, from its records; run.json fills what they leave out."""

    cell_id: str
    task: str
    method: str
    ratio: str | None
    """Requested kept ratio, one spelling per value ('0.1'); None with a budget or where the method has no ratio."""
    budget: int | None
    first_token: str
    query: str
    shots: int | None
    seed: int | None
    decode: str | None
    """Settings of compression while generating as JSON text; None = off."""
    draw: int = 0
    weights: str = "dense"
    """The model's weights; records without the field are of dense ones."""
    match: str | None = None
    """Whose bytes it was held to: a method, with @ and what was asked of it where it has a ratio."""
    ability: str | None = None
    metric: str | None = None
    shot_seed: int = 0
    """Which exemplars; 0 in records without it."""
    shot_order: int = 0
    """Their order, 0 as they come."""


@dataclass(frozen=True)
class Run:
    """One result folder. Each array has one entry per record, N in all."""

    folder: Path
    meta: dict[str, Any]
    """run.json as it is; empty where there is none."""
    cells: tuple[Cell, ...]
    samples: tuple[str, ...]
    """In order of their names: a resumed or merged run resamples as one that ran through."""
    clusters: tuple[str, ...]
    flag_names: tuple[str, ...]
    cell: NDArray[np.int32]
    """[N] index into `cells`."""
    sample: NDArray[np.int32]
    """[N] index into `samples`."""
    cluster: NDArray[np.int32]
    """[N] index into `clusters`, -1 = none."""
    score: NDArray[np.float64]
    """[N] 0..1, NaN for failed samples."""
    measured_ratio: NDArray[np.float64]
    """[N] NaN where it was not recorded."""
    n_prompt: NDArray[np.float64]
    """[N] prompt tokens, NaN where they were not recorded."""
    answered: NDArray[np.bool_]
    """[N] an answer was found in the output."""
    truncated: NDArray[np.bool_]
    """[N] the output was cut at the token limit."""
    flags: NDArray[np.int64]
    """[N] bit i = flag_names[i]."""
    torn: tuple[str, ...] = ()
    """Files whose last line was torn and so counts as not written."""
    metrics: tuple[str, ...] = ()
    metric: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    """[N] index into `metrics`, -1 = not recorded."""
    extra: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    """Further figures of the scorers by name: [N], NaN where a record has none of that name."""
    figures: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    """Further figures of the records: [N] for every name of FIGURES, NaN where a record has none. kept, n_new,
    repetition and incoherent (0 or 1) are their fields, kl, top1, nll and identical (0 or 1) of `fidelity`, bytes_* of
    `kv_bytes`, context_* of `context`; cut: tokens cut from the prompt by --truncate."""
    files: tuple[str, ...] = ()
    """Record files, named from the folder."""
    file: NDArray[np.int16] = field(default_factory=lambda: np.empty(0, np.int16))
    """[N] index into `files`."""
    offset: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """[N] where the record's line begins in its file: what kvcli.analysis.reading.texts reads whole records by."""

    def __len__(self) -> int:
        return len(self.score)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def task_facts(self, task: str) -> dict[str, Any]:
        """Chance, metric, ability, version as run.json states them; empty where it does not."""
        return _mapping(_mapping(self.meta.get("tasks")).get(task))

    @cached_property
    def asked(self) -> dict[str, int]:
        """Samples that the folder's commands asked for, by cell; empty where run.json does not say."""
        if not self.meta.get("generations"):
            return {}
        seen = np.bincount(self.cell, minlength=len(self.cells))
        return planned(self.meta, {c.cell_id: int(n) for c, n in zip(self.cells, seen, strict=True)})

    def config(self, key: str) -> Any:
        return _mapping(self.meta.get("config")).get(key)

    @property
    def model(self) -> str:
        """The model's name as typed, or as run.json's model facts name it."""
        facts = self.meta.get("model")
        named = facts if isinstance(facts, str) else _mapping(facts).get("name") or _mapping(facts).get("id")
        return str(self.config("model") or named or "unknown model")


def load_run(folder: Path | str) -> Run:
    """Reads a result folder as kvcli.results.store does, but into columns.

    In a file the last line of a cell and sample counts; between files a finished sample beats a failed one, then the
    first file (samples.jsonl, shards by name). A torn last line counts as not written. Raises KvcliError with file
    and line for any other broken line, or where there is nothing to read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise KvcliError(f"no result folder '{folder}'", given=f"RUN {folder}", fix="kvcli list runs shows them")
    files = record_files(folder)
    if not files:
        fix = "kvcli sweep writes one; an interrupted sweep goes on with the same command"
        raise KvcliError(f"no records in {folder}", given=f"RUN {folder}", fix=fix)
    meta = _read_meta(folder)
    described, cells = _mapping(meta.get("cells")), []

    def describe(cell_id: str, line: bytes) -> None:
        cells.append(_describe(cell_id, parse(line), _mapping(described.get(cell_id))))

    columns = Columns(describe, f"RUN {folder}")
    read = reader()
    names = [str(path.relative_to(folder)) for path in files]
    torn = [name for name, path in zip(names, files, strict=True) if _read_file(path, columns, read)]
    if not columns:
        raise KvcliError(f"no finished records in {folder}", given=f"RUN {folder}", fix="wait for the first samples")
    return _run(folder, meta, cells, columns, tuple(names), tuple(torn))


def _run(
    folder: Path, meta: dict[str, Any], cells: list[Cell], columns: Columns, files: tuple[str, ...],
    torn: tuple[str, ...],
) -> Run:  # fmt: skip
    names, sample = columns.samples()
    whole, real, file = columns.whole(), columns.real(), columns.file_of_rows()
    keep = counted(whole["cell"] * len(names) + sample, file, np.isnan(real["score"]))

    def small(name: str) -> NDArray[np.int32]:
        return whole[name][keep].astype(np.int32)

    return Run(
        folder=folder, meta=meta, cells=tuple(cells), samples=tuple(names), clusters=tuple(columns.cluster_codes),
        flag_names=tuple(columns.flag_bits), cell=small("cell"), sample=sample[keep], cluster=small("cluster"),
        score=real["score"][keep], measured_ratio=real["measured_ratio"][keep], n_prompt=real["n_prompt"][keep],
        answered=whole["answered"][keep] > 0, truncated=whole["truncated"][keep] > 0, flags=whole["flags"][keep],
        torn=torn, metrics=tuple(columns.metric_codes), metric=small("metric"), extra=columns.extra(keep),
        figures={name: real[name][keep] for name in FIGURES}, files=files, file=file[keep].astype(np.int16),
        offset=whole["offset"][keep],
    )  # fmt: skip


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    if not path.is_file():
        return {}
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        line = f":{e.lineno}" if isinstance(e, json.JSONDecodeError) else ""
        raise KvcliError(f"{path}{line} is not JSON", given=f"RUN {folder}", fix=f"kvcli check {folder}") from e
    if not isinstance(meta, dict):
        raise KvcliError(f"{path} does not describe a run", given=f"RUN {folder}", fix=f"kvcli check {folder}")
    return meta


def _read_file(path: Path, columns: Columns, read: Callable[[bytes], Line]) -> bool:
    """Adds the records of one file; True when its last line was torn."""
    broken: KvcliError | None = None
    columns.starts.append(len(columns))
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            start, end = end, end + len(line)
            if line.isspace():
                continue
            if broken:
                raise broken
            try:
                columns.add(read(line), line, start)
            except (ValueError, KeyError, TypeError) as e:
                broken = _broken(path, number, e)
    return broken is not None


def _broken(path: Path, number: int, error: Exception) -> KvcliError:
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        reason = "is not JSON"
    elif isinstance(error, KeyError):
        reason = f"has no {error}"
    else:
        reason = f"is not a record: {error}"
    folder = path.parent.parent if path.parent.name == "shards" else path.parent
    fix = f"kvcli check {folder} --fix     (sets that line aside; the same sweep measures its sample again)"
    return KvcliError(f"{path}:{number} {reason}", given=f"RUN {folder}", fix=fix)


def _describe(cell_id: str, record: dict[str, Any], described: dict[str, Any]) -> Cell:
    def fact(name: str) -> Any:
        value = record.get(name)
        return described.get(name) if value is None else value

    task, method, decode = fact("task"), fact("method"), fact("decode")
    if task is None or method is None:
        raise KeyError("task" if task is None else "method")
    return Cell(
        cell_id=str(cell_id), task=str(task), method=str(method), ratio=_ratio(fact("ratio")),
        budget=_integer(fact("budget")), first_token=str(fact("first_token") or "n/a"),
        query=str(fact("query") or "aware"), shots=_integer(fact("shots")), seed=_integer(fact("seed")),
        decode=_settings(decode), draw=_integer(fact("draw")) or 0,
        weights=str(fact("weights") or "dense"), match=_match(fact("match")), ability=fact("ability"),
        metric=fact("metric"),
        shot_seed=_integer(fact("shot_seed")) or 0, shot_order=_integer(fact("shot_order")) or 0,
    )  # fmt: skip


def _match(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _settings(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, sort_keys=True)


def _integer(value: Any) -> int | None:
    return None if value is None else int(value)


def _ratio(value: Any) -> str | None:
    """0.1, '0.10' and '0.1' are one ratio."""
    if value is None:
        return None
    try:
        return ratio_text(Decimal(str(value)))
    except InvalidOperation as e:
        raise ValueError(f"ratio {value!r}") from e
