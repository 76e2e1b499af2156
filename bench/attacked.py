"""A small training problem with hostile workers in it, in one process: what `robustness.py` runs.

A network of 24-32-6 learns to tell six overlapping clusters apart; each worker draws mini-batches
of its own. Honest workers push through `psq.feedback.Compressor` (the real codec, and its residual
where the recipe has error feedback), the server is its `Reducer` with the recipe's aggregate, and
what that refuses goes back with `restore`. Hostile workers encode what `psq.rules.attacks` tells
them, without a residual: they owe nobody anything. What is not finite or too large never gets to
the aggregate: a server refuses it when it comes, here as there. No message is lost or late.

In rounds every worker pushes at the same weights. Asynchronously workers push one at a time, each
at the weights of its last pull; hostile ones come as often as the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from psq.codec import ShardCodec, get_codec
from psq.errors import RemotePayloadError
from psq.feedback import Compressor
from psq.plan import Plan
from psq.presets import preset
from psq.rules.attacks import attack
from psq_server.reduce import Reducer
from psq_server.state import Pushed

Floats = NDArray[np.float32]
Payload = NDArray[np.uint8]

INPUTS, HIDDEN, CLASSES = 24, 32, 6
SPECS = [("w1", (INPUTS, HIDDEN)), ("b1", (HIDDEN,)), ("w2", (HIDDEN, CLASSES)), ("b2", (CLASSES,))]
TRAIN, TEST, BATCH = 4000, 3000, 32
JUDGED_FROM = 0.9  # the accuracy is the mean over the last steps, from this share of them on
COLLUDERS = 2  # who sees fewer honest gradients than this asks what others would say


@dataclass(frozen=True)
class Case:
    """One training run: `given` as after `--with`; hostile ranks are the first ones."""

    given: tuple[str, ...] = ()
    attack: str = ""
    strength: float | None = None
    workers: int = 11
    hostile: int = 0
    codec: str = "lloyd-max:bits=4"
    lr: float = 0.3
    steps: int = 300
    seed: int = 0
    asynchronous: bool = False
    skew: float = 0.0  # share of a worker's samples that are of one class, its own


@dataclass(frozen=True)
class Result:
    """How it ended."""

    accuracy: float
    refused: Counter[tuple[int, str]]  # by rank and kind of reason
    applied: Counter[int]  # by rank


class Clusters:
    """The task: inputs x, labels y, and the gradient of the mean cross-entropy."""

    def __init__(self, seed: int, skew: float = 0.0) -> None:
        rng = np.random.default_rng([seed, 1])
        centres = rng.standard_normal((CLASSES, INPUTS))
        self.y = rng.integers(0, CLASSES, TRAIN + TEST)
        noise = 2.4 * rng.standard_normal((TRAIN + TEST, INPUTS))
        self.x = (centres[self.y] + noise).astype(np.float32)
        self.skew = skew

    def start(self, seed: int) -> Floats:
        rng = np.random.default_rng([seed, 2])
        w1 = rng.standard_normal(INPUTS * HIDDEN) / np.sqrt(INPUTS)
        w2 = rng.standard_normal(HIDDEN * CLASSES) / np.sqrt(HIDDEN)
        return np.concatenate([w1, np.zeros(HIDDEN), w2, np.zeros(CLASSES)]).astype(np.float32)

    def batch(self, rank: int, rng: np.random.Generator) -> NDArray[np.intp]:
        places = rng.integers(0, TRAIN, BATCH)
        own = np.flatnonzero(rng.random(BATCH) < self.skew)
        places[own] = rng.choice(self._of_class[rank % CLASSES], own.size)
        return places

    @cached_property
    def _of_class(self) -> list[NDArray[np.intp]]:
        return [np.flatnonzero(self.y[:TRAIN] == label) for label in range(CLASSES)]

    def gradient(self, weights: Floats, places: NDArray[np.intp]) -> Floats:
        w1, b1, w2, b2 = _split(weights)
        x, y = self.x[places], self.y[places]
        hidden = np.tanh(x @ w1 + b1)
        error = _softmax(hidden @ w2 + b2)
        error[np.arange(y.size), y] -= 1.0
        error /= y.size
        back = (error @ w2.T) * (1.0 - hidden * hidden)
        parts = (x.T @ back, back.sum(axis=0), hidden.T @ error, error.sum(axis=0))
        return np.concatenate([part.reshape(-1) for part in parts]).astype(np.float32)

    def accuracy(self, weights: Floats) -> float:
        if not np.isfinite(weights).all():
            return 0.0
        w1, b1, w2, b2 = _split(weights)
        scores = np.tanh(self.x[TRAIN:] @ w1 + b1) @ w2 + b2
        return float((scores.argmax(axis=1) == self.y[TRAIN:]).mean())


def _split(weights: Floats) -> list[Floats]:
    ends = np.cumsum([np.prod(shape) for _, shape in SPECS])[:-1]
    parts = np.split(weights, ends)
    return [part.reshape(shape) for part, (_, shape) in zip(parts, SPECS, strict=True)]


def _softmax(scores: Floats) -> Floats:
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


class Cluster:
    """Workers and a server, without what lies between them."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.task = Clusters(case.seed, case.skew)
        recipe = preset("ef-sgd").with_codecs(uplink=case.codec, downlink="weights:fp32")
        plan = Plan.of(SPECS, recipe.with_options(*case.given), case.workers)
        self.feeds_back = plan.recipe.uplink.error_feedback
        self.whole = plan.recipe.whole
        (self.shard,) = plan.layout.shards
        self.codec = ShardCodec(get_codec(case.codec), self.shard)
        self.server = Reducer(plan, seed=case.seed)
        self.server.init(0, 0, self.task.start(case.seed).view(np.uint8))
        ranks = range(case.workers)
        self.compressors = [Compressor(plan, rank, seed=case.seed) for rank in ranks]
        self.batches = [np.random.default_rng([case.seed, 3, rank]) for rank in ranks]
        self.rng = np.random.default_rng([case.seed, 4])
        self.version = 0
        self.bases = [(0, self.x()) for _ in ranks]
        self.refused: Counter[tuple[int, str]] = Counter()
        self.applied: Counter[int] = Counter()

    def x(self) -> Floats:
        return np.concatenate([values.reshape(-1) for values in self.server.weights().values()])

    def run(self) -> Result:
        accuracies = []
        for step in range(self.case.steps):
            if self.case.asynchronous:
                for rank in self.rng.permutation(self.case.workers).tolist():
                    self.turn([rank])
                    self.bases[rank] = (self.version, self.x())
            else:
                self.turn(range(self.case.workers))
                self.bases = [(self.version, self.x())] * self.case.workers
            if step >= self.case.steps * JUDGED_FROM:
                accuracies.append(self.task.accuracy(self.x()))
        return Result(float(np.mean(accuracies)), self.refused, self.applied)

    def turn(self, ranks: Iterable[int]) -> None:
        """One round of these workers."""
        gradients = {rank: self.gradient(rank) for rank in ranks}
        honest = [g for rank, g in gradients.items() if not self.is_hostile(rank)]
        if len(honest) < COLLUDERS:
            honest = [self.gradient(r) for r in range(self.case.hostile, self.case.workers)]
        said = {rank: self.say(rank, g, honest) for rank, g in gradients.items()}
        let_in = {r: p for r, p in said.items() if p is not None and self.is_let_in(r, p)}
        if let_in:
            self.reduce(let_in)

    def gradient(self, rank: int) -> Floats:
        places = self.task.batch(rank, self.batches[rank])
        return self.task.gradient(self.bases[rank][1], places)

    def is_hostile(self, rank: int) -> bool:
        return rank < self.case.hostile and bool(self.case.attack)

    def say(self, rank: int, gradient: Floats, honest: Sequence[Floats]) -> Payload | None:
        payload = np.empty(self.codec.nbytes, np.uint8)
        if not self.is_hostile(rank):
            cuts = self.shard.segments
            segments = [gradient[cut.offset : cut.offset + cut.numel] for cut in cuts]
            self.compressors[rank].compress(0, segments, self.case.lr, payload)
            return payload
        lie = attack(
            self.case.attack,
            gradient,
            seen=honest,
            world_size=self.case.workers,
            hostile=self.case.hostile,
            rng=self.rng,
            strength=self.case.strength,
        )
        if lie is not None:
            self.codec.encode(lie, payload)
        return None if lie is None else payload

    def is_let_in(self, rank: int, payload: Payload) -> bool:
        try:
            self.codec.check(payload)
            self.codec.check_bound(payload)
        except RemotePayloadError:
            self.refused[rank, "payload"] += 1
            return False
        return True

    def reduce(self, payloads: dict[int, Payload]) -> None:
        wire_id = self.codec.codec.wire_id
        said = [
            Pushed(rank, memoryview(p), wire_id, staleness=self.version - self.bases[rank][0])
            for rank, p in payloads.items()
        ]
        judged = self.server.judge(self.version, {0: said}, self.case.lr) if self.whole else {}
        taken = []
        for one in said:
            verdict = judged.get(one.rank)
            if verdict is None or not verdict.refused:
                self.applied[one.rank] += 1
                weight = one.weight if verdict is None else verdict.weight
                taken.append(one._replace(weight=weight))
                continue
            self.refused[one.rank, verdict.refused.partition(":")[0]] += 1
            if self.feeds_back and not self.is_hostile(one.rank):
                self.compressors[one.rank].restore(0, one.payload)
        self.server.step(0, taken, self.case.lr)
        self.version += 1


def train(case: Case) -> Result:
    """One run; what NumPy says of one that diverges is its result, not news."""
    with np.errstate(all="ignore"):
        return Cluster(case).run()
