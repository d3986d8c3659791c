"""Multiple choice: how likely each option is behind a compressed cache, read from that cache and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvcli.cache.kv_cache import CompressedCache
from kvcli.cache.workspace import Workspace
from kvcli.engine.fidelity import WIDE, passes
from kvcli.engine.generate import Ask, AskOutOfMemory, Build, Generated, OutOfRoom
from kvcli.engine.memory import Room, batches, is_out_of_memory

if TYPE_CHECKING:
    from kvcli.models.wrapper import Model


@dataclass
class _Line:
    """Tokens fed to one copy of a row. wanted: (option, index in it, index of the pass's logits that predict it)."""

    ask: int
    fed: list[int]
    wanted: list[tuple[int, int, int]] = field(default_factory=list)


@torch.inference_mode()
def choose(model: Model, asks: Sequence[Ask], memory: Workspace, build: Build, room: Room) -> list[Generated]:
    """The likeliest option of each ask. Options that begin alike share what they begin with: letters need one pass per
    row; as many rows run together as fit.

    In first-token mode `prefill` an option's first token is predicted by the ask's own `tag.first` (log-probabilities
    [V] behind the dense prefill), its others by the cache. Raises OutOfRoom.
    """
    outputs = [Generated(finish="choice", loglikelihoods=[0.0] * len(ask.options)) for ask in asks]
    for ask, output in zip(asks, outputs, strict=True):
        if ask.start.given is not None:
            output.loglikelihoods = [float(ask.tag.first[ids[0]]) for ids in ask.options]
    every = [line for a, ask in enumerate(asks) for line in _lines(a, ask)]
    for some in batches([(asks[line.ask].row, len(line.fed)) for line in every], room):
        lines = [every[i] for i in some]
        failed: OutOfRoom | None = None
        try:
            _run(model, asks, lines, outputs, memory, build)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            first = lines[0].ask
            failed = OutOfRoom(len(lines), [asks[first], *asks[:first], *asks[first + 1 :]], error)
        if failed is not None:
            raise failed
    for ask, output in zip(asks, outputs, strict=True):
        total = output.loglikelihoods
        output.ids = list(ask.options[max(range(len(total)), key=total.__getitem__)])
        output.text = model.tokenizer.decode(output.ids).strip()
    return outputs


def _run(
    model: Model, asks: Sequence[Ask], lines: Sequence[_Line], outputs: list[Generated], memory: Workspace, build: Build
) -> None:
    """One batch of lines through their caches; what it says is added to the outputs."""
    longest = max(len(line.fed) for line in lines)  # rows that end early are fed padding
    cache = build([asks[line.ask].row for line in lines], [longest] * len(lines), memory)
    begins = [asks[line.ask].start.position for line in lines]
    one = build is not CompressedCache
    for first, logits in passes(model, cache, begins, [line.fed for line in lines], 1 if one else WIDE):
        _add(outputs, asks, lines, first, logits)
        for r, line in enumerate(lines):
            if one and first == len(asks[line.ask].start.follow) > 0:
                outputs[line.ask].prompted = cache.payload(r)
    for r, line in enumerate(lines):
        output = outputs[line.ask]
        output.alloc = cache.nbytes() // len(lines)
        output.read, output.left_out = cache.read_per_token(r), output.left_out or cache.left_out(r)


def _lines(number: int, ask: Ask) -> list[_Line]:
    """What must be fed to know every option, each distinct text once."""
    start = ask.start
    found: dict[tuple[int, ...], _Line] = {}
    for k, ids in enumerate(ask.options):
        given = start.given is not None
        fed = list(ids[:-1]) if given else [start.token, *start.follow, *ids[:-1]]
        if not fed:
            continue
        line = found.setdefault(tuple(fed), _Line(number, fed))
        skip = 0 if given else len(start.follow)
        line.wanted += [(k, at, skip + at - given) for at in range(int(given), len(ids))]
    return list(found.values())


def _add(outputs: Sequence[Generated], asks: Sequence[Ask], lines: Sequence[_Line], first: int, logits: Tensor) -> None:
    """Adds what one pass says. logits [R, S, V] from token `first` of the lines on."""
    for r, line in enumerate(lines):
        mine = [(k, at, index - first) for k, at, index in line.wanted if 0 <= index - first < logits.shape[1]]
        if not mine:
            continue
        seen = sorted({index for _, _, index in mine})
        wide = torch.promote_types(logits.dtype, torch.float32)
        scores = dict(zip(seen, logits[r, seen].to(wide).log_softmax(-1), strict=True))
        for k, at, index in mine:
            outputs[line.ask].loglikelihoods[k] += float(scores[index][asks[line.ask].options[k][at]])


def choose_all(
    model: Model,
    asks: Iterator[Ask],
    *,
    room: Room,
    memory: Workspace,
    build: Build,
    stop: Callable[[], bool],
) -> Iterator[tuple[Ask, Generated]]:
    """Yields every ask with its choice, as many at a time as fit; as `generate`, whose errors it raises too."""
    waiting = _Peeking(asks)
    while not stop():
        tally = room.tally()
        batch: list[Ask] = []
        while (ask := waiting.peek(bool(batch))) is not None and (not batch or tally.fits(ask.row, ask.room)):
            tally.add(ask.row, ask.room)
            batch.append(waiting.take())
        if not batch:
            return
        failed: OutOfRoom | None = None
        try:
            outputs = choose(model, batch, memory, build, room)
        except OutOfRoom as error:
            error.asks += waiting.held()
            failed = error
        if failed is not None:
            raise failed
        yield from zip(batch, outputs, strict=True)


class _Peeking:
    """The asks, the next one looked at ahead."""

    def __init__(self, asks: Iterator[Ask]) -> None:
        self.asks = asks
        self.next: Ask | None = None

    def peek(self, others: bool) -> Ask | None:
        """The next one; None at the end, and where making it has no room beside others, which go first."""
        if self.next is None:
            try:
                self.next = next(self.asks, None)
            except AskOutOfMemory as error:
                if not others:
                    raise OutOfRoom(0, [], error) from None
        return self.next

    def take(self) -> Ask:
        assert self.next is not None
        taken, self.next = self.next, None
        return taken

    def held(self) -> list[Ask]:
        return [] if self.next is None else [self.next]
