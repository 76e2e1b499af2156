"""How a server begins: empty, with a directory to fill, or where an earlier process ended.

Everything is read, checked and replayed before an address is bound: whoever connects meets a server
that knows what it knew.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

from psq.config import ServerConfig
from psq.errors import ConfigError
from psq_server.line_log import LineLog
from psq_server.state import ServerState, Settings
from psq_server.state.durable import Rest
from psq_server.state.events import LOGGED
from psq_server.state.keeping import refusal
from psq_server.weights import Weights

if TYPE_CHECKING:
    from psq_server.copies import Copy
    from psq_server.recovery import Found
    from psq_server.store import Store

__all__ = ["Opened", "check_kept", "open_state"]

_OF_A_STATE: Final = (
    *("durability", "checkpoint_every", "checkpoint_s", "keep_checkpoints"),
    "checkpoint_url",
)


@dataclass(frozen=True, slots=True)
class Opened:
    """What a server begins with.

    Attributes:
        state: as it was, or empty.
        store: its disk; None where nothing outlives the process.
        weights: of a job that goes on.
    """

    state: ServerState
    store: Store | None = None
    weights: Weights | None = None


def check_kept(config: ServerConfig) -> None:
    """What goes with a state directory, and where there can be none.

    Raises:
        ConfigError: it says what, and why.
    """
    if config.state_dir is None:
        defaults = {name: ServerConfig.__dataclass_fields__[name].default for name in _OF_A_STATE}
        for name, default in defaults.items():
            if getattr(config, name) != default and getattr(config, name) != "off":
                msg = f"{name}: it says how --state-dir is used: name a folder with that"
                raise ConfigError(msg)
        return
    if config.durability == "off":
        msg = "durability: off keeps nothing: leave --state-dir out, or choose another"
        raise ConfigError(msg)
    if config.parent is not None or config.children is not None:
        msg = (
            "state_dir: a tree cannot go on after a crash, since what an aggregator has added up "
            "and not passed on is in its memory alone: leave it out, or connect the workers to one "
            "server"
        )
        raise ConfigError(msg)


def open_state(
    config: ServerConfig,
    settings: Settings,
    log: LineLog,
    *,
    goes_back: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> Opened:
    """Open the state directory, if there is to be one, and take up what is in it.

    Args:
        config: what was asked for.
        settings: what follows from it.
        log: is told what was found.
        goes_back: rounds that the workers cannot say again are lost: forget them, for good.
        clock: monotonic seconds.

    Raises:
        StateError: the directory cannot be used, or its state cannot be had whole.
        ConfigError: the job in it is not the one that was asked for.
    """
    if config.state_dir is None:
        return Opened(ServerState(settings, clock()))
    from psq.durable import StateDirectory, reach  # noqa: PLC0415 - other servers need none of these
    from psq_server.recovery import known, recover  # noqa: PLC0415
    from psq_server.store import Store  # noqa: PLC0415

    copy = _copier(config.checkpoint_url)
    directory = StateDirectory.open(Path(config.state_dir), create=True)
    settings = replace(
        settings,
        run_id=directory.run_id,
        epoch=directory.epoch,
        durability=config.durability,
        checkpoint_every=config.checkpoint_every,
        checkpoint_s=config.checkpoint_s,
    )
    began_s = clock()
    found = recover(
        directory,
        lambda event, text: log.write("error", event, {"text": text}),
        goes_back=goes_back,
    )
    store = Store(directory, keep=config.keep_checkpoints, copy=copy, clock=clock)
    log.write(
        "info",
        "state",
        {"path": str(directory.path), "run": directory.run_id.hex(), "epoch": directory.epoch},
    )
    if found is None:
        return Opened(ServerState(settings, clock()), store)
    with known(f"the newest state in {directory.path}"):
        state = _restore(found, settings, clock())
    _check_job(config, state)
    store.version = found.checkpoint
    if state.level in LOGGED or goes_back:
        store.open_journal(
            state.snapshot(clock()).version,
            reader=found.reader,
            drop_after=found.recovered.last_number,
        )
    log.write(
        "info",
        "recovered",
        {
            "version": state.snapshot(clock()).version,
            "checkpoint": found.checkpoint,
            "rounds": found.recovered.rounds,
            "owed": len(found.recovered.owed),
            "durability": state.level,
            "seconds": round(clock() - began_s, 3),
        },
    )
    reach("recovery.served")
    return Opened(state, store, found.weights)


def _restore(found: Found, settings: Settings, now_s: float) -> ServerState:
    return ServerState.restore(
        settings,
        found.captured,
        now_s,
        shards=found.weights.versions,
        frames=found.weights.last_frames,
        rest=Rest(found.recovered.owed, found.checkpoint),
    )


def _check_job(config: ServerConfig, state: ServerState) -> None:
    """Refuse to go on with a job that the command line does not mean."""
    plan = state.plan
    assert plan is not None  # noqa: S101 - a state has a job
    for option, asked, has in (
        ("world_size", config.world_size, plan.world_size),
        ("recipe", config.recipe, plan.recipe.name),
    ):
        if asked not in (None, has):
            msg = (
                f"{option}: {asked} was asked for, the job in {config.state_dir} has {has}: leave "
                f"--{option.replace('_', '-')} out, or name another --state-dir"
            )
            raise ConfigError(msg)
    fault = refusal(plan, config.durability)
    if fault:
        raise ConfigError(fault)


def _copier(url: str | None) -> Copy | None:
    if url is None:
        return None
    if find_spec("fsspec") is None:
        msg = (
            "checkpoint_url: it needs fsspec, which is not installed: pip install psq-train[remote]"
        )
        raise ConfigError(msg)
    from psq.durable.remote import check_url, copy_checkpoint  # noqa: PLC0415 - an extra

    check_url(url)  # here, and not after the first checkpoint
    return lambda path: copy_checkpoint(path, url)
