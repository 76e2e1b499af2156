"""Back-off, patience and the words of a wait."""

import random

import pytest

from psq.client.waits import Backoff, Patience, Wait, name_ranks
from psq.errors import ConfigError, GaveUpError
from psq_proto.messages import Status


def delays(seed: int, count: int) -> list[float]:
    backoff = Backoff(random.Random(seed))  # noqa: S311 - a test
    return [backoff.next_s() for _ in range(count)]


def test_delays_double_from_a_fifth_of_a_second_to_five_with_jitter():
    plain = [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0]
    for seed in range(20):
        for delay, base in zip(delays(seed, 8), plain, strict=True):
            assert 0.75 * base <= delay <= 1.25 * base


def test_delays_repeat_with_the_seed_and_differ_without():
    assert delays(1, 8) == delays(1, 8)
    assert delays(1, 8) != delays(2, 8)


def test_a_reset_begins_with_the_shortest_delay():
    backoff = Backoff(random.Random(0))  # noqa: S311 - a test
    for _ in range(6):
        backoff.next_s()
    backoff.reset()
    assert backoff.next_s() <= 0.25


def test_a_wait_speaks_every_report_and_not_between():
    wait = Wait(100.0, Patience(report_s=5.0))
    assert wait.check(104.9, "server tcp://a:1") == ""
    assert wait.check(105.0, "server tcp://a:1") == "waiting for server tcp://a:1 for 5 s"
    assert wait.check(109.0, "server tcp://a:1") == ""
    assert (
        wait.check(112.0, "rank 1 (not heard for 3.2 s)")
        == "waiting for rank 1 (not heard for 3.2 s) for 12 s"
    )


def test_a_wait_ends_in_an_error_that_names_it():
    wait = Wait(0.0, Patience(give_up_after_s=7.0))
    with pytest.raises(
        GaveUpError, match=r"gave up after 7 s of waiting for rank 2.*give-up-after"
    ):
        wait.check(7.0, "rank 2")


def test_a_wait_knows_when_it_must_be_asked_again():
    wait = Wait(10.0, Patience(give_up_after_s=7.0, report_s=5.0))
    assert wait.due_s == 15.0
    wait.check(15.0, "x")
    assert wait.due_s == 17.0


@pytest.mark.parametrize("field", ["give_up_after_s", "heartbeat_s", "report_s", "farewell_s"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_patience_is_finite(field, value):
    with pytest.raises(ConfigError, match=field):
        Patience(**{field: value})


@pytest.mark.parametrize(
    ("waiting", "words"),
    [
        ((), ""),
        (((1, 3.21),), "rank 1 (not heard for 3.2 s)"),
        (((1, 0.0), (3, 12.0)), "ranks 1 (not heard for 0.0 s), 3 (not heard for 12.0 s)"),
    ],
)
def test_ranks_are_named(waiting, words):
    assert name_ranks(Status(0, 0, waiting=waiting)) == words


def test_many_ranks_are_counted():
    words = name_ranks(Status(0, 0, waiting=tuple((rank, 1.0) for rank in range(20))))
    assert words.endswith("7 (not heard for 1.0 s) and 12 more")
