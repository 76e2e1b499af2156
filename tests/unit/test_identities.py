"""Workers and a server composed in one process, through real codecs: laws that quantization keeps.

Tolerances are those of float32 addition: a few ulp of the largest value that was added, per step.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from psq import kernels
from psq.codec import ShardCodec, get_codec
from psq.feedback import Compressor
from psq.layout import PART_NUMEL
from psq.optim import Adam
from psq.plan import Plan
from psq.presets import preset
from psq.recipe import AdamConfig
from psq_server.reduce import Reducer

SPECS = [("conv", (30, 7, 5, 5)), ("bias", (30,)), ("table", (500, 570)), ("head", (3, 3))]
LR = 1e-3
EPS32 = float(np.finfo(np.float32).eps)
UPLINKS = ["sign", "log:k=6,block=256", "uniform:bits=4", "lloyd-max:bits=2", "bf16", "fp32"]
STOCHASTIC = "uniform:bits=4,stochastic=true"


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread():
    """Vectors of a few thousand values: a second thread of torch only waits, and slowly."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_plan(recipe="server-adam", world_size=2, adam=None, specs=SPECS, **codecs):
    return Plan.of(specs, preset(recipe, adam).with_codecs(**codecs), world_size)


class Cluster:
    """A server, its workers, and the replica of the weights that each worker holds."""

    def __init__(self, plan, seed=0):
        self.plan, self.layout = plan, plan.layout
        self.reducer = Reducer(plan, seed=seed)
        self.workers = [Compressor(plan, rank, seed=seed) for rank in range(plan.world_size)]
        self.uplinks = [ShardCodec(get_codec(plan.recipe.uplink.codec), s) for s in self.shards]
        self.downlinks = [ShardCodec(get_codec(plan.recipe.downlink.codec), s) for s in self.shards]
        start = np.random.default_rng(1).normal(0, 0.1, self.layout.numel).astype(np.float32)
        for shard in self.shards:
            values = self.of(start, shard)
            for part, at in enumerate(range(0, shard.numel, PART_NUMEL)):
                self.reducer.init(shard.index, part, values[at : at + PART_NUMEL].tobytes())
        self.replicas = [self.full() for _ in self.workers]
        self.said = [np.zeros(self.layout.numel, np.float32) for _ in self.workers]

    @property
    def shards(self):
        return self.layout.shards

    @staticmethod
    def of(array, shard):
        return array[shard.offset : shard.offset + shard.numel]

    @property
    def x(self):
        return self.reducer.state_arrays()["x"]

    def residual(self, rank):
        return self.workers[rank].state_arrays().get("residual", np.zeros(self.layout.numel))

    def full(self):
        """What a worker that joins now gets."""
        out = np.empty(self.layout.numel, np.float32)
        for shard in self.shards:
            body = b"".join(part.tobytes() for part in self.reducer.full(shard.index).parts)
            if self.plan.recipe.downlink.kind == "delta":
                self.of(out, shard)[:] = np.frombuffer(body, np.float32)
            else:
                self.downlinks[shard.index].decode(body, self.of(out, shard))
        return out

    def push(self, rank, shard, gradient, lr=LR):
        flat, weights = self.of(gradient, shard), self.of(self.replicas[rank], shard)
        cuts = [slice(s.offset, s.offset + s.numel) for s in shard.segments]
        worker, payload = self.workers[rank], bytearray(self.uplinks[shard.index].nbytes)
        worker.compress(
            shard.index, [flat[c] for c in cuts], lr, payload, weights=[weights[c] for c in cuts]
        )
        return payload

    def step(self, gradients, lr=LR):
        """One round. gradients: f32[numel] per rank, None for a rank that skips."""
        for shard in self.shards:
            payloads = []
            for rank, gradient in enumerate(gradients):
                if gradient is not None:
                    payloads.append(self.push(rank, shard, gradient, lr))
                    self.reducer.check(shard.index, payloads[-1])
                    said = np.empty(shard.numel, np.float32)
                    self.uplinks[shard.index].decode(payloads[-1], said)
                    self.of(self.said[rank], shard)[:] = said
            self.broadcast(shard, self.reducer.reduce(shard.index, payloads, lr))

    def broadcast(self, shard, payload):
        codec = self.downlinks[shard.index]
        delta = self.plan.recipe.downlink.kind == "delta"
        for replica in self.replicas:
            (codec.decode_add if delta else codec.decode)(payload, self.of(replica, shard))


def random_gradients(cluster, step, scale=1.0):
    rng = np.random.default_rng([7, step])
    shape = (len(cluster.workers), cluster.layout.numel)
    return list((rng.standard_normal(shape) * scale).astype(np.float32))


# ---- nothing is lost


@pytest.mark.parametrize("uplink", [*UPLINKS, STOCHASTIC])
def test_the_sum_of_pushes_and_the_residual_is_the_sum_of_gradients(uplink):
    steps, cluster = 12, Cluster(make_plan(uplink=uplink, world_size=2))
    said, meant = np.zeros((2, 2, cluster.layout.numel))
    largest = 0.0
    for step in range(steps):
        gradients = random_gradients(cluster, step)
        cluster.step(gradients)
        said += cluster.said
        meant += gradients
        largest = max(largest, np.abs(cluster.said).max())
    for rank in range(2):
        total = said[rank] + cluster.residual(rank)
        assert np.abs(total - meant[rank]).max() <= steps * EPS32 * largest


@pytest.mark.parametrize(
    "uplink", ["log:k=6,block=256", "uniform:bits=4", "uniform:bits=8", "fp32"]
)
def test_one_push_and_its_rest_are_the_float32_sum_exactly(uplink):
    cluster = Cluster(make_plan(uplink=uplink, world_size=1))
    for step in range(4):
        before = cluster.residual(0).copy()
        (gradient,) = random_gradients(cluster, step)
        cluster.step([gradient])
        total = cluster.said[0].astype(np.float64) + cluster.residual(0)
        assert np.array_equal(total, gradient + before)


@pytest.mark.parametrize("uplink", UPLINKS)
def test_the_sum_of_pushes_and_the_residual_is_the_sum_of_adams_directions(uplink):
    steps, cluster = 12, Cluster(make_plan("efficient-adam", world_size=1, uplink=uplink))
    adam, out = Adam(AdamConfig(), cluster.layout.numel), np.empty(cluster.layout.numel, np.float32)
    said, meant = np.zeros((2, cluster.layout.numel))
    for step in range(steps):
        (gradient,) = random_gradients(cluster, step)
        cluster.step([gradient])
        adam.direction(gradient, LR, out)
        said += cluster.said[0]
        meant += out
    assert np.abs(said + cluster.residual(0) - meant).max() <= steps * EPS32 * 20 * LR


def test_a_rejected_push_is_said_later():
    cluster = Cluster(make_plan(uplink="sign", world_size=1))
    said, meant = np.zeros((2, cluster.layout.numel))
    for step in range(6):
        (gradient,) = random_gradients(cluster, step)
        meant += gradient
        if step % 2:
            cluster.step([gradient])
            said += cluster.said[0]
            continue
        for shard in cluster.shards:  # the server says no to all of it
            cluster.workers[0].restore(shard.index, cluster.push(0, shard, gradient))
    assert np.abs(said + cluster.residual(0) - meant).max() <= 1e-4


# ---- where the weights would be without codecs


WORKER_MOMENTS = {
    "qadam": {},
    "qadam-1bit": {},
    "efficient-adam": {},
    "efficient-adam-sign": {"uplink": "sign", "downlink": "delta:sign"},
}


@pytest.mark.parametrize("name", WORKER_MOMENTS)
def test_the_weights_less_what_is_unsaid_move_by_the_mean_direction(name):
    """y = x + e_server - mean e_worker obeys y' = y - mean u."""
    recipe = name.removesuffix("-sign")
    plan = make_plan(recipe, world_size=3, **WORKER_MOMENTS[name])
    cluster, config = Cluster(plan), plan.recipe.adam
    adams = [Adam(config, cluster.layout.numel, workers=3) for _ in range(3)]
    out = np.empty(cluster.layout.numel, np.float32)

    def unsaid():
        mine = cluster.reducer.state_arrays().get("residual", 0.0)
        theirs = np.mean([cluster.residual(rank).astype(np.float64) for rank in range(3)], axis=0)
        return cluster.x.astype(np.float64) + mine - theirs

    for step in range(8):
        y, gradients = unsaid(), random_gradients(cluster, step)
        mean = np.zeros(cluster.layout.numel)
        for adam, gradient in zip(adams, gradients, strict=True):
            adam.direction(gradient, LR, out)
            mean += out.astype(np.float64) / 3
        cluster.step(gradients)
        assert np.abs(unsaid() - (y - mean)).max() <= 4 * EPS32 * np.abs(cluster.x).max()


def test_a_round_some_ranks_skip_moves_by_the_mean_of_the_others():
    cluster = Cluster(make_plan("qadam", world_size=3, uplink="fp32"))
    before, gradients = cluster.x.copy(), random_gradients(cluster, 0)
    adams = [Adam(AdamConfig(), before.size) for _ in range(2)]
    out = np.empty((2, before.size), np.float32)
    for adam, gradient, u in zip(adams, gradients[1:], out, strict=True):
        adam.direction(gradient, LR, u)
    cluster.step([None, *gradients[1:]])
    expected = before - (out[0] + out[1]) * np.float32(0.5)
    assert cluster.x.tobytes() == expected.tobytes()
    assert not cluster.workers[0].state_arrays()["m"].any()


# ---- everybody holds the same weights


DOWNLINKS = ["delta:sign", "delta:log:k=2", "delta:uniform:bits=4,stochastic=true", "delta:fp32"]


@pytest.mark.parametrize("downlink", DOWNLINKS)
@pytest.mark.parametrize("recipe", ["server-adam", "qadam-1bit"])
def test_replicas_of_a_delta_job_are_the_servers_weights_to_the_byte(recipe, downlink):
    cluster = Cluster(make_plan(recipe, downlink=downlink))
    for step in range(6):
        gradients = random_gradients(cluster, step)
        cluster.step([None, None] if step == 3 else gradients)
        assert {r.tobytes() for r in cluster.replicas} == {cluster.x.tobytes()}
        assert cluster.full().tobytes() == cluster.x.tobytes()


@pytest.mark.parametrize("codec", ["uniform:bits=8", STOCHASTIC, "bf16", "fp32"])
def test_replicas_of_a_weights_job_are_the_servers_image_to_the_byte(codec):
    cluster = Cluster(make_plan("qadam", downlink=f"weights:{codec}"))
    assert {r.tobytes() for r in cluster.replicas} == {cluster.full().tobytes()}
    for step in range(4):
        cluster.step(random_gradients(cluster, step))
        assert {r.tobytes() for r in cluster.replicas} == {cluster.full().tobytes()}
    if codec == "fp32":
        assert cluster.full().tobytes() == cluster.x.tobytes()


RECIPES = ["server-adam", "qadam", "qadam-1bit", "efficient-adam", "fp32"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_runs_of_one_seed_are_equal_to_the_byte_on_any_kernel_level(recipe):
    levels = [kernels.available()[0], *kernels.available()]
    results = set()
    for level in levels:
        with kernels.use(level):
            cluster = Cluster(make_plan(recipe, adam=AdamConfig(weight_decay=0.01)))
            for step in range(4):
                cluster.step(random_gradients(cluster, step))
        results.add(cluster.x.tobytes() + cluster.replicas[0].tobytes())
    assert len(results) == 1


def test_another_seed_is_another_run_where_codecs_draw_numbers():
    plan = make_plan(uplink=STOCHASTIC)
    results = []
    for seed in (3, 3, 4):
        cluster = Cluster(plan, seed=seed)
        cluster.step(random_gradients(cluster, 0))
        results.append(cluster.x.tobytes())
    assert results[0] == results[1] != results[2]


# ---- without loss it is Adam


@pytest.mark.parametrize("recipe", ["fp32", "worker-moments"])
@pytest.mark.parametrize(
    "config",
    [AdamConfig(), AdamConfig(amsgrad=True), AdamConfig(weight_decay=0.05)],
    ids=["adam", "amsgrad", "adamw"],
)
def test_one_worker_without_loss_is_torchs_adam(recipe, config):
    """300 steps on the same gradients: 16 ulp of the largest |x| of each value, 64 with decay."""
    if recipe == "fp32":
        plan = make_plan("fp32", 1, config, specs=[("w", (50, 30)), ("b", (7,))])
    else:
        dense = {"uplink": "fp32", "downlink": "weights:fp32"}
        plan = make_plan("qadam", 1, config, specs=[("w", (50, 30)), ("b", (7,))], **dense)
    cluster = Cluster(plan)
    parameter = torch.nn.Parameter(torch.from_numpy(cluster.x.copy()))
    kind = torch.optim.AdamW if config.weight_decay else torch.optim.Adam
    optimizer = kind([parameter], lr=LR, weight_decay=config.weight_decay, amsgrad=config.amsgrad)
    size = np.abs(cluster.x)
    for step in range(300):
        (gradient,) = random_gradients(cluster, step)
        parameter.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
        cluster.step([gradient])
        size = np.maximum(size, np.abs(cluster.x))
    distance = np.abs(cluster.replicas[0].astype(np.float64) - parameter.detach().numpy())
    bound = 64 if config.weight_decay else 16
    assert np.max(distance / np.spacing(size)) <= bound


class LeastSquares:
    """Noisy linear regression: a batch is rows of features and targets."""

    def __init__(self, numel, seed=5):
        rng = np.random.default_rng(seed)
        self.features = rng.standard_normal((4096, numel)).astype(np.float32)
        self.targets = (self.features @ rng.standard_normal(numel)).astype(np.float32)

    def gradient(self, x, rows):
        features, targets = self.features[rows], self.targets[rows]
        return (features.T @ (features @ x - targets) / len(rows)).astype(np.float32)

    def loss(self, x):
        return float(np.mean((self.features @ x - self.targets) ** 2))


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_with_a_share_of_the_batch_are_one_worker_with_all_of_it(workers):
    """Gradients are evaluated at each cluster's own weights; 100 steps apart by 1e-5 of a step."""
    specs = [("w", (100,))]
    problem = LeastSquares(100)
    many = Cluster(make_plan("fp32", workers, specs=specs))
    one = Cluster(make_plan("fp32", 1, specs=specs))
    rng = np.random.default_rng(3)
    for _ in range(100):
        rows = rng.integers(0, 4096, 32 * workers)
        shares = np.split(rows, workers)
        pairs = zip(many.replicas, shares, strict=True)
        many.step([problem.gradient(x, share) for x, share in pairs], lr=0.01)
        one.step([problem.gradient(one.replicas[0], rows)], lr=0.01)
    assert np.abs(many.x - one.x).max() <= 1e-5
    assert problem.loss(one.x) < 0.5 * problem.loss(np.zeros(100, np.float32))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_solves_least_squares(recipe):
    problem = LeastSquares(100)
    cluster = Cluster(make_plan(recipe, 2, specs=[("w", (100,))]))
    rng = np.random.default_rng(3)
    for step in range(600):
        shares = np.split(rng.integers(0, 4096, 64), 2)
        lr = 0.03 * (1 - step / 600)
        pairs = zip(cluster.replicas, shares, strict=True)
        cluster.step([problem.gradient(x, share) for x, share in pairs], lr=lr)
    assert problem.loss(cluster.replicas[0]) < 0.02 * problem.loss(np.zeros(100, np.float32))


def test_corrected_worker_moments_step_like_adam_on_the_whole_batch():
    """8 workers, noise 3 times the mean: the mean update is as long as Adam's on the mean gradient.

    Without the correction it is shorter by about sqrt((1 + 9) / (1 + 9/8)) = 2.2.
    """
    workers, numel, lengths = 8, 2000, {}
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((400, workers, numel)).astype(np.float32) * 3 + 1
    for corrected in (False, True):
        config = AdamConfig(theta=0.99, variance_correction=corrected)
        plan = make_plan(
            "qadam",
            workers,
            config,
            specs=[("w", (numel,))],
            uplink="fp32",
            downlink="weights:fp32",
        )
        cluster = Cluster(plan)
        adam, out = Adam(AdamConfig(theta=0.99), numel), np.empty(numel, np.float32)
        ratios = []
        for step, gradients in enumerate(noise):
            before = cluster.x.copy()
            cluster.step(list(gradients))
            adam.direction(gradients.mean(0), LR, out)
            if step >= 200:
                ratios.append(np.linalg.norm(before - cluster.x) / np.linalg.norm(out))
        lengths[corrected] = float(np.mean(ratios))
    assert lengths[True] == pytest.approx(1.0, abs=0.05)
    assert lengths[False] == pytest.approx(1 / 2.2, abs=0.05)
