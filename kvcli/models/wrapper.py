"""The one Model behind every command: prefill with capture, then decode rows over compressed caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from kvcli.attention import backends
from kvcli.attention.capture import Dense, Needs, Prefill
from kvcli.attention.decode import decode, decode_with_weights
from kvcli.attention.moments import Unrotate
from kvcli.attention.patch import UnsupportedAttention, patched
from kvcli.cache.kv_cache import CompressedCache
from kvcli.errors import KvcliError
from kvcli.models.projections import output_projection
from kvcli.models.rope import RopeHandle

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Shapes:
    """What the rest of kvcli needs to know of a model's attention."""

    layers: int
    heads: int
    kv_heads: tuple[int, ...]
    widths: tuple[int, ...]
    """key + value elements per pair, per layer."""
    value_width: int
    """Elements of one head's value."""
    context: int | None
    parameters: int

    @property
    def dims(self) -> list[tuple[int, int]]:
        return list(zip(self.kv_heads, self.widths, strict=True))


@dataclass
class Prefilled:
    """B rows of new tokens: keys, values per layer [B, H_kv, S, D], logits [B, V] float32 behind each last token."""

    keys: list[Tensor]
    values: list[Tensor]
    capture: Prefill
    logits: Tensor

    def dense(self, row: int) -> Dense:
        """One whole prompt, its prefix merged in."""
        return self.capture.dense(row, self.keys, self.values)


PROBE = (5, 17, 3, 29, 11, 2, 23, 7)
"""Token ids of the probe: small enough for any vocabulary."""


def unsupported(config: Any) -> str:
    """What of a config kvcli's attention or positions do not reproduce; empty when nothing is known against it."""
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"layers of type {', '.join(sorted(map(str, kinds)))}"
    if getattr(config, "attention_chunk_size", None):
        return "chunked attention"
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, dict) else None
    if kind in ("longrope", "dynamic"):
        return f"rotations of type '{kind}' depend on the longest text of a batch"
    return ""


class _Queries:
    """Attention state that notes the rotated queries of each layer."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.queries: list[Tensor] = []

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        self.queries.append(query)
        return backends.prefill(query, key, value, scaling, {}, self.backend)[0]


class _Decode:
    """Attention state of new tokens over a compressed cache."""

    def __init__(self, cache: CompressedCache) -> None:
        self.cache = cache

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        new = query.shape[2]
        visible = self.cache.narrowed(layer, query, key, self.cache.visible(layer, new))
        if self.cache.reads_attention:
            out, weights = decode_with_weights(query, key, value, scaling, visible)
            self.cache.settle(layer, weights)
            return out
        out = decode(query, key, value, scaling, visible, self.cache.segments(layer, new))
        self.cache.settle(layer, None)
        return out


class Model:
    """A causal LM with kvcli's attention. Raises KvcliError at once for a family that cannot be patched."""

    def __init__(self, hf: Any, tokenizer: PreTrainedTokenizerBase, *, name: str = "model", attn: str = "auto") -> None:
        self.hf, self.tokenizer, self.name, self.attn = hf, tokenizer, name, attn
        self.rope = RopeHandle.of(hf)
        self.shapes = self._probe()
        self.o_proj = output_projection(hf, self.shapes.heads * self.shapes.value_width)

    @property
    def device(self) -> torch.device:
        return self.hf.device

    @property
    def dtype(self) -> torch.dtype:
        return self.hf.dtype

    @property
    def vocabulary(self) -> int:
        """Logits per token."""
        return int(self.hf.config.get_text_config().vocab_size)

    def prefill_one(
        self,
        ids: Sequence[int],
        needs: Needs,
        question_from: int,
        prefix: Dense | None = None,
        *,
        chunk: int,
    ) -> tuple[Dense, Prefilled]:
        """One prompt of any length, densely in chunks: exact, each chunk a prefix of the next. Returns the whole
        prompt's cache and the last chunk's pass."""
        while len(ids) > chunk:
            prefix = self.prefill([ids[:chunk]], needs, [question_from], prefix).dense(0)
            ids, question_from = ids[chunk:], question_from - chunk
        last = self.prefill([ids], needs, [question_from], prefix)
        return last.dense(0), last

    @torch.inference_mode()
    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        needs: Needs,
        question_from: Sequence[int],
        prefix: Dense | None = None,
    ) -> Prefilled:
        """Dense causal prefill of B rows of any lengths, right-padded; padding reaches no statistic.

        With a prefix, prompts and question_from begin behind it. Raises KvcliError where the queries' moments are
        needed and their rotation cannot be undone.
        """
        lengths = [len(p) for p in prompts]
        ids = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        unrotate = self.unrotate if needs.moments else None
        state = Prefill(needs, lengths, list(question_from), self.attn, prefix, unrotate)
        cache = DynamicCache()
        last = sorted({n - 1 for n in lengths})
        before = 0 if prefix is None else prefix.n
        positions = torch.arange(before, before + ids.shape[1], device=self.device)[None].expand(len(prompts), -1)
        with patched(self.hf, state):
            out = self.hf(
                ids.to(self.device), position_ids=positions, past_key_values=cache, use_cache=True,
                logits_to_keep=torch.tensor(last, device=self.device),
            )  # fmt: skip
        row_of = [last.index(n - 1) for n in lengths]
        logits = out.logits[torch.arange(len(prompts)), row_of].float()
        return Prefilled([x.keys for x in cache.layers], [x.values for x in cache.layers], state, logits)

    @torch.inference_mode()
    def step(self, tokens: Tensor, positions: Tensor, cache: CompressedCache) -> Tensor:
        """One forward pass of Q new tokens a row at their true positions: [R, Q] each -> logits [R, Q, V]."""
        tokens, positions = tokens.to(self.device), positions.to(self.device)
        cache.newest_texts = lambda: [self.tokenizer.decode([i]) for i in tokens[:, -1].tolist()]
        cache.begin(positions)
        with patched(self.hf, _Decode(cache)):
            out = self.hf(tokens, position_ids=positions, past_key_values=cache, use_cache=True)
        cache.advance(tokens.shape[1])
        cache.memory.watch(out.logits)
        return out.logits

    @cached_property
    def unrotate(self) -> Unrotate:
        """Takes queries back to where they were before RoPE. Raises KvcliError where this is not known.

        Tried once on a short text at two places: before RoPE, the queries of all layers must be the same.
        """
        rope = self.rope
        family = getattr(self.hf.config, "model_type", type(self.hf).__name__)
        what = f"in models of family '{family}' the rotation of queries cannot be undone"
        fix = "a model with RoPE in every layer (llama, mistral, qwen2, ...), or methods that do not model the queries"
        if rope is None:
            raise KvcliError(what, given="queries before RoPE", fix=fix)

        def back(queries: Tensor, positions: Tensor) -> Tensor:
            return rope.move(queries, positions, torch.zeros_like(positions))

        here, there = (self._queries_at(first, back) for first in (0, 37))
        for a, b in zip(here, there, strict=True):
            room = {torch.float64: 1e-4, torch.float32: 1e-3}.get(self.dtype, 0.06) * (1 + a.abs().max())
            if not bool((a - b).abs().max() <= room):
                raise KvcliError(what, given="queries before RoPE", fix=fix)
        return back

    @torch.inference_mode()
    def _queries_at(self, first: int, back: Unrotate) -> list[Tensor]:
        """Per layer [B, H, Q, D]: the queries of the probe, read from position `first` on, taken back by `back`."""
        state = _Queries(self.attn)
        positions = torch.arange(first, first + len(PROBE), device=self.device)
        with patched(self.hf, state):
            self.hf(self._probe_ids(), position_ids=positions[None], use_cache=False)
        return [back(q.to(torch.promote_types(q.dtype, torch.float32)), positions) for q in state.queries]

    def _probe_ids(self) -> Tensor:
        size = max(2, getattr(self.hf.config, "vocab_size", 2))
        return torch.tensor([[i % size for i in PROBE]], device=self.device)

    def _probe(self) -> Shapes:
        """Runs a short text: each layer must call the patched attention once, the logits must be the model's own."""
        config = self.hf.config
        family = getattr(config, "model_type", type(self.hf).__name__)
        fix = "a family of plain causal attention: llama, mistral, qwen2, qwen3, phi3, gpt_neox, gpt2, opt, ..."

        def refused(why: str) -> KvcliError:
            return KvcliError(
                f"models of family '{family}' are not supported: {why}", given=f"--model {self.name}", fix=fix
            )

        problem = unsupported(config)
        if problem:
            raise refused(problem)
        ids = [i % max(2, getattr(config, "vocab_size", 2)) for i in PROBE]
        try:
            done = self.prefill([ids], Needs(), [0])
            with torch.inference_mode():
                own = self.hf(torch.tensor([ids], device=self.device), use_cache=False).logits[0, -1].float()
        except UnsupportedAttention as e:
            raise refused(str(e)) from e
        except torch.OutOfMemoryError:
            raise
        except Exception as e:  # a family that needs other inputs can fail in any way
            raise refused(f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}") from e
        layers = getattr(config, "num_hidden_layers", 0)
        if done.capture.calls != layers or len(done.keys) != layers:
            raise refused(f"{done.capture.calls} of {layers} layers call transformers' attention interface")
        room = {torch.float64: 1e-4, torch.float32: 1e-3}.get(self.dtype, 0.06) * (1 + own.abs().max())
        if not bool((done.logits[0] - own).abs().max() <= room):
            raise refused("with kvcli's causal attention it does not give its own logits")
        return Shapes(
            layers=layers,
            heads=config.num_attention_heads,
            kv_heads=tuple(k.shape[1] for k in done.keys),
            widths=tuple(k.shape[-1] + v.shape[-1] for k, v in zip(done.keys, done.values, strict=True)),
            value_width=done.values[0].shape[-1],
            context=getattr(config, "max_position_embeddings", None),
            parameters=sum(p.numel() for p in self.hf.parameters()),
        )
