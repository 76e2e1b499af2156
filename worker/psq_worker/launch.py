"""`psq launch`: S servers and W workers on this machine, watched until the job is done.

    launch ── psq-server --bind tcp://127.0.0.1:0        say where they listen (the ready line)
         ├── psq-server --bind tcp://127.0.0.1:0
         ├── psq-worker --connect A,B --rank 0          say how they get on (events on stdout)
         └── psq-worker --connect A,B --rank 1

With a tree there are aggregators between them (`psq_worker.aggregators`), and workers connect to
those. They are servers like the others here, and end with them.

The job ends when every worker has ended with code 0 and the servers after them. A process that dies
is started again, or the job goes on without it, where that was asked for (`psq_worker.restarts`).
Whatever else happens ends all of them: see `psq_worker.children`, and `psq_worker.watch` for what
is made of their words. Nothing here imports torch or zmq.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from psq.config.setting import ENV_PREFIX
from psq.errors import StateError
from psq_worker.aggregators import Aggregator, Tree, plan_tree
from psq_worker.board import Board
from psq_worker.children import STOP_GRACE_S, Children
from psq_worker.display import View, make_view
from psq_worker.doctor import cores
from psq_worker.restarts import Order, Restarts
from psq_worker.watch import Watch, server_names

if TYPE_CHECKING:
    from psq_worker.merging import Parts
    from psq_worker.tracing import TraceParts

__all__ = [
    "Commands",
    "cast_words",
    "child_env",
    "launch",
    "run_launch",
    "run_one",
    "server_count",
    "threads_words",
]

KERNEL_ENV: Final = "PSQ_KERNEL"
THREADS_ENV: Final = "OMP_NUM_THREADS"
LOCAL: Final = "tcp://127.0.0.1:0"
KEPT_GRACE_S: Final = 12.0
"""How long processes may take to end that have files to write, of their state (the protocol gives
them 10 s for it) or a timeline's."""


@dataclass(frozen=True, slots=True)
class Commands:
    """What to start.

    Attributes:
        workers: how many.
        servers: how many.
        fanout: how many a server hears at most, where there are aggregators in between; 0: none.
        save: the file that the weights go to, if anywhere; several servers leave their parts beside
            it, which become one file at the end.
        state_dir: the folder in which everybody keeps what another process needs to go on.
        max_restarts: how often each server and worker may be started again.
        min_workers: with how many workers the job goes on, where it need not have all.
        timeline: the file that the timeline goes to, if anywhere; each process leaves its part
            beside it, which become one file at the end.
        metrics_port: of server 0; the next numbers are the other servers'. 0 lets each take a free
            one.
        server_words: flags for each psq-server, beside its address and the number of workers.
        aggregator_words: flags for each aggregator, likewise.
        worker_words: flags for psq-worker, beside address, rank and number of workers; a user's
            script and its arguments come last.
    """

    workers: int
    servers: int = 1
    fanout: int = 0
    save: str | None = None
    timeline: str | None = None
    state_dir: str | None = None
    max_restarts: int = 0
    min_workers: int | None = None
    metrics_port: int = 0
    server_words: tuple[str, ...] = ()
    aggregator_words: tuple[str, ...] = ()
    worker_words: tuple[str, ...] = ()


def run_launch(commands: Commands, name: str, *, as_json: bool) -> None:
    """`psq launch`: run a job, show it on stderr, and print its summary on stdout."""
    from psq_worker.report import print_summary  # noqa: PLC0415 - not before the job is done

    env = child_env(commands.workers, os.environ)
    title = f"psq launch {name}: {cast_words(commands, env)}"
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
        GaveUpError: a server did not become ready, or did not end after the workers.
    """
    board = Board(commands.workers, servers=commands.servers)
    ranks = [f"rank {rank}" for rank in range(commands.workers)]
    servers = server_names(commands.servers)
    tree = plan_tree(commands.workers, commands.fanout) if commands.fanout else None
    elastic = commands.min_workers is not None
    watch = Watch(board, view, ranks, servers, commands.state_dir, elastic=elastic)
    restarts = Restarts(
        commands.max_restarts,
        view,
        servers=tuple(servers),
        workers=tuple(ranks),
        least=commands.min_workers,
        on_lost=watch.loses,
    )
    leaves_files = commands.state_dir is not None or commands.timeline is not None
    grace_s = KEPT_GRACE_S if leaves_files else STOP_GRACE_S
    whole = Children(watch.on_line, restarts.revive, grace_s=grace_s)
    with _tracing(commands, view), _merging(commands, view), whole as children:
        for number, name in enumerate(servers):
            command = _server_command(commands, number, tree)
            children.start(name, command, _without_pin(env), outlives=True)
            restarts.orders[name] = partial(_server_again, commands, watch, name, env)
        roots = watch.wait_ready(children)
        talks_to = dict.fromkeys(range(commands.workers), roots)
        if tree is not None:
            talks_to = _start_tree(commands, tree, watch, children, _only_kernel(env))
        for rank, name in enumerate(ranks):
            command = _worker_command(commands, talks_to[rank], rank)
            restarts.orders[name] = partial(_same_again, command, env)
            children.start(name, command, env)
        watch.wait_trained(children)
        watch.wait_end(children)
    return board


def _start_tree(
    commands: Commands, tree: Tree, watch: Watch, children: Children, env: Mapping[str, str]
) -> dict[int, list[str]]:
    """Start the aggregators of every server, from the top down; whom each rank is to talk to."""
    talks_to: dict[int, list[str]] = {rank: [] for rank in range(commands.workers)}
    for root in server_names(commands.servers):
        names = {"": root}
        watch.hears(root, tree.children)
        for aggregator in tree.aggregators:
            name = names[aggregator.leaves] = f"aggregator {aggregator.leaves}" + (
                f" of {root}" if commands.servers > 1 else ""
            )
            watch.hears(name, aggregator.children)
            parent = watch.endpoint(names[aggregator.parent])
            children.start(
                name, _aggregator_command(commands, aggregator, parent), env, outlives=True
            )
            watch.wait_ready(children)
            for rank in aggregator.ranks:
                talks_to[rank].append(watch.endpoint(name))
        for rank in tree.ranks:
            talks_to[rank].append(watch.endpoint(root))
    return talks_to


@contextmanager
def _merging(commands: Commands, view: View) -> Iterator[None]:
    """However a job of several servers ends: make one file of the weights they saved."""
    if commands.save is None or commands.servers == 1:
        yield
        return
    from psq_worker.merging import Parts  # noqa: PLC0415 - numpy, for this alone

    parts, servers = Parts(Path(commands.save), commands.servers), commands.servers
    with _at_end(lambda: _merge_weights(parts, servers, view), "weights are in parts", view):
        yield


@contextmanager
def _at_end(merge: Callable[[], None], otherwise: str, view: View) -> Iterator[None]:
    """Put parts together, however the job ends; if it failed, its own error is what is raised."""
    try:
        yield
    except BaseException:
        try:
            merge()
        except StateError as error:
            view.say("", f"{otherwise}: {error}")
        raise
    merge()


def _merge_weights(parts: Parts, servers: int, view: View) -> None:
    merged = parts.merge()
    if merged is not None:
        view.say("", f"weights of {servers} servers in {merged}")


@contextmanager
def _tracing(commands: Commands, view: View) -> Iterator[None]:
    """However a job ends: make one timeline of what its processes have left."""
    if commands.timeline is None:
        yield
        return
    from psq_worker.tracing import TraceParts  # noqa: PLC0415 - for this alone

    output = commands.timeline
    parts = TraceParts(Path(output), commands.servers, commands.workers)
    with _at_end(lambda: _merge_trace(parts, output, view), "no timeline", view):
        yield


def _merge_trace(parts: TraceParts, output: str, view: View) -> None:
    missing = parts.merge()
    if missing is None:
        view.say("", "no timeline: no process has left its part")
        return
    but = f", without {', '.join(missing)}: killed, or never in the job" if missing else ""
    view.say("", f"timeline in {output}{but}")


def run_one(name: str, command: Sequence[str], view: View, env: Mapping[str, str]) -> Board:
    """Run one process that speaks in events, such as the baseline; raises as `launch`."""
    board = Board(1, alone=True)
    watch = Watch(board, view, [name])
    with Children(watch.on_line) as children:
        children.start(name, command, env)
        watch.wait_trained(children)
    return board


def child_env(workers: int, environ: Mapping[str, str]) -> dict[str, str]:
    """The children's environment: ours, their share of the cores, and unbuffered output.

    Threads that wait sleep rather than spin: on two cores that others use too, spinning made plain
    Adam's step eight times longer.
    """
    share = {THREADS_ENV: str(max(1, cores() // workers)), "OMP_WAIT_POLICY": "passive"}
    return {**share, **environ, "PYTHONUNBUFFERED": "1"}


def cast_words(commands: Commands, env: Mapping[str, str]) -> str:
    """Who takes part, and how many CPU threads each worker has, in words."""
    servers, workers = commands.servers, commands.workers
    each = threads_words(env) + (" each" if workers > 1 else "")
    between = ""
    if commands.fanout:
        count = servers * len(plan_tree(workers, commands.fanout).aggregators)
        between = f", {_count(count, 'aggregator')}"
    return f"{_count(servers, 'server')}{between}, {_count(workers, 'worker')}, {each}"


def threads_words(env: Mapping[str, str]) -> str:
    """How many CPU threads a process has, in words."""
    return _count(env[THREADS_ENV], "CPU thread")


def _count(count: int | str, noun: str) -> str:
    return f"{count} {noun}{'' if str(count) == '1' else 's'}"


def server_count(asked: int | str, workers: int) -> int:
    """How many servers to start: a number, or "auto".

    On one machine "auto" is a server per worker, as far as half the cores reach: a worker computes
    while its server waits and the other way round, and two processes share a core badly when a
    round's end wakes both.
    """
    if asked == "auto":
        return max(1, min(workers, cores() // 2))
    return int(asked)


def _aggregator_command(commands: Commands, aggregator: Aggregator, parent: str) -> list[str]:
    own = ["--bind", LOCAL, "--world-size", str(commands.workers), "--no-json"]
    own += ["--parent", parent, "--children", aggregator.children]
    return [sys.executable, "-m", "psq_server", *commands.aggregator_words, *own]


def _server_again(commands: Commands, watch: Watch, name: str, env: Mapping[str, str]) -> Order:
    """A server in the place of one that died: where the workers look for it."""
    watch.restarts(name)
    number = server_names(commands.servers).index(name)
    command = _server_command(commands, number, bind=watch.endpoint(name) or LOCAL)
    return command, _without_pin(env), True


def _same_again(command: list[str], env: Mapping[str, str]) -> Order:
    return command, env, False


def _server_command(
    commands: Commands, number: int, tree: Tree | None = None, bind: str = LOCAL
) -> list[str]:
    own = ["--bind", bind, "--world-size", str(commands.workers), "--no-json"]
    own += ["--children", tree.children] if tree is not None else []
    own += _timeline_words(commands)
    if commands.state_dir is not None:
        own += ["--state-dir", str(Path(commands.state_dir) / f"server-{number}")]
    if commands.metrics_port:
        own += ["--metrics-port", str(commands.metrics_port + number)]
    return [sys.executable, "-m", "psq_server", *commands.server_words, *own]


def _worker_command(commands: Commands, endpoints: Sequence[str], rank: int) -> list[str]:
    own = ["--connect", ",".join(endpoints), "--rank", str(rank)]
    told = ["--world-size", str(commands.workers), "--progress", "json", "--json"]
    told += _timeline_words(commands)
    if commands.state_dir is not None:
        told += ["--state-dir", commands.state_dir]
    return [sys.executable, "-m", "psq_worker", *own, *told, *commands.worker_words]


def _timeline_words(commands: Commands) -> list[str]:
    return [] if commands.timeline is None else ["--timeline-filename", commands.timeline]


def _only_kernel(env: Mapping[str, str]) -> dict[str, str]:
    """An aggregator is told all that it needs: what others are told by PSQ_* may not suit it."""
    return {
        name: value
        for name, value in env.items()
        if not name.startswith(ENV_PREFIX) or name == KERNEL_ENV
    }


def _without_pin(env: Mapping[str, str]) -> dict[str, str]:
    """PSQ_RECIPE is meant for the workers here: a server would pin it against a script's own."""
    return {name: value for name, value in env.items() if name != "PSQ_RECIPE"}
