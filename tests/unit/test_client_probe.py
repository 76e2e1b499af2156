"""What is asked of a server before joining, over TCP and by arithmetic."""

import math
import random
import threading

import numpy as np
import pytest

from psq.client import Client, Hooks, Patience, ask_job, probe_link
from psq.client.probe import _measure
from psq.errors import GaveUpError
from psq.plan import Plan
from psq.presets import preset

HURRY = Patience(give_up_after_s=0.3, heartbeat_s=0.02, report_s=5.0)
CALM = Patience(give_up_after_s=10.0, heartbeat_s=0.02, report_s=5.0)


class Line:
    """A link by its numbers: what a probe takes on it."""

    def __init__(self, round_trip_s: float, up_mbit_s: float, down_mbit_s: float) -> None:
        self.round_trip_s = round_trip_s
        self.up_s, self.down_s = 8e-6 / up_mbit_s, 8e-6 / down_mbit_s
        self.spent_s, self.rng = 0.0, random.Random(1)  # noqa: S311 - a test

    def probe(self, body_bytes: int, back_bytes: int) -> float:
        assert back_bytes <= body_bytes <= 1 << 20
        late_s = self.rng.choice((0.0, 0.0, 0.3)) * self.round_trip_s
        took_s = self.round_trip_s + body_bytes * self.up_s + back_bytes * self.down_s + late_s
        self.spent_s += took_s
        return took_s


@pytest.mark.parametrize("round_trip_s", [0.0001, 0.002, 0.05])
@pytest.mark.parametrize(("up", "down"), [(1, 8), (100, 100), (1000, 40), (25_000, 25_000)])
def test_rates_are_found_on_links_of_all_speeds_without_waiting_for_slow_ones(
    round_trip_s, up, down
):
    line = Line(round_trip_s, up, down)
    rates = _measure(line)
    assert rates.round_trip_s == pytest.approx(round_trip_s)
    assert rates.up_mbit_s == pytest.approx(up, rel=0.1)
    assert rates.down_mbit_s == pytest.approx(down, rel=0.1)
    assert line.spent_s < 4.0


def test_a_real_link_has_finite_rates_and_nobody_is_disturbed(serve):
    server = serve()
    client = join(server.endpoint)
    rates = probe_link(server.endpoint, patience=CALM)
    assert 0.0 < rates.round_trip_s < 1.0
    assert 0.0 < rates.up_mbit_s < math.inf
    assert 0.0 < rates.down_mbit_s < math.inf
    client.begin(0.1)
    client.skip()
    assert client.finish().applied
    client.leave("error")


def test_the_job_of_a_server_is_told(serve):
    server = serve()
    client = join(server.endpoint)
    assert ask_job(server.endpoint, 0, CALM) == client.plan
    client.leave("error")


def test_who_asks_before_there_is_a_job_waits_for_it(serve):
    server = serve()
    told: list[Plan] = []
    asking = threading.Thread(
        target=lambda: told.append(ask_job(server.endpoint, 0, CALM)), daemon=True
    )
    asking.start()
    client = join(server.endpoint)
    asking.join(10.0)
    assert told == [client.plan]
    client.leave("error")


def test_a_server_that_is_not_there_is_named():
    for ask in (lambda a: probe_link(a, patience=HURRY), lambda a: ask_job(a, 1, HURRY)):
        with pytest.raises(GaveUpError, match=r"waiting for server tcp://127\.0\.0\.1:1"):
            ask("tcp://127.0.0.1:1")


def join(endpoint: str) -> Client:
    hooks = Hooks(
        lambda _: np.ones(600, np.float32), lambda *_: None, lambda _: None, lambda _: None
    )
    plan = Plan.of([("w", (600,))], preset("fp32"), 1)
    client = Client(endpoint, plan, 0, hooks, patience=CALM)
    client.join()
    return client
