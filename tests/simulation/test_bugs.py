"""The simulator finds mistakes: each that is planted, within a stated number of seeds."""

import pytest

from simulation.bugs import PLANTED
from simulation.case import Case
from simulation.run import Failure, run_seed

LEAST = 12


def find(planted):
    """The first case in which a planted mistake shows."""
    for seed in range(planted.start, planted.start + planted.seeds):
        case = Case.of(seed, planted.given)
        with planted.plant():
            try:
                run_seed(case)
            except Failure:
                return case
    return None


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_found_and_its_seed_is_clean_without_it(name, capsys):
    case = find(PLANTED[name])
    assert case is not None, f"{PLANTED[name].what}: nothing in {PLANTED[name].seeds} seeds"
    with capsys.disabled():
        print(f"\n  {name}: found with seed {case.seed}", end="")  # noqa: T201 - CI shows it
    run_seed(case)


def test_there_are_enough_of_them():
    assert len(PLANTED) >= LEAST
