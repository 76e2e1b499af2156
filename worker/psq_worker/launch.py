"""`psq launch`: one server and W workers on this machine, watched until the job is done.

    launch ── psq-server --bind tcp://127.0.0.1:0        says where it listens (the ready line)
         ├── psq-worker --connect ... --rank 0          say how they get on (events on stdout)
         └── psq-worker --connect ... --rank 1

The job ends when every worker has ended with code 0 and the server after them. Whatever else
happens ends all of them: see `psq_worker.children`. Nothing here imports torch or zmq.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from psq.errors import GaveUpError
from psq_worker.board import Board
from psq_worker.children import Children
from psq_worker.display import View, make_view
from psq_worker.doctor import cores
from psq_worker.events import Started, parse_event

__all__ = [
    "Commands",
    "cast_words",
    "child_env",
    "launch",
    "run_launch",
    "run_one",
    "threads_words",
]

READY_TIMEOUT_S: Final = 30.0
SERVER_END_S: Final = 15.0
SAVE_S: Final = 600.0  # once every rank has left, the server has only the weights to write
TICK_S: Final = 0.1
THREADS_ENV: Final = "OMP_NUM_THREADS"
SERVER: Final = "server"
PRINTED_WAIT_S: Final = 15.0  # shorter waits are shown in the table only
_READY: Final = re.compile(r"psq-server ready .*?\bendpoint=(\S+).*?\bkernel=(\S+)")
_WAIT: Final = re.compile(r"WARNING (waiting for .* for (\d+) s\b.*)")
_INTERRUPTED: Final = "reason=interrupted"  # the launcher says itself who ended whom
_SERVER_LINE: Final = re.compile(r"\S+ (info|warning|error) (event=.*)")
_SERVER_WAIT: Final = re.compile(r'\S+ info event=waiting .*text="([^"]*)"')
_LEFT: Final = re.compile(r"\S+ info event=left rank=(\d+) reason=done")


@dataclass(frozen=True, slots=True)
class Commands:
    """What to start.

    Attributes:
        workers: how many.
        server_words: flags for psq-server, beside its address and the number of workers.
        worker_words: flags for psq-worker, beside address, rank and number of workers; a user's
            script and its arguments come last.
    """

    workers: int
    server_words: tuple[str, ...] = ()
    worker_words: tuple[str, ...] = ()


def run_launch(commands: Commands, name: str, *, as_json: bool) -> None:
    """`psq launch`: run a job, show it on stderr, and print its summary on stdout."""
    from psq_worker.report import print_summary  # noqa: PLC0415 - not before the job is done

    env = child_env(commands.workers, os.environ)
    title = f"psq launch {name}: 1 server, {cast_words(commands.workers, env)}"
    with make_view(title) as view:
        board = launch(commands, view, env)
    print_summary(board.summary(), as_json=as_json)


def launch(commands: Commands, view: View, env: Mapping[str, str]) -> Board:
    """Run a job to its end.

    Args:
        commands: what to start.
        view: where it is shown.
        env: the children's environment, see `child_env`.

    Returns:
        Everything the workers said.

    Raises:
        ChildFailedError: a process failed; its code is the error's.
        InterruptedByError: this process was asked to end; the children have ended.
        GaveUpError: the server did not become ready, or did not end after the workers.
    """
    board = Board(commands.workers)
    ranks = [f"rank {rank}" for rank in range(commands.workers)]
    watch = _Watch(board, view, ranks)
    with Children(watch.on_line) as children:
        children.start(SERVER, _server_command(commands), _without_pin(env))
        endpoint = watch.wait_ready(children)
        for rank, name in enumerate(ranks):
            children.start(name, _worker_command(commands, endpoint, rank), env)
        while children.running(*ranks):
            watch.pump(children)
            if not children.running(SERVER) and children.running(*ranks):
                watch.drain(children, ranks)
        watch.wait_end(children)
    return board


def run_one(name: str, command: Sequence[str], view: View, env: Mapping[str, str]) -> Board:
    """Run one process that speaks in events, such as the baseline; raises as `launch`."""
    board = Board(1, alone=True)
    watch = _Watch(board, view, [name])
    with Children(watch.on_line) as children:
        children.start(name, command, env)
        while children.running(name):
            watch.pump(children)
    return board


def child_env(workers: int, environ: Mapping[str, str]) -> dict[str, str]:
    """The children's environment: ours, their share of the cores, and unbuffered output.

    Threads that wait sleep rather than spin: on two cores that others use too, spinning made plain
    Adam's step eight times longer.
    """
    share = {THREADS_ENV: str(max(1, cores() // workers)), "OMP_WAIT_POLICY": "passive"}
    return {**share, **environ, "PYTHONUNBUFFERED": "1"}


def cast_words(workers: int, env: Mapping[str, str]) -> str:
    """How many workers there are, and how many CPU threads each has, in words."""
    each = threads_words(env) + (" each" if workers > 1 else "")
    return f"{workers} worker{'s' if workers > 1 else ''}, {each}"


def threads_words(env: Mapping[str, str]) -> str:
    """How many CPU threads a process has, in words."""
    count = env[THREADS_ENV]
    return f"{count} CPU thread{'' if count == '1' else 's'}"


class _Watch:
    """Sorts what the children say: events go to the board, the rest to the view."""

    def __init__(self, board: Board, view: View, ranks: Sequence[str]) -> None:
        self._board = board
        self._view = view
        self._ranks = list(ranks)
        self._endpoint = ""
        self._server_waits = ""
        self._left: set[str] = set()

    def on_line(self, name: str, text: str) -> None:
        """A child printed a line."""
        if name == SERVER:
            self._on_server_line(text)
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

    def _on_server_line(self, text: str) -> None:
        """The ready line is for us; of the log, what is no mere information is for the reader."""
        ready, logged = _READY.match(text), _SERVER_LINE.match(text)
        waits, left = _SERVER_WAIT.match(text), _LEFT.match(text)
        self._server_waits = waits[1] if waits else self._server_waits
        self._left |= {left[1]} if left else set()
        if ready:
            self._endpoint = ready[1]
            self._view.say("", f"server on {ready[1]}, {ready[2]} kernels")
        elif not logged or (logged[1] != "info" and _INTERRUPTED not in logged[2]):
            self._view.say(SERVER, text)

    def pump(self, children: Children) -> None:
        """Let the children speak for a moment, and show it."""
        children.pump(TICK_S)
        self._view.refresh(self._board)

    def wait_ready(self, children: Children) -> str:
        """The server's address, once it has said it."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not self._endpoint:
            if not children.running(SERVER):
                raise children.fail(SERVER)
            if time.monotonic() > deadline:
                msg = f"psq-server said no ready line within {READY_TIMEOUT_S:.0f} s"
                raise GaveUpError(msg)
            self.pump(children)
        return self._endpoint

    def drain(self, children: Children, ranks: Sequence[str]) -> None:
        """The server has ended and workers have not: give them a moment to end by themselves."""
        deadline = time.monotonic() + SERVER_END_S
        while children.running(*ranks):
            if time.monotonic() > deadline:
                raise children.fail(SERVER)
            self.pump(children)

    def wait_end(self, children: Children) -> None:
        """Let the server save what it must and end.

        Raises:
            GaveUpError: it waits for a worker that never came, or does not end.
        """
        started = time.monotonic()
        while children.running(SERVER):
            patience_s = SAVE_S if len(self._left) == len(self._ranks) else SERVER_END_S
            if time.monotonic() - started > patience_s:
                msg = f"psq-server did not end within {patience_s:.0f} s of its workers"
                if self._server_waits and patience_s == SERVER_END_S:
                    msg += f": {self._server_waits}; every rank must make a psq.torch.Worker"
                raise GaveUpError(msg)
            self.pump(children)


def _server_command(commands: Commands) -> list[str]:
    own = ["--bind", "tcp://127.0.0.1:0", "--world-size", str(commands.workers), "--no-json"]
    return [sys.executable, "-m", "psq_server", *own, *commands.server_words]


def _worker_command(commands: Commands, endpoint: str, rank: int) -> list[str]:
    own = ["--connect", endpoint, "--rank", str(rank), "--world-size", str(commands.workers)]
    told = ["--progress", "json", "--json"]
    return [sys.executable, "-m", "psq_worker", *own, *told, *commands.worker_words]


def _without_pin(env: Mapping[str, str]) -> dict[str, str]:
    """PSQ_RECIPE is meant for the workers here: a server would pin it against a script's own."""
    return {name: value for name, value in env.items() if name != "PSQ_RECIPE"}
