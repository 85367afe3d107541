"""The order of examples: bijections, golden values, and that they look shuffled."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.core.errors import UserError
from mmjax.data import order

SEEDS = st.integers(0, 2**64 - 1)
NAMES = st.text(max_size=8)


def surprise(counts: np.ndarray) -> float:
    """Return how many standard deviations the chi-square of `counts` against uniform is off."""
    expected, cells = counts.mean(), counts.size
    chi_square = ((counts - expected) ** 2 / expected).sum()
    return (chi_square - (cells - 1)) / np.sqrt(2 * (cells - 1))


def epochs_of(n: int, epochs: int, seed: int = 1, task: str = "a") -> np.ndarray:
    """Return [epochs, n]: the permutation of each epoch."""
    index, epoch = np.tile(np.arange(n), (epochs, 1)), np.arange(epochs)[:, None]
    return order.permutation(index, n, seed, task, epoch)


def test_splitmix64_is_the_published_one():
    """First outputs that the reference C code gives for seeds 1234567 and 0."""
    assert order.stream(1234567, 5).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert int(order.stream(0, 1)[0]) == 0xE220A8397B1DCDAF


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5))
def test_mix64_of_integers_and_of_arrays_agree(values):
    mixed = order.mix64(np.array(values, dtype=np.uint64))
    assert mixed.dtype == np.uint64
    assert mixed.tolist() == [order.mix64(value) for value in values]


def test_golden_permutation():
    """A change of these values changes the order of every run that is half done."""
    assert order.permutation(np.arange(10), 10, 0, "image", 0).tolist() == [
        6,
        0,
        2,
        5,
        8,
        7,
        4,
        1,
        9,
        3,
    ]
    assert order.permutation(np.arange(3), 2**40, 7, "video_text", 123).tolist() == [
        321479485990,
        348255187871,
        409286432052,
    ]


def test_golden_ids():
    assert order.example_ids(42, "caption", 95, 10, 100).tolist() == [
        49,
        14,
        91,
        58,
        40,
        74,
        66,
        55,
        37,
        19,
    ]


def test_golden_key():
    assert order.example_key(42, "caption", 95).tolist() == [6088460564165973241, 95]
    generator = order.rng(42, "caption", 95)
    assert generator.bit_generator.random_raw(2).tolist() == [
        1118558297893221391,
        13371965510049535469,
    ]


def plain_permutation(index: int, n: int, key: int) -> int:
    """Return the network in plain integers, one index at a time, with the halves never swapped."""
    bits = (n - 1).bit_length()
    narrow, wide = bits // 2, bits - bits // 2
    while True:
        high, low = index >> wide, index % 2**wide
        for turn in range(12 if bits > 4 else 24):
            key_of_turn = (key + (turn + 1) * 0x9E3779B97F4A7C15) % 2**64
            if turn % 2 == 0:
                high ^= order.mix64(key_of_turn ^ low) % 2**narrow
            else:
                low ^= order.mix64(key_of_turn ^ high) % 2**wide
        index = high << wide | low
        if index < n:
            return index


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2**40), SEEDS, st.integers(0, 2**40), st.data())
def test_permutation_is_a_feistel_network_with_cycle_walking(n, seed, epoch, data):
    index = data.draw(st.integers(0, n - 1))
    key = order.fold(order.fold(seed, 1, order.name_key("a")), epoch)
    assert order.permutation(index, n, seed, "a", epoch) == plain_permutation(index, n, key)


@pytest.mark.parametrize("n", range(1, 70))
def test_small_bijections(n):
    assert sorted(order.permutation(np.arange(n), n, 5, "a", 2).tolist()) == list(range(n))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20_000), SEEDS, NAMES, st.integers(0, 2**40))
def test_bijection(n, seed, task, epoch):
    ids = order.permutation(np.arange(n), n, seed, task, epoch)
    assert ids.dtype == np.int64
    assert np.array_equal(np.sort(ids), np.arange(n))


@settings(max_examples=50, deadline=None)
@given(st.integers(2**30, 2**40), SEEDS, st.data())
def test_no_two_positions_share_an_id_of_a_huge_source(n, seed, data):
    start = data.draw(st.integers(0, n - 1000))
    ids = order.permutation(np.arange(start, start + 1000), n, seed, "a", 0)
    assert ids.min() >= 0 and ids.max() < n
    assert len(np.unique(ids)) == 1000


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), SEEDS, st.integers(0, 5))
def test_each_epoch_visits_each_id_once(n, seed, epoch):
    ids = order.example_ids(seed, "a", epoch * n, 3 * n, n)
    for visited in ids.reshape(3, n):
        assert np.array_equal(np.sort(visited), np.arange(n))


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 200),
    SEEDS,
    st.integers(0, 10**12),
    st.lists(st.integers(0, 90), max_size=6),
    st.booleans(),
)
def test_pieces_of_any_size_are_the_whole(n, seed, position, sizes, shuffle):
    whole = order.example_ids(seed, "a", position, sum(sizes), n, shuffle=shuffle)
    starts = position + np.cumsum([0, *sizes])
    pieces = [
        order.example_ids(seed, "a", int(start), size, n, shuffle=shuffle)
        for start, size in zip(starts, sizes, strict=False)
    ]
    assert np.array_equal(whole, np.concatenate([np.zeros(0, np.int64), *pieces]))


@settings(deadline=None)
@given(st.integers(1, 50), st.integers(0, 10**9))
def test_a_single_index_is_an_int(n, epoch):
    whole = order.permutation(np.arange(n), n, 3, "a", epoch)
    single = [order.permutation(i, n, 3, "a", epoch) for i in range(n)]
    assert all(type(i) is int for i in single)
    assert whole.tolist() == single


def test_epochs_may_be_an_array():
    epochs = np.array([[4], [9]])
    index = np.tile(np.arange(7), (2, 1))
    both = order.permutation(index, 7, 3, "a", epochs)
    assert both.shape == (2, 7)
    for row, epoch in zip(both, (4, 9), strict=True):
        assert np.array_equal(row, order.permutation(np.arange(7), 7, 3, "a", epoch))


def test_in_order_for_evaluation():
    ids = order.example_ids(1, "a", 5, 8, 6, shuffle=False)
    assert ids.dtype == np.int64
    assert ids.tolist() == [5, 0, 1, 2, 3, 4, 5, 0]


def test_one_example():
    assert order.example_ids(1, "a", 10**12, 4, 1).tolist() == [0, 0, 0, 0]


def test_no_ids():
    assert order.example_ids(1, "a", 3, 0, 10).shape == (0,)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
def test_every_order_of_a_few_is_as_likely(n):
    """Over many epochs; a network of 12 half-rounds fails this at n = 5."""
    codes = epochs_of(n, 40_000) @ (n ** np.arange(n))
    orders = sorted(int(np.array(p) @ (n ** np.arange(n))) for p in permutations(range(n)))
    counts = np.bincount(np.searchsorted(orders, codes), minlength=len(orders))
    assert abs(surprise(counts)) < 4


@pytest.mark.parametrize("n", [64, 1000])
def test_ids_are_spread_evenly(n):
    """Where a position lands, what follows what, and where an id is in the next epoch."""
    ids = epochs_of(n, 400) * 16 // n
    position = np.broadcast_to(np.arange(n) * 16 // n, ids.shape)
    for a, b in [(position, ids), (ids[:-1], ids[1:])]:
        table = np.zeros((16, 16))
        np.add.at(table, (a.ravel(), b.ravel()), 1)
        assert abs(surprise(table)) < 5
    steps = np.diff(epochs_of(n, 400), axis=1) % n
    counts = np.bincount(steps.ravel(), minlength=n)[1:]
    assert abs(surprise(counts)) < 5


def test_the_check_of_spread_can_fail():
    """Positive control: epochs that only shift a fixed shuffle do not pass."""
    n = 1000
    once = np.random.default_rng(0).permutation(n)
    shifted = np.stack([np.roll(once, shift) for shift in range(400)])
    counts = np.bincount((np.diff(shifted, axis=1) % n).ravel(), minlength=n)[1:]
    assert surprise(counts) > 50


@pytest.mark.parametrize(
    "other",
    [{"seed": 2}, {"seed": -1}, {"task": "b"}, {"task": "a "}, {"epoch": 1}, {"epoch": 2**40}],
)
def test_seed_task_and_epoch_each_change_the_order(other):
    known = {"seed": 1, "task": "a", "epoch": 0}
    a = order.permutation(np.arange(4096), 4096, **known)
    b = order.permutation(np.arange(4096), 4096, **(known | other))
    assert np.sum(a == b) < 12  # one is expected by chance
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.08  # five standard deviations


def test_keys_differ_by_seed_task_and_position():
    keys = {
        tuple(order.example_key(seed, task, position).tolist())
        for seed in range(5)
        for task in ("a", "b", "ab", "")
        for position in (0, 1, 2, 2**32, 2**50)
    }
    assert len(keys) == 100


def test_generators_of_neighbours_are_unrelated():
    draws = np.stack([order.rng(0, "a", position).random(64) for position in range(200)])
    correlations = np.corrcoef(draws)[~np.eye(200, dtype=bool)]
    assert np.abs(correlations).max() < 0.65
    assert abs(draws.mean() - 0.5) < 0.02
    assert np.array_equal(order.rng(0, "a", 7).random(64), draws[7])


@pytest.mark.parametrize("index", [-1, 10, [0, 10]])
def test_an_index_outside_is_an_error(index):
    with pytest.raises(ValueError, match="outside"):
        order.permutation(index, 10, 0, "a", 0)


@pytest.mark.parametrize(("position", "count"), [(-1, 2), (0, -1), (2**62, 1)])
def test_bad_positions_are_errors(position, count):
    with pytest.raises(ValueError, match="'a'"):
        order.example_ids(0, "a", position, count, 10)
    if position < 0:
        with pytest.raises(ValueError, match="'a'"):
            order.rng(0, "a", position)


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_empty_source_is_named(shuffle):
    with pytest.raises(UserError, match="'caption' has no examples"):
        order.example_ids(0, "caption", 0, 4, 0, shuffle=shuffle)
