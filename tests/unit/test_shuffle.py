"""An epoch's order: the same everywhere, every index once, no pattern that a test can see."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psq.errors import UsageError
from psq.shuffle import MAX_SIZE, Shuffle

U64 = 2**64 - 1


@given(st.integers(0, U64), st.integers(0, U64), st.integers(1, 300))
def test_every_index_comes_once(seed, epoch, size):
    assert sorted(Shuffle(seed, epoch, size).indices(0, size)) == list(range(size))


@given(st.integers(0, U64), st.integers(1, MAX_SIZE), st.data())
def test_a_part_is_what_it_is_in_the_whole(seed, size, data):
    low = data.draw(st.integers(0, size - 1))
    high = min(size, low + 20)
    shuffle = Shuffle(seed, 0, size)
    whole = shuffle.indices(low, high)
    assert whole.min() >= 0
    assert whole.max() < size
    assert len(set(whole)) == high - low
    one_by_one = [shuffle.indices(at, at + 1)[0] for at in range(low, high)]
    assert list(whole) == one_by_one


@pytest.mark.parametrize(
    ("seed", "epoch", "size", "low", "indices"),
    [
        (0, 0, 10, 0, [0, 3, 6, 2, 8, 7, 5, 9, 1, 4]),
        (7, 3, 1000, 0, [713, 277, 381, 308, 68, 432]),
        (
            U64,
            1,
            MAX_SIZE,
            MAX_SIZE - 3,
            [2487698741435464184, 2721305656893219020, 2587781048257995807],
        ),
    ],
)
def test_the_order_is_that_of_the_specification(seed, epoch, size, low, indices):
    assert list(Shuffle(seed, epoch, size).indices(low, low + len(indices))) == indices


def test_it_agrees_with_the_specification_word_by_word():
    def mix(z):
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    seed, epoch, size, gamma = 42, 5, 777, 0x9E3779B97F4A7C15
    state = mix(mix((seed + gamma) % 2**64) + epoch * gamma & U64)
    keys = [mix((state + (k + 1) * gamma) % 2**64) for k in range(8)]
    half = max(1, -(-(size - 1).bit_length() // 2))
    found = []
    for position in range(size):
        at = position
        while True:
            left, right = at >> half, at % 2**half
            for key in keys:
                left, right = right, left ^ mix(right ^ key) % 2**half
            at = (left << half) + right
            if at < size:
                break
        found.append(at)
    assert found == list(Shuffle(seed, epoch, size).indices(0, size))


def test_each_index_is_everywhere_as_often_over_the_seeds():
    size, seeds = 20, 4000
    counts = np.zeros((size, size))
    for seed in range(seeds):
        counts[np.arange(size), Shuffle(seed, 0, size).indices(0, size)] += 1
    expected = seeds / size
    chi = ((counts - expected) ** 2 / expected).sum()
    freedom = (size - 1) ** 2
    assert abs(chi - freedom) < 5 * np.sqrt(2 * freedom)


def test_neighbours_of_one_order_are_not_neighbours_of_the_next():
    size = 10_000
    first, second = (Shuffle(0, epoch, size).indices(0, size) for epoch in range(2))
    places = np.empty(size, np.int64)
    places[second] = np.arange(size)
    near = np.abs(np.diff(places[first])) == 1
    assert near.mean() < 0.002


@pytest.mark.parametrize(
    "given", [(-1, 0, 1), (0, -1, 1), (0, 0, 0), (0, 0, MAX_SIZE + 1), (2**64, 0, 1)]
)
def test_what_is_no_shuffle_is_refused(given):
    with pytest.raises(UsageError, match="a shuffle takes"):
        Shuffle(*given)


@pytest.mark.parametrize("span", [(-1, 2), (3, 2), (0, 11)])
def test_positions_that_are_none_are_refused(span):
    with pytest.raises(UsageError, match="positions of 10"):
        Shuffle(0, 0, 10).indices(*span)
