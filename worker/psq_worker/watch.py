"""What a launcher hears of its processes: events go to the board, words to whoever looks on.

One `Watch` knows every server and worker of a job by its name. It decides when the servers are
ready, whether they may end, and how long each of them may take for it. It starts nothing, and ends
only a server that waits for workers who are done: it was killed as they said goodbye.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from psq.errors import GaveUpError
from psq_worker.board import Board
from psq_worker.children import Children
from psq_worker.display import View
from psq_worker.events import Started, parse_event

__all__ = ["Watch", "server_names"]

READY_TIMEOUT_S: Final = 30.0
SERVER_END_S: Final = 15.0
SAVE_S: Final = 600.0  # once every rank has left, a server has only the weights to write
TICK_S: Final = 0.1
JOINED_HEARD_S: Final = 1.0
"""How long after a worker's end its server may take to say that it had joined."""
GOODBYE_S: Final = 1.0
"""How long a server that was started again may wait for workers who have all ended."""
PRINTED_WAIT_S: Final = 15.0  # shorter waits are shown in the table only
_READY: Final = re.compile(r"psq-server ready .*?\bendpoint=(\S+).*?\bkernel=(\S+)")
_WAIT: Final = re.compile(r"WARNING (waiting for .* for (\d+) s\b.*)")
_INTERRUPTED: Final = "reason=interrupted"  # the launcher says itself who ended whom
_SERVER_LINE: Final = re.compile(r"\S+ (info|warning|error) (event=.*)")
_SERVER_WAIT: Final = re.compile(r'\S+ info event=waiting .*text="([^"]*)"')
_DONE: Final = re.compile(r"\S+ info event=stop reason=done\b")
_JOINED: Final = re.compile(r"\S+ info event=joined rank=(\d+)\b")
_LEFT: Final = re.compile(r"\S+ info event=left rank=(\d+) reason=done")


def server_names(count: int) -> list[str]:
    """What the servers of a job are called: the only one is just "server"."""
    return ["server"] if count == 1 else [f"server {number}" for number in range(count)]


@dataclass(slots=True)
class _Server:
    """One server, as it was last heard of.

    Attributes:
        endpoint: where it listens; empty until it has said so.
        waits: whom it last said it waits for.
        joined: the ranks that have ever joined it.
        left: those that left it with their work done.
        hears: how many ranks talk to it; None: all.
        done: it ended because its job was done.
        ready_s: when it last said that it is ready; None while it starts.
        again: it was started again.
        told: it was asked to end.
    """

    endpoint: str = ""
    waits: str = ""
    joined: set[str] = field(default_factory=set)
    left: set[str] = field(default_factory=set)
    hears: int | None = None
    done: bool = False
    ready_s: float | None = None
    again: bool = False
    told: bool = False


class Watch:
    """Sorts what the children say.

    Args:
        board: takes the workers' events.
        view: shows the rest.
        servers: the names of the server processes, in the order of their numbers.
        ranks: the names of the worker processes, in the order of theirs.
        state_dir: where the job keeps its state, if it does.
        elastic: servers go on, and end, without workers that are lost.
    """

    def __init__(  # noqa: PLR0913 - a job's names, and two facts about it
        self,
        board: Board,
        view: View,
        ranks: Sequence[str],
        servers: Sequence[str] = (),
        state_dir: str | None = None,
        *,
        elastic: bool = False,
    ) -> None:
        self._board = board
        self._view = view
        self._ranks = list(ranks)
        self._servers = {name: _Server() for name in servers}
        self._state_dir = state_dir
        self._elastic = elastic
        self._ended_s: dict[str, float] = {}

    def hears(self, name: str, children: str) -> None:
        """Only these ranks, as psq-server takes them, talk to a server; add it if it is new."""
        self._servers.setdefault(name, _Server()).hears = children.count(",") + 1

    def endpoint(self, name: str) -> str:
        """Where a server listens that is ready."""
        return self._servers[name].endpoint

    def restarts(self, name: str) -> None:
        """A server is started again; it says once more when it is ready."""
        server = self._servers[name]
        server.again, server.ready_s, server.waits = True, None, ""

    def loses(self, name: str, code: int | None) -> None:
        """The job goes on without a worker that ended with this code, or is not back yet."""
        self._board.loses(self._ranks.index(name), code)

    def on_line(self, name: str, text: str) -> None:
        """A child printed a line."""
        if name in self._servers:
            self._on_server_line(name, text)
            return
        event = parse_event(text)
        wait = _WAIT.fullmatch(text)
        if event is not None:
            self._board.add(event, time.monotonic())
            if isinstance(event, Started) and event.rank == 0 and event.text:
                self._view.say("", f"{event.text}; {event.numel:,} parameters; {event.recipe}")
        elif wait and name in self._ranks:
            self._board.waits(self._ranks.index(name), wait[1])
            if float(wait[2]) >= PRINTED_WAIT_S:
                self._view.say(name, wait[1])
        else:
            self._view.say(name, text)

    def _on_server_line(self, name: str, text: str) -> None:
        """The ready line is for us; of the log, what is no mere information is for the reader."""
        server = self._servers[name]
        ready, logged = _READY.match(text), _SERVER_LINE.match(text)
        waits, left, joined = (each.match(text) for each in (_SERVER_WAIT, _LEFT, _JOINED))
        server.waits = waits[1] if waits else server.waits
        server.joined |= {joined[1]} if joined else set()
        server.left |= {left[1]} if left else set()
        server.done |= _DONE.match(text) is not None
        if ready:
            server.endpoint, server.ready_s = ready[1], time.monotonic()
            self._view.say("", f"{name} on {ready[1]}, {ready[2]} kernels")
        elif not logged or (logged[1] != "info" and _INTERRUPTED not in logged[2]):
            self._view.say(name, text)

    def pump(self, children: Children) -> None:
        """Let the children speak for a moment, and show it."""
        children.pump(TICK_S)
        self._view.refresh(self._board)

    def wait_ready(self, children: Children) -> list[str]:
        """The servers' addresses, in the order of their numbers, once all have said theirs.

        Raises:
            ChildFailedError: a server ended instead.
            GaveUpError: one says nothing.
        """
        deadline = time.monotonic() + READY_TIMEOUT_S
        while silent := [name for name, server in self._servers.items() if not server.endpoint]:
            for name in silent:
                if not children.running(name):
                    raise children.fail(name)
            if time.monotonic() > deadline:
                msg = f"{silent[0]} said no ready line within {READY_TIMEOUT_S:.0f} s"
                raise GaveUpError(msg)
            self.pump(children)
        return [server.endpoint for server in self._servers.values()]

    def wait_trained(self, children: Children) -> None:
        """Look on until every worker has ended; a server they have not left may not end first.

        Raises:
            ChildFailedError: some process failed, a server ended and workers go on, or a worker
                ended that never joined.
        """
        ended_s: float | None = None
        while children.running(*self._ranks):
            self.pump(children)
            gone = [
                name
                for name, server in self._servers.items()
                if not children.running(name) and len(server.left) < self._expected(server)
            ]
            if gone and ended_s is None:
                ended_s = time.monotonic()
            self._check_new(children, gone)
            self._check_joined(children)
            if self._is_over_without(children):
                return
            # The workers hear of it too: a moment to end by themselves, with words of their own.
            if (
                gone
                and ended_s is not None
                and children.running(*self._ranks)
                and time.monotonic() - ended_s > SERVER_END_S
            ):
                raise children.fail(gone[0])
        while self._absent(children):
            self.pump(children)
            self._check_joined(children)

    def _check_new(self, children: Children, gone: Sequence[str]) -> None:
        """Refuse to begin where a job was done before."""
        for name in gone:
            server = self._servers[name]
            if server.done and not server.joined:
                place = self._state_dir or "its --state-dir"
                raise children.fail(
                    name,
                    f"the job in {place} is done already: name another folder for a new one, or "
                    "remove this one; psq ckpt export takes its weights out",
                )

    def _is_over_without(self, children: Children) -> bool:
        """Whether the servers are done, and the workers that are left were given up before."""
        servers = self._servers.items()
        if not self._elastic or any(not s.done or children.running(name) for name, s in servers):
            return False
        left = {rank for _, server in servers for rank in server.left}
        running = [(rank, n) for rank, n in enumerate(self._ranks) if children.running(n)]
        if any(str(rank) in left for rank, _ in running):
            return False
        for _, name in running:
            self._view.say("", f"{name} was not back when the job was done: ended")
            self.loses(name, None)
        return True

    def _check_joined(self, children: Children) -> None:
        """A worker that ends well has taken part: its script may have made no Worker."""
        now_s = time.monotonic()
        for name in self._absent(children):
            if now_s - self._ended_s.setdefault(name, now_s) > JOINED_HEARD_S:
                raise children.fail(
                    name,
                    "it never joined, and the others would wait for it: every rank must make a "
                    "psq.torch.Worker",
                )

    def _absent(self, children: Children) -> list[str]:
        """Workers that have ended well, and of which no server has heard yet."""
        if not self._servers:
            return []
        heard = {rank for server in self._servers.values() for rank in server.joined | server.left}
        return [
            name
            for rank, name in enumerate(self._ranks)
            if children.code(name) == 0
            and str(rank) not in heard
            and self._board.ranks[rank].summary is None
        ]

    def wait_end(self, children: Children) -> None:
        """Let the servers save what they must and end.

        Raises:
            GaveUpError: one waits for a worker that never came, or does not end.
        """
        started_s = time.monotonic()
        while running := [name for name in self._servers if children.running(name)]:
            for name in running:
                self._end_forgotten(children, name, started_s)
                self._check_ends(name, time.monotonic() - started_s)
            self.pump(children)

    def _end_forgotten(self, children: Children, name: str, ended_s: float) -> None:
        """End a server that was killed before it had put down that its workers are done."""
        server = self._servers[name]
        if not server.again or server.told or server.ready_s is None or self._all_left(server):
            return
        if time.monotonic() - max(server.ready_s, ended_s) > GOODBYE_S:
            server.told = True
            children.terminate(name)
            self._view.say("", f"{name} was away when the workers ended, all done: told to end")

    def _expected(self, server: _Server) -> int:
        """How many have to leave a server before it may end."""
        every = len(self._ranks) if server.hears is None else server.hears
        return every - len(self._board.lost)

    def _all_left(self, server: _Server) -> bool:
        return len(server.left) >= self._expected(server)

    def _check_ends(self, name: str, waited_s: float) -> None:
        server = self._servers[name]
        patience_s = SAVE_S if server.told or self._all_left(server) else SERVER_END_S
        if waited_s <= patience_s:
            return
        msg = f"{name} did not end within {patience_s:.0f} s of the workers"
        if server.waits and patience_s == SERVER_END_S:
            msg += f": {server.waits}"
        raise GaveUpError(msg)
