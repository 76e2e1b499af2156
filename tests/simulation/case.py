"""What a seed means: the job, and which faults may strike it, and how often.

A case is drawn from its seed alone; options of the command replace single choices, so that a fault
can be looked at by itself. Faults strike before `calm_s`; after that the job must come to an end.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, Final

from psq.groups import DEFAULT_GROUP, Group
from psq.plan import Plan
from psq.presets import preset
from psq.recipe import Aggregate
from psq_server.state.events import LOGGED

__all__ = ["Case", "plan_of", "view_of"]

SHARD_NUMEL: Final = 2
"""A shard is two numbers: its value, and the sum of the tickets of all that made it."""

CONSISTENCIES: Final = (
    *("bsp",) * 6,
    *("bsp,quorum=1,mads=1", "bsp,quorum=2", "ssp:1", "ssp:2,quorum=2", "asp"),
)


REPLAYS: Final = 0.2
"""How many of the jobs that keep every round leave the payloads to their workers."""


@dataclass(frozen=True, slots=True)
class Case:
    """One job and its faults.

    Attributes:
        seed: all else that is drawn follows from it.
        workers, servers, shards, rounds: the job's size.
        consistency: see `psq.clock`.
        every: in how many rounds a shard has its turn.
        downlink: "delta", or "weights" in full.
        judged: whether rounds are judged, and some contributions refused.
        skips: whether workers have nothing to say at times.
        min_workers: rounds go on without lost workers, with so many at least; 0: they wait.
        compute_s, say_s: how long a step takes, about, and from one shard to the next at most.
        copies: how likely a worker's own copy of what goes with a checkpoint can be written.
        data: how many indices an epoch has, that are handed out; 0: none are.
        own_order: each worker says a step's shards in an order of its own.
        slow: which worker takes ten times as long; -1: none.
        calm_s: when the last fault has struck.
        cuts, flips, doubles, holds, jumps, stalls: how often, in a run, a connection breaks, a bit
            of a frame flips, a frame comes twice, nothing passes one way, a clock jumps, and a
            worker reads nothing.
        worker_crashes, server_crashes: how often these die, and are started again.
        takeovers: how often a worker hangs, another takes its rank, and the first wakes up.
        keeps: how likely a worker that died finds what it had kept.
        disk_errors, slow_disks: how often the disk refuses, or takes long, for a while.
        rot: how likely a server that died finds its newest checkpoint rotten.
        durability: "journal", "checkpoint", "replay" (where workers that die would take along what
            a server may ask for: none do then) or "off".
        checkpoint_every: rounds from one checkpoint to the next; 0: there is only the first.
    """

    seed: int
    workers: int = 2
    servers: int = 1
    shards: int = 2
    rounds: int = 5
    consistency: str = "bsp"
    every: int = 1
    downlink: str = "delta"
    judged: bool = False
    skips: bool = False
    min_workers: int = 0
    compute_s: float = 0.1
    say_s: float = 0.002
    slow: int = -1
    calm_s: float = 4.0
    cuts: int = 0
    flips: int = 0
    doubles: int = 0
    holds: int = 0
    jumps: int = 0
    stalls: int = 0
    worker_crashes: int = 0
    server_crashes: int = 0
    takeovers: int = 0
    keeps: float = 0.0
    disk_errors: int = 0
    slow_disks: int = 0
    rot: float = 0.0
    durability: str = "off"
    checkpoint_every: int = 0
    copies: float = 0.0
    own_order: bool = False
    data: int = 0

    @classmethod
    def of(
        cls, seed: int, given: Mapping[str, Any] | None = None, *, as_at_first: bool = False
    ) -> Case:
        """The case of a seed, with some choices replaced.

        Args:
            seed: see the class.
            given: the choices.
            as_at_first: without what was thought of later, see `_later`.
        """
        drawn = _draw(seed) if as_at_first else _later(_draw(seed))
        if not as_at_first and "durability" not in (given or {}):
            drawn = _leave_payloads(drawn)
        if not given:
            return drawn
        case = replace(drawn, **given)
        plain = case.servers == 1 and case.consistency == "bsp"
        case = _spare_workers(case)
        return replace(
            case,
            every=case.every if case.consistency == "bsp" else 1,
            judged=case.judged and plain,
            min_workers=case.min_workers if case.servers == 1 else 0,
            data=case.data if case.gives_data else 0,
        )

    @property
    def is_logged(self) -> bool:
        """Whether nobody hears of a round before it is on disk."""
        return self.durability in LOGGED

    @property
    def gives_data(self) -> bool:
        """Whether every contribution that says anything says something to server 0."""
        return not self.skips and (self.every == 1 or self.consistency != "bsp")

    @property
    def whole(self) -> bool:
        """Whether rounds close as a whole, rather than shard by shard."""
        return self.judged or self.consistency != "bsp"

    def difference(self) -> str:
        """What makes this case another one than its seed's, as options of the command."""
        drawn = _leave_payloads(_later(_draw(self.seed)))
        return " ".join(
            f"--set {field.name}={getattr(self, field.name)}"
            for field in fields(self)
            if getattr(self, field.name) != getattr(drawn, field.name)
        )


def _draw(seed: int) -> Case:
    rng = random.Random(seed)  # noqa: S311 - a simulation
    consistency = rng.choice(CONSISTENCIES)
    workers = rng.choice((2, 2, 2, 3))
    servers = rng.choice((1, 1, 1, 2))
    every = rng.choice((1, 1, 1, 1, 2)) if consistency == "bsp" else 1
    judged = servers == every == 1 and rng.random() < 0.2
    case = Case(
        seed=seed,
        workers=workers,
        servers=servers,
        shards=max(rng.choice((2, 2, 3)), servers * every),
        rounds=rng.randint(4, 6),
        consistency=consistency,
        every=every,
        downlink=rng.choice(("delta", "delta", "weights")),
        judged=judged,
        skips=rng.random() < 0.2,
        slow=rng.choice((-1, -1, -1, 0, 1)),
        say_s=rng.choice((0.002, 0.002, 0.1)),
        min_workers=rng.choice((0, 0, 0, 0, 1, workers - 1)) if servers == 1 else 0,
    )
    return replace(case, **_faults(rng))


def _spare_workers(case: Case) -> Case:
    """Where a worker's memory is part of what is kept, workers live, and checkpoints last."""
    if case.durability != "replay":
        return case
    return replace(case, worker_crashes=0, takeovers=0, rot=0.0, min_workers=0, copies=0.0)


def _later(case: Case) -> Case:
    """What was thought of later, from a generator of its own: the rest stays what it was."""
    rng = random.Random(f"{case.seed}/later")  # noqa: S311 - a simulation
    case = replace(case, own_order=rng.random() < 0.2)
    if case.durability == "journal":
        level = rng.choice(("journal", "journal", "journal", "checkpoint"))
        case = replace(case, durability=level, copies=rng.choice((0.0, 0.5, 1.0)))
    size = rng.choice((5, 7, 12)) if rng.random() < 0.2 else 0
    return replace(case, data=size if case.gives_data else 0)


def _leave_payloads(case: Case) -> Case:
    """Some of those that keep every round leave the payloads to their workers."""
    rng = random.Random(f"{case.seed}/replay")  # noqa: S311 - a simulation
    if case.durability == "journal" and rng.random() < REPLAYS:
        return _spare_workers(replace(case, durability="replay"))
    return case


def _faults(rng: random.Random) -> dict[str, Any]:
    """How often what strikes; in every third case nothing but processes that die."""
    names = ("cuts", "flips", "doubles", "holds", "jumps", "stalls")
    wild = rng.random() < 0.7
    faults: dict[str, Any] = {name: rng.choice((0, 0, 1, 2)) if wild else 0 for name in names}
    faults["doubles"] *= rng.choice((1, 6))
    faults["worker_crashes"] = rng.choice((0, 1, 2))
    faults["keeps"] = rng.choice((0.0, 0.5, 1.0, 1.0))
    faults["takeovers"] = rng.choice((0, 0, 0, 1))
    if rng.random() < 0.6:
        faults |= {
            "durability": "journal",
            "checkpoint_every": rng.choice((0, 1, 2)),
            "server_crashes": rng.choice((0, 1, 1, 2)),
            "disk_errors": rng.choice((0, 0, 1)),
            "slow_disks": rng.choice((0, 0, 1)),
            "rot": rng.choice((0.0, 0.5)),
        }
    return faults


@cache
def plan_of(  # noqa: PLR0913, PLR0917 - all that a plan is made of
    workers: int,
    servers: int,
    shards: int,
    consistency: str,
    every: int,
    downlink: str,
    judged: bool,  # noqa: FBT001 - cached by position
) -> Plan:
    """A job whose shards are of two values each; groups keep them apart."""
    recipe = preset("server-adam" if downlink == "delta" else "qadam")
    recipe = recipe.with_codecs(uplink="fp32", downlink="fp32").with_rhythm(every=every)
    if judged:
        recipe = replace(recipe, aggregate=Aggregate("clip"))
    names = [f"tensor{index}" for index in range(shards)]
    groups = (DEFAULT_GROUP, *(Group(name) for name in names[1:]))
    return Plan.of(
        [(name, (SHARD_NUMEL,)) for name in names],
        recipe,
        workers,
        servers=servers,
        consistency=consistency,
        groups=groups,
        members=tuple(range(shards)),
    )


@cache
def view_of(plan: Plan, server: int) -> Plan:
    """The plan as a server sees it; to cut it takes longer than a round."""
    return plan.for_server(server)
