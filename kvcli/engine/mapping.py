"""Where a model looks: prompts through the shared wrapper to arrays of attention and of what methods keep.

A prompt is prefilled as a sweep does it (engine/prefilling.py): column sums of all heads, keys and values for the
methods. Then it is read a second time under attention/maps.py. What comes out is plain data, a dictionary and NumPy
arrays; docs/attn-map.md says what they hold.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvcli.attention import maps
from kvcli.attention.maps import Look, Reading
from kvcli.attention.patch import patched
from kvcli.cache.rows import Kept, head_positions
from kvcli.engine.asking import Asker, Choice, Options
from kvcli.engine.estimate import Sizes
from kvcli.engine.map_request import Asked, Chosen, chosen_heads, chosen_samples, request_of
from kvcli.engine.memory import CHUNK
from kvcli.engine.needs import require
from kvcli.engine.plan import Anchor, Cell, PrefillBatch, PromptKey
from kvcli.engine.prefilling import Prefiller
from kvcli.engine.prepare import Prepared, prepare
from kvcli.engine.prompts import PromptSet
from kvcli.engine.reweighting import Models
from kvcli.engine.session import SMALL
from kvcli.errors import KvcliError
from kvcli.methods import catalog
from kvcli.methods.context import Context
from kvcli.models.wrapper import Model
from kvcli.results import provenance
from kvcli.spans import REGIONS, question_start
from kvcli.weights.spec import DENSE

SCHEMA = 1
KINDS = ("special", *REGIONS)
SETS = ("all", "question")
"""Whose attention: that of all queries, or of those from the question on (the last token's where there is none)."""
MOST_SHOWN = 8
"""Prompts that are drawn."""
UNITS = 2048
"""Tokens up to which data are per token; longer prompts are stored in units of several tokens."""
RECEIVED, SMALL_MAPS = 4_000_000, 1_500_000
"""Numbers stored of all prompts shown: what keys receive per head, and small maps of all heads."""
SMALLEST, LARGEST = 8, 64
"""Blocks of a small map."""


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
    sets = chosen_samples(prepared, asked)
    heads = chosen_heads(asked, prepared.model_config)
    _set_threads(prepared)
    models = Models(prepared, say, lambda name, facts: None, lambda: False)
    model = models.enter(DENSE)
    return Mapper(model, prepared, sets, asked, heads).run(tell)


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
    sets: list[PromptSet]
    asked: Asked
    heads: Chosen

    def __post_init__(self) -> None:
        config = self.prepared.request.config
        self.cells = {s.key: self._cells(s.key) for s in self.sets}
        texts = dict.fromkeys(cell.method for cells in self.cells.values() for cell in cells)
        self.methods = {text: catalog.build(text) for text in texts}
        require(self.model, {text: method.needs() for text, method in self.methods.items()})
        self.prefiller = Prefiller(self.model, config.max_new_tokens)
        self.asker = Asker(self.model, Options(1, strict_window=config.strict_window), self._method)
        self.shown = self._shown()
        self.arrays: dict[str, np.ndarray] = {}
        self.stacks: dict[str, list[Tensor]] = {}
        self.warnings = list(self.prepared.warnings)

    def run(self, tell: Tell) -> Atlas:
        prompts: list[dict[str, Any]] = []
        total = sum(len(s.prompts) for s in self.sets)
        for group, prompt_set in enumerate(self.sets):
            for index in range(len(prompt_set.prompts)):
                tell(len(prompts), total, prompt_set.task.name)
                prompts.append(self._prompt(len(prompts), group, prompt_set, index))
        tell(total, total, "")
        for name, values in self.stacks.items():
            self.arrays[name] = torch.stack(values).float().numpy()
        return Atlas(self._meta(prompts), self.arrays, self.warnings)

    def _method(self, cell: Cell | Anchor) -> Any:
        return self.methods[cell.method]

    def _cells(self, key: PromptKey) -> list[Cell]:
        return [c for c in self.prepared.cells if c.prompt_key == key and c.method != "full"]

    def _shown(self) -> set[tuple[int, int]]:
        """(set, index) of the prompts that are drawn: the samples named, else the first of each set."""
        named = bool(self.asked.samples or self.asked.texts)
        every = [(s, i) for s, each in enumerate(self.sets) for i in range(len(each.prompts)) if named or i == 0]
        return set(every[:MOST_SHOWN])

    @torch.inference_mode()
    def _prompt(self, number: int, group: int, prompts: PromptSet, index: int) -> dict[str, Any]:
        cells = self.cells[prompts.key]
        needs = {"column_sum", "column_sum:question", *(n for c in cells for n in self.methods[c.method].needs())}
        batch = PrefillBatch("map", prompts.key, 0, len(prompts.prompts), len(prompts.prompts), tuple(cells))
        ready = self.prefiller.run(prompts, batch, [index], needs)[index]
        ctx, prompt, shown = ready.context, prompts.prompts[index], (group, index) in self.shown
        received = _received(ctx)
        look = self._look(ctx)
        reading = self._read(prompt.ids, ctx, look)
        self._stack(ctx, received, reading)
        facts = self._facts(group, prompts, index, look, shown)
        if shown:
            self._store(number, ctx, received, reading, facts)
        facts["kept"] = [self._kept(number, ctx, cell, self._choice(prompts, index, cell, ready), received, facts)
                         for cell in cells]  # fmt: skip
        return facts

    def _look(self, ctx: Context) -> Look:
        n = ctx.n
        per_head = SMALL_MAPS // (ctx.layers * ctx.heads * len(self.shown))
        small = min(LARGEST, max(SMALLEST, int(per_head**0.5)))
        rows = {"all": maps.measured_rows(0, n), "question": maps.measured_rows(question_start(ctx.regions), n)}
        return Look(n, -(-n // self.asked.blocks), self.heads.pairs, -(-n // small), rows)

    def _read(self, ids: Sequence[int], ctx: Context, look: Look) -> Reading:
        """The prompt once more, in chunks, each behind the keys that are there already."""
        state = Reading(look, ctx.keys, ctx.values, self.model.attn)
        device = self.model.device
        with patched(self.model.hf, state):
            for start in range(0, ctx.n, CHUNK):
                tokens = torch.tensor([ids[start : start + CHUNK]], device=device)
                positions = torch.arange(start, start + tokens.shape[1], device=device)[None]
                state.start = start
                self.model.hf(
                    tokens, position_ids=positions, use_cache=False, logits_to_keep=torch.tensor([0], device=device)
                )
        return state

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

    def _facts(self, group: int, prompts: PromptSet, index: int, look: Look, shown: bool) -> dict[str, Any]:
        prompt, sample, task = prompts.prompts[index], prompts.samples[index], prompts.task
        hidden = task.harmful and not self.asked.config.store_prompts
        tokens = None if hidden or not shown else [prompt.token_text(i) for i in range(look.n)]
        return {
            "group": group, "sample": sample.id, "n": look.n, "shown": shown, "hidden": hidden,
            "regions": [[r.label, r.start, r.end] for r in prompt.regions], "tokens": tokens,
            "block": look.block, "small": look.small, "unit": -(-look.n // UNITS),
            "measured": {name: len(rows) for name, rows in look.rows.items()},
            "queries": {"all": look.n, "question": look.n - question_start(prompt.regions)},
            "truncated": prompt.truncated,
        }  # fmt: skip

    def _store(
        self, number: int, ctx: Context, received: list[Tensor], reading: Reading, facts: dict[str, Any]
    ) -> None:
        """What only prompts that are drawn have."""
        mean, most = reading.map()
        every = torch.stack([each.cpu() for each in received], 1)  # [sets, L, H, n]
        units = _in_units(every, facts["unit"])
        if units[0].numel() * len(SETS) * len(self.shown) > RECEIVED:
            units = units.mean(2, keepdim=True)
        shots = [_of_spans(every, spans) for spans in ctx.shots()]
        found = {
            "map_mean": mean, "map_max": most, "small": reading.small_maps(), "received": units,
            "token_received": every.mean((1, 2)),
            "shot_mass": torch.stack(shots, 1) if shots else every.new_zeros(len(SETS), 0, *every.shape[1:3]),
        }  # fmt: skip
        self.arrays.update({f"p{number}.{name}": value.float().numpy() for name, value in found.items()})

    def _choice(self, prompts: PromptSet, index: int, cell: Cell, ready: Any) -> Choice | str:
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
        entry: dict[str, Any] = {"method": cell.method, "ratio": cell.ratio, "budget": cell.budget, "seed": cell.seed}
        if isinstance(choice, str):
            self.warnings.append(f"{cell.method}, sample {facts['sample']}: {choice}")
            return {**entry, "error": choice}
        kept = choice.selection.kept
        held = kept_pairs(kept, ctx.kv_heads, ctx.n)  # [L, H_kv or 1, n]
        thrown = torch.stack([_thrown(each, rows) for each, rows in zip(received, held, strict=True)], 1)
        shares = [float(h.double().mean()) for h in held]
        entry |= {
            "flags": sorted(choice.selection.flags), "kept": sum(shares) / len(shares), "by_layer": shares,
            "thrown_by_layer": {name: thrown[i].mean(-1).tolist() for i, name in enumerate(SETS)},
        }  # fmt: skip
        if facts["shown"]:
            name = f"p{number}.kept.{self.cells[self.sets[facts['group']].key].index(cell)}"
            most = max(map(len, held))
            entry["array"] = name
            self.arrays[name] = np.packbits(torch.stack([h.expand(most, -1) for h in held]).numpy(), axis=-1)
            self.arrays[f"{name}.thrown"] = thrown.float().numpy()
        return entry

    def _meta(self, prompts: list[dict[str, Any]]) -> dict[str, Any]:
        prepared, shapes = self.prepared, self.model.shapes
        return {
            "schema": SCHEMA,
            "model": {
                **prepared.identity, "name": prepared.request.source.text, "short": prepared.request.source.short,
                "dtype": prepared.dtype, "layers": shapes.layers, "heads": shapes.heads,
                "kv_heads": shapes.kv_heads[0],
            },
            "chosen": {"layer": self.heads.layer, "head": self.heads.head, "note": self.heads.note},
            "sinks": maps.SINKS, "local": maps.LOCAL, "shares": list(maps.SHARES), "measures": list(maps.MEASURES),
            "sets": list(SETS),
            "kinds": list(KINDS), "curves": list(maps.CURVES), "groups": list(self._groups()), "prompts": prompts,
            "provenance": provenance.collect(),
        }  # fmt: skip

    def _groups(self) -> Iterator[dict[str, Any]]:
        names = [s.task.name for s in self.sets]
        for s in self.sets:
            key = s.key
            label = s.task.name if names.count(s.task.name) == 1 else str(key)
            yield {"task": s.task.name, "label": label, "ability": s.task.ability, "shots": key.shots,
                   "shot_seed": key.shot_seed, "shot_order": key.shot_order, "harmful": s.task.harmful,
                   "samples": len(s.samples)}  # fmt: skip


def _received(ctx: Context) -> list[Tensor]:
    """Per layer [sets, H, n] float32: the mean attention that each key receives from the queries of a set."""
    counts = (ctx.n, ctx.n - question_start(ctx.regions))
    return [
        torch.stack([ctx.column_sum(layer, name) / count for name, count in zip(SETS, counts, strict=True)])
        for layer in range(ctx.layers)
    ]


def kept_pairs(kept: Kept, kv_heads: int, n: int) -> list[Tensor]:
    """Per layer bool [H_kv, n], [1, n] where its heads are all alike: which pairs stay."""
    found = []
    for form in kept:
        alike = not isinstance(form, list) and form.dim() == 1
        held = torch.zeros(1 if alike else kv_heads, n, dtype=torch.bool)
        for row, positions in zip(held, head_positions(form, len(held)), strict=True):
            row[positions.cpu()] = True
        found.append(held)
    return found


def _thrown(received: Tensor, held: Tensor) -> Tensor:
    """[sets, H]: attention that goes to pairs which are not held; received [sets, H, n], held [H_kv or 1, n]."""
    group = received.shape[1] // held.shape[0]
    gone = ~held.repeat_interleave(group, 0).to(received.device)
    return (received.double() * gone).sum(-1).cpu()


def _in_units(received: Tensor, unit: int) -> Tensor:
    """Sums over units of so many tokens: [..., n] -> [..., ceil(n / unit)]."""
    padded = torch.nn.functional.pad(received, (0, -received.shape[-1] % unit))
    return padded.unflatten(-1, (-1, unit)).sum(-1)


def _of_spans(received: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    return torch.stack([received[..., start:end].sum(-1) for start, end in spans]).sum(0)
