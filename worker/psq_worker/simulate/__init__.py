"""A whole job in one process: the real workers and servers, on a modelled network, in virtual time.

    simulate(SimConfig(...)) -> SimResult

What runs is what runs in a cluster: `psq.torch.exchange`, the client and its state machine, frames
with their checksums, the server's loop and state machine, the reducer. Only three things are other:
sockets are queues with a bandwidth and a latency (`network`), the clock counts virtual seconds
(`clock`), and gradients may be computed for many workers at once (`gradients`).
"""

from psq_worker.simulate.cluster import SimResult, simulate
from psq_worker.simulate.config import SimConfig
from psq_worker.simulate.faults import Crash, Faults
from psq_worker.simulate.network import Network
from psq_worker.simulate.trace import Point, Score

__all__ = [
    "Crash",
    "Faults",
    "Network",
    "Point",
    "Score",
    "SimConfig",
    "SimResult",
    "simulate",
]
