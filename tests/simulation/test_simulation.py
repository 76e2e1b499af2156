"""Whole jobs under faults: thousands of seeds, none of which may violate anything.

What a seed is, and what must hold, stand in the package. A seed that fails prints its replay
command; those that once found a mistake of ours stay here by number.
"""

import pytest

from simulation.case import Case
from simulation.run import Simulation, run_seed, run_seeds

SEEDS = 5_000
BLOCK = 250
SET_BACK: dict[str, object] = {
    "durability": "checkpoint",
    "checkpoint_every": 2,
    "copies": 1.0,
    "server_crashes": 2,
    "worker_crashes": 2,
}
HANDED_OUT: dict[str, object] = {
    "data": 12,
    "skips": False,
    "every": 1,
    "durability": "journal",
    "cuts": 2,
    "server_crashes": 1,
    "worker_crashes": 3,
    "min_workers": 1,
}
FOUND: tuple[tuple[int, dict[str, object]], ...] = (
    (3, {"flips": 2, "cuts": 0, "jumps": 0, "stalls": 0, "worker_crashes": 0}),  # a damaged PLAN
    (165, {"servers": 2, "cuts": 4, "takeovers": 1, "keeps": 1.0}),  # no rollback, though said so
    (309, {"takeovers": 1}),  # another process went on in the place of one that was reset
    (300760, {"durability": "journal"}),  # a damaged BYE
    (374, {"takeovers": 1}),  # a shard of a round that was made again
    (312281, {}),  # rounds that only an older checkpoint needs were dropped
    (319704, {}),  # two servers waited in a ring
    (15754, {}),  # weights that a worker went on from were damaged, and never asked for again
    (172, SET_BACK),  # a server that was set back had overtaken a worker
    (17610, {"durability": "checkpoint"}),  # a worker computed from what it was not told of
    (391, SET_BACK),  # likewise, with a quorum
    (12, HANDED_OUT),  # a round in which nobody might speak any more stayed open
    (278, HANDED_OUT),  # data of a rank that was gone, held for what a crash had taken
)
"""What once failed (the choices that a seed stands for have changed since)."""


@pytest.mark.parametrize("start", range(0, SEEDS, BLOCK))
def test_no_seed_violates_anything(start, capsys):
    tally = run_seeds(range(start, start + BLOCK))
    with capsys.disabled():
        print(f"\n  from seed {start}: {tally.text()}", end="")  # noqa: T201 - CI shows it
    assert tally.seeds == BLOCK
    assert all(tally.struck[kind] for kind in ("cuts", "flips", "doubles", "holds", "stalls"))
    assert tally.undisturbed


@pytest.mark.parametrize(("seed", "given"), FOUND)
def test_a_seed_that_once_found_a_mistake_finds_none(seed, given):
    run_seed(Case.of(seed, given, as_at_first=True))


def test_a_seed_is_the_same_story_every_time():
    stories = []
    for _ in range(2):
        simulation = Simulation(Case.of(11))
        simulation.run()
        stories.append((simulation.schedule.events, simulation.schedule.story()))
    assert stories[0] == stories[1]
