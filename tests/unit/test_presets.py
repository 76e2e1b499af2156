"""psq.presets and psq.costs: every recipe can be made, says what is to be known, and its price."""

import re

import pytest

from psq.codec import get_codec
from psq.config import WorkerConfig
from psq.costs import LISTED_STEPS, LISTED_WORKERS, costs_of
from psq.errors import ConfigError
from psq.presets import PRESETS, asked_recipe, find_preset, preset
from psq.recipe import AdamConfig, Choice, Power

FAMILY = (
    *("qadam", "server-adam", "server-amsgrad", "efficient-adam", "shared-direction", "ef-sgd"),
    "shared-adam",
    *("dist-ef-sgdm", "ef21", "sto-sign", "dp-sign", "sign-majority", "dist-lion", "dq-sgd"),
    *("dqgan", "kardam", "coded", "onebit-adam", "diloco", "average"),
)


def test_the_whole_family_is_there():
    assert set(FAMILY) <= set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_recipe_says_whose_it_is_what_it_does_and_when_it_fails(name):
    known = find_preset(name)
    assert known.name == preset(name).name == name
    for text in (known.summary, known.source, known.trap, known.suggested):
        assert text == text.strip()
        assert len(text) > 8 or text == "the yardstick"
    assert known.summary.endswith(".")
    assert not re.search(r"[.!?]", known.trap.replace("0.9", "").replace("e.g.", ""))


def test_adam_s_settings_reach_every_recipe_that_has_adam():
    adam = AdamConfig(beta=0.8, theta=Power(0.99, 0.1))
    for name in PRESETS:
        if preset(name).adam is not None:
            made = preset(name, adam).adam
            assert (made.beta, made.theta) == (adam.beta, adam.theta)


def test_an_unknown_recipe_is_refused_with_what_there_is():
    with pytest.raises(ConfigError, match="no recipe 'adamw'; there are: server-adam, qadam"):
        preset("adamw")


@pytest.mark.parametrize(
    ("name", "bits", "state"),
    [
        ("server-adam", (4.125, 3.03125), (4, 16)),
        ("server-amsgrad", (4.125, 3.03125), (4, 20)),
        ("qadam-1bit", (1.03125, 1.03125), (16, 8)),
        ("local-adam", (1.03125 / 8, 1.03125 / 8), (20, 8)),
        ("fp32", (32, 32), (0, 12)),
        ("dist-ef-sgdm", (1.03125, 1.03125), (8, 8)),
        ("ef21", (1.03125, 1.03125), (4, 12)),
        ("dq-sgd", (4.03125, 8.03125), (0, 4)),
        ("sign-majority", (1.03125, 1.03125), (4, 4)),
    ],
)
def test_what_a_recipe_costs_follows_from_its_codecs_and_rules(name, bits, state):
    costs = costs_of(preset(name))
    assert (costs.up_bits, costs.down_bits) == bits
    assert (costs.worker_bytes, costs.server_bytes) == state


def test_the_bits_of_a_choice_are_those_of_its_steps():
    recipe = preset("ef-sgd").with_options("uplink.choice=first", "uplink.choice.steps=100")
    one, dense = 1 + 32 / 1024, 32.0
    expected = (100 * dense + (LISTED_STEPS - 100) * one) / LISTED_STEPS
    assert costs_of(recipe).up_bits == pytest.approx(expected)
    taking_turns = recipe.with_rhythm(every=4)
    assert costs_of(taking_turns).up_bits == pytest.approx(expected / 4)


def test_state_is_counted_where_the_settings_have_it():
    plain, moving = preset("ef-sgd"), preset("ef-sgd").with_options("apply.momentum=0.9")
    assert costs_of(moving).server_bytes == costs_of(plain).server_bytes + 4
    silent = plain.with_options("uplink.error_feedback=false", "downlink.error_feedback=false")
    assert (costs_of(silent).worker_bytes, costs_of(silent).server_bytes) == (0, 4)


@pytest.mark.parametrize("name", PRESETS)
def test_every_recipe_has_a_price(name):
    costs = costs_of(preset(name))
    assert 0 < costs.up_bits <= 33
    assert 0 < costs.down_bits <= 33
    assert 0 <= costs.worker_bytes <= 20
    copies = 3 * LISTED_WORKERS + 2 if name == "kardam" else 0
    assert 4 <= costs.server_bytes - 4 * copies <= 20


def test_the_one_bit_recipe_with_shared_moments_stays_within_its_budget():
    costs = costs_of(preset("shared-direction"))
    assert costs.up_bits <= 1.4
    assert costs.down_bits <= 1.7


def test_the_finer_one_stays_within_its_budget():
    costs = costs_of(preset("shared-adam"))
    assert costs.up_bits <= 4.2
    assert costs.down_bits <= 1.1


def test_a_name_that_is_nearly_right_is_shown_the_right_one():
    with pytest.raises(ConfigError, match="did you mean qadam-1bit"):
        preset("qadam1bit")


def test_a_recipe_that_needs_more_workers_says_so():
    recipe = preset("ef-sgd").with_options("aggregate=krum", "aggregate.f=2")
    with pytest.raises(ConfigError, match="krum"):
        costs_of(recipe, workers=3)
    costs_of(recipe, workers=7)


def test_a_worker_s_settings_add_up_to_a_recipe():
    told = WorkerConfig(
        recipe="ef-sgd",
        options=["apply=adam", "uplink.choice=first", "uplink.choice.steps=3"],
        adam="beta=0.5",
        uplink="log:k=2",
        every=2,
    )
    recipe = asked_recipe(told)
    assert recipe.apply.kind == "adam"
    assert recipe.adam.beta == 0.5
    assert recipe.uplink.codec == "log:k=2"
    assert recipe.uplink.choice == Choice("first", (("steps", 3),))
    assert recipe.uplink.every == 2
    assert [get_codec(spec).bits for spec in recipe.uplink.choice.codecs("log:k=2")] == [3, 32]


def test_adam_s_settings_for_a_recipe_without_adam_are_refused():
    with pytest.raises(ConfigError, match="adam: recipe 'ef-sgd' has no Adam"):
        asked_recipe(WorkerConfig(recipe="ef-sgd", adam="beta=0.5"))
    with pytest.raises(ConfigError, match="'ef-sgd' has no Adam"):
        asked_recipe(WorkerConfig(recipe="ef-sgd"), AdamConfig())
