"""One process of MXNet's parameter server: kvstore dist_sync, 2-bit gradients up, f32 weights down.

The same script is started as scheduler, server and worker; MXNet tells them apart by DMLC_ROLE and
turns the first two into their loops as it is imported. Adam runs on the server. The gradients are
not consumed, so nothing is filled between steps. Runs on Python 3.8, the last that MXNet knows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import mxnet as mx
import numpy as np
from job import Job, serve
from shapes import numel, shapes_of

if TYPE_CHECKING:
    import argparse

THRESHOLD = 0.5  # MXNet's default; of no consequence to the time


class KvStore(Job):
    """A worker: push every gradient, pull every weight, as mxnet.gluon.Trainer does."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.versions = {"mxnet": mx.__version__, "numpy": np.__version__}
        cut = shapes_of(options.size)
        self.store = mx.kv.create("dist_sync")
        self.store.set_gradient_compression({"type": "2bit", "threshold": THRESHOLD})
        rng = np.random.RandomState(1 + options.rank)
        pool = rng.standard_normal(max(map(numel, cut))).astype(np.float32)
        self.gradients = [mx.nd.array(pool[: numel(s)].reshape(s)) for s in cut]
        self.weights = [mx.nd.zeros(s) for s in cut]
        for key, weight in enumerate(self.weights):
            self.store.init(key, weight)
        self.store.set_optimizer(mx.optimizer.Adam(learning_rate=options.lr))
        mx.nd.waitall()

    def step(self) -> None:
        for key, gradient in enumerate(self.gradients):
            self.store.push(key, gradient, priority=-key)
            self.store.pull(key, self.weights[key], priority=-key)
        mx.nd.waitall()


if __name__ == "__main__":
    serve(KvStore)
