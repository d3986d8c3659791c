"""Rows of a data set: from JSON Lines in `--data-dir`, or from the hub through `datasets`."""

from __future__ import annotations

import contextlib
import json
import random
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from kvcli import hub
from kvcli.errors import KvcliError
from kvcli.grammar import task_base

T = TypeVar("T")


@dataclass(frozen=True)
class DataSet:
    """Where a task's rows are: `path`, `name` and `revision` as `datasets.load_dataset` takes them."""

    task: str
    path: str | None
    name: str | None = None
    revision: str | None = None

    def folder_names(self) -> list[str]:
        """Names its folder may have in `--data-dir`: the task's, the data set's last word, the configuration's."""
        words = [task_base(self.task), self.path.rpartition("/")[2] if self.path else None, self.name]
        both = [spelling for word in words if word for spelling in (word, _plain(word))]
        return list(dict.fromkeys(both))


@dataclass(frozen=True)
class Row:
    """One row, its number from 0, and where it stands for messages (file and line)."""

    values: dict[str, Any]
    index: int
    where: str


def permutation(salt: str, n: int) -> list[int]:
    """The numbers below n in an order fixed by the text alone."""
    order = list(range(n))
    random.Random(salt).shuffle(order)
    return order


def first_of(task: str, n: int, limit: int | None) -> list[int]:
    """The first `limit` of the task's permutation of n samples: 20 is inside 100. Its settings do not count."""
    if limit is not None and limit < 1:
        raise KvcliError("a limit must be at least 1", given=f"--limit {limit}", fix="--limit 20")
    return permutation(f"kvcli:{task_base(task)}", n)[:limit]


def read_split(data: DataSet, split: str, data_dir: str | None) -> list[Row]:
    """All rows of a split. Raises KvcliError when they cannot be had, or when there are none."""
    rows = read_jsonl(split_file(data, split, data_dir)) if data_dir is not None else load_hub(data, split)
    if not rows:
        where = split_file(data, split, data_dir) if data_dir is not None else f"{data.path} {split}"
        raise KvcliError(f"{where}: split '{split}' is empty", given=f"--task {data.task}", fix="put rows into it")
    return rows


def find_folder(data: DataSet, data_dir: str) -> Path:
    """The data set's folder in `--data-dir`."""
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise KvcliError(f"no folder {root}", given=f"--data-dir {data_dir}", fix="check the path")
    for name in data.folder_names():
        if (root / name).is_dir():
            return root / name
    fix = f"name its folder {root / data.folder_names()[0]}"
    if data.path:
        fix += ", or leave --data-dir out to load from the hub"
    wanted = ", ".join(data.folder_names())
    what = f"no rows for task '{data.task}' in {root}: no sub-folder {wanted}"
    raise KvcliError(what, given=f"--data-dir {data_dir}", fix=fix)


def split_file(data: DataSet, split: str, data_dir: str) -> Path:
    """`<split>.jsonl` in the data set's folder, or `<configuration>/<split>.jsonl`, `<configuration>_<split>.jsonl`."""
    folder = find_folder(data, data_dir)
    names = [f"{data.name}/{split}.jsonl", f"{data.name}_{split}.jsonl"] if data.name else []
    for name in [*names, f"{split}.jsonl"]:
        if (folder / name).is_file():
            return folder / name
    there = ", ".join(sorted(p.name for p in folder.glob("*.jsonl"))) or "no .jsonl file"
    what = f"no split '{split}' of task '{data.task}': no file {folder / split}.jsonl"
    raise KvcliError(what, given=f"--data-dir {data_dir} (has {there})", fix=f"write {split}.jsonl, one row a line")


def read_jsonl(path: Path) -> list[Row]:
    """Rows of a JSON Lines file. Raises KvcliError naming the line that cannot be used."""
    rows: list[Row] = []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as e:
        raise KvcliError(f"cannot read {path}: {e.strerror}", given=str(path), fix="check the file") from e
    for number, line in enumerate(lines, 1):
        if line.strip():
            rows.append(Row(_parsed(line, f"{path}:{number}", number == len(lines)), len(rows), f"{path}:{number}"))
    return rows


def _parsed(line: bytes, where: str, last: bool) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except UnicodeDecodeError as e:
        raise KvcliError(f"{where}: not UTF-8 text", given=where, fix="save the file as UTF-8") from e
    except (ValueError, RecursionError) as e:
        cut = last and line.lstrip().startswith(b"{") and not line.rstrip().endswith(b"}")
        what = "the line is cut off" if cut else f"not a JSON object: {e}"
        fix = "get the file again: it ends in the middle" if cut else "mend or remove that line"
        raise KvcliError(f"{where}: {what}", given=where, fix=fix) from e
    if not isinstance(values, dict):
        fix = 'write {"field": value, ...}'
        raise KvcliError(f"{where}: a row must be a JSON object, not {type(values).__name__}", given=where, fix=fix)
    return values


def bad_row(row: Row, what: str, task: str, source: str) -> KvcliError:
    """The error for a row that a task cannot use."""
    fix = f"mend the row, or the templates in {source}" if source else "mend the row"
    return KvcliError(f"{row.where}: {what}", given=f"--task {task}", fix=fix)


def load_hub(data: DataSet, split: str) -> list[Row]:
    """All rows of a split from the hub, or from the local cache of an earlier download when the hub is away."""
    if data.path is None:
        fix = f"--data-dir DIR with {data.task}/{split}.jsonl in it"
        raise KvcliError(f"task '{data.task}' names no data set on the hub", given=f"--task {data.task}", fix=fix)
    import datasets  # noqa: F401 - so that `offline` reaches it too

    reason = hub.unreachable("dataset", data.path, data.revision)
    try:
        with hub.offline() if reason else contextlib.nullcontext():
            loaded = _load_dataset(data, split)
    except Exception as e:
        raise _hub_error(data, split, reason, e) from e
    where = f"{data.path}/{split}"
    rows = [Row(dict(values), i, f"{where} row {i + 1}") for i, values in enumerate(loaded)]
    for watch in _watching:
        watch.append(Loaded(data, split, len(rows), *_files_of(loaded)))
    return rows


@dataclass(frozen=True)
class Loaded:
    """A split that came from the hub or its local cache: its rows, and the folder and bytes of its files there."""

    data: DataSet
    split: str
    rows: int
    folder: str | None
    size: int


_watching: list[list[Loaded]] = []


@contextlib.contextmanager
def watched() -> Iterator[list[Loaded]]:
    """A list that fills with the splits that are loaded from the hub inside the block."""
    seen: list[Loaded] = []
    _watching.append(seen)
    try:
        yield seen
    finally:
        _watching.remove(seen)


def _files_of(loaded: Any) -> tuple[str | None, int]:
    files = [Path(file["filename"]) for file in getattr(loaded, "cache_files", None) or ()]
    return (str(files[0].parent) if files else None), sum(f.stat().st_size for f in files if f.is_file())


def _load_dataset(data: DataSet, split: str) -> Any:
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return datasets.load_dataset(data.path, data.name, split=split, revision=data.revision)


def _hub_error(data: DataSet, split: str, reason: str, error: Exception) -> KvcliError:
    named = f"{data.path}" + (f" ({data.name})" if data.name else "")
    given = f"--task {data.task}: {named}, split {split}"
    folder = data.folder_names()[-1 if not data.path else 0]
    fix = f"--data-dir DIR with {folder}/{split}.jsonl in it"
    if reason:
        return KvcliError(f"the hub cannot be reached for data set {named}: {reason}", given=given, fix=fix)
    if "gated" in str(error).lower():
        return hub.gated(str(data.path), given, "dataset")
    first = str(error).strip().split("\n")[0]
    return KvcliError(f"data set {named} cannot be loaded: {first}", given=given, fix=fix)


def _plain(name: str) -> str:
    return re.sub(r"\W+", "_", name).lower()


def reordered(items: Sequence[T], order: int) -> list[T]:
    """The same items as they come (0) or in the order of that number: what `--shot-order` does to shots."""
    return list(items) if order == 0 else [items[i] for i in permutation(f"kvcli:order:{order}", len(items))]
