"""How each recipe is run here: a small problem, and options for all kinds of rounds to come soon.

A recipe is known by its name in PRESETS. One without a `Case` fails `test_reference`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field

import numpy as np
from reference.common import Job

from battery.cluster import SECRET, Cluster, cuts
from psq.codec import ShardCodec, get_codec
from psq.groups import DEFAULT_GROUP, Group
from psq.plan import Plan
from psq.presets import preset
from psq.rules.dithered import _USE, _uniform
from psq.rules.private import _Noise
from psq.seeds import stream_seed

__all__ = ["CASES", "Case", "Problem", "job_of", "plan_of", "quantizer", "recipe_of"]

# Two groups are two shards, the first of two segments; "table" is longer than a block.
SPECS = (("bias", (37,)), ("conv", (3, 5, 7)), ("table", (2, 550)))
GROUPS = (DEFAULT_GROUP, Group("tables"))
MEMBERS = (0, 0, 1)


@dataclass(frozen=True)
class Case:
    """How a recipe is run.

    Attributes:
        options: what is set.
        theta: of its Adam.
        local_steps: of a worker, where the recipe has them.
        settings: what its reference is told besides.
        faulty: it has an option f, aggregate.f: as many as so many workers allow.
        worlds: numbers of workers with data of their own.
        bound: what its weights may differ from the reference's, over the largest; 0: not a bit.
        why: a bound over 0 has a reason.
    """

    options: tuple[str, ...] = ()
    theta: float = 0.999
    local_steps: int = 0
    settings: dict = field(default_factory=dict)
    faulty: bool = False
    worlds: tuple[int, ...] = (1, 3)
    bound: float = 0.0
    why: str = ""


SHARED = ("uplink.choice.first=3", "uplink.choice.period=8")
CASES = {
    "server-adam": Case(),
    "qadam": Case(),
    "qadam-1bit": Case(),
    "local-adam": Case(local_steps=3, settings={"steps": 3}),
    "efficient-adam": Case(),
    "server-amsgrad": Case(theta=0.5, settings={"theta": 0.5}),  # so that v falls now and then
    "shared-adam": Case(SHARED, settings={"first": 3, "period": 8}),
    "shared-direction": Case(SHARED, settings={"first": 3, "period": 8}),
    "onebit-adam": Case(("uplink.choice.steps=12",), settings={"steps": 12}),
    "diloco": Case(local_steps=3, settings={"steps": 3}),
    "coded": Case(),
    "fp32": Case(),
    "ef-sgd": Case(),
    "dist-ef-sgdm": Case(),
    "ef21": Case(),
    "sto-sign": Case(),
    "sto-sign-ef": Case(),
    "dp-sign": Case(
        ("direction.clip=20.0", "direction.sigma=0.5"), settings={"clip": 20.0, "sigma": 0.5}
    ),
    "sign-majority": Case(),
    "dist-lion": Case(),
    "dq-sgd": Case(),
    "dqgan": Case(),
    "kardam": Case(
        ("uplink.error_feedback=true",),  # so that what is refused is seen to come back
        faulty=True,
        worlds=(1, 3, 4),
        bound=1e-3,
        why="lengths are summed in another order, messages shortened by them: 8 bits may differ",
    ),
    "average": Case(),
    "fp32-sgd": Case(),
}


def tolerated(workers):
    """How many faulty workers 3 f + 1 of them can bear."""
    return (workers - 1) // 3


def settings_of(name, workers):
    """What a recipe's reference is told besides the job."""
    case = CASES[name]
    return {**case.settings, "f": tolerated(workers)} if case.faulty else case.settings


def recipe_of(name, workers):
    """A recipe as its case has it."""
    case = CASES[name]
    faulty = (f"aggregate.f={tolerated(workers)}",) if case.faulty else ()
    recipe = preset(name).with_options(*case.options, *faulty)
    recipe = recipe.with_adam(theta=case.theta) if recipe.adam else recipe
    return recipe.with_rhythm(local_steps=case.local_steps) if case.local_steps else recipe


def plan_of(recipe, workers, **job):
    """A job of so many workers with data of their own, over several shards."""
    replicas = 2 if recipe.aggregate.kind == "coded" else 1
    job = {"groups": GROUPS, "members": MEMBERS, **job}
    return Plan.of(SPECS, recipe, workers * replicas, **job)


class Problem:
    """Quadratics, one for each worker, of curvatures that differ; and noise.

    Some values have next to no gradient, as where a unit of a network is off.
    """

    def __init__(self, numel, workers, seed=0):
        rng = np.random.default_rng(seed)
        self.x = rng.normal(0, 0.5, numel).astype(np.float32)
        self.targets = rng.standard_normal((workers, numel)).astype(np.float32)
        self.curves = np.exp(rng.uniform(-1.0, 1.0, numel)).astype(np.float32)
        self.loud = np.where(rng.random(numel) < 0.05, np.float32(1e-6), np.float32(1.0))
        self.seed = seed

    def gradient(self, rank, step, x):
        """As a worker computes it."""
        rng = np.random.default_rng([self.seed, rank, step])
        noise = rng.standard_normal(x.size, np.float32)
        return self.loud * (self.curves * (x - self.targets[rank]) + np.float32(0.3) * noise)


RATES = (0.004, 0.008, 0.016, 0.016, 0.016, *[0.016 * 0.97**t for t in range(27)])


def quantizer(plan, specs_of, seed=None):
    """What codecs leave of a flat vector: see `reference.common.Job`."""
    shards = plan.layout.shards

    def through(values, *, marked=False, bits=None, rank=0, step=1):
        out = np.empty_like(values)
        for shard in shards:
            specs = specs_of(shard.index)
            spec = specs[1] if marked else specs[0]
            if bits is not None:
                spec = next(s for s in specs if get_codec(s).bits == bits[shard.index])
            codec, at = (
                ShardCodec(get_codec(spec), shard),
                slice(shard.offset, shard.offset + shard.numel),
            )
            payload = np.empty(codec.nbytes, np.uint8)
            stream = stream_seed(seed or 0, rank, step - 1, shard.index)
            codec.encode(np.ascontiguousarray(values[at]), payload, seed=stream)
            codec.decode(payload, out[at])
        return out

    return through


def noise_of(plan, seed=0):
    """The noise of a recipe that has some, as its workers draw it."""
    shards, kind = plan.layout.shards, plan.recipe.direction.kind
    secrets = [_Noise(SECRET + rank) for rank in range(plan.world_size)]

    def uniform(rank, step):
        parts = [
            _uniform(stream_seed(seed, rank, step - 1, s.index, _USE), s.numel) for s in shards
        ]
        return np.concatenate(parts)

    def normal(rank, step):
        del step  # a worker's next
        return np.concatenate([secrets[rank].draw(shard.numel) for shard in shards])

    return {"dithered": uniform, "gaussian": normal}.get(kind)


def job_of(plan, problem, rates, seed=0):
    """The same job for the reference."""
    layers, tensors = cuts(plan)
    return Job(
        x=problem.x.copy(),
        workers=plan.data_world_size,
        gradient=problem.gradient,
        rates=rates,
        up=quantizer(plan, plan.uplink_codecs, seed),
        down=quantizer(plan, plan.downlink_codecs, seed),
        layers=layers,
        tensors=tensors,
        noise=noise_of(plan, seed),
    )


def reference_of(name):
    """The module of a recipe in tests/reference."""
    return importlib.import_module(f"reference.{name.replace('-', '_')}")


def started(name, workers, **job):
    """A cluster of a recipe at its problem, and the problem."""
    plan = plan_of(recipe_of(name, workers), workers, **job)
    problem = Problem(plan.layout.numel, plan.data_world_size)
    return Cluster(plan, problem.x, problem.gradient), problem


__all__ += ["RATES", "noise_of", "reference_of", "settings_of", "started"]
