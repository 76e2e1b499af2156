"""`psq-server`: start a parameter server, say where it is, serve one job, end.

    $ psq-server --bind tcp://127.0.0.1:0 --world-size 2 --save weights.safetensors
    psq-server ready endpoint=tcp://127.0.0.1:41234 metrics=http://127.0.0.1:41235/metrics \
kernel=v4 pid=1234

That ready line is the only one on stdout, but for a JSON summary with --json; the log goes to
stderr. Exit codes: 0 the job is done, or the server was told to stop; 64 wrong command line; 65 the
weights could not be saved, or the state directory cannot be used; 75 a wait lasted longer than
--give-up-after; 78 wrong configuration, or an address that cannot be used.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import click

import psq
from psq import kernels
from psq.config import Given, ServerConfig, is_loopback, stray_variables
from psq.config.options import EPILOG, options, run
from psq.errors import ConfigError, StateError
from psq.keys import Ranks, ServerKeys, WorkerKeys, load_server_keys, load_worker_keys
from psq.link import ServerLink
from psq.metrics import CONTENT_TYPE, Metrics, Totals
from psq.presets import preset
from psq.process import keep_freed_memory, watch_parent
from psq.timeline import Process, Timeline, write_part
from psq.timeline import check_writable as check_timeline
from psq_server.health import Health, HealthServer, by_rank, health_page, status_page
from psq_server.line_log import LineLog
from psq_server.loop import Ending, Loop
from psq_server.opening import Opened, check_kept, open_state
from psq_server.page import Page
from psq_server.saving import check_writable, free_bytes
from psq_server.signals import Signals
from psq_server.state import Branches, ServerState, Settings, parse_branches

if TYPE_CHECKING:
    from psq_server.tree import Aggregator

__all__ = ["main", "serve"]

QUEUE_FRAMES: Final = 16
"""Frames that may wait in libzmq for one slow worker; more wait in the outbox, shared."""
RUN_ID_BYTES: Final = 16
STUCK_S: Final = 10.0
"""A loop that has not ticked for so long is called stuck by /healthz."""


@click.command(
    "psq-server", context_settings={"help_option_names": ["-h", "--help"]}, epilog=EPILOG
)
@click.version_option(psq.__version__, prog_name="psq-server")
@options(ServerConfig)
def serve(given: Given) -> int:
    """Serve one training job: hold the weights, average the workers' pushes, step, answer.

    The first worker's model and recipe define the job, unless --recipe and --world-size pin them.
    Every option is also a PSQ_* variable and a key of the [server] table in --config's TOML file.
    """
    watch_parent()
    keep_freed_memory()
    config = given.resolve(ServerConfig).config
    _check_place(config)
    check_kept(config)
    save = Path(config.save) if config.save else None
    if config.recipe is not None:
        preset(config.recipe)  # fails at once, and lists what there is
    if save is not None:
        check_writable(save)
    if config.timeline_filename:
        check_timeline(Path(config.timeline_filename))
    log = LineLog(sys.stderr)
    for name, meant in stray_variables(os.environ).items():
        hint = {"meant": meant} if meant else {}
        log.write("warning", "unknown-variable", {"name": name, **hint})
    keys = _keys(config)
    opened = open_state(config, _settings(config), log)
    link = ServerLink(config.bind, queue_frames=QUEUE_FRAMES, keys=keys)
    with link, Signals() as signals:
        return _serve(config, link, signals, log, save, opened)


def main() -> None:
    """Entry point of `psq-server`."""
    run(serve, "psq-server")


def _serve(  # noqa: PLR0913, PLR0917 - what a server is made of
    config: ServerConfig,
    link: ServerLink,
    signals: Signals,
    log: LineLog,
    save: Path | None,
    opened: Opened,
) -> int:
    started_s = time.monotonic()
    above = _above(config, opened.state, log) if config.parent is not None else None
    insecure = not link.encrypted and not is_loopback(link.endpoint)
    watcher = _Watcher(config)
    timeline = Timeline() if config.timeline_filename else None

    def begin(opened: Opened) -> Loop:
        watcher.loop = Loop(
            link,
            opened.state,
            log=log,
            signals=signals,
            observer=watcher.metrics,
            save=save,
            insecure=insecure,
            timeline=timeline,
            above=above,
            store=opened.store,
            weights=opened.weights,
        )
        return watcher.loop

    loop = begin(opened)
    health = HealthServer(
        config.metrics_host,
        config.metrics_port,
        {
            "/metrics": watcher.metrics_page,
            "/healthz": watcher.health_page,
            "/status": watcher.status_page,
        },
    )
    if insecure:
        text = f"{link.endpoint} serves other machines without encryption or authentication"
        log.write("warning", "insecure", {"text": text})
    if not is_loopback(health.url.replace("http://", "tcp://")):
        text = f"{health.url} tells other machines how the job is, and anybody who asks"
        log.write("warning", "open-metrics", {"text": text})
    click.echo(
        f"psq-server ready endpoint={link.endpoint} metrics={health.url}/metrics "
        f"kernel={kernels.level()} pid={os.getpid()}"
    )
    ending: Ending | None = None
    try:
        ending = loop.run()
        while ending.reason == "lost":
            opened = _before_the_loss(config, opened, log)
            loop = begin(opened)
            ending = loop.run()
    finally:
        if above is not None:
            above.leave(*_farewell(ending))
        health.close()
        if opened.store is not None and not opened.store.close():
            log.write("error", "not-kept", {"text": "not all that was to be kept is on disk"})
        if config.timeline_filename:
            _write_timeline(Path(config.timeline_filename), loop, log)
    if config.json:
        click.echo(json.dumps(_summary(loop, opened.state, ending, time.monotonic() - started_s)))
    return ending.exit_code


def _before_the_loss(config: ServerConfig, opened: Opened, log: LineLog) -> Opened:
    """Begin again, as another start would, from before the rounds that are lost.

    Raises:
        StateError: the disk does not let go of what was under way; another start may do it.
    """
    assert opened.store is not None  # noqa: S101 - what is lost was on its disk
    if not opened.store.close():
        msg = f"{config.state_dir} is still being written: start this server again"
        raise StateError(msg)
    return open_state(config, _settings(config), log, goes_back=True)


def _write_timeline(path: Path, loop: Loop, log: LineLog) -> None:
    """Write what was recorded; a server that never had a job has no number, and nothing to tell."""
    plan, recorder = loop.plan, loop.timeline
    if plan is None or recorder is None:
        log.write("info", "no-timeline", {"text": "there was no job"})
        return
    job = f"{plan.job_digest:016x}"
    part = write_part(path, recorder, Process("server", plan.server), job=job)
    lost = {"lost_spans": recorder.lost_spans} if recorder.lost_spans else {}
    log.write("info", "timeline", {"path": str(part), **lost})


def _settings(config: ServerConfig) -> Settings:
    return Settings(
        run_id=os.urandom(RUN_ID_BYTES),
        world_size=config.world_size,
        recipe=config.recipe,
        lease_s=config.lease_s,
        min_workers=config.min_workers,
        grace_s=config.grace_s,
        give_up_after_s=config.give_up_after_s,
        memory_bytes=_memory_bytes(),
        disk_bytes=free_bytes(Path(config.save)) if config.save else None,
        saves=bool(config.save),
        branches=parse_branches(config.children) if config.children is not None else None,
        is_root=config.parent is None,
    )


def _check_place(config: ServerConfig) -> None:
    """What an aggregator needs, and what it cannot do."""
    if config.parent is None:
        return
    if config.children is None:
        msg = (
            "parent: an aggregator needs to know whose pushes it adds up: list the ranks of its "
            "workers, as in --children 0,1,2"
        )
        raise ConfigError(msg)
    if config.save:
        msg = "save: an aggregator has no weights: give --save to the server without --parent"
        raise ConfigError(msg)
    if config.timeline_filename:
        msg = "timeline_filename: an aggregator records none: give it to the server and the workers"
        raise ConfigError(msg)


def _above(config: ServerConfig, state: ServerState, log: LineLog) -> Aggregator:
    """The server above, spoken to as the lowest rank of the leaves below."""
    from psq.client import Patience  # noqa: PLC0415 - other servers need none of these
    from psq_server.tree import Aggregator  # noqa: PLC0415 - as above
    from psq_server.tree_uplink import Uplink  # noqa: PLC0415 - as above

    branches = state.settings.branches
    assert config.parent is not None  # noqa: S101 - the caller looked
    assert branches is not None  # noqa: S101 - the configuration was checked
    patience = Patience(give_up_after_s=config.give_up_after_s)
    rng = random.Random()  # noqa: S311 - jitter and names, no secrets
    uplink = Uplink(
        config.parent,
        branches.first,
        patience=patience,
        rng=rng,
        clock=time.monotonic,
        keys=_keys_above(config, branches),
    )

    def note(text: str) -> None:
        log.write("warning", "above", {"text": text})

    return Aggregator(uplink, state.settings, clock=time.monotonic, note=note)


def _keys(config: ServerConfig) -> ServerKeys | None:
    """This server's keys, if links are to be encrypted; an aggregator's are its own."""
    if config.keys is None:
        return None
    branches = parse_branches(config.children) if config.children is not None else None
    below = _folder(branches) if config.parent is not None and branches is not None else "server"
    return load_server_keys(Path(config.keys), below)


def _keys_above(config: ServerConfig, branches: Branches) -> WorkerKeys | None:
    """An aggregator's keys as a worker of the server above it."""
    if config.keys is None:
        return None
    return load_worker_keys(Path(config.keys), _leaves(branches), _folder(branches))


def _leaves(branches: Branches) -> Ranks:
    return Ranks(branches.first, branches.items[-1].last)


def _folder(branches: Branches) -> str:
    return f"aggregator{_leaves(branches).text}"


def _farewell(ending: Ending | None) -> tuple[Literal["done", "error", "interrupted"], str]:
    """What an aggregator that ends says above."""
    if ending is None:
        return "error", "the aggregator failed"
    if ending.reason == "done":
        return "done", ""
    return "interrupted" if ending.reason == "stopped" else "error", ending.text


def _memory_bytes() -> int | None:
    """What this machine has, where the system says it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


class _Watcher:
    """Pages for those who watch, made in their threads from what the loop leaves lying."""

    def __init__(self, config: ServerConfig) -> None:
        self._stuck_s = max(STUCK_S, config.lease_s)
        self.loop: Loop | None = None
        self.metrics = Metrics(
            role="server",
            version=psq.__version__,
            kernel=kernels.level(),
            read=self._totals,
        )

    def _totals(self) -> Totals:
        return self._loop.totals()

    def metrics_page(self) -> Page:
        return Page(self.metrics.exposition(), CONTENT_TYPE)

    def health_page(self) -> Page:
        return health_page(self._health())

    def status_page(self) -> Page:
        totals = self._loop.totals()
        return status_page(self._health(), totals.workers, totals.pushes, totals.rejected)

    def _health(self) -> Health:
        seen_s, now = self._loop.watched
        stuck = time.monotonic() - seen_s > self._stuck_s
        status = "stuck" if stuck else now.status
        return Health(status, now.version, now.round, now.text, now.waiting_s)

    @property
    def _loop(self) -> Loop:
        assert self.loop is not None  # noqa: S101 - set before anybody can ask
        return self.loop


def _summary(loop: Loop, state: ServerState, ending: Ending, total_s: float) -> dict[str, Any]:
    """What --json prints; seconds are rounded to the microsecond."""
    counts, totals = state.counts, loop.totals()
    version = state.snapshot(time.monotonic()).version
    seconds = {**loop.phase_seconds, "total": total_s}
    return {
        "role": "server",
        "exit_code": ending.exit_code,
        "reason": ending.reason,
        "text": ending.text,
        "rounds": counts.rounds,
        "version": version,
        "sent_bytes": totals.sent_bytes,
        "received_bytes": totals.received_bytes,
        "seconds": {phase: round(value, 6) for phase, value in seconds.items()},
        "max_staleness": counts.max_staleness,
        "skipped": counts.skipped,
        "pushes": dict(counts.pushes),
        "rejected": by_rank(counts.rejected),
        "joins": counts.joins,
        "resets": counts.resets,
        "fenced": counts.fenced,
        "evicted": counts.evicted,
        "cold": counts.cold,
        "refused": dict(counts.refused),
        "dropped_frames": loop.dropped_frames,
        "refused_keys": loop.refused_keys,
        "kernel": kernels.level(),
        "saved": ending.saved,
        "epoch": state.settings.epoch,
        "durability": state.level,
        "durable_version": totals.durable_version,
        "checkpoints": totals.checkpoints.get("written", 0),
        "journal_bytes": totals.journal_bytes,
    }
