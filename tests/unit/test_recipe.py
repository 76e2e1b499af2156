"""psq.recipe: what makes sense round-trips as plain data, the rest is refused with a reason."""

import msgpack
import pytest

from psq.errors import ConfigError
from psq.presets import PRESETS, preset
from psq.recipe import (
    AdamConfig,
    Aggregate,
    Apply,
    Choice,
    Direction,
    Downlink,
    Named,
    OneMinusPower,
    Power,
    Recipe,
    Uplink,
    rate_of,
    register_schedule,
    schedule_value,
)

WITH_ADAM = [name for name in PRESETS if preset(name).adam is not None]
WITHOUT_ADAM = [name for name in PRESETS if name not in WITH_ADAM]


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


@pytest.mark.parametrize("name", WITH_ADAM)
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


# ---- parts with options


def test_options_that_are_not_given_have_their_defaults_and_all_are_sorted():
    direction = Direction("momentum", options=(("nesterov", True),))
    assert direction.options == (
        ("beta", 0.9),
        ("ema", False),
        ("nesterov", True),
        ("weight_decay", 0.0),
    )
    assert direction == Direction("momentum", options=direction.options)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Direction("momentun"), "direction must be one of gradient, adam, momentum"),
        (lambda: Direction("gradient", AdamConfig()), "Adam settings are meaningless here"),
        (lambda: Direction("onebit"), "Adam settings are needed here"),
        (lambda: Direction("momentum", options=(("beta", 1.0),)), "beta: expected a number >= 0"),
        (
            lambda: Direction("momentum", options=(("betta", 0.5),)),
            r"did you mean beta\? there are",
        ),
        (lambda: Aggregate("krum", (("f", True),)), "f: expected a whole number >= 0"),
        (lambda: Aggregate("krum", (("f", 1.0),)), "f: expected a whole number"),
        (lambda: Aggregate("mean", (("f", 1),)), "mean has no option 'f'; it has none"),
        (lambda: Choice("first", (("codec", ""),)), "codec: expected a text"),
        (lambda: Uplink("sign", choice=Choice("dq")), "codec 'sign' has no bits to change"),
        (
            lambda: Downlink("delta", "uniform:bits=4", choice=Choice("dq")),
            "downlink choice=dq is for workers",
        ),
        (
            lambda: Downlink("weights", "fp32", error_feedback=False, choice=Choice("first")),
            "a weights downlink has one codec, got choice=first",
        ),
        (lambda: Downlink("sum", "sign"), "downlink must be one of weights, delta, mean"),
    ],
)
def test_parts_that_cannot_be_are_refused_with_what_there_is(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def recipe_of(**parts):
    usual = {
        "direction": Direction(),
        "uplink": Uplink("sign"),
        "apply": Apply("sgd"),
        "downlink": Downlink("delta", "sign"),
    }
    return Recipe("x", **(usual | parts))


ADAM = AdamConfig()
REFRESH = Choice("periodic")


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (
            {"direction": Direction("lion"), "apply": Apply("adam", ADAM)},
            "apply=adam needs workers that send gradients, direction=lion sends votes",
        ),
        (
            {"direction": Direction("adam", ADAM)},
            r"apply=sgd needs workers that send gradients or votes \(update if rate is set\)",
        ),
        (
            {"aggregate": Aggregate("majority"), "apply": Apply("adam", ADAM)},
            "apply=adam takes gradients, aggregate=majority makes votes",
        ),
        (
            {"direction": Direction("lion"), "aggregate": Aggregate("kardam")},
            "aggregate=kardam needs workers that send gradients, direction=lion sends votes",
        ),
        (
            {"apply": Apply("return")},
            "apply=return runs on every node: it needs downlink=mean, got delta",
        ),
        (
            {
                "direction": Direction("ef21"),
                "apply": Apply("ef21"),
                "downlink": Downlink("mean", "sign"),
            },
            "downlink=mean needs an apply that every node can run, apply=ef21 runs on the server",
        ),
        ({"direction": Direction("ef21")}, "direction=ef21 needs apply=ef21, got apply=sgd"),
        ({"apply": Apply("ef21")}, "apply=ef21 needs direction=ef21, got direction=gradient"),
        (
            {"direction": Direction("ef21"), "apply": Apply("ef21")},
            "direction=ef21 keeps what a codec leaves out by itself",
        ),
        (
            {
                "direction": Direction("shared", ADAM),
                "apply": Apply("shared", ADAM),
                "downlink": Downlink("mean", "sign"),
            },
            "apply=shared needs choice=periodic, got choice=fixed",
        ),
        (
            {
                "direction": Direction("shared", ADAM),
                "apply": Apply("shared", ADAM),
                "uplink": Uplink("sign", choice=REFRESH),
                "downlink": Downlink("mean", "sign"),
            },
            "same choice of codecs both ways, got periodic:codec=uniform:.* up and fixed down",
        ),
        (
            {
                "direction": Direction("shared", ADAM),
                "apply": Apply("shared", AdamConfig(beta=0.5)),
                "uplink": Uplink("sign", choice=REFRESH),
                "downlink": Downlink("mean", "sign", choice=REFRESH),
            },
            "one set of Adam settings, got two",
        ),
        (
            {
                "direction": Direction("shared", ADAM),
                "apply": Apply("shared", ADAM),
                "uplink": Uplink("sign", every=2, choice=REFRESH),
                "downlink": Downlink("mean", "sign", choice=REFRESH),
            },
            "apply=shared moves every shard in every round, got every=2",
        ),
    ],
)
def test_parts_that_do_not_fit_together_are_refused_by_name(parts, words):
    with pytest.raises(ConfigError, match=words):
        recipe_of(**parts)


def test_a_learning_rate_of_its_own_lets_sgd_take_updates():
    outer = Apply("sgd", options=(("rate", 0.7),))
    assert recipe_of(direction=Direction("adam", ADAM), apply=outer).direction.meaning == "update"


def test_a_recipe_is_whole_if_one_of_its_parts_needs_the_whole_round():
    assert recipe_of(aggregate=Aggregate("krum")).whole
    assert not recipe_of(aggregate=Aggregate("median")).whole


def test_the_codecs_of_a_choice_begin_with_the_default():
    assert Choice().codecs("sign") == ("sign",)
    assert Choice("first").codecs("sign") == ("sign", "fp32")
    assert Choice("first").codecs("fp32") == ("fp32", "fp32")  # it has its number all the same
    found = Choice("dq").codecs("uniform:bits=4,stochastic=true,block=256")
    assert found[0] == "uniform:bits=4,stochastic=true,block=256"
    assert "uniform:bits=2,stochastic=true,block=256" in found
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("name", WITHOUT_ADAM)
def test_a_recipe_without_adam_says_so_when_it_is_to_be_set(name):
    assert preset(name).adam is None
    with pytest.raises(ConfigError, match="has no Adam"):
        preset(name).with_adam(eps=1e-3)
    with pytest.raises(ConfigError, match="has no Adam"):
        preset(name, AdamConfig())


@pytest.mark.parametrize("name", ["shared-direction", "onebit-adam"])
def test_adam_settings_of_two_parts_change_together(name):
    changed = preset(name).with_adam(beta=0.5)
    assert changed.direction.adam == changed.apply.adam
    assert changed.direction.adam.beta == 0.5


# ---- with_options


def test_options_change_by_text_and_by_value_alike():
    by_text = preset("ef-sgd").with_options(
        "aggregate=krum", "aggregate.f=2", "uplink.error_feedback=false", "apply.momentum=0.5"
    )
    by_value = preset("ef-sgd").with_options(
        aggregate="krum", uplink={"error_feedback": False}, apply={"momentum": 0.5}
    )
    assert by_text == by_value.with_options(aggregate={"f": 2})
    assert dict(by_text.aggregate.options) == {"f": 2, "m": 1}
    assert not by_text.uplink.error_feedback
    assert by_text.downlink.error_feedback


def test_parts_that_fit_only_together_are_exchanged_together():
    made = preset("server-adam").with_options(
        "direction=shared", "apply=shared", "downlink=mean", "downlink.choice=periodic"
    )
    assert (made.direction.kind, made.apply.kind, made.downlink.kind) == (
        "shared",
        "shared",
        "mean",
    )
    assert made.direction.adam == made.apply.adam == preset("server-adam").adam
    assert made.uplink.choice == made.downlink.choice == Choice("periodic")


def test_a_choice_that_both_ways_share_is_set_by_either():
    made = preset("onebit-adam").with_options("uplink.choice.steps=7")
    assert dict(made.uplink.choice.options)["steps"] == 7
    assert made.downlink.choice == made.uplink.choice


def test_a_part_of_another_kind_begins_with_its_defaults():
    made = preset("dist-ef-sgdm").with_options("direction=lion")
    assert made.direction == Direction("lion")
    moved = preset("diloco").with_options("direction=gradient", "apply.rate=0")
    assert moved.direction == Direction()  # that takes no local steps
    assert preset("ef-sgd").with_options("apply=adam").adam == AdamConfig()
    back = preset("ef-sgd").with_options("downlink=weights", "apply=sgd")
    assert back.downlink == Downlink("weights", "sign", error_feedback=False)
    assert back.with_options("downlink=delta").downlink == Downlink("delta", "sign")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("aggregate.f", "expected SLOT.OPTION=VALUE or SLOT=KIND, got 'aggregate.f'"),
        ("aggregate.f=", "expected SLOT.OPTION=VALUE"),
        ("agregate=krum", r"no place 'agregate'; did you mean aggregate\?"),
        ("uplink.codec=sign", "no place 'uplink.codec'; .*uplink.choice.OPTION"),
        ("aggregate.f=2", r"mean has no option 'f'; it has none"),
        ("apply.momentun=0.5", r"did you mean momentum\? there are: momentum \(a number >= 0"),
        ("apply.momentum=much", "momentum: expected a number >= 0 and <= 1, got 'much'"),
        ("apply.nesterov=yes", "nesterov: expected true or false, got 'yes'"),
        ("uplink.error_feedback=1", "expected true or false, got '1'"),
        ("aggregate=best", "aggregate must be one of mean, majority"),
        ("uplink.choice=dq", "codec 'sign' has no bits to change"),
        ("downlink=mode", "downlink must be one of weights, delta, mean"),
    ],
)
def test_an_option_that_is_none_is_refused_with_what_there_is(text, words):
    with pytest.raises(ConfigError, match=words):
        preset("ef-sgd").with_options(text)


def test_nothing_is_said_twice():
    with pytest.raises(ConfigError, match=r"apply\.momentum is said twice"):
        preset("ef-sgd").with_options("apply.momentum=0.5", apply={"momentum": 0.6})


# ---- schedules of the user's own


def warm(t, steps, top):
    return top * min(1.0, t / steps)


def test_a_users_schedule_travels_by_name_and_numbers():
    register_schedule("test-warm", warm)
    adam = AdamConfig(beta=Named("test-warm", (100, 0.9)))
    recipe = preset("server-adam", adam)
    plain = msgpack.unpackb(msgpack.packb(recipe.to_plain()))
    assert plain["apply"]["adam"]["beta"] == ["named", "test-warm", 100.0, 0.9]
    assert Recipe.from_plain(plain) == recipe
    assert schedule_value(recipe.adam.beta, 50) == 0.45


def test_a_schedule_that_is_not_known_here_is_refused_with_what_to_do():
    plain = preset("server-adam").to_plain()
    plain["apply"]["adam"]["beta"] = ["named", "test-unknown", 1.0]
    words = "no schedule 'test-unknown' here; there are: .*Register it in every process of the job"
    with pytest.raises(ConfigError, match=words):
        Recipe.from_plain(plain)


@pytest.mark.parametrize(
    ("function", "numbers", "words"),
    [
        (lambda t: 1.5 - 1 / t, (), r"beta must lie in \[0, 1\), got 1.0 at t=2"),
        (lambda t: float("nan") if t == 64 else 0.5, (), "is nan at t=64"),
        (lambda t: 1 / (t - 3), (), "beta must lie in|cannot be computed at t=3"),
        (lambda t: 0.5 / t, (1.0,), "cannot be computed at t=1"),
    ],
)
def test_a_users_schedule_that_leaves_its_range_is_refused_before_a_job_starts(
    function, numbers, words
):
    name = f"test-bad-{id(function)}"
    register_schedule(name, function)
    with pytest.raises(ConfigError, match=words):
        AdamConfig(beta=Named(name, numbers))


def test_a_name_has_one_schedule():
    register_schedule("test-once", warm)
    register_schedule("test-once", warm)
    with pytest.raises(ConfigError, match="already"):
        register_schedule("test-once", lambda t: 0.5 / t)
    with pytest.raises(ConfigError, match="already"):
        register_schedule("power", warm)


def test_a_schedule_is_a_learning_rate_of_steps_that_count_from_0():
    rate = rate_of(Power(0.5, 0.5))
    assert [rate(step) for step in (0, 3)] == [0.5, 0.25]


# ---- what a plan may hold


@pytest.mark.parametrize(
    ("slot", "change", "words"),
    [
        ("direction", {"kind": "strange"}, "direction must be one of .*got 'strange'"),
        (
            "aggregate",
            {"kind": "strange", "package": "stranger"},
            "install the package stranger on every machine of the job",
        ),
        ("aggregate", {"package": "stranger"}, "'mean' is of package 'psq' here, the plan has"),
        ("apply", {"options": {}}, r"'sgd' has options \['dampening'.*the plan has \[\]"),
        ("apply", {"options": None}, "not a recipe"),
        ("apply", {"options": [["rate", 1.0]]}, "not a recipe"),
        ("uplink", {"choice": {"kind": "fixed"}}, "not a recipe: KeyError"),
        ("uplink", {"choice": "fixed"}, "not a recipe"),
    ],
)
def test_a_part_that_is_not_here_is_refused_with_what_to_install(slot, change, words):
    plain = preset("ef-sgd").to_plain()
    plain[slot] = plain[slot] | change
    with pytest.raises(ConfigError, match=words):
        Recipe.from_plain(plain)
