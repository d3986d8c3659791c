"""Moving cached keys to other positions: a rotation by the difference, for rotary families of the half-split kind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class RopeHandle:
    """Rotates keys of a model whose rotary module holds `inv_freq` and splits heads in halves (Llama and its kin)."""

    def __init__(self, inv_freq: Tensor) -> None:
        self.inv_freq = inv_freq

    @classmethod
    def of(cls, model: nn.Module) -> RopeHandle | None:
        """The handle, or None for a model without one rotary module of this kind."""
        found = [m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding") and hasattr(m, "inv_freq")]
        if len(found) != 1 or getattr(model.config, "model_type", "") in ("cohere", "cohere2", "gptj", "glm", "glm4"):
            return None
        inv_freq: Any = found[0].inv_freq
        return cls(inv_freq.detach())

    def move(self, keys: Tensor, old: Tensor, new: Tensor) -> Tensor:
        """keys [H_kv, K, D] rotated from positions old [K] to new [K]; the first 2 * len(inv_freq) dimensions turn."""
        exact = torch.promote_types(keys.dtype, torch.float32)
        angle = (new - old).to(keys.device, exact)[:, None] * self.inv_freq.to(keys.device, exact)
        cos, sin = (torch.cat([f(angle)] * 2, -1) for f in (torch.cos, torch.sin))
        turned = 2 * len(self.inv_freq)
        part, rest = keys[..., :turned].to(exact), keys[..., turned:]
        a, b = part.chunk(2, -1)
        rotated = part * cos + torch.cat([-b, a], -1) * sin
        return torch.cat([rotated.to(keys.dtype), rest], -1)
