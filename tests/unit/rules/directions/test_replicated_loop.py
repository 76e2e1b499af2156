"""Recipes whose state all nodes hold, worker to server and back, beside a few lines of NumPy.

The lines below are the recipes as their papers' readers would write them: no shards, no payloads,
C(x) for what a codec makes of x.
"""

import numpy as np
import pytest

from psq.codec import ShardCodec, get_codec
from psq.feedback import Compressor
from psq.plan import Plan
from psq.presets import preset
from psq.recipe import AdamConfig
from psq.rules import make_apply
from psq_server.reduce import Reducer
from psq_server.state import Pushed

NUMEL, WORKERS, LR, ROUNDS = 300, 2, 0.05, 40
BETA, THETA, EPS, FLOOR = 0.9, 0.99, 1e-8, 1e-3
ADAM = AdamConfig(beta=BETA, theta=THETA, eps=EPS)
GRID = np.random.default_rng(1)
TARGETS = GRID.standard_normal((WORKERS, NUMEL)).astype(np.float32)
SIZES = GRID.uniform(-1.0, 1.0, NUMEL)


def gradients_of(spread):
    """Of quadratics whose curvatures differ by a factor of up to exp(2 spread)."""
    curves = np.exp(spread * SIZES).astype(np.float32)
    return lambda rank, x: (curves * (x - TARGETS[rank])).astype(np.float32)


def codec(spec):
    """C(x) of a codec."""
    used = get_codec(spec)

    def through(x):
        payload, out = np.empty(used.nbytes(x.size), np.uint8), np.empty(x.size, np.float32)
        used.encode(np.asarray(x, np.float32), payload)
        used.decode(payload, out)
        return out

    return through


def shared_direction(recipe, gradient):
    usual, marked = codec(recipe.uplink.codec), codec(recipe.uplink.choice.codecs("sign")[1])
    down = codec(recipe.downlink.codec)
    first, period = (dict(recipe.uplink.choice.options)[name] for name in ("first", "period"))
    x = v = s = d = server_e = np.zeros(NUMEL, np.float32)
    e, last = [np.zeros(NUMEL, np.float32)] * WORKERS, 0
    for t in range(1, ROUNDS + 1):
        g = [gradient(rank, x) for rank in range(WORKERS)]
        if t <= first or t % period == 0:
            mean = marked(np.mean([marked(each) for each in g], axis=0))
            weight = THETA ** (t - last)
            v = weight * v + (1 - weight) * mean**2
            root = np.sqrt(v / (1 - THETA**t))
            new = np.maximum(root + EPS, FLOOR * np.sqrt(np.mean(root**2)))
            factor = s / new if last else 1.0
            e, server_e, s, last = [factor * each for each in e], factor * server_e, new, t
            d = BETA * factor * d + (1 - BETA) * mean / s
        else:
            c = [BETA * d + (1 - BETA) * g[i] / s + e[i] for i in range(WORKERS)]
            said = [usual(each) for each in c]
            e = [c[i] - said[i] for i in range(WORKERS)]
            z = np.mean(said, axis=0) + server_e
            d = down(z)
            server_e = z - d
        x = x - LR * d / (1 - BETA**t)
    return x


def onebit_adam(recipe, gradient):
    usual, down = codec(recipe.uplink.codec), codec(recipe.downlink.codec)
    steps = dict(recipe.uplink.choice.options)["steps"]
    x = m = v = server_e = np.zeros(NUMEL, np.float32)
    e = [np.zeros(NUMEL, np.float32)] * WORKERS
    for t in range(1, ROUNDS + 1):
        g = [gradient(rank, x) for rank in range(WORKERS)]
        if t <= steps:
            mean = np.mean(g, axis=0)
            m, v = BETA * m + (1 - BETA) * mean, THETA * v + (1 - THETA) * mean**2
            root = np.sqrt(v / (1 - THETA**t)) + EPS
            floor = FLOOR * np.sqrt(np.mean(v / (1 - THETA**t)))
        else:
            c = [BETA * m + (1 - BETA) * g[i] + e[i] for i in range(WORKERS)]
            said = [usual(each) for each in c]
            e = [c[i] - said[i] for i in range(WORKERS)]
            z = np.mean(said, axis=0) + server_e
            m = down(z)
            server_e = z - m
            root = np.maximum(root, floor)
        x = x - LR * (m / (1 - BETA**t)) / root
    return x


class Node:
    """A worker: what it says, and its replica of weights and state."""

    def __init__(self, plan, rank, gradient):
        self.plan, self.rank, self.gradient = plan, rank, gradient
        self.compressor = Compressor(plan, rank)
        self.rule = make_apply(plan.recipe, layout=plan.layout, world_size=WORKERS)
        self.x = np.zeros(NUMEL, np.float32)

    def push(self, t):
        payload = np.empty(self.compressor.nbytes(0), np.uint8)
        shared = {name: self.rule.of(name, 0) for name in self.rule.state_arrays()}
        g = [self.gradient(self.rank, self.x)]
        used = self.compressor.codec(
            0, self.compressor.compress(0, g, LR, payload, t=t, shared=shared)
        )
        return Pushed(self.rank, memoryview(payload[: used.nbytes]), used.codec.wire_id)

    def take(self, t, answer):
        specs = {get_codec(spec).wire_id: spec for spec in self.plan.downlink_codecs(0)}
        change = np.empty(NUMEL, np.float32)
        used = ShardCodec(get_codec(specs[answer.wire_id]), self.plan.layout.shards[0])
        used.decode(answer.body, change)
        self.rule.advance(0, t, answer.rate)
        self.rule.write(0, change, self.x)
        self.x -= change
        factor = self.rule.rescale(0)
        if factor is not None:
            self.compressor.rescale(0, factor)


@pytest.mark.parametrize(
    ("name", "reference", "choice", "spread"),
    [  # sign momentum over a frozen v diverges at a spread of 4: a sign has one size for all
        ("shared-direction", shared_direction, {"first": 4, "period": 8}, 4.0),
        ("onebit-adam", onebit_adam, {"steps": 12}, 0.5),
    ],
)
def test_worker_and_server_do_what_a_few_lines_of_numpy_do(name, reference, choice, spread):
    gradient = gradients_of(spread)
    given = [f"uplink.choice.{key}={value}" for key, value in choice.items()]
    recipe = preset(name, ADAM).with_options(*given)
    plan = Plan.of([("x", (NUMEL,))], recipe, WORKERS)
    server, nodes = Reducer(plan), [Node(plan, rank, gradient) for rank in range(WORKERS)]
    server.init(0, 0, np.zeros(NUMEL, np.float32))
    for t in range(1, ROUNDS + 1):
        answer = server.step(0, [node.push(t) for node in nodes], LR)
        assert answer.kind == "mean"
        for node in nodes:
            node.take(t, answer)
    assert nodes[0].x.tobytes() == nodes[1].x.tobytes() == server.weights()["x"].tobytes()
    np.testing.assert_allclose(nodes[0].x, reference(recipe, gradient), atol=2e-4)
    goal = TARGETS.mean(axis=0)
    assert np.abs(nodes[0].x - goal).mean() < 0.5 * np.abs(goal).mean()
