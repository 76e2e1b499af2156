"""Networks that delay, cut, spoil, repeat, and hang: a job ends with the bytes of a quiet one."""

import pytest
from cluster.conftest import wait_until

from faults import FULL
from faults.proxy import cut_often, delay, duplicate, flip, hold, nothing

STEPS = 14
RECIPES = ["server-adam", "shared-direction"] if FULL else ["server-adam"]
HARMS = {
    "delays": (delay(0.0, 0.03), 100),
    "cuts": (cut_often(30_000), 3),
    "flipped bits": (flip(16_000), 3),
    "frames that come twice": (duplicate(0.3), 20),
}


class Between:
    """A proxy between the workers and the server of a job."""

    def __init__(self, proxies, harm):
        self._proxies, self._harm = proxies, harm
        self.proxy = None

    def __call__(self, endpoint):
        if self.proxy is None:
            self.proxy = self._proxies(endpoint)
            self.proxy.harm = self._harm
        return self.proxy.endpoint


@pytest.fixture
def disturbed(life_of, proxies):
    """A job with a proxy in between, started."""

    def start(harm, recipe="server-adam", **given):
        between = Between(proxies, harm)
        life = life_of("disturbed", STEPS, recipe=recipe, through=between, **given).start()
        return life, between.proxy

    return start


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", HARMS)
def test_harm_to_what_passes_changes_nothing(disturbed, undisturbed, name, recipe):
    harm, least = HARMS[name]
    life, proxy = disturbed(harm, recipe)
    found = life.outcome()
    assert proxy.struck >= least
    assert found == undisturbed(STEPS, recipe)


@pytest.mark.parametrize(
    "ways",
    [{}, {"up": False}, {"down": False}],
    ids=["both ways", "to the workers", "to the server"],
)
def test_a_connection_that_hangs_and_is_then_lost_changes_nothing(disturbed, undisturbed, ways):
    life, proxy = disturbed(nothing)
    life.wait_step(0, 4)
    proxy.harm = hold(**ways)
    wait_until(lambda: proxy.struck > 2, "something that was held up")
    proxy.harm = nothing
    proxy.cut()
    assert life.outcome() == undisturbed(STEPS)


def test_a_network_that_is_cut_again_and_again_changes_nothing(disturbed, undisturbed):
    life, proxy = disturbed(nothing)
    for step in range(2, STEPS - 2, 2):
        life.wait_step(0, step)
        proxy.cut()
    assert life.outcome() == undisturbed(STEPS)
    assert proxy.struck >= 5
