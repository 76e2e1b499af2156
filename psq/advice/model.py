"""Seconds per step from what a machine, a link and a codec can do: arithmetic, nothing measured.

A step's shards flow through five stages, each shard after the one before it:

    encode (worker) -> up (link) -> server step -> down (link) -> decode (worker)

Several stages may need the same resource: a worker encodes and decodes with one thread, a server's
link carries the pushes of all workers, processes of one machine share its cores. A resource r is at
work for t_r in a step, and c_r of the chain are its part in what a single shard meets on its way,
the whole of which takes c. Work cannot be there before the first shard has come to it, nor can the
last shard have left before what follows is done, so with the resource that never pauses

    communication = max over r of (t_r + c - c_r), and over r of t_r, + round trip
    step          = compute + communication

The answers of a server leave one worker after another, and whoever has its own goes on and pushes
while the link still brings the others theirs: of a shard's answers a worker waits for half of the
others', though the link is taken up by all. With one shard all that is about the sum of the stages,
with many it is the slowest resource and the fill of the pipeline. With overlap, pushes leave while
backward still runs: backward (two thirds of compute) is then work of the worker's thread, in the
pipeline.

The model knows of no losses, no stragglers and no other traffic. Never here: a clock, a socket, an
array. Bits per second are what a program sees, without the frames' headers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

from psq.errors import ConfigError

__all__ = [
    "BACKWARD_SHARE",
    "BOTTLENECKS",
    "LOOPBACK",
    "MESSAGE_S",
    "Cluster",
    "Link",
    "Prediction",
    "Rates",
    "Work",
    "link_s",
    "predict",
]

BACKWARD_SHARE: Final = 2 / 3
"""Of compute: a backward pass makes two products where the forward pass made one."""
MESSAGE_S: Final = 40e-6
"""What a message costs either end in Python, beside its bytes."""

BOTTLENECKS: Final = {
    "compute": "forward and backward",
    "worker": "the workers' encoding and decoding",
    "up": "the link, from workers to servers",
    "down": "the link, from servers to workers",
    "link": "the link of a machine with a worker and a server",
    "server": "the servers' arithmetic",
    "copying": "copying bytes in and out of sockets",
    "cores": "the cores, which all processes share",
}
"""What a step may be bound by, in words."""


@dataclass(frozen=True, slots=True)
class Link:
    """What every machine is connected by.

    Attributes:
        up_bit_s: from a worker to a server, alone on the link; infinite where there is none.
        down_bit_s: the other way, at the same time.
        round_trip_s: of a message that carries nothing.
    """

    up_bit_s: float
    down_bit_s: float
    round_trip_s: float

    def __post_init__(self) -> None:
        """A link carries something."""
        if not (self.up_bit_s > 0.0 and self.down_bit_s > 0.0):
            msg = f"link: rates must be above 0, got {self.up_bit_s!r} and {self.down_bit_s!r}"
            raise ConfigError(msg)
        if not 0.0 <= self.round_trip_s < math.inf:
            msg = f"link: the round trip must be 0 s or more, got {self.round_trip_s!r}"
            raise ConfigError(msg)


LOOPBACK: Final = Link(math.inf, math.inf, 100e-6)
"""Processes of one machine: what limits them is copying, `Cluster.copy_s`."""
NO_LINK: Final = Link(math.inf, math.inf, 0.0)


@dataclass(frozen=True, slots=True)
class Cluster:
    """Who takes part, and where.

    Attributes:
        workers: how many.
        servers: how many, each with an equal share of the bytes.
        link: of each machine.
        beside: servers run on workers' machines, not on their own.
        one_machine: all processes run on the same cores.
        cores: of one machine.
        copy_s: seconds that one byte costs both ends together, through the kernel's sockets.
    """

    workers: int
    servers: int
    link: Link
    beside: bool = False
    one_machine: bool = False
    cores: int = 2
    copy_s: float = 0.0

    def __post_init__(self) -> None:
        """Counts are positive, and servers beside workers find one."""
        if min(self.workers, self.servers, self.cores) < 1 or not self.copy_s >= 0.0:
            msg = (
                "a cluster has at least 1 worker, 1 server and 1 core, "
                f"got {self.workers}, {self.servers} and {self.cores}"
            )
            raise ConfigError(msg)
        if self.beside and self.servers > self.workers:
            msg = (
                f"{self.servers} servers cannot be beside {self.workers} workers, one beside each: "
                "take fewer servers, or machines of their own"
            )
            raise ConfigError(msg)


@dataclass(frozen=True, slots=True)
class Rates:
    """What one process does with a codec pair, in values per second of the whole model.

    Attributes:
        encode: a worker's: error feedback, quantizing, checks and checksums.
        server: a server's: checks, the sum over all workers, the optimizer, the answer.
        decode: a worker's, into its weights.
        zero: a worker's zeroing of gradients.
    """

    encode: float
    server: float
    decode: float
    zero: float = math.inf

    def __post_init__(self) -> None:
        """Nothing takes for ever."""
        if not min(self.encode, self.server, self.decode, self.zero) > 0.0:
            msg = f"rates must be above 0 values/s, got {self}"
            raise ConfigError(msg)


@dataclass(frozen=True, slots=True)
class Work:
    """What one step has to do: a model under a recipe.

    Attributes:
        numel: values in the model.
        shards: how many the plan cuts it into.
        up_bytes: what a worker pushes, headers included.
        down_bytes: what a worker gets back.
        rates: of the processes.
    """

    numel: int
    shards: int
    up_bytes: int
    down_bytes: int
    rates: Rates


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds of one step, and what they are made of.

    Stages run at the same time, so they add up to more than the step; `fill_s` is what the step
    takes beyond its slowest resource. `cpu_s` is of all processes, compute not counted.
    """

    step_s: float
    compute_s: float
    encode_s: float
    up_s: float
    server_s: float
    down_s: float
    decode_s: float
    fill_s: float
    cpu_s: float
    bottleneck: str


@dataclass(frozen=True, slots=True)
class _Stages:
    """Seconds of each stage: of a step, or of what one shard meets on its way."""

    encode_s: float
    up_s: float
    server_s: float
    down_s: float
    decode_s: float
    copy_s: float
    taken_s: float  # of the link down, by the answers to all workers

    @property
    def all_s(self) -> float:
        return self.encode_s + self.up_s + self.server_s + self.down_s + self.decode_s

    @property
    def cpu_s(self) -> float:
        return self.encode_s + self.server_s + self.decode_s + self.copy_s


@dataclass(frozen=True, slots=True)
class _Resource:
    """Seconds at work in a step, and those of them that are on one shard's way."""

    total_s: float
    chain_s: float


def predict(
    work: Work, cluster: Cluster, *, compute_s: float = 0.0, overlap: bool = False
) -> Prediction:
    """Seconds per step.

    Args:
        work: what a step does.
        cluster: who does it.
        compute_s: of forward and backward, of one worker.
        overlap: pushes leave while backward still runs.
    """
    early_s = BACKWARD_SHARE * compute_s if overlap else 0.0
    whole, chain = _step_stages(work, cluster), _chain_stages(work, cluster)
    found = _resources(work, cluster, whole, chain, early_s)
    slack_s = max(each.total_s - each.chain_s for each in found.values())
    busiest = max(found, key=lambda name: found[name].total_s)
    most_s = found[busiest].total_s
    round_s = max(chain.all_s + slack_s, most_s) + cluster.link.round_trip_s
    step_s = compute_s - early_s + round_s
    return Prediction(
        step_s=step_s,
        compute_s=compute_s,
        encode_s=whole.encode_s,
        up_s=whole.up_s,
        server_s=whole.server_s,
        down_s=whole.down_s,
        decode_s=whole.decode_s,
        fill_s=round_s - most_s,
        cpu_s=sum(_busy_s(work, cluster)),
        bottleneck="compute" if compute_s >= step_s / 2 else busiest,
    )


def link_s(work: Work, cluster: Cluster, *, compute_s: float = 0.0, overlap: bool = False) -> float:
    """How many of a step's seconds are the link's: those that one without a limit would save."""
    here, free = (
        predict(work, each, compute_s=compute_s, overlap=overlap).step_s
        for each in (cluster, replace(cluster, link=NO_LINK))
    )
    return max(0.0, here - free)


def _step_stages(work: Work, cluster: Cluster) -> _Stages:
    workers, servers, messages = cluster.workers, cluster.servers, work.shards * MESSAGE_S
    crowd = _crowd(cluster)
    up_bytes, down_bytes = _busiest_bytes(work, cluster)
    return _Stages(
        encode_s=crowd * (work.numel / work.rates.encode + messages),
        up_s=8 * up_bytes / cluster.link.up_bit_s,
        server_s=(work.numel / work.rates.server + workers * 2 * messages) / servers,
        down_s=8 * down_bytes / cluster.link.down_bit_s,
        decode_s=crowd * (work.numel / work.rates.decode + messages),
        copy_s=_copied_s(work, cluster) * workers / servers,
        taken_s=8 * down_bytes / cluster.link.down_bit_s,
    )


def _chain_stages(work: Work, cluster: Cluster) -> _Stages:
    """One shard of every worker on its way to its one server and back."""
    step, shards, servers = _step_stages(work, cluster), work.shards, cluster.servers
    sent = cluster.workers - (1 if cluster.beside else 0)  # its own worker's takes no link
    to_server = sent * 8 / shards
    copied_s = (cluster.workers + 1) * cluster.copy_s / 2 / shards
    down_s = to_server * work.down_bytes / cluster.link.down_bit_s
    awaited = (sent + 1) / (2 * sent) if sent else 1.0
    return _Stages(
        encode_s=step.encode_s / shards,
        up_s=max(to_server * work.up_bytes / cluster.link.up_bit_s, copied_s * work.up_bytes),
        server_s=step.server_s * servers / shards,
        down_s=max(awaited * down_s, copied_s * work.down_bytes),
        taken_s=max(down_s, copied_s * work.down_bytes),
        decode_s=step.decode_s / shards,
        copy_s=copied_s * (work.up_bytes + work.down_bytes),
    )


def _resources(
    work: Work, cluster: Cluster, whole: _Stages, chain: _Stages, early_s: float
) -> dict[str, _Resource]:
    # Gradients are zeroed while the last shard is away: only what takes longer than that counts.
    away_s = chain.up_s + chain.server_s + chain.down_s
    zero_s = max(0.0, work.numel / work.rates.zero - away_s)
    worker_s = early_s + whole.encode_s + whole.decode_s + zero_s
    found = {
        "worker": _Resource(worker_s, chain.encode_s + chain.decode_s),
        "up": _Resource(whole.up_s, chain.up_s),
        "down": _Resource(whole.down_s, chain.taken_s),
        "server": _Resource(whole.server_s, chain.server_s),
        "copying": _Resource(whole.copy_s, chain.copy_s),
        "cores": _Resource(_cores_s(work, cluster, early_s), chain.cpu_s),
    }
    if cluster.beside:
        found["link"] = _Resource(_shared_link_s(work, cluster), chain.up_s + chain.taken_s)
    return found


def _busiest_bytes(work: Work, cluster: Cluster) -> tuple[float, float]:
    """Bytes of pushes, and of answers, on the link that carries most of them."""
    workers, servers = cluster.workers, cluster.servers
    if cluster.beside:  # of a machine with both: to the other servers, from the other workers
        lone = 1.0 if servers < workers else 0.0  # a worker without a server sends it all
        most = max((servers - 1) / servers, (workers - 1) / servers, lone)
    else:
        most = max(1.0, workers / servers)
    return most * work.up_bytes, most * work.down_bytes


def _shared_link_s(work: Work, cluster: Cluster) -> float:
    """Of a machine with a worker and a server: its pushes and its server's answers leave by it."""
    workers, servers, link = cluster.workers, cluster.servers, cluster.link
    own, others = (servers - 1) / servers, (workers - 1) / servers
    out_s = own * work.up_bytes / link.up_bit_s + others * work.down_bytes / link.down_bit_s
    in_s = own * work.down_bytes / link.down_bit_s + others * work.up_bytes / link.up_bit_s
    return 8 * max(out_s, in_s)


def _cores_s(work: Work, cluster: Cluster, early_s: float) -> float:
    """Seconds of all cores of the busiest machine, shared out evenly."""
    workers_s, servers_s = _busy_s(work, cluster)
    worker_s, server_s = workers_s / cluster.workers + early_s, servers_s / cluster.servers
    if cluster.one_machine:
        busy_s = cluster.workers * worker_s + servers_s
    elif cluster.beside:
        busy_s = worker_s + server_s
    else:
        busy_s = max(worker_s, server_s)
    return busy_s / cluster.cores


def _busy_s(work: Work, cluster: Cluster) -> tuple[float, float]:
    """Seconds of cores that all workers take together, and all servers, without compute."""
    rates, each_s = work.rates, _copied_s(work, cluster) + 2 * work.shards * MESSAGE_S
    values_s = 1 / rates.encode + 1 / rates.decode + 1 / rates.zero
    workers_s = cluster.workers * (work.numel * values_s + each_s)
    return workers_s, work.numel / rates.server + cluster.workers * each_s


def _copied_s(work: Work, cluster: Cluster) -> float:
    """What one worker's messages cost one end."""
    return (work.up_bytes + work.down_bytes) * cluster.copy_s / 2


def _crowd(cluster: Cluster) -> float:
    """How much longer a worker takes because workers share cores."""
    return max(1.0, cluster.workers / cluster.cores) if cluster.one_machine else 1.0
