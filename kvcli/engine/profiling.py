"""How much each head of a model retrieves: its attention to a needle while the model answers from it.

Source: the retrieval-reasoning scores of HeadKV, arXiv:2410.19258, section 3.2, and the authors' code (FYYFU/HeadKV,
retrieval_head_detection_r2.py). While an answer of A tokens is given, each of its steps looks at the N most attended
keys of a head, N the tokens of the needle; what the needle's tokens among them receive, over N A, is the head's score
on the sample, and the mean over the samples that the model answers right is its score. Differs: the answer is given
teacher-forced, which is greedy generation wherever every token of it is the model's own choice (that is what counts as
right here; the authors accept an F1 above 0.5); the needle is the answer where it stands in the prompt, so no wrong
alternatives and no reasoning steps belong to it; their factor of 10 is left out.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvcli.attention import backends
from kvcli.attention.capture import Dense, Needs
from kvcli.attention.patch import patched
from kvcli.attention.reference import causal, probabilities
from kvcli.engine.memory import CHUNK
from kvcli.engine.needles import SEED, Probe, default_task, needles_of
from kvcli.errors import KvcliError
from kvcli.evals.loader import find_tasks
from kvcli.evals.spec import Task
from kvcli.models import loader
from kvcli.models.profiles import HeadProfile
from kvcli.models.source import ModelSource, fingerprint
from kvcli.models.wrapper import Model
from kvcli.spans import Span

DIGITS = 6
"""Significant digits of a stored score; more would differ from machine to machine."""
SMALL = 20_000_000
"""Parameters up to which one CPU thread is the fastest."""


@torch.inference_mode()
def head_scores(model: Model, probe: Probe) -> tuple[Tensor, bool]:
    """[L, H] float64: what the needle receives while the answer is given; and whether the model gives it by itself."""
    ids = probe.prompt.ids
    dense, _ = model.prefill_one(ids[:-1], Needs(), len(ids) - 1, chunk=CHUNK)
    state = _Answering(dense, probe.needle, model.attn)
    fed = [ids[-1], *probe.answer[:-1]]
    positions = torch.arange(len(ids) - 1, len(ids) - 1 + len(fed), device=model.device)[None]
    with patched(model.hf, state):
        tokens = torch.tensor([fed], device=model.device)
        logits = model.hf(tokens, position_ids=positions, use_cache=False).logits[0]
    return torch.stack(state.scores).cpu(), logits.argmax(-1).tolist() == probe.answer


class _Answering:
    """Attention state of the answer's tokens behind the prompt's keys."""

    def __init__(self, dense: Dense, needle: Span, backend: str) -> None:
        self.dense, self.needle, self.backend = dense, needle, backend
        self.scores: list[Tensor] = []

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        keys, values = self.dense.keys[layer], self.dense.values[layer]
        every = torch.cat([keys, key[0]], 1)[None]
        seen = causal(query.shape[2], every.shape[2]).to(query.device)
        self.scores.append(needle_share(probabilities(query, every, scaling, seen)[0], self.needle))
        out, _ = backends.prefill(query, key, value, scaling, {}, self.backend, (keys, values))
        return out


def needle_share(attention: Tensor, needle: Span) -> Tensor:
    """[H] float64. attention [H, A, S] of the A steps of an answer."""
    start, end = needle
    top = attention.topk(end - start, -1)
    inside = (top.indices >= start) & (top.indices < end)
    return (top.values.double() * inside).sum((1, 2)) / ((end - start) * attention.shape[1])


def profile(
    model: Model,
    task: Task,
    limit: int,
    *,
    identity: dict[str, Any],
    seed: int = SEED,
    template: str = "auto",
    data_dir: str | None = None,
    wrong_too: bool = False,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> HeadProfile:
    """The model's head profile. wrong_too: samples that it answers wrong count as well. Raises KvcliError for a task
    that shows nothing."""
    probes, asked = needles_of(task, model, limit, seed=seed, template=template, data_dir=data_dir)
    total, counted, right = torch.zeros(model.shapes.layers, model.shapes.heads, dtype=torch.double), 0, 0
    for done, probe in enumerate(probes):
        tell(done, len(probes))
        scores, answered = head_scores(model, probe)
        right += answered
        if answered or wrong_too:
            total += scores
            counted += 1
    tell(len(probes), len(probes))
    if not counted:
        what = f"the model answers none of {len(probes)} prompts of {task.name} right, so no head is seen retrieving"
        fix = "another --task, a shorter --prompt-tokens, or --wrong-too"
        raise KvcliError(what, given=f"--task {task.name} --limit {limit}", fix=fix)
    how = {
        "score": "attention to the answer's tokens in the prompt while it is given",
        "task": task.name, "task_version": task.version, "shots": task.usual_shots, "shot_seed": seed,
        "prompt_tokens": getattr(task, "prompt_tokens", None), "limit": asked, "with_needle": len(probes),
        "right": right, "wrong_too": wrong_too, "dtype": str(model.dtype).removeprefix("torch."),
    }  # fmt: skip
    return HeadProfile(_rounded(total / counted), "query", identity, counted, how)


@dataclass(frozen=True)
class Settings:
    """What `kvcli profile-heads` is asked for; None: the default."""

    task: str | None = None
    limit: int = 64
    prompt_tokens: int | None = None
    wrong_too: bool = False
    tokenizer: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    attn: str = "auto"
    threads: int | None = None
    template: str = "auto"
    trust_remote_code: bool = False
    data_dir: str | None = None


@dataclass(frozen=True)
class Ready:
    """What is settled before the weights are read."""

    config: Any
    tokenizer: Any
    task: Task
    device: str
    dtype: str


def prepared(source: ModelSource, asked: Settings) -> Ready:
    """Raises KvcliError for everything the user can mend."""
    trust = asked.trust_remote_code
    config = loader.load_config(source, trust_remote_code=trust)
    tokenizer = loader.load_tokenizer(source, asked.tokenizer, trust_remote_code=trust)
    if source.kind == "random":
        loader.resize(config, source, len(tokenizer))
    task = _task(asked, tokenizer, getattr(config, "max_position_embeddings", None))
    device = loader.pick_device(asked.device)
    dtype = loader.pick_dtype(asked.dtype, device, config)
    loader.check_attention(asked.attn, device, dtype)
    return Ready(config, tokenizer, task, device, dtype)


def described(asked: Settings, ready: Ready) -> dict[str, Any]:
    """What the file will say of how it was made, as far as it is known before the model runs."""
    task = ready.task
    samples = task.samples(shots=task.usual_shots, shot_seed=SEED, limit=asked.limit, data_dir=asked.data_dir)
    return {
        "task": task.name, "task_version": task.version, "shots": task.usual_shots, "shot_seed": SEED,
        "prompt_tokens": getattr(task, "prompt_tokens", None), "limit": len(samples), "dtype": ready.dtype,
    }  # fmt: skip


def loaded(source: ModelSource, asked: Settings, ready: Ready) -> Model:
    """The model on its device, with as many threads as suit it."""
    hf = loader.load_weights(
        ready.config, source, ready.dtype, ready.device, trust_remote_code=asked.trust_remote_code
    )  # fmt: skip
    model = Model(hf, ready.tokenizer, name=source.text, attn=asked.attn)
    if asked.threads:
        torch.set_num_threads(asked.threads)
    elif "OMP_NUM_THREADS" not in os.environ and model.shapes.parameters < SMALL:
        torch.set_num_threads(1)
    return model


def measure(
    source: ModelSource,
    asked: Settings,
    tell: Callable[[int, int], None] = lambda done, total: None,
    ready: Ready | None = None,
) -> HeadProfile:
    """Loads the model and profiles it. Raises KvcliError for everything the user can mend."""
    ready = ready or prepared(source, asked)
    return profile(
        loaded(source, asked, ready), ready.task, asked.limit, identity=fingerprint(source), template=asked.template,
        data_dir=asked.data_dir, wrong_too=asked.wrong_too, tell=tell,
    )  # fmt: skip


def _task(asked: Settings, tokenizer: Any, context: int | None) -> Task:
    if asked.task is None:
        return default_task(tokenizer, asked.prompt_tokens, context)
    tasks = find_tasks([asked.task])
    if len(tasks) > 1:
        names = ", ".join(t.name for t in tasks)
        raise KvcliError("a profile is made on one task", given=f"--task {asked.task}", fix=f"one of {names}")
    if asked.prompt_tokens is None:
        return tasks[0]
    if not hasattr(tasks[0], "prompt_tokens"):
        given = f"--prompt-tokens {asked.prompt_tokens}"
        raise KvcliError(f"{tasks[0].name} has prompts of its own lengths", given=given, fix="leave it out")
    return dataclasses.replace(tasks[0], prompt_tokens=asked.prompt_tokens)  # type: ignore[call-arg]


def _rounded(scores: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(f"{x:.{DIGITS}g}") for x in row) for row in scores.tolist())


def strongest(profile: HeadProfile, count: int) -> Sequence[tuple[int, int, float]]:
    """(layer, head, score) of the heads that retrieve most."""
    every = [(layer, head, x) for layer, row in enumerate(profile.heads) for head, x in enumerate(row)]
    return sorted(every, key=lambda h: -h[2])[:count]
