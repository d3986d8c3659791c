"""Where a model looks: prompts through the shared wrapper to arrays of attention and of what methods keep.

A prompt is prefilled as a sweep does it (engine/prefilling.py): column sums of all heads, keys and values for the
methods. Then it is read a second time under attention/maps.py. What comes out is plain data, a dictionary and NumPy
arrays; docs/attn-map.md says what they hold.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvcli.attention import maps
from kvcli.attention.maps import Reading
from kvcli.engine.asking import Asker, Choice, Options
from kvcli.engine.cells import Anchor, Cell
from kvcli.engine.estimate import Sizes
from kvcli.engine.map_facts import KINDS, meta_of, prompt_facts
from kvcli.engine.map_numbers import (
    SETS,
    in_units,
    kept_pairs,
    of_spans,
    received_by_layer,
    thrown_away,
)
from kvcli.engine.map_reading import look_of, read_again
from kvcli.engine.map_request import Asked, Chosen, Group, chosen_heads, chosen_samples, request_of
from kvcli.engine.needs import require
from kvcli.engine.plan import PrefillBatch
from kvcli.engine.prefilling import Prefiller, Ready
from kvcli.engine.prepare import Prepared, prepare
from kvcli.engine.prompts import PromptSet
from kvcli.engine.reweighting import Models
from kvcli.engine.session import SMALL
from kvcli.errors import KvcliError
from kvcli.methods import catalog
from kvcli.methods.context import Context
from kvcli.models.wrapper import Model
from kvcli.weights.spec import DENSE

MOST_SHOWN = 8
"""Prompts that are drawn."""
UNITS = 2048
"""Tokens up to which data are per token; longer prompts are stored in units of several tokens."""
RECEIVED = 4_000_000
"""Numbers stored of what keys receive per head, of all prompts shown together; beyond, heads are averaged."""

Say = Callable[[str], None]
Tell = Callable[[int, int, str], None]


@dataclass
class Atlas:
    """meta: JSON values; arrays: by name. warnings: what the user should know about them."""

    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]
    warnings: list[str] = field(default_factory=list)


def map_prompts(asked: Asked, say: Say = lambda text: None, tell: Tell = lambda done, total, what: None) -> Atlas:
    """Loads the model, reads the prompts and returns what they show. Raises KvcliError for what the user can mend."""
    prepared = prepare(request_of(asked), None if asked.samples else asked.config.limit, say)
    groups = chosen_samples(prepared, asked)
    heads = chosen_heads(asked, prepared.model_config)
    _set_threads(prepared)
    models = Models(prepared, say, lambda name, facts: None, lambda: False)
    model = models.enter(DENSE)
    return Mapper(model, prepared, groups, asked, heads).run(tell)


def _set_threads(prepared: Prepared) -> None:
    threads = prepared.request.config.threads
    if threads:
        torch.set_num_threads(threads)
    elif "OMP_NUM_THREADS" not in os.environ and Sizes.of(prepared.model_config).parameters < SMALL:
        torch.set_num_threads(1)


@dataclass
class Mapper:
    """One model over some prompts."""

    model: Model
    prepared: Prepared
    groups: list[Group]
    asked: Asked
    heads: Chosen

    def __post_init__(self) -> None:
        config = self.prepared.request.config
        self.cells = [self._cells(group) for group in self.groups]
        texts = dict.fromkeys(cell.method for cells in self.cells for cell in cells)
        self.methods = {text: catalog.build(text) for text in texts}
        require(self.model, {text: method.needs() for text, method in self.methods.items()})
        self.prefillers = {query: Prefiller(self.model, config.max_new_tokens) for query in ("aware", "agnostic")}
        self.asker = Asker(self.model, Options(1, strict_window=config.strict_window), self._method)
        self.shown = self._shown()
        self.arrays: dict[str, np.ndarray] = {}
        self.stacks: dict[str, list[Tensor]] = {}
        self.warnings = list(self.prepared.warnings)

    def run(self, tell: Tell) -> Atlas:
        prompts: list[dict[str, Any]] = []
        total = sum(len(group.whole.prompts) for group in self.groups)
        for number, group in enumerate(self.groups):
            for index in range(len(group.whole.prompts)):
                tell(len(prompts), total, group.whole.task.name)
                prompts.append(self._prompt(len(prompts), number, index))
        tell(total, total, "")
        for name, values in self.stacks.items():
            self.arrays[name] = torch.stack(values).float().numpy()
        meta = meta_of(self.model, self.prepared, self.groups, self.heads, prompts)
        return Atlas(meta, self.arrays, self.warnings)

    def _method(self, cell: Cell | Anchor) -> Any:
        return self.methods[cell.method]

    def _cells(self, group: Group) -> list[Cell]:
        keys = {s.key for s in (group.whole, group.before) if s is not None}
        return [c for c in self.prepared.cells if c.prompt_key in keys and c.method != "full"]

    def _shown(self) -> set[tuple[int, int]]:
        """(set, index) of the prompts that are drawn: the samples named, else the first of each set."""
        named = bool(self.asked.samples or self.asked.texts)
        every = [
            (s, i) for s, each in enumerate(self.groups) for i in range(len(each.whole.prompts)) if named or i == 0
        ]
        return set(every[:MOST_SHOWN])

    @torch.inference_mode()
    def _prompt(self, number: int, group: int, index: int) -> dict[str, Any]:
        prompts, before = self.groups[group].whole, self.groups[group].before
        ready = self._ready(group, prompts, index, {"column_sum", "column_sum:question"})
        ctx, prompt, shown = ready.context, prompts.prompts[index], (group, index) in self.shown
        received = received_by_layer(ctx)
        look = look_of(ctx, self.asked.blocks, self.heads, len(self.shown))
        reading = read_again(self.model, prompt.ids, ctx, look)
        self._stack(ctx, received, reading)
        facts = {
            "group": group, "shown": shown, "unit": -(-look.n // UNITS),
            **prompt_facts(prompts, index, look, self.prepared.tokenizer, text=self._text(prompts, shown=shown)),
        }  # fmt: skip
        self._store_shots(number, ctx, received, shown=shown)
        if shown:
            self._store(number, received, reading, facts)
        sources = {"aware": (prompts, ready)}
        if before is not None:
            sources["agnostic"] = (before, self._ready(group, before, index, set()))
        facts["kept"] = []
        for cell in self.cells[group]:
            whose, its = sources[cell.query]
            choice = self._choice(whose, index, cell, its)
            facts["kept"].append(self._kept(number, its.context, cell, choice, received, facts))
        return facts

    def _ready(self, group: int, prompts: PromptSet, index: int, needs: set[str]) -> Ready:
        """A prompt, or what stands before its question, prefilled as a sweep does it."""
        cells = [cell for cell in self.cells[group] if cell.query == prompts.key.query]
        names = needs | {n for cell in cells for n in self.methods[cell.method].needs()}
        count = len(prompts.prompts)
        batch = PrefillBatch("map", prompts.key, 0, count, count, tuple(cells))
        return self.prefillers[prompts.key.query].run(prompts, batch, [index], names)[index]

    def _stack(self, ctx: Context, received: list[Tensor], reading: Reading) -> None:
        """What every prompt has, whatever its length."""
        self._push("measures", torch.stack([reading.means(name) for name in SETS]))
        mass = torch.zeros(len(SETS), len(KINDS), ctx.layers, ctx.heads, dtype=torch.double)
        curves = torch.zeros(len(SETS), len(maps.CURVES), ctx.layers, maps.POINTS, dtype=torch.double)
        for layer, each in enumerate(received):  # [sets, H, n]
            for region in ctx.regions:
                mass[:, KINDS.index(region.kind), layer] += each[:, :, region.start : region.end].sum(-1).cpu()
            for which, of_set in enumerate(each):
                curves[which, :, layer] = maps.cumulative(of_set).mean(1).cpu()
        self._push("region_mass", mass)
        self._push("curves", curves)

    def _push(self, name: str, value: Tensor) -> None:
        self.stacks.setdefault(name, []).append(value)

    def _text(self, prompts: PromptSet, *, shown: bool) -> bool | None:
        """Whether tokens are written out; None where that must not be."""
        hidden = prompts.task.harmful and not self.asked.config.store_prompts
        return None if hidden else shown

    def _store_shots(self, number: int, ctx: Context, received: list[Tensor], *, shown: bool) -> None:
        """What shots receive: of every prompt averaged over heads, of those that are drawn per head too."""
        layers = [[of_spans(each, spans).cpu() for spans in ctx.shots()] for each in received]
        none = torch.zeros(len(SETS), 0, ctx.layers, ctx.heads)
        mass = (
            torch.stack([torch.stack(of_layer, 1) for of_layer in layers], 2) if layers[0] else none
        )  # [sets, K, L, H]
        self.arrays[f"p{number}.shot_layers"] = mass.mean(-1).float().numpy()
        if shown:
            self.arrays[f"p{number}.shot_mass"] = mass.float().numpy()

    def _store(self, number: int, received: list[Tensor], reading: Reading, facts: dict[str, Any]) -> None:
        """What only prompts that are drawn have."""
        every = torch.stack([each.cpu() for each in received], 1)  # [sets, L, H, n]
        mean, most = reading.map()
        units = in_units(every, facts["unit"])
        if units[0].numel() * len(SETS) * len(self.shown) > RECEIVED:
            units = units.mean(2, keepdim=True)
        found = {
            "map_mean": mean, "map_max": most, "small": reading.small_maps(), "received": units,
            "token_received": every.mean((1, 2)),
        }  # fmt: skip
        self.arrays.update({f"p{number}.{name}": value.float().numpy() for name, value in found.items()})

    def _choice(self, prompts: PromptSet, index: int, cell: Cell, ready: Ready) -> Choice | str:
        """What the cell's method keeps of a prompt, exactly as a sweep's row has it; or why it keeps nothing."""
        try:
            choice: Choice = self.asker.ask(prompts, index, cell, ready).tag
        except KvcliError:
            raise
        except Exception as error:  # a method's own fault, as in a sweep: that one cell's result
            return f"{type(error).__name__}: {error}"
        return choice

    def _kept(
        self, number: int, ctx: Context, cell: Cell, choice: Choice | str, received: list[Tensor], facts: dict[str, Any]
    ) -> dict[str, Any]:
        """ctx: of what was compressed; what follows it (the question of `--query agnostic`) is kept whole."""
        entry: dict[str, Any] = {
            "method": cell.method, "ratio": cell.ratio, "budget": cell.budget, "seed": cell.seed, "query": cell.query,
            "of": ctx.n,
        }  # fmt: skip
        if isinstance(choice, str):
            self.warnings.append(f"{cell.method}, sample {facts['sample']}: {choice}")
            return {**entry, "error": choice}
        kept = choice.selection.kept
        held = kept_pairs(kept, ctx.kv_heads, ctx.n)  # [L, H_kv or 1, n]
        shares = [float(h.double().mean()) for h in held]
        held = [torch.nn.functional.pad(h, (0, facts["n"] - ctx.n), value=True) for h in held]
        thrown = torch.stack([thrown_away(each, rows) for each, rows in zip(received, held, strict=True)], 1)
        entry |= {
            "flags": sorted(choice.selection.flags), "kept": sum(shares) / len(shares), "by_layer": shares,
            "thrown_by_layer": {name: thrown[i].mean(-1).tolist() for i, name in enumerate(SETS)},
        }  # fmt: skip
        if facts["shown"]:
            name = f"p{number}.kept.{self.cells[facts['group']].index(cell)}"
            most = max(map(len, held))
            entry["array"] = name
            self.arrays[name] = np.packbits(torch.stack([h.expand(most, -1) for h in held]).numpy(), axis=-1)
            self.arrays[f"{name}.thrown"] = thrown.float().numpy()
        return entry
