"""A model's bases: second moments of its keys before rotation and of its values over calibration texts.

Source: Eigen Attention, arXiv:2408.05646, and the authors' code (UtkarshSaxena1/EigenAttn,
decompose/eigen_attn_utils.py), which decomposes what the projections gave for 128 texts. X^T X of those rows has the
same singular vectors and adds up text by text. Differs: see the method that reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvcli.attention.capture import Needs
from kvcli.engine import profiling
from kvcli.engine.memory import CHUNK
from kvcli.engine.needles import SEED, PassKeys
from kvcli.engine.profiling import Ready, Settings
from kvcli.errors import KvcliError
from kvcli.models.bases import Header, command, digest_of, name_of
from kvcli.models.prompt import build_prompt
from kvcli.models.source import ModelSource, fingerprint
from kvcli.models.wrapper import Model
from kvcli.weights import calibration
from kvcli.weights.spec import Calibration, SparseGPT

GROUP = 4
"""KV heads taken together, as methods do unless told otherwise."""
LENGTH = 2048
"""Tokens of a text cut out of a file."""


@dataclass(frozen=True)
class Texts:
    """What is read: a file of texts (`limit` of them, `prompt_tokens` each) or, None, the prompts of the task."""

    file: Calibration | None = None
    group: int = GROUP


@dataclass
class Moments:
    """Sums of X^T X, float64 on the CPU, by `name_of`."""

    group: int
    sums: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0

    def add(self, layer: int, what: str, pairs: Tensor) -> None:
        """pairs [H_kv, n, D]."""
        for block, part in enumerate(pairs.split(self.group)):
            rows = part.transpose(0, 1).flatten(1).double().cpu()
            name = name_of(what, layer, block)
            self.sums[name] = self.sums.get(name, 0) + rows.T @ rows

    def means(self) -> dict[str, Tensor]:
        """Over tokens, float32."""
        return {name: (total / self.tokens).float() for name, total in self.sums.items()}


@torch.inference_mode()
def moments_of(
    model: Model,
    texts: Sequence[Sequence[int]],
    group: int,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Moments:
    """Of every token of these texts. Raises KvcliError for a model whose keys cannot be turned back."""
    if model.rope is None:
        what = f"the keys of {model.name} cannot be turned back to before their rotation"
        raise KvcliError(
            what, given=f"--bases --model {model.name}", fix="a model with RoPE: llama, mistral, qwen2, ..."
        )
    found = Moments(group)
    for done, ids in enumerate(texts):
        tell(done, len(texts))
        dense, _ = model.prefill_one(ids, Needs(), len(ids), chunk=CHUNK)
        places = torch.arange(dense.n, device=dense.keys[0].device)
        for layer, (keys, values) in enumerate(zip(dense.keys, dense.values, strict=True)):
            found.add(layer, "keys", model.rope.move(keys, places, torch.zeros_like(places)))
            found.add(layer, "values", values)
        found.tokens += dense.n
    tell(len(texts), len(texts))
    return found


def described(asked: Settings, ready: Ready, texts: Texts) -> dict[str, Any]:
    """What the file will say of how it was made, as far as it is known before the model runs."""
    if texts.file is None:
        return {**profiling.described(asked, ready), "group": texts.group}
    return {
        "calibration": texts.file.sha, "limit": asked.limit, "prompt_tokens": asked.prompt_tokens or LENGTH,
        "dtype": ready.dtype, "group": texts.group,
    }  # fmt: skip


def check_texts(source: ModelSource, ready: Ready, texts: Texts) -> None:
    """Raises KvcliError where nothing was named and the prompts would be pass keys between a few sentences."""
    if texts.file is None and isinstance(ready.task, PassKeys):
        what = "bases need texts of the kind the model is used for"
        raise KvcliError(what, given=f"--bases --model {source.text}", fix=f"{command(source)}, or --task NAME")


def measured(
    source: ModelSource,
    asked: Settings,
    ready: Ready,
    texts: Texts,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Header, dict[str, Tensor]]:
    """Loads the model and reads the texts: what the file says and holds. Raises KvcliError for everything the user can
    mend."""
    model = profiling.loaded(source, asked, ready)
    ids = list(_from_task(model, asked, ready) if texts.file is None else _from_file(texts.file, model, asked))
    found = moments_of(model, ids, texts.group, tell)
    means, shapes = found.means(), model.shapes
    widths = (shapes.widths[0] - shapes.value_width, shapes.value_width)
    how = {k: v for k, v in described(asked, ready, texts).items() if k != "group"}
    header = Header(
        fingerprint(source), digest_of(means), shapes.layers, shapes.kv_heads[0], widths, texts.group, len(ids),
        found.tokens, how,
    )  # fmt: skip
    return header, means


def _from_file(file: Calibration, model: Model, asked: Settings) -> list[list[int]]:
    drawn = SparseGPT(samples=asked.limit, length=asked.prompt_tokens or LENGTH)
    return calibration.sequences(drawn, file, model.tokenizer, model.shapes.context, None)


def _from_task(model: Model, asked: Settings, ready: Ready) -> Iterable[list[int]]:
    """The whole prompts of the task's samples, drawn by the seed of all profiles."""
    task = ready.task
    samples = task.samples(shots=task.usual_shots, shot_seed=SEED, limit=asked.limit, data_dir=asked.data_dir)
    for sample in samples:
        yield build_prompt(
            sample, model.tokenizer, template=asked.template, chat_allowed=task.chat,
            context_limit=model.shapes.context, max_new_tokens=task.max_new_tokens, task=task.name,
        ).ids  # fmt: skip
