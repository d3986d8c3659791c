"""What methods share that read how much each head of the model retrieves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvcli.errors import KvcliError

if TYPE_CHECKING:
    from kvcli.methods.context import Context


def profile_need(path: str) -> str:
    """The name under which a head profile is asked for: the model's own, or the file at `path`."""
    return f"head_profile:{path}" if path else "head_profile"


def gates_need(sinks: int, recent: int) -> str:
    """The name under which the gates are asked for that kvcli trained for this window."""
    return f"head_profile:@gates:{sinks},{recent}"


def kv_scores(profile: Any, ctx: Context, reduce: str) -> list[list[float]]:
    """[L][H_kv]: the mean or maximum over each KV head's query heads, where the profile has a number for each.

    profile: a `kvcli.models.profiles.HeadProfile`. Raises KvcliError for a profile of another shape.
    """
    if not profile.fits(ctx.layers, ctx.heads, ctx.kv_heads):
        rows, width = len(profile.heads), len(profile.heads[0])
        what = f"the head profile is of {rows} layers with {width} heads, the model has {ctx.layers} with {ctx.heads}"
        raise KvcliError(what, given="profile=...", fix="kvcli profile-heads with this --model")
    if profile.per == "kv":
        return [list(row) for row in profile.heads]
    group = ctx.heads // ctx.kv_heads
    groups = [[row[i : i + group] for i in range(0, ctx.heads, group)] for row in profile.heads]
    return [[max(g) if reduce == "max" else sum(g) / group for g in row] for row in groups]
