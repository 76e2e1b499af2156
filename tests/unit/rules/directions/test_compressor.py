"""The compressor over every direction: what is said, what waits, and what a saved state brings."""

import dataclasses

import numpy as np
import pytest

from psq.catalogue import DIRECTIONS
from psq.errors import UsageError
from psq.feedback import Compressor
from psq.groups import DEFAULT_GROUP, Group
from psq.plan import Plan
from psq.recipe import AdamConfig, Apply, Choice, Direction, Downlink, Recipe, Uplink
from psq.rules import make_direction

SPECS = [("conv", (40, 7, 5, 5)), ("bias", (40,)), ("table", (300, 400)), ("head", (3, 3))]
ADAM = AdamConfig()
SGD, ADD = Apply("sgd"), Apply("add")
PERIODIC = Choice("periodic", (("codec", "uniform:bits=8"), ("first", 2), ("period", 4)))
WARM_UP = Choice("first", (("codec", "fp32"), ("steps", 2)))
DELTA = Downlink("delta", "fp32")
LR = 0.1


def make_recipe(direction, uplink, apply, downlink=DELTA):
    return Recipe("under-test", direction, uplink, apply, downlink)


def replicated(kind, choice):
    return make_recipe(
        Direction(kind, ADAM),
        Uplink("sign", choice=choice),
        Apply(kind, ADAM),
        Downlink("mean", "sign", choice=choice),
    )


RECIPES = {
    "gradient": make_recipe(Direction(), Uplink("sign"), SGD),
    "gradient, first": make_recipe(Direction(), Uplink("sign", choice=WARM_UP), SGD),
    "adam, periodic": make_recipe(Direction("adam", ADAM), Uplink("log:k=2", choice=PERIODIC), ADD),
    "local adam": make_recipe(
        Direction("adam", ADAM, local_steps=2), Uplink("log:k=2", choice=PERIODIC), ADD
    ),
    "momentum": make_recipe(
        Direction("momentum", options=(("nesterov", True),)), Uplink("lloyd-max:bits=2"), SGD
    ),
    "lion": make_recipe(Direction("lion"), Uplink("sign"), SGD),
    "omd": make_recipe(Direction("omd"), Uplink("log:k=2"), ADD),
    "dithered": make_recipe(Direction("dithered"), Uplink("sign", error_feedback=False), SGD),
    "gaussian": make_recipe(Direction("gaussian"), Uplink("sign", error_feedback=False), SGD),
    "ef21": make_recipe(Direction("ef21"), Uplink("sign", error_feedback=False), Apply("ef21")),
    "onebit": replicated("onebit", WARM_UP),
    "shared": replicated("shared", PERIODIC),
}
HELD_BY_ALL = {"onebit": ("m", "v"), "shared": ("v", "s", "d")}
WITH_RESIDUAL = ["gradient, first", "adam, periodic", "momentum", "lion", "omd", "onebit"]


class Job:
    """A worker of a recipe, and what it says."""

    def __init__(self, name, *, seed=5, rank=1, **options):
        self.plan = Plan.of(SPECS, RECIPES[name], 2)
        self.compressor = Compressor(self.plan, rank, seed=seed, **options)
        self.local_steps = self.plan.recipe.direction.local_steps
        if name == "gaussian":
            self.compressor._rule.use_secret(11)
        rng = np.random.default_rng(3)
        numel = self.plan.layout.numel
        self.shared = {
            key: rng.uniform(0.5, 1.5, numel).astype(np.float32)
            for key in HELD_BY_ALL.get(name, ())
        }

    def view(self, array, shard):
        return array[shard.offset : shard.offset + shard.numel]

    def values(self, seed, scale=1.0):
        rng = np.random.default_rng(seed)
        tensors = [
            np.float32(scale) * rng.standard_normal(t.numel, dtype=np.float32)
            for t in self.plan.layout.tensors
        ]
        return [
            [tensors[s.tensor][s.start : s.start + s.numel] for s in shard.segments]
            for shard in self.plan.layout.shards
        ]

    def say(self, gradients, *, lr=LR, t=None, clear=False):
        """One step of all shards: the payloads, exactly long."""
        worker, payloads = self.compressor, []
        if worker.needs_all:
            worker.prepare(gradients, lr, t=t)
        for shard in self.plan.layout.shards:
            payload = np.zeros(worker.nbytes(shard.index), np.uint8)
            if self.local_steps > 1:
                here = [np.zeros(s.numel, np.float32) for s in shard.segments]
                there = [x.copy() for x in here]
                worker.descend(shard.index, gradients[shard.index], lr, there)
                index = worker.compress_drift(
                    shard.index, gradients[shard.index], lr, payload, weights=there, start=here
                )
            else:
                shared = {key: self.view(array, shard) for key, array in self.shared.items()}
                index = worker.compress(
                    shard.index,
                    gradients[shard.index],
                    lr,
                    payload,
                    t=t,
                    clear=clear,
                    shared=shared,
                )
            payloads.append(payload[: worker.codec(shard.index, index).nbytes])
        return payloads

    def decode(self, payloads):
        """What they say, flat."""
        out = np.empty(self.plan.layout.numel, np.float32)
        for shard, payload in zip(self.plan.layout.shards, payloads, strict=True):
            codecs = [
                self.compressor.codec(shard.index, index)
                for index in range(len(self.plan.uplink_codecs(shard.index)))
            ]
            codec = next(codec for codec in codecs if codec.nbytes == payload.nbytes)
            codec.decode(payload, self.view(out, shard))
        return out

    def messages(self):
        """Another rule of the same worker, for what its messages are before the codec."""
        layout = self.plan.layout
        where = {"layout": layout, "world_size": 2, "rank": 1, "seed": 5}
        rule = make_direction(self.plan.recipe, **where)

        def write(gradients, *, lr=LR, t):
            out = np.empty(layout.numel, np.float32)
            for shard in layout.shards:
                shared = {key: self.view(array, shard) for key, array in self.shared.items()}
                target = self.view(out, shard)
                g = gradients[shard.index]
                rule.write(shard.index, t, lr, g, target, weights=None, shared=shared)
                rule.advance(shard.index)
            return out

        return write

    @property
    def residual(self):
        return self.compressor.state_arrays()["residual"]


def flat(values):
    return np.concatenate([part for shard in values for part in shard])


@pytest.mark.parametrize("name", WITH_RESIDUAL)
def test_what_is_said_and_what_waits_is_the_sum_of_all_messages(name):
    job = Job(name)
    write = job.messages()
    said, meant = np.zeros(job.plan.layout.numel), np.zeros(job.plan.layout.numel)
    for step in range(8):
        gradients = job.values(step)
        meant += write(gradients, t=step + 1)
        if step == 3 and name != "onebit":  # nothing is said
            for shard in job.plan.layout.shards:
                job.compressor.absorb(shard.index, gradients[shard.index], LR)
            continue
        payloads = job.say(gradients)
        if step == 5:  # nothing of it was applied
            for shard, payload in enumerate(payloads):
                assert job.compressor.restore(shard, payload)
            continue
        said += job.decode(payloads)
    assert np.abs(job.residual).max() > 0.0
    np.testing.assert_allclose(said + job.residual, meant, atol=1e-5 * np.abs(meant).max())


@pytest.mark.parametrize("name", RECIPES)
def test_a_saved_state_brings_the_same_bytes(name):
    first, rates = Job(name), [0.1, 0.1, 0.05, 0.02, 0.02]
    for step in range(3):
        first.say(first.values(step), lr=rates[step])
    second = Job(name)
    for key, array in second.compressor.state_arrays().items():
        array[:] = first.compressor.state_arrays()[key]
    second.compressor.resume(first.compressor.steps)
    if name == "gaussian":  # the secret is nobody's to save
        for job in (first, second):
            job.compressor._rule.use_secret(12)
    for step in range(3, 5):
        ours = first.say(first.values(step), lr=rates[step])
        theirs = second.say(second.values(step), lr=rates[step])
        assert [p.tobytes() for p in ours] == [p.tobytes() for p in theirs]
    for key, array in first.compressor.state_arrays().items():
        assert array.tobytes() == second.compressor.state_arrays()[key].tobytes()


@pytest.mark.parametrize("name", RECIPES)
def test_the_same_worker_says_the_same_again(name):
    runs = []
    for _ in range(2):
        job = Job(name)
        runs.append([p.tobytes() for step in range(3) for p in job.say(job.values(step))])
    assert runs[0] == runs[1]


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "local adam"])
def test_wrong_segments_are_refused_before_anything_changes(name):
    job = Job(name)
    job.say(job.values(0))
    before = {key: array.copy() for key, array in job.compressor.state_arrays().items()}
    payload = np.zeros(job.compressor.nbytes(0), np.uint8)
    with pytest.raises(UsageError, match="shard 0 has segments of"):
        job.compressor.compress(0, job.values(1)[0][:-1], 2.0 * LR, payload)
    for key, array in job.compressor.state_arrays().items():
        assert array.tobytes() == before[key].tobytes()


@pytest.mark.parametrize(("name", "fused"), [("gradient", "sign"), ("adam", "log:k=2")])
def test_the_composed_path_says_the_bytes_of_the_fused_one(name, fused):
    """After the warm-up, whose codec here leaves nothing in the residual."""
    direction = Direction(name, ADAM if name == "adam" else None)
    apply = ADD if name == "adam" else SGD
    recipes = [make_recipe(direction, Uplink(fused, choice=c), apply) for c in (Choice(), WARM_UP)]
    workers = [Compressor(Plan.of(SPECS, recipe, 2), 0) for recipe in recipes]
    assert [worker._rule is None for worker in workers] == [True, False]
    job = Job("gradient")
    for step in range(4):
        gradients = job.values(step)
        for shard in job.plan.layout.shards:
            payloads = [np.zeros(worker.nbytes(shard.index), np.uint8) for worker in workers]
            t = step + 3  # the warm-up is over for the one that has it
            for worker, payload in zip(workers, payloads, strict=True):
                worker.compress(shard.index, gradients[shard.index], LR, payload, t=t)
            fused_payload, composed = payloads
            assert composed[: fused_payload.size].tobytes() == fused_payload.tobytes()
    states = [worker.state_arrays() for worker in workers]
    assert {k: v.tobytes() for k, v in states[0].items()} == {
        k: v.tobytes() for k, v in states[1].items()
    }


def test_the_round_says_which_codec_is_used_and_how_long_the_payload_is():
    job = Job("gradient, first")
    worker, payload = job.compressor, np.zeros(job.compressor.nbytes(0), np.uint8)
    assert worker.nbytes(0) == 4 * job.plan.layout.shards[0].numel
    numbers = [worker.compress(0, job.values(0)[0], LR, payload, t=t) for t in (1, 2, 3, 2, 4)]
    assert numbers == [1, 1, 0, 1, 0]
    assert worker.codec(0, 0).codec.spec == "sign"
    assert worker.codec(0, 1).codec.spec == "fp32"
    assert worker.codec(0).nbytes < worker.nbytes(0)


@pytest.mark.parametrize("t", [1, 3])
def test_payloads_of_any_codec_are_checked_and_folded_back(t):
    job = Job("gradient, first")
    worker, payload = job.compressor, np.zeros(job.compressor.nbytes(0), np.uint8)
    gradients = job.values(0)[0]
    index = worker.compress(0, gradients, LR, payload, t=t)
    assert worker.payload_finite(0, payload)
    assert worker.payload_finite(0, payload[: worker.codec(0, index).nbytes])
    assert worker.restore(0, payload)
    residual = job.view(job.residual, job.plan.layout.shards[0])
    np.testing.assert_allclose(residual, np.concatenate(gradients), atol=1e-6)
    gradients[-1][-1] = np.nan
    worker.compress(0, gradients, LR, payload, t=t)
    assert not worker.payload_finite(0, payload)


def test_ef21_remembers_all_that_was_said_and_forgets_what_was_not_applied():
    job, said = Job("ef21"), 0.0
    for step in range(4):
        payloads = job.say(job.values(step))
        if step == 2:
            for shard, payload in enumerate(payloads):
                assert job.compressor.restore(shard, payload)
                assert job.compressor.restore(shard, payload)  # once is enough
            continue
        said = said + job.decode(payloads)
    h = job.compressor.state_arrays()["h"]
    np.testing.assert_allclose(h, said, atol=1e-6)
    with pytest.raises(UsageError, match="without error feedback a step cannot wait"):
        job.compressor.absorb(0, job.values(0)[0], LR)


def test_ef21_comes_near_a_gradient_that_stays():
    job = Job("ef21")
    gradients = job.values(0)
    for _ in range(60):
        job.say(gradients)
    missing = flat(gradients) - job.compressor.state_arrays()["h"]
    assert np.linalg.norm(missing) < 0.05 * np.linalg.norm(flat(gradients))


def test_a_message_that_is_not_finite_is_not_remembered():
    job = Job("ef21")
    gradients = job.values(0)
    gradients[0][-1][-1] = np.inf
    payload = np.zeros(job.compressor.nbytes(0), np.uint8)
    job.compressor.compress(0, gradients[0], LR, payload)
    assert not job.compressor.payload_finite(0, payload)
    assert job.compressor.restore(0, payload)
    assert not job.compressor.state_arrays()["h"].any()


def test_a_refresh_neither_takes_from_the_residual_nor_gives_back_to_it():
    job = Job("shared")
    for t in (1, 2, 3):
        job.say(job.values(t), t=t)
    waiting = job.residual.copy()
    assert waiting.any()
    payloads = job.say(job.values(4), t=4)  # a refresh
    assert [job.compressor.restore(shard, payload) for shard, payload in enumerate(payloads)]
    for shard in job.plan.layout.shards:  # one that says nothing is lost
        shared = {key: job.view(array, shard) for key, array in job.shared.items()}
        gradients = job.values(5)[shard.index]
        job.compressor.absorb(shard.index, gradients, LR, t=4, shared=shared)
    assert job.residual.tobytes() == waiting.tobytes()
    payloads = job.say(job.values(6), t=5)
    assert job.residual.tobytes() != waiting.tobytes()


def test_a_change_of_units_multiplies_what_waits():
    job = Job("shared")
    for t in (1, 2, 3):
        job.say(job.values(t), t=t)
    shard = job.plan.layout.shards[0]
    before, factor = job.residual.copy(), np.linspace(0.5, 2.0, shard.numel, dtype=np.float32)
    job.compressor.rescale(0, factor)
    assert job.view(job.residual, shard).tobytes() == (before[: shard.numel] * factor).tobytes()
    assert job.residual[shard.numel :].tobytes() == before[shard.numel :].tobytes()
    factor[0] = np.inf  # is given up
    job.compressor.rescale(0, factor)
    assert np.isfinite(job.residual).all()
    assert job.residual[0] == 0.0


# ---- the learning rate outside the message


@pytest.mark.parametrize("name", ["gradient", "momentum"])
def test_what_waits_keeps_the_weight_of_its_own_step(name):
    """Sum of rate * said, and rate * residual at the end, is the sum of rate * message."""
    job = Job(name)
    write = job.messages() if name == "momentum" else (lambda gradients, **_: flat(gradients))
    meant, moved = (np.zeros(job.plan.layout.numel) for _ in range(2))
    for step, lr in enumerate([0.0, 0.1, 0.1, 0.01, 0.05, 0.0, 0.02]):
        gradients = job.values(step)
        meant += lr * write(gradients, lr=lr, t=step + 1).astype(np.float64)
        payloads = job.say(gradients, lr=lr)
        if step == 4:
            assert all(job.compressor.restore(*each) for each in enumerate(payloads))
            continue
        moved += lr * job.decode(payloads).astype(np.float64)
    assert np.abs(job.residual).max() > 1.0
    np.testing.assert_allclose(moved + 0.02 * job.residual, meant, atol=1e-6)
    assert job.compressor.state_arrays()["rates"].tolist() == [0.02] * len(job.plan.layout.shards)


@pytest.mark.parametrize("name", ["gradient", "momentum"])
def test_a_step_of_rate_0_leaves_what_waits_alone(name):
    job = Job(name)
    job.say(job.values(0))
    before = job.residual.tobytes()
    payloads = job.say(job.values(1), lr=0.0)
    assert all(job.compressor.restore(*each) for each in enumerate(payloads))
    for shard in job.plan.layout.shards:
        job.compressor.absorb(shard.index, job.values(2)[shard.index], 0.0)
    assert job.residual.tobytes() == before


@pytest.mark.parametrize("lr", [1e-15, 1e-300, 5e-324])
def test_a_rate_next_to_0_leaves_what_waits_sayable(lr):
    job = Job("gradient")
    job.say(job.values(0), lr=0.1)
    before = job.residual.tobytes()
    payloads = job.say(job.values(1), lr=lr)
    assert job.residual.tobytes() == before
    for shard, payload in enumerate(payloads):
        assert job.compressor.payload_finite(shard, payload)
        assert np.abs(job.compressor.codec(shard).scales(payload)).max() < 100.0


@pytest.mark.parametrize("lr", [-0.1, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_refused_where_it_is_a_unit(lr):
    job = Job("momentum")
    with pytest.raises(UsageError, match="must be a finite number >= 0"):
        job.say(job.values(0), lr=lr)


def test_what_waits_in_bf16_follows_the_rate_too():
    job = Job("gradient", residual_dtype="bf16")
    gradients = job.values(0)
    job.say(gradients, lr=0.1)
    before = values_of(job.residual)
    for shard in job.plan.layout.shards:
        zeros = [np.zeros(s.numel, np.float32) for s in shard.segments]
        job.compressor.absorb(shard.index, zeros, 0.05)
    np.testing.assert_allclose(values_of(job.residual), 2.0 * before, rtol=2.0**-7)


def values_of(residual):
    return (residual.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize(
    "apply", [Apply("adam", ADAM), Apply("sgd", options=(("rate", 0.5),))], ids=["adam", "own rate"]
)
def test_where_the_pushes_rate_is_not_the_steps_nothing_is_rescaled(apply):
    recipe = make_recipe(Direction(), Uplink("sign"), apply)
    worker = Compressor(Plan.of(SPECS, recipe, 2), 0)
    assert "rates" not in worker.state_arrays()
    job, payload = Job("gradient"), np.zeros(worker.nbytes(0), np.uint8)
    worker.compress(0, job.values(0)[0], 0.1, payload)
    before = worker.state_arrays()["residual"].copy()
    worker.absorb(0, [np.zeros_like(g) for g in job.values(0)[0]], 0.01)
    assert worker.state_arrays()["residual"].tobytes() == before.tobytes()


# ---- groups, look-ahead, whole gradients


def test_a_groups_rate_and_codec_are_its_own():
    groups = (DEFAULT_GROUP, Group("slow", lr=0.25, uplink="fp32"))
    plan = Plan.of(SPECS, RECIPES["omd"], 2, groups=groups, members=(0, 1, 0, 1))
    worker, seen = Compressor(plan, 0), set()
    for shard in plan.layout.shards:
        payload = np.zeros(worker.nbytes(shard.index), np.uint8)
        ones = [np.ones(s.numel, np.float32) for s in shard.segments]
        worker.compress(shard.index, ones, LR, payload)
        out = np.empty(shard.numel, np.float32)
        worker.codec(shard.index).decode(payload, out)
        seen.add((worker.codec(shard.index).codec.spec, float(out[0])))
    assert seen == {("log:k=2", float(np.float32(LR))), ("fp32", float(np.float32(0.25 * LR)))}


@pytest.mark.parametrize("residual_dtype", ["f32", "bf16"])
def test_the_look_ahead_is_where_the_last_step_leads_with_what_waits(residual_dtype):
    job = Job("omd", residual_dtype=residual_dtype)
    gradients = job.values(0)
    job.say(gradients)
    residual = job.residual if residual_dtype == "f32" else values_of(job.residual)
    assert job.compressor.looks_ahead
    for shard in job.plan.layout.shards:
        out = np.empty(shard.numel, np.float32)
        job.compressor.look_ahead(shard.index, out)
        update = np.float32(LR) * np.concatenate(gradients[shard.index])
        np.testing.assert_allclose(out, update + job.view(residual, shard), rtol=1e-6)


def test_a_recipe_without_look_ahead_has_none():
    job = Job("momentum")
    assert not job.compressor.looks_ahead
    with pytest.raises(UsageError, match="there is no look-ahead"):
        job.compressor.look_ahead(0, np.empty(1, np.float32))


def test_only_a_direction_that_clips_the_whole_gradient_needs_all_of_it():
    assert [name for name in RECIPES if Job(name).compressor.needs_all] == ["gaussian"]


def test_gradients_are_read_first_wherever_something_is_kept():
    reads = {name: Job(name).compressor.reads_first for name in RECIPES}
    assert not reads.pop("gradient")
    assert all(reads.values())


@pytest.mark.parametrize("name", ["gradient", "momentum", "ef21"])
def test_gradients_are_cleared_where_asked(name):
    job = Job(name)
    gradients = job.values(0)
    expected = [p.tobytes() for p in Job(name).say(job.values(0))]
    assert [p.tobytes() for p in job.say(gradients, clear=True)] == expected
    assert not flat(gradients).any()


def test_an_exploded_message_is_given_up_with_its_shards_residual():
    job = Job("lion")
    gradients = job.values(0)
    gradients[0][0][3] = 1e30
    payload = np.zeros(job.compressor.nbytes(0), np.uint8)
    job.compressor.compress(0, gradients[0], LR, payload)
    assert not job.compressor.restore(0, payload)
    assert not job.view(job.residual, job.plan.layout.shards[0]).any()


def test_the_norm_that_a_choice_sees_is_that_of_what_is_said(monkeypatch):
    job, norms = Job("gradient, first"), []

    def choose(shard, t, norm):
        del shard, t
        norms.append(norm())
        return 0

    monkeypatch.setattr(job.compressor._payloads.choice, "choose", choose)
    first, second = job.values(0), job.values(1)
    job.say(first)
    waiting = job.residual.copy()
    job.say(second)
    shards = job.plan.layout.shards
    for index, shard in enumerate(shards):
        meant = np.concatenate(first[index])
        assert norms[index] == pytest.approx(np.linalg.norm(meant), rel=1e-5)
        meant = np.concatenate(second[index]) + job.view(waiting, shard)
        assert norms[len(shards) + index] == pytest.approx(np.linalg.norm(meant), rel=1e-5)


def test_the_recipes_under_test_have_every_direction_there_is():
    tested = {recipe.direction.kind for recipe in RECIPES.values()}
    assert tested == {part.kind for part in DIRECTIONS}
    assert dataclasses.replace(RECIPES["shared"]).adam == ADAM
