"""What a prefill keeps for the methods of the plan: column sums and window queries, O(n) memory per head."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvcli.attention import backends


@dataclass(frozen=True)
class Needs:
    """Union of what several methods read: names of column sums ('all', 'question') and the longest window."""

    column_sums: frozenset[str] = frozenset()
    window: int = 0

    @classmethod
    def of(cls, names: Iterable[str]) -> Needs:
        """From `Method.needs()` names: 'column_sum', 'column_sum:question', 'window:W'. ValueError for others."""
        sums, window = set(), 0
        for name in names:
            kind, _, detail = name.partition(":")
            if kind == "column_sum" and detail in ("", "question"):
                sums.add(detail or "all")
            elif kind == "window" and detail.isdigit():
                window = max(window, int(detail))
            else:
                raise ValueError(f"unknown statistic {name!r}")
        return cls(frozenset(sums), window)


@dataclass
class Prefill:
    """Attention state of one prefill of B right-padded prompts.

    lengths: real tokens per row. question_from: first token of each row's question, for sums of name 'question'.
    Filled while the model runs: column_sums[name][layer] [B, H, n] in float32 (float64 for a float64 model);
    window_queries[layer] [B, H, w, D]: rotated queries of each row's last w real tokens (rows shorter than w repeat
    their first token in front; readers take the last min(w, length)).
    """

    needs: Needs
    lengths: list[int]
    question_from: list[int]
    backend: str = "auto"
    column_sums: dict[str, list[Tensor]] = field(default_factory=dict)
    window_queries: list[Tensor] = field(default_factory=list)
    scaling: list[float] = field(default_factory=list)
    calls: int = 0

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        self.calls += 1
        self.scaling.append(scaling)
        if self.needs.window:
            self.window_queries.append(self._last_queries(query))
        weights = {name: self._query_weights(name, query) for name in sorted(self.needs.column_sums)}
        out, sums = backends.prefill(query, key, value, scaling, weights, self.backend)
        for name, value_ in sums.items():
            self.column_sums.setdefault(name, []).append(value_)
        return out

    def _last_queries(self, query: Tensor) -> Tensor:
        width = min(self.needs.window, query.shape[2])
        ends = torch.tensor(self.lengths, device=query.device)
        index = (ends[:, None] + torch.arange(-width, 0, device=query.device)).clamp_min(0)
        return query.gather(2, index[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))

    def _query_weights(self, name: str, query: Tensor) -> Tensor:
        """[B, Q] 1 for the queries that count, 0 for padding and others."""
        position = torch.arange(query.shape[2], device=query.device)
        real = position < torch.tensor(self.lengths, device=query.device)[:, None]
        if name == "question":
            real &= position >= torch.tensor(self.question_from, device=query.device)[:, None]
        return real.to(torch.promote_types(query.dtype, torch.float32))
