"""The second reading of a prompt for `kvcli attn-map`: what is looked at, and the pass over its own keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvcli.attention import maps
from kvcli.attention.maps import Look, Reading
from kvcli.attention.patch import patched
from kvcli.engine.map_request import Chosen
from kvcli.engine.memory import CHUNK
from kvcli.methods.context import Context
from kvcli.models.wrapper import Model
from kvcli.spans import question_start

SMALL_MAPS = 1_000_000
"""Numbers stored in small maps of all heads, of all prompts shown together."""
SMALLEST, LARGEST = 8, 64
"""Blocks of a small map."""


def look_of(ctx: Context, blocks: int, heads: Chosen, shown: int) -> Look:
    """blocks: most rows of the chosen heads' map; shown: how many prompts are drawn."""
    n = ctx.n
    per_head = SMALL_MAPS // (ctx.layers * ctx.heads * shown)
    small = min(LARGEST, max(SMALLEST, int(per_head**0.5)))
    rows = {"all": maps.measured_rows(0, n), "question": maps.measured_rows(question_start(ctx.regions), n)}
    return Look(n, -(-n // blocks), heads.pairs, -(-n // small), rows)


def read_again(model: Model, ids: Sequence[int], ctx: Context, look: Look) -> Reading:
    """The prompt once more, in chunks, each behind the keys that are there already."""
    state = Reading(look, ctx.keys, ctx.values, model.attn)
    first = torch.tensor([0], device=model.device)
    with patched(model.hf, state):
        for start in range(0, ctx.n, CHUNK):
            tokens = torch.tensor([ids[start : start + CHUNK]], device=model.device)
            positions = torch.arange(start, start + tokens.shape[1], device=model.device)[None]
            state.start = start
            model.hf(tokens, position_ids=positions, use_cache=False, logits_to_keep=first)
    return state
