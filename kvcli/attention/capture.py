"""What a prefill keeps for the methods of the plan: column sums, band sums and window queries, O(n) memory per head,
and the moments of the queries, O(1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvcli.attention import backends
from kvcli.attention.moments import Moments, Unrotate, query_moments


@dataclass(frozen=True)
class Needs:
    """Union of what several methods read: names of column sums ('all', 'question'), the longest window, widths of band
    sums, and from which positions on the moments of the queries are taken."""

    column_sums: frozenset[str] = frozenset()
    window: int = 0
    bands: frozenset[int] = frozenset()
    moments: frozenset[int] = frozenset()

    @classmethod
    def of(cls, names: Iterable[str]) -> Needs:
        """From `Method.needs()` names: 'column_sum', 'column_sum:question', 'window:W', 'band_sum:W' and
        'q_moments:FIRST' ('q_moments': all queries). ValueError for others."""
        sums, window, bands, moments = set(), 0, set(), set()
        for name in names:
            kind, _, detail = name.partition(":")
            if kind == "column_sum" and detail in ("", "question"):
                sums.add(detail or "all")
            elif kind == "window" and detail.isdigit():
                window = max(window, int(detail))
            elif kind == "band_sum" and detail.isdigit() and int(detail):
                bands.add(int(detail))
            elif name == "q_moments" or (kind == "q_moments" and detail.isdigit()):
                moments.add(int(detail or 0))
            else:
                raise ValueError(f"unknown statistic {name!r}")
        return cls(frozenset(sums), window, frozenset(bands), frozenset(moments))

    @property
    def sums(self) -> dict[str, int | None]:
        """All sums over queries by name, with the width of those that have one."""
        plain: dict[str, int | None] = dict.fromkeys(sorted(self.column_sums))
        return {**plain, **{band(width): width for width in sorted(self.bands)}}


def band(width: int) -> str:
    """The name of the sums over the `width` queries from each key on: its own and those behind it."""
    return f"band:{width}"


@dataclass
class Dense:
    """One prompt (or a prefix of several) after its prefill: what is forked, selected from and built upon.

    keys, values: per layer [H_kv, n, D]; column_sums[name]: per layer [H, n], band sums among them by their name;
    window_queries: per layer [H, w, D], the rotated queries of the last w = min(window, n) tokens; moments[first]: per
    layer those of the queries from position `first` on, before RoPE.
    """

    keys: list[Tensor]
    values: list[Tensor]
    column_sums: dict[str, list[Tensor]]
    window_queries: list[Tensor]
    moments: dict[int, list[Moments]] = field(default_factory=dict)

    @property
    def n(self) -> int:
        return self.keys[0].shape[1]


@dataclass
class Prefill:
    """Attention state of one prefill of B right-padded rows of new tokens, all behind the same prefix (if any).

    lengths: real new tokens per row. question_from: first token of each row's question, for sums of name 'question';
    both count from the end of the prefix. Filled while the model runs: column_sums[name][layer] [B, H, P + S] by the
    new queries, in float32 (float64 for a float64 model); window_queries[layer] [B, H, w, D]: rotated queries of each
    row's last w real tokens (rows shorter than w repeat their first token in front); moments[first][layer]: of each
    row's real tokens from position `first` of the prompt on, which need `unrotate`.
    """

    needs: Needs
    lengths: list[int]
    question_from: list[int]
    backend: str = "auto"
    prefix: Dense | None = None
    unrotate: Unrotate | None = None
    column_sums: dict[str, list[Tensor]] = field(default_factory=dict)
    window_queries: list[Tensor] = field(default_factory=list)
    moments: dict[int, list[Moments]] = field(default_factory=dict)
    scaling: list[float] = field(default_factory=list)
    calls: int = 0
    _made: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict, repr=False)
    """What all layers of one device share: made once, so that no layer waits for a copy to it."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        self.calls += 1
        self.scaling.append(scaling)
        if self.needs.window:
            self.window_queries.append(self._last_queries(query))
        for first in sorted(self.needs.moments):
            self.moments.setdefault(first, []).append(self._moments(first, query))
        wanted = self.needs.sums
        weights = {name: self._once(name, query, self._query_weights) for name in wanted}
        bands = {name: width for name, width in wanted.items() if width}
        prefix = (self.prefix.keys[layer], self.prefix.values[layer]) if self.prefix is not None else None
        out, sums = backends.prefill(query, key, value, scaling, weights, self.backend, prefix, bands)
        for name, value_ in sums.items():
            self.column_sums.setdefault(name, []).append(value_)
        return out

    @torch.inference_mode()
    def dense(self, row: int, keys: list[Tensor], values: list[Tensor]) -> Dense:
        """One row with its prefix merged in, exactly: keys and values joined, column sums added, windows reaching back.

        keys, values: per layer [B, H_kv, S, D], the new tokens' own.
        """
        n = self.lengths[row]
        own = Dense(
            [k[row, :, :n] for k in keys],
            [v[row, :, :n] for v in values],
            {
                name: [s[row, :, : s.shape[2] - keys[0].shape[2] + n] for s in sums]
                for name, sums in self.column_sums.items()
            },
            [q[row, :, -min(n, q.shape[2]) :] for q in self.window_queries],
            {first: [m.row(row) for m in found] for first, found in self.moments.items()},
        )
        return own if self.prefix is None else _behind(self.prefix, own, self.needs.window)

    def _moments(self, first: int, query: Tensor) -> Moments:
        if self.unrotate is None:
            raise ValueError("moments of the queries need a way to undo their rotation")
        chosen = self._once(f"from:{first}", query, self._query_weights)
        return query_moments(query, 0 if self.prefix is None else self.prefix.n, chosen, self.unrotate)

    def _last_queries(self, query: Tensor) -> Tensor:
        index = self._once("window", query, self._window_index)
        return query.gather(2, index[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))

    def _once(self, name: str, query: Tensor, make: Callable[[str, Tensor], Tensor]) -> Tensor:
        key = (name, query.device)
        if key not in self._made:
            self._made[key] = make(name, query)
        return self._made[key]

    def _window_index(self, name: str, query: Tensor) -> Tensor:
        """[B, w]: the last real queries of each row."""
        width = min(self.needs.window, query.shape[2])
        ends = torch.tensor(self.lengths, device=query.device)
        return (ends[:, None] + torch.arange(-width, 0, device=query.device)).clamp_min(0)

    def _query_weights(self, name: str, query: Tensor) -> Tensor:
        """[B, Q] 1 for the queries that count, 0 for padding and others."""
        position = torch.arange(query.shape[2], device=query.device)
        real = position < torch.tensor(self.lengths, device=query.device)[:, None]
        if name == "question":
            real &= position >= torch.tensor(self.question_from, device=query.device)[:, None]
        elif name.startswith("from:"):
            real &= position >= int(name.removeprefix("from:")) - (0 if self.prefix is None else self.prefix.n)
        return real.to(torch.promote_types(query.dtype, torch.float32))


def _behind(prefix: Dense, own: Dense, window: int) -> Dense:
    """The prompt prefix + own. own.column_sums already span both: what the new queries gave to the prefix's keys."""

    def joined(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
        return [torch.cat(pair, 1) for pair in zip(a, b, strict=True)]

    sums = {
        name: [torch.cat([s[:, : prefix.n] + old, s[:, prefix.n :]], 1) for s, old in zip(mine, olds, strict=True)]
        for (name, mine), olds in ((item, prefix.column_sums[item[0]]) for item in own.column_sums.items())
    }
    queries = [q[:, -window:] for q in joined(prefix.window_queries, own.window_queries)]
    moments = {
        first: [a.merged(b) for a, b in zip(prefix.moments[first], found, strict=True)]
        for first, found in own.moments.items()
    }
    return Dense(joined(prefix.keys, own.keys), joined(prefix.values, own.values), sums, queries, moments)
