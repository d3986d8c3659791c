"""DuoAttention's gates: how much each KV head needs more than its first and newest tokens, learned by distillation.

Source: arXiv:2410.10819, section 2.3, and the authors' code (mit-han-lab/duo-attention, duo_attn/train.py and
loss.py). The model is frozen; one gate in 0..1 per KV head mixes its two attentions, gate * causal + (1 - gate) *
streaming. The loss is the mean squared distance of the last hidden states from the model's own on the pass-key tokens
plus 0.05 times the mean gate; AdamW, rate 0.02, warmed up and cooled down over a fifth of the steps each, from 1.
Differs: both attentions read the mixed states, as the paper's equation says (the code takes the causal one from the
unmixed model); one pass key is asked for, not ten, on prompts of one length, and the states are those that predict it
and its own; streaming is exact to the token (the code rounds windows up to blocks of 128); 500 steps and 64 sinks,
theirs are 2,000 and 128.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvcli.attention.patch import patched
from kvcli.attention.reference import causal, within
from kvcli.engine import profiling
from kvcli.engine.needles import Probe, needles_of
from kvcli.engine.profiling import Ready, Settings, loaded
from kvcli.errors import KvcliError
from kvcli.models.profiles import HeadProfile
from kvcli.models.source import ModelSource, fingerprint
from kvcli.models.wrapper import Model

DIGITS = 6
"""Decimals of a stored gate."""


@dataclass(frozen=True)
class Training:
    """penalty: weight of the mean gate in the loss; rate: of AdamW."""

    sinks: int = 64
    recent: int = 256
    steps: int = 500
    penalty: float = 0.05
    rate: float = 0.02
    seed: int = 0

    def rate_at(self, step: int) -> float:
        fifth = max(1, self.steps // 5)
        return self.rate * min(1.0, max((step + 1) / fifth, 0.1), max((self.steps - step) / fifth, 0.1))


@dataclass(frozen=True)
class Lesson:
    """A prompt with its answer [1, n], and the model's own last hidden states [T, width] of its last T tokens."""

    ids: Tensor
    states: Tensor


def streaming(n: int, sinks: int, recent: int) -> Tensor:
    """bool [n, n]: the first `sinks` keys and the newest `recent` ones, a query's own among these."""
    visible = within(n, n, recent)
    visible[:, :sinks] |= causal(n, n)[:, :sinks]
    return visible


class Gated:
    """Attention state: a KV head's output is gate * causal + (1 - gate) * streaming. gates [L, H_kv]."""

    def __init__(self, gates: Tensor, visible: Tensor) -> None:
        self.gates, self.visible = gates, visible

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        group = query.shape[1] // key.shape[1]
        keys, values = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        full = scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scaling)
        part = scaled_dot_product_attention(query, keys, values, attn_mask=self.visible, scale=scaling)
        gate = self.gates[layer].clamp(0, 1).repeat_interleave(group)[None, :, None, None]
        return (gate * full + (1 - gate) * part).to(query.dtype)  # mixed in the gates' precision


def lessons_of(model: Model, probes: Sequence[Probe], asked: Training) -> list[Lesson]:
    """Raises KvcliError where every prompt fits into the window: then no head would differ."""
    longest = max(len(p.prompt.ids) + len(p.answer) for p in probes)
    if longest <= asked.sinks + asked.recent:
        what = f"the longest prompt has {longest} tokens, and a streaming head keeps {asked.sinks + asked.recent}"
        given = f"--sinks {asked.sinks} --recent {asked.recent}"
        raise KvcliError(f"{what}: no head would differ", given=given, fix="a smaller --recent, longer --prompt-tokens")
    open_gates = torch.ones(model.shapes.layers, model.shapes.kv_heads[0], device=model.device)
    lessons = []
    for probe in probes:
        ids = torch.tensor([[*probe.prompt.ids, *probe.answer]], device=model.device)
        with torch.no_grad():
            states = _states(model, ids, open_gates, asked)[-len(probe.answer) - 1 :]
        lessons.append(Lesson(ids, states))
    return lessons


def loss_of(model: Model, lesson: Lesson, gates: Tensor, asked: Training) -> Tensor:
    """The distance from the model's own states, and the penalty."""
    mixed = _states(model, lesson.ids, gates, asked)[-len(lesson.states) :]
    return (mixed - lesson.states).square().mean() + asked.penalty * gates.abs().mean()


def _states(model: Model, ids: Tensor, gates: Tensor, asked: Training) -> Tensor:
    """[n, width] float32 at least: the last hidden states of a text read with these gates."""
    n = ids.shape[1]
    state = Gated(gates, streaming(n, asked.sinks, asked.recent).to(ids.device))
    with patched(model.hf, state):
        positions = torch.arange(n, device=ids.device)[None]
        states = model.hf.base_model(ids, position_ids=positions, use_cache=False).last_hidden_state[0]
    exact: Tensor = states.to(torch.promote_types(states.dtype, torch.float32))
    return exact


def train(
    model: Model,
    lessons: Sequence[Lesson],
    asked: Training,
    tell: Callable[[int, int, float], None] = lambda done, total, mean: None,
) -> tuple[tuple[float, ...], ...]:
    """The gates per layer and KV head; on a CPU the same on every call with one seed. tell: steps done, all steps, mean
    gate."""
    rng, order = random.Random(f"gates:{asked.seed}"), list[int]()
    exact = torch.promote_types(model.dtype, torch.float32)
    gates = torch.ones(model.shapes.layers, model.shapes.kv_heads[0], device=model.device, dtype=exact)
    gates.requires_grad_()
    optimiser = torch.optim.AdamW([gates], lr=asked.rate, weight_decay=0)
    with frozen(model.hf), torch.enable_grad():
        for step in range(asked.steps):
            if not order:
                order = rng.sample(range(len(lessons)), len(lessons))
            optimiser.param_groups[0]["lr"] = asked.rate_at(step)
            optimiser.zero_grad()
            loss_of(model, lessons[order.pop()], gates, asked).backward()
            optimiser.step()
            with torch.no_grad():
                gates.clamp_(0, 1)
            tell(step + 1, asked.steps, float(gates.detach().mean()))
    return tuple(tuple(round(float(x), DIGITS) for x in row) for row in gates.detach().cpu())


@contextmanager
def frozen(hf: Any) -> Iterator[None]:
    """No weight of the model collects gradients."""
    learning = [p for p in hf.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def described(asked: Settings, ready: Ready, training: Training) -> dict[str, Any]:
    """What the file says of how its gates were made."""
    return {"score": "trained gates", **asdict(training), **profiling.described(asked, ready)}


def trained(
    source: ModelSource,
    asked: Settings,
    ready: Ready,
    training: Training,
    tell: Callable[[int, int, float], None] = lambda done, total, mean: None,
) -> HeadProfile:
    """Loads the model and trains its gates. Raises KvcliError for everything the user can mend."""
    model = loaded(source, asked, ready)
    probes, _ = needles_of(ready.task, model, asked.limit, template=asked.template, data_dir=asked.data_dir)
    gates = train(model, lessons_of(model, probes, training), training, tell)
    return HeadProfile(gates, "kv", fingerprint(source), len(probes), described(asked, ready, training))
