"""What a plan will hold at its peak, from sizes alone: caches, what methods keep beside the pairs, the comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvcli.cache.budget import Budget
from kvcli.engine.cells import Cell, ratio_of
from kvcli.engine.plan import DecodeBatch

if TYPE_CHECKING:
    from kvcli.engine.estimate import Sizes
    from kvcli.methods.base import Method

SHORT = 64
"""Tokens of the prompt of zeros that methods' own code is asked about: figures per pair do not depend on its length."""
COPIES = 5
"""Float32 tensors as large as one row's logits that a comparison makes."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak, by what holds them; activations are an order of magnitude."""

    weights: int
    prompts: int
    """Dense caches of the samples that are prefilled together."""
    decode: int
    """Compressed caches of one decode batch, padding, room and the spare layer included, and what its rows and those
    that wait for their comparison hold beside the prompts: merged pairs, prefills of their own."""
    figures: int
    """Beside these where rows go on evicting: positions, and what methods keep per pair."""
    comparison: int
    """Caches that read full's answers again, full's predictions and the logits compared with them."""
    activations: int

    @property
    def peak(self) -> int:
        return self.weights + self.prompts + self.decode + self.figures + self.comparison + self.activations


@dataclass(frozen=True)
class _Row:
    """Pairs per KV head that a row holds at most in its cache, and of its own; rows that are `alike` share these."""

    slots: int
    own: int
    alike: object


@dataclass
class Peak:
    """The largest of the batches that were added. room: bytes that the caches of one decode batch may take; compared:
    whether rows are compared with full's predictions."""

    sizes: Sizes
    itemsize: int
    room: int
    methods: dict[str, Method]
    compared: bool
    decode: int = 0
    figures: int = 0
    comparison: int = 0
    _beside: dict[tuple[object, ...], int] = field(default_factory=dict)

    def add(self, decodes: Sequence[DecodeBatch], samples: int, n: int, new: int) -> None:
        """Decode batches of so many samples of up to n tokens, with answers of up to `new`."""
        from kvcli.engine.decoding import FLUSH

        token = self.sizes.kv_elements * self.itemsize
        for decode in decodes:
            rows = [cell for _, cell in decode.rows]
            beside = max(self.beside(cell, n) for cell in rows)
            room, sizes = self.room // (token + beside), self._rows(decode.rows, n, new)
            padded, own = _largest(sizes, room)
            own += min(room, max(_own(sizes[i : i + FLUSH]) for i in range(0, len(sizes), FLUSH)))
            held = self._with_spare(padded * token) + own * (token + beside)
            self.decode = max(self.decode, held)  # buffers stay as large as the largest
            self.figures = max(self.figures, self._with_spare(padded * beside))
            if self.compared:
                self.comparison = max(self.comparison, self._compared(decode, samples, n, new, token + beside))

    def beside(self, cell: Cell, n: int) -> int:
        """Bytes that a row holds beside the pairs per slot, over all layers."""
        if cell.decode is None:
            return 0
        method = self.methods[cell.method]
        key = (cell.method, *((n, cell.ratio, cell.budget) if method.kind == "in-prefill" else ()))
        if key not in self._beside:
            budget = _budget(cell, n, self.sizes.layers, self.sizes.kv_heads)
            self._beside[key] = self.sizes.layers * _per_slot(method, budget, self.sizes, self.itemsize)
        return self._beside[key]

    def _with_spare(self, size: int) -> int:
        """A layer that is rebuilt is held twice."""
        return int(size * (1 + 1 / self.sizes.layers))

    def _slots(self, cell: Cell, n: int, new: int) -> int:
        """Pairs per KV head that a row holds at most."""
        from kvcli.engine.pool_rows import Cap

        budget = _budget(cell, n, 1, 1)
        kept = budget.per_head
        if cell.decode is None:
            return kept + new
        cap = Cap.of(cell.decode, budget, self.methods[cell.method])
        return min(kept + 1 + new, cap.at(new) + cell.decode["interval"] + (kept + 1 if cap.separate else 0))

    def _rows(self, rows: Sequence[tuple[int, Cell]], n: int, new: int) -> list[_Row]:
        """rows: samples and cells."""
        from kvcli.methods.composed import merge_of

        found = []
        for sample, cell in rows:
            method = self.methods[cell.method]
            holds = method.kind == "in-prefill" or merge_of(method) is not None
            alike = (sample, cell.method, cell.ratio, cell.budget, cell.match, cell.seed if method.seeded else None)
            own = _budget(cell, n, 1, 1).per_head if holds else 0
            found.append(_Row(self._slots(cell, n, new), own, alike))
        return found

    def _compared(self, decode: DecodeBatch, samples: int, n: int, new: int, slot: int) -> int:
        """slot: bytes of a pair and what is beside it, over all layers."""
        from kvcli.engine.comparing import MOST_BYTES
        from kvcli.engine.decoding import FLUSH
        from kvcli.engine.fidelity import _LOGITS, MOST_TOKENS

        rows = [(sample, cell) for sample, cell in decode.rows if cell.method != "full"]
        mine = [cell for _, cell in rows]
        if not mine:
            return 0
        tokens = min(new, MOST_TOKENS)
        sizes = self._rows(rows, n, tokens)
        groups = [_largest(sizes[i : i + FLUSH], self.room // slot)[0] for i in range(0, len(sizes), FLUSH)]
        own = (n + tokens) * self.sizes.kv_elements * self.itemsize  # the cache in which full predicts its answer
        prediction = tokens * self.sizes.vocabulary * self.itemsize
        held = min(max(MOST_BYTES, prediction), samples * len({c.first_token for c in mine}) * prediction)
        together = min(len(mine), FLUSH)
        logits = min(max(_LOGITS, together * self.sizes.vocabulary), together * tokens * self.sizes.vocabulary)
        pass_ = logits * self.itemsize + logits // together * COPIES * max(4, self.itemsize)
        return self._with_spare(max(own, max(groups) * slot)) + held + pass_


def _budget(cell: Cell, n: int, layers: int, kv_heads: int) -> Budget:
    ratio = ratio_of(cell)
    if ratio is not None:
        return Budget.of_ratio(ratio, n, layers, kv_heads)
    return Budget.of_size(cell.budget or n, n, layers, kv_heads)


def _largest(rows: Sequence[_Row], room: int) -> tuple[int, int]:
    """Of the largest batches when rows enter in this order as far as `room` slots go, one always: padded slots of the
    cache, and slots that the rows hold themselves."""
    padded = held = 0
    seen: set[object] = set()
    count = widest = own = 0
    for row in rows:
        wider, more = max(widest, row.slots), own + (0 if row.alike in seen else row.own)
        if count and (count + 1) * wider + more > room:
            count, seen, wider, more = 0, set(), row.slots, row.own
        seen.add(row.alike)
        count, widest, own = count + 1, wider, more
        padded, held = max(padded, count * widest), max(held, own)
    return padded, held


def _own(rows: Sequence[_Row]) -> int:
    """Slots that these rows hold themselves."""
    return sum({row.alike: row.own for row in rows}.values())


def _per_slot(method: Any, budget: Budget, sizes: Sizes, itemsize: int) -> int:
    """Bytes of a slot of one layer beside its pairs: what the rows say that the method's own code begins with."""
    import torch

    from kvcli.engine.pool_rows import PoolRow

    try:
        state = _begun(method, budget, sizes, itemsize)
    except Exception:  # a method that reads more than zeros can give: its rows are counted once they are there
        state = {}
    pair = torch.zeros(sizes.kv_heads, 1, 1)
    return PoolRow([pair], [pair], [torch.arange(1)], state=[state]).beside(0)[0]


def _begun(method: Any, budget: Budget, sizes: Sizes, itemsize: int) -> dict[str, Any]:
    """The figures of a short prompt's pairs as generation begins, or of one pair of a prefill of the method's own."""
    import torch

    from kvcli.methods.context import Context, Region

    exact = torch.float64 if itemsize == 8 else torch.float32
    if method.kind == "in-prefill" and method.prefill_window() is None:
        plan = method.prefill_start(budget)
        recent = torch.zeros(len(plan.weights), 1, dtype=exact)
        own: dict[str, Any] = method.prefill_state(0, recent, torch.tensor([budget.n - 1]), plan)
        return own
    sums = [torch.zeros(sizes.heads, SHORT, dtype=exact)]
    queries, pairs = (torch.zeros(heads, SHORT, sizes.width, dtype=exact) for heads in (sizes.heads, sizes.kv_heads))
    names = ["all", "question", *(name.replace("band_sum:", "band:") for name in method.needs())]
    ctx = Context(
        SHORT, sizes.heads, sizes.kv_heads, [0] * SHORT, [Region("context", 0, SHORT, -1)], [pairs], [pairs],
        dict.fromkeys(names, sums), [queries], [1.0], "", 0,
    )  # fmt: skip
    begun: dict[str, Any] = method.decode_start(ctx, 0)
    return begun
