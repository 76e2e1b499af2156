"""psq.recipe: what makes sense round-trips as plain data, the rest is refused with a reason."""

import msgpack
import pytest

from psq.errors import ConfigError
from psq.presets import PRESETS, preset
from psq.recipe import (
    AdamConfig,
    Apply,
    Direction,
    Downlink,
    OneMinusPower,
    Power,
    Recipe,
    Uplink,
    schedule_value,
)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_the_wire_unchanged(name):
    recipe = preset(name)
    plain = msgpack.unpackb(msgpack.packb(recipe.to_plain()))
    assert Recipe.from_plain(plain) == recipe


def test_schedules_survive_the_wire():
    adam = AdamConfig(beta=Power(0.9, 0.5), theta=OneMinusPower(0.01, 0.75))
    recipe = preset("server-adam", adam)
    assert Recipe.from_plain(msgpack.unpackb(msgpack.packb(recipe.to_plain()))).adam == adam


def test_schedules_follow_their_formulas():
    assert schedule_value(0.9, 7) == 0.9
    assert schedule_value(Power(0.5, 0.5), 4) == 0.25
    assert schedule_value(OneMinusPower(0.5, 1.0), 10) == 0.95


def test_the_steepest_schedule_is_a_number_at_the_last_step_there_can_be():
    adam = AdamConfig(beta=Power(0.9, 8.0), theta=OneMinusPower(1.0, 8.0))
    assert 0.0 <= schedule_value(adam.beta, 2**64 - 1) < 1.0
    assert schedule_value(adam.theta, 2**64 - 1) <= 1.0


def test_an_unknown_preset_lists_what_exists():
    with pytest.raises(ConfigError, match="server-adam, qadam"):
        preset("adamw")


@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 1.0},
        {"beta": -0.1},
        {"theta": 0.0},
        {"theta": OneMinusPower(1.5, 0.5)},
        {"theta": OneMinusPower(0.5, -1.0)},  # 0 at t=2, negative after
        {"theta": OneMinusPower(0.5, float("inf"))},
        {"beta": Power(0.9, -0.1)},  # over 1 soon
        {"beta": Power(0.9, float("nan"))},
        {"beta": Power(0.9, 1e308)},  # 2**1e308 is no float
        {"eps": 0.0},
        {"eps": float("nan")},
        {"eps_placement": "nowhere"},
        {"weight_decay": -1.0},
        {"variance_correction": True, "amsgrad": True},
        {"variance_correction": True, "bias_correction": False},
        {"variance_correction": True, "beta": Power(0.9, 0.5)},
    ],
)
def test_adam_settings_that_cannot_run_are_refused(settings):
    with pytest.raises(ConfigError):
        AdamConfig(**settings)


def test_a_gradient_cannot_simply_be_added():
    with pytest.raises(ConfigError, match="needs workers that send updates"):
        Recipe("x", Direction(), Uplink("sign"), Apply("add"), Downlink("delta", "sign"))


def test_an_update_cannot_feed_an_adam_step():
    with pytest.raises(ConfigError, match="sends updates"):
        Recipe(
            "x",
            Direction("adam", AdamConfig()),
            Uplink("sign"),
            Apply("adam", AdamConfig()),
            Downlink("delta", "sign"),
        )


def test_weights_have_no_error_feedback():
    with pytest.raises(ConfigError, match="no error feedback"):
        Downlink("weights", "uniform:bits=8")


def test_the_variance_correction_is_refused_on_the_server():
    with pytest.raises(ConfigError, match="is for worker moments"):
        Apply("adam", AdamConfig(variance_correction=True))


@pytest.mark.parametrize("name", PRESETS)
def test_adam_settings_change_on_the_side_where_the_moments_live(name):
    assert preset(name).with_adam(eps=1e-3).adam.eps == 1e-3


def test_an_unknown_adam_setting_is_named():
    with pytest.raises(ConfigError, match="no Adam setting epsilon"):
        preset("qadam").with_adam(epsilon=1e-3)


def test_codecs_can_be_replaced_and_the_downlink_changes_its_kind():
    recipe = preset("qadam").with_codecs(uplink="sign", downlink="delta:sign")
    assert recipe.uplink == Uplink("sign")
    assert recipe.downlink == Downlink("delta", "sign")
    back = recipe.with_codecs(downlink="weights:uniform:bits=8")
    assert back.downlink == Downlink("weights", "uniform:bits=8", error_feedback=False)
    assert recipe.with_codecs(downlink="log:k=2").downlink == Downlink("delta", "log:k=2")


def test_a_downlink_kind_without_a_codec_is_refused():
    with pytest.raises(ConfigError, match="names no codec"):
        preset("qadam").with_codecs(downlink="delta:")


@pytest.mark.parametrize(
    "change",
    [
        {"name": 3},
        {"uplink": None},
        {"uplink": {"codec": "sign", "error_feedback": 1}},
        {"direction": {"kind": "lion", "adam": None}},
        {"aggregate": "median"},
        {"apply": {"kind": "adam", "adam": None}},
    ],
)
def test_plain_data_that_is_no_recipe_is_refused(change):
    with pytest.raises(ConfigError):
        Recipe.from_plain(preset("server-adam").to_plain() | change)


@pytest.mark.parametrize("name", PRESETS)
def test_every_shard_of_a_preset_speaks_in_every_step_and_the_plan_says_so(name):
    assert preset(name).to_plain()["uplink"]["every"] == 1
    assert preset(name).with_codecs(uplink="sign").uplink.every == 1


@pytest.mark.parametrize("every", [0, -1, 1025, 1.0, True, "1", None])
def test_an_uplink_speaks_every_so_many_steps_and_nothing_else(every):
    with pytest.raises(ConfigError, match=r"uplink every must be a whole number 1\.\.1024"):
        Uplink("sign", every=every)
    plain = preset("server-adam").to_plain()
    plain["uplink"]["every"] = every
    with pytest.raises(ConfigError, match="every"):
        Recipe.from_plain(plain)


def test_shards_take_turns_only_where_what_they_do_not_say_can_wait():
    assert preset("server-adam").with_rhythm(every=2).uplink.every == 2
    with pytest.raises(ConfigError, match="every=2 needs error feedback"):
        preset("fp32").with_rhythm(every=2)


def test_a_recipe_without_its_rhythm_is_none():
    plain = preset("server-adam").to_plain()
    del plain["uplink"]["every"]
    with pytest.raises(ConfigError, match="not a recipe: KeyError"):
        Recipe.from_plain(plain)


def test_several_local_steps_need_adam_on_the_workers():
    with pytest.raises(ConfigError, match="local_steps=2 needs Adam on the workers"):
        preset("server-adam").with_rhythm(local_steps=2)
    assert preset("qadam").with_rhythm(local_steps=2).direction.local_steps == 2


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.0, True, "2", None])
def test_a_number_of_local_steps_that_is_none_is_refused(steps):
    plain = preset("qadam").to_plain()
    plain["direction"]["local_steps"] = steps
    with pytest.raises(ConfigError, match=r"local_steps must be a whole number 1\.\.1000"):
        Recipe.from_plain(plain)


def test_local_steps_survive_a_change_of_codecs_and_of_adams_settings():
    changed = preset("local-adam").with_codecs(uplink="sign").with_adam(beta=0.5)
    assert changed.direction.local_steps == 8
    assert changed.with_rhythm().direction.local_steps == 8
    assert changed.adam.beta == 0.5
