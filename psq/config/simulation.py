"""What `psq simulate` is told beside what workers are: machines, network and trouble to imagine.

Texts such as "1gbit" or "0.1:4" are read by `psq_worker.simulate.settings`, which says what is
wrong with one.
"""

from __future__ import annotations

from dataclasses import dataclass

from psq.config.setting import check_fields, setting, switch

__all__ = ["SimulateConfig"]

MAX_WORKERS = 4096
MAX_SERVERS = 256


@dataclass(frozen=True, slots=True)
class SimulateConfig:
    """A job that runs in one process, in virtual time."""

    workers: int = setting(16, "virtual workers", short="-n", low=1, high=MAX_WORKERS)
    servers: int = setting(1, "virtual servers", short="-s", low=1, high=MAX_SERVERS)
    bandwidth: str = setting(
        "1gbit", "of each worker's link, each way: 100mbit, 2.5gbit, loopback", metavar="RATE"
    )
    server_bandwidth: str | None = setting(
        None, "of each server's link, which all share (default: a worker's)", metavar="RATE"
    )
    latency: str = setting("0.1ms", "of a message, one way: 50us, 1ms, 0.2s", metavar="TIME")
    loss: float = setting(0.0, "share of the messages that come damaged", low=0, high=0.5)
    compute: str = setting(
        "10ms", "a worker's own work in a step: forward, backward, encoding", metavar="TIME"
    )
    reduce: str = setting("0ms", "a server's work on one shard of a round", metavar="TIME")
    stragglers: str | None = setting(
        None, "how many workers compute slower, and how many times, as in 0.1:4", metavar="SHARE:X"
    )
    slow_links: str | None = setting(
        None, "how many workers have a slower link, and how many times", metavar="SHARE:X"
    )
    pauses: str | None = setting(
        None, "chance that a step takes longer, and the mean of how long", metavar="CHANCE:TIME"
    )
    crash: str | None = setting(
        None,
        "workers whose process ends before a step, and when a new one comes, as in 3@20+5s; "
        "without a time none comes",
        metavar="RANK@STEP[+TIME],...",
        many=True,
    )
    leave: str | None = setting(
        None, "workers that say goodbye before a step", metavar="RANK@STEP,...", many=True
    )
    participation: float = setting(
        1.0, "share of the workers that takes part in each round", above=0, high=1
    )
    non_iid: float | None = setting(
        None,
        "deal each class to the workers by a Dirichlet distribution of this alpha; a small one "
        "gives each few classes",
        above=0,
        high=1e6,
    )
    attack: str | None = setting(
        None,
        "how many workers lie, and how: sign-flip, scaled, random, nan, silent, little, as in "
        "sign-flip:2 or scaled:1:50",
        metavar="KIND:N[:STRENGTH]",
    )
    vectorised: bool | None = setting(
        None,
        "compute gradients of many workers at once, equal up to rounding (default: over 8 workers "
        "and up to 30,000 parameters)",
    )
    chunk: int = setting(64, "workers whose gradients are computed at once", low=1, high=4096)
    threads: int = setting(1, "of torch", low=1, high=1024)
    alone: bool = switch("do not time dense fp32 on the same network, to compare with")
    save_report: str | None = setting(
        None, "write settings, steps, scores and summary as JSON lines", metavar="FILE"
    )
    picture: str | None = setting(None, "draw the run as PNG", metavar="FILE")
    json: bool = switch("print the summary as JSON on stdout")
    debug: bool = switch("show a traceback with an error")

    def __post_init__(self) -> None:
        """Types and ranges."""
        check_fields(self)
