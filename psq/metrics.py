"""What a process tells Prometheus: names, units and meanings, written once for servers and workers.

Two kinds of numbers. Durations are observed where they are measured (`observe_step`,
`observe_phase`); everything else is a plain count that its owner keeps anyway, read through one
callable at the moment of a scrape, so counting costs the hot path nothing. Each `Metrics` has a
registry of its own: nothing is shared between two in one process, and the library's default
collectors (which would name this process's files and threads) stay out.

Never here: sockets. `psq_server.health` serves what `exposition` returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

__all__ = ["CONTENT_TYPE", "PHASES", "Metrics", "Totals"]

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
PHASES: Final = (
    "compute",
    "encode",
    "wire",
    "server",
    "decode",
    "wait",
    "receive",
    "reduce",
    "send",
)
"""Worker: compute to decode. Server: wait (for frames), receive, reduce, send."""
_BUCKETS_S: Final = (
    *(0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
    *(1.0, 3.0, 10.0, 30.0, 100.0, 300.0),
)


@dataclass(frozen=True, slots=True)
class Totals:
    """The counts at one moment; what a role does not have stays at its default and is still shown.

    Attributes:
        sent_bytes, received_bytes: on the wire, with headers.
        rounds: rounds this server has committed, or steps of this worker that were applied.
        version: of the weights held now; -1 before the first.
        pushes: contributions (worker) or shards (server) by outcome.
        skipped: contributions of nothing, because a gradient was not finite.
        workers: how many ranks are in each state.
        waiting_s: how long the present wait has lasted; 0 when nobody is waited for.
        staleness_steps: how many rounds behind the newest known weights the ones in use are.
        insecure: whether an address other than loopback is served without encryption.
    """

    sent_bytes: int = 0
    received_bytes: int = 0
    rounds: int = 0
    version: int = -1
    pushes: Mapping[str, int] = field(default_factory=dict)
    skipped: int = 0
    workers: Mapping[str, int] = field(default_factory=dict)
    waiting_s: float = 0.0
    staleness_steps: int = 0
    insecure: bool = False


class Metrics:
    """The metrics of one process.

    Args:
        role: "server" or "worker".
        version: of the package.
        kernel: the live kernel level.
        read: gives the present counts; called from the thread that serves a scrape, so it must not
            block.
    """

    def __init__(self, *, role: str, version: str, kernel: str, read: Callable[[], Totals]) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(_TotalsCollector(role, version, kernel, read))
        self._step = Histogram(
            "psq_step_seconds",
            "Time from one committed round (server) or step (worker) to the next",
            registry=self.registry,
            buckets=_BUCKETS_S,
        )
        self._phase = Histogram(
            "psq_phase_seconds",
            "Time of each round or step spent in one phase",
            ["phase"],
            registry=self.registry,
            buckets=_BUCKETS_S,
        )
        self._phases = {phase: self._phase.labels(phase) for phase in PHASES}

    def observe_step(self, duration_s: float) -> None:
        """A round or step has ended that took this long."""
        self._step.observe(duration_s)

    def observe_phase(self, phase: str, duration_s: float) -> None:
        """One round or step spent this long in `phase`, one of PHASES."""
        self._phases[phase].observe(duration_s)

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format (`CONTENT_TYPE`)."""
        return generate_latest(self.registry)


class _TotalsCollector(Collector):
    """Makes metric families of a `Totals` at each scrape."""

    def __init__(self, role: str, version: str, kernel: str, read: Callable[[], Totals]) -> None:
        self._build = {"role": role, "version": version, "kernel": kernel}
        self._read = read

    def collect(self) -> Iterator[Metric]:
        totals = self._read()
        build = GaugeMetricFamily(
            "psq_build_info", "What runs here: always 1", labels=list(self._build)
        )
        build.add_metric(list(self._build.values()), 1)
        yield build
        yield _counter(
            "psq_wire_bytes",
            "Bytes on the wire, headers counted",
            "direction",
            {"sent": totals.sent_bytes, "received": totals.received_bytes},
        )
        yield CounterMetricFamily("psq_rounds", "Committed rounds", totals.rounds)
        yield _counter("psq_pushes", "Pushes by what became of them", "outcome", totals.pushes)
        yield CounterMetricFamily(
            "psq_skipped", "Contributions of nothing (gradient not finite)", totals.skipped
        )
        yield GaugeMetricFamily(
            "psq_version", "Version of the weights; -1 before the first", totals.version
        )
        workers = GaugeMetricFamily("psq_workers", "Ranks by state", labels=["state"])
        for state, count in totals.workers.items():
            workers.add_metric([state], count)
        yield workers
        yield GaugeMetricFamily("psq_waiting_seconds", "Age of the present wait", totals.waiting_s)
        yield GaugeMetricFamily(
            "psq_staleness_steps",
            "Rounds by which the weights in use are behind",
            totals.staleness_steps,
        )
        yield GaugeMetricFamily(
            "psq_insecure",
            "1 when other machines are served without encryption",
            int(totals.insecure),
        )


def _counter(name: str, text: str, label: str, counts: Mapping[str, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=[label])
    for value, count in counts.items():
        family.add_metric([value], count)
    return family
