"""Shards, payloads and rounds for aggregates to look at."""

from __future__ import annotations

import numpy as np
import pytest

from psq.codec import ShardCodec, get_codec
from psq.layout import Layout, Segment, Shard, Tensor
from psq.rules.base import Said

NUMELS = (700, 1, 512, 2049)  # a padded tail, a single value, a whole group, an odd block
SIGNS = ("sign", "sign:norm=l2", "sign:block=256", "sign:block=512", "sign:block=0")
OTHERS = (
    "log:k=0",
    "log:k=2,block=256",
    "log:k=6",
    "uniform:bits=2",
    "uniform:bits=3,block=0",
    "uniform:bits=4,stochastic=true",
    "uniform:bits=8",
    "lloyd-max:bits=1",
    "lloyd-max:bits=2,block=256",
    "lloyd-max:bits=3",
    "lloyd-max:bits=4,block=0",
    "topk",
    "topk:k=4,block=256",
    "bf16",
    "fp32",
)


class Round:
    """A whole round, as a server shows it to an aggregate."""

    def __init__(self, messages, *, number=1, staleness=None, weights=None, x=None):
        self.messages = messages  # rank -> shard -> (codec, payload)
        self.number = number
        self.ranks = sorted(messages)
        self.staleness = dict.fromkeys(self.ranks, 0) | (staleness or {})
        self.weights = dict.fromkeys(self.ranks, 1.0) | (weights or {})
        self.shards = sorted({shard for said in messages.values() for shard in said})
        self._x = x or {}

    def payload(self, rank, shard):
        return self.messages[rank].get(shard)

    def decode(self, rank, shard, out):
        said = self.payload(rank, shard)
        if said is None:
            out.fill(0.0)
        else:
            said[0].decode(said[1], out)

    def x(self, shard):
        return self._x[shard]


class Bench:
    """One shard, or the shards of a small model, and what workers say of them."""

    round = Round

    def __init__(self, numels=NUMELS, shards=1):
        cut, offset = [], 0
        tensors = [Tensor(f"t{i}", (n,), 0) for i, n in enumerate(numels)]
        for index in range(shards):
            places = np.cumsum([0, *numels])
            segments = tuple(
                Segment(t, 0, n, int(at))
                for t, (n, at) in enumerate(zip(numels, places, strict=False))
            )
            cut.append(Shard(index, offset, int(places[-1]), segments))
            offset += int(places[-1])
        self.layout = Layout(tuple(tensors), tuple(cut), (0,) * shards)
        self.shards = cut
        self.shard = cut[0]

    def say(self, values, spec, shard=0):
        codec = ShardCodec(get_codec(spec), self.shards[shard])
        payload = np.empty(codec.nbytes, np.uint8)
        codec.encode(np.asarray(values, np.float32), payload, seed=7)
        return codec, payload

    def values(self, count, seed=0):
        """As gradients are: large in one tensor, small in another, alike from worker to worker."""
        rng = np.random.default_rng(seed)
        size = np.repeat(rng.lognormal(size=len(self.shard.segments)), self.numels)
        common = rng.standard_normal(self.shard.numel)
        noise = rng.standard_normal((count, self.shard.numel))
        return (size * (0.3 * common + noise)).astype(np.float32)

    @property
    def numels(self):
        return [segment.numel for segment in self.shard.segments]

    @staticmethod
    def decoded(said):
        codec, payload = said
        out = np.empty(codec.shard.numel, np.float32)
        codec.decode(payload, out)
        return out

    @staticmethod
    def said(messages, weights=None):
        weights = weights or [1.0] * len(messages)
        return [
            Said(rank, codec, payload, weight)
            for rank, ((codec, payload), weight) in enumerate(zip(messages, weights, strict=True))
        ]


@pytest.fixture
def bench():
    return Bench()


@pytest.fixture
def make_bench():
    return Bench


@pytest.fixture(params=SIGNS)
def sign_spec(request):
    return request.param


@pytest.fixture(params=SIGNS + OTHERS)
def spec(request):
    return request.param
