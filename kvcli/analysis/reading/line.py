"""One line of samples.jsonl, of which only what the analysis needs is read.

msgspec decodes these fields of a line and skips the others, of which it looks for the ends only (`kvcli check` reads
all of every line). The standard library reads each line that msgspec declines, and says what is wrong with it; without
msgspec it reads them all. Both give the same record.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvcli.results.schema import SCHEMA


@dataclass(slots=True)
class Fidelity:
    kl: float | None = None
    top1: float | None = None
    nll: float | None = None
    identical: bool | float | None = None


@dataclass(slots=True)
class Bytes:
    full: float | None = None
    prefill: float | None = None
    end: float | None = None
    read: float | None = None
    match: float | None = None


@dataclass(slots=True)
class Context:
    tokens: float | None = None
    measured_ratio: float | None = None


@dataclass(slots=True)
class Line:
    """Fields as in kvcli.results.schema.FIELDS; one that the line lacks is None."""

    cell_id: str
    sample_id: str
    score: float | None = None
    schema: int | None = SCHEMA
    status: str | None = "ok"
    measured_ratio: float | None = None
    kept: float | None = None
    metric: str | None = None
    extra: dict[str, float] | None = None
    extracted: Any = None
    cluster: str | int | None = None
    finish: str | None = None
    n_prompt: float | None = None
    truncated: float | None = None
    context: Context | None = None
    n_new: float | None = None
    flags: list[str] | None = None
    kv_bytes: Bytes | None = None
    repetition: float | None = None
    incoherent: bool | float | None = None
    fidelity: Fidelity | None = None


def reader() -> Callable[[bytes], Line]:
    """bytes of one line -> Line. Raises ValueError, KeyError or TypeError for what is not a record."""
    try:
        import msgspec
    except ImportError:
        return read_slowly
    decode = msgspec.json.Decoder(Line).decode

    def read(line: bytes) -> Line:
        try:
            found = decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return read_slowly(line)
        return found if line.endswith(b"\n") else read_slowly(line)

    return read


def read_slowly(line: bytes) -> Line:
    """By the standard library, which takes numbers for names and what else other writers may have put there."""
    record = parse(line)
    cell_id, sample_id = record["cell_id"], str(record["sample_id"])
    status = record.get("status", "ok")
    extra = {str(name): float(value) for name, value in _mapping(record.get("extra")).items()}
    return Line(
        cell_id=str(cell_id), sample_id=sample_id, score=_number(record.get("score")) if status == "ok" else None,
        schema=record.get("schema", SCHEMA), status=status, measured_ratio=_number(record.get("measured_ratio")),
        kept=_number(record.get("kept")), metric=_text(record.get("metric")), extra=extra,
        extracted=record.get("extracted"), cluster=_text(record.get("cluster")), finish=_text(record.get("finish")),
        n_prompt=_number(record.get("n_prompt")), truncated=_number(record.get("truncated")),
        context=Context(**_numbers(record.get("context"), Context)), n_new=_number(record.get("n_new")),
        flags=[str(name) for name in record.get("flags") or ()], repetition=_number(record.get("repetition")),
        incoherent=_number(record.get("incoherent")),
        kv_bytes=Bytes(**_numbers(record.get("kv_bytes"), Bytes)),
        fidelity=Fidelity(**_numbers(record.get("fidelity"), Fidelity)),
    )  # fmt: skip


def parse(line: bytes, decode: Any = json.JSONDecoder().raw_decode) -> dict[str, Any]:
    """The object of one line; a third faster than json.loads on bytes, which guesses their encoding first."""
    if not line.endswith(b"\n"):
        raise ValueError("cut short")
    text = line.decode("utf-8").strip()
    value, end = decode(text)
    if end != len(text):
        raise json.JSONDecodeError("more than one value", text, end)
    if not isinstance(value, dict):
        raise TypeError("not an object")
    return value


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _numbers(value: Any, kind: Any) -> dict[str, float | None]:
    return {name: _number(_mapping(value).get(name)) for name in kind.__slots__}


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
