"""Which versions are still what they were, after servers of one run began again."""

from __future__ import annotations

import pytest

from psq_proto.messages import NONE
from psq_server.state import Settings
from psq_server.state.keeping import MAX_STARTS, note_start, since
from psq_server.state.world import World

RUN_ID = bytes(16)


def begun(*versions):
    """What the last of these servers knows; the first began anew, each other at a version."""
    starts = ()
    for epoch, version in enumerate(versions, 2):
        world = World(Settings(RUN_ID, epoch), 0.0)
        world.starts, world.version = starts, version
        world.start_version = version
        note_start(world)
        starts = world.starts
    return world


@pytest.mark.parametrize(
    ("versions", "epoch", "expected"),
    [
        ((5,), 1, 5),
        ((5,), 2, NONE),
        ((5,), NONE, NONE),
        ((5, 9), 1, 5),
        ((5, 9), 2, 9),
        ((9, 5), 1, 5),
        ((9, 5), 2, 5),
        ((5, 5), 2, 5),
        ((4, 9, 6), 1, 4),
        ((4, 9, 6), 2, 6),
    ],
)
def test_a_worker_is_told_the_lowest_version_at_which_a_server_began_after_its_epoch(
    versions, epoch, expected
):
    assert since(begun(*versions), epoch) == expected


def test_a_server_of_an_epoch_before_the_workers_is_what_it_was_at_most_up_to_its_start():
    assert since(begun(5), 7) == 5


def test_what_is_kept_of_earlier_starts_is_bounded_and_errs_to_the_safe_side():
    versions = range(10, 10 + 3 * MAX_STARTS)
    world = begun(*versions)
    assert len(world.starts) == MAX_STARTS
    for epoch, version in enumerate(versions, 1):
        assert since(world, epoch) <= version
    assert since(world, 1) == versions[0]
    assert since(world, len(versions)) == versions[-1]
