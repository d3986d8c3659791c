"""The texts of --weights: `dense`, `sparsegpt:sparsity=0.5`, `sparsegpt:2:4`. Knows no torch.

WEIGHTS := "dense" | "sparsegpt:" AMOUNT ("," SETTING)*      AMOUNT := "sparsity=" S | N ":" M
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from kvcli.errors import KvcliError, unknown
from kvcli.grammar import parse_ratios, ratio_text

DENSE = "dense"
FORMS = "dense, sparsegpt:sparsity=0.5 or sparsegpt:2:4"
_KEY = re.compile(r"\s*[A-Za-z_]\w*\s*=")
_PATTERN = re.compile(r"(\d+):(\d+)\Z")
_LEAST = {"samples": 1, "length": 8, "seed": 0, "block": 1}
"""Least value of each whole number."""


@dataclass(frozen=True)
class SparseGPT:
    """One-shot pruning of all linear layers in the decoder layers.

    sparsity: share of each matrix that becomes zero, or pattern (n, m): n of every m weights side by side in a row.
    samples, length: how many calibration texts of how many tokens; a model with less room takes shorter ones.
    """

    sparsity: str = ""
    pattern: tuple[int, int] | None = None
    samples: int = 128
    length: int = 2048
    seed: int = 0
    block: int = 128
    damp: float = 0.01

    @property
    def share(self) -> Decimal:
        """Share of the weights that become zero."""
        return Decimal(self.pattern[0]) / self.pattern[1] if self.pattern else Decimal(self.sparsity)

    def __str__(self) -> str:
        amount = f"{self.pattern[0]}:{self.pattern[1]}" if self.pattern else f"sparsity={self.sparsity}"
        changed = [f.name for f in dataclasses.fields(self) if f.name in (*_LEAST, "damp")]
        rest = [f"{n}={getattr(self, n)}" for n in sorted(changed) if getattr(self, n) != getattr(SparseGPT, n)]
        return f"sparsegpt:{','.join([amount, *rest])}"


@dataclass(frozen=True)
class Calibration:
    """A file of texts. kind: `text` (one running text, cut into sequences), `lines` or `jsonl` (one text a line)."""

    path: str
    kind: str
    sha: str

    @classmethod
    def of(cls, path: str) -> Calibration:
        """Raises KvcliError for a file that is not there, empty, not UTF-8 or without texts."""
        given, fix = f"--calib {path}", "a UTF-8 file: .txt a running text, .jsonl or any other one text per line"
        try:
            raw = Path(path).expanduser().read_bytes()
        except OSError as e:
            raise KvcliError(f"cannot read {path}: {(e.strerror or str(e)).lower()}", given=given, fix=fix) from e
        kind = {".txt": "text", ".jsonl": "jsonl"}.get(Path(path).suffix.lower(), "lines")
        found = cls(path, kind, hashlib.sha256(raw).hexdigest()[:12])
        try:
            texts = _texts(raw.decode("utf-8"), kind)
        except UnicodeDecodeError as e:
            raise KvcliError(f"{path} is not UTF-8 text", given=given, fix=fix) from e
        except ValueError as e:
            raise KvcliError(f"{path}: {e}", given=given, fix='{"text": "..."} on each line') from e
        if not texts:
            raise KvcliError(f"{path} holds no text", given=given, fix=fix)
        return found

    def texts(self) -> list[str]:
        return _texts(Path(self.path).expanduser().read_text(encoding="utf-8"), self.kind)


def _texts(whole: str, kind: str) -> list[str]:
    """Raises ValueError naming the line that holds no text."""
    if kind == "text":
        return [whole] if whole.strip() else []
    lines = [(number, line) for number, line in enumerate(whole.split("\n"), 1) if line.strip()]
    return [line.rstrip("\r") for _, line in lines] if kind == "lines" else [_entry(*item) for item in lines]


def _entry(number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except ValueError:
        raise ValueError(f"line {number} is not JSON") from None
    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"line {number} has no text")
    return text


@dataclass(frozen=True)
class Weights:
    """One value of the axis. text: as tables and records name it, other calibration data included."""

    text: str
    pruning: SparseGPT | None = None
    calibration: Calibration | None = None

    def facts(self) -> dict[str, Any]:
        """What it adds to the key of a cell: nothing for dense weights but their name."""
        if self.pruning is None:
            return {"weights": DENSE}
        data = {"kind": self.calibration.kind, "sha": self.calibration.sha} if self.calibration else {"kind": "testbed"}
        return {"weights": self.text, "pruning": {**dataclasses.asdict(self.pruning), "calibration": data}}


def parse_weights(texts: Iterable[str]) -> list[SparseGPT | None]:
    """All values of one or more --weights options in order, repeats dropped; None: dense.

    Raises KvcliError for any other form.
    """
    found: list[SparseGPT | None] = []
    for text in texts:
        whole: list[str] = []
        for piece in text.split(","):
            if _KEY.match(piece) and whole:
                whole[-1] += "," + piece
            else:
                whole.append(piece)
        for one in whole:
            value = _parse(one.strip(), f"--weights {text}")
            if value not in found:
                found.append(value)
    return found


def canonical(pruning: SparseGPT | None) -> str:
    return DENSE if pruning is None else str(pruning)


def resolve(texts: Iterable[str], calib: str | None) -> list[Weights]:
    """The values of the axis with their calibration data. Raises KvcliError where the file cannot be had."""
    values = parse_weights(texts)
    file = Calibration.of(calib) if calib is not None and any(values) else None
    return [
        Weights(DENSE) if v is None else Weights(f"{v},calib={file.sha[:8]}" if file else str(v), v, file)
        for v in values
    ]


def _parse(text: str, given: str) -> SparseGPT | None:
    if text == DENSE:
        return None
    name, colon, rest = text.partition(":")
    if name != "sparsegpt":
        fix = f"--weights sparsegpt:{text}" if _PATTERN.match(text) else f"--weights {FORMS}"
        raise KvcliError(f"'{text}' is no form of the weights", given=given, fix=fix)
    pieces = [piece.strip() for piece in rest.split(",")] if colon else []
    pattern = _pattern(pieces.pop(0), given) if pieces and "=" not in pieces[0] else None
    typed: dict[str, str] = {}
    for piece in pieces:
        key, equals, value = (part.strip() for part in piece.partition("="))
        if key not in ("sparsity", *_LEAST, "damp"):
            raise unknown(
                "setting of sparsegpt", key, ("sparsity", *_LEAST, "damp"), given=given, listing="docs/cli.md"
            )
        if not equals or not value or key in typed:
            raise KvcliError(f"'{piece}' is not one KEY=VALUE", given=given, fix=f"--weights {FORMS}")
        typed[key] = value
    if (pattern is None) == ("sparsity" not in typed):
        what = "sparsegpt needs a sparsity or a pattern" if pattern is None else "a pattern has its own sparsity"
        raise KvcliError(what, given=given, fix=f"--weights {FORMS}")
    whole = {key: _whole(key, typed[key], given) for key in _LEAST if key in typed}
    made = SparseGPT(_share(typed["sparsity"], given) if pattern is None else "", pattern, **whole)
    made = dataclasses.replace(made, damp=_damp(typed["damp"], given)) if "damp" in typed else made
    if pattern and made.block % pattern[1]:
        what = f"blocks of {made.block} columns do not hold whole groups of {pattern[1]}"
        raise KvcliError(what, given=given, fix=f"block={64 * pattern[1]}")
    return made


def _pattern(text: str, given: str) -> tuple[int, int]:
    match = _PATTERN.match(text)
    n, m = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 0 < n < m <= 64:
        what = f"'{text}' is no pattern N:M (N of every M weights are zero, 0 < N < M <= 64)"
        share = re.fullmatch(r"0?\.\d*[1-9]\d*", text)
        fix = f"--weights sparsegpt:sparsity={text}" if share else "--weights sparsegpt:2:4"
        raise KvcliError(what, given=given, fix=fix)
    return n, m


def _share(text: str, given: str) -> str:
    try:
        (value,) = parse_ratios([text])
    except (KvcliError, ValueError):
        value = Decimal(1)
    if value == 1:
        what = f"'sparsity={text}' must be a number above 0 and below 1"
        raise KvcliError(what, given=given, fix="--weights sparsegpt:sparsity=0.5")
    return ratio_text(value)


def _whole(key: str, text: str, given: str) -> int:
    if not text.isdecimal() or int(text) < _LEAST[key]:
        what = f"'{key}={text}' must be a whole number of at least {_LEAST[key]}"
        raise KvcliError(what, given=given, fix=f"{key}={getattr(SparseGPT, key)}")
    return int(text)


def _damp(text: str, given: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise KvcliError(f"'damp={text}' must lie above 0 and at most at 1", given=given, fix="damp=0.01")
    return value
