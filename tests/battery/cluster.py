"""Workers and a server in one process: a recipe's own Compressors, Reducer and replicas.

What travels between them is bytes, which `wire` hashes, both ways.
"""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from psq.codec import ShardCodec, get_codec
from psq.feedback import Compressor
from psq.layout import PART_NUMEL
from psq.rules import make_apply
from psq_server.reduce import Reducer
from psq_server.state import Pushed

__all__ = ["SECRET", "Cluster", "Round", "Worker", "cuts", "decode"]

SECRET = 77  # of dp-sign's noise, which is nobody's business outside a test


def cuts(plan):
    """Where layers (shards) and tensors (their segments) lie in the flat vector."""
    shards = plan.layout.shards
    tensors = [
        slice(shard.offset + s.offset, shard.offset + s.offset + s.numel)
        for shard in shards
        for s in shard.segments
    ]
    return [slice(s.offset, s.offset + s.numel) for s in shards], tensors


def decode(specs, shard, wire_id, body):
    """What a body says, f32[shard.numel]."""
    spec = next(spec for spec in specs if get_codec(spec).wire_id == wire_id)
    out = np.empty(shard.numel, np.float32)
    ShardCodec(get_codec(spec), shard).decode(body, out)
    return out


@dataclass
class Round:
    """What one round was: payloads by (rank, shard), and answers by shard."""

    t: int
    lr: float
    pushes: dict = field(default_factory=dict)
    answers: dict = field(default_factory=dict)
    refused: dict = field(default_factory=dict)


class Worker:
    """One worker: what it says, and its replica."""

    def __init__(self, plan, rank, gradient, seed):
        self.plan, self.rank, self.gradient = plan, rank, gradient
        self.compressor = Compressor(plan, plan.data_rank(rank), seed=seed)
        if plan.recipe.direction.kind == "gaussian":
            self.compressor._rule.use_secret(SECRET + rank)
        self.apply = None
        if plan.recipe.downlink.kind == "mean":
            self.apply = make_apply(plan.recipe, layout=plan.layout, world_size=plan.world_size)
        self.x = np.zeros(plan.layout.numel, np.float32)
        self.steps = 0
        self.left_out = Counter()  # by shard: steps whose gradient was not finite

    def of(self, array, shard):
        return array[shard.offset : shard.offset + shard.numel]

    def segments(self, array, shard):
        mine = self.of(array, shard)
        return [mine[s.offset : s.offset + s.numel] for s in shard.segments]

    def state(self):
        """Everything that a checkpoint of this worker would hold, not copied."""
        mine = {f"mine.{name}": a for name, a in self.compressor.state_arrays().items()}
        common = {} if self.apply is None else self.apply.state_arrays()
        return {"x": self.x, **mine, **{f"common.{name}": a for name, a in common.items()}}

    def say(self, t, lr):
        """One round's messages, by shard; a shard whose gradient is not finite has none."""
        local, y = self.plan.recipe.direction.local_steps, self._start()
        shards = self.plan.layout.shards
        for _ in range(local - 1):
            g = self._gradient(y)
            spoilt = [s.index for s in shards if not self.compressor.finite(self.segments(g, s))]
            self.left_out.update(spoilt)
            for shard in () if spoilt else shards:
                cut = self.segments(y, shard)
                self.compressor.descend(shard.index, self.segments(g, shard), lr, cut)
        g = self._gradient(y)
        if self.compressor.needs_all:
            # A gradient that is not finite would make the norm of all so.
            known = np.where(np.isfinite(g), g, np.float32(0.0))
            all_cut = [self.segments(known, shard) for shard in self.plan.layout.shards]
            self.compressor.prepare(all_cut, lr, t=t)
        said = {}
        for shard in self.plan.layout.shards:
            push = self._push(shard, t, lr, g, y)
            if push is not None:
                said[shard.index] = push
        return said

    def _start(self):
        y = self.x.copy()
        if self.compressor.looks_ahead:
            for shard in self.plan.layout.shards:
                ahead = np.empty(shard.numel, np.float32)
                self.compressor.look_ahead(shard.index, ahead)
                self.of(y, shard)[:] -= ahead
        return y

    def _gradient(self, y):
        self.steps += 1
        return self.gradient(self.plan.data_rank(self.rank), self.steps, y)

    def _push(self, shard, t, lr, g, y):
        compressor, index = self.compressor, shard.index
        g = self.segments(g, shard)
        is_local = self.plan.recipe.direction.local_steps > 1
        if compressor.reads_first and not compressor.finite(g):
            self.left_out[index] += 1
            if not is_local:
                return None
            g = None  # the steps before this one are still to be said
        payload = np.empty(compressor.nbytes(index), np.uint8)
        ends = self.segments(y, shard)
        if is_local:
            starts = self.segments(self.x, shard)
            number = compressor.compress_drift(
                index, g, lr, payload, weights=ends, start=starts, t=t
            )
        else:
            common = {} if self.apply is None else self.apply.state_arrays()
            shared = {name: self.apply.of(name, index) for name in common}
            number = compressor.compress(index, g, lr, payload, weights=ends, t=t, shared=shared)
        if not compressor.payload_finite(index, payload):
            compressor.restore(index, payload)
            self.left_out[index] += 1
            return None
        codec = compressor.codec(index, number)
        body = memoryview(payload)[: codec.nbytes]
        return Pushed(self.rank, body, codec.codec.wire_id)

    def take(self, shard, t, answer):
        """An answer, of whatever kind."""
        if answer.kind == "nothing":
            return
        x, index = self.of(self.x, shard), shard.index
        change = decode(self.plan.downlink_codecs(index), shard, answer.wire_id, answer.body)
        if answer.kind == "weights":
            x[:] = change
        elif answer.kind == "delta":
            x += change
        elif self.plan.recipe.apply.kind == "return":
            x -= np.float32(answer.rate) * change  # an optimizer of this worker's own: SGD
        else:
            rate = answer.rate * self.plan.rate_of(index)
            self.apply.advance(index, self.plan.turns(index, t), rate)
            self.apply.write(index, change, x)
            x -= change
            factor = self.apply.rescale(index)
            if factor is not None:
                self.compressor.rescale(index, factor)


class Cluster:
    """A whole job. `gradient(rank, step, x)` is asked with the rank whose data it is."""

    def __init__(self, plan, x, gradient, *, seed=0):
        self.plan, self.gradient, self.seed = plan, gradient, seed
        self.server = Reducer(plan, seed=seed)
        for shard in plan.layout.shards:
            mine = x[shard.offset : shard.offset + shard.numel]
            for part, at in enumerate(range(0, shard.numel, PART_NUMEL)):
                self.server.init(shard.index, part, mine[at : at + PART_NUMEL].tobytes())
        self.workers = [Worker(plan, rank, gradient, seed) for rank in range(plan.world_size)]
        for worker in self.workers:
            self._welcome(worker)
        self.version = 0
        self.wire = hashlib.sha256()
        self.bytes = {"up": 0, "down": 0}

    @property
    def shards(self):
        return self.plan.layout.shards

    @property
    def x(self):
        """The weights that are trained: the server's, or the workers' own where it has none."""
        if self.plan.recipe.apply.part.keeps_weights:
            return self.server.state_arrays()["x"]
        return self.workers[0].x

    def step(self, lr):
        """One round; returns what it was."""
        t = self.version + 1
        this = Round(t, lr)
        for worker in self.workers:
            for index, push in worker.say(t, lr).items():
                self.server._codecs.uplink(index, push.codec).check(push.payload)
                this.pushes[worker.rank, index] = push
                self._hash("up", worker.rank, index, push.codec, push.payload)
        said = self._heard(this)
        if self.plan.recipe.whole:
            said = self._judge(this, said)
        for shard in self.shards:
            answer = self.server.step(shard.index, said[shard.index], lr)
            this.answers[shard.index] = answer
            self._hash("down", shard.index, answer.wire_id, answer.rate, answer.body)
            for worker in self.workers:
                worker.take(shard, t, answer)
        self.version = t
        return this

    def decoded(self, shard, push):
        """What a push of a shard says."""
        specs = self.plan.uplink_codecs(shard.index)
        return decode(specs, shard, push.codec, push.payload)

    def answered(self, shard, answer):
        """What an answer says of a shard."""
        specs = self.plan.downlink_codecs(shard.index)
        return decode(specs, shard, answer.wire_id, answer.body)

    def resumed(self):
        """Another cluster in this one's state: what a checkpoint has, copied, and nothing else."""
        other = Cluster(
            self.plan, np.zeros(self.plan.layout.numel, np.float32), self.gradient, seed=self.seed
        )
        pairs = [(self.server.state_arrays(), other.server.state_arrays())]
        pairs += [
            (mine.state(), theirs.state())
            for mine, theirs in zip(self.workers, other.workers, strict=True)
        ]
        for mine, theirs in pairs:
            assert mine.keys() == theirs.keys()
            for name, array in mine.items():
                theirs[name][:] = array
        other.server.resume(self.server.counts())
        other.server.remember(*copy.deepcopy(self.server.memory()))
        for mine, theirs in zip(self.workers, other.workers, strict=True):
            theirs.compressor.resume(mine.compressor.steps)
            theirs.steps = mine.steps
        other.version, other.wire, other.bytes = self.version, self.wire.copy(), dict(self.bytes)
        return other

    def _heard(self, this):
        """The contributions that count, by shard: one of each group of replicas."""
        replicas = self.plan.replicas
        said = {shard.index: [] for shard in self.shards}
        for (rank, index), push in sorted(this.pushes.items()):
            first = rank - rank % replicas
            assert bytes(push.payload) == bytes(this.pushes[first, index].payload)
            if rank == first + this.t % replicas:
                said[index].append(push)
        return said

    def _judge(self, this, said):
        judged = self.server.judge(
            self.version, {index: tuple(pushed) for index, pushed in said.items()}, this.lr
        )
        this.refused = {rank: one.refused for rank, one in judged.items() if one.refused}
        for rank in this.refused:
            for (sender, index), push in this.pushes.items():
                if sender == rank:
                    assert self.workers[rank].compressor.restore(index, push.payload)
        return {
            index: [
                one._replace(weight=judged[one.rank].weight if one.rank in judged else one.weight)
                for one in pushed
                if one.rank not in this.refused
            ]
            for index, pushed in said.items()
        }

    def _welcome(self, worker):
        for shard in self.shards:
            full = self.server.full(shard.index)
            if self.plan.recipe.downlink.kind == "weights":
                specs = self.plan.downlink_codecs(shard.index)
                values = decode(specs, shard, full.wire_id, full.parts[0])
            else:
                body = b"".join(part.tobytes() for part in full.parts)
                values = np.frombuffer(body, np.float32)[: shard.numel]
            worker.of(worker.x, shard)[:] = values

    def _hash(self, way, *words):
        *numbers, body = words
        self.wire.update(repr((way, self.version, *numbers)).encode())
        self.wire.update(memoryview(body))
        self.bytes[way] += len(body)
