"""Every recipe that `psq recipes` lists is in the battery: in each of its tests that are for all.

What a test is run with is read from the test itself, so one that leaves a recipe out fails here.
"""

import json

import pytest

from battery import test_learns, test_mass, test_not_finite, test_reference, test_refusals
from battery import test_replay as replay
from psq.config.options import run
from psq_worker.cli import psq

EF21 = "test_all_that_ef21s_workers_have_said_is_in_their_memory_and_its_mean_in_the_servers"
PROPERTIES = {
    "conservation of mass": [
        (test_mass, "test_what_workers_meant_is_what_counted_and_what_waits_in_their_residuals"),
        (test_mass, "test_without_feedback_what_is_said_is_what_the_recipe_states"),
        (test_mass, EF21),
    ],
    "replay": [(replay, "test_a_run_repeats_itself_to_the_byte_on_every_kernel_level")],
    "resume": [(replay, "test_a_job_goes_on_from_its_state_and_counters_to_the_byte")],
    "reference": [(test_reference, "test_a_recipe_does_what_its_reference_does")],
    "refusals": [
        (
            test_refusals,
            "test_a_job_that_a_recipe_cannot_do_is_refused_in_words_and_others_are_not",
        )
    ],
    "learning": [(test_learns, "test_a_recipe_learns_and_its_essential_part_is_needed")],
    "not finite": [
        (test_not_finite, "test_a_gradient_that_is_not_finite_enters_nothing_that_lasts"),
        (test_not_finite, "test_a_server_refuses_payloads_that_say_something_not_finite"),
    ],
}


@pytest.fixture(scope="module")
def listed():
    """What `psq recipes --json` says, psq's own: other packages' recipes are theirs to test."""
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("click.echo", lambda text="", **_: printed.append(text))
        with pytest.raises(SystemExit) as ended:
            run(psq, "psq", ["recipes", "--json"])
    assert ended.value.code == 0
    found = json.loads("\n".join(printed))
    return {each["name"] for each in found if not each.get("package")}


def runs_of(module, name):
    """What a test is run with, by the names of its arguments: a list of maps."""
    found = []
    for mark in getattr(getattr(module, name), "pytestmark", ()):
        names, values = mark.args
        names = [names] if isinstance(names, str) else names
        rows = [[value] if len(names) == 1 else value for value in values]
        found += [dict(zip(names, row, strict=True)) for row in rows if "name" in names]
    return found


def recipes_of(tests):
    return {row["name"] for module, name in tests for row in runs_of(module, name)}


@pytest.mark.parametrize("what", PROPERTIES)
def test_every_recipe_that_is_listed_is_tested_for(what, listed):
    tested = recipes_of(PROPERTIES[what])
    if (test_mass, EF21) in PROPERTIES[what]:
        tested.add("ef21")  # a test of its own: its memory takes the residual's place
    assert tested == listed
    assert len(listed) >= 25


def test_every_recipe_is_held_to_its_reference_with_one_worker_and_with_several(listed):
    [(module, name)] = PROPERTIES["reference"]
    worlds = {each: set() for each in listed}
    for row in runs_of(module, name):
        worlds[row["name"]].add(row["workers"])
    assert all({1, 3} <= workers for workers in worlds.values())


def test_what_is_not_resumed_to_the_byte_is_named_with_its_reason(listed):
    assert replay.APART.keys() <= listed
    assert all(len(reason) > 20 for reason in replay.APART.values())
