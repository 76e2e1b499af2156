"""Whether a worker can go on as the process before it."""

import dataclasses

import pytest

from psq.client.identity import Identity, Welcomed
from psq_proto.messages import NONE, Welcome

RUN = b"r" * 16
WELCOME = Welcome("continue", 4, 10.0, init_wanted=False, world_size=2, has_weights=True)


def misfit(version: int, since: int = NONE, **changes) -> str:
    """What is wrong with an identity at version 6."""
    welcome = dataclasses.replace(WELCOME, since=since, **changes)
    return Welcomed(RUN, version, welcome).misfit(Identity(RUN, 7, resolved=5, version=6, epoch=1))


@pytest.mark.parametrize("since", [NONE, 6, 9])
def test_it_can_where_the_server_still_has_all_that_it_knew(since):
    assert not misfit(9, since)


def test_it_cannot_where_the_server_is_behind_it():
    assert "it is at version 6, the server at 5" in misfit(5)


def test_it_cannot_where_the_server_has_made_anew_what_it_knew():
    assert "has made anew what came after version 5" in misfit(9, 5)


def test_it_cannot_where_the_server_knows_more_of_it():
    assert "the server knows a later contribution" in misfit(9, mode="reset")
