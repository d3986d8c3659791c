"""Directions of the model itself that keys and values are projected on, from calibration texts or from its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from kvcli.models.bases import WEIGHTS, Header, header_of, name_of, read_moments
from kvcli.models.projections import key_value_projections
from kvcli.models.source import parse_model

if TYPE_CHECKING:
    from kvcli.models.wrapper import Model

What = Literal["keys", "values"]


@dataclass(frozen=True)
class Basis:
    """x [K, W] is stored as (x - offset) @ directions and read as that @ directions^T + offset. directions [W, r] are
    orthonormal; offset [W], None for zero."""

    directions: Tensor
    offset: Tensor | None = None

    @property
    def elements(self) -> int:
        return self.directions.numel() + (0 if self.offset is None else self.offset.numel())


Moment = Callable[[What, int, int, int], tuple[Tensor, Tensor | None]]
"""(what, layer, first KV head, heads) -> symmetric [W, W] float64 on the CPU, W of the heads side by side, and the
offset [W]. The leading eigenvectors of the former are the directions."""


@dataclass
class Bases:
    """Bases of one model. name: what tells them apart, `weights` or a file's digest."""

    name: str
    moment: Moment
    _made: dict[tuple[object, ...], Basis] = field(default_factory=dict, repr=False)

    def of(self, what: What, layer: int, first: int, heads: int, rank: int, like: Tensor) -> Basis:
        """The `rank` leading directions of so many KV heads from `first` on, as precise as `like` and beside it."""
        key = (what, layer, first, heads, rank, like.dtype, like.device)
        if key not in self._made:
            with torch.inference_mode(False), torch.no_grad():
                moment, offset = self.moment(what, layer, first, heads)
                leading = torch.linalg.eigh(moment).eigenvectors.flip(-1)[:, :rank]
                self._made[key] = Basis(leading.to(like), None if offset is None else offset.to(like))
        return self._made[key]


def bases_of(model: Model, need: str) -> Bases:
    """What a need `bases:...` names. Raises KvcliError for a file that cannot be used, ValueError for projections that
    are not known."""
    return of_weights(model) if need == WEIGHTS else of_file(header_of(parse_model(model.name), need))


def of_file(header: Header) -> Bases:
    """After Eigen Attention: singular vectors of what the calibration texts gave."""
    moments = read_moments(header)

    def moment(what: What, layer: int, first: int, heads: int) -> tuple[Tensor, None]:
        width = header.widths[what == "values"]
        block, start = divmod(first, header.group)
        whole = moments[name_of(what, layer, block)].double()
        part = slice(start * width, (start + heads) * width)
        if part.stop > len(whole):
            raise ValueError(f"{heads} KV heads from number {first} on lie in several groups of {header.path}")
        return whole[part, part], None

    return Bases(header.digest, moment)


def of_weights(model: Model) -> Bases:
    """After Palu: left singular vectors of rows of W_k and W_v [out, in]; a bias is taken off and put back. Raises
    ValueError."""
    projections = key_value_projections(model)

    def moment(what: What, layer: int, first: int, heads: int) -> tuple[Tensor, Tensor | None]:
        rows = projections[layer][what == "values"]
        width = rows.rows // model.shapes.kv_heads[layer]
        weight, bias = rows.part(slice(first * width, (first + heads) * width))
        return weight @ weight.T, bias

    return Bases("weights", moment)
