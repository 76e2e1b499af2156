"""What a recipe cannot honour is refused by name, and what it accepts it honours.

Options, partners and jobs are tried one by one: all of the catalogue, all pairs, all presets. What
ought to be accepted is written here once more, by hand, in the tables.
"""

import itertools
import math

import numpy as np
import pytest

from battery.cases import CASES, RATES, Problem, plan_of, recipe_of
from battery.cluster import Cluster
from psq.adam_config import AdamConfig
from psq.catalogue import CATALOGUE
from psq.errors import ConfigError, UsageError
from psq.feedback import Compressor
from psq.groups import DEFAULT_GROUP, Group
from psq.plan import Plan
from psq.presets import PRESETS, preset
from psq.recipe import Aggregate, Apply, Choice, Direction, Downlink, Recipe, Uplink
from psq.torch.overlap import check_overlap

NAMES = list(PRESETS)
MAKERS = {"direction": Direction, "aggregate": Aggregate, "apply": Apply, "choice": Choice}
PARTS = [(slot, part) for slot, parts in CATALOGUE.items() for part in parts]
IDS = [f"{slot}={part.kind}" for slot, part in PARTS]


def made(slot, part, options=()):
    adam = {"adam": AdamConfig()} if part.adam else {}
    return MAKERS[slot](part.kind, options=tuple(options), **adam)


# ---- options of parts


def wrong_values(option):
    """What an option cannot be: of another kind, or beside its limits."""
    if isinstance(option.default, bool):
        return [1, 0.0, "true", None]
    if isinstance(option.default, str):
        return ["", "no-such", True, 3] if option.choices else ["", "x" * 201, True, 3]
    wrong = ["1", True, None, math.nan, math.inf, -math.inf]
    if isinstance(option.default, int):
        wrong.append(1.5)
    unit = 1 if isinstance(option.default, int) else 1e-6 * max(1.0, abs(option.high or 1.0))
    wrong += [] if option.low is None else [option.low - unit]
    return wrong + ([] if option.high is None else [option.high + unit])


@pytest.mark.parametrize(("slot", "part"), PARTS, ids=IDS)
def test_every_option_out_of_range_is_refused_by_its_name(slot, part):
    for option in part.options:
        made(slot, part, [(option.name, option.default)])
        for value in wrong_values(option):
            with pytest.raises(ConfigError, match=f"^{option.name}: expected"):
                made(slot, part, [(option.name, value)])


@pytest.mark.parametrize(("slot", "part"), PARTS, ids=IDS)
def test_an_option_that_a_part_does_not_have_is_refused_with_those_it_has(slot, part):
    with pytest.raises(ConfigError, match=rf"^{part.kind} has no option 'colour'") as refused:
        made(slot, part, [("colour", 1)])
    assert all(option.name in str(refused.value) for option in part.options)


# ---- options that are accepted do something

BASES = {  # a recipe with the part, and what makes its options matter soon
    ("direction", "momentum"): ("dist-ef-sgdm", "direction.nesterov=false"),
    ("direction", "lion"): ("dist-lion",),
    ("direction", "dithered"): ("sto-sign",),
    ("direction", "gaussian"): ("dp-sign",),
    ("aggregate", "trimmed-mean"): ("fp32-sgd", "aggregate=trimmed-mean"),
    ("aggregate", "krum"): ("fp32-sgd", "aggregate=krum", "aggregate.m=3"),
    ("aggregate", "clip"): ("fp32-sgd", "aggregate=clip"),
    ("aggregate", "kardam"): ("kardam",),
    ("aggregate", "coded"): ("coded",),
    ("apply", "sgd"): ("fp32-sgd", "apply.momentum=0.5", "apply.weight_decay=0.1"),
    ("apply", "onebit"): ("onebit-adam", "uplink.choice.steps=2"),
    ("apply", "shared"): ("shared-direction", "uplink.choice.first=2"),
    ("choice", "first"): ("onebit-adam",),
    ("choice", "periodic"): ("shared-direction", "uplink.choice.first=2"),
    ("choice", "dq"): ("dq-sgd", "uplink.choice.steps=20"),
}
OTHER = {  # not the default
    "f": 0,
    "m": 1,
    "window": 1,
    "replicas": 3,
    "first": 3,
    "period": 4,
    "least": 4,
    "most": 3,
    "codec": "bf16",
    "floor": 1.0,
    "rate": 0.5,
    "momentum": 0.25,
    "weight_decay": 0.25,
    "clip": 0.5,
    "sigma": 0.25,
    "b": 0.5,
    "bits": 3.0,
    "contraction": 0.5,
    ("clip", "norm"): 0.5,
    ("dq", "norm"): "l2",
    ("sgd", "dampening"): 0.5,
    ("first", "steps"): 3,
    ("dq", "steps"): 6,
}
LATE_ONLY = {
    ("kardam", "dampening"),
    ("kardam", "noise"),
}  # of messages that are late; see tests/unit/rules/robust
OPTIONS = [
    (slot, part, option)
    for slot, part in PARTS
    for option in part.options
    if (part.kind, option.name) not in LATE_ONLY
]


def another_value(part, option):
    if isinstance(option.default, bool):
        return not option.default
    return OTHER.get((part.kind, option.name), OTHER.get(option.name, 0.5))


def wire_of(base, options):
    """All that six workers and their server say in some rounds."""
    plan = plan_of(preset(base).with_options(*options), 6 // (1 + (base == "coded")))
    problem = Problem(plan.layout.numel, plan.data_world_size)
    cluster = Cluster(plan, problem.x, problem.gradient)
    for lr in RATES[:9]:
        cluster.step(lr)
    return cluster.wire.hexdigest()


@pytest.mark.parametrize(
    ("slot", "part", "option"),
    OPTIONS,
    ids=[f"{slot}={part.kind}.{option.name}" for slot, part, option in OPTIONS],
)
def test_an_option_that_is_accepted_changes_what_is_said(slot, part, option):
    base, *given = BASES[slot, part.kind]
    place = f"{'uplink.choice' if slot == 'choice' else slot}.{option.name}="
    value = another_value(part, option)
    others = [text for text in given if not text.startswith(place)]
    assert f"{place}{value}" not in given
    assert wire_of(base, given) != wire_of(
        base, [*others, f"{place}{value}".replace("True", "true")]
    )


# ---- partners

SAYS = {
    "gradient": "gradient",
    "adam": "update",
    "momentum": "gradient",
    "lion": "vote",
    "omd": "update",
    "ef21": "gradient",
    "dithered": "gradient",
    "gaussian": "gradient",
    "onebit": "gradient",
    "shared": "gradient",
}
ANY = {"gradient", "update", "vote"}
AGGREGATES = {
    "mean": ANY,
    "majority": {"gradient", "vote"},
    "median": ANY,
    "trimmed-mean": ANY,
    "krum": ANY,
    "clip": ANY,
    "kardam": {"gradient"},
    "coded": ANY,
}
APPLIES = {
    "add": {"update"},
    "adam": {"gradient"},
    "sgd": {"gradient", "vote"},
    "ef21": {"gradient"},
    "onebit": {"gradient"},
    "shared": {"gradient"},
    "return": {"gradient"},
}
TOGETHER = {"ef21", "onebit", "shared"}  # a direction and an apply of one name, or neither
ON_THE_SERVER = {"ef21"}
EVERYWHERE = {"onebit", "shared", "return"}
CHOICES = {
    "onebit": Choice("first", (("steps", 2),)),
    "shared": Choice("periodic", (("first", 2), ("period", 4))),
}


def fits(direction, aggregate, apply, downlink):
    """Whether these parts make a recipe."""
    said = SAYS[direction]
    taken = "vote" if aggregate == "majority" else said
    if said not in AGGREGATES[aggregate] or taken not in APPLIES[apply]:
        return False
    if (direction in TOGETHER or apply in TOGETHER) and direction != apply:
        return False
    if apply == "ef21" and aggregate != "mean":
        return False
    return apply not in (EVERYWHERE if downlink != "mean" else ON_THE_SERVER)


def composed(direction, aggregate, apply, downlink):
    """A recipe of these parts, in signs, with no feedback."""
    adam = AdamConfig()
    parts = {slot: {p.kind: p for p in parts} for slot, parts in CATALOGUE.items()}
    choice = CHOICES.get(apply, Choice())
    return Recipe(
        "composed",
        Direction(direction, adam if parts["direction"][direction].adam else None),
        Uplink("sign", error_feedback=False, choice=choice),
        Apply(apply, adam if parts["apply"][apply].adam else None),
        Downlink(
            downlink, "sign", downlink != "weights", choice if downlink != "weights" else Choice()
        ),
        Aggregate(aggregate),
    )


def test_the_tables_here_are_of_all_parts():
    for slot, table in (("direction", SAYS), ("aggregate", AGGREGATES), ("apply", APPLIES)):
        assert set(table) == {part.kind for part in CATALOGUE[slot]}


@pytest.mark.parametrize("direction", SAYS)
def test_parts_whose_meanings_do_not_fit_are_refused_and_the_others_run(direction):
    refused = 0
    for rest in itertools.product(AGGREGATES, APPLIES, ("weights", "delta", "mean")):
        if not fits(direction, *rest):
            refused += 1
            with pytest.raises(ConfigError) as error:
                composed(direction, *rest)
            named = [direction, *rest, "message", "codec", "downlink", "choice"]
            assert any(word in str(error.value) for word in named), str(error.value)
            continue
        recipe = composed(direction, *rest)
        if direction == "gaussian" and rest[0] == "coded":
            with pytest.raises(ConfigError, match="secret makes replicas differ"):
                Plan.of([("w", (600,))], recipe, 6)
            continue
        plan = Plan.of([("w", (600,))], recipe, 6)
        problem = Problem(plan.layout.numel, plan.data_world_size)
        cluster = Cluster(plan, problem.x, problem.gradient)
        for _ in range(4):
            cluster.step(0.01)
        moved = [state.tobytes() for state in (cluster.x, problem.x)]
        assert moved[0] != moved[1], (direction, *rest)
        assert len({worker.x.tobytes() for worker in cluster.workers}) == 1
    assert refused > 0


# ---- jobs

NO_FEEDBACK = {
    *("ef21", "sto-sign", "sto-sign-ef", "dp-sign", "sign-majority", "dist-lion", "dq-sgd"),
    *("fp32", "fp32-sgd"),
}
IN_STEP = {"shared-adam", "shared-direction", "onebit-adam"}
VOTES = {"sto-sign", "dp-sign", "sign-majority", "dist-lion"}
WITH_LOCAL_STEPS = {"qadam", "qadam-1bit", "local-adam", "efficient-adam", "diloco"}
WITH_ADAM = {
    *WITH_LOCAL_STEPS,
    *("server-adam", "server-amsgrad", "shared-adam", "shared-direction", "onebit-adam"),
    *("coded", "fp32"),
}
WHOLE = {"kardam"}


def job(name, **changes):
    recipe = recipe_of(name, 4)
    return plan_of(recipe, 4, **changes)


def demand_local_steps(name):
    preset(name).with_rhythm(local_steps=2)


def demand_turns(name):
    recipe = recipe_of(name, 4).with_rhythm(every=2)
    Plan.of([("w", (300_000,))], recipe, 8)


def demand_lateness(name):
    job(name, consistency="ssp:1")


def demand_no_rounds(name):
    job(name, consistency="asp")


def demand_two_servers(name):
    recipe = recipe_of(name, 4)
    Plan.of([("w", (300_000,))], recipe, 8, servers=2)


def demand_another_codec(name):
    plan_of(preset(name).with_codecs(uplink="log:k=2"), 4)


def demand_a_groups_codec(name):
    group = Group("tables", uplink="log:k=2", downlink="log:k=2")
    job(name, groups=(DEFAULT_GROUP, group))


def demand_feedback(name):
    plan_of(preset(name).with_options(uplink={"error_feedback": True}), 4)


def demand_overlap(name):
    check_overlap(preset(name), overlap=True)


def demand_a_bf16_residual(name):
    Compressor(job(name), 0, residual_dtype="bf16")


def demand_adam(name):
    preset(name, AdamConfig(beta=0.8))


def demand_sparse_weights(name):
    plan_of(preset(name).with_codecs(downlink="weights:topk:k=4"), 4)


def demand_odd_groups(name):
    Plan.of([("w", (10,))], recipe_of(name, 4), 7)


def demand_look_ahead(name):
    compressor = Compressor(job(name), 0)
    compressor.look_ahead(0, np.empty(job(name).layout.shards[0].numel, np.float32))


DEMANDS = {  # who refuses it, and in which words
    demand_local_steps: (set(NAMES) - WITH_LOCAL_STEPS, "local_steps=2 needs Adam on the workers"),
    demand_turns: (NO_FEEDBACK | IN_STEP | WHOLE, "every"),
    demand_lateness: (IN_STEP | {"coded"}, "needs bsp, got ssp:1"),
    demand_no_rounds: (IN_STEP | {"coded"}, "needs bsp, got asp"),
    demand_two_servers: (WHOLE | {"coded"}, "one server"),
    demand_another_codec: (VOTES, "aggregate=majority reads sign only"),
    demand_a_groups_codec: (VOTES, "aggregate=majority reads sign only"),
    demand_feedback: (VOTES | {"ef21"}, "set uplink.error_feedback=false"),
    demand_overlap: ({"dp-sign"}, "direction gaussian looks at all gradients"),
    demand_a_bf16_residual: (NO_FEEDBACK, "has no error feedback"),
    demand_adam: (set(NAMES) - WITH_ADAM, "has no Adam"),
    demand_sparse_weights: (set(NAMES), "downlink weights:topk|needs downlink=mean|same choice"),
    demand_odd_groups: ({"coded"}, "7 workers cannot be put into groups of 2"),
    demand_look_ahead: (set(NAMES) - {"dqgan"}, "there is no look-ahead"),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("demand", DEMANDS, ids=lambda demand: demand.__name__)
def test_a_job_that_a_recipe_cannot_do_is_refused_in_words_and_others_are_not(demand, name):
    refusing, words = DEMANDS[demand]
    if name in refusing:
        with pytest.raises((ConfigError, UsageError), match=words):
            demand(name)
    else:
        demand(name)


def test_every_preset_is_refused_something_and_none_is_refused_all():
    assert set(CASES) == set(NAMES)
    for name in NAMES:
        refused = [demand for demand, (names, _) in DEMANDS.items() if name in names]
        assert 0 < len(refused) < len(DEMANDS)
