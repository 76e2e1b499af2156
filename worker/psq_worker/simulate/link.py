"""A real client and a real exchange over virtual links: nothing in them waits.

`Client.join` and `leave` would block; here `poll` is called whenever something has come or is due,
and `ready`, `over` and `gone` say how far it is. `Client.finish` is called once `over` is true, and
returns at once.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from psq.client import Client, Hooks, Patience
from psq.config import WorkerConfig
from psq.link import WorkerLinks
from psq.plan import Plan
from psq.torch.averaging import Averaging
from psq.torch.exchange import Exchange
from psq.torch.parameters import ParameterTable
from psq_proto.frames import Header
from psq_proto.messages import Leave
from psq_worker.simulate.clock import Events
from psq_worker.simulate.network import Traffic, WorkerPorts
from psq_worker.simulate.table import Table

__all__ = ["VirtualClient", "VirtualExchange"]

Spoil = Callable[[NDArray[np.uint8]], None]
"""Changes a payload, in place, before it is sent."""


class VirtualClient(Client):
    """See the module's docstring."""

    def __init__(  # noqa: PLR0913 - a client gets its world as arguments
        self,
        ports: WorkerPorts,
        plan: Plan,
        rank: int,
        hooks: Hooks,
        *,
        patience: Patience,
        events: Events,
        seed: str,
        spoil: Spoil | None,
    ) -> None:
        self._ports = ports
        self._spoil = spoil
        super().__init__(
            [port.endpoint for port in ports.links],
            plan,
            rank,
            hooks,
            patience=patience,
            rng=random.Random(seed),  # noqa: S311 - jitter and names, the same in every run
            clock=events.clock,
        )

    def _open_links(self, addresses: Sequence[str]) -> WorkerLinks:
        del addresses
        return cast("WorkerLinks", self._ports)

    @property
    def ready(self) -> bool:
        """Whether every server has welcomed this worker and given it weights."""
        return self._ready()

    @property
    def over(self) -> bool:
        """Whether `finish` would return at once."""
        return self._over()

    @property
    def gone(self) -> bool:
        """Whether every server has taken note of the goodbye."""
        return all(machine.left for machine in self._machines)

    @property
    def due_s(self) -> float:
        """When something will have to be done although nothing came."""
        return min(machine.due_s for machine in self._machines)

    @property
    def unread(self) -> bool:
        """Whether something has come that nobody has looked at."""
        return any(port.inbox for port in self._ports.links)

    def beat(self) -> None:
        """What the heartbeat thread does while the process computes."""
        self._beat()

    def bid_farewell(self) -> None:
        """Ask the machines to say goodbye; `gone` tells when they have been heard."""
        for machine in self._machines:
            machine.leave(Leave("done"))

    def drop(self) -> None:
        """The process is gone, and its connections with it."""
        self._ports.close()

    def push(self, shard: int, codec: int = 0) -> None:
        """Send a shard, as it is or spoilt."""
        if self._spoil is not None:
            self._spoil(self.said(shard))
        super().push(shard, codec)


class VirtualExchange(Exchange):
    """A worker's compressor, decoder and client, with a table that shares its weights."""

    def __init__(  # noqa: PLR0913 - as the client
        self,
        table: Table,
        plan: Plan,
        config: WorkerConfig,
        *,
        ports: WorkerPorts,
        events: Events,
        traffic: Traffic,
        seed: str,
        spoil: Spoil | None = None,
        averaging: Averaging | None = None,
    ) -> None:
        self._virtual = (ports, events, seed, spoil)
        self._replica, self._traffic = table, traffic
        super().__init__(cast("ParameterTable", table), plan, config, averaging=averaging)
        self.averaging = averaging

    @property
    def virtual_client(self) -> VirtualClient:
        """The client, as what it is."""
        return cast("VirtualClient", self.client)

    def _make_client(self, plan: Plan, config: WorkerConfig, hooks: Hooks) -> Client:
        ports, events, seed, spoil = self._virtual
        return VirtualClient(
            ports,
            plan,
            config.rank,
            hooks,
            patience=Patience(give_up_after_s=config.give_up_after_s),
            events=events,
            seed=seed,
            spoil=spoil,
        )

    def decode(self, header: Header, body: memoryview) -> None:
        """Weights came: share them with workers who have them, or decode them."""
        if header.version > 0:
            self._traffic.answered_bytes += body.nbytes
        self._replica.take(header, lambda: super(VirtualExchange, self).decode(header, body))
