"""Every recipe's server, killed after some rounds: what comes back is what was, byte for byte."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from durable_server import Server, again, begun

from psq.groups import DEFAULT_GROUP, Group
from psq.plan import Plan
from psq.presets import PRESETS, preset
from psq_proto.messages import Verdict
from psq_server.gate import RecordKind
from psq_server.recovery import replay

SPECS = [("table", (70, 60)), ("bias", (40,)), ("head", (10, 30))]
LARGE = [("table", (300, 300)), ("bias", (40,)), ("head", (10, 30))]
GROUPS = (DEFAULT_GROUP, Group("slow", lr=0.5))  # a shard has tensors of one group only
SOON = {
    "shared-adam": ("first=2", "period=4"),
    "shared-direction": ("first=2", "period=4"),
    "onebit-adam": ("steps=3",),
}
ROUNDS = 7
KEPT_AT = 3


def recipe_of(name):
    """A recipe whose kinds of rounds all come soon."""
    changes = [
        f"{way}.choice.{one}" for one in SOON.get(name, ()) for way in ("uplink", "downlink")
    ]
    return preset(name).with_options(*changes)


def plan_of(recipe, world_size=4, specs=SPECS, **job):
    return Plan.of(specs, recipe, world_size, groups=GROUPS, members=[0, 1, 1], **job)


def same(one, other):
    for a, b in zip(one, other, strict=True):
        flat_a, flat_b = flat(a), flat(b)
        differ = {key: (flat_a.get(key), flat_b.get(key)) for key in flat_a.keys() | flat_b.keys()}
        assert {key: pair for key, pair in differ.items() if pair[0] != pair[1]} == {}


def flat(value, path=""):
    """Leaves by where they are, so that a difference is short."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    leaves = {}
    for key, item in pairs:
        nested = isinstance(item, dict | list | tuple)
        leaves |= flat(item, f"{path}.{key}") if nested else {f"{path}.{key}": item}
    return leaves


def play(path, plan, rounds=ROUNDS, **settings):
    """Some rounds, one of them a checkpoint; the server as it is in the end."""
    server, speakers = begun(path, plan, checkpoint_every=KEPT_AT, **settings)
    for version in range(rounds):
        for speaker in speakers:
            speaker.push(version)
        server.settle()
        assert server.version == version + 1, server.state.story()
    return server, speakers


@pytest.mark.parametrize("name", PRESETS)
def test_replayed_rounds_give_the_bytes_that_they_gave(tmp_path, name):
    plan = plan_of(recipe_of(name))
    assert len(plan.owned) > 1
    server, _ = play(tmp_path / "state", plan)
    before = server.everything()
    server.crash()
    came_back = Server(tmp_path / "state", plan)
    assert came_back.found.recovered.rounds == ROUNDS - came_back.found.checkpoint > 0
    same(before, came_back.everything())
    came_back.crash()


COMPOSED = {
    "krum": ("fp32-sgd", ["aggregate=krum", "aggregate.f=1"], {"world_size": 5}),
    "trimmed": ("fp32-sgd", ["aggregate=trimmed-mean", "aggregate.f=1"], {}),
    "clip": ("ef-sgd", ["aggregate=clip", "aggregate.norm=0.5"], {}),
    "kardam of hostile workers": ("kardam", ["aggregate.f=1"], {}),
    "turns": ("server-adam", [], {"every": 2, "specs": LARGE}),
    "two servers": ("qadam-1bit", [], {"servers": 2, "server": 1, "specs": LARGE}),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_so_do_those_of_composed_recipes(tmp_path, name):
    base, changes, job = COMPOSED[name]
    plan = composed(base, changes, job)
    server, _ = play(tmp_path / "state", plan)
    before = server.everything()
    server.crash()
    came_back = Server(tmp_path / "state", plan)
    same(before, came_back.everything())
    came_back.crash()


def composed(base, changes, job):
    recipe, job = recipe_of(base).with_options(*changes), dict(job)
    every = job.pop("every", 1)
    if every > 1:
        recipe = replace(recipe, uplink=replace(recipe.uplink, every=every))
    return plan_of(recipe, **job)


@pytest.mark.parametrize("consistency", ["asp", "ssp:3"])
@pytest.mark.parametrize("name", ["server-adam", "kardam", "ef21"])
def test_so_do_rounds_of_single_contributions(tmp_path, name, consistency):
    plan = plan_of(recipe_of(name), consistency=consistency)
    server, speakers = begun(tmp_path / "state", plan, checkpoint_every=5)
    bases = dict.fromkeys(range(4), 0)
    for turn in (0, 1, 2, 3, 0, 1, 2, 3, 2, 1, 0, 3):
        if bases[turn] in speakers[turn].verdicts:
            continue  # it waits for a verdict
        speakers[turn].push(bases[turn])
        server.settle()
        for rank, speaker in enumerate(speakers):
            bases[rank] = max([bases[rank], *heard_versions(speaker)])
    assert server.version >= (5 if consistency == "asp" else 2)
    before = server.everything()
    server.crash()
    came_back = Server(tmp_path / "state", plan)
    same(before, came_back.everything())
    came_back.crash()


def heard_versions(speaker):
    return [m.header.version for m in speaker.heard if isinstance(m.body, Verdict)]


@pytest.mark.parametrize(
    "name", ["server-adam", "qadam-1bit", "shared-direction", "kardam", "coded"]
)
def test_a_round_that_was_cut_off_is_made_again_with_the_same_bytes(tmp_path, name):
    plan = plan_of(recipe_of(name))
    plain, _ = play(tmp_path / "plain", plan)
    server, speakers = play(tmp_path / "state", plan, 4)
    due = [shard for shard in plan.due_shards(4) if plan.pushes(shard)]
    for speaker in speakers:
        speaker.push(4, due[:1])  # where shards go out one by one, the first one is reduced
    speakers[2].push(4, due[1:])
    server.crash()
    came_back, speakers = again(tmp_path / "state", plan, resolved=3, checkpoint_every=KEPT_AT)
    assert came_back.version == 4
    for version in range(4, ROUNDS):
        for speaker in speakers:
            speaker.push(version)
        came_back.settle()
    told = {"counts", "durations_s"}  # joins and times are of two processes
    one, other = plain.everything(), came_back.everything()
    for captured in (one[2], other[2]):
        captured["world"] = {k: v for k, v in captured["world"].items() if k not in told}
        for member in captured["members"].values():
            del member["took_s"], member["since"]
    same(one, other)
    plain.crash()
    came_back.crash()


def test_rounds_that_a_checkpoint_has_already_are_not_dropped_for_the_one_before_may_need_them():
    kinds = (RecordKind.START, RecordKind.ROUND, RecordKind.CHANGE, RecordKind.SHARD)
    records = [
        SimpleNamespace(number=n, kind=kind, meta={"version": 2, "round": 2}, buffers=())
        for n, kind in enumerate(kinds, start=1)
    ]
    recovered = replay({"world": {"version": 3}}, records, None)
    assert recovered.rounds == 0
    assert recovered.last_number == 3
