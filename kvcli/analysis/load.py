"""Reads a result folder into columns: run.json, samples.jsonl, shards/*.jsonl. Needs neither torch nor the model.

Texts (prompts, outputs) are not kept, and repeated texts are stored once, so a million records fit in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcli.errors import KvcliError
from kvcli.grammar import ratio_text
from kvcli.results.schema import FLAGS, SCHEMA

RUNS = Path("runs")
"""Where sweeps put their folders unless --out says otherwise."""


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
    """Settings of decode-phase compression as JSON text; None = off."""
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


def find_run(text: str, runs: Path | None = None) -> Path:
    """The result folder that a path, or the unique beginning of a name under runs/, stands for."""
    runs = runs if runs is not None else RUNS
    given = f"RUN {text}"
    path = Path(text).expanduser()
    if path.is_dir() and _is_run(path):
        return path
    if path.name == "run.json" and path.is_file():
        return path.parent
    known = sorted(p for p in runs.iterdir() if p.is_dir() and _is_run(p)) if runs.is_dir() else []
    prefix = text.removeprefix("./").removeprefix(f"{runs}/").rstrip("/")
    found = [p for p in known if p.name == prefix] or [p for p in known if p.name.startswith(prefix)]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(p.name for p in found[:5]) + (", ..." if len(found) > 5 else "")
        raise KvcliError(f"'{text}' fits {len(found)} result folders", given=given, fix=f"one of {names}")
    listing = "kvcli list runs shows the result folders"
    if path.is_dir():
        raise KvcliError(f"no records in {text}", given=given, fix=listing)
    if path.exists():
        raise KvcliError(f"{text} is not a result folder", given=given, fix=f"the folder that holds it: {path.parent}")
    raise KvcliError(f"no result folder '{text}'", given=given, fix=listing)


def load_run(folder: Path) -> Run:
    """Reads a result folder. The last line per cell and sample counts; a torn last line counts as not written.

    Files are read in the order samples.jsonl, shards/* by name. Raises KvcliError with file and line for a broken
    line, or where there is nothing to read.
    """
    if not folder.is_dir():
        raise KvcliError(f"no result folder '{folder}'", given=f"RUN {folder}", fix="kvcli list runs shows them")
    files = record_files(folder)
    if not files:
        fix = "kvcli sweep writes one; an interrupted sweep goes on with the same command"
        raise KvcliError(f"no records in {folder}", given=f"RUN {folder}", fix=fix)
    columns = _Columns(_read_meta(folder))
    torn = [str(path.relative_to(folder)) for path in files if _read_file(path, columns)]
    if not columns.score:
        raise KvcliError(f"no finished records in {folder}", given=f"RUN {folder}", fix="wait for the first samples")
    return columns.run(folder, tuple(torn))


def record_files(folder: Path) -> list[Path]:
    """The files that hold records, in the order in which a later line replaces an earlier one."""
    main = folder / "samples.jsonl"
    return ([main] if main.is_file() else []) + sorted((folder / "shards").glob("*.jsonl"))


def _is_run(path: Path) -> bool:
    return (path / "run.json").is_file() or bool(record_files(path))


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
    for number, line in _lines(path):
        if broken:
            raise broken
        try:
            columns.add(_parse(line.decode("utf-8")))
        except (ValueError, KeyError, TypeError) as e:
            broken = _broken(path, number, e)
            if line.endswith(b"\n"):  # written whole, so not torn by a crash
                raise broken from e
    return broken is not None


def _parse(line: str, decode: Any = json.JSONDecoder().raw_decode) -> Any:
    """One JSON value; a third faster than json.loads on bytes, which guesses their encoding first."""
    line = line.strip()
    value, end = decode(line)
    if end != len(line):
        raise json.JSONDecodeError("more than one value", line, end)
    return value


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.isspace():
                yield number, line


def _broken(path: Path, number: int, error: Exception) -> KvcliError:
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        reason = "is not JSON"
    elif isinstance(error, KeyError):
        reason = f"has no {error}"
    else:
        reason = f"is not a record: {error}"
    folder = path.parent.parent if path.parent.name == "shards" else path.parent
    return KvcliError(f"{path}:{number} {reason}", given=f"RUN {folder}", fix=f"kvcli check {folder}")


class _Columns:
    """Grows one column per field while records are read."""

    def __init__(self, meta: dict[str, Any]) -> None:
        self.meta = meta
        self.described = _mapping(meta.get("cells"))
        self.cells: list[Cell] = []
        self.cell_codes: dict[str, int] = {}
        self.sample_codes: dict[str, int] = {}
        self.cluster_codes: dict[str, int] = {}
        self.flag_bits = {name: i for i, name in enumerate(FLAGS)}
        self.flag_masks: dict[tuple[str, ...], int] = {(): 0}
        self.cell: list[int] = []
        self.sample: list[int] = []
        self.cluster: list[int] = []
        self.score: list[float] = []
        self.measured: list[float] = []
        self.n_prompt: list[float] = []
        self.answered: list[bool] = []
        self.truncated: list[bool] = []
        self.flags: list[int] = []

    def add(self, record: Any) -> None:
        """Raises KeyError, ValueError or TypeError for what is not a record, before anything is stored."""
        if not isinstance(record, dict):
            raise TypeError("not an object")
        if record.get("schema", SCHEMA) > SCHEMA:
            raise ValueError(f"schema {record['schema']} of a newer kvcli; this one reads {SCHEMA}")
        cell_id, sample_id = record["cell_id"], str(record["sample_id"])
        score = record["score"] if record.get("status", "ok") == "ok" else None
        value = np.nan if score is None else float(score)
        measured, n_prompt = _number(record.get("measured_ratio")), _number(record.get("n_prompt"))
        mask = self._mask(record.get("flags") or ())
        cell = self.cell_codes.get(cell_id)
        if cell is None:
            self.cells.append(_describe(cell_id, record, _mapping(self.described.get(cell_id))))
            cell = self.cell_codes[cell_id] = len(self.cell_codes)
        cluster = record.get("cluster")
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

    def run(self, folder: Path, torn: tuple[str, ...]) -> Run:
        cell, sample = np.array(self.cell, np.int32), np.array(self.sample, np.int32)
        keep = _last_of_each(cell, sample, len(self.sample_codes))
        return Run(
            folder, self.meta, tuple(self.cells), tuple(self.sample_codes), tuple(self.cluster_codes),
            tuple(self.flag_bits), cell[keep], sample[keep], np.array(self.cluster, np.int32)[keep],
            np.array(self.score, np.float64)[keep], np.array(self.measured, np.float64)[keep],
            np.array(self.n_prompt, np.float64)[keep], np.array(self.answered, np.bool_)[keep],
            np.array(self.truncated, np.bool_)[keep], np.array(self.flags, np.int64)[keep], torn,
        )  # fmt: skip


def _code(codes: dict[str, int], text: str) -> int:
    return codes.setdefault(text, len(codes))


def _number(value: Any) -> float:
    return np.nan if value is None else float(value)


def _last_of_each(cell: NDArray[np.int32], sample: NDArray[np.int32], samples: int) -> NDArray[np.int64]:
    """Row numbers, ascending, of the last record of every cell and sample."""
    key = cell.astype(np.int64) * samples + sample
    _, from_end = np.unique(key[::-1], return_index=True)
    return np.sort(len(key) - 1 - from_end)


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
        decode=_settings(decode), ability=fact("ability"), metric=fact("metric"),
    )  # fmt: skip


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
