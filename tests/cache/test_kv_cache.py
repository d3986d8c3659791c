"""The compressed cache: what is stored, in which form, and how many bytes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcli.cache.budget import Budget, share_out
from kvcli.cache.kv_cache import CompressedCache
from kvcli.cache.rows import Kept, Row, head_positions, kept_counts, payload_bytes


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    """As the engine runs it: a cache's tensors are written in inference mode only."""
    with torch.inference_mode():
        yield


def dense(
    layers: int = 2, kv_heads: int = 2, n: int = 12, dim: int = 4
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shape = (layers, kv_heads, n, dim)
    return [list(torch.randn(shape, generator=generator)) for _ in range(2)]  # type: ignore[return-value]


FORMS: list[Kept] = [
    [torch.tensor([0, 3, 11])] * 2,
    [torch.tensor([[0, 3, 11], [1, 2, 11]]), torch.tensor([[5, 11], [6, 11]])],
    [[torch.tensor([11]), torch.tensor([0, 1, 2, 11])], torch.arange(12)],
]


def stored(cache: CompressedCache, row: int, layer: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The pairs that a row's head really holds."""
    count = int(cache.layers[layer].slots.filled[row].expand(2)[head])
    return cache.layers[layer]._keys[row, head, :count], cache.layers[layer]._values[row, head, :count]


def assert_holds(cache: CompressedCache, row: int, kept: Kept) -> None:
    keys, values = dense()
    for layer in range(2):
        for head, positions in enumerate(head_positions(kept[layer], 2)):
            k, v = stored(cache, row, layer, head)
            assert torch.equal(k, keys[layer][head, positions])
            assert torch.equal(v, values[layer][head, positions])


def new_pair(rows: int, value: float) -> torch.Tensor:
    return torch.full((rows, 2, 1, 4), value)


@pytest.mark.parametrize("kept", FORMS)
def test_rows_hold_exactly_the_kept_pairs(kept: Kept) -> None:
    keys, values = dense()
    cache = CompressedCache([Row(keys, values, kept), Row(keys, values, [torch.arange(12)] * 2)], room=3)
    assert_holds(cache, 0, kept)
    assert_holds(cache, 1, [torch.arange(12)] * 2)


@pytest.mark.parametrize("kept", FORMS)
def test_new_tokens_see_what_their_row_holds_and_themselves(kept: Kept) -> None:
    keys, values = dense()
    cache = CompressedCache([Row(keys, values, kept), Row(keys, values, [torch.arange(12)] * 2)], room=3)
    for number, layer in enumerate(cache.layers):
        layer.update(new_pair(2, 1.0).expand(2, 2, 3, 4), new_pair(2, 1.0).expand(2, 2, 3, 4))
        visible = cache.visible(number, 3)
        assert visible is not None
        for head, positions in enumerate(head_positions(kept[number], 2)):
            seen = visible[0, head % visible.shape[1]]
            assert seen.sum(-1).tolist() == [len(positions) + i for i in (1, 2, 3)]


@pytest.mark.parametrize("kept", FORMS)
def test_payload_bytes_are_those_of_the_stored_tensors(kept: Kept) -> None:
    """16-bit bytes counted one by one from the tensors that a row alone really holds."""
    keys, values = dense()
    half = [[k.half() for k in keys], [v.half() for v in values]]
    cache = CompressedCache([Row(*half, kept)], room=0)
    real = sum(x.nbytes for layer in range(2) for head in range(2) for x in stored(cache, 0, layer, head))
    assert payload_bytes(kept, [(2, 8), (2, 8)]) == real
    assert sum(map(sum, kept_counts(kept, 2))) * 8 * 2 == real


def test_room_is_preallocated_and_ends_with_an_error() -> None:
    keys, values = dense()
    cache = CompressedCache([Row(keys, values, FORMS[0])], room=2)
    before = cache.layers[0]._keys.data_ptr()
    for i in (1.0, 2.0):
        for layer in cache.layers:
            out, _ = layer.update(new_pair(1, i), new_pair(1, i))
        cache.advance(1)
    assert cache.layers[1]._keys.data_ptr() != before
    assert out[0, 0, -2:].tolist() == [[1.0] * 4, [2.0] * 4]
    assert cache.layers[0].get_seq_length() == 5
    with pytest.raises(RuntimeError, match="no room"):
        cache.layers[0].update(new_pair(1, 3.0), new_pair(1, 3.0))


def test_tokens_can_be_taken_back() -> None:
    keys, values = dense()
    cache = CompressedCache([Row(keys, values, kept) for kept in FORMS], room=2)
    for layer in cache.layers:
        layer.update(new_pair(3, 9.0), new_pair(3, 9.0))
    cache.advance(1)
    cache.advance(-1)
    for row, kept in enumerate(FORMS):
        assert_holds(cache, row, kept)


def test_rows_leave_and_enter_between_any_two_steps() -> None:
    """What stays is what it was, new tokens included; what enters is what it would be in a cache of its own."""
    keys, values = dense()
    cache = CompressedCache([Row(keys, values, kept) for kept in FORMS], room=2)
    for layer in cache.layers:
        layer.update(new_pair(3, 7.0), new_pair(3, 7.0))
    cache.advance(1)
    cache.release([0])
    cache.reform([2], [Row(keys, values, FORMS[1]), Row(keys, values, FORMS[0])], [5, 1])
    assert_holds(cache, 1, FORMS[1])
    assert_holds(cache, 2, FORMS[0])
    for layer, form in enumerate(FORMS[2]):
        for head, positions in enumerate(head_positions(form, 2)):
            k, _ = stored(cache, 0, layer, head)
            assert torch.equal(k[:-1], keys[layer][head, positions])
            assert torch.equal(k[-1], torch.full((4,), 7.0))
    assert cache.layers[0].slots.most == [4 + 2, 3 + 5, 3 + 1]


def test_a_row_that_ended_needs_no_room_and_holds_nobody_back() -> None:
    keys, values = dense()
    cache = CompressedCache([Row(keys, values, FORMS[0]), Row(keys, values, [torch.arange(12)] * 2)], room=[9, 1])
    cache.release([1])
    for _ in range(9):
        for layer in cache.layers:
            layer.update(new_pair(2, 1.0), new_pair(2, 1.0))
        cache.advance(1)
    assert cache.layers[0].get_seq_length() == 12


def test_a_row_is_a_fork_and_leaves_the_dense_cache_alone() -> None:
    keys, values = dense()
    before = [k.clone() for k in keys]
    cache = CompressedCache([Row(keys, values, [torch.arange(12)] * 2)], room=1)
    cache.layers[0].update(torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4))
    cache.layers[0]._keys.zero_()
    assert all(torch.equal(a, b) for a, b in zip(before, keys, strict=True))


@given(st.lists(st.tuples(st.floats(0, 50), st.integers(0, 60)), min_size=1, max_size=12), st.integers(0, 400))
def test_shares_add_up_exactly_and_respect_limits(items: list[tuple[float, int]], total: int) -> None:
    weights, limits = [w for w, _ in items], [limit for _, limit in items]
    parts = share_out(weights, total, limits)
    assert sum(parts) == min(total, sum(limits))
    assert all(0 <= p <= limit for p, limit in zip(parts, limits, strict=True))


@given(st.integers(1, 5000), st.integers(1, 100), st.integers(1, 64), st.integers(0, 8))
def test_protected_tokens_take_at_most_half(n: int, percent: int, window: int, sinks: int) -> None:
    from decimal import Decimal

    budget = Budget.of_ratio(Decimal(percent) / 100, n, 2, 2)
    w, s, flags = budget.protect(window, sinks)
    assert 1 <= budget.per_head <= n
    if not budget.everything:
        assert w + s <= max(1, budget.per_head // 2)
        assert (w < min(window, n) or s < min(sinks, n - min(window, n))) == ("fallback" in flags)


def test_budgets_round_half_up_on_exact_decimals() -> None:
    from decimal import Decimal

    assert Budget.of_ratio(Decimal("0.1"), 1000, 1, 1).per_head == 100
    assert Budget.of_ratio(Decimal("0.5"), 5, 1, 1).per_head == 3
    assert Budget.of_ratio(Decimal("0.7"), 10, 1, 1).per_head == 7
    assert Budget.of_ratio(Decimal("0.001"), 10, 1, 1).per_head == 1
