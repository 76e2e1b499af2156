"""dp-sign: signs of clipped gradients with Gaussian noise; the majority's come back (2002.10940).

Clipping stays a little under `clip`, so that no rounding leads over it.
"""

import numpy as np

from reference.common import Job, Weights, majority

MARGIN = 1.0 - 2.0**-20


def train(job: Job, clip: float = 1.0, sigma: float = 1.0) -> Weights:
    """Yield everybody's weights."""
    x = job.x
    for t, lr in job.rounds():
        said = []
        for i in job.ranks:
            g = job.gradient(i, t, x)
            norm = float(np.sqrt(np.sum(np.square(g, dtype=np.float64))))
            clipped = g * min(1.0, clip / norm * MARGIN)
            said.append((clipped + sigma * job.noise(i, t)).astype(np.float32))
        x = x - lr * majority(said)
        yield x
