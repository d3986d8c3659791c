"""Reads a result folder into columns: run.json, samples.jsonl, shards/*.jsonl. Needs neither torch nor the model.

Texts (prompts, outputs) are not kept, and repeated texts are stored once, so a million records fit in memory.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcli.errors import KvcliError
from kvcli.grammar import ratio_text
from kvcli.results.schema import FLAGS, SCHEMA
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

    def __len__(self) -> int:
        return len(self.score)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def task_facts(self, task: str) -> dict[str, Any]:
        """Chance, metric, ability, version as run.json states them; empty where it does not."""
        return _mapping(_mapping(self.meta.get("tasks")).get(task))

    def config(self, key: str) -> Any:
        return _mapping(self.meta.get("config")).get(key)

    @property
    def model(self) -> str:
        """The model's name as typed, or as run.json's model facts name it."""
        facts = self.meta.get("model")
        named = facts if isinstance(facts, str) else _mapping(facts).get("name") or _mapping(facts).get("id")
        return str(self.config("model") or named or "unknown model")


def load_run(folder: Path) -> Run:
    """Reads a result folder as kvcli.results.store does, but into columns.

    In a file the last line of a cell and sample counts; between files a finished sample beats a failed one, then the
    first file (samples.jsonl, shards by name). A torn last line counts as not written. Raises KvcliError with file
    and line for any other broken line, or where there is nothing to read.
    """
    if not folder.is_dir():
        raise KvcliError(f"no result folder '{folder}'", given=f"RUN {folder}", fix="kvcli list runs shows them")
    files = record_files(folder)
    if not files:
        fix = "kvcli sweep writes one; an interrupted sweep goes on with the same command"
        raise KvcliError(f"no records in {folder}", given=f"RUN {folder}", fix=fix)
    columns = _Columns(folder, _read_meta(folder))
    torn = [str(path.relative_to(folder)) for path in files if _read_file(path, columns)]
    if not columns.score:
        raise KvcliError(f"no finished records in {folder}", given=f"RUN {folder}", fix="wait for the first samples")
    return columns.run(tuple(torn))


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


def _read_file(path: Path, columns: _Columns) -> bool:
    """Adds the records of one file; True when its last line was torn."""
    broken: KvcliError | None = None
    columns.starts.append(len(columns.score))
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            if broken:
                raise broken
            try:
                columns.add(_parse(line))
            except (ValueError, KeyError, TypeError) as e:
                broken = _broken(path, number, e)
    return broken is not None


def _parse(line: bytes, decode: Any = json.JSONDecoder().raw_decode) -> Any:
    """One JSON value; a third faster than json.loads on bytes, which guesses their encoding first."""
    if not line.endswith(b"\n"):
        raise ValueError("cut short")
    text = line.decode("utf-8").strip()
    value, end = decode(text)
    if end != len(text):
        raise json.JSONDecodeError("more than one value", text, end)
    return value


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


class _Columns:
    """Grows one column per field while records are read."""

    def __init__(self, folder: Path, meta: dict[str, Any]) -> None:
        self.folder, self.meta = folder, meta
        self.described = _mapping(meta.get("cells"))
        self.cells: list[Cell] = []
        self.cell_codes: dict[str, int] = {}
        self.sample_codes: dict[str, int] = {}
        self.cluster_codes: dict[str, int] = {}
        self.flag_bits = {name: i for i, name in enumerate(FLAGS)}
        self.flag_masks: dict[tuple[str, ...], int] = {(): 0}
        self.starts: list[int] = []
        """First row of each file."""
        self.cell: list[int] = []
        self.sample: list[int] = []
        self.cluster: list[int] = []
        self.score: list[float] = []
        self.measured: list[float] = []
        self.n_prompt: list[float] = []
        self.answered: list[bool] = []
        self.truncated: list[bool] = []
        self.flags: list[int] = []
        self.metric_codes: dict[str, int] = {}
        self.metric: list[int] = []
        self.extra: dict[str, tuple[list[int], list[float]]] = {}
        """Per name the rows that have it, and their figures."""

    def add(self, record: Any) -> None:
        """Raises KeyError, ValueError or TypeError for what is not a record, before anything is stored."""
        if not isinstance(record, dict):
            raise TypeError("not an object")
        if record.get("schema", SCHEMA) > SCHEMA:
            what = f"records of a newer kvcli (schema {record['schema']}, this one reads {SCHEMA})"
            raise KvcliError(what, given=f"RUN {self.folder}", fix="install the kvcli that wrote them")
        cell_id, sample_id = record["cell_id"], str(record["sample_id"])
        score = record["score"] if record.get("status", "ok") == "ok" else None
        value = np.nan if score is None else float(score)
        measured, n_prompt = _number(record.get("measured_ratio")), _number(record.get("n_prompt"))
        mask = self._mask(record.get("flags") or ())
        extra = {str(name): float(value) for name, value in _mapping(record.get("extra")).items()}
        cell = self.cell_codes.get(cell_id)
        if cell is None:
            self.cells.append(_describe(cell_id, record, _mapping(self.described.get(cell_id))))
            cell = self.cell_codes[cell_id] = len(self.cell_codes)
        cluster, metric = record.get("cluster"), record.get("metric")
        for name, figure in extra.items():
            rows, figures = self.extra.setdefault(name, ([], []))
            rows.append(len(self.score))
            figures.append(figure)
        self.metric.append(-1 if metric is None else _code(self.metric_codes, str(metric)))
        self.cell.append(cell)
        self.sample.append(_code(self.sample_codes, sample_id))
        self.cluster.append(-1 if cluster in (None, "") else _code(self.cluster_codes, str(cluster)))
        self.score.append(value)
        self.measured.append(measured)
        self.n_prompt.append(n_prompt)
        self.answered.append(record.get("extracted") is not None)
        self.truncated.append(record.get("finish") == "length")
        self.flags.append(mask)

    def _mask(self, flags: Any) -> int:
        names = tuple(flags)
        mask = self.flag_masks.get(names)
        if mask is None:
            bits = {_code(self.flag_bits, str(name)) for name in names}
            mask = self.flag_masks[names] = sum(1 << bit for bit in bits)
        return mask

    def _kept(self, key: NDArray[np.int64]) -> NDArray[np.int64]:
        """Row numbers, ascending, of the record that counts for every key (cell and sample)."""
        file = np.searchsorted(self.starts, np.arange(len(key)), side="right")
        _, from_end = np.unique((key * (len(self.starts) + 1) + file)[::-1], return_index=True)
        last = len(key) - 1 - from_end
        failed = np.isnan(np.array(self.score)[last])
        order = last[np.lexsort((file[last], failed, key[last]))]
        _, first = np.unique(key[order], return_index=True)
        return np.sort(order[first])

    def run(self, torn: tuple[str, ...]) -> Run:
        names = sorted(self.sample_codes)
        place = np.empty(len(names), np.int32)
        place[[self.sample_codes[name] for name in names]] = np.arange(len(names), dtype=np.int32)
        cell, sample = np.array(self.cell, np.int32), place[np.array(self.sample, np.int32)]
        keep = self._kept(cell.astype(np.int64) * len(names) + sample)
        return Run(
            self.folder, self.meta, tuple(self.cells), tuple(names), tuple(self.cluster_codes),
            tuple(self.flag_bits), cell[keep], sample[keep], np.array(self.cluster, np.int32)[keep],
            np.array(self.score, np.float64)[keep], np.array(self.measured, np.float64)[keep],
            np.array(self.n_prompt, np.float64)[keep], np.array(self.answered, np.bool_)[keep],
            np.array(self.truncated, np.bool_)[keep], np.array(self.flags, np.int64)[keep], torn,
            tuple(self.metric_codes), np.array(self.metric, np.int32)[keep],
            {name: self._figures(name)[keep] for name in self.extra},
        )  # fmt: skip

    def _figures(self, name: str) -> NDArray[np.float64]:
        rows, figures = self.extra[name]
        column = np.full(len(self.score), np.nan)
        column[rows] = figures
        return column


def _code(codes: dict[str, int], text: str) -> int:
    return codes.setdefault(text, len(codes))


def _number(value: Any) -> float:
    return np.nan if value is None else float(value)


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
