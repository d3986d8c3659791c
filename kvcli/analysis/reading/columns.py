"""Grows two typed arrays while records are read: about 200 bytes a record, whatever its texts."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcli.analysis.reading.line import Bytes, Context, Fidelity, Line
from kvcli.errors import KvcliError
from kvcli.results.schema import FLAGS, SCHEMA

NAN = float("nan")
WHOLE = ("cell", "sample", "cluster", "metric", "answered", "truncated", "flags", "offset")
"""Integers of a record, in the order in which `Columns.add` stores them."""
FIGURES = (
    "kept", "n_new", "repetition", "incoherent", "cut", "context_tokens", "context_ratio", "kl", "top1", "nll",
    "identical", "bytes_full", "bytes_prefill", "bytes_end", "bytes_read", "bytes_match",
)  # fmt: skip
"""Names of Run.figures."""
REAL = ("score", "measured_ratio", "n_prompt", *FIGURES)
"""Numbers of a record, NaN where it has none, in the order in which `Columns.add` stores them."""

_NO_CONTEXT, _NO_BYTES, _NO_FIDELITY = Context(), Bytes(), Fidelity()


class Columns:
    """What has been read so far. `describe` is called with the first line of each cell and keeps it."""

    def __init__(self, describe: Callable[[str, bytes], None], given: str) -> None:
        self._describe, self._given = describe, given
        self.cell_codes: dict[str, int] = {}
        self.sample_codes: dict[str, int] = {}
        self.cluster_codes: dict[str, int] = {}
        self.metric_codes: dict[str, int] = {}
        self.flag_bits = {name: i for i, name in enumerate(FLAGS)}
        self._flag_masks: dict[tuple[str, ...], int] = {}
        self.starts: list[int] = []
        """First row of each file."""
        self._count = 0
        self._whole, self._real = array("q"), array("d")
        """All of a record, then all of the next one."""
        self._extra: dict[str, tuple[array[int], array[float]]] = {}
        """Per name the rows that have it, and their figures."""

    def __len__(self) -> int:
        return self._count

    def add(self, record: Line, line: bytes, offset: int) -> None:
        """offset: where the line begins in its file. Raises KeyError, ValueError or TypeError for what is not a record,
        before anything is stored."""
        if record.schema is not None and record.schema > SCHEMA:
            what = f"records of a newer kvcli (schema {record.schema}, this one reads {SCHEMA})"
            raise KvcliError(what, given=self._given, fix="install the kvcli that wrote them")
        cell = self.cell_codes.get(record.cell_id)
        if cell is None:
            self._describe(record.cell_id, line)
            cell = self.cell_codes[record.cell_id] = len(self.cell_codes)
        flags, cluster, metric = record.flags, record.cluster, record.metric
        if record.extra:
            self._add_extra(record.extra)
        self._whole.extend((
            cell,
            self.sample_codes.setdefault(record.sample_id, len(self.sample_codes)),
            -1 if cluster is None or cluster == "" else _code(self.cluster_codes, str(cluster)),
            -1 if metric is None else self.metric_codes.setdefault(metric, len(self.metric_codes)),
            record.extracted is not None, record.finish == "length", self._mask(flags) if flags else 0, offset,
        ))  # fmt: skip
        context = record.context or _NO_CONTEXT
        size, distance = record.kv_bytes or _NO_BYTES, record.fidelity or _NO_FIDELITY
        figures = (
            record.score if record.status == "ok" else None, record.measured_ratio, record.n_prompt,
            record.kept, record.n_new, record.repetition, record.incoherent, record.truncated,
            context.tokens, context.measured_ratio, distance.kl, distance.top1, distance.nll, distance.identical,
            size.full, size.prefill, size.end, size.read, size.match,
        )  # fmt: skip
        self._real.extend([NAN if figure is None else figure for figure in figures])
        self._count += 1

    def _add_extra(self, extra: Mapping[str, float]) -> None:
        for name, figure in extra.items():
            rows, figures = self._extra.setdefault(name, (array("q"), array("d")))
            rows.append(self._count)
            figures.append(figure)

    def _mask(self, flags: list[str]) -> int:
        names = tuple(flags)
        mask = self._flag_masks.get(names)
        if mask is None:
            mask = self._flag_masks[names] = sum(1 << bit for bit in {_code(self.flag_bits, name) for name in names})
        return mask

    def whole(self) -> dict[str, NDArray[np.int64]]:
        """[N] per name of WHOLE."""
        table = np.frombuffer(self._whole, np.int64).reshape(-1, len(WHOLE))
        return {name: table[:, i] for i, name in enumerate(WHOLE)}

    def real(self) -> dict[str, NDArray[np.float64]]:
        """[N] per name of REAL."""
        table = np.frombuffer(self._real).reshape(-1, len(REAL))
        return {name: table[:, i] for i, name in enumerate(REAL)}

    def extra(self, keep: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        return {name: self._column(*found)[keep] for name, found in self._extra.items()}

    def _column(self, rows: Any, figures: Any) -> NDArray[np.float64]:
        column = np.full(len(self), np.nan)
        column[np.frombuffer(rows, np.int64)] = np.frombuffer(figures)
        return column

    def file_of_rows(self) -> NDArray[np.int64]:
        """For each row the number of its file."""
        return np.searchsorted(self.starts, np.arange(len(self)), side="right") - 1

    def samples(self) -> tuple[list[str], NDArray[np.int32]]:
        """Names in their order, and for each row the place of its sample in it."""
        names = sorted(self.sample_codes)
        place = np.empty(len(names), np.int32)
        place[[self.sample_codes[name] for name in names]] = np.arange(len(names), dtype=np.int32)
        return names, place[self.whole()["sample"]]


def counted(
    key: NDArray[np.int64], file: NDArray[np.int64], failed: NDArray[np.bool_]
) -> NDArray[np.int64]:  # fmt: skip
    """Row numbers, ascending, of the record that counts for every key (cell and sample): in a file the last one;
    between files a finished one, then the first file's."""
    _, from_end = np.unique((key * (int(file.max()) + 1) + file)[::-1], return_index=True)
    last = len(key) - 1 - from_end
    order = last[np.lexsort((file[last], failed[last], key[last]))]
    _, first = np.unique(key[order], return_index=True)
    return np.sort(order[first])


def _code(codes: dict[str, int], text: str) -> int:
    return codes.setdefault(text, len(codes))
