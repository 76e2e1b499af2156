"""psq.plan: equal plans are equal bytes, others are told apart in words or refused."""

import tracemalloc

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psq.errors import ConfigError, RemotePlanError
from psq.groups import DEFAULT_GROUP, MAX_GROUPS, Group
from psq.plan import Plan
from psq.presets import PRESETS, preset
from psq_proto.messages import MAX_PAYLOAD_BYTES

TENSORS = [("conv.weight", (8, 1, 3, 3)), ("conv.bias", (8,)), ("fc.weight", (10, 8))]


MODEL = [("w", (700_000,)), ("b", (40, 10))]


def plan(tensors=TENSORS, recipe="server-adam", world_size=2, **job):
    return Plan.of(tensors, preset(recipe), world_size, **job)


def test_a_plan_survives_the_wire_with_the_same_digest_and_layout():
    other = Plan.parse(plan().body)
    assert other == plan()
    assert other.digest == plan().digest
    assert other.layout == plan().layout


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (plan(MODEL, servers=2), "servers: the job has 1, it says 2: list all servers"),
        (
            plan(consistency="ssp:2", world_size=3),
            "consistency: the job has bsp, it says ssp:2",
        ),
        (plan(world_size=3), "world_size: the job has 2, it says 3"),
        (
            plan(recipe="fp32"),
            "recipe downlink.codec: the job has 'lloyd-max:bits=3', it says 'fp32'",
        ),
        (
            plan([TENSORS[0], ("conv.bias", (9,)), TENSORS[2]]),
            r"tensor 1: the job has 'conv.bias' \[8\], it says 'conv.bias' \[9\]",
        ),
        (plan(TENSORS[:2]), r"number of tensors: the job has 3, it says 2 .*'fc.weight' \[10, 8\]"),
    ],
)
def test_the_first_difference_is_named(other, words):
    assert plan().digest != other.digest
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(plan().difference(other))


def test_servers_listed_in_another_order_are_named_with_what_to_do():
    first, second = (plan(MODEL, servers=2, server=server) for server in (0, 1))
    assert first.difference(second) == (
        "server: this one is 0 of 2 in the job, it says 1 of 2: "
        "list the servers in the same order in every --connect"
    )


def test_equal_plans_differ_in_nothing():
    assert plan().difference(plan()) == ""
    assert plan(consistency="ssp:2,mads=6.0").difference(plan(consistency="ssp:2,quorum=1")) == ""


DIFFERENCES = st.fixed_dictionaries(
    {},
    optional={
        "world_size": st.integers(1, 3),
        "server": st.integers(0, 2),
        "servers": st.just(3),
        "consistency": st.sampled_from(["bsp", "ssp:2", "ssp:3", "asp", "bsp,quorum=1"]),
        "recipe": st.sampled_from(["fp32", "qadam"]),
        "tensors": st.sampled_from([MODEL, MODEL[:1]]),
    },
)


@given(DIFFERENCES, DIFFERENCES)
def test_plans_of_other_bytes_differ_in_words_and_equal_ones_do_not(one, other):
    first, second = (plan(**({"tensors": MODEL, "servers": 3} | fields)) for fields in (one, other))
    assert bool(first.difference(second)) == (first.body != second.body)
    assert (first.digest == second.digest) == (first.body == second.body)


# ---- several servers


def test_the_servers_of_a_job_own_every_shard_between_them_once():
    plans = [plan(MODEL, servers=3).for_server(server) for server in range(3)]
    owned = [shard for made in plans for shard in made.owned]
    assert sorted(shard.index for shard in owned) == list(range(len(plans[0].layout.shards)))
    for made in plans:
        assert made.owned
        assert [s.index for s in made.owned] == sorted(s.index for s in made.owned)
        assert all(shard is made.layout.shards[shard.index] for shard in made.owned)


def test_a_server_alone_owns_everything():
    assert plan(MODEL).owned == plan(MODEL).layout.shards


def test_the_plan_for_another_server_is_what_that_server_would_make_itself():
    mine = plan(MODEL, servers=3, consistency="ssp:2")
    assert mine.layout  # made before, and shared from then on
    theirs = mine.for_server(2)
    made = plan(MODEL, servers=3, server=2, consistency="ssp:2")
    assert (theirs, theirs.body, theirs.digest) == (made, made.body, made.digest)
    assert theirs.layout is mine.layout
    assert theirs.layout == made.layout
    assert theirs.for_server(0) == mine


def test_each_server_has_its_digest_and_the_job_has_one():
    plans = [plan(MODEL, servers=3, server=server) for server in range(3)]
    assert len({made.digest for made in plans}) == 3
    assert {made.job_digest for made in plans} == {plans[0].digest}
    assert plan(MODEL).job_digest == plan(MODEL).digest


@pytest.mark.parametrize(
    ("job", "words"),
    [
        ({"servers": 0}, r"1\.\.256 servers, numbered from 0; got server 0 of 0"),
        ({"servers": 257}, "got server 0 of 257"),
        ({"servers": 2, "server": 2}, "got server 2 of 2"),
        ({"servers": 2, "server": -1}, "got server -1 of 2"),
        ({"consistency": "soon"}, "consistency must be bsp"),
        ({"consistency": "bsp,quorum=3"}, "a quorum of 3 is more than the 2 workers"),
    ],
)
def test_a_job_that_cannot_be_run_is_refused_at_home(job, words):
    with pytest.raises(ConfigError, match=words):
        plan(**job)
    with pytest.raises(ConfigError, match=r"got server 3 of 1"):
        plan().for_server(3)


def test_a_consistency_is_kept_as_its_canonical_text():
    assert plan(consistency="ssp:07,quorum=1,mads=6").consistency == "ssp:7"


def test_a_model_too_small_for_its_servers_is_refused_when_it_comes():
    with pytest.raises(RemotePlanError, match="too few for 2 servers: start 1 or fewer"):
        Plan.parse(plan(servers=2).body)


def test_a_plan_that_came_keeps_no_shards_before_they_are_wanted():
    body = plan([("w", (1 << 32,))], recipe="qadam-1bit").body
    tracemalloc.start()
    made = Plan.parse(body)
    parsed_bytes, _ = tracemalloc.get_traced_memory()
    assert len(made.layout.shards) == 1 << 12
    cut_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Of freed tuples the interpreter keeps some 200 KB to itself; the shards take far more.
    assert parsed_bytes < 300_000
    assert cut_bytes > 1_000_000


def test_the_bytes_of_a_plan_are_what_they_were():
    """Format 3 to the byte: a change here breaks every worker that meets a server of before."""
    job = plan(MODEL, recipe="fp32", world_size=3, servers=2, server=1, consistency="ssp:2")
    keys = ["format", "world_size", "servers", "server", "consistency"]
    keys += ["recipe", "groups", "tensors"]
    unpacked = msgpack.unpackb(job.body)
    assert list(unpacked) == keys
    assert [unpacked[key] for key in keys[:5]] == [3, 3, 2, 1, "ssp:2"]
    assert unpacked["recipe"]["uplink"] == {
        "codec": "fp32",
        "error_feedback": False,
        "every": 1,
        "choice": {"kind": "fixed", "package": "", "options": {}},
    }
    assert unpacked["groups"] == [["default", 1.0, "", "", True]]
    assert unpacked["tensors"] == [["w", [700_000], 0], ["b", [40, 10], 0]]
    assert f"{job.digest:016x}" == "31b8ee535d3484c4"


def test_a_plan_over_the_message_limit_is_refused_at_home():
    names = [("x" * 1000 + str(i), (1,)) for i in range(1100)]
    with pytest.raises(ConfigError, match=str(MAX_PAYLOAD_BYTES)):
        plan(names)


@pytest.mark.parametrize("world_size", [0, -1, 4097])
def test_a_world_size_out_of_range_is_refused(world_size):
    with pytest.raises(ConfigError, match="world_size"):
        plan(world_size=world_size)


def test_an_unknown_codec_is_refused():
    with pytest.raises(ConfigError):
        Plan.of(TENSORS, preset("qadam").with_codecs(uplink="zip"), 2)


def plain(**changes):
    return msgpack.packb(msgpack.unpackb(plan().body) | changes)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        msgpack.packb([]),
        plan().body + b"\x00",
        plain(format=2),
        plain(format=True),
        plain(format=3.0),
        plain(format=None),
        plain(servers=0),
        plain(servers=257),
        plain(servers=True),
        plain(servers=1.0),
        plain(server=1),
        plain(server=-1),
        plain(server=None),
        plain(consistency="ssp"),
        plain(consistency="ssp:02"),
        plain(consistency="bsp,quorum=3"),
        plain(consistency=b"bsp"),
        plain(consistency=["bsp"]),
        plain(consistency="bsp" * 1000),
        plain(extra=1),
        plain(world_size=2.0),
        plain(world_size=10**9),
        plain(recipe=[]),
        plain(tensors=[["w", [2**41], 0]]),
        plain(tensors=[["w", [2**30, 2**30], 0]]),
        plain(tensors=[["w", [2**40], 0], ["b", [1], 0]]),
        plain(tensors=[["w", [0], 0]]),
        plain(tensors=[["w", [True], 0]]),
        plain(tensors=[["w", [1] * 17, 0]]),
        plain(tensors=[["w"]]),
        plain(tensors=[["w", [1]]]),
        plain(tensors=[["w", [1], 1]]),
        plain(tensors=[["w", [1], -1]]),
        plain(tensors=[["w", [1], False]]),
        plain(groups=[]),
        plain(groups=[["default", 2.0, "", "", True]]),
        plain(groups=[["default", 1, "", "", True]]),
        plain(groups=[["default", 1.0, "", "", True]] * 2),
        plain(groups=[["default", 1.0, "", "", True], ["slow", -1.0, "", "", True]]),
        plain(groups=[["default", 1.0, "", "", True], ["slow", 1.0, "zip", "", True]]),
        plain(tensors=[]),
        plain(tensors=[["w", [1], 0], ["w", [1], 0]]),
        b"\xdd\xff\xff\xff\xff",
        b"\x91" * 5000,
    ],
)
def test_bytes_that_are_no_plan_are_refused(body):
    with pytest.raises(RemotePlanError):
        Plan.parse(body).layout  # noqa: B018 - the property is the act


@given(st.binary(max_size=300))
def test_any_bytes_give_a_plan_error_and_nothing_else(body):
    with pytest.raises(RemotePlanError):
        Plan.parse(body)


def test_a_plan_in_another_byte_form_is_refused():
    shuffled = dict(reversed(list(msgpack.unpackb(plan().body).items())))
    with pytest.raises(RemotePlanError, match="canonical"):
        Plan.parse(msgpack.packb(shuffled))


MUTATIONS = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**64 - 1) | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(plain, path=()):
    """Every place in a plan, as a path of keys and indexes."""
    items = plain.items() if isinstance(plain, dict) else enumerate(plain)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


WITH_PARTS = preset("diloco").with_options(
    "aggregate=kardam", "aggregate.dampening=none", "direction=gradient", "apply.rate=0"
)
BODIES = (
    plan().body,
    plan(recipe="onebit-adam").body,
    plan(recipe="dq-sgd").body,
    plan(groups=(DEFAULT_GROUP, Group("slow", 0.5, "bf16")), members=(0, 1, 0)).body,
    Plan.of(TENSORS, WITH_PARTS, 4).body,
)
PLACES = [(body, path) for body in BODIES for path in places(msgpack.unpackb(body))]


@given(st.sampled_from(PLACES), MUTATIONS)
def test_a_plan_with_anything_in_any_place_is_a_plan_or_refused(place, value):
    whole, path = place
    plain = msgpack.unpackb(whole)
    *way, last = path
    inner = plain
    for key in way:
        inner = inner[key]
    inner[last] = value
    body = msgpack.packb(plain)
    try:
        made = Plan.parse(body)
    except RemotePlanError:
        return
    assert made.body == body
    assert made.owned == made.layout.shards
    for shard in made.owned:
        assert made.uplink_codecs(shard.index)


@given(st.binary(min_size=1, max_size=8), st.data())
def test_damaged_bytes_of_a_plan_are_a_plan_or_refused(patch, data):
    body = bytearray(plan().body)
    at = data.draw(st.integers(0, len(body) - 1))
    body[at : at + len(patch)] = patch
    try:
        made = Plan.parse(bytes(body))
    except RemotePlanError:
        return
    assert made.body == body


@pytest.mark.parametrize("servers", [1, 2])
@pytest.mark.parametrize("every", [1, 3])
def test_each_shard_is_due_once_in_so_many_rounds_and_each_server_moves_some_in_each(
    servers, every
):
    recipe = preset("server-adam").with_rhythm(every=every)
    job = Plan.of([("w", (400_000,))], recipe, 2, servers=servers)
    for server in range(servers):
        plan = job.for_server(server)
        rounds = [plan.due_shards(r) for r in range(7, 7 + every)]
        assert all(rounds)
        assert sorted(k for due in rounds for k in due) == [s.index for s in plan.owned]
        assert max(map(len, rounds)) - min(map(len, rounds)) <= 1
        assert all(job.due(k, 7 + turn) for turn, due in enumerate(rounds) for k in due)


def test_a_shard_keeps_its_weights_until_the_round_that_is_due():
    recipe = preset("server-adam").with_rhythm(every=3)
    plan = Plan.of([("w", (400_000,))], recipe, 2)
    for shard in plan.owned:
        for version in range(10):
            due = plan.due_after(shard.index, version)
            assert version <= due < version + 3
            assert plan.due(shard.index, due)
            assert not any(plan.due(shard.index, r) for r in range(version, due))


def test_a_model_with_too_few_shards_to_take_turns_is_refused_when_it_is_cut():
    recipe = preset("server-adam").with_rhythm(every=5)
    plan = Plan.of([("w", (3 * 8192,))], recipe, 2)
    with pytest.raises(ConfigError, match="every=5 needs as many shards on each server"):
        _ = plan.layout
    with pytest.raises(RemotePlanError, match="every=5 needs as many shards"):
        Plan.parse(plan.body)


@pytest.mark.parametrize("consistency", ["ssp:1", "asp"])
def test_shards_take_turns_only_where_nothing_is_stale(consistency):
    recipe = preset("server-adam").with_rhythm(every=2)
    with pytest.raises(ConfigError, match="every=2 needs bsp"):
        Plan.of([("w", (400_000,))], recipe, 2, consistency=consistency)
    Plan.of([("w", (400_000,))], recipe, 2, consistency="bsp,quorum=1")


def test_weights_are_not_sent_by_a_codec_that_leaves_most_of_them_out():
    recipe = preset("server-adam").with_codecs(downlink="weights:topk:k=4,block=1024")
    with pytest.raises(ConfigError, match=r"would make all but a few weights zero.*delta:topk"):
        Plan.of([("w", (5000,))], recipe, 2)
    Plan.of([("w", (5000,))], recipe.with_codecs(downlink="delta:topk:k=4,block=1024"), 2)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_shards_turns_are_the_rounds_that_have_moved_it(every):
    recipe = preset("qadam-1bit").with_rhythm(every=every)
    plan = Plan.of([("a", (200_000,))], recipe, 2)
    for shard in plan.layout.shards:
        for version in range(8):
            moved = sum(plan.due(shard.index, round_) for round_ in range(version))
            assert plan.turns(shard.index, version) == moved


# ---- groups

SLOW = Group("slow", lr=0.1, uplink="bf16", downlink="log:k=2")
OWN = Group("own", pushed=False)
GROUPED = [("a", (20_000,)), ("b", (30_000,)), ("c", (9_000,)), ("d", (5,))]


def grouped(groups=(DEFAULT_GROUP, SLOW, OWN), members=(0, 1, 0, 2), **job):
    return plan(GROUPED, groups=groups, members=members, **job)


def test_a_shard_has_the_codecs_and_the_rate_of_its_group():
    job = grouped()
    groups = [job.group_of(shard.index) for shard in job.layout.shards]
    assert groups == [DEFAULT_GROUP, SLOW, OWN]
    assert [job.rate_of(shard) for shard in range(3)] == [1.0, 0.1, 1.0]
    assert [job.uplink_codecs(shard) for shard in range(3)] == [
        ("lloyd-max:bits=4,block=256",),
        ("bf16",),
        ("lloyd-max:bits=4,block=256",),
    ]
    assert job.downlink_codecs(1) == ("log:k=2",)
    assert job.downlink_codecs(0) == ("lloyd-max:bits=3",)
    assert [job.pushes(shard) for shard in range(3)] == [True, True, False]
    assert job.pushed_shards(5) == (0, 1)
    assert job.due_shards(5) == (0, 1, 2)


def test_groups_survive_the_wire_and_are_part_of_the_digest():
    job = grouped()
    other = Plan.parse(job.body)
    assert other == job
    assert other.layout == job.layout
    digests = {job.digest, plan(GROUPED).digest, grouped(members=(0, 1, 1, 2)).digest}
    assert len(digests) == 3


def test_a_model_without_groups_is_all_of_group_0():
    assert plan().members == (0, 0, 0)
    assert plan() == plan(members=(0, 0, 0))
    assert plan().pushed_shards(0) == plan().due_shards(0)


@pytest.mark.parametrize(
    ("groups", "members", "words"),
    [
        (
            (DEFAULT_GROUP, Group("slow", lr=0.2, uplink="bf16", downlink="log:k=2"), OWN),
            (0, 1, 0, 2),
            "group 1: the job has Group.name='slow', lr=0.1.*it says Group.*lr=0.2",
        ),
        ((DEFAULT_GROUP, SLOW), (0, 1, 0, 0), "group 2: the job has Group.*it says none"),
        (
            (DEFAULT_GROUP, SLOW, OWN),
            (0, 1, 1, 2),
            "group of 'c': the job has 'default', it says 'slow'",
        ),
    ],
)
def test_the_first_difference_between_groups_is_named(groups, members, words):
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(grouped().difference(grouped(groups, members)))


@pytest.mark.parametrize(
    ("job", "words"),
    [
        ({"groups": ()}, "group 0 is .*got no group"),
        ({"groups": (SLOW, OWN)}, "group 0 is .*got Group.name='slow'"),
        ({"groups": (DEFAULT_GROUP, SLOW, SLOW)}, "two groups are called 'slow'"),
        (
            {"groups": (DEFAULT_GROUP, *(Group(f"g{i}") for i in range(MAX_GROUPS)))},
            "up to 64 groups, got 65",
        ),
        ({"members": (0, 1)}, "expected a group for each of 4 parameters, got 2"),
        ({"members": (0, 1, 0, 3)}, r"of group 3, there are groups 0\.\.2"),
        ({"members": (2, 2, 2, 2)}, "no parameter is pushed"),
        ({"groups": (DEFAULT_GROUP, Group("x", uplink="zip")), "members": (0, 1, 0, 0)}, "zip"),
        (
            {"servers": 2},
            "group 'own' that is not pushed needs the whole model on one server, got 2",
        ),
    ],
)
def test_groups_that_no_job_can_have_are_refused(job, words):
    with pytest.raises(ConfigError, match=words):
        grouped(**job)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": ""}, "a group's name has"),
        ({"lr": -0.1}, "lr must be 0"),
        ({"lr": float("nan")}, "lr must be 0"),
        ({"lr": True}, "lr must be 0"),
        ({"uplink": 3}, "name and codecs are texts"),
        ({"pushed": 1}, "pushed is true or false"),
    ],
)
def test_a_group_that_makes_no_sense_is_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        Group(**({"name": "x"} | settings))


# ---- what a recipe needs of a job


def family(*texts, recipe="sign-majority"):
    return preset(recipe).with_options(*texts)


@pytest.mark.parametrize(
    ("recipe", "job", "words"),
    [
        (
            preset("sign-majority").with_codecs(uplink="log:k=2"),
            {},
            "aggregate=majority reads sign only, the uplink may be in log:k=2",
        ),
        (
            preset("sign-majority"),
            {"groups": (DEFAULT_GROUP, Group("x", uplink="bf16")), "members": (0, 1, 0)},
            "aggregate=majority reads sign only, the uplink may be in bf16",
        ),
        (
            family("aggregate=krum", "aggregate.f=0", recipe="ef-sgd"),
            {"servers": 2},
            "aggregate=krum needs the whole model on one server, got 2 servers",
        ),
        (
            family("aggregate=krum", "aggregate.f=0", recipe="ef-sgd").with_rhythm(every=2),
            {},
            "aggregate=krum needs every shard in every round, got every=2",
        ),
        (
            preset("onebit-adam"),
            {"consistency": "ssp:1"},
            "apply=onebit needs bsp, got ssp:1: a late push would be in another unit",
        ),
    ],
)
def test_a_recipe_that_a_job_cannot_run_is_refused_at_home(recipe, job, words):
    with pytest.raises(ConfigError, match=words):
        Plan.of(TENSORS, recipe, 2, **job)


def test_a_part_that_needs_more_workers_is_refused_before_its_plan_defines_a_job():
    krum = family("aggregate=krum", recipe="ef-sgd")
    with pytest.raises(ConfigError, match="krum with f=1 needs 5 workers or more, there are 4"):
        Plan.of(TENSORS, krum, 4)
    plain = msgpack.unpackb(Plan.of(TENSORS, krum, 5).body) | {"world_size": 4}
    with pytest.raises(RemotePlanError, match="krum with f=1 needs 5 workers"):
        Plan.parse(msgpack.packb(plain))


def test_every_codec_of_a_choice_may_come_and_shards_have_room_for_the_longest():
    recipe = preset("ef-sgd").with_options("uplink.choice=first", "downlink.choice=periodic")
    job = Plan.of([("w", (3_000_000,))], recipe, 2)
    assert job.uplink_codecs(0) == ("sign", "fp32")
    assert job.downlink_codecs(0) == ("sign", "uniform:bits=8")
    assert all(4 * shard.numel <= MAX_PAYLOAD_BYTES for shard in job.layout.shards)
    plain = Plan.of([("w", (3_000_000,))], preset("ef-sgd"), 2)
    assert len(plain.layout.shards) < len(job.layout.shards)


@pytest.mark.parametrize("name", PRESETS)
def test_every_recipe_makes_a_plan_that_survives_the_wire(name):
    job = Plan.of(TENSORS, preset(name), 4)
    assert Plan.parse(job.body) == job
