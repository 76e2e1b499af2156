"""Jobs of real processes that a test may disturb, and what they come to when nobody does."""

import pytest
from cluster.conftest import FAILED, cluster, pytest_runtest_makereport, zygote

from faults.life import Life
from faults.proxy import Proxy

__all__ = ["cluster", "pytest_runtest_makereport", "zygote"]


@pytest.fixture
def life_of(tmp_path, zygote, request):
    """Make jobs, not started; ended, and shown if the test failed, when it is over."""
    made = []

    def make(name, steps, **given):
        made.append(Life(tmp_path / name, zygote(), steps, **given))
        return made[-1]

    yield make
    for life in made:
        life.end()
    failed = request.node.stash.get(FAILED, False)
    for path in sorted(tmp_path.glob("*/*.err")) if failed else ():
        print(f"---- {path.name}\n{path.read_text()[-3000:]}")  # noqa: T201 - pytest shows it


@pytest.fixture(scope="session")
def undisturbed(zygote, tmp_path_factory):
    """What a job comes to that is left alone; made once for each kind."""
    known = {}

    def outcome(steps, recipe="server-adam"):
        key = steps, recipe
        if key not in known:
            folder = tmp_path_factory.mktemp("undisturbed")
            life = Life(folder, zygote(), steps, recipe=recipe).start()
            known[key] = life.outcome()
            life.end()
        return known[key]

    return outcome


@pytest.fixture
def proxies():
    """Make proxies; closed when the test is over."""
    made = []

    def make(target, **given):
        made.append(Proxy(target, **given))
        return made[-1]

    yield make
    for proxy in made:
        proxy.close()
