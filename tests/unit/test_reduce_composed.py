"""psq_server.reduce where rules do the work: the kernel's bits, and those of every replica."""

import dataclasses

import numpy as np
import pytest

from psq.codec import ShardCodec, get_codec
from psq.errors import UsageError
from psq.groups import DEFAULT_GROUP, Group
from psq.layout import PART_NUMEL
from psq.parts import register
from psq.plan import Plan
from psq.presets import preset
from psq.recipe import Aggregate, Apply, Downlink
from psq.rules import ApplyRule, make_apply
from psq.slots import Part
from psq_server.reduce import Reducer
from psq_server.state import Pushed

SPECS = [("table", (700, 600)), ("bias", (40,)), ("head", (10, 30))]
LR = 1e-2
MEANS = [
    "shared-direction",
    "onebit-adam",
    "average",
    "sign-majority",
    "dist-lion",
]
SOON = {
    "shared-direction": ["uplink.choice.first=2", "uplink.choice.period=4"],
    "onebit-adam": ["uplink.choice.steps=3"],
}


def recipe_of(name):
    """A recipe whose kinds of rounds all come soon."""
    changes = SOON.get(name, [])
    return preset(name).with_options(*changes, *(c.replace("uplink", "downlink") for c in changes))


def make_plan(recipe, world_size=3, specs=SPECS, **job):
    return Plan.of(specs, recipe, world_size, **job)


def values(numel, seed, scale=0.1):
    return np.random.default_rng(seed).normal(0, scale, numel).astype(np.float32)


def started(plan):
    reducer = Reducer(plan)
    x = values(plan.layout.numel, 99)
    for shard in plan.layout.shards:
        mine = x[shard.offset : shard.offset + shard.numel]
        for part, start in enumerate(range(0, shard.numel, PART_NUMEL)):
            reducer.init(shard.index, part, mine[start : start + PART_NUMEL].tobytes())
    return reducer, x


def message(plan, shard, rank, seed, *, codec=0, weight=1, scale=0.1):  # noqa: PLR0913
    """A checked contribution of random values, in one of the shard's codecs."""
    coder = ShardCodec(get_codec(plan.uplink_codecs(shard.index)[codec]), shard)
    payload = bytearray(coder.nbytes)
    coder.encode(values(shard.numel, 1000 * seed + 10 * rank + shard.index, scale), payload)
    return Pushed(rank, memoryview(payload), coder.codec.wire_id, weight)


def marked(plan, t):
    """Which codec a choice has a round in."""
    name = plan.recipe.name
    if name == "shared-direction":
        return int(t <= 2 or t % 4 == 0)
    return int(name == "onebit-adam" and t <= 3)


def round_of(plan, reducer, t, ranks=(0, 1, 2), lr=LR):
    """One round of every shard; returns the answers."""
    return [
        reducer.step(
            shard.index,
            [message(plan, shard, rank, t, codec=marked(plan, t)) for rank in ranks],
            lr,
        )
        for shard in plan.layout.shards
    ]


def decoded(plan, shard, answer):
    out = np.empty(shard.numel, np.float32)
    specs = plan.downlink_codecs(shard.index)
    spec = next(s for s in specs if get_codec(s).wire_id == answer.wire_id)
    ShardCodec(get_codec(spec), shard).decode(answer.body, out)
    return out


class Replica:
    """What a worker does with answers: nothing here knows of the server."""

    def __init__(self, plan, x):
        self.plan, self.x = plan, x.copy()
        self.rule = make_apply(plan.recipe, layout=plan.layout, world_size=plan.world_size)

    def take(self, version, answers, due=None):
        shards = self.plan.layout.shards
        moved = shards if due is None else [shards[index] for index in due]
        for shard, answer in zip(moved, answers, strict=True):
            if answer.kind == "nothing":
                assert answer.body.size == 0
                continue
            assert answer.kind == "mean"
            change, index = decoded(self.plan, shard, answer), shard.index
            x = self.x[shard.offset : shard.offset + shard.numel]
            rate = answer.rate * self.plan.rate_of(index)
            self.rule.advance(index, self.plan.turns(index, version), rate)
            self.rule.write(index, change, x)
            x -= change
            self.rule.rescale(index)


def same_state(reducer, replica):
    theirs = reducer.state_arrays()
    assert theirs["x"].tobytes() == replica.x.tobytes()
    for name, array in replica.rule.state_arrays().items():
        assert theirs[name].tobytes() == array.tobytes(), name


# ---- the kernel and the rules


@pytest.mark.parametrize(
    "name", ["server-adam", "server-amsgrad", "qadam", "qadam-1bit", "efficient-adam", "fp32"]
)
def test_rules_give_the_kernels_bits(name, monkeypatch):
    plan = make_plan(preset(name))
    fused, _ = started(plan)
    composed, _ = started(plan)
    monkeypatch.setattr(composed, "_is_fused", lambda _: False)
    for t in (1, 2, 3):
        ranks = range(t)
        one, other = (round_of(plan, reducer, t, ranks) for reducer in (fused, composed))
        assert [a.body.tobytes() for a in one] == [a.body.tobytes() for a in other]
        for key, array in fused.state_arrays().items():
            assert array.tobytes() == composed.state_arrays()[key].tobytes(), key


def test_only_pushes_that_count_alike_in_one_codec_are_the_kernels(monkeypatch):
    plan = make_plan(preset("server-adam"))
    reducer, _ = started(plan)
    shard, took = plan.layout.shards[0], []
    monkeypatch.setattr(reducer, "_change", lambda *_: took.append("rules"))
    monkeypatch.setattr(reducer, "_move", lambda *_: None)
    monkeypatch.setattr(reducer, "_server_step", lambda *_: took.append("kernel"))
    said = [message(plan, shard, rank, 1) for rank in (0, 1)]
    monkeypatch.setattr("psq_server.reduce.kernels.active", _Nothing)
    reducer.step(0, said, LR)
    reducer.step(0, [said[0], said[1]._replace(weight=2)], LR)
    reducer.step(0, [said[0], said[1]._replace(weight=1.0)], LR)
    assert took == ["kernel", "rules", "kernel"]


class _Nothing:
    def server_step(self, step):
        pass


def test_a_weight_is_how_often_a_contribution_counts():
    plan = make_plan(preset("qadam").with_codecs(uplink="fp32", downlink="weights:fp32"))
    (once, x), (thrice, _) = started(plan), started(plan)
    shard = plan.layout.shards[0]
    a, b = (message(plan, shard, rank, 1) for rank in (0, 1))
    once.step(0, [a, b._replace(weight=3)], None)
    thrice.step(0, [a, b, b, b], None)
    got, wanted = (r.state_arrays()["x"][: shard.numel] for r in (once, thrice))
    np.testing.assert_allclose(got, wanted, atol=1e-6)
    assert not np.array_equal(got, x[: shard.numel])


def test_pushes_of_one_round_may_come_in_different_codecs():
    plan = make_plan(preset("dq-sgd"))
    reducer, x = started(plan)
    shard = plan.layout.shards[0]
    codecs = [ShardCodec(get_codec(spec), shard) for spec in plan.uplink_codecs(0)]
    assert len(codecs) > 2
    said = [message(plan, shard, rank, 1, codec=rank) for rank in (0, 1, 2)]
    total = np.zeros(shard.numel, np.float32)
    for one, codec in zip(said, codecs, strict=False):
        codec.decode_add(one.payload, total)
    reducer.step(0, said, LR)
    wanted = x[: shard.numel] - LR * total / 3
    np.testing.assert_allclose(reducer.state_arrays()["x"][: shard.numel], wanted, atol=1e-6)


def test_a_composed_step_insists_on_a_learning_rate():
    plan = make_plan(preset("ef-sgd"))
    reducer, x = started(plan)
    with pytest.raises(UsageError, match="server's sgd needs a learning rate"):
        round_of(plan, reducer, 1, lr=None)
    assert reducer.state_arrays()["x"].tobytes() == x.tobytes()


@pytest.mark.parametrize("name", ["ef-sgd", "ef21", "sto-sign-ef", "diloco", "dqgan"])
def test_a_composed_delta_moves_the_weights_by_what_was_sent_and_keeps_the_rest(name):
    plan = make_plan(preset(name))
    reducer, x = started(plan)
    apply = make_apply(plan.recipe, layout=plan.layout, world_size=3)
    exact = x.copy()
    for t in (1, 2, 3):
        answers = round_of(plan, reducer, t)
        for shard, answer in zip(plan.layout.shards, answers, strict=True):
            cut = slice(shard.offset, shard.offset + shard.numel)
            change = np.zeros(shard.numel, np.float32)
            for rank in range(3):
                one = message(plan, shard, rank, t)
                codec = ShardCodec(get_codec(plan.uplink_codecs(shard.index)[0]), shard)
                codec.decode_add(one.payload, change)
            change *= np.float32(1 / 3)
            apply.advance(shard.index, t, LR)
            apply.write(shard.index, change, x[cut])
            exact[cut] -= change
            x[cut] += decoded(plan, shard, answer)
        assert reducer.state_arrays()["x"].tobytes() == x.tobytes()
    held = x + reducer.state_arrays()["residual"]
    np.testing.assert_allclose(held, exact, atol=1e-5)


def test_of_ef21_a_rank_that_is_absent_has_said_that_nothing_changed():
    plan = make_plan(preset("ef21").with_codecs(uplink="fp32", downlink="delta:fp32"))
    reducer, _ = started(plan)
    shard = plan.layout.shards[0]
    one = message(plan, shard, 0, 1)
    said = np.frombuffer(one.payload, "<f4")
    reducer.step(0, [one], LR)
    np.testing.assert_allclose(reducer.state_arrays()["h"][: shard.numel], said / 3, rtol=1e-6)


# ---- the mean goes down


@pytest.mark.parametrize("name", MEANS)
def test_every_replica_that_applies_the_mean_has_the_servers_bytes(name):
    plan = make_plan(recipe_of(name))
    reducer, x = started(plan)
    replica = Replica(plan, x)
    for t in range(1, 11):
        ranks = () if t == 6 else range(1 + t % 3)
        answers = round_of(plan, reducer, t, ranks, lr=LR / t)
        assert {a.kind for a in answers} == ({"mean"} if ranks else {"nothing"})
        replica.take(t, answers)
        same_state(reducer, replica)
    moved = not np.array_equal(replica.x, x)
    assert moved == (name != "average"), "the workers' optimizer moves them"


@pytest.mark.parametrize("name", [n for n in MEANS if n != "average"])
def test_a_joiner_gets_the_weights_and_the_rules_state_as_planes(name):
    plan = make_plan(recipe_of(name))
    reducer, x = started(plan)
    for t in range(1, 7):
        round_of(plan, reducer, t)
    replica = Replica(plan, x)
    planes = {"x": replica.x, **replica.rule.state_arrays()}
    for shard in plan.layout.shards:
        full = reducer.full(shard.index)
        assert full.wire_id == get_codec("fp32").wire_id
        count = -(-shard.numel // PART_NUMEL)
        assert len(full.parts) == count * len(planes)
        for number, vector in enumerate(planes.values()):
            body = b"".join(p.tobytes() for p in full.parts[number * count : (number + 1) * count])
            vector[shard.offset : shard.offset + shard.numel] = np.frombuffer(body, "<f4")
    same_state(reducer, replica)
    for t in range(7, 10):
        replica.take(t, round_of(plan, reducer, t))
        same_state(reducer, replica)


@pytest.mark.parametrize("downlink", ["mean:sign", "mean:lloyd-max:bits=3"])
def test_what_a_mean_does_not_say_is_said_later(downlink):
    recipe = preset("average").with_codecs(uplink="fp32", downlink=downlink)
    plan = make_plan(recipe)
    reducer, x = started(plan)
    meant, said = np.zeros_like(x), np.zeros_like(x)
    for t in range(1, 5):
        for shard, answer in zip(plan.layout.shards, round_of(plan, reducer, t), strict=True):
            cut = slice(shard.offset, shard.offset + shard.numel)
            pushes = [message(plan, shard, rank, t).payload for rank in range(3)]
            meant[cut] += sum(np.frombuffer(p, "<f4") for p in pushes) / 3
            said[cut] += decoded(plan, shard, answer)
    np.testing.assert_allclose(said + reducer.state_arrays()["residual"], meant, atol=1e-5)
    assert reducer.state_arrays()["x"].tobytes() == x.tobytes()


def sgd_with_means():
    recipe = preset("fp32-sgd").with_codecs(uplink="fp32")
    return dataclasses.replace(recipe, downlink=Downlink("mean", "sign"))


def test_what_waits_is_worth_the_same_when_the_rate_changes():
    plan = make_plan(sgd_with_means())
    reducer, x = started(plan)
    exact = x.astype(np.float64)
    for t, lr in enumerate((0.1, 0.1, 0.01, 0.0, 0.01, 0.5), 1):
        round_of(plan, reducer, t, lr=lr)
        for shard in plan.layout.shards:
            pushes = [message(plan, shard, rank, t).payload for rank in range(3)]
            mean = sum(np.frombuffer(p, "<f4").astype(np.float64) for p in pushes) / 3
            exact[shard.offset : shard.offset + shard.numel] -= lr * mean
        if lr:
            state = reducer.state_arrays()
            np.testing.assert_allclose(state["x"] - lr * state["residual"], exact, atol=1e-4)


@pytest.mark.parametrize("name", ["ef-sgd", "sign-majority"])
def test_where_the_server_has_a_rate_of_its_own_no_push_decides_how_far_it_goes(name):
    plan = make_plan(preset(name).with_options("apply.rate=0.05"))
    weights = []
    for lr in (LR, 1e300):
        reducer, x = started(plan)
        round_of(plan, reducer, 1, lr=lr)
        weights.append(reducer.state_arrays()["x"].tobytes())
    assert weights[0] == weights[1] != x.tobytes()


@pytest.mark.parametrize("lr", [1e-20, 5e-324])
def test_a_rate_next_to_0_leaves_what_waits_alone(lr):
    plan = make_plan(sgd_with_means())
    reducer, _ = started(plan)
    round_of(plan, reducer, 1)
    before = reducer.state_arrays()["residual"].tobytes()
    round_of(plan, reducer, 2, lr=lr)
    assert reducer.state_arrays()["residual"].tobytes() == before
    round_of(plan, reducer, 3)
    assert np.isfinite(reducer.state_arrays()["x"]).all()


def test_shards_that_take_turns_count_rounds_of_their_own():
    recipe = sgd_with_means().with_options("apply.momentum=0.9", "uplink.error_feedback=true")
    plan = make_plan(recipe.with_rhythm(every=2))
    assert len(plan.layout.shards) > 4
    reducer, x = started(plan)
    replica = Replica(plan, x)
    for version in range(1, 8):
        due = plan.due_shards(version - 1)
        assert 0 < len(due) < len(plan.layout.shards)
        answers = [
            reducer.step(s.index, [message(plan, s, rank, version) for rank in (0, 1)], LR)
            for s in plan.layout.shards
            if s.index in due
        ]
        replica.take(version, answers, due)
        same_state(reducer, replica)


def test_the_residual_of_shared_directions_waits_in_refreshes_and_changes_its_units():
    plan = make_plan(recipe_of("shared-direction"))
    reducer, _ = started(plan)
    for t in (1, 2):
        round_of(plan, reducer, t)
        assert not reducer.state_arrays()["residual"].any()
    round_of(plan, reducer, 3)
    before = {name: array.copy() for name, array in reducer.state_arrays().items()}
    assert before["residual"].any()
    round_of(plan, reducer, 4)
    after = reducer.state_arrays()
    wanted = before["residual"] * (before["s"] / after["s"])
    np.testing.assert_allclose(after["residual"], wanted, rtol=1e-5)


def test_the_codec_of_an_answer_changes_with_the_round():
    plan = make_plan(recipe_of("onebit-adam"))
    reducer, _ = started(plan)
    for t in range(1, 6):
        codec = get_codec("fp32" if t <= 3 else "sign")
        shard = plan.layout.shards[0]
        assert reducer.payload_nbytes(0) == ShardCodec(codec, shard).nbytes
        answer = round_of(plan, reducer, t)[0]
        assert (answer.wire_id, answer.body.size) == (
            codec.wire_id,
            ShardCodec(codec, shard).nbytes,
        )
    assert reducer.payload_nbytes(0, anything=False) == 0


# ---- groups


@pytest.mark.parametrize("name", ["fp32", "fp32-sgd", "sign-majority"])
def test_a_groups_rate_is_a_multiple_of_the_steps(name):
    groups = [DEFAULT_GROUP, Group("slow", lr=0.5), Group("still", lr=0.0)]
    plan = make_plan(preset(name), groups=groups, members=(0, 1, 2))
    plain = make_plan(preset(name), groups=[*groups[:1], Group("a"), Group("b")], members=(0, 1, 2))
    (reducer, x), (other, _) = started(plan), started(plain)
    round_of(plan, reducer, 1)
    round_of(plain, other, 1)
    moved, wanted = reducer.state_arrays()["x"] - x, other.state_arrays()["x"] - x
    for shard in plan.layout.shards:
        cut = slice(shard.offset, shard.offset + shard.numel)
        factor = plan.rate_of(shard.index)
        np.testing.assert_allclose(moved[cut], factor * wanted[cut], rtol=1e-3, atol=1e-7)
        assert moved[cut].any() == bool(factor)


def test_a_groups_codecs_are_its_own():
    groups = [DEFAULT_GROUP, Group("fine", uplink="fp32", downlink="bf16")]
    plan = make_plan(preset("server-adam"), groups=groups, members=(0, 0, 1))
    reducer, _ = started(plan)
    answers = round_of(plan, reducer, 1)
    ids = {
        plan.group_of(s.index).name: a.wire_id
        for s, a in zip(plan.layout.shards, answers, strict=True)
    }
    wanted = {"default": get_codec("lloyd-max:bits=3").wire_id, "fine": get_codec("bf16").wire_id}
    assert ids == wanted


# ---- whole rounds


class _Teacher(ApplyRule):
    """A server step of a user's: takes the mean off, and counts steps in a vector of its own."""

    whole = True

    def step_whole(self, means, weights, t, lr, said):
        self.seen = (sorted(means), sorted(weights), t, lr, list(said.ranks), dict(said.weights))
        for name, mean in means.items():
            weights[name] -= np.float32(lr) * mean
        weights["bias"] += np.float32(1.0)


def with_teacher(downlink="weights:fp32", **groups):
    register("apply", Part("teacher", rule=_Teacher, takes=("gradient",), whole=True))
    kind, codec = downlink.split(":", 1)
    down = Downlink(kind, codec, error_feedback=kind == "delta")
    recipe = dataclasses.replace(preset("fp32-sgd"), apply=Apply("teacher"), downlink=down)
    return make_plan(recipe, **groups)


def judged_round(plan, reducer, number, said, lr=LR):
    judged = reducer.judge(number, said, lr)
    kept = {
        shard: [one for one in pushed if one.rank not in judged or not judged[one.rank].refused]
        for shard, pushed in said.items()
    }
    answers = [reducer.step(shard.index, kept[shard.index], lr) for shard in plan.layout.shards]
    return judged, answers


@pytest.mark.parametrize("downlink", ["weights:fp32", "delta:fp32", "delta:sign"])
def test_a_users_server_step_gets_means_by_name_and_edits_weights(downlink):
    groups = [DEFAULT_GROUP, Group("own", pushed=False)]
    plan = with_teacher(downlink, groups=groups, members=(0, 1, 0))
    reducer, x = started(plan)
    for number in (0, 1):
        before = reducer.state_arrays()["x"].copy() + reducer.state_arrays().get("residual", 0.0)
        said = {
            s.index: tuple(
                message(plan, s, rank, number, weight=2) for rank in (0, 1) if plan.pushes(s.index)
            )
            for s in plan.layout.shards
        }
        _, answers = judged_round(plan, reducer, number, said)
        assert reducer._apply.seen == (
            ["head", "table"],
            ["bias", "head", "table"],
            number + 1,
            LR,
            [0, 1],
            {0: 2.0, 1: 2.0},
        )
        held = reducer.state_arrays()["x"] + reducer.state_arrays().get("residual", 0.0)
        for shard, answer in zip(plan.layout.shards, answers, strict=True):
            cut = slice(shard.offset, shard.offset + shard.numel)
            assert answer.kind == downlink.split(":")[0]
            if plan.pushes(shard.index):
                mean = sum(np.frombuffer(p.payload, "<f4") for p in said[shard.index]) / 2
                wanted = before[cut] - np.float32(LR) * mean
            else:
                wanted = before[cut] + 1.0
            np.testing.assert_allclose(held[cut], wanted, atol=1e-5)
    assert not np.array_equal(reducer.state_arrays()["x"], x)


def test_a_users_server_step_is_not_taken_when_nothing_counts():
    plan = with_teacher()
    reducer, x = started(plan)
    _, answers = judged_round(plan, reducer, 0, {s.index: () for s in plan.layout.shards})
    assert {answer.kind for answer in answers} == {"weights"}
    assert reducer.state_arrays()["x"].tobytes() == x.tobytes()


def test_a_judging_aggregate_refuses_ranks_before_anything_is_reduced():
    recipe = dataclasses.replace(
        preset("fp32-sgd"), aggregate=Aggregate("krum", (("f", 1), ("m", 1)))
    )
    plan = make_plan(recipe, world_size=5)
    reducer, x = started(plan)
    said = {
        s.index: tuple(
            message(plan, s, rank, 1, scale=50.0 if rank == 3 else 0.1) for rank in range(5)
        )
        for s in plan.layout.shards
    }
    judged, _ = judged_round(plan, reducer, 0, said)
    assert judged[3].refused
    assert sum(not one.refused for one in judged.values()) == 1
    moved = np.abs(reducer.state_arrays()["x"] - x).max()
    assert 0.0 < moved < 1.0 * LR


def test_rules_that_look_at_a_round_cannot_write_the_weights():
    plan = with_teacher()
    reducer, _ = started(plan)
    seen = []
    reducer._apply.step_whole = lambda *a: seen.append(a[-1].x(0))
    said = {s.index: (message(plan, s, 0, 1),) for s in plan.layout.shards}
    judged_round(plan, reducer, 0, said)
    with pytest.raises(ValueError, match="read-only"):
        seen[0][0] = 1.0
