"""After a crash: the newest checkpoint that is whole, and the rounds that came after it, again.

`replay` is pure: it takes records, whoever read them, and drives whoever reduces. Rounds are
replayed as wholes, in order: a shard whose round has no ROUND record never happened, for nothing
that depended on it had left. Rounds whose payloads are with the workers are owed: what the ranks
were is known at once, the weights when the payloads have come again (`psq_server.state.replaying`).

`recover` does so with a state directory. It never begins afresh where there was a state: if no
checkpoint can be read, or the journal lacks something, it says what and where (StateError, 65).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from psq.durable import JournalReader, StateDirectory, reach, read_journal
from psq.durable.checkpoint import list_checkpoints, open_checkpoint
from psq.errors import PsqError, StateError
from psq.plan import Plan
from psq_server.gate import RecordKind
from psq_server.retaking import Reducing, Told, retake
from psq_server.state import Past
from psq_server.state.durable import merge
from psq_server.weights import Weights

__all__ = ["Entry", "Found", "Recovered", "known", "recover", "replay"]

_FOREIGN: Final = (LookupError, TypeError, ValueError, AttributeError, OverflowError, struct.error)
"""What becomes of a value that is missing, or of another kind, where it is used."""


class Entry(Protocol):
    """A record of the journal; `psq.durable.Record` is one."""

    @property
    def number(self) -> int:
        """Its place."""

    @property
    def kind(self) -> int:
        """One of `RecordKind`."""

    @property
    def meta(self) -> Mapping[str, Any]:
        """What it says."""

    @property
    def buffers(self) -> tuple[memoryview, ...]:
        """The payloads that it speaks of."""


@dataclass(frozen=True, slots=True)
class Recovered:
    """What a replay came to.

    Attributes:
        rounds: how many rounds were taken again.
        last_number: of the last record that counts; None: none does.
        owed: the rounds after these, whose payloads are with the workers.
    """

    rounds: int
    last_number: int | None
    owed: tuple[Past, ...] = ()


def replay(
    captured: dict[str, Any],
    records: Iterable[Entry],
    weights: Reducing,
    *,
    goes_back: bool = False,
) -> Recovered:
    """Bring a captured state up to date, in place, and the weights with it.

    From the first round on whose payloads the records do not have (level `replay`), the weights
    stay as they are: the rounds are owed, and `retake` makes them again when the payloads are here.

    Args:
        captured: by `ServerState.capture`.
        records: what was made durable after it, in order; older ones are passed over.
        weights: as they were captured.
        goes_back: what is owed cannot be had: what comes before it counts, and nothing after it.

    Raises:
        StateError: a round is missing, or gives other bytes than it gave.
    """
    return _Replay(captured, weights, goes_back=goes_back).take(records)


class _Replay:
    """The rounds of a journal, taken one by one."""

    def __init__(
        self, captured: dict[str, Any], weights: Reducing, *, goes_back: bool = False
    ) -> None:
        self._captured = captured
        self._goes_back = goes_back
        self._ended = False
        self._weights = weights
        self._told = Told()
        self._rounds = 0
        self._owed: list[Past] = []

    @property
    def _version(self) -> int:
        version: int = self._captured["world"]["version"]
        return version

    def take(self, records: Iterable[Entry]) -> Recovered:
        last: int | None = None
        for record in filter(lambda _: not self._ended, records):  # to the end, wherever that is
            meta = record.meta
            match record.kind:
                case RecordKind.START:
                    self._forget_round()
                    last = record.number
                case RecordKind.SHARD if meta["round"] >= self._version:
                    self._told.shard(meta, record.buffers)
                case RecordKind.SAID if meta["round"] >= self._version:
                    self._told.said(meta)
                case RecordKind.JUDGE if meta["round"] >= self._version:
                    self._told.judged(meta, record.buffers)
                # What is older than this state counts too: the checkpoint before may need it yet.
                case RecordKind.ROUND:
                    if meta["version"] > self._version:
                        self._take_round(meta)
                    last = last if self._ended else record.number
                case RecordKind.CHANGE:
                    if meta["version"] >= self._version:
                        merge(self._captured, meta)
                    last = record.number
        return Recovered(self._rounds, last, tuple(self._owed))

    def _forget_round(self) -> None:
        self._told = Told()

    def _take_round(self, meta: Mapping[str, Any]) -> None:
        """Reduce a round's shards again, and believe what it says of the ranks.

        From the first one on whose payloads are elsewhere, rounds are owed.
        """
        version = meta["version"]
        if version != self._version + 1:
            msg = (
                f"the journal goes from version {self._version} to {version}: a round is missing; "
                "put back the directory as it was, or start from another checkpoint"
            )
            raise StateError(msg)
        reach("recovery.round")
        past = self._told.past(version - 1, meta["crcs"])
        if self._goes_back and past.missing():
            self._ended = True
            return
        if self._owed or past.missing():
            self._owed.append(past)
        else:
            retake(past, self._weights)
            self._rounds += 1
        merge(self._captured, meta)
        self._forget_round()


# ---- from a directory


@contextmanager
def known(place: str) -> Iterator[None]:
    """Refuse what is whole on disk, and not what this psq writes: its values are used as they are.

    Args:
        place: what is read in the block.

    Raises:
        StateError: it says where, what was met and what to do.
    """
    try:
        yield
    except StateError as error:
        if place in str(error):
            raise
        msg = f"{place}: {error}"
        raise StateError(msg) from error
    except (*_FOREIGN, PsqError) as error:
        what = f"{error}" if isinstance(error, PsqError) else f"{type(error).__name__}: {error}"
        msg = (
            f"{place} is whole, and not what a server of this version of psq keeps ({what:.300}): "
            "start the version that wrote it, or name the state directory of a server"
        )
        raise StateError(msg) from error


@dataclass(frozen=True, slots=True)
class Found:
    """A state that was on disk, as it was when its server died.

    Attributes:
        captured: for `ServerState.restore`.
        weights: with every round that was durable in them.
        reader: how far the journal was read; a new one goes on from it.
        recovered: what was replayed.
        checkpoint: the version that it was replayed onto.
    """

    captured: dict[str, Any]
    weights: Weights
    reader: JournalReader
    recovered: Recovered
    checkpoint: int


def recover(
    directory: StateDirectory, note: Callable[[str, str], None], *, goes_back: bool = False
) -> Found | None:
    """The state in a directory, or None if none was begun there.

    Args:
        directory: open, and this process's.
        note: takes an event and a text: what was passed over, and why.
        goes_back: rounds that the workers cannot say again are lost: what comes before them counts.

    Raises:
        StateError: there is a state, and it cannot be had whole.
    """
    begun = _load(directory, note)
    if begun is None:
        _check_fresh(directory)
        return None
    captured, weights, version = begun
    reach("recovery.loaded")
    reader = read_journal(directory.journal, version, run_id=directory.run_id)
    with known(f"the journal in {directory.journal}"):
        recovered = replay(captured, reader, weights, goes_back=goes_back)
    if reader.torn is not None:
        torn = reader.torn
        text = f"{torn.path}: the last {torn.lost_bytes} bytes were not written whole: {torn.why}"
        note("torn-journal", text)
    reach("recovery.replayed")
    return Found(captured, weights, reader, recovered, version)


def _load(
    directory: StateDirectory, note: Callable[[str, str], None]
) -> tuple[dict[str, Any], Weights, int] | None:
    """The newest checkpoint that is whole, in memory; None if there is none at all."""
    listed, why = list_checkpoints(directory.checkpoints), ""
    for each in listed:
        try:
            return _open(directory, each.path)
        except StateError as error:
            why = str(error)
            note("rotten-checkpoint", f"{each.path}: {error}; it is passed over")
    if not listed:
        return None
    msg = (
        f"{directory.path} has {len(listed)} checkpoints, and none can be read: put back a copy of "
        "one (psq ckpt verify says what is wrong), or begin again in another directory; of the "
        f"oldest: {why}"
    )
    raise StateError(msg)


def _open(directory: StateDirectory, path: Path) -> tuple[dict[str, Any], Weights, int]:
    checkpoint = open_checkpoint(path)
    with known(str(path)):
        captured, facts = checkpoint.meta["server"], checkpoint.meta["facts"]
        plan = Plan.parse(captured["plan"])
        weights = Weights(plan, directory.run_id, directory.epoch, lambda _: False)
        weights.resume(facts, checkpoint)
        version = captured["world"]["version"]
    if version != checkpoint.version:
        msg = f"{path} is of version {checkpoint.version}, and its meta of {version!r:.40}"
        raise StateError(msg)
    return captured, weights, checkpoint.version


def _check_fresh(directory: StateDirectory) -> None:
    """Refuse to begin where rounds were committed.

    Raises:
        StateError: the journal has rounds, so checkpoints were taken away.
    """
    records = read_journal(directory.journal, 0, run_id=directory.run_id)
    if any(record.kind == RecordKind.ROUND for record in records):
        msg = (
            f"{directory.path} has a journal of rounds, and no checkpoint that they go on from: "
            "put the checkpoints back, or begin again in another directory"
        )
        raise StateError(msg)
