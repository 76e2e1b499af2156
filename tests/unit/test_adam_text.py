"""Adam's settings as a text: what may be said, and what every mistake is answered with."""

from __future__ import annotations

import dataclasses

import pytest

from psq.adam_text import missing_in_torch, parse_adam, with_adam_text
from psq.errors import ConfigError
from psq.presets import preset
from psq.recipe import AdamConfig, OneMinusPower, Power


def test_every_setting_of_adam_can_be_said():
    text = (
        "beta=0.95, theta=0.99, eps=1e-6, eps_placement=inside, bias_correction=false, "
        "amsgrad=TRUE, weight_decay=0.01, decoupled=false, variance_correction=false"
    )
    changes = parse_adam(text)
    assert set(changes) == {field.name for field in dataclasses.fields(AdamConfig)}
    assert AdamConfig(**changes) == AdamConfig(
        beta=0.95,
        theta=0.99,
        eps=1e-6,
        eps_placement="inside",
        bias_correction=False,
        amsgrad=True,
        weight_decay=0.01,
        decoupled=False,
    )


def test_weights_of_moments_may_be_schedules():
    assert parse_adam("beta=power:0.9:0.5,theta=one-minus-power:0.5:1") == {
        "beta": Power(0.9, 0.5),
        "theta": OneMinusPower(0.5, 1.0),
    }


@pytest.mark.parametrize("name", ["server-adam", "qadam", "fp32"])
def test_a_recipe_takes_them_on_whichever_side_its_moments_live(name):
    recipe = with_adam_text(preset(name), "beta=0.8")
    assert recipe.adam == AdamConfig(beta=0.8)
    assert recipe.uplink == preset(name).uplink


def test_what_is_not_named_stays_as_the_recipe_has_it():
    assert with_adam_text(preset("qadam-1bit"), "beta=0.8").adam.variance_correction
    assert with_adam_text(preset("qadam-1bit"), None) == preset("qadam-1bit")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected NAME=VALUE,NAME=VALUE, got ''"),
        ("0.9", "expected NAME=VALUE,NAME=VALUE, got '0.9'"),
        ("beta=0.9,", "expected NAME=VALUE,NAME=VALUE, got '' in 'beta=0.9,'"),
        ("weight-decay=0.1", "no setting 'weight-decay'; did you mean weight_decay?"),
        ("lr=1", "no setting 'lr'; there are: beta, theta, eps"),
        ("beta=0.9,beta=0.8", "beta is said twice"),
        ("eps=small", "eps: expected a number, got 'small'"),
        ("amsgrad=1", "amsgrad: expected true or false, got '1'"),
        ("eps_placement=above", "expected one of outside, inside, initial, got 'above'"),
        ("beta=power:1", "beta: expected a number, power:VALUE:EXPONENT, one-minus"),
        ("beta=power:0.9:x", "got 'power:0.9:x'"),
        ("beta=power:0.9:1:2", "got 'power:0.9:1:2'"),
        ("beta=linear:0.9:1", "got 'linear:0.9:1'"),
        ("beta=1.5", r"beta must lie in [0, 1)"),
        ("eps=nan", "eps must be > 0, got nan"),
        ("variance_correction=true", "variance_correction is for worker moments"),
    ],
)
def test_a_mistake_is_named(text, words):
    with pytest.raises(ConfigError) as caught:
        with_adam_text(preset("server-adam"), text)
    assert str(caught.value).startswith("adam: ")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("beta=0.5,theta=0.9,eps=1e-6,weight_decay=0.1,decoupled=false,amsgrad=true", ""),
        ("variance_correction=true", ""),
        ("eps_placement=initial", "eps_placement=initial"),
        ("bias_correction=false", "bias_correction=false"),
        ("theta=one-minus-power:0.5:1", "theta=one-minus-power:0.5:1"),
        ("beta=power:0.9:0.5", "beta=power:0.9:0.5"),
    ],
)
def test_what_torch_cannot_do_is_named(text, missing):
    assert missing_in_torch(AdamConfig(**parse_adam(text))) == missing
