"""What a launcher hears of its processes: events go to the board, words to whoever looks on.

One `Watch` knows every server and worker of a job by its name. It decides when the servers are
ready, whether they may end, and how long each of them may take for it; it starts and ends nothing.
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
PRINTED_WAIT_S: Final = 15.0  # shorter waits are shown in the table only
_READY: Final = re.compile(r"psq-server ready .*?\bendpoint=(\S+).*?\bkernel=(\S+)")
_WAIT: Final = re.compile(r"WARNING (waiting for .* for (\d+) s\b.*)")
_INTERRUPTED: Final = "reason=interrupted"  # the launcher says itself who ended whom
_SERVER_LINE: Final = re.compile(r"\S+ (info|warning|error) (event=.*)")
_SERVER_WAIT: Final = re.compile(r'\S+ info event=waiting .*text="([^"]*)"')
_DONE: Final = re.compile(r"\S+ info event=stop reason=done\b")
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
        left: the ranks that left it with their work done.
        hears: how many ranks talk to it; None: all.
        done: it ended because its job was done.
    """

    endpoint: str = ""
    waits: str = ""
    left: set[str] = field(default_factory=set)
    hears: int | None = None
    done: bool = False


class Watch:
    """Sorts what the children say.

    Args:
        board: takes the workers' events.
        view: shows the rest.
        servers: the names of the server processes, in the order of their numbers.
        ranks: the names of the worker processes, in the order of theirs.
    """

    def __init__(
        self, board: Board, view: View, ranks: Sequence[str], servers: Sequence[str] = ()
    ) -> None:
        self._board = board
        self._view = view
        self._ranks = list(ranks)
        self._servers = {name: _Server() for name in servers}

    def hears(self, name: str, children: str) -> None:
        """Only these ranks, as psq-server takes them, talk to a server; add it if it is new."""
        self._servers.setdefault(name, _Server()).hears = children.count(",") + 1

    def endpoint(self, name: str) -> str:
        """Where a server listens that is ready."""
        return self._servers[name].endpoint

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
        waits, left = _SERVER_WAIT.match(text), _LEFT.match(text)
        server.waits = waits[1] if waits else server.waits
        server.left |= {left[1]} if left else set()
        server.done |= _DONE.match(text) is not None
        if ready:
            server.endpoint = ready[1]
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
            ChildFailedError: some process failed, or a server ended and workers go on.
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
            # The workers hear of it too: a moment to end by themselves, with words of their own.
            if (
                gone
                and ended_s is not None
                and children.running(*self._ranks)
                and time.monotonic() - ended_s > SERVER_END_S
            ):
                raise children.fail(gone[0], self._why(gone[0]))

    def wait_end(self, children: Children) -> None:
        """Let the servers save what they must and end.

        Raises:
            GaveUpError: one waits for a worker that never came, or does not end.
        """
        started = time.monotonic()
        while running := [name for name in self._servers if children.running(name)]:
            for name in running:
                self._check_ends(name, time.monotonic() - started)
            self.pump(children)

    def _why(self, name: str) -> str:
        """Why a server ended before the workers that were started with it, if that is known."""
        server = self._servers[name]
        if server.done and not server.left:
            return "the job in its --state-dir is done already: name another folder for a new one"
        return ""

    def _expected(self, server: _Server) -> int:
        """How many have to leave a server before it may end."""
        return len(self._ranks) if server.hears is None else server.hears

    def _check_ends(self, name: str, waited_s: float) -> None:
        server = self._servers[name]
        patience_s = SAVE_S if len(server.left) == self._expected(server) else SERVER_END_S
        if waited_s <= patience_s:
            return
        msg = f"{name} did not end within {patience_s:.0f} s of the workers"
        if server.waits and patience_s == SERVER_END_S:
            msg += f": {server.waits}; every rank must make a psq.torch.Worker"
        raise GaveUpError(msg)
