"""Kardam: which gradients an asynchronous server believes, and how much (1802.07928).

A worker's coefficient is how fast its gradient changes with the weights it was taken at:

    K_p  = |g_p - g_p'| / |x_l - x_l'|     its last two gradients, at versions l and l'; the largest
                                           of the last `window`
    K    = |g - g_last| / |x_t - x_last|   the candidate against the gradient applied last, and the
                                           weights now against those before that was applied; a
                                           gradient that moved nothing is not compared with

    Lipschitz filter   K <= the (n - f)-th smallest of the K_p; all pass until n - f are known
    frequency filter   refused: a worker among the senders of the last 2 f that were accepted
    dampening          weight 1 / (1 + tau), exp(-0.2 tau) or 1 for a gradient tau versions behind
    way out            after n refusals in a row the next one is accepted, whoever sends it
    shortening         what the Lipschitz filter has not passed (the way out, and at first) is no
                       longer than the median of the workers' last gradients; before 2 f + 1 have
                       spoken, so that there is an honest median, nothing is accepted

Lipschitz filter, way out and dampening are as in the authors' published code, the frequency filter
is after the paper. The shortening is ours: without it a hostile worker needs only to wait for the
way out, and one message a hundred times too long is enough. What is added to the weights is the sum
of weight * message / number: dampening is not normalised away. Needs n >= 3 f + 1, so that the
frequency filter always leaves honest workers. A round with several messages is judged by ascending
rank, all of them against the round before.

Promised: what is accepted is not much longer than honest gradients, and no sender has more than
one in 2 f + 1 of it, but for the way out. Not promised: that honest messages pass. Most do not
where gradients are noisy, as |g - g_last| then is noise; with error feedback they wait in the
residual.

Coefficients compare what was said, that is decoded messages: with error feedback a message is a
gradient plus what earlier ones left out, and the weights are the server's, not their image in the
downlink's codec. Both blur K and K_p alike.

Memory: the last payload of each worker and the last applied one, packed; and dense copies of the
weights, because a distance between versions can be had in no other way: the last 2 n versions, and
older ones that a worker's last gradient or the last applied one was taken at: 4 numel bytes each,
12 n numel + 8 numel at most. A gradient older than that leaves its sender's coefficient as it was.
All of it is in a checkpoint, so a restart changes no judgement.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from psq.codec import ShardCodec, get_codec
from psq.errors import ConfigError
from psq.kernels import Floats
from psq.layout import Shard
from psq.rules.base import AggregateRule, Judgement, RoundView, Said
from psq.rules.packed import distances
from psq.rules.robust import scaled_sum

__all__ = ["Kardam"]

Gradient = Mapping[int, tuple[ShardCodec, bytes]]  # by shard: what was said, packed
Weights = Mapping[int, Floats]  # by shard

VERSIONS_PER_WORKER: Final = 2
EXPONENT: Final = 0.2  # the paper's
DAMPENING: Final[Mapping[str, Callable[[int], float]]] = MappingProxyType(
    {
        "inverse": lambda staleness: 1.0 / (1.0 + staleness),
        "exponential": lambda staleness: math.exp(-EXPONENT * staleness),
        "none": lambda _: 1.0,
    }
)


@dataclass(slots=True)
class _Worker:
    """What is known of a worker: its last gradient, where it was taken, and its coefficients.

    Of each coefficient, beside it, the change of the gradient that it is made of.
    """

    coefficients: deque[tuple[float, float]]
    norm: float = 0.0
    version: int = -1
    gradient: Gradient = field(default_factory=dict)
    weights: Weights | None = None


@dataclass(frozen=True, slots=True)
class _Step:
    """A gradient that was applied, and the weights before it was."""

    gradient: Gradient
    weights: Weights


class Kardam(AggregateRule):
    """Refuses what changes faster than honest gradients do, and who speaks too often."""

    whole: ClassVar[bool] = True

    def setup(self) -> None:  # noqa: D102 - as the base class
        self._hostile = int(self.options["f"])
        if self._hostile < 0 or self.world_size < 3 * self._hostile + 1:
            msg = (
                f"kardam with f={self._hostile} needs {3 * self._hostile + 1} workers or more, "
                f"there are {self.world_size}: lower f or start more"
            )
            raise ConfigError(msg)
        self._dampen = DAMPENING[str(self.options["dampening"])]
        self._window = int(self.options["window"])
        self._noise = bool(self.options["noise"])
        self._workers: dict[int, _Worker] = {}
        self._versions: dict[int, Weights] = {}
        self._accepted: deque[int] = deque(maxlen=2 * self._hostile)
        self._accepted_last: _Step | None = None
        self._moved_last: _Step | None = None  # the last that is known to have moved the weights
        self._refusals: int = 0

    @classmethod
    def copies(cls, world_size: int) -> int:
        """Of the last versions, and of older ones that a gradient was taken at."""
        return (VERSIONS_PER_WORKER + 1) * world_size + 2

    def judge(self, round: RoundView) -> Mapping[int, Judgement]:  # noqa: A002 - the field's word
        """Judge each message against those before it.

        Cost: a copy of the weights; for each message two distances of payloads, two of weights.
        """
        version = round.number - 1
        weights = self._keep(version, round)
        self._settle(weights)
        verdicts: dict[int, Judgement] = {}
        for rank in round.ranks:
            gradient, staleness = _packed(round, rank), round.staleness.get(rank, 0)
            self._learn(rank, gradient, version - staleness)
            verdict = self._verdict(rank, gradient, weights, staleness)
            verdicts[rank] = verdict
            if not verdict.refused:
                self._refusals = 0
                self._accepted.append(rank)
                self._accepted_last = _Step(gradient, weights)
        return verdicts

    def combine(self, shard: int, said: Sequence[Said], out: Floats) -> None:
        """Write the sum of weight * message / number of messages to out, f32[shard.numel]."""
        del shard
        scaled_sum(said, out)

    def memory(self) -> tuple[dict[str, NDArray[Any]], Any]:
        """All it knows; what several share (a version's weights) is in it once."""
        shelf = _Shelf()
        facts = {
            "versions": {number: shelf.weights(kept) for number, kept in self._versions.items()},
            "workers": {rank: _noted(worker, shelf) for rank, worker in self._workers.items()},
            "accepted": list(self._accepted),
            "accepted_last": _noted_step(self._accepted_last, shelf),
            "moved_last": _noted_step(self._moved_last, shelf),
            "refusals": self._refusals,
        }
        return shelf.arrays, facts

    def remember(self, arrays: Mapping[str, NDArray[Any]], facts: Any) -> None:
        """Take all of it back."""
        shelf = _Shelf(arrays, {shard.index: shard for shard in self.layout.shards})
        self._versions = {n: shelf.take_weights(key) for n, key in facts["versions"].items()}
        self._workers = {
            rank: _Worker(
                deque(map(tuple, coefficients), maxlen=self._window),
                norm,
                version,
                shelf.take_gradient(gradient),
                None if weights is None else shelf.take_weights(weights),
            )
            for rank, (coefficients, norm, version, gradient, weights) in facts["workers"].items()
        }
        self._accepted.extend(facts["accepted"])
        self._accepted_last = _taken_step(facts["accepted_last"], shelf)
        self._moved_last = _taken_step(facts["moved_last"], shelf)
        self._refusals = facts["refusals"]

    def _keep(self, version: int, round: RoundView) -> Weights:  # noqa: A002 - the field's word
        """Copy the weights of a version that is new, return them, and forget the oldest."""
        if version not in self._versions:
            self._versions[version] = {
                shard.index: round.x(shard.index).copy() for shard in self.layout.shards
            }
        while len(self._versions) > VERSIONS_PER_WORKER * self.world_size:
            del self._versions[min(self._versions)]
        return self._versions[version]

    def _settle(self, weights: Weights) -> None:
        """Whether the gradient accepted last has moved the weights shows now."""
        last = self._accepted_last
        if last is not None and _apart(weights, last.weights) > 0.0:
            self._moved_last = last

    def _learn(self, rank: int, gradient: Gradient, version: int) -> None:
        """Take a worker's coefficient from its last two gradients."""
        weights = self._versions.get(version)
        worker = self._workers.setdefault(rank, _Worker(deque(maxlen=self._window)))
        worker.norm = _differ(gradient, {})
        if weights is None or version == worker.version:
            return
        if worker.weights is not None:
            moved = _apart(weights, worker.weights)
            if moved > 0.0:
                changed = _differ(gradient, worker.gradient)
                worker.coefficients.append((changed / moved, changed))
        worker.version, worker.gradient, worker.weights = version, gradient, weights

    def _verdict(
        self, rank: int, gradient: Gradient, weights: Weights, staleness: int
    ) -> Judgement:
        """Refuse a message, or give it its weight."""
        norm, least = self._workers[rank].norm, 2 * self._hostile + 1
        if not math.isfinite(norm):
            return Judgement(0.0, f"norm: the gradient's norm is {norm}")
        if len(self._workers) < least:
            heard = len(self._workers)
            return Judgement(0.0, f"warm-up: {heard} workers have spoken, it takes {least}")
        reason, passed = self._refusal(rank, gradient, weights)
        if reason and self._refusals < self.world_size:
            self._refusals += 1
            return Judgement(0.0, reason)
        weight = self._dampen(staleness)
        if not passed and norm > 0.0:
            median = statistics.median(worker.norm for worker in self._workers.values())
            weight *= min(1.0, median / norm)
        return Judgement(weight)

    def _refusal(self, rank: int, gradient: Gradient, weights: Weights) -> tuple[str, bool]:
        """Why a message is not accepted, or nothing; and whether the Lipschitz filter passed it."""
        if rank in self._accepted:
            last = len(self._accepted)
            return f"frequency: rank {rank} is among the senders of the last {last} accepted", False
        before = self._moved_last
        moved = 0.0 if before is None else _apart(weights, before.weights)
        highest = self._highest(moved)
        if highest is None or before is None:
            return "", False
        changed = _differ(gradient, before.gradient)
        if changed <= highest:
            return "", True
        reason = (
            f"lipschitz: the gradient changed by {changed:.4g} where the weights moved by "
            f"{moved:.4g}, with {highest:.4g} or less it would have passed"
        )
        return reason, False

    def _highest(self, moved: float) -> float | None:
        """How much a gradient may change where the weights moved so far.

        The (n - f)-th smallest of what the workers' own changes allow; None while too few are
        known.
        """
        known = sorted(self._allowed(w, moved) for w in self._workers.values() if w.coefficients)
        count = self.world_size - self._hostile
        return known[count - 1] if len(known) >= count else None

    def _allowed(self, worker: _Worker, moved: float) -> float:
        along = max(ratio for ratio, _ in worker.coefficients) * moved
        noise = max(change for _, change in worker.coefficients) if self._noise else 0.0
        return max(along, noise)


class _Shelf:
    """Weights and gradients as named arrays: what is one object is one entry, here and back.

    Args:
        arrays: what was put there; none to begin with.
        shards: of the gradients that are to be taken back.
    """

    def __init__(
        self,
        arrays: Mapping[str, NDArray[Any]] | None = None,
        shards: Mapping[int, Shard] | None = None,
    ) -> None:
        self.arrays = dict(arrays or {})
        self._shards = shards or {}
        self._keys: dict[int, int] = {}
        self._taken: dict[int, Weights] = {}

    def weights(self, kept: Weights) -> int:
        key = self._keys.setdefault(id(kept), len(self._keys))
        self.arrays |= {f"weights.{key}.{shard}": x for shard, x in kept.items()}
        return key

    def gradient(self, said: Gradient) -> list[Any]:
        """[key, {shard: codec}]: its bytes are arrays."""
        key = self._keys.setdefault(id(said), len(self._keys))
        self.arrays |= {
            f"said.{key}.{shard}": np.frombuffer(payload, np.uint8)
            for shard, (_, payload) in said.items()
        }
        return [key, {shard: codec.codec.spec for shard, (codec, _) in said.items()}]

    def take_weights(self, key: int) -> Weights:
        if key not in self._taken:
            start = f"weights.{key}."
            named = {name: x for name, x in self.arrays.items() if name.startswith(start)}
            self._taken[key] = {int(name[len(start) :]): x for name, x in named.items()}
        return self._taken[key]

    def take_gradient(self, noted: Sequence[Any]) -> Gradient:
        key, specs = noted
        return {
            shard: (
                ShardCodec(get_codec(spec), self._shards[shard]),
                self.arrays[f"said.{key}.{shard}"].tobytes(),
            )
            for shard, spec in specs.items()
        }


def _noted(worker: _Worker, shelf: _Shelf) -> list[Any]:
    weights = None if worker.weights is None else shelf.weights(worker.weights)
    gradient = shelf.gradient(worker.gradient)
    return [list(worker.coefficients), worker.norm, worker.version, gradient, weights]


def _noted_step(step: _Step | None, shelf: _Shelf) -> list[Any] | None:
    return None if step is None else [shelf.gradient(step.gradient), shelf.weights(step.weights)]


def _taken_step(noted: Sequence[Any] | None, shelf: _Shelf) -> _Step | None:
    if noted is None:
        return None
    return _Step(shelf.take_gradient(noted[0]), shelf.take_weights(noted[1]))


def _packed(round: RoundView, rank: int) -> Gradient:  # noqa: A002 - the field's word
    """What a rank said, copied: a payload's buffer is its receiver's."""
    said = {shard: round.payload(rank, shard) for shard in round.shards}
    return {shard: (one[0], bytes(one[1])) for shard, one in said.items() if one is not None}


def _differ(one: Gradient, other: Gradient) -> float:
    """L2 distance of two packed messages; a shard that only one has counts against zeros."""
    total = 0.0
    for shard in one.keys() | other.keys():
        pair = [one.get(shard), other.get(shard)]
        cut = next(said[0].shard for said in pair if said is not None)
        total += float(distances(cut, pair)[0, 1])
    return math.sqrt(total) if not math.isnan(total) else math.inf


def _apart(one: Weights, other: Weights) -> float:
    """L2 distance of two versions of the weights; scratch of a shard."""
    total = 0.0
    for shard, x in one.items():
        difference = x - other[shard]
        total += float(np.dot(difference, difference))
    return math.sqrt(total)
