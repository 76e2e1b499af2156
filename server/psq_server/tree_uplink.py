"""An aggregator's conversation with the server above: that of a worker, driven by a server's loop.

The state machine is a worker's own (`psq.client.machine`), and so are its rules: what is sent
again, what a verdict means, how a broken connection is joined anew. Nothing here waits; the loop
that owns the process calls `turn` whenever there may be something to do, and the link wakes it.

    open(plan)    join the server above, as the lowest rank of the leaves below
    turn()        send what is due, take in what came
    leave()       say goodbye, for `FAREWELL_S` at most

Silence has a bound: a server above that says nothing for `give_up_after_s` has ended the job.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final, Literal

from psq.client import Hooks, Patience
from psq.client.channel import Channel
from psq.client.machine import Machine
from psq.errors import GaveUpError, PsqError
from psq.keys import WorkerKeys
from psq.link import WorkerLink
from psq.plan import Plan
from psq_proto.messages import Leave, clip_text

__all__ = ["FAREWELL_S", "Uplink"]

FAREWELL_S: Final = 5.0
"""How long a finished aggregator waits for the server above to take note."""
HURRIED_S: Final = 0.5
"""The same when it ends for another reason."""
BLOCKED_S: Final = 0.02
"""How soon a link that had no room, or no connection, is tried again."""


class Uplink:
    """See the module's docstring.

    Args:
        endpoint: the server above.
        rank: as which the aggregator speaks there.
        patience: how it waits.
        rng: jitter, nonces and the lineage come from it.
        clock: seconds, monotonic.
        keys: its own as a worker of that server, where links are encrypted.

    Raises:
        ConfigError: the endpoint is no address.
    """

    def __init__(  # noqa: PLR0913 - a conversation gets its world as arguments
        self,
        endpoint: str,
        rank: int,
        *,
        patience: Patience,
        rng: random.Random,
        clock: Callable[[], float],
        keys: WorkerKeys | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.rank = rank
        self.link = WorkerLink(endpoint, keys=keys)
        self._patience = patience
        self._rng = rng
        self._clock = clock
        self._channel: Channel | None = None
        self._heard_s = clock()
        self._received = 0

    @property
    def is_open(self) -> bool:
        """Whether it has a job to speak of."""
        return self._channel is not None

    @property
    def machine(self) -> Machine:
        """The worker's side of the conversation, once it is open."""
        assert self._channel is not None, "nothing to say yet"  # noqa: S101 - a mistake of ours
        return self._channel.machine

    def open(self, plan: Plan, hooks: Hooks) -> None:
        """Begin to join."""
        self._heard_s = self._clock()
        machine = Machine(
            plan,
            self.rank,
            hooks,
            heartbeat_s=self._patience.heartbeat_s,
            rng=self._rng,
            is_lent=self.link.is_lent,
        )
        name = f"the server above at {self.endpoint}"
        self._channel = Channel(machine, self.link, name, len(plan.owned), self._clock)

    def turn(self) -> None:
        """Send what is due and take in what has come; weights go to the hooks.

        Raises:
            PsqError: the server above refused, ended the job, or has been silent for too long.
        """
        self.link.check()
        if self._channel is None:
            return
        self._channel.take_in()
        self._channel.flush()
        now_s = self._clock()
        if self.link.received_frames != self._received:
            self._received, self._heard_s = self.link.received_frames, now_s
        silent_s = now_s - self._heard_s
        if silent_s > self._patience.give_up_after_s:
            msg = (
                f"the server above at {self.endpoint} was last heard {silent_s:.0f} s ago; "
                "--give-up-after sets how long to wait"
            )
            raise GaveUpError(msg)

    def patience_s(self) -> float:
        """How long nothing has to be done here, unless something comes."""
        channel = self._channel
        if channel is None:
            return float("inf")
        if channel.blocked:
            return BLOCKED_S
        return max(0.0, channel.machine.due_s - self._clock())

    def waits_for(self) -> str:
        """What this conversation waits for, in words; empty for nothing."""
        if self._channel is None:
            return ""
        machine = self._channel.machine
        if not machine.joined:
            return f"waiting for the server above at {self.endpoint} to answer"
        if machine.settled:
            return ""
        words = machine.waited_for() or f"the server above at {self.endpoint}"
        return f"waiting above for {words.removeprefix('waiting for ')}"

    def leave(self, reason: Literal["done", "error", "interrupted"], text: str) -> None:
        """Say goodbye and close the link; an answer is waited for, but not long."""
        try:
            if self._channel is not None:
                self._channel.machine.leave(Leave(reason, clip_text(text)))
                self._wave(self._channel, FAREWELL_S if reason == "done" else HURRIED_S)
        except PsqError:
            pass  # whatever it says now, the job is over
        finally:
            self.link.close(HURRIED_S)

    def _wave(self, channel: Channel, patience_s: float) -> None:
        ends_s = self._clock() + patience_s
        while not channel.machine.left and (left_s := ends_s - self._clock()) > 0:
            channel.flush()
            if not channel.machine.left:
                self.link.wait(min(left_s, max(BLOCKED_S, self.patience_s())))
                channel.take_in()
