"""Conservation of mass: what was meant is what was applied and what still waits.

A twin without a codec stands beside each worker, and one beside the server. It is given the same
and says all of it: what was meant. Sums are in float64; a bound is so many float32 roundings of the
largest number that was added, two for each round.

Recipes that feed nothing back lose what they do not say. What holds of them instead is in STATED.
"""

import dataclasses

import numpy as np
import pytest

from battery.cases import CASES, RATES, recipe_of, started
from battery.cluster import SECRET, cuts
from psq.codec import DEFAULT_BLOCK
from psq.feedback import Compressor
from psq.presets import PRESETS, preset
from psq.recipe import Choice, Downlink
from psq.rules import is_linear
from psq_server.reduce import Reducer

EPS32 = float(np.finfo(np.float32).eps)
WORKERS = 4  # so that kardam refuses somebody
NAMES = list(PRESETS)
RECIPES = {name: preset(name) for name in NAMES}
FED_BACK = [name for name in NAMES if recipe_of(name, WORKERS).uplink.error_feedback]
ANSWER_FED_BACK = [name for name in NAMES if RECIPES[name].downlink.error_feedback]


def lossless(recipe):
    """The same direction, said whole."""
    twin = recipe.with_options("aggregate=mean")
    choice = Choice("fixed") if twin.uplink.choice.kind == "dq" else twin.uplink.choice
    uplink = dataclasses.replace(twin.uplink, codec="fp32", error_feedback=False, choice=choice)
    downlink = dataclasses.replace(twin.downlink, codec="fp32")
    twin = dataclasses.replace(twin, uplink=uplink, downlink=downlink)
    marked = {"codec": "fp32"}
    return twin.with_options(**{"uplink.choice": marked}) if twin.apply.part.in_step else twin


class Overheard:
    """A compressor, and a twin that says the same without a codec: `meant` by shard."""

    def __init__(self, real, twin):
        self._real, self._twin, self.meant = real, twin, {}

    def __getattr__(self, name):
        return getattr(self._real, name)

    def prepare(self, *given, **more):
        for each in (self._real, self._twin):
            each.prepare(*given, **more)

    def descend(self, shard, gradients, lr, weights):
        self._twin.descend(shard, gradients, lr, [part.copy() for part in weights])
        self._real.descend(shard, gradients, lr, weights)

    def compress(self, shard, gradients, lr, payload, **given):
        self._hear(self._twin.compress, shard, gradients, lr, given)
        return self._real.compress(shard, gradients, lr, payload, **given)

    def compress_drift(self, shard, gradients, lr, payload, **given):
        self._hear(self._twin.compress_drift, shard, gradients, lr, given)
        return self._real.compress_drift(shard, gradients, lr, payload, **given)

    def _hear(self, say, shard, gradients, lr, given):
        payload = np.empty(self._twin.nbytes(shard), np.uint8)
        say(shard, gradients, lr, payload, **given)
        self.meant[shard] = payload.view(np.float32).astype(np.float64)


def overheard(name):
    """A cluster whose workers have twins; shards and offsets are the same."""
    cluster, _ = started(name, WORKERS)
    plan = cluster.plan
    twin_plan = dataclasses.replace(plan, recipe=lossless(plan.recipe))
    assert cuts(twin_plan) == cuts(plan)
    for worker in cluster.workers:
        twin = Compressor(twin_plan, plan.data_rank(worker.rank))
        if plan.recipe.direction.kind == "gaussian":
            twin._rule.use_secret(SECRET + worker.rank)
        worker.compressor = Overheard(worker.compressor, twin)
    return cluster


class Book:
    """Of one vector: what was meant, what was said, and how large the numbers were."""

    def __init__(self, numel):
        self.meant, self.said = np.zeros((2, numel))
        self.largest, self.rounds = 0.0, 0

    def enter(self, at, meant, said, worth):
        self.meant[at] += worth * meant
        self.said[at] += worth * said
        size = np.abs(worth) * (np.abs(meant) + 2 * np.abs(said))
        self.largest = max(self.largest, float(size.max()))

    def check(self, waiting):
        """That what is missing waits."""
        apart = np.abs(self.said + waiting - self.meant).max()
        largest = max(self.largest, float(np.abs(waiting).max()))
        assert apart <= 2 * len(RATES) * EPS32 * largest
        assert self.largest > 0.0


def units_of(cluster, lr):
    """What one of a message is worth, f64[numel], and whether residuals take part."""
    recipe, numel = cluster.plan.recipe, cluster.plan.layout.numel
    if recipe.apply.kind == "shared":
        marked = cluster.workers[0].apply.is_marked(0, cluster.version + 1)
        return cluster.server.state_arrays()["s"].astype(np.float64), not marked
    return np.full(numel, lr if is_linear(recipe) else 1.0), True


@pytest.mark.parametrize("name", FED_BACK)
def test_what_workers_meant_is_what_counted_and_what_waits_in_their_residuals(name):
    cluster = overheard(name)
    books = [Book(cluster.plan.layout.numel) for _ in cluster.workers]
    for lr in RATES:
        worth, takes_part = units_of(cluster, lr)
        this = cluster.step(lr)
        for worker, book in zip(cluster.workers, books, strict=True):
            for shard in cluster.shards:
                at = slice(shard.offset, shard.offset + shard.numel)
                said = cluster.decoded(shard, this.pushes[worker.rank, shard.index])
                counted = said if worker.rank not in this.refused else np.zeros_like(said)
                if takes_part:
                    book.enter(at, worker.compressor.meant[shard.index], counted, worth[at])
    worth, _ = units_of(cluster, RATES[-1])
    for worker, book in zip(cluster.workers, books, strict=True):
        waiting = worth * worker.compressor.state_arrays()["residual"]
        book.check(waiting)
        is_dense = cluster.plan.recipe.uplink.codec == "fp32"
        assert is_dense or np.abs(waiting).max() > 0.0


@pytest.mark.parametrize("name", ANSWER_FED_BACK)
def test_what_the_server_meant_is_what_it_said_and_what_waits_in_its_residual(name):
    cluster, problem = started(name, WORKERS)
    check = check_means if cluster.plan.recipe.downlink.kind == "mean" else check_deltas
    check(cluster, problem)


def check_deltas(cluster, problem):
    """Weights and residual are where a twin is that moves its weights by all of each step."""
    twin_recipe = dataclasses.replace(
        cluster.plan.recipe, downlink=Downlink("weights", "fp32", error_feedback=False)
    )
    twin = Reducer(dataclasses.replace(cluster.plan, recipe=twin_recipe))
    for shard in cluster.shards:
        at = slice(shard.offset, shard.offset + shard.numel)
        twin.init(shard.index, 0, problem.x[at].tobytes())
    replicas, largest = cluster.plan.replicas, 0.0
    for lr in RATES:
        this = cluster.step(lr)
        for shard in cluster.shards:
            ranks = range(0, cluster.plan.world_size, replicas)
            twin.step(shard.index, [this.pushes[rank, shard.index] for rank in ranks], lr)
        state = cluster.server.state_arrays()
        largest = max(largest, float(np.abs(state["x"]).max() + np.abs(state["residual"]).max()))
    held = state["x"].astype(np.float64) + state["residual"]
    assert np.abs(held - twin.state_arrays()["x"]).max() <= 2 * len(RATES) * EPS32 * largest
    assert np.abs(state["residual"]).max() > 0.0


def check_means(cluster, _):
    """The sum of answers, and the residual, is the sum of what was to be answered."""
    book = Book(cluster.plan.layout.numel)
    for lr in RATES:
        worth, takes_part = units_of(cluster, lr)
        this = cluster.step(lr)
        for shard in cluster.shards:
            at = slice(shard.offset, shard.offset + shard.numel)
            pushes = [this.pushes[w.rank, shard.index] for w in cluster.workers]
            mean = np.mean([cluster.decoded(shard, p).astype(np.float64) for p in pushes], axis=0)
            if takes_part:
                said = cluster.answered(shard, this.answers[shard.index])
                book.enter(at, mean, said, worth[at])
    worth, _ = units_of(cluster, RATES[-1])
    book.check(worth * cluster.server.state_arrays()["residual"])


# ---- recipes that feed nothing back


def check_all(cluster, shard, meant, said):
    """Nothing is lost: every bit of it is said."""
    del cluster, shard
    assert meant.astype(np.float32).tobytes() == said.tobytes()


def check_signs(cluster, shard, meant, said):
    """Sizes are lost, signs are not: of every value the one that was meant is said."""
    del cluster, shard
    assert np.array_equal(np.sign(said), np.where(meant >= 0.0, 1.0, -1.0))


def check_grid(cluster, shard, meant, said):
    """A value is said as one of the two numbers around it, of which one is above it."""
    del cluster
    for segment in shard.segments:
        stop = segment.offset + segment.numel
        for start in range(segment.offset, stop, DEFAULT_BLOCK):
            at = slice(start, min(start + DEFAULT_BLOCK, stop))
            step = np.min(np.diff(np.unique(np.abs(said[at]))))
            assert (np.abs(meant[at] - said[at]) <= step * (1 + 1e-5)).all()


STATED = {
    "fp32": check_all,
    "fp32-sgd": check_all,
    "sto-sign": check_signs,
    "sto-sign-ef": check_signs,
    "dp-sign": check_signs,
    "sign-majority": check_signs,
    "dist-lion": check_signs,
    "dq-sgd": check_grid,
    "ef21": None,  # its memory: a test of its own
}


def test_every_recipe_without_feedback_states_what_holds_instead():
    assert set(STATED) == set(NAMES) - set(FED_BACK)
    assert set(NAMES) == set(CASES)


@pytest.mark.parametrize("name", [name for name, check in STATED.items() if check])
def test_without_feedback_what_is_said_is_what_the_recipe_states(name):
    cluster = overheard(name)
    for lr in RATES[:12]:
        this = cluster.step(lr)
        for (rank, index), push in this.pushes.items():
            shard, meant = cluster.shards[index], cluster.workers[rank].compressor.meant[index]
            STATED[name](cluster, shard, meant, cluster.decoded(shard, push))
    for worker in cluster.workers:
        assert "residual" not in worker.compressor.state_arrays()


def test_unbiased_rounding_is_right_on_average():
    """The mean error over all values and rounds is that of a fair coin: within 4 deviations."""
    cluster = overheard("dq-sgd")
    errors = []
    for lr in RATES:
        for (rank, index), push in cluster.step(lr).pushes.items():
            said = cluster.decoded(cluster.shards[index], push)
            errors.append(said - cluster.workers[rank].compressor.meant[index])
    errors = np.concatenate(errors)
    assert abs(errors.mean()) <= 4 * errors.std() / errors.size**0.5
    assert errors.std() > 0.0


def test_all_that_ef21s_workers_have_said_is_in_their_memory_and_its_mean_in_the_servers():
    cluster, _ = started("ef21", WORKERS)
    said = np.zeros((WORKERS, cluster.plan.layout.numel))
    for lr in RATES:
        for (rank, index), push in cluster.step(lr).pushes.items():
            shard = cluster.shards[index]
            at = slice(shard.offset, shard.offset + shard.numel)
            said[rank, at] += cluster.decoded(shard, push)
    bound = 2 * len(RATES) * EPS32 * np.abs(said).max()
    for worker in cluster.workers:
        h = worker.compressor.state_arrays()["h"]
        assert np.abs(h - said[worker.rank]).max() <= bound
    assert np.abs(cluster.server.state_arrays()["h"] - said.mean(axis=0)).max() <= bound


@pytest.mark.parametrize(
    "name", [name for name in NAMES if RECIPES[name].downlink.kind == "weights"]
)
def test_a_server_that_answers_with_its_weights_keeps_them_exactly(name):
    """Its codec does not touch them: a twin that says them in full has the same bits."""
    cluster, problem = started(name, WORKERS)
    fine = recipe_of(name, WORKERS).with_codecs(downlink="weights:fp32")
    twin = Reducer(dataclasses.replace(cluster.plan, recipe=fine))
    for shard in cluster.shards:
        at = slice(shard.offset, shard.offset + shard.numel)
        twin.init(shard.index, 0, problem.x[at].tobytes())
    for number, lr in enumerate(RATES[:12]):
        this = cluster.step(lr)
        said = {
            s.index: tuple(this.pushes[rank, s.index] for rank in range(WORKERS))
            for s in cluster.shards
        }
        judged = twin.judge(number, said, lr) if cluster.plan.recipe.whole else {}
        for shard in cluster.shards:
            counted = [
                one._replace(weight=judged[one.rank].weight if one.rank in judged else 1)
                for one in said[shard.index]
                if one.rank not in this.refused
            ]
            twin.step(shard.index, counted, lr)
        assert twin.state_arrays()["x"].tobytes() == cluster.server.state_arrays()["x"].tobytes()


def test_weights_that_are_all_alike_leave_ef21s_mean_as_it_is():
    cluster, problem = started("ef21", WORKERS)
    this = cluster.step(RATES[0])
    twin = Reducer(cluster.plan)
    for shard in cluster.shards:
        at = slice(shard.offset, shard.offset + shard.numel)
        twin.init(shard.index, 0, problem.x[at].tobytes())
        pushes = [this.pushes[rank, shard.index] for rank in range(WORKERS)]
        twin.step(shard.index, [one._replace(weight=600) for one in pushes], RATES[0])
    heard, wanted = (r.state_arrays()["h"] for r in (twin, cluster.server))
    np.testing.assert_allclose(heard, wanted, atol=4 * EPS32 * np.abs(wanted).max())
