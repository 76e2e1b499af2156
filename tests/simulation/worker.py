"""A worker's process without a socket and without a model: machines, channels, integers.

It does what `psq.client.Client` and `psq.torch` do, cut where they would wait: join, then step
after step a while of computing, each shard said in its turn, the verdicts and the weights, and a
goodbye at the end. While it computes, only its pulse looks at the links.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from psq.client import held
from psq.client.channel import Channel
from psq.client.data import Asking, Terms
from psq.client.hooks import Hooks
from psq.client.identity import Identity
from psq.client.machine import Machine
from psq.errors import FencedError, GaveUpError, PsqError
from psq.plan import Plan
from psq_proto.frames import Buffer, Header, decode_frame
from psq_proto.messages import Flags, Leave, MessageType, Range

from .arithmetic import INITIAL, RATE, direction, is_skipped, numbers, pack, split
from .case import Case, view_of
from .clock import LocalClock, Schedule, Violation
from .copies import Copies, Copy
from .network import Network, WorkerLink
from .oracle import Oracle
from .visits import Data

__all__ = ["Kept", "Worker"]

HEARTBEAT_S: Final = 1.0
LOOK_S: Final = 0.1
SLOW: Final = 10
BATCH: Final = 2
PAUSE_S: Final = 0.05
_TYPE_OFFSET: Final = 5

Phase = Literal[
    "offering", "joining", "drawing", "computing", "saying", "finishing", "leaving", "gone"
]


@dataclass(frozen=True, slots=True)
class Kept:
    """What a process that died leaves to the next of its rank, where it leaves anything.

    It is what `psq.torch.keeper` keeps: who it was and what it computed from when its last step
    began, and of each shard the residual, and what was said since.

    Attributes:
        owner: the number of its residual's history.
        identities: who it was to each server.
        values, residual: by shard.
        said: the tickets of what was under way.
        wanted: of each shard, the last version that a direction was made at.
    """

    owner: int
    identities: tuple[Identity, ...]
    values: dict[int, tuple[int, int]]
    residual: dict[int, int]
    said: dict[int, int]
    wanted: dict[int, int]


class Worker:
    """One process of a rank's, from start to end.

    Attributes:
        phase: what it does.
        number: of the process.
        owner: the number of its residual's history, as the oracle knows it.
        fate: how it ended: "done", "fenced", "dead", "late" (a job that went on
            without it, and ended), or in a server's words.
        stalled_until_s: it reads nothing before.
        left_alone: of each server, whether it was not there when this process ended.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - a process gets its world as arguments
        self,
        rank: int,
        owner: int,
        case: Case,
        schedule: Schedule,
        network: Network,
        oracle: Oracle,
        copies: Copies,
        number: int,
        kept: Kept | None = None,
    ) -> None:
        self.rank = rank
        self.copies = copies
        self.number = number
        self.owner = owner
        self.case = case
        self.schedule = schedule
        self.oracle = oracle
        self.phase: Phase = "joining"
        self.fate = ""
        self.stalled_until_s = 0.0
        self.left_alone: tuple[bool, ...] = ()
        self.plan: Plan = oracle.plan
        self.rng = random.Random(f"{case.seed}/{owner}")  # noqa: S311 - a simulation
        self.clock = LocalClock(schedule, self.rng.uniform(0.0, 1e5))
        self.values = dict.fromkeys(range(case.shards), (0, 0))
        self.residual = dict.fromkeys(self.values, 0)
        self.said: dict[int, int] = {}
        self._wanted: dict[int, int] = {}
        self._unsaid: list[int] = []
        self._kept = kept
        self._has_folder = rank not in oracle.contested  # else another process holds it
        self._older = copies.found() if self._has_folder else []
        self._wanted_copies: dict[int, int] = {}
        self._base: tuple[tuple[Identity, ...], dict[int, tuple[int, int]]] | None = None
        self._timer_s = float("inf")
        self._step = 0
        self._epoch = 0
        self._data: Data | None = None
        self._asking: Asking | None = None
        self._waits_s = 0.0
        if kept is None:
            oracle.begins(owner)
        self.links = [
            WorkerLink(network, rank, server, self._on_arrival) for server in range(case.servers)
        ]
        for link in self.links:
            link.on_sent = self._goes_up
        self.channels = [self._channel(server, link) for server, link in enumerate(self.links)]
        self.machines = [channel.machine for channel in self.channels]
        self._offer(None if kept is None else kept.identities)
        schedule.after(0.0, self._pump)

    def _channel(self, server: int, link: WorkerLink) -> Channel:
        plan = view_of(self.plan, server)
        hooks = Hooks(
            self._initial, self._weights, self._restore, self._reset, checkpoint=self._want_copy
        )
        machine = Machine(
            plan,
            self.rank,
            hooks,
            heartbeat_s=HEARTBEAT_S,
            rng=self.rng,
            is_lent=link.is_lent,
        )
        return Channel(machine, link, "", len(plan.owned), self.clock.now_s)  # type: ignore[arg-type]

    @property
    def alive(self) -> bool:
        """Whether this process runs."""
        return self.phase != "gone"

    # ---- what the network and the clock bring

    def _on_arrival(self) -> None:
        if self.phase not in {"computing", "saying", "gone"}:
            self.schedule.after(0.0, self._pump)

    def _set_timer(self) -> None:
        """Come back when a machine will have something to do although nothing came."""
        due_s = min(
            (
                channel.machine.due_s
                for channel in self.channels
                if not channel.blocked or channel.machine.due_s > self.clock.now_s()
            ),
            default=float("inf"),
        )
        if due_s == float("inf"):
            return
        least_s = LOOK_S if self.phase in {"computing", "saying"} else 0.0
        at_s = self.schedule.now_s + max(least_s, due_s - self.clock.now_s())
        if at_s < self._timer_s or self._timer_s <= self.schedule.now_s:
            self._timer_s = at_s
            self.schedule.at(at_s, self._on_timer)

    def _on_timer(self) -> None:
        if self.schedule.now_s >= self._timer_s:
            self._timer_s = float("inf")
        if self.phase in {"computing", "saying"}:
            self._pulse()
        else:
            self._pump()

    def _pulse(self) -> None:
        """What the client's thread does while the process computes."""
        for channel in self.channels:
            if channel.machine.joined:
                channel.flush()
                channel.put_aside()
        self._set_timer()

    def _pump(self) -> None:
        """Send what is due, take in what came, and go on if nothing more is waited for."""
        if self.phase in {"computing", "saying", "gone"}:
            return
        if self.schedule.now_s < self.stalled_until_s:
            self.schedule.at(self.stalled_until_s, self._pump)
            return
        try:
            if self.phase == "drawing" and not self._draw():
                self._set_timer()
                return
            while self.phase != "drawing" and not self._look():
                if not any(link.inbox for link in self.links):
                    self._set_timer()
                    return
                for channel in self.channels:
                    channel.take_in()
        except PsqError as error:
            self._fail(error)
            return
        self._go_on()

    def _look(self) -> bool:
        """Whether nothing more is waited for, after all that was put aside and is due."""
        for channel in self.channels:
            channel.take_aside()
        if self._is_over():
            return True
        if self.phase == "finishing":
            self._tell_held(self.clock.now_s() - self._waits_s)
        for channel in self.channels:
            channel.flush()
        return self._is_over()

    def _tell_held(self, waited_s: float) -> None:
        held.tell(self.machines, waited_s, in_step=self._in_step)

    def _fail(self, error: PsqError) -> None:
        fenced = isinstance(error, FencedError)
        self.schedule.note("worker ends", self.rank, self.owner, error)
        late = isinstance(error, GaveUpError) and self.case.min_workers > 0
        behind = bool(self.oracle.rolled) and "ROLLBACK" in str(error)
        if behind:
            self.oracle.check_rollback(self.rank, str(error))
        fates = {"fenced": fenced, "late": late, "rolled-back": behind}
        fate = next((name for name, is_so in fates.items() if is_so), "")
        self.stop(fate or f"{type(error).__name__}: {error}")
        if not fate:
            self.oracle.failed = f"rank {self.rank} ended with {type(error).__name__}: {error}"

    # ---- the training loop

    def _is_over(self) -> bool:
        if self.phase == "leaving":
            return all(machine.left for machine in self.machines)
        if self.phase == "offering":
            return all(machine.welcomed for machine in self.machines)
        if self.phase == "joining":
            return all(machine.ready for machine in self.machines)
        return all(machine.settled for machine in self.machines)

    @property
    def version(self) -> int:
        """The version of its weights, of the oldest shard."""
        return min(machine.replica.version for machine in self.machines)

    def _go_on(self) -> None:
        if self.phase == "leaving":
            self.stop("done")
            return
        if self.phase == "drawing":
            assert self._asking is not None
            assert self._asking.answer is not None
            self._drawn(self._asking.answer)
            return
        if self.phase == "offering":
            self._take_up()
            return
        if self.phase == "finishing":
            self._tell_held(0.0)
            for machine in self.machines:
                if machine.round is not None:
                    self._end_round(machine)
            self._copy()
        is_held = any(machine.round is not None for machine in self.machines)
        if self.version >= self.case.rounds and not is_held:
            self.phase = "leaving"
            for machine in self.machines:
                machine.leave(Leave("done"))
            self._pump()
            return
        self._begin()

    def _offer(self, identities: Sequence[Identity] | None) -> None:
        """Offer to go on as somebody: who kept all, or the newest copy that is left; or as nobody.

        Whoever was kept is offered first: it has the newest version.
        """
        if identities is None and self._older:
            identities = self._older[0].identities
        if identities is None:
            return
        self.phase = "offering"
        for machine, identity in zip(self.machines, identities, strict=True):
            machine.offer(identity)

    def _take_up(self) -> None:
        """Go on as who was offered, if that fits every server; else the next, or begin anew."""
        kept, self._kept = self._kept, None
        copy = self._older.pop(0) if kept is None else None
        self.phase = "joining"
        misfits = [words for machine in self.machines if (words := machine.misfit())]
        self.schedule.note("goes on", self.rank, self.owner, misfits)
        if not misfits:
            self._older.clear()
            if kept is not None:
                self._base = (kept.identities, kept.values)
                self.values, self.residual = dict(kept.values), dict(kept.residual)
                self.said, self._wanted = dict(kept.said), dict(kept.wanted)
            elif copy is not None:
                self.oracle.recall(self.owner, copy)
                self.residual, self._wanted = dict(copy.residual), dict(copy.wanted)
            for machine in self.machines:
                machine.take_up()
        else:
            if kept is not None:
                self.oracle.misfit(self.rank, misfits)
                self.oracle.loses(self.owner)
                self.owner = self.oracle.new_owner()
            if not self._older:
                for machine in self.machines:
                    machine.offer(None)
            self._offer(None)
        self._pump()

    def _want_copy(self, server: int, version: int) -> None:
        """A server makes this version a checkpoint."""
        self._wanted_copies[server] = version

    def _copy(self) -> None:
        """Keep what goes with a checkpoint, and say what is kept by now."""
        for done in self.copies.news() if self._has_folder else ():
            for server in done.servers:
                self.machines[server].confirm(done.version, 0)
        version, wanted = self.version, self._wanted_copies
        servers = tuple(sorted(s for s in wanted if wanted[s] == version))
        if not servers or not self._has_folder:
            return
        identities = tuple(replace(m.identity(), versions={}) for m in self.machines)
        tickets = len(self.oracle.tickets)
        residual, wants = dict(self.residual), dict(self._wanted)
        copy = Copy(version, servers, self.owner, tickets, identities, residual, wants)
        self.copies.write(copy)

    def keep(self) -> Kept | None:
        """What a process that comes after this one may go on from; None before its first step."""
        if self._kept is not None or self._base is None:
            return self._kept
        identities, values = self._base
        pending = [machine.identity().pending for machine in self.machines]
        return Kept(
            self.owner,
            tuple(replace(i, pending=p) for i, p in zip(identities, pending, strict=True)),
            values,
            dict(self.residual),
            dict(self.said),
            dict(self._wanted),
        )

    def _end_round(self, machine: Machine) -> None:
        ended = machine.end_round()
        for shard in sorted(ended.pushed):
            if shard in self.said:  # else it was restored
                behind = not self._is_current(machine)
                self.oracle.hears(self.said.pop(shard), "applied", behind=behind)

    def _is_current(self, machine: Machine) -> bool:
        """Whether this worker has to know what that server knows."""
        epoch = machine.session.epoch if machine.joined else -1
        return self.oracle.is_current(self.machines.index(machine), epoch)

    def _begin(self) -> None:
        """Begin a step, with data if any are handed out."""
        if all(machine.round is None for machine in self.machines):
            identities = tuple(machine.identity() for machine in self.machines)
            self._base = (identities, dict(self.values))
        if self.case.data:
            self._ask()
        else:
            self._compute()

    def _ask(self) -> None:
        """Ask what to compute the next step from."""
        terms = Terms(self.case.data, BATCH, self.case.seed)
        self._asking = Asking(self.machines, self._epoch, terms, in_step=self._in_step)
        self.phase, self._data = "drawing", None
        self._pump()

    def _draw(self) -> bool:
        """Whether there is an answer, after all that has come; but for weights, which wait."""
        assert self._asking is not None
        while self._asking.answer is None:
            self._asking.ask(self.clock.now_s())
            for channel in self.channels:
                channel.flush()
            if not any(link.inbox for link in self.links):
                return False
            for channel in self.channels:
                channel.take_answers()
        return True

    def _drawn(self, answer: Range) -> None:
        """Do what `psq.torch.ElasticSampler` does with an answer."""
        self.schedule.note("drawn", self.rank, answer)
        self.phase = "computing"
        if answer.state == "end":
            self._epoch = answer.epoch
            self._ask()
        elif answer.state == "wait" and self.case.consistency == "asp":
            self.schedule.after(PAUSE_S, self._ask_again)
        elif answer.state != "drawn" and not self._in_step:
            self.schedule.after(PAUSE_S, self._sit_out)
        elif answer.state != "drawn":
            self._sit_out()
        else:
            self._data = (answer.epoch, answer.ranges)
            self._compute()

    def _ask_again(self) -> None:
        if self.alive:
            self._ask()

    def _sit_out(self) -> None:
        """A step in which nothing is said."""
        if not self.alive:
            return
        self._begin_rounds()
        for channel in self.channels:
            if channel.machine.round is not None:
                channel.machine.skip()
                channel.flush()
        self._finish()

    def _begin_rounds(self) -> None:
        self._step = self.version
        for server, machine in enumerate(self.machines):
            held = machine.round is not None  # it goes on after a crash
            if held or machine.replica.version == self._step or not self._in_step:
                number = machine.begin(RATE).number
                if self._is_current(machine):
                    self.oracle.computes(self.rank, server, number, self.number)
        self._check_replica()

    def _compute(self) -> None:
        """Compute for a while, then say one shard after the other."""
        self._begin_rounds()
        self.phase = "computing"
        self._unsaid = list(self.values)
        if self.case.own_order:
            self.rng.shuffle(self._unsaid)
        slow = SLOW if self.case.slow == self.rank else 1
        self.schedule.after(self.rng.uniform(0.5, 1.5) * self.case.compute_s * slow, self._say)
        self._set_timer()

    @property
    def _in_step(self) -> bool:
        return self.case.consistency.startswith("bsp")

    def _check_replica(self) -> None:
        for machine in filter(self._is_current, self.machines):
            for shard, version in machine.replica.versions.items():
                if self.case.every == 1:
                    self.oracle.check_replica(self.rank, shard, version, self.values[shard])

    def _say(self) -> None:
        """Say the next shard; after the last one, wait for what becomes of it."""
        if self.phase not in {"computing", "saying"}:
            return
        self.phase = "saying"
        if self._unsaid:
            self._say_shard(self._unsaid.pop(0))
            self.schedule.after(self.rng.uniform(0.0, self.case.say_s), self._say)
            return
        self._finish()

    def _finish(self) -> None:
        """All is said: wait for what becomes of it."""
        self.phase, self._waits_s = "finishing", self.clock.now_s()
        self._pump()

    def _say_shard(self, shard: int) -> None:
        channel = self.channels[self.oracle.owners[shard]]
        machine = channel.machine
        current = machine.round
        if current is None or shard in current.pushed or shard in current.skipped:
            return  # this server is ahead: it has what would be said; or it was said before a crash
        if self._wanted.get(shard) != current.number:
            self._wanted[shard] = current.number
            weight = self.values[shard][0]
            wants = direction(self.rank, current.number, shard, weight)
            self.residual[shard] += wants
            self.oracle.wants(self.owner, shard, wants)
        if not channel.machine._plan.due(shard, current.number):
            return
        if self.case.skips and is_skipped(self.rank, current.number, shard):
            machine.skip(shard)
        else:
            self._encode(machine, shard, current.number)
            machine.push(shard)
        channel.flush()

    def _encode(self, machine: Machine, shard: int, base: int) -> None:
        said, rest = split(self.residual[shard])
        self.residual[shard] = rest
        ticket = self.oracle.says(self.rank, self.owner, base, shard, said, self._data)
        self.said[shard] = ticket.number
        payload = machine.frames.payload(shard)
        payload[:] = np.frombuffer(pack(said, ticket.number), np.uint8)

    # ---- hooks

    def _initial(self, _: int) -> NDArray[np.float32]:
        return np.array([INITIAL, 0], np.float32)

    def _weights(self, header: Header, body: memoryview) -> None:
        came = numbers(body)
        before = self.values[header.shard] if header.flags & Flags.DELTA else (0, 0)
        now = self.values[header.shard] = (before[0] + came[0], before[1] + came[1])
        self.oracle.check_taken(self.rank, header.shard, header.version, now)

    def _restore(self, shard: int) -> None:
        machine = self.machines[self.oracle.owners[shard]]
        value, ticket = numbers(machine.frames.said(shard).data)
        assert self.said.pop(shard) == ticket
        self.residual[shard] += value
        self.oracle.hears(ticket, "returned")

    def _reset(self, shards: Sequence[int]) -> None:
        if self.rank not in self.oracle.contested and not self.oracle.has_forgotten:
            msg = f"rank {self.rank} was told to forget its residuals of {shards}"
            raise Violation(msg)
        self.oracle.forgets(self.owner)
        self.owner = self.oracle.new_owner()
        self.residual = dict.fromkeys(self.values, 0)
        for shard in list(self.said):
            current = self.machines[self.oracle.owners[shard]].round
            void = shard in shards and (current is None or not current.outcome)
            self.oracle.hand_over(self.said[shard], None if void else self.owner)
            if void:
                del self.said[shard]

    def _goes_up(self, frame: Buffer) -> None:
        if not self.alive:
            msg = f"rank {self.rank} speaks, although it is {self.fate}"
            raise Violation(msg)
        if frame[_TYPE_OFFSET] == MessageType.CKPT_OK:
            version = decode_frame(frame).header.version
            if not self.copies.has(version):
                msg = f"rank {self.rank} says that it has a copy of version {version}"
                raise Violation(msg)
        self.oracle.goes_up(self.owner, frame)

    # ---- the end

    def stop(self, fate: str, *, keeps: bool = False) -> None:
        """This process is over, and with it its residual, unless it was kept."""
        self.left_alone = tuple(link.connection is None for link in self.links)
        self.phase = "gone"
        self.fate = fate
        if fate != "done" and not keeps:
            self.oracle.loses(self.owner)
        self.schedule.note("worker is gone", self.rank, self.owner, fate)
        if self._has_folder:
            self.copies.end()
        for link in self.links:
            link.close()
