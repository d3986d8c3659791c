"""Decoding of many compressed rows together: finished rows leave, waiting rows enter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from kvcli.cache.kv_cache import CompressedCache
from kvcli.cache.rows import Row
from kvcli.cache.workspace import Workspace
from kvcli.engine.memory import Room, is_out_of_memory

if TYPE_CHECKING:
    from kvcli.models.wrapper import Model

_TAIL = 24
"""Tokens decoded to look for a stop string that ends with the newest token."""


@dataclass(frozen=True)
class StopRules:
    """When a row ends: an end token, a stop string in its text, or its length."""

    max_new_tokens: int
    end_tokens: frozenset[int] = frozenset()
    until: tuple[str, ...] = ()


@dataclass(frozen=True)
class Start:
    """How a row begins: `token` is fed at `position`, then those of `follow`, then the answer begins. `given`: the
    answer's first token, taken from the prefill."""

    token: int
    position: int
    given: int | None = None
    follow: tuple[int, ...] = ()


@dataclass
class Generated:
    """ids: all generated tokens, an end token included. text: decoded, cut before a stop string."""

    ids: list[int] = field(default_factory=list)
    finish: str = ""
    text: str = ""
    alloc: int = 0
    """Bytes of the batch's padded cache per row when the row entered."""
    left_out: bool = False
    """Whether some pairs were held and not read."""
    read: float | None = None
    """16-bit bytes read per generated token, where a method chooses what to read."""
    payload: int | None = None
    """16-bit bytes of the row's pairs at its end; None where every generated token's pair was kept as it is."""
    prompted: int | None = None
    """The same when the whole prompt was in the cache, where its question was fed behind a context."""
    loglikelihoods: list[float] = field(default_factory=list)
    """Of the options it was chosen from, in nats; empty where it was generated."""


class Choose(Protocol):
    """How the next token comes out of the logits [V] of step number `step` (0 = the first answer token)."""

    def __call__(self, logits: Tensor, step: int) -> int: ...


@dataclass
class Ask:
    """A row to generate. choose: None takes the most likely token."""

    row: Row
    start: Start
    rules: StopRules
    choose: Choose | None = None
    tag: Any = None
    options: Sequence[Sequence[int]] = ()
    """Continuations to choose from; then nothing is generated."""

    @property
    def room(self) -> int:
        """Tokens that may enter the row's cache."""
        longest = max((len(ids) for ids in self.options), default=self.rules.max_new_tokens)
        return len(self.start.follow) + longest


class OutOfRoom(Exception):
    """Memory ran out with `rows` rows in the batch; `asks` have not finished. asking: it ran out while the next row was
    made, which is asked for again."""

    def __init__(self, rows: int, asks: list[Ask], why: BaseException) -> None:
        super().__init__(f"out of memory with {rows} rows together")
        self.rows, self.asks, self.asking = rows, asks, isinstance(why, AskOutOfMemory)
        self.__cause__ = why.with_traceback(None)  # its frames hold the tensors that did not fit


class AskOutOfMemory(MemoryError):
    """Raised by the iterator of asks where making one needs more memory than there is; it can be asked again."""


Build = Callable[[Sequence[Row], Sequence[int], Workspace], CompressedCache]


def end_tokens(model: Model) -> frozenset[int]:
    """End tokens of the tokenizer and of the model's generation config."""
    found: set[int] = set()
    for value in (model.tokenizer.eos_token_id, getattr(model.hf.generation_config, "eos_token_id", None)):
        if value is not None:
            found.update(value if isinstance(value, list) else [value])
    return frozenset(found)


def generate(
    model: Model,
    asks: Iterable[Ask],
    *,
    room: Room | None = None,
    memory: Workspace | None = None,
    build: Build = CompressedCache,
    steady: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Ask, Generated]]:
    """Yields every ask with its answer as it finishes.

    room: what fits a batch (None: everything). Once half of a batch has ended, the others move together and waiting
    asks enter as far as there is room. steady: the first batch takes all asks, and its rows stay together to the end.
    stop: asked before every step; asks that have not finished then are dropped. Raises OutOfRoom.
    """
    batch = _Batch(model, iter(asks), room or Room(), memory or Workspace(), build, steady)
    try:
        while True:
            batch.refill()
            yield from batch.finished()
            if stop() or not batch.asks:
                return
            if batch.live:
                batch.step()
                yield from batch.finished()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        failed, done = OutOfRoom(len(batch.asks), batch.unfinished(), error), batch.finished()
    del batch
    yield from done
    raise failed


class _Batch:
    """The rows in flight. asks[r], outputs[r], tokens[r], positions[r] belong to row r of the cache; fed[r] tokens of
    `follow` have entered it."""

    def __init__(
        self, model: Model, waiting: Iterator[Ask], room: Room, memory: Workspace, build: Build, steady: bool
    ) -> None:
        self.model, self.waiting, self.room, self.memory, self.build, self.steady = (
            model, waiting, room, memory, build, steady)  # fmt: skip
        self.cache: CompressedCache | None = None
        self.asks: list[Ask] = []
        self.outputs: list[Generated] = []
        self.fed: list[int] = []
        self.live: list[int] = []
        self.next: Ask | None = None
        self.done: list[tuple[Ask, Generated]] = []
        self.tokens = self.positions = torch.empty(0, dtype=torch.long)

    def unfinished(self) -> list[Ask]:
        asks = [self.asks[r] for r in range(len(self.asks)) if not self.outputs[r].finish]
        return asks + ([self.next] if self.next is not None else [])

    def finished(self) -> list[tuple[Ask, Generated]]:
        done, self.done = self.done, []
        return done

    @torch.inference_mode()
    def refill(self) -> None:
        """Lets rows leave and enter once half of the batch has ended."""
        if self.asks and len(self.live) > (0 if self.steady else len(self.asks) // 2):
            return
        keep = list(self.live)
        entering = self._entering([self.asks[r] for r in keep])
        if not entering and len(keep) == len(self.asks):
            return
        asks, outputs = [self.asks[r] for r in keep], [self.outputs[r] for r in keep]
        tokens, positions = self.tokens[keep], self.positions[keep]
        self.fed = [self.fed[r] for r in keep] + [0] * len(entering)
        self.asks = asks + [ask for ask, _ in entering]
        self.outputs = outputs + [output for _, output in entering]
        self.live = list(range(len(self.asks)))
        starts = [ask.start for ask, _ in entering]
        fed = [s.token if s.given is None else s.given for s in starts]
        self.tokens = torch.cat([tokens, torch.tensor(fed, dtype=torch.long)])
        self.positions = torch.cat([positions, torch.tensor([s.position for s in starts], dtype=torch.long)])
        if not self.asks:
            return
        rows, rooms = [ask.row for ask, _ in entering], [ask.room for ask, _ in entering]
        if self.cache is None:
            self.cache = self.build(rows, rooms, self.memory)
        else:
            self.cache.reform(keep, rows, rooms)
        alloc = self.cache.nbytes() // len(self.asks)
        for r in range(len(keep), len(self.asks)):
            self.outputs[r].alloc = alloc

    def _entering(self, staying: list[Ask]) -> list[tuple[Ask, Generated]]:
        """Waiting asks in their order while they fit; one at least where nothing stays. A row that its given token ends
        needs no cache."""
        taken: list[tuple[Ask, Generated]] = []
        tally = self.room.tally()
        for ask in staying:
            tally.add(ask.row, ask.room)
        while (waiting := self._peek(bool(staying or taken))) is not None:
            if not self.steady and tally.rows and not tally.fits(waiting.row, waiting.room):
                break
            self.next = None
            output = Generated()
            if waiting.start.given is not None:
                self._accept(waiting, output, waiting.start.given)
            if output.finish:
                self.done.append((waiting, output))
                continue
            tally.add(waiting.row, waiting.room)
            taken.append((waiting, output))
        return taken

    def _peek(self, others: bool) -> Ask | None:
        """The next waiting ask; None also where making it has no room beside others, which go first."""
        if self.next is None:
            try:
                self.next = next(self.waiting, None)
            except AskOutOfMemory:
                if not others:
                    raise
        return self.next

    @torch.inference_mode()
    def step(self) -> None:
        assert self.cache is not None
        logits = self.model.step(self.tokens[:, None], self.positions[:, None], self.cache)[:, -1]
        moving = torch.zeros_like(self.positions)
        moving[self.live] = 1  # a row that ended stays inside the model's context
        self.tokens, self.positions = logits.argmax(-1).cpu(), self.positions + moving
        answering = [r for r in self.live if not self._follows(r)]
        for r in answering:
            if self.asks[r].start.follow and not self.outputs[r].ids:
                self.outputs[r].prompted = self.cache.payload(r)
            choose = self.asks[r].choose
            if choose is not None:
                self.tokens[r] = choose(logits[r], len(self.outputs[r].ids))
        for r, token in zip(answering, self.tokens[answering].tolist(), strict=True):
            self._accept(self.asks[r], self.outputs[r], token)
        self._leave()

    def _follows(self, r: int) -> bool:
        """Whether the row's next token is one of `follow`, whatever the model expects; it is put in its place."""
        follow, at = self.asks[r].start.follow, self.fed[r]
        if at == len(follow):
            return False
        self.tokens[r], self.fed[r] = follow[at], at + 1
        return True

    def _leave(self) -> None:
        gone = [r for r in self.live if self.outputs[r].finish]
        if gone:
            assert self.cache is not None
            self.live = [r for r in self.live if not self.outputs[r].finish]
            for r in gone:
                self.outputs[r].payload = self.cache.payload(r)
                self.outputs[r].read = self.cache.read_per_token(r)
                self.outputs[r].left_out = self.cache.left_out(r)
                self.done.append((self.asks[r], self.outputs[r]))
            self.cache.release(gone)

    def _accept(self, ask: Ask, out: Generated, token: int) -> None:
        rule, tokenizer = ask.rules, self.model.tokenizer
        out.ids.append(token)
        if token in rule.end_tokens:
            out.finish = "eos"
        elif rule.until and any(stop in tokenizer.decode(out.ids[-_TAIL:]) for stop in rule.until):
            out.finish = "stop"
        elif len(out.ids) >= rule.max_new_tokens:
            out.finish = "length"
        if out.finish:
            out.text = _text(tokenizer, out.ids, rule)


def _text(tokenizer: Any, ids: list[int], rule: StopRules) -> str:
    """Text before the first stop string, then without special tokens."""
    if rule.until:
        text = tokenizer.decode(ids)
        cut = min((text.find(stop) for stop in rule.until if stop in text), default=None)
        if cut is not None:
            return _without_special(tokenizer, text[:cut])
    return tokenizer.decode(ids, skip_special_tokens=True)


def _without_special(tokenizer: Any, text: str) -> str:
    for token in tokenizer.all_special_tokens:
        text = text.replace(token, "")
    return text
