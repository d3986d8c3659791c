"""Continuous batching: who decodes beside whom, when rows leave and enter, and that none of it reaches an answer."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from kvcli.cache.workspace import Workspace
from kvcli.engine.generate import Ask, Generated, OutOfRoom, StopRules, generate
from kvcli.engine.memory import Room
from kvcli.models.wrapper import Model
from tests.engine.asks import Prompted, exact_model, prompted, watch

ENDS = frozenset(range(0, 400, 3))
"""So many end tokens that answers end at very different steps."""


@pytest.fixture(scope="module")
def exact() -> Iterator[Model]:
    with exact_model() as model:
        yield model


@pytest.fixture(scope="module")
def prompts(exact: Model) -> list[Prompted]:
    return prompted(exact, [30, 9, 44, 17, 52, 3, 28, 61, 12, 35, 20, 48, 5, 57])


def tokens(found: list[tuple[Ask, Generated]]) -> dict[object, list[int]]:
    assert len({ask.tag for ask, _ in found}) == len(found)
    return {ask.tag: output.ids for ask, output in found}


def mixed(prompts: list[Prompted], seed: int = 0) -> list[Ask]:
    """Rows of both first-token modes, with all, few, per-head and ragged positions, lengths 1 to 24."""
    rng, asks = random.Random(seed), []
    for i, one in enumerate(prompts):
        n, given = len(one.ids), one.first if i % 3 == 0 else None
        end = n - 1 if given is None else n

        def some(share: float, end: int = end) -> torch.Tensor:
            return torch.tensor(sorted(rng.sample(range(end), max(1, int(share * end)))))

        kept = [
            [torch.arange(end)] * 3,
            [some(0.3), some(0.7), some(0.5)],
            [torch.stack([some(0.4), some(0.4)]) for _ in range(3)],
            [[some(0.2), some(0.9)], some(0.6), [some(0.5), some(0.1)]],
        ][i % 4]
        rules = StopRules(rng.randint(1, 24), ENDS if i % 2 else frozenset())
        asks.append(one.ask(rules, given=given, kept=kept, tag=i))
    return asks


@pytest.fixture(scope="module")
def alone(exact: Model, prompts: list[Prompted]) -> dict[object, list[int]]:
    """Every row of `mixed` in a batch of its own."""
    return {ask.tag: next(generate(exact, [ask]))[1].ids for ask in mixed(prompts)}


@pytest.mark.parametrize("room", [None, 1, 2, 3, 5, 8])
@pytest.mark.parametrize("steady", [False, True])
def test_every_row_answers_as_alone(
    exact: Model, prompts: list[Prompted], alone: dict[object, list[int]], room: int | None, steady: bool
) -> None:
    assert len({len(ids) for ids in alone.values()}) > 6
    memory = Workspace()
    for seed in range(3):
        asks = mixed(prompts)
        random.Random(seed).shuffle(asks)
        assert tokens(list(generate(exact, asks, room=Room(None, room), memory=memory, steady=steady))) == alone


def test_a_batch_in_bytes_holds_many_short_rows_or_few_long_ones(
    exact: Model, prompts: list[Prompted], alone: dict[object, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watch(exact, monkeypatch)
    slot = 3 * 2 * (16 + 16) * 8
    room = Room(200 * slot)
    assert tokens(list(generate(exact, mixed(prompts), room=room))) == alone
    assert len(set(seen.rows)) > 2
    for rows, slots in zip(seen.rows, seen.slots, strict=True):
        assert rows == 1 or rows * sum(slots) * slot // 3 <= room.bytes  # type: ignore[operator]


def test_finished_rows_leave_and_waiting_rows_enter_once_half_have_ended(
    exact: Model, prompts: list[Prompted], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand. Room for four: two end at once, so two enter; then nobody waits, and the last two go on alone."""
    seen = watch(exact, monkeypatch)
    asks = [one.ask(new, tag=i) for i, (one, new) in enumerate(zip(prompts, (1, 1, 4, 4, 4, 4), strict=False))]
    found = list(generate(exact, asks, room=Room(None, 4)))
    assert seen.rows == [4, 4, 4, 4, 2]
    assert [ask.tag for ask, _ in found] == [0, 1, 2, 3, 4, 5]
    seen.rows.clear()
    asks = [one.ask(new, tag=i) for i, (one, new) in enumerate(zip(prompts, (6, 1, 6, 6, 2, 2), strict=False))]
    found = list(generate(exact, asks, room=Room(None, 4)))
    assert seen.rows == [4, 4, 4, 4, 4, 4, 2, 2]  # one of four is not half: the others wait
    assert [ask.tag for ask, _ in found] == [1, 0, 2, 3, 4, 5]


def test_steady_batches_take_all_rows_and_keep_their_shape(
    exact: Model, prompts: list[Prompted], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watch(exact, monkeypatch)
    asks = [one.ask(new, tag=i) for i, (one, new) in enumerate(zip(prompts, (1, 1, 9, 2, 3, 1), strict=False))]
    found = list(generate(exact, asks, room=Room(None, 2), steady=True))
    assert seen.rows == [6] * 9
    assert len({tuple(slots) for slots in seen.slots}) == 1
    assert [ask.tag for ask, _ in found] == [0, 1, 5, 3, 4, 2]


def test_waiting_rows_are_made_when_they_are_about_to_enter(exact: Model, prompts: list[Prompted]) -> None:
    """Selections of rows that wait would hold memory."""
    made: list[int] = []

    def asks() -> Iterator[Ask]:
        for i, one in enumerate(prompts):
            made.append(i)
            yield one.ask(5, tag=i)

    ended = 0
    for _ in generate(exact, asks(), room=Room(None, 3)):
        ended += 1
        assert len(made) <= ended + 3 + 3 + 1
    assert ended == len(prompts)


@pytest.mark.parametrize("after", [1, 2, 7])
def test_stop_ends_within_one_step(
    exact: Model, prompts: list[Prompted], monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    seen, asked = watch(exact, monkeypatch), 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked >= after

    asks = [one.ask(2 + i, tag=i) for i, one in enumerate(prompts)]
    found = list(generate(exact, asks, room=Room(None, 4), stop=stop))
    assert len(seen.rows) == after - 1
    assert [ask.tag for ask, _ in found] == [i for i in range(4) if 2 + i <= after - 1]
    assert all(output.finish == "length" for _, output in found)


def test_rows_that_end_with_the_prefills_token_take_no_step(
    exact: Model, prompts: list[Prompted], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watch(exact, monkeypatch)
    asks = [one.ask(1, given=one.first, tag=i) for i, one in enumerate(prompts)]
    found = list(generate(exact, asks, room=Room(None, 3)))
    assert seen.rows == []
    assert [(ask.tag, output.ids, output.finish) for ask, output in found] == [
        (i, [one.first], "length") for i, one in enumerate(prompts)
    ]
    ended = prompts[0].ask(StopRules(9, frozenset({prompts[0].first})), given=prompts[0].first)
    ((_, output),) = generate(exact, [ended])
    assert (output.ids, output.finish, seen.rows) == ([prompts[0].first], "eos", [])
    assert list(generate(exact, [])) == []


def test_an_end_token_a_stop_string_and_the_length_end_a_row(exact: Model, prompts: list[Prompted]) -> None:
    one, tokenizer = prompts[2], exact.tokenizer
    ((_, whole),) = generate(exact, [one.ask(12)])
    assert (whole.finish, len(whole.ids)) == ("length", 12)
    at = next(i for i in range(3, 12) if whole.ids[i] not in whole.ids[:i])
    ((_, ended),) = generate(exact, [one.ask(StopRules(12, frozenset({whole.ids[at]})))])
    assert (ended.finish, ended.ids) == ("eos", whole.ids[: at + 1])
    words = [tokenizer.decode([token]) for token in whole.ids]
    stop = f"{words[at - 1]} {words[at]}"
    ((_, cut),) = generate(exact, [one.ask(StopRules(12, until=("never there", stop)))])
    assert (cut.finish, cut.ids) == ("stop", whole.ids[: at + 1])
    assert cut.text.split() == [w for w in words[: at - 1] if w not in tokenizer.all_special_tokens]


def test_memory_that_ran_out_names_what_has_not_finished(
    exact: Model, prompts: list[Prompted], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of the batch first, in order; a row that was looked at and did not enter is among them."""
    seen = watch(exact, monkeypatch)
    asks = [one.ask(1 if i == 1 else 6, tag=i) for i, one in enumerate(prompts)]
    waiting, found = iter(asks), []
    running = generate(exact, waiting, room=Room(None, 4))
    found.append(next(running))
    seen.most = 3
    with pytest.raises(OutOfRoom) as caught:
        found += list(running)
    assert caught.value.rows == 4
    assert [ask.tag for ask, _ in found] == [1]
    assert [ask.tag for ask in [*caught.value.asks, *waiting]] == [0, *range(2, len(prompts))]
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_another_error_is_not_taken_for_missing_memory(
    exact: Model, prompts: list[Prompted], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(exact, "step", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        list(generate(exact, [prompts[0].ask(3)]))


# What a row of NaN leaves behind. Slots without a pair are read with weight zero, and 0 x NaN is NaN.

NEIGHBOURS = (6, 9, 13)
"""Prompts of 28, 35 and 57 tokens; the first two are read together, the shorter with empty slots."""


@pytest.mark.parametrize("new", [1, 2, 3, 8])
@pytest.mark.parametrize("room", [3, 4, 9])
def test_nan_in_one_row_stays_there(
    exact: Model, prompts: list[Prompted], alone: dict[object, list[int]], new: int, room: int
) -> None:
    """Rows beside it, rows that enter when it has left, and the next batch on the same memory."""
    memory = Workspace()
    truth = {i: next(generate(exact, [prompts[i].ask(7)]))[1].ids for i in NEIGHBOURS}
    bad = [prompts[i].spoiled().ask(new, tag=f"bad {i}") for i in (4, 7)]
    good = [prompts[i].ask(7, tag=i) for i in NEIGHBOURS]
    found = tokens(list(generate(exact, [*bad, *good], room=Room(None, room), memory=memory)))
    assert {i: found[i] for i in NEIGHBOURS} == truth
    assert [len(found[f"bad {i}"]) for i in (4, 7)] == [new, new]
    again = tokens(list(generate(exact, [prompts[i].ask(7, tag=i) for i in NEIGHBOURS], memory=memory)))
    assert again == truth


def test_nan_of_rows_that_ended_without_a_step_stays_there(exact: Model, prompts: list[Prompted]) -> None:
    """The model never ran over their caches, so no logits tell of the NaN in them."""
    truth = {i: next(generate(exact, [prompts[i].ask(7)]))[1].ids for i in NEIGHBOURS}
    bad = [prompts[i].spoiled().ask(1, given=5, tag=f"bad {i}") for i in (4, 7, 13)]
    good = [prompts[i].ask(7, tag=i) for i in NEIGHBOURS]
    memory = Workspace()
    found = tokens(list(generate(exact, [*bad, *good], room=Room(None, 3), memory=memory)))
    assert {i: found[i] for i in NEIGHBOURS} == truth
    list(generate(exact, bad, memory=memory))
    assert tokens(list(generate(exact, good, memory=memory))) == truth
