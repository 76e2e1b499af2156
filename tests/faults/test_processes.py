"""Processes that are killed, alone or together, or stopped and let go on: nobody can tell."""

import random
import signal

import pytest

from faults import FULL
from faults.killer import Tally, disturbed_job
from faults.life import SERVER
from psq.durable.failpoints import NAMES

STEPS = 14
KILLS_STEPS = 160
ENOUGH_KILLS = 200 if FULL else 8
SERVERS = sorted(name for name in NAMES if name.startswith(("commit.", "journal.", "checkpoint.")))
WORKERS = sorted(name for name in NAMES if name.startswith("keeper."))
NEVER = {"keeper.settle", "keeper.store", "journal.prune", "checkpoint.prune", "checkpoint.pruned"}
"""Not reached in a job of few steps that nothing is refused in."""
PAIRS = [
    (server, worker)
    for number, server in enumerate(sorted(set(SERVERS) - NEVER))
    for other, worker in enumerate(sorted(set(WORKERS) - NEVER))
    if FULL or number % 5 == other == number // 5
]


def nth(place):
    """When it is reached, some rounds into a job."""
    if place.startswith("checkpoint.") or place in {"commit.keep", "commit.kept"}:
        return 1
    return 2 if place.startswith("journal.segment") else 5


@pytest.mark.parametrize(("server", "worker"), PAIRS)
def test_a_server_and_a_worker_that_die_at_any_two_places_change_nothing(
    life_of, undisturbed, server, worker
):
    life = life_of("killed", STEPS, options=("--checkpoint-every", "6"))
    life.folder.mkdir()
    life.fill(SERVER, die=f"{server}:{nth(server)}")
    life.fill(0)
    life.fill(1, die=f"{worker}:{nth(worker)}")
    dead = set()
    while dead != {SERVER, 1}:  # either may have to be there again for the other to get there
        place = life.wait_death({SERVER, 1} - dead)
        assert life.programs[place].wait() == -signal.SIGKILL
        dead.add(place)
        life.fill(place)
    assert life.outcome() == undisturbed(STEPS)


@pytest.mark.parametrize("recipe", ["server-adam", "qadam-1bit", "shared-direction"])
def test_kills_at_random_moments_change_nothing(life_of, undisturbed, recipe):
    expected = undisturbed(KILLS_STEPS, recipe)
    life, tally = life_of("killed", KILLS_STEPS, recipe=recipe), Tally()
    rng = random.Random(recipe)  # noqa: S311 - no secret

    def enough():
        return tally.servers + tally.workers >= ENOUGH_KILLS

    disturbed_job(life.start(), rng, tally, enough)
    assert life.outcome() == expected
    assert tally.servers
    assert tally.workers


@pytest.mark.parametrize("recipe", ["server-adam", "shared-direction"])
def test_kills_of_a_server_whose_workers_keep_the_payloads_change_nothing(
    life_of, undisturbed, recipe
):
    expected = undisturbed(KILLS_STEPS, recipe)
    options = ("--durability", "replay", "--checkpoint-every", "20")
    life, tally = life_of("killed", KILLS_STEPS, recipe=recipe, options=options), Tally()
    rng = random.Random(recipe)  # noqa: S311 - no secret

    def enough():
        return tally.servers >= ENOUGH_KILLS

    disturbed_job(life.start(), rng, tally, enough, servers_alone=True)
    assert life.outcome() == expected
    assert tally.servers
    said = "".join(path.read_text() for path in life.folder.glob("server*.err"))
    assert "event=replayed" in said
    assert "event=lost" not in said


@pytest.mark.parametrize("place", [SERVER, 1], ids=["server", "worker"])
def test_a_process_that_is_stopped_and_goes_on_changes_nothing(life_of, undisturbed, place):
    life = life_of("stopped", STEPS, options=("--lease", "0.5")).start()
    for step in (3, 6, 9):
        life.wait_step(0, step)
        life.programs[place].signal(signal.SIGSTOP)
        life.wait_silence(1.5)
        life.programs[place].signal(signal.SIGCONT)
    assert life.outcome() == undisturbed(STEPS)
