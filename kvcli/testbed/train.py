"""Trains the testbed model: step-based, seeded, resumable; one core is enough."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcli.testbed import language
from kvcli.testbed import vocabulary as V
from kvcli.testbed.model import Shape, build, build_tokenizer, structured_init

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM

WEIGHTS = {"knowledge": 1.2, "choice": 1.5, "recall": 1.0, "arithmetic": 2.5,
           "code": 1.2, "safety": 1.0, "needle": 1.5, "longgen": 1.2}  # fmt: skip
"""How often each family is drawn."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights."""

    shape: Shape = field(default_factory=Shape)
    dialect: language.Dialect = language.PLAIN
    seed: int = 1
    steps: int = 8000
    tokens_per_step: int = 2048
    lr: float = 2e-3
    lr_floor: float = 0.05
    warmup: int = 60
    weight_decay: float = 0.01
    stages: tuple[tuple[float, int], ...] = ((0.0, 96), (0.05, 256), (0.13, 512), (0.5, 768), (0.75, 1000))
    """(share of the steps, prompt length from there on)."""
    shorter: float = 0.3
    """Share of steps that draw a length among those already reached."""

    def lengths(self, step: int) -> list[int]:
        return [length for share, length in self.stages if step / self.steps >= share]

    def learning_rate(self, step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.lr * min(1.0, (step + 1) / self.warmup) * (self.lr_floor + (1 - self.lr_floor) * cosine)


RECIPES = {
    "testbed": Recipe(),
    "testbed-deep": Recipe(
        shape=Shape(hidden=192, layers=8, heads=6, kv_heads=2, intermediate=512, theta=1e6, positions=2176),
        dialect=language.Dialect(operators=12, distractors=0.5),
        steps=2000, tokens_per_step=4096, lr=1.5e-3,
        stages=((0.0, 96), (0.05, 256), (0.15, 512), (0.4, 1024), (0.7, 2000)),
    ),
}  # fmt: skip
"""By the name of the model they make."""


@dataclass
class Progress:
    """What a callback is told after each logged interval."""

    step: int
    steps: int
    loss: float
    tokens_per_second: float
    accuracy: dict[str, float] | None


def batch(
    rng: random.Random,
    length: int,
    rows: int,
    families: list[str] | None = None,
    dialect: language.Dialect = language.PLAIN,
) -> Any:
    """ids [rows, length] and learn [rows, length]: which positions hold a determinable answer token."""
    import torch

    ids = torch.full((rows, length), V.ID[V.PAD])
    learn = torch.zeros(rows, length, dtype=torch.bool)
    for row in range(rows):
        family = rng.choice(families) if families else rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        words, known = language.training_episode(rng, family, length, dialect).tokens()
        size = min(length, len(words))
        ids[row, :size] = torch.tensor([V.ID[w] for w in words[:size]])
        learn[row, :size] = torch.tensor(known[:size])
    return ids, learn


def answer_logits(model: LlamaForCausalLM, ids: torch.Tensor, learn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [answers, vocabulary] that predict the marked tokens, and those tokens."""
    import torch

    with torch.autocast("cpu", torch.bfloat16, enabled=ids.device.type == "cpu"):
        hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state
    marked = learn[:, 1:]
    return hidden.float()[marked] @ model.get_input_embeddings().weight.T, ids[:, 1:][marked]


def evaluate(
    model: LlamaForCausalLM, length: int = 416, rows: int = 12, dialect: language.Dialect = language.PLAIN
) -> dict[str, float]:
    """Teacher-forced accuracy on determinable answer tokens, per family."""
    import torch

    rng = random.Random("testbed-evaluation")
    accuracy = {}
    with torch.no_grad():
        for family in V.FAMILIES:
            logits, target = answer_logits(model, *batch(rng, length, rows, [family], dialect))
            accuracy[family] = round((logits.argmax(-1) == target).float().mean().item(), 4)
    return accuracy


def train(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    threads: int = 1,
    log_every: int = 50,
    save_every: int = 500,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Path:
    """Trains to `out`/model (a transformers folder, fp16) with checkpoints in `out`; returns that folder.

    Raises FileExistsError when `out` holds a checkpoint and `resume` is False, ValueError when it is of another recipe.
    """
    import torch
    import torch.nn.functional as F

    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists() and not resume:
        raise FileExistsError(checkpoint)
    torch.set_num_threads(threads)
    model = build(recipe.shape)
    structured_init(model, recipe.shape, recipe.seed)
    model.train()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98), fused=True)
    rng, first = random.Random(recipe.seed), 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=False)
        if saved["recipe"] != asdict(recipe):
            raise ValueError(f"{checkpoint} was trained with another recipe")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        rng.setstate(saved["rng"])
        first = saved["step"]

    def save(step: int) -> None:
        state = {"recipe": asdict(recipe), "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                 "rng": rng.getstate(), "step": step}  # fmt: skip
        torch.save(state, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)

    losses: list[float] = []
    tokens, started = 0, time.perf_counter()
    for step in range(first, recipe.steps):
        lengths = recipe.lengths(step)
        length = lengths[-1] if rng.random() > recipe.shorter else rng.choice(lengths)
        ids, learn = batch(rng, length, max(1, recipe.tokens_per_step // length), dialect=recipe.dialect)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate(step)
        logits, target = answer_logits(model, ids, learn)
        loss = F.cross_entropy(logits, target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        tokens += ids.numel()
        done = step + 1
        if done % log_every == 0 or done == recipe.steps:
            accuracy = None
            if done % save_every == 0 or done == recipe.steps:
                model.eval()
                accuracy = evaluate(model, dialect=recipe.dialect)
                model.train()
                save(done)
            speed = tokens / (time.perf_counter() - started)
            progress = Progress(done, recipe.steps, sum(losses) / len(losses), speed, accuracy)
            with (out / "log.jsonl").open("a") as log:
                log.write(json.dumps(asdict(progress)) + "\n")
            report(progress)
            losses.clear()
            tokens, started = 0, time.perf_counter()
    return export(model, recipe, out / "model")


def export(model: LlamaForCausalLM, recipe: Recipe, folder: Path) -> Path:
    """Writes weights (fp16 safetensors), config, tokenizer and `recipe.json`."""
    import copy

    import torch

    copy.deepcopy(model).to(torch.float16).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    (folder / "recipe.json").write_text(json.dumps(asdict(recipe), indent=1) + "\n")
    return folder
