# ruff: noqa: FBT001, FBT003 - what is said is yes or no
"""A worker that waits for one server says so to the others."""

import pytest

from psq.client import held


class Machine:
    """What `held.tell` asks of a machine, and what it told it."""

    def __init__(self, *, settled: bool) -> None:
        self.settled = settled
        self.is_held = False

    def hold(self, is_held: bool) -> None:
        self.is_held = is_held


def told(waited_s: float, *settled: bool, in_step: bool = False) -> list[bool]:
    machines = [Machine(settled=each) for each in settled]
    held.tell(machines, waited_s, in_step=in_step)
    return [machine.is_held for machine in machines]


def test_who_has_waited_for_a_while_is_held_at_the_servers_that_have_answered():
    assert told(held.HELD_S, True, False, True) == [True, False, True]
    assert told(held.HELD_S - 0.01, True, False) == [False, False]


@pytest.mark.parametrize(("settled", "in_step"), [((True,), False), ((True, False), True)])
def test_nobody_is_held_by_one_server_or_where_all_servers_rounds_are_one_step(settled, in_step):
    assert not any(told(60.0, *settled, in_step=in_step))
