"""What a method may read about one prompt: captured statistics, keys and values of all layers, spans."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from kvcli.attention.capture import band
from kvcli.spans import Region as Region
from kvcli.spans import Span as Span

if TYPE_CHECKING:
    from torch import Tensor

    from kvcli.attention.moments import Moments
    from kvcli.models.rope import RopeHandle

T = TypeVar("T")


@dataclass
class Context:
    """Read-only view of one prefilled prompt of n tokens.

    keys, values: per layer [H_kv, n, D] (after RoPE). column_sums[name]: per layer [H, n] float32, each key's total
    attention over the queries of that name ('all', 'question'), and band sums by their width. window_queries: per layer
    [H, w, D], the rotated queries of the last w positions. Regions cover 0..n-1 without gaps, in order.
    """

    n: int
    heads: int
    kv_heads: int
    token_ids: list[int]
    regions: list[Region]
    keys: list[Tensor]
    values: list[Tensor]
    column_sums: dict[str, list[Tensor]]
    window_queries: list[Tensor]
    scaling: list[float]
    sample_id: str
    seed: int
    token_text: Callable[[int], str] | None = None
    """Text of one token, white space included, for cutting passages into sentences."""
    rope: RopeHandle | None = None
    """Turns keys to other positions; None for a family without rotary positions of the usual kind."""
    o_proj: Callable[[int], Tensor] | None = None
    """The output projection of a layer, [hidden, H * D]; None for a family whose projection is not known."""
    _made: dict[Any, Any] = field(default_factory=dict, repr=False)
    """What `once` has made; shared by all cells of the prompt."""
    passes: Mapping[str, Callable[[], Any]] = field(default_factory=dict, repr=False)
    """Extra passes over this prompt that the engine runs when a method asks for one, by name."""
    moments: Mapping[int, list[Moments]] = field(default_factory=dict, repr=False)
    """Of the queries from a position on, before RoPE: per layer."""

    @property
    def layers(self) -> int:
        return len(self.keys)

    def column_sum(self, layer: int, queries: str = "all") -> Tensor:
        """[H, n] float32: attention each key received, summed over all prompt queries (or the question's)."""
        return self.column_sums[queries][layer]

    def band_sum(self, layer: int, width: int) -> Tensor:
        """[H, n] float32: attention each key received from the queries less than `width` positions behind it.

        From the prefill where 'band_sum:WIDTH' was named in `needs()`. For a width that depends on the prompt, name
        'bands': then the prompt is read once more for each width asked for.
        """
        if band(width) in self.column_sums:
            return self.column_sums[band(width)][layer]
        sums: list[Tensor] = self.once(("bands", width), lambda: self.extra("bands")(width))
        return sums[layer]

    def query_moments(self, layer: int, first: int = 0) -> tuple[Tensor, Tensor]:
        """(mean [H, D], covariance [H, D, D]) of the prompt's queries from position `first` on, before RoPE.

        Float32 at least. A method must name 'q_moments:FIRST' in `needs()`. Without such queries both are zero.
        """
        found = self.moments[first][layer]
        return found.mean, found.covariance()

    def window_attention(self, layer: int, window: int) -> Tensor:
        """[H, w, n] float32: causal attention of the last w = min(window, n) queries over all keys.

        Computed at each call (w rows per head are large): keep what you reduce it to with `once`.
        """
        if not self.window_queries or self.window_queries[layer].shape[1] < min(window, self.n):
            raise ValueError(f"the last {window} queries were not kept: needs() must name 'window:{window}'")
        w = min(window, self.n)
        queries = self.window_queries[layer][:, -w:].float()
        keys = self.keys[layer].float().repeat_interleave(self.heads // self.kv_heads, 0)
        scores = queries @ keys.transpose(-1, -2) * self.scaling[layer]
        future = torch.ones(w, w, dtype=torch.bool, device=scores.device).triu(1)
        scores[:, :, self.n - w :].masked_fill_(future, float("-inf"))
        return scores.softmax(-1)

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """A value made once per prompt, whatever the number of methods and ratios that ask for it.

        `key` must name everything the value depends on apart from the prompt (never the seed or the budget alone).
        """
        if key not in self._made:
            with torch.inference_mode():
                self._made[key] = make()
        return self._made[key]

    def extra(self, name: str) -> Any:
        """What an extra pass of the model over this prompt gives, run at most once per prompt.

        'reconstruction': how much attention each key received while the model repeated the prompt
        (kvcli.models.reconstruction). 'answer': how much it received from the model's own answer
        (kvcli.models.answering). 'bands': see `band_sum`. A method must name it in `needs()`.
        """
        return self.once(("pass", name), self.passes[name])

    def per_kv_head(self, score: Tensor, reduce: str = "mean") -> Tensor:
        """[H, ...] -> [H_kv, ...]: mean or max over each group of query heads that share a KV head."""
        grouped = score.unflatten(0, (self.kv_heads, self.heads // self.kv_heads))
        return grouped.mean(1) if reduce == "mean" else grouped.amax(1)

    def generator(self, *salt: object) -> torch.Generator:
        """A CPU generator fixed by the cell's seed, the sample and the salt: batching cannot change a draw."""
        text = "\0".join(map(str, (self.seed, self.sample_id, *salt)))
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
        return torch.Generator().manual_seed(number)

    def shots(self) -> list[list[Span]]:
        """Each shot's spans (a shot may stand in several places), in order of its index."""
        spans: dict[int, list[Span]] = {}
        for region in self.regions:
            if region.kind == "shot":
                spans.setdefault(region.index, []).append((region.start, region.end))
        return [spans[i] for i in sorted(spans)]

    def spans(self, *kinds: str) -> list[Span]:
        return [(r.start, r.end) for r in self.regions if r.kind in kinds]
