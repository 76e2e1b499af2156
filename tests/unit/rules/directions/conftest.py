"""A model in a few shards, its gradients, and rules on it."""

import numpy as np
import pytest

from psq.layout import cut
from psq.parts import options, part
from psq.rules.base import ChoiceRule

# One tensor is split over shards, and one shard holds slices of three tensors.
SPECS = [("conv", (40, 7, 5, 5)), ("bias", (40,)), ("table", (600, 500)), ("head", (3, 3))]


class Model:
    """A layout, and values per shard and segment: views into one array per tensor."""

    def __init__(self):
        self.layout = cut(SPECS, [lambda numel: 4 * numel], servers=2)
        assert len(self.layout.shards) > 1
        assert max(len(shard.segments) for shard in self.layout.shards) > 1

    def values(self, seed, scale=1.0):
        rng = np.random.default_rng(seed)
        tensors = [
            scale * rng.standard_normal(tensor.numel, dtype=np.float32)
            for tensor in self.layout.tensors
        ]
        return [
            [tensors[s.tensor][s.start : s.start + s.numel] for s in shard.segments]
            for shard in self.layout.shards
        ]

    @staticmethod
    def flat(values):
        return np.concatenate([part for shard in values for part in shard])

    def rule(self, kind, *, rank=0, seed=0, adam=None, choice=None, **given):
        """The direction rule of a kind, with these options."""
        made = part("direction", kind)
        module, _, name = made.rule.partition(":")
        rule = getattr(__import__(module, fromlist=[name]), name)
        return rule(
            dict(options(made, given)),
            layout=self.layout,
            world_size=2,
            rank=rank,
            seed=seed,
            adam=adam,
            choice=choice or ChoiceRule({}, codecs=("sign",), layout=self.layout),
        )

    def write(  # noqa: PLR0913 - what a step is made of
        self, rule, gradients, *, t=1, lr=0.1, weights=None, shared=None
    ):
        """One step over all shards: the messages, flat."""
        out = np.empty(self.layout.numel, np.float32)
        if rule.needs_all:
            rule.prepare(t, lr, gradients)
        for shard in self.layout.shards:
            view = slice(shard.offset, shard.offset + shard.numel)
            rule.write(
                shard.index,
                t,
                lr,
                gradients[shard.index],
                out[view],
                weights=None if weights is None else weights[shard.index],
                shared={name: array[view] for name, array in (shared or {}).items()},
            )
            rule.advance(shard.index)
        return out


@pytest.fixture(scope="session")
def model():
    return Model()
