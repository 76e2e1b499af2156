"""The shadow: the arrays of one moment, whatever moves afterwards."""

import threading

import numpy as np
import pytest

from psq_server.shadow import Shadow


def make(shards=3):
    vectors = {shard: np.full(4, float(shard)) for shard in range(shards)}
    rest = {"aggregate:kept": np.arange(3.0)}
    return vectors, Shadow(vectors, lambda shard: {f"x.{shard}": vectors[shard]}, rest)


def test_it_has_every_array_by_name_in_the_order_in_which_shards_move():
    _, shadow = make()
    assert list(shadow) == ["x.0", "x.1", "x.2", "aggregate:kept"]
    assert len(shadow) == 4


def test_a_shard_that_moves_after_it_was_protected_is_as_it_was():
    vectors, shadow = make()
    shadow.protect(1)
    vectors[1][:] = 99.0
    assert shadow["x.1"].tolist() == [1.0] * 4


def test_everything_can_be_protected_at_once():
    vectors, shadow = make()
    shadow.protect_all()
    for vector in vectors.values():
        vector[:] = 99.0
    assert [shadow[f"x.{shard}"][0] for shard in range(3)] == [0.0, 1.0, 2.0]


def test_an_array_is_given_away_once():
    _, shadow = make()
    assert shadow["x.0"].size == 4
    with pytest.raises(KeyError):
        shadow["x.0"]


def test_what_was_given_away_does_not_move_any_more():
    vectors, shadow = make()
    given = shadow["x.2"]
    vectors[2][:] = 99.0
    assert given.tolist() == [2.0] * 4


def test_a_shard_is_copied_whole_by_whoever_comes_first():
    """Two threads ask for the same shard while its copy is made: they get one copy."""
    made, entered, may_go = [], threading.Event(), threading.Event()

    def piece(shard):
        if threading.current_thread() is not threading.main_thread():
            entered.set()
            assert may_go.wait(10)
            made.append(shard)
        return {"x.0": np.zeros(2)}

    shadow = Shadow([0], piece, {})
    threads = [threading.Thread(target=shadow.protect, args=(0,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert entered.wait(10)
    may_go.set()
    for thread in threads:
        thread.join(10)
    assert made == [0]
