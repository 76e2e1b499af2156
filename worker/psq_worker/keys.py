"""`psq keygen` and `psq keys`: make key files, say whose keys a server takes, take one back.

    keys/server/          for the server's machine; each folder is for one machine alone
    keys/rank0/           for the machine of rank 0
    keys/aggregator0-3/   a pair as a server of the ranks below, another as a worker of who is above

Nothing is ever overwritten, and no secret is printed. A server looks at its `authorized_workers`
all the time: what `add` and `revoke` do takes effect within seconds, without a restart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from psq.curve import RELOAD_S, new_pair
from psq.errors import ConfigError
from psq.keys import (
    AUTHORIZED,
    PUBLIC,
    SECRET,
    Authorized,
    Ranks,
    SecretKey,
    fingerprint,
    read_authorized,
    read_public,
    write_public,
    write_secret,
)

__all__ = ["Listed", "add_workers", "authorized_folder", "list_keys", "make_keys", "revoke"]

SERVER: Final = "server"
REVOKED: Final = "revoked_workers"
FOLDER_MODE: Final = 0o700


@dataclass(frozen=True, slots=True)
class Listed:
    """What `psq keys list` shows of one key."""

    name: str
    ranks: str
    fingerprint: str


def make_keys(
    root: Path, workers: int, aggregators: Sequence[Ranks] = (), *, keep: bool = False
) -> list[Path]:
    """Make the keys of a job; returns the folders that were made.

    Args:
        root: the folder of all of them, which need not exist.
        workers: how many ranks have one each.
        aggregators: which ranks there is an aggregator for; they may be within one another.
        keep: if all of it is there, leave it and return nothing.

    Raises:
        ConfigError: something of it is there already, or cannot be written.
    """
    _check_nested(aggregators, workers)
    ranks = [Ranks(rank, rank) for rank in range(workers)]
    folders = [
        SERVER,
        *(f"aggregator{one.text}" for one in aggregators),
        *(f"rank{one.text}" for one in ranks),
    ]
    there = [path for path in _secrets(root, folders) if path.exists()]
    if keep and len(there) == len(list(_secrets(root, folders))):
        return []
    if there:
        msg = f"{there[0]} is there already, and keys are never overwritten: name another folder"
        raise ConfigError(msg)
    # Parents first: those below need their public keys.
    parents = sorted(aggregators, key=lambda one: one.first - one.last)
    _make_folder(root)
    _make_server(root / SERVER, "the server")
    for one in parents:
        _make_server(root / f"aggregator{one.text}", f"the aggregator of {one.words}")
    for one in parents:
        _make_worker(root, f"aggregator{one.text}", one, aggregators)
    for one in ranks:
        _make_worker(root, f"rank{one.text}", one, aggregators)
    return [root / name for name in folders]


def add_workers(root: Path, ranks: Sequence[int]) -> list[Path]:
    """Keys of more ranks, for a server whose own are there.

    Raises:
        ConfigError: there is no such server, or a rank has a key in this folder.
    """
    aggregators = list(_found_aggregators(root))
    for rank in ranks:
        _make_worker(root, f"rank{rank}", Ranks(rank, rank), aggregators)
    return [root / f"rank{rank}" for rank in ranks]


def list_keys(folder: Path) -> tuple[list[Listed], list[str]]:
    """Whose keys a server takes, by rank; and what is wrong with files that let nobody in.

    Raises:
        ConfigError: there is no such folder.
    """
    found, faults = read_authorized(authorized_folder(folder))
    inside = sorted(found.values(), key=lambda one: (one.ranks.first, one.ranks.last, one.name))
    return [Listed(one.name, one.ranks.text, fingerprint(one.public)) for one in inside], faults


def revoke(folder: Path, names: Sequence[str]) -> str:
    """Take keys off a server's list; their files move to `revoked_workers` beside it.

    Returns:
        What happens now, in words.

    Raises:
        ConfigError: one is not on the list; then nothing is changed.
    """
    inside = authorized_folder(folder)
    names = [name.removesuffix(PUBLIC) for name in names]
    missing = [name for name in names if not (inside / (name + PUBLIC)).is_file()]
    if missing:
        there = ", ".join(sorted(path.stem for path in inside.glob("*" + PUBLIC))) or "none"
        msg = f"{inside} has no key {missing[0]!r:.80}; there are: {there}"
        raise ConfigError(msg)
    outside = inside.parent / REVOKED
    _make_folder(outside)
    try:
        for name in names:
            (inside / (name + PUBLIC)).replace(outside / (name + PUBLIC))
    except OSError as error:
        msg = f"cannot move {name}{PUBLIC} to {outside}: {error.strerror}"
        raise ConfigError(msg) from None
    return f"revoked: {', '.join(names)}; a server that runs notices within {RELOAD_S:g} s"


def authorized_folder(folder: Path) -> Path:
    """The `authorized_workers` of a server's folder, or of the one in a folder of keys.

    Raises:
        ConfigError: there is none.
    """
    for place in (folder, folder / SERVER):
        if (place / AUTHORIZED).is_dir():
            return place / AUTHORIZED
    msg = f"neither {folder} nor {folder / SERVER} has a folder {AUTHORIZED}: see psq keygen"
    raise ConfigError(msg)


def _check_nested(aggregators: Sequence[Ranks], workers: int) -> None:
    for one in aggregators:
        if not one.first < one.last < workers:
            msg = f"aggregators: {one.text} is no range of two or more of the ranks 0-{workers - 1}"
            raise ConfigError(msg)
        for other in aggregators:
            apart = one.last < other.first or other.last < one.first
            nested = one.covers(other.first, other.last) or other.covers(one.first, one.last)
            if (one is not other and one == other) or not (apart or nested):
                msg = f"aggregators: {one.text} and {other.text} have ranks in common"
                raise ConfigError(msg)


def _secrets(root: Path, folders: Sequence[str]) -> Iterator[Path]:
    """Every secret file of these folders."""
    for name in folders:
        if not name.startswith("rank"):
            yield root / name / ("server" + SECRET)
        if name != SERVER:
            yield root / name / ("worker" + SECRET)


def _found_aggregators(root: Path) -> Iterator[Ranks]:
    for path in sorted(root.glob("aggregator*")):
        _, _, ranks = read_public(path / ("worker" + PUBLIC))
        if ranks is not None:
            yield ranks


def _above(ranks: Ranks, aggregators: Sequence[Ranks]) -> str:
    """The folder of whoever these ranks talk to: the closest aggregator, or the server."""
    around = [one for one in aggregators if one != ranks and one.covers(ranks.first, ranks.last)]
    closest = min(around, key=lambda one: one.last - one.first, default=None)
    return SERVER if closest is None else f"aggregator{closest.text}"


def _make_server(folder: Path, whose: str) -> None:
    """A pair to listen with, and an empty list of whom to let in."""
    _make_folder(folder)
    _make_folder(folder / AUTHORIZED)
    pair = new_pair()
    write_secret(folder / ("server" + SECRET), pair, whose)
    write_public(folder / ("server" + PUBLIC), pair.public, whose)


def _make_worker(root: Path, name: str, ranks: Ranks, aggregators: Sequence[Ranks]) -> None:
    """A pair to connect with, the key of who is above, and a place on that one's list."""
    above = root / _above(ranks, aggregators)
    _, server, _ = read_public(above / ("server" + PUBLIC))
    folder = root / name
    _make_folder(folder)
    pair: SecretKey = replace(new_pair(), ranks=ranks)
    write_secret(folder / ("worker" + SECRET), pair, ranks.words)
    write_public(folder / ("worker" + PUBLIC), pair.public, ranks.words, ranks)
    whose = f"the server of {ranks.words}"
    # An aggregator's own server.pub is there already: whom it talks to is above.pub.
    pinned = ("above" if name.startswith("aggregator") else "server") + PUBLIC
    write_public(folder / pinned, server, whose)
    listed = Authorized(name, pair.public, ranks)
    write_public(above / AUTHORIZED / (listed.name + PUBLIC), listed.public, ranks.words, ranks)


def _make_folder(folder: Path) -> None:
    """A folder of its owner's alone; one that is there stays as it is."""
    try:
        folder.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
    except OSError as error:
        msg = f"cannot make the folder {folder}: {error.strerror}"
        raise ConfigError(msg) from None
