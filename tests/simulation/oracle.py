"""What must hold, whatever happens; asked after every event, in exact integers.

    conservation   of each shard: all that workers wanted to say == what the server's weights took
                   + residuals + what is said and not heard of + what died with a worker
    at most once   a ticket (one encoding) is reduced once; a contribution is encoded once, and
                   every time it is sent it is the same bytes
    replicas       what a worker holds as version v is what the server made as version v
    output commit  what was said of a version, and what was computed from it, no crash takes back
    versions       grow one by one; a recovered server knows all that it ever answered for
    fencing        who was fenced, or lost its rank to a later process, counts no more
    G5             where all ranks are in every round and nothing was lost, each version is the one
                   of the undisturbed run

It knows everything that happens in all processes, which no process does.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final

from psq_proto.frames import Buffer, decode_frame
from psq_proto.messages import Flags, MessageType
from psq_server.state import Pushed

from .arithmetic import INITIAL, direction, is_refused, is_skipped, numbers, split
from .case import Case, plan_of, view_of
from .clock import Violation
from .copies import Copy
from .visits import Data, Visits

__all__ = ["Oracle", "Ticket", "reference"]

_TYPE_OFFSET: Final = 5
MANY: Final = 1000
"""More processes than a run has."""
_VERSIONS: Final = re.compile(r"(?:round|version|is at|resolved) (-?[0-9]+)")
_OF_A_VERSION: Final = frozenset({MessageType.VERDICT, MessageType.STATUS, MessageType.WELCOME})


@dataclass(slots=True)
class Ticket:
    """One encoding of one shard.

    Attributes:
        owner: the residual's history that it belongs to, and will return to.
        state: "open" until its worker hears of it, then "applied" or "returned"; "orphan" if its
            worker died and took its residual along; "void" if its worker began again before it, so
            that it must not count any more.
        drawn: whether it was computed from data that server 0 had handed out.
        round: in which it was reduced, by the server as it is now; None: it was not.
    """

    number: int
    rank: int
    owner: int
    base: int
    shard: int
    value: int
    state: str = "open"
    round: int | None = None
    drawn: bool = False


class Oracle:
    """See the module's docstring."""

    def __init__(self, case: Case) -> None:
        self.case = case
        plan = plan_of(
            case.workers,
            case.servers,
            case.shards,
            case.consistency,
            case.every,
            case.downlink,
            case.judged,
        )
        self.plan = plan
        self.owners = plan.layout.owners
        shards = range(case.shards)
        self.wanted = dict.fromkeys(shards, 0)
        self.lost = dict.fromkeys(shards, 0)
        self.residuals: dict[int, dict[int, int]] = {}
        self.tickets: dict[int, Ticket] = {}
        self.loose: dict[int, dict[int, Ticket]] = {shard: {} for shard in shards}
        self.history: dict[int, dict[int, tuple[int, int]]] = {
            shard: {0: (INITIAL, 0)} for shard in shards
        }
        self.newest = dict.fromkeys(shards, 0)
        self.versions = dict.fromkeys(range(case.servers), 0)
        self.nothing = 0 if case.durability == "off" else -1
        self.durable = dict.fromkeys(range(case.servers), self.nothing)
        self.promised = dict.fromkeys(range(case.servers), 0)
        """The newest version that anybody was told of, or computed from."""
        self.up = dict.fromkeys(range(case.servers), True)
        self.epochs = dict.fromkeys(range(case.servers), 0)
        self.rolled: dict[int, int] = {}
        """The lowest version that a server came back at, after it had answered for a later one."""
        self.known: dict[tuple[int, int], int] = {}
        """The newest version of a server's that a process computed from."""
        self.doomed: set[tuple[int, int]] = set()
        """(process, server): it computed from a version that never happened, and has to end."""
        self.losses = 0
        self.visits = Visits(case.data)
        self.failed = ""
        self.contested: set[int] = set()
        """Ranks that two processes have held at once: who was pushed out may come back, without a
        residual."""
        self._said: dict[tuple[int, int, int], int] = {}
        self._encoded: dict[int, tuple[int, int]] = {}
        self._sent: dict[tuple[int, int, int], bytes] = {}
        self._dirty: set[int] = set()
        self._void: set[tuple[int, int, tuple[int, int]]] = set()
        """What crashes took back: it may still be under way, but nobody may compute from it."""

    # ---- workers

    def begins(self, owner: int) -> None:
        """A residual begins, at zero."""
        self.residuals[owner] = dict.fromkeys(self.wanted, 0)

    def new_owner(self) -> int:
        """A residual of zeros, of a process that begins anew."""
        owner = len(self.residuals) + MANY
        self.begins(owner)
        return owner

    @property
    def has_forgotten(self) -> bool:
        """Whether a server may have lost what it knew: it came back, and has no journal."""
        return self.case.durability == "checkpoint" and max(self.epochs.values()) > 1

    def misfit(self, rank: int, words: list[str]) -> None:
        """A process could not go on from what was kept: another one, or a server, has to be why."""
        if rank not in self.contested and not self.has_forgotten:
            msg = f"rank {rank} cannot go on from what it kept: {words}"
            raise Violation(msg)

    def wants(self, owner: int, shard: int, value: int) -> None:
        """A worker has made a direction; it is in its residual."""
        self.wanted[shard] += value
        self.residuals[owner][shard] += value
        self._dirty.add(shard)

    def says(  # noqa: PLR0913, PLR0917 - all that an encoding is
        self,
        rank: int,
        owner: int,
        base: int,
        shard: int,
        value: int,
        data: Data | None = None,
    ) -> Ticket:
        """A worker encodes: this much of its residual goes into a payload, computed from these."""
        key = (owner, base, shard)
        if key in self._said:
            msg = f"rank {rank} encoded shard {shard} of round {base} twice"
            raise Violation(msg)
        ticket = Ticket(len(self.tickets) + 1, rank, owner, base, shard, value)
        if self.case.data and self.owners[shard] == 0:
            ticket.drawn = True
            self.visits.computes((owner, base), data)
        self._said[key] = ticket.number
        self._encoded[ticket.number] = (owner, base)
        self.tickets[ticket.number] = ticket
        self.loose[shard][ticket.number] = ticket
        self.residuals[owner][shard] -= value
        self._dirty.add(shard)
        return ticket

    def hears(self, ticket: int, state: str, *, behind: bool = False) -> None:
        """A worker has heard of what it said: "applied", or "returned" to its residual.

        Args:
            ticket: what was said.
            state: what became of it.
            behind: it was a server that is no more who said so, and no journal was kept.
        """
        heard = self.tickets[ticket]
        if heard.state != "open":
            msg = f"{heard} is {state} now, although it was {heard.state}"
            raise Violation(msg)
        if behind and state == "applied" and heard.round is None:
            self._void_ticket(heard)
            return
        kept = self.durable[self.owners[heard.shard]]
        if state == "applied" and (heard.round is None or heard.round >= kept):
            msg = f"{heard} is said to count: {kept} versions are on disk"
            raise Violation(msg)
        heard.state = state
        del self.loose[heard.shard][ticket]
        if state == "returned":
            self.residuals[heard.owner][heard.shard] += heard.value
        self._dirty.add(heard.shard)

    def forgets(self, owner: int) -> None:
        """A residual is gone; what was said out of it is still to be heard of."""
        for shard, value in self.residuals[owner].items():
            self.lost[shard] += value
            self._dirty.add(shard)
        self.residuals[owner] = dict.fromkeys(self.wanted, 0)
        self.losses += 1

    def hand_over(self, ticket: int, owner: int | None) -> None:
        """What was said belongs to another residual now, or to none."""
        heard = self.tickets[ticket]
        if owner is None:
            heard.state = "orphan"
        else:
            heard.owner = owner

    def _void_ticket(self, ticket: Ticket) -> None:
        """What was said never counts: it is lost, wherever it is."""
        assert ticket.round is None, ticket
        ticket.state = "void"
        self.lost[ticket.shard] += ticket.value
        self.loose[ticket.shard].pop(ticket.number, None)
        self._dirty.add(ticket.shard)

    def recall(self, owner: int, copy: Copy) -> None:
        """A process begins with what a copy holds: nothing of that rank may count since.

        Raises:
            Violation: something does.
        """
        for ticket in self.tickets.values():
            if ticket.owner != copy.owner or ticket.number <= copy.tickets:
                continue
            if ticket.round is not None:
                msg = f"rank {ticket.rank} goes on from its copy of {copy.version}: {ticket} counts"
                raise Violation(msg)
            if ticket.state in {"open", "orphan"}:
                self._void_ticket(ticket)
        self.residuals[owner] = dict(copy.residual)
        for shard, value in copy.residual.items():
            self.lost[shard] -= value
            self._dirty.add(shard)

    def loses(self, owner: int) -> None:
        """A residual is gone, with all that was under way of it."""
        self.forgets(owner)
        for loose in self.loose.values():
            for ticket in loose.values():
                if ticket.owner == owner and ticket.state == "open":
                    ticket.state = "orphan"

    def check_taken(self, rank: int, shard: int, version: int, has: tuple[int, int]) -> None:
        """What a worker has just taken is what the server made, or had made before a crash."""
        if (shard, version, has) not in self._void:
            self.check_replica(rank, shard, version, has)

    def check_replica(self, rank: int, shard: int, version: int, has: tuple[int, int]) -> None:
        """What a worker computes from is what the server made."""
        made = self.history[shard].get(version)
        if made != has:
            msg = f"rank {rank} holds {has} as version {version} of shard {shard}, made was {made}"
            raise Violation(msg)

    def is_current(self, server: int, epoch: int) -> bool:
        """Whether a worker that is in this epoch of a server's has to know what that has lost."""
        return self.case.durability != "checkpoint" or epoch == self.epochs[server]

    def computes(self, rank: int, server: int, version: int, process: int) -> None:
        """A worker computes from these weights: they are committed, no crash takes them back."""
        if (process, server) in self.doomed:
            msg = f"rank {rank} goes on, although it had computed from a version that is gone"
            raise Violation(msg)
        self.known[process, server] = version
        if version > self.versions[server] or version > self.durable[server]:
            msg = (
                f"rank {rank} computes from version {version}: server {server} has committed "
                f"{self.versions[server]}, {self.durable[server]} of it on disk"
            )
            raise Violation(msg)
        self.promised[server] = max(self.promised[server], version)

    def goes_up(self, owner: int, frame: Buffer) -> None:
        """A worker sends something: what it pushes is what it pushed before."""
        if frame[_TYPE_OFFSET] not in {MessageType.PUSH, MessageType.AGAIN}:
            return
        header, body = decode_frame(frame)
        if header.flags & Flags.SKIP:
            return
        key, said = (owner, header.seq, header.shard), bytes(body)
        if self._sent.setdefault(key, said) != said:
            msg = f"rank {header.rank} sent other bytes for shard {header.shard} of {header.seq}"
            raise Violation(msg)

    # ---- servers

    def reduced(
        self,
        server: int,
        round_: int,
        shard: int,
        said: tuple[Pushed, ...],
        now: tuple[int, int],
    ) -> None:
        """A server has reduced a shard."""
        before = self.history[shard][self.newest[shard]]
        for pushed in said:
            value, number = numbers(pushed.payload)
            ticket = self.tickets[number]
            assert (ticket.rank, ticket.shard) == (pushed.rank, shard), (ticket, pushed.rank)
            if ticket.round is not None or ticket.state == "void":
                msg = f"{ticket} is reduced again, in round {round_}"
                raise Violation(msg)
            ticket.round = round_
            if ticket.drawn and not self.has_forgotten:
                self.visits.counts(self._contribution(ticket), number)
            before = (before[0] + value, before[1] + number)
        if before != now:
            msg = f"server {server} made {now} of shard {shard}, of what was said {before}"
            raise Violation(msg)
        self.history[shard][round_ + 1] = now
        self.newest[shard] = round_ + 1
        self._dirty.add(shard)

    def _contribution(self, ticket: Ticket) -> tuple[int, int]:
        """Of which contribution it was encoded; whose residual it is may have changed since."""
        return self._encoded[ticket.number]

    def hands_out(self, epoch: int) -> None:
        """Server 0 hands out the data of this epoch.

        Raises:
            Violation: of one before an index was left out.
        """
        if not self.has_forgotten:
            self.visits.is_at(epoch)

    def committed(self, server: int, version: int, *, durable: bool) -> None:
        """A server has committed a version."""
        if version != self.versions[server] + 1:
            msg = f"server {server} went from version {self.versions[server]} to {version}"
            raise Violation(msg)
        self.versions[server] = version
        for shard, owner in enumerate(self.owners):
            if owner == server:  # one that had no turn is what it was
                made = self.history[shard]
                made.setdefault(version, made[self.newest[shard]])
                self.newest[shard] = version
        if durable:
            self.durable[server] = version

    def is_durable(self, server: int, version: int) -> None:
        """This version of a server's, and all before it, is on its disk."""
        self.durable[server] = max(self.durable[server], version)

    def down(self, server: int) -> None:
        """A server died."""
        self.up[server] = False

    def recovered(self, server: int, version: int, values: Mapping[int, tuple[int, int]]) -> None:
        """A server is back with this version, and these weights; none before the first version.

        Raises:
            Violation: it answered for a later one, or these are others than it had.
        """
        if version < self.promised[server] and self.case.durability == "checkpoint":
            self._roll_back(server, version)
        if version < self.promised[server]:
            msg = (
                f"server {server} is back at version {version}, and had answered for "
                f"{self.promised[server]}"
            )
            raise Violation(msg)
        self.up[server] = True
        self.versions[server] = version
        self.durable[server] = max(self.durable[server], version) if values else self.nothing
        mine = [shard for shard, owner in enumerate(self.owners) if owner == server]
        for shard in mine:
            made = self.history[shard]
            for later in [v for v in made if v > version]:
                self._void.add((shard, later, made.pop(later)))
            self.newest[shard] = version
            if values and values[shard] != made.get(version):
                msg = f"shard {shard} is back as {values[shard]}, was {made.get(version)}"
                raise Violation(msg)
        for ticket in self.tickets.values():
            if ticket.shard in mine and ticket.round is not None and ticket.round >= version:
                ticket.round = None
                self.visits.is_void(self._contribution(ticket), ticket.number)
                if ticket.state == "applied":
                    self._void_ticket(ticket)
        self._dirty.update(mine)

    def _roll_back(self, server: int, version: int) -> None:
        """A server without a journal is back at its last checkpoint."""
        self.rolled[server] = min(version, self.rolled.get(server, version))
        self.promised[server] = self.durable[server] = version
        self.losses += 1
        self.doomed |= {
            each for each, knows in self.known.items() if each[1] == server and knows > version
        }

    def check_rollback(self, rank: int, words: str) -> None:
        """A worker ends because a server is behind it: it names both rounds, and it is so.

        Raises:
            Violation: it does not, or it is not.
        """
        named = sorted({int(number) for number in _VERSIONS.findall(words)})
        if len(named) < 2 or not any(at < named[-1] for at in self.rolled.values()):
            msg = f"rank {rank} ends with {words!r}; servers came back at {self.rolled}"
            raise Violation(msg)

    def remade(self, server: int, values: Mapping[int, tuple[int, int]]) -> None:
        """A server has made again, of what workers kept, all that it had lost."""
        for shard, value in values.items():
            made = self.history[shard][self.versions[server]]
            if value != made:
                msg = f"shard {shard} is made again as {value}, was {made}"
                raise Violation(msg)

    def goes_down(self, server: int, frame: Buffer) -> None:
        """A server says something: it answers for no version that a crash would take back."""
        kind = frame[_TYPE_OFFSET]
        if self.case.durability == "checkpoint" and kind in _OF_A_VERSION:
            told = decode_frame(frame).header.version
            self.promised[server] = max(self.promised[server], told)
        if not self.case.is_logged:
            return
        if kind == MessageType.WEIGHTS:
            ahead = self.case.consistency == "bsp" and not self.case.judged
        elif kind in _OF_A_VERSION:
            ahead = False
        else:
            return
        header = decode_frame(frame).header
        allowed = self.durable[server] + (ahead and self.durable[server] >= 0)
        if kind == MessageType.WEIGHTS and header.version <= allowed:
            return
        if header.version > max(0, self.durable[server]) or kind == MessageType.WEIGHTS:
            msg = (
                f"server {server} says {header.type.name} of version {header.version}: "
                f"{self.durable[server]} is on disk"
            )
            raise Violation(msg)
        self.promised[server] = max(self.promised[server], header.version)

    # ---- always

    def check(self) -> None:
        """Conservation, of each shard that something was done to.

        Raises:
            Violation: it does not hold.
        """
        if not self._dirty:
            return
        for shard in sorted(self._dirty):
            if self.up[self.owners[shard]]:
                self._check_shard(shard)
                self._dirty.discard(shard)

    def _check_shard(self, shard: int) -> None:
        applied = self.history[shard][self.newest[shard]][0] - INITIAL
        kept = sum(residual[shard] for residual in self.residuals.values())
        waiting = sum(t.value for t in self.loose[shard].values() if t.round is None)
        if self.wanted[shard] == applied + kept + waiting + self.lost[shard]:
            return
        msg = (
            f"shard {shard}: wanted {self.wanted[shard]}, applied {applied}, in residuals {kept}, "
            f"under way {waiting}, lost {self.lost[shard]}"
        )
        wrong = [t for t in self.tickets.values() if t.shard == shard and _is_wrong(t)]
        raise Violation("; ".join([msg, *map(str, wrong)]))

    def check_end(self, owners: Container[int]) -> None:
        """The job is over: every contribution of a worker that came to its end has ended."""
        for shard, loose in self.loose.items():
            still = [t for t in loose.values() if t.state == "open" and t.owner in owners]
            if still:
                msg = f"shard {shard}: nobody ever heard of {still}"
                raise Violation(msg)
        if self.is_undisturbed:
            self._check_undisturbed()

    @property
    def is_undisturbed(self) -> bool:
        """Whether each version has to be that of the run without faults."""
        case = self.case
        plain = case.consistency == "bsp" and not case.min_workers and not case.data
        return plain and not self.losses

    def _check_undisturbed(self) -> None:
        for shard, versions in reference(self.case).items():
            made = {v: value for v, (value, _) in self.history[shard].items()}
            for version, value in enumerate(versions):
                if made.get(version) != value:
                    msg = (
                        f"shard {shard} is {made.get(version)} as version {version}, "
                        f"in the undisturbed run {value}"
                    )
                    raise Violation(msg)


def _is_wrong(ticket: Ticket) -> bool:
    return (ticket.state == "applied" and ticket.round is None) or (
        ticket.state == "returned" and ticket.round is not None
    )


def reference(case: Case) -> dict[int, list[int]]:
    """Of each shard its value in every version, if nothing ever goes wrong (bsp)."""
    return _reference(
        case.workers, case.servers, case.shards, case.every, case.rounds, case.judged, case.skips
    )


@cache
def _reference(  # noqa: PLR0913, PLR0917 - what a case's undisturbed run depends on
    workers: int,
    servers: int,
    shards: int,
    every: int,
    rounds: int,
    judged: bool,  # noqa: FBT001 - cached by position
    skips: bool,  # noqa: FBT001
) -> dict[int, list[int]]:
    plan = plan_of(workers, servers, shards, "bsp", every, "delta", judged)
    values = {shard: [INITIAL] for shard in range(shards)}
    residual = {(rank, shard): 0 for rank in range(workers) for shard in range(shards)}
    for server in range(servers):
        view = view_of(plan, server)
        for round_ in range(rounds):
            for shard in (cut.index for cut in view.owned):
                weight = values[shard][-1]
                change = 0
                for rank in range(workers):
                    wants = residual[rank, shard] + direction(rank, round_, shard, weight)
                    due = view.due(shard, round_)
                    quiet = not due or (skips and is_skipped(rank, round_, shard))
                    said, rest = (0, wants) if quiet else split(wants)
                    refused = judged and is_refused(rank, round_)
                    residual[rank, shard] = wants if refused else rest
                    change += 0 if refused else said
                values[shard].append(weight + change)
    return values
