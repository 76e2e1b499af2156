"""NaN and Inf are left out, counted, and enter nothing that lasts; what can be kept is kept."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from battery.cases import CASES, RATES, recipe_of, started
from psq.codec import ShardCodec, get_codec
from psq.errors import RemotePayloadError
from psq.presets import PRESETS
from psq_worker.simulate import SimConfig, simulate
from psq_worker.simulate.attacks import Attack

NAMES = list(PRESETS)
SPOILT_AT = 5  # the round, of the rate before it; of the local steps in it, the first
CONV = slice(37, 142)  # a tensor: the second segment of shard 0
BIAS = slice(0, 37)  # the first


def workers_of(name):
    return 4 if CASES[name].faulty else 3


def spoilt(name, value):
    """A cluster whose rank 0 has one gradient with such a value, and its step's number."""
    cluster, problem = started(name, workers_of(name))
    local = cluster.plan.recipe.direction.local_steps
    when = (SPOILT_AT - 1) * local + 1

    def gradient(rank, step, x):
        g = problem.gradient(rank, step, x)
        if rank == 0 and step == when:
            g[CONV] = value
        return g

    for worker in cluster.workers:
        worker.gradient = gradient
    return cluster


def copied(cluster, rank=0):
    state = cluster.workers[rank].compressor.state_arrays()
    return {name: array.copy() for name, array in state.items()}


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_that_is_not_finite_enters_nothing_that_lasts(name, value):
    cluster = spoilt(name, value)
    replicas, is_local = cluster.plan.replicas, CASES[name].local_steps > 1
    for lr in RATES[: SPOILT_AT - 1]:
        cluster.step(lr)
    before = copied(cluster)
    this = cluster.step(RATES[SPOILT_AT - 1])
    for rank, worker in enumerate(cluster.workers):
        assert dict(worker.left_out) == ({0: 1} if rank < replicas else {}), "it struck, once"
    assert ((0, 0) in this.pushes) == is_local, "local steps before it, and after, are said"
    assert (0, 1) in this.pushes, "the other shard is said"
    if not is_local and cluster.workers[0].compressor.reads_first:
        after = copied(cluster)
        for key, array in before.items():
            if array.shape == (cluster.plan.layout.numel,) and cluster.workers[0].apply is None:
                assert array[:142].tobytes() == after[key][:142].tobytes(), key
    for lr in RATES[SPOILT_AT : SPOILT_AT + 3]:
        assert (0, 0) in cluster.step(lr).pushes
    states = [cluster.server.state_arrays(), *[worker.state() for worker in cluster.workers]]
    for key, array in [pair for state in states for pair in state.items()]:
        if not key.startswith("mine.choice."):
            assert np.isfinite(array).all(), key


@pytest.mark.parametrize("name", [n for n in NAMES if recipe_of(n, 4).direction.kind == "gradient"])
def test_what_stood_beside_a_spoilt_tensor_waits_in_the_residual(name):
    """Recipes that look at their payload afterwards: the other tensors of the shard are kept."""
    cluster = spoilt(name, np.nan)
    worker, gradients = cluster.workers[0], []
    if worker.compressor.reads_first or "residual" not in worker.compressor.state_arrays():
        assert name in {"dq-sgd", "fp32", "fp32-sgd"}, "nothing waits: there is no residual"
        return
    told = worker.gradient
    worker.gradient = lambda *given: gradients.append(told(*given)) or gradients[-1]
    for lr in RATES[: SPOILT_AT - 1]:
        cluster.step(lr)
    before = copied(cluster)["residual"]
    cluster.step(RATES[SPOILT_AT - 1])
    after = copied(cluster)["residual"]
    assert after[CONV].tobytes() == before[CONV].tobytes()
    np.testing.assert_allclose(after[BIAS], before[BIAS] + gradients[-1][BIAS], atol=1e-5)
    assert np.abs(gradients[-1][BIAS]).max() > 0.1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_server_refuses_payloads_that_say_something_not_finite(name, value):
    cluster, _ = started(name, workers_of(name))
    for shard in cluster.shards:
        for spec in cluster.plan.uplink_codecs(shard.index):
            codec = ShardCodec(get_codec(spec), shard)
            payload = np.zeros(codec.nbytes, np.uint8)
            codec.encode(np.ones(shard.numel, np.float32), payload)
            said = cluster.server._codecs.uplink(shard.index, codec.codec.wire_id)
            said.check(payload)
            payload[:4] = np.frombuffer(np.float32(value).tobytes(), np.uint8)
            with pytest.raises(RemotePayloadError):
                said.check(payload)


# ---- counted, in whole jobs


class Spots:
    """Tell apart four clouds of points in the plane; one batch of rank 0 is no number."""

    name = "spots"
    metric = "accuracy"

    def __init__(self, spoilt_at=-1):
        self.spoilt_at = spoilt_at

    def model(self, seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 4))

    def loss(self, model, batch):
        return functional.cross_entropy(model(batch[0]), batch[1])

    def batches(self, *, rank, world_size, batch_size, seed, start_step=0):
        del world_size
        step = start_step
        while True:
            rng = np.random.default_rng([seed, step, rank])
            labels = rng.integers(0, 4, batch_size)
            angle = labels * np.pi / 2
            places = np.stack([np.cos(angle), np.sin(angle)], 1) + 0.3 * rng.standard_normal(
                (batch_size, 2)
            )
            if rank == 0 and step == self.spoilt_at:
                places[0] = np.nan
            yield torch.from_numpy(places.astype(np.float32)), torch.from_numpy(labels)
            step += 1

    def evaluate(self, model):
        places, labels = next(self.batches(rank=9, world_size=1, batch_size=100, seed=99))
        with torch.no_grad():
            return {"accuracy": float((model(places).argmax(1) == labels).float().mean())}


def job(name, **changes):
    """A simulated job of four workers and six rounds."""
    recipe = recipe_of(name, 4)
    steps = 6 * recipe.direction.local_steps
    made = SimConfig(task=Spots(), recipe=recipe, workers=4, steps=steps, batch_size=4, lr=0.01)
    return simulate(dataclasses.replace(made, **changes))


@pytest.mark.parametrize("name", NAMES)
def test_a_spoilt_step_and_spoilt_payloads_are_counted_and_the_job_goes_on(name):
    replicas = 2 if name == "coded" else 1
    spoilt_at = 2 * recipe_of(name, 4).direction.local_steps
    left_out = job(name, task=Spots(spoilt_at))
    assert left_out.skipped == replicas
    lied_to = job(name, attack=Attack("nan", 1))
    assert lied_to.rejected >= 6
    for result in (left_out, lied_to):
        assert result.rounds == 6
        assert all(np.isfinite(array).all() for array in result.weights.values())
