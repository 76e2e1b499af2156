"""The thin shell around the machines: links, clock, waits, and the thread that says "alive".

    join -> [begin -> (payload, push, poll) of each shard | skip -> finish]* -> leave

A job has one or several servers, each with some of the shards, its own rounds and versions. There
is a `Machine` for each; they share the calling thread, one poll and one lock. Inside `join`, `poll`
and `finish` the calling thread drives them and weights are handed to the hooks; in between the
process computes, and a thread keeps sending heartbeats. That thread only ever tries to take the
lock, and puts aside what it receives, so nothing is applied behind the caller's back. Every wait is
named on the log and ends.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from psq.client import held
from psq.client.channel import Channel
from psq.client.data import Asking, Terms
from psq.client.farewell import NEEDED_S
from psq.client.hooks import Hooks
from psq.client.identity import Attempt, Identity
from psq.client.machine import Machine
from psq.client.offset import ClockOffset
from psq.client.pulse import Pulse
from psq.client.round import RoundResult, merge
from psq.client.waits import Patience, Wait
from psq.clock import parse_consistency
from psq.errors import ConfigError, GaveUpError, PsqError, StateError
from psq.keys import WorkerKeys
from psq.link import WorkerLinks
from psq.plan import Plan
from psq.timeline import MIN_WAIT_S, NOWHERE, Phase, Timeline
from psq_proto.messages import Leave, Range, clip_text

__all__ = ["Client"]

HURRIED_LINGER_S: Final = 0.5  # after Ctrl-C or an error the process should be gone within 2 s
LOOK_S: Final = 0.1  # between two looks at the links while computing, where servers may run ahead
PUSHES_PER_LOOK: Final = 16  # as often the links are looked at while pushing
CATCH_UP_LIMIT: Final = 8  # looks at what has come after the end of a step
MAX_SERVERS_NAMED: Final = 4

_log = logging.getLogger("psq.client")


class Client:
    """One worker's end of a job.

    One thread calls it. After an error that it raised, only `leave` makes sense.

    Args:
        endpoints: the server's address, or one for each server of the job, in their order.
        plan: what is trained.
        rank: this worker's number.
        hooks: see `Hooks`; called inside `join`, `poll` and `finish` only.
        patience: how it waits.
        rng: jitter, nonces and the lineage come from it.
        clock: seconds, monotonic.
        timeline: records the waits, on the same clock.
        keys: this worker's and the server's, where links are encrypted.

    Raises:
        ConfigError: the rank is not in the plan, an endpoint is no address, or there are not as
            many as the plan has servers.
    """

    def __init__(  # noqa: PLR0913 - a client gets its world as arguments
        self,
        endpoints: str | Sequence[str],
        plan: Plan,
        rank: int,
        hooks: Hooks,
        *,
        patience: Patience | None = None,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
        timeline: Timeline | None = None,
        keys: WorkerKeys | None = None,
    ) -> None:
        self.plan = plan
        self.rank = rank
        self._keys = keys
        self.waited_s = 0.0  # what blocked `join` and `finish`, in all
        self._patience = patience or Patience()
        self._clock = clock
        self._timeline = timeline
        self._step = NOWHERE
        self._in_step = parse_consistency(plan.consistency).max_staleness == 0
        addresses = (endpoints,) if isinstance(endpoints, str) else tuple(endpoints)
        if len(addresses) != plan.servers:
            msg = (
                f"the job has {plan.servers} server(s), got {len(addresses)} address(es): "
                "list every server once, in the job's order"
            )
            raise ConfigError(msg)
        rng = rng or random.Random()  # noqa: S311 - jitter and names, no secrets
        self._links = self._open_links(addresses)
        try:
            self._channels = self._open_channels(hooks, rng)
        except BaseException:
            self._links.close(0.0)
            raise
        self._machines = [channel.machine for channel in self._channels]
        self._owners = [self._channels[owner] for owner in plan.layout.owners]
        self._unseen_pushes = 0
        self._lock = threading.Lock()
        beat_s = self._patience.heartbeat_s
        waits_for_all = self._in_step and plan.replicas == 1
        self._pulse = Pulse(self._beat, beat_s if waits_for_all else min(LOOK_S, beat_s))

    def _open_links(self, addresses: Sequence[str]) -> WorkerLinks:
        """The links to these servers, in order; a simulated worker has others."""
        return WorkerLinks(addresses, keys=self._keys)

    def _open_channels(self, hooks: Hooks, rng: random.Random) -> list[Channel]:
        channels: list[Channel] = []
        for index, link in enumerate(self._links.links):
            plan = self.plan.for_server(index)
            machine = Machine(
                plan,
                self.rank,
                hooks,
                heartbeat_s=self._patience.heartbeat_s,
                rng=rng,
                is_lent=link.is_lent,
            )
            name = f"server {index} at {link.endpoint}" if self.plan.servers > 1 else ""
            channels.append(Channel(machine, link, name, len(plan.owned), self._clock))
        return channels

    @property
    def version(self) -> int:
        """The version of the weights in the replica, of its oldest shard; -1 before `join`."""
        return min(machine.replica.version for machine in self._machines)

    @property
    def versions(self) -> Sequence[int]:
        """The version of each shard; -1 before its first weights."""
        merged: dict[int, int] = {}
        for machine in self._machines:
            merged |= machine.replica.versions
        return tuple(merged[shard] for shard in sorted(merged))

    @property
    def sent_bytes(self) -> int:
        """Bytes sent so far, as on the wire (see `psq.link`)."""
        return sum(link.sent_bytes for link in self._links.links)

    @property
    def received_bytes(self) -> int:
        """Bytes received so far, as on the wire."""
        return sum(link.received_bytes for link in self._links.links)

    @property
    def resent_frames(self) -> int:
        """Frames sent again because a connection lost them."""
        return sum(machine.resent_frames for machine in self._machines)

    @property
    def resets(self) -> int:
        """How often a residual had to start again from zero."""
        return sum(machine.resets for machine in self._machines)

    @property
    def identities(self) -> list[Identity]:
        """Who this worker is to each server: what the next process is to offer."""
        return [machine.identity() for machine in self._machines]

    def already_said(self) -> Iterator[tuple[int, bool]]:
        """(shard, whether with a payload) of what a process before has said in the open step."""
        for machine in self._machines:
            if machine.round is not None:
                yield from ((shard, True) for shard in sorted(machine.round.pushed))
                yield from ((shard, False) for shard in sorted(machine.round.skipped))

    @property
    def clock_offsets(self) -> list[ClockOffset | None]:
        """How far each server's clock is from this machine's; None before its first answer."""
        return [machine.offset.best for machine in self._machines]

    def join(self, attempts: Sequence[Attempt] = (), *, lost: bool = False) -> int:
        """Join the job and take the weights; blocks until every server has some.

        Args:
            attempts: whom to go on as, the best first; the first that fits every server is loaded.
                If none does, the worker begins anew, which is logged and counted (`resets`).
            lost: there was something to go on from, and it is of no use: this is a reset as well.

        Returns:
            The version of the weights: how many rounds the job has behind it.

        Raises:
            GaveUpError: a server did not answer in time, or ended the job.
            RefusedError, RemotePlanError, RemoteVersionError: one turned this worker away, and says
                why.
            FencedError: another process has this rank.
        """
        with self._lock:
            if attempts or lost:
                self._take_up(attempts)
            self._pump(self._ready, self._patience)
        self._pulse.start()
        return self.version

    def _take_up(self, attempts: Sequence[Attempt]) -> None:
        """Go on as the first of these that fits, or as nobody."""
        for attempt in attempts:
            for machine, identity in zip(self._machines, attempt.identities, strict=True):
                machine.offer(identity)
            self._pump(lambda: all(each.welcomed for each in self._machines), self._patience)
            faults = [(each.name, each.machine.misfit()) for each in self._channels]
            fault = next((": ".join(filter(None, pair)) for pair in faults if pair[1]), "")
            fault = fault or _load(attempt)
            if not fault:
                for machine in self._machines:
                    machine.take_up()
                _log.info("rank %d goes on from %s", self.rank, attempt.name)
                return
            _log.warning("rank %d cannot go on from %s: %s", self.rank, attempt.name, fault)
        words = "rank %d begins with a residual of zeros: nothing that it has kept fits this job"
        _log.warning(words, self.rank)
        for machine in self._machines:
            machine.resets += 1
            machine.offer(None)

    def confirm(self, server: int, version: int, digest: int) -> None:
        """Tell a server that this worker's copy of a checkpoint of its is on the disk."""
        with self._lock:
            self._machines[server].confirm(version, digest)

    def begin(self, rate: float, weight: int = 1) -> int:
        """Open the next step, with the learning rate this worker asks for.

        Under bsp a server that is ahead of the others, because it has this worker's contribution
        already from a process before, sits the step out: see `takes_part`.

        Args:
            rate: the learning rate.
            weight: how much this worker's word counts in a mean.

        Returns:
            The step's number: the lowest version of the weights.
        """
        with self._lock:
            step = self._step = self.version
            for machine in self._machines:
                if machine.replica.version == step or not self._in_step:
                    machine.begin(rate, weight)
        return step

    def draw(self, epoch: int, terms: Terms) -> Range:
        """Which data the next step is to be computed from; blocks until server 0 has said.

        Weights that come meanwhile wait for the end of that step.

        Args:
            epoch: the one that this worker is at.
            terms: what all workers of the job name alike.

        Raises:
            UsageError: a step is open.
            as `join`, and RemoteProtocolError: the server does not hand out data in this job.
        """
        with self._lock:
            asking = Asking(self._machines, epoch, terms, in_step=self._in_step)
            wait = Wait(self._clock(), self._patience)
            while asking.answer is None:
                asking.ask(self._clock())
                for channel in self._channels:
                    channel.flush()
                self._report(wait)
                pause_s = min(asking.pause_s, self._pause_s(wait, self._clock()))
                self._links.wait(pause_s)
                for channel in self._channels:
                    channel.take_answers()
            return asking.answer

    def takes_part(self, shard: int) -> bool:
        """Whether this step says something of a shard: one that does not is not to be pushed."""
        current = self._owners[shard].machine.round
        if current is None or not self.plan.pushes(shard):
            return False
        return self.plan.due(shard, current.number)

    def base(self, shard: int) -> int:
        """The version that what this step says of a shard is computed from."""
        current = self._owners[shard].machine.round
        return self._step if current is None else current.number

    def rests(self, shard: int) -> bool:
        """Whether a shard is not due in this step: what it has to say waits in the residual."""
        current = self._owners[shard].machine.round
        if current is None or not self.plan.pushes(shard):
            return False
        return not self.plan.due(shard, current.number)

    def payload(self, shard: int) -> NDArray[np.uint8]:
        """Where to encode a shard: u8[nbytes], the very bytes that `push` will send.

        Of several codecs the longest has room; `push` is told which one it is.
        """
        with self._lock:
            return self._owners[shard].machine.frames.payload(shard)

    def said(self, shard: int) -> NDArray[np.uint8]:
        """What was pushed last, for `Hooks.restore`."""
        return self._owners[shard].machine.frames.said(shard)

    def push(self, shard: int, codec: int = 0) -> None:
        """Send a shard that was encoded into `payload`; never blocks. Cost: one CRC pass.

        `codec` says which of the plan's codecs for the shard (`Plan.uplink_codecs`) it is in.

        What has come meanwhile is put aside now and then, and looked at in `poll` or `finish`.
        """
        with self._lock:
            channel = self._owners[shard]
            channel.machine.push(shard, codec)
            channel.flush()
            self._unseen_pushes += 1
            if self._unseen_pushes >= PUSHES_PER_LOOK:
                self._unseen_pushes = 0
                for each in self._channels:
                    each.put_aside()

    def skip(self, shard: int | None = None) -> None:
        """Say nothing of a shard, or of every shard that nothing was said of yet."""
        with self._lock:
            channels = self._channels if shard is None else (self._owners[shard],)
            for channel in channels:
                if shard is not None or channel.machine.round is not None:
                    channel.machine.skip(shard)
                    channel.flush()

    def poll(self) -> None:
        """Send what is due and take in what has come, weights included; never blocks.

        Raises:
            as `finish`, but for the wait.
        """
        with self._lock:
            self._unseen_pushes = 0
            for channel in self._channels:
                channel.flush()
                channel.take_aside()
            self._look(0.0)

    def finish(self) -> RoundResult:
        """Wait for the verdicts and for the weights after the step.

        Of every shard something must have been said. Refused shards are restored (`Hooks.restore`).
        Where servers may run ahead, all that they have sent by then is taken in as well.

        Raises:
            UsageError: no step is open, or a shard was neither pushed nor skipped.
            as `join`, and RemotePayloadError: a server sent weights that do not fit the plan;
            RemoteProtocolError: it came back without its state.
        """
        with self._lock:
            taking = [machine for machine in self._machines if machine.round is not None]
            for machine in taking or self._machines:
                machine.check_said()
            self._pump(self._over, self._patience)
            if not self._in_step:
                self._catch_up()
            return merge([machine.end_round() for machine in taking], self.version)

    def leave(self, reason: Literal["done", "error", "interrupted"], text: str = "") -> None:
        """Tell the servers that this worker goes, and close the links. Safe to call twice.

        With "done" it waits up to `Patience.farewell_s` until all have taken note, joining again to
        say it if a connection broke just now; else it lets go within half a second.
        """
        if self._links.closed:
            return
        self._pulse.stop()
        hurried = reason != "done"
        with self._lock:
            try:
                for machine in self._machines:
                    machine.leave(Leave(reason, clip_text(text)))
                if not hurried:
                    self._say_goodbye()
                else:
                    self._wave()
            finally:
                self._links.close(HURRIED_LINGER_S if hurried else None)

    def _say_goodbye(self) -> None:
        needed = any(machine.kept.is_needed for machine in self._machines)
        farewell_s = max(self._patience.farewell_s, NEEDED_S if needed else 0.0)
        bounded = replace(self._patience, give_up_after_s=farewell_s)
        try:
            self._pump(lambda: all(machine.left for machine in self._machines), bounded)
        except GaveUpError as error:
            _log.warning("left without the server's answer: %s", error)

    def _wave(self) -> None:
        for channel in self._channels:
            with suppress(PsqError):  # an interrupt may have left anything half done
                channel.flush()

    # ---- waiting

    def _ready(self) -> bool:
        return all(machine.ready for machine in self._machines)

    def _over(self) -> bool:
        return all(machine.settled for machine in self._machines)

    def _pump(self, done: Callable[[], bool], patience: Patience) -> None:
        """Send what is due and take in what comes, until `done` or patience ends."""
        for machine in self._machines:
            machine.forget_status()
        wait = Wait(self._clock(), patience)
        while True:
            for channel in self._channels:
                channel.take_aside()
            if done():
                break
            held.tell(self._machines, wait.waited_s(self._clock()), in_step=self._in_step)
            for channel in self._channels:
                channel.flush()
            if done():  # to find nobody there may be the end of a goodbye
                break
            self._report(wait)
            self._look(self._pause_s(wait, self._clock()))
        held.tell(self._machines, 0.0, in_step=self._in_step)

    def _look(self, timeout_s: float) -> bool:
        """Take in what has come, or comes within this time; returns whether anything had."""
        blocked = [index for index, channel in enumerate(self._channels) if channel.blocked]
        before_s = self._clock() if timeout_s else 0.0
        ready = self._links.wait(timeout_s, blocked if timeout_s else ())
        if timeout_s:
            self._note_wait(before_s, self._clock())
        for index in ready:
            self._channels[index].take_in()
        return bool(ready)

    def _note_wait(self, start_s: float, end_s: float) -> None:
        self.waited_s += end_s - start_s
        if self._timeline is not None and end_s - start_s >= MIN_WAIT_S:
            self._timeline.add(Phase.WAIT, start_s, end_s, NOWHERE, self._step)

    def _pause_s(self, wait: Wait, now_s: float) -> float:
        """How long nothing has to be done, unless something comes."""
        due_s = wait.due_s
        for channel in self._channels:
            if not channel.blocked or channel.machine.due_s > now_s:
                due_s = min(due_s, channel.machine.due_s)
            # else it is due already and waits for room
        return max(0.0, due_s - now_s)

    def _catch_up(self) -> None:
        for _ in range(CATCH_UP_LIMIT):
            if not self._look(0.0):
                break
        self._pump(self._over, self._patience)  # the last look may have ended amid a full shard

    def _report(self, wait: Wait) -> None:
        for channel in self._channels:
            while channel.machine.notes:
                note = channel.machine.notes.popleft()
                _log.warning("%s%s", f"{channel.name}: " if channel.name else "", note)
        words = wait.check(self._clock(), self._waited_for())
        if words:
            _log.warning("%s", words)

    def _waited_for(self) -> str:
        """Whom this worker waits for, in words."""
        if len(self._channels) == 1:
            [only] = self._channels
            return only.machine.waited_for() or f"server {only.link.endpoint}{only.link.hint}"
        open_ = [each for each in self._channels if not each.machine.at_rest]
        words = [
            f"{each.name}: {each.machine.waited_for()}".removesuffix(": ")
            for each in open_[:MAX_SERVERS_NAMED]
        ]
        more = len(open_) - len(words)
        return "; ".join(words) + (f"; and {more} more servers" if more else "")

    def _beat(self) -> None:
        """Heartbeats from the thread, if nobody is at work on the links."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            for channel in self._channels:
                if not channel.link.closed and channel.machine.joined:
                    channel.flush()
                    channel.put_aside()
        finally:
            self._lock.release()


def _load(attempt: Attempt) -> str:
    """Load it; why that cannot be done, in words, if it cannot."""
    try:
        attempt.load()
    except StateError as error:
        return str(error)
    return ""
