"""Whose key may speak for whom, where the JOIN is handled."""

import pytest

from psq.errors import RefusedError
from psq.keys import Authorized, Ranks
from psq_proto.messages import Cookie, Welcome
from psq_server.state import FrameReceived, parse_branches


def key(first, last=None):
    ranks = Ranks(first, first if last is None else last)
    return Authorized(f"key{ranks.text}", str(first) * 40, ranks)


@pytest.fixture
def guarded(cluster):
    """A cluster whose frames come under the keys in `keys`, by connection."""

    class Guarded(cluster):
        keys: dict

        def frame(self, name, frame):
            whose = self.keys.get(name)
            return self.handle(FrameReceived(name, memoryview(bytes(frame)), whose))

    def make(**settings):
        made = Guarded(**settings)
        made.keys = {}
        return made

    return make


def connect(guarded, rank, whose):
    worker = guarded.connect(rank)
    guarded.keys[worker.name] = whose
    return worker


def test_a_key_speaks_for_its_rank(guarded):
    world = guarded()
    assert connect(world, 1, key(1)).join().take(Welcome)


def test_a_key_does_not_speak_for_another_rank_and_learns_nothing(guarded):
    world = guarded()
    worker = connect(world, 0, key(1)).join()
    assert isinstance(worker.errors[0], RefusedError)
    assert "the key 'key1' may speak for rank 1, not for rank 0" in str(worker.errors[0])
    assert not worker.take(Cookie)
    assert not worker.take(Welcome)
    assert world.world.job is None


def test_who_holds_a_rank_is_not_fenced_by_another_ranks_key(guarded):
    world = guarded()
    holder = connect(world, 0, key(0)).join()
    connect(world, 0, key(1)).join()
    assert world.world.members[0].peer == holder.name
    assert not world.logged("fenced")


def test_a_connection_that_goes_on_under_another_key_begins_anew(guarded):
    """A peer names its connection itself, so a name alone is no proof of who it is."""
    world = guarded()
    worker = connect(world, 0, key(0)).join()
    world.keys[worker.name] = key(1)
    worker.beat()
    assert world.world.members[0].peer is None


def test_a_key_whose_ranks_have_changed_must_join_again(guarded):
    world = guarded()
    worker = connect(world, 0, key(0)).join()
    world.keys[worker.name] = key(0, 3)
    worker.beat()
    assert world.world.members[0].peer is None
    assert worker.join().take(Welcome)


def test_an_aggregators_place_takes_a_key_for_all_below_it(guarded):
    world = guarded(branches=parse_branches("0-1"), is_root=True)
    leaf = connect(world, 0, key(0)).join()
    assert "may speak for rank 0, not for ranks 0-1" in str(leaf.errors[0])
    assert connect(world, 0, key(0, 1)).join().take(Welcome)


def test_without_keys_anybody_may_speak_for_any_rank(guarded):
    world = guarded()
    assert connect(world, 1, None).join().take(Welcome)
