"""A result folder on disk: run.json, append-only records, prompts and kept positions; resume, locks, torn lines.

    run.json                    written whole: temporary file, fsync, rename
    samples.jsonl               one line per record; or shards/I-of-N.jsonl, one file per process
    prompts.jsonl               each distinct prompt once; or prompts-I-of-N.jsonl
    kept/TASK/SAMPLE/CELL.npz   positions a cell kept of a prompt

A record is one write of one line to a file opened for appending, so a killed process loses at most the line it was
writing; such a torn last line counts as not written. fsync follows every FSYNC_SECONDS and at close: a power cut can
lose what was written since, and the same command measures it again.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from kvcli import __version__
from kvcli.errors import Exit, KvcliError, unknown
from kvcli.results.schema import FIELDS, KEY, SCHEMA, check_record

if TYPE_CHECKING:
    from numpy import ndarray

RUN, SAMPLES, PROMPTS, SHARDS, KEPT = "run.json", "samples.jsonl", "prompts.jsonl", "shards", "kept"
BENCH = "bench.jsonl"
"""What a folder of `kvcli bench` holds instead."""
FSYNC_SECONDS = 10.0

Key = tuple[str, str]
"""(cell_id, sample_id)"""


# --- errors of the file system ----------------------------------------------------------------------------------------


def _cannot_open(e: OSError, folder: Path) -> KvcliError:
    """An OSError before any work: the user's choice of folder, unless the disk is full."""
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
        return _cannot_write(e, folder)
    reason = (e.strerror or str(e)).lower()
    return KvcliError(f"cannot write to {folder}: {reason}", given=f"--out {folder}", fix="--out with another folder")


def _cannot_write(e: OSError, path: Path) -> KvcliError:
    """An OSError in the middle of the work: the machine's fault, and the same command goes on from there."""
    what = "make the folder reachable again"
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
        what = "free some space"
    reason = (e.strerror or str(e)).lower()
    fix = f"{what}, then type the same command again: it resumes"
    return KvcliError(f"cannot write {path}: {reason}", given=str(path), fix=fix, code=Exit.ENVIRONMENT)


def check_out(folder: Path) -> None:
    """Raises KvcliError when results could not be written to `folder`. Creates nothing."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    given, fix = f"--out {folder}", "--out with another folder"
    if not there.is_dir():
        raise KvcliError(f"{there} is not a folder", given=given, fix=fix)
    if not os.access(there, os.W_OK | os.X_OK):
        raise KvcliError(f"cannot write to {there}: permission denied", given=given, fix=fix)


# --- files ------------------------------------------------------------------------------------------------------------


def write_atomic(path: Path, data: bytes, *, durable: bool = True) -> None:
    """The file is the old one or the new one, whole, at every moment; `durable`: after a power cut too."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        part.replace(path)
        if durable:
            _sync_folder(path.parent)
    except OSError as e:
        with suppress(OSError):
            part.unlink()
        raise _cannot_write(e, path) from e


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def encode(value: Mapping[str, Any]) -> bytes:
    """One line of strict JSON in UTF-8; lone surrogates become JSON escapes."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"


@dataclass(frozen=True)
class Line:
    """One line of a jsonl file. value: None where it is broken; `torn` where that is the last line."""

    number: int
    start: int
    raw: bytes
    value: dict[str, Any] | None
    torn: bool = False


def read_lines(path: Path, keys: Iterable[str] = ()) -> Iterator[Line]:
    """All lines that are not blank, broken ones too; a line without one of `keys` counts as broken."""
    required = tuple(keys)
    with path.open("rb") as file:
        start, broken = 0, None
        for number, raw in enumerate(file, 1):
            if broken:
                yield broken
                broken = None
            value = _object(raw) if raw.endswith(b"\n") else None
            if value is not None and all(key in value for key in required):
                yield Line(number, start, raw, value)
            elif raw.strip():
                broken = Line(number, start, raw, None)
            start += len(raw)
        if broken:
            yield Line(broken.number, broken.start, broken.raw, None, torn=True)


def _object(raw: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(raw)
    except ValueError:  # JSON and UTF-8 errors alike
        return None
    return value if isinstance(value, dict) else None


def _whole_lines(path: Path, keys: Iterable[str] = ()) -> Iterator[Line]:
    """Lines without the torn last one. Raises KvcliError for a broken line before the last."""
    for line in read_lines(path, keys):
        if line.value is not None:
            yield line
        elif not line.torn:
            folder = path.parent.parent if path.parent.name == SHARDS else path.parent
            fix = f"kvcli check {folder} --fix     (sets that line aside; the same sweep measures its sample again)"
            raise KvcliError(f"{path}:{line.number} is not a record", given=f"{len(line.raw)} bytes", fix=fix)


def _cut_torn(path: Path, keys: Iterable[str]) -> list[str]:
    """Saves a torn last line beside the file and cuts it off. Returns notes."""
    if not path.exists():
        return []
    start, raw = _last_line(path)
    value = _object(raw) if raw.endswith(b"\n") else None
    if not raw.strip() or (value is not None and all(key in value for key in keys)):
        return []
    set_aside(path, [raw])
    os.truncate(path, start)
    return [f"{path}: the last line was cut short ({len(raw)} bytes): saved in {path.name}.torn, measured again"]


def _last_line(path: Path) -> tuple[int, bytes]:
    """Where the last line begins, and the line."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        span = 1 << 16
        while True:
            start = file.seek(max(0, size - span))
            tail = file.read()
            cut = tail.rfind(b"\n", 0, -1)
            if cut >= 0 or start == 0:
                return start + cut + 1, tail[cut + 1 :]
            span *= 4


def set_aside(path: Path, lines: Iterable[bytes]) -> None:
    """Appends broken lines to PATH.torn, so that nothing is lost."""
    with path.with_name(path.name + ".torn").open("ab") as file:
        file.writelines(raw if raw.endswith(b"\n") else raw + b"\n" for raw in lines)


class _Lines:
    """A jsonl file opened for appending."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._synced = time.monotonic()

    def append(self, value: Mapping[str, Any]) -> None:
        data = encode(value)
        before = None
        try:
            before = self._size_if_there()
            view = memoryview(data)
            while view:
                view = view[os.write(self._fd, view) :]
            if time.monotonic() - self._synced > FSYNC_SECONDS:
                self.sync()
        except OSError as e:
            if before is not None:
                with suppress(OSError):
                    os.ftruncate(self._fd, before)  # what was written of the line would break the next one
            raise _cannot_write(e, self.path) from e

    def _size_if_there(self) -> int:
        """Size of the open file. Raises OSError when the path no longer leads to it: writes would be lost unseen."""
        mine, there = os.fstat(self._fd), self.path.stat()
        if (mine.st_ino, mine.st_dev) != (there.st_ino, there.st_dev):
            raise FileNotFoundError(errno.ENOENT, "it was moved or replaced", str(self.path))
        return mine.st_size

    def sync(self) -> None:
        os.fsync(self._fd)
        self._synced = time.monotonic()

    def close(self) -> None:
        try:
            self.sync()
        except OSError as e:
            raise _cannot_write(e, self.path) from e
        finally:
            os.close(self._fd)


class Lock:
    """Holds a file for this process until `release` or its end, kill -9 included. Its text names the holder."""

    def __init__(self, path: Path, *, wait: bool = False, guards: Path | None = None) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._take(wait, guards or path)
        except BaseException:
            os.close(self._fd)
            raise

    def _take(self, wait: bool, guards: Path) -> None:
        for attempt in range(4):  # `kvcli status` may be looking at it this very moment
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                break
            except BlockingIOError:
                time.sleep(0.05)
                if attempt == 3:
                    raise _in_use(guards, _holder(self._fd)) from None
            except OSError as e:
                if e.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
                break  # a file system without locks
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)

    def release(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _holder(fd: int) -> str:
    return os.pread(fd, 200, 0).decode("utf-8", "replace").strip() or "another process"


def _in_use(path: Path, holder: str) -> KvcliError:
    fix = f"wait for {holder} or stop it; or --out with another folder"
    return KvcliError(f"{path} is being written by {holder}", given=str(path), fix=fix)


def _lock_path(samples: Path) -> Path:
    return samples.with_name(f".{samples.name}.lock")


def lock_records(samples: Path) -> Lock:
    """The right to write one file of records. Raises KvcliError naming the process that has it."""
    return Lock(_lock_path(samples), guards=samples)


def writers(folder: Path) -> list[str]:
    """Who writes records into the folder now: 'process 4711 on node3'."""
    found = []
    for path in record_files(folder):
        try:
            fd = os.open(_lock_path(path), os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            found.append(_holder(fd))
        finally:
            os.close(fd)
    return found


# --- reading ----------------------------------------------------------------------------------------------------------


def is_run(folder: Path) -> bool:
    return (folder / RUN).is_file() or (folder / SAMPLES).is_file() or (folder / SHARDS).is_dir()


def find_run(text: str, root: Path = Path("runs")) -> Path:
    """The result folder a user means: its path, its name under runs/, or a unique prefix of either."""
    path = Path(text).expanduser()
    if path.name in (RUN, SAMPLES) and path.is_file():
        path = path.parent
    for exact in (path, root / path) if text else ():
        if is_run(exact):
            return exact
    found: dict[Path, Path] = {}
    for start in (path, root / path):
        if start.parent.is_dir() and text:
            near = (p for p in start.parent.iterdir() if p.name.startswith(start.name) and is_run(p))
            found.update((p.resolve(), p) for p in sorted(near))
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        names = ", ".join(str(p) for p in found.values())
        raise KvcliError(f"'{text}' begins {len(found)} result folders", given=text, fix=f"one of {names}")
    for there in (path, root / path) if text else ():
        if (there / BENCH).is_file():
            raise KvcliError(f"{there} holds measurements of bench, not results", given=text, fix=f"kvcli plot {there}")
    if path.is_dir():
        fix = "kvcli list runs shows all"
        raise KvcliError(f"{path} is not a result folder: it has no {RUN}", given=text, fix=fix)
    # names without their root: what all of them begin with would make any two of them look alike
    known = {p.name: str(p) for p in root.iterdir() if is_run(p)} if root.is_dir() else {}
    guess = unknown("result folder", path.name, known, given=text, listing="kvcli list runs").fix or ""
    name, *listing = guess.split("     ", 1)
    fix = "     ".join([known.get(name, name), *listing])
    raise KvcliError(f"unknown result folder '{text}'", given=text, fix=fix)


def read_run(folder: Path) -> dict[str, Any]:
    """run.json. Raises KvcliError when it is missing, broken or of a newer kvcli."""
    path = folder / RUN
    fix = "give the folder of a sweep     (kvcli list runs shows all)"
    try:
        run = _object(path.read_bytes())
    except OSError as e:
        raise KvcliError(f"cannot read {path}: {(e.strerror or str(e)).lower()}", given=str(folder), fix=fix) from e
    if run is None:
        raise KvcliError(f"{path} is not a JSON object", given=str(folder), fix="restore it from a copy")
    _check_schema(run, path)
    return run


def _check_schema(value: Mapping[str, Any], path: Path) -> None:
    if isinstance(value.get("schema"), int) and value["schema"] > SCHEMA:
        what = f"{path} was written by a newer kvcli (schema {value['schema']}, this one reads {SCHEMA})"
        raise KvcliError(what, given=str(path), fix="install the kvcli that wrote it")


def record_files(folder: Path) -> list[Path]:
    """samples.jsonl, then the shards by name; those that exist."""
    return [p for p in (folder / SAMPLES, *sorted((folder / SHARDS).glob("*.jsonl"))) if p.is_file()]


def prompt_files(folder: Path) -> list[Path]:
    return [p for p in (folder / PROMPTS, *sorted(folder.glob("prompts-*.jsonl"))) if p.is_file()]


def key_of(record: Mapping[str, Any]) -> Key:
    return str(record[KEY[0]]), str(record[KEY[1]])


def read_records(folder: Path, fields: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """One record per cell and sample of all record files; only the key, status and `fields` of it where given.

    In a file the last line of a key counts; between files `ok` beats `error`, then the first file. A torn last line
    counts as not written. Raises KvcliError naming file and line for any other broken line.
    """
    names = None if fields is None else (*KEY, "status", *fields)
    records: dict[Key, dict[str, Any]] = {}
    for path in record_files(folder):
        mine: dict[Key, dict[str, Any]] = {}
        for line in _whole_lines(path, KEY):
            value = line.value or {}
            _check_schema(value, path)
            mine[key_of(value)] = value if names is None else {name: value.get(name) for name in names}
        _merge(records, mine)
    return list(records.values())


def _merge(records: dict[Key, dict[str, Any]], more: dict[Key, dict[str, Any]]) -> None:
    for key, record in more.items():
        if key not in records or (records[key].get("status") != "ok" and record.get("status") == "ok"):
            records[key] = record


def read_prompts(folder: Path) -> dict[str, dict[str, Any]]:
    """Stored prompts by their hash: {sha, task, sample_id, text, offsets, regions}."""
    found: dict[str, dict[str, Any]] = {}
    for path in prompt_files(folder):
        for line in _whole_lines(path, ("sha",)):
            value = line.value or {}
            found.setdefault(value["sha"], value)
    return found


def ensure_same(old: Mapping[str, Any], new: Mapping[str, Any], folder: Path) -> None:
    """Refuses to mix results: raises KvcliError naming each part of the identity that differs."""
    differ = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    if differ:
        there = ", ".join(f"{name}: {_short(old.get(name))}" for name in differ)
        now = ", ".join(f"{name}: {_short(new.get(name))}" for name in differ)
        what = f"{folder} holds results of another {' and '.join(differ)}"
        fix = "--out with another folder, or the settings that folder was made with"
        raise KvcliError(what, given=f"{now}; {folder} has {there}", fix=fix)


def _short(value: Any) -> str:
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# --- kept positions ---------------------------------------------------------------------------------------------------


def _safe(name: str) -> str:
    """A file name for any text; different texts get different names."""
    clean = re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:100]
    if clean == name and not name.startswith("."):
        return name
    import hashlib

    return f"{clean.lstrip('.')}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def map_path(folder: Path, task: str, sample_id: str, cell_id: str) -> Path:
    return folder / KEPT / _safe(task) / _safe(sample_id) / f"{_safe(cell_id)}.npz"


def read_map(path: Path) -> list[list[ndarray]]:
    """Kept positions per layer and KV head; one entry in a layer whose heads are all alike."""
    import numpy as np

    with np.load(path, allow_pickle=False) as data:
        ends, heads, positions = np.cumsum(data["lengths"]), data["heads"], data["positions"]
    rows = iter(np.split(positions, ends[:-1]))
    return [[next(rows) for _ in range(count)] for count in heads.tolist()]


def _pack(kept: Iterable[Any]) -> bytes:
    import io

    import numpy as np

    heads: list[int] = []
    rows: list[Any] = []
    for layer in kept:
        ragged = isinstance(layer, list) and not isinstance(layer[0], int)
        parts = [_array(head) for head in layer] if ragged else list(np.atleast_2d(_array(layer)))
        heads.append(len(parts))
        rows.extend(parts)
    out = io.BytesIO()
    np.savez_compressed(
        out,
        heads=np.array(heads, np.int32),
        lengths=np.array([len(row) for row in rows], np.int32),
        positions=np.concatenate(rows).astype(np.int32),
    )
    return out.getvalue()


def _array(value: Any) -> Any:
    import numpy as np

    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)


# --- writing ----------------------------------------------------------------------------------------------------------


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class RunStore:
    """A result folder opened for writing, alone with its file of records. Close it, or use `with`.

    notes: what the user should hear about the state the folder was found in.
    Raises KvcliError at once when the folder cannot be written, its records are broken or another process writes them.
    """

    def __init__(self, folder: Path | str, *, shard: tuple[int, int] | None = None) -> None:
        self.folder = Path(folder)
        name = f"{shard[0]}-of-{shard[1]}" if shard else ""
        samples = self.folder / SHARDS / f"{name}.jsonl" if shard else self.folder / SAMPLES
        prompts = self.folder / (f"prompts-{name}.jsonl" if shard else PROMPTS)
        check_out(self.folder)
        try:
            samples.parent.mkdir(parents=True, exist_ok=True)
            self._lock = lock_records(samples)
        except OSError as e:
            raise _cannot_open(e, self.folder) from e
        try:
            self._open(samples, prompts)
        except OSError as e:
            self._lock.release()
            raise _cannot_open(e, self.folder) from e
        except BaseException:
            self._lock.release()
            raise

    def _open(self, samples: Path, prompts: Path) -> None:
        self._status = {key_of(r): str(r.get("status")) for r in read_records(self.folder, ())}
        self._shas = set(read_prompts(self.folder))
        self.notes = _cut_torn(samples, KEY) + _cut_torn(prompts, ("sha",))
        self._samples = _Lines(samples)
        self._prompts = _Lines(prompts)

    def done_keys(self) -> set[Key]:
        """(cell_id, sample_id) of all records with status ok, other shards' included. Errors are to be run again."""
        return {key for key, status in self._status.items() if status == "ok"}

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes one record. Raises ValueError for wrong fields, KvcliError when it cannot be saved."""
        check_record(dict(record))
        self._samples.append({name: record[name] for name in FIELDS})
        self._status[key_of(record)] = str(record["status"])

    def add_prompt(self, prompt: Mapping[str, Any]) -> None:
        """Writes {sha, task, sample_id, text, offsets, regions} once per sha."""
        if prompt["sha"] not in self._shas:
            self._prompts.append(prompt)
            self._shas.add(prompt["sha"])

    def keep_map(self, task: str, sample_id: str, cell_id: str, kept: Iterable[Any]) -> None:
        """Saves kept positions: per layer [K] (all heads alike), [H_kv, K], or H_kv of [K] in a list."""
        path = map_path(self.folder, task, sample_id, cell_id)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise _cannot_write(e, path) from e
        write_atomic(path, _pack(kept), durable=False)

    @contextmanager
    def edit_run(self) -> Iterator[dict[str, Any]]:
        """run.json to be changed in place; written when the block ends well, one process at a time."""
        try:
            lock = Lock(self.folder / ".run.json.lock", wait=True)
        except OSError as e:
            raise _cannot_write(e, self.folder / RUN) from e
        with lock:
            exists = (self.folder / RUN).exists()
            run = read_run(self.folder) if exists else {"schema": SCHEMA, "kvcli": __version__, "created": now()}
            yield run
            run["updated"] = now()
            write_atomic(self.folder / RUN, json.dumps(run, indent=1, ensure_ascii=False).encode() + b"\n")

    def close(self) -> None:
        try:
            self._samples.close()
        finally:
            try:
                self._prompts.close()
            finally:
                self._lock.release()

    def __enter__(self) -> RunStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
