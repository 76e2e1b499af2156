"""Who a worker is to one server, and how it comes to be that: HELLO, JOIN, again and again.

A worker that begins draws a lineage. One that comes after another process offers that one's
identity, on trial: the server's answer shows whether it fits, and until it is taken up nothing else
is said or taken. Pure: time and randomness are arguments.
"""

from __future__ import annotations

import os
import platform
import random

import psq
from psq.client.identity import Identity, Welcomed
from psq.client.waits import Backoff
from psq.errors import UsageError
from psq_proto.messages import NONE, Hello, Join

__all__ = ["Standing"]


class Standing:
    """See the module's docstring.

    Args:
        rng: jitter, nonces and lineages come from it.

    Attributes:
        lineage: the name of the residual's history.
        resolved: the last seq whose verdict is known.
        is_trial: an identity was offered, and not taken up yet.
        again: whatever there was, it begins again with HELLO.
        hello_at_s: when that is due.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.lineage = rng.getrandbits(64)
        self._nonce = rng.getrandbits(64)
        self._backoff = Backoff(rng)
        self.resolved = NONE
        self.is_trial = self.again = False
        self.hello_at_s = 0.0
        self._offered: Identity | None = None
        self._welcomed: Welcomed | None = None

    @property
    def was_welcomed(self) -> bool:
        """Whether there is an answer to what was offered."""
        return self._welcomed is not None

    def offer(self, identity: Identity | None) -> None:
        """Join as this identity; None begins a new history."""
        self.begin_again()
        self.is_trial, self._offered, self._welcomed = identity is not None, identity, None
        self.lineage = self._rng.getrandbits(64) if identity is None else identity.lineage
        self.resolved = NONE if identity is None else identity.resolved

    def begin_again(self) -> None:
        """Whatever was said and answered, say HELLO now."""
        self.again, self.hello_at_s = True, 0.0

    def hello(self) -> Hello:
        """The next HELLO, as often as nobody answers it the same."""
        self.again = False
        return Hello(self._nonce, software=f"psq {psq.__version__}")

    def wait(self, now_s: float) -> None:
        """Something was said that the server is to answer: when to begin again if it does not."""
        self.hello_at_s = now_s + self._backoff.next_s()

    def join(self, pending: int, epoch: int) -> Join:
        """The JOIN of a worker that has this contribution under way.

        `epoch` is the one in which the server welcomed it last.
        """
        if self._offered is not None:
            pending, epoch = self._offered.pending_number, self._offered.epoch
        name, pid = platform.node(), os.getpid()
        return Join(self.lineage, self.resolved, pending, name, pid, epoch)

    def welcome(self, welcomed: Welcomed) -> None:
        """The server has answered."""
        self._backoff.reset()
        self._nonce = self._rng.getrandbits(64)
        if self.is_trial:
            self._welcomed = welcomed

    def misfit(self) -> str:
        """Why this server and what was offered do not go together, in words; empty if they do.

        Raises:
            UsageError: nothing was offered, or there is no answer yet.
        """
        identity, welcomed = self._trial()
        return welcomed.misfit(identity)

    def take_up(self) -> tuple[Identity, int]:
        """Be what was offered; returns it, and the version that the server has.

        Raises:
            UsageError: it does not fit, or as `misfit`.
        """
        identity, welcomed = self._trial()
        if words := welcomed.misfit(identity):
            msg = f"what was offered cannot be taken up: {words}"
            raise UsageError(msg)
        self.is_trial, self._offered = False, None
        return identity, welcomed.version

    def _trial(self) -> tuple[Identity, Welcomed]:
        if self._offered is None or self._welcomed is None:
            msg = "nothing was offered, or there is no answer yet: offer, and wait for welcomed"
            raise UsageError(msg)
        return self._offered, self._welcomed
