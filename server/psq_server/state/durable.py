"""What a server's state is on disk: captured whole, captured as what changed, put back.

    captured = {"format", "plan", "world": {name: plain}, "members": {rank: {field: plain}}}

A `plain` value is what msgpack can hold, and comes back as the type that it was: containers are
lists that begin with a letter (`_WRITERS`), dataclasses of `_KINDS` their name and fields. What is
captured is named where it is defined: `World.KEPT`, and every field of `Member` that is not in
`members.TRANSIENT`. An attribute that knows how (it has `capture` and `restore`) does it itself.

Of an open round nothing is captured: who waits for a verdict says its contribution again. Nor are
connections and times: members come back without a connection, heard last at the moment of
restoring, so that they are silent since now and not lost.
"""

from __future__ import annotations

import struct
from collections import Counter, deque
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, fields, is_dataclass
from types import UnionType
from typing import Any, Final, Literal, TypeAlias, get_args, get_origin, get_type_hints

from psq.errors import StateError
from psq.plan import Plan
from psq_proto.frames import HEADER_BYTES, Buffer
from psq_proto.messages import Leave, Verdict
from psq_server.state import drawing, joining, keeping
from psq_server.state.members import TRANSIENT, Member, Resolved
from psq_server.state.past import Collection, Past
from psq_server.state.round import OpenRound
from psq_server.state.world import Counts, World

__all__ = [
    "FORMAT",
    "NO_REST",
    "Plain",
    "Recorder",
    "Rest",
    "from_plain",
    "merge",
    "restore",
    "to_plain",
]

FORMAT: Final = 1
Plain: TypeAlias = Any
"""None, bool, int, float, str, bytes, and lists of these."""

_KINDS: Final[dict[str, type[Any]]] = {
    kind.__name__: kind for kind in (Counts, Leave, Resolved, Verdict)
}
_KEPT_FIELDS: Final = tuple(each.name for each in fields(Member) if each.name not in TRANSIENT)
_BODY_CRC: Final = struct.Struct("<92xI4x")
_SCALARS: Final = (type(None), bool, int, float, str, bytes)


def to_plain(value: Any) -> Plain:
    """A value as lists and scalars.

    Raises:
        TypeError: it holds something that is not to be kept.
    """
    if isinstance(value, _SCALARS):
        return value
    if hasattr(value, "capture"):
        return ["k", value.capture()]
    if is_dataclass(value) and type(value).__name__ in _KINDS:
        named = {each.name: to_plain(getattr(value, each.name)) for each in fields(value)}
        return ["o", type(value).__name__, named]
    for kind, write in _WRITERS:
        if isinstance(value, kind):
            return write(value)
    msg = f"{type(value).__name__} cannot be kept: {value!r:.80}"
    raise TypeError(msg)


def _pairs(value: Mapping[Any, Any]) -> list[Plain]:
    return [[to_plain(key), to_plain(item)] for key, item in value.items()]


_WRITERS: Final[tuple[tuple[type, Callable[[Any], Plain]], ...]] = (
    (Counter, lambda value: ["c", _pairs(value)]),
    (dict, lambda value: ["m", _pairs(value)]),
    (tuple, lambda value: ["t", [to_plain(item) for item in value]]),
    (list, lambda value: ["l", [to_plain(item) for item in value]]),
    (deque, lambda value: ["d", value.maxlen, [to_plain(item) for item in value]]),
    (frozenset, lambda value: ["f", [to_plain(item) for item in sorted(value)]]),
    (set, lambda value: ["s", [to_plain(item) for item in sorted(value)]]),
)


def from_plain(plain: Plain) -> Any:
    """The value that became `plain`; what captured itself stays as it is.

    Raises:
        StateError: nothing that this version of psq knows.
    """
    if not isinstance(plain, list):
        return plain
    match plain:
        case ["o", str(name), dict(named)] if name in _KINDS:
            values = {key: from_plain(item) for key, item in named.items()}
            return _KINDS[name](**_checked(_KINDS[name], values))
        case ["d", maxlen, list(items)]:
            return deque(map(from_plain, items), maxlen)
        case ["c" | "m" as letter, list(items)]:
            pairs = {from_plain(key): from_plain(item) for key, item in items}
            return Counter(pairs) if letter == "c" else pairs
        case ["t" | "l" | "f" | "s" as letter, list(items)]:
            return {"t": tuple, "l": list, "f": frozenset, "s": set}[letter](map(from_plain, items))
        case ["k", inner]:
            return inner
    msg = (
        f"the saved state holds {plain!r:.80}, which this psq does not know: it was written by "
        "another version; start that one"
    )
    raise StateError(msg)


_HINTS: Final = {kind: get_type_hints(kind) for kind in (*_KINDS.values(), Member)}


def _checked(kind: type[Any], values: dict[str, Any]) -> dict[str, Any]:
    """These values, if each has the type of its field.

    Raises:
        StateError: one has not, or there is no such field.
    """
    for name, value in values.items():
        hint = _HINTS[kind].get(name)
        if hint is None or not _fits(value, hint):
            msg = (
                f"the saved state has {value!r:.80} as {kind.__name__}.{name}: it was written by "
                "another version of psq; start that one"
            )
            raise StateError(msg)
    return values


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin is UnionType:
        return any(_fits(value, each) for each in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if hint in {int, float}:
        return isinstance(value, int | hint) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


@dataclass(frozen=True, slots=True)
class Rest:
    """What was on the disk beside the state.

    Attributes:
        owed: the last of its rounds, whose payloads are with the workers; they are not in the
            weights yet.
        checkpoint: the version of the newest one; None: the state's.
    """

    owed: tuple[Past, ...] = ()
    checkpoint: int | None = None


NO_REST: Final = Rest()


class Recorder:
    """Captures a world: whole, or what changed since it was captured last."""

    def __init__(self) -> None:
        self._members: dict[int, tuple[Any, ...]] = {}
        self._parts: dict[str, Plain] = {}

    def capture(self, world: World) -> dict[str, Plain]:
        """All that outlives this process."""
        self._members = {rank: _kept(member) for rank, member in world.members.items()}
        self._parts = {name: to_plain(getattr(world, name)) for name in world.KEPT}
        return {
            "format": FORMAT,
            "plan": world.need_job().plan.body,
            "world": dict(self._parts),
            "members": {rank: _named(kept) for rank, kept in self._members.items()},
        }

    def changes(self, world: World, *, committed: bool) -> dict[str, Plain]:
        """What changed since the last call, and of a round that was committed the answers' CRCs."""
        members = {rank: _kept(member) for rank, member in world.members.items()}
        changed = {r: _named(kept) for r, kept in members.items() if kept != self._members.get(r)}
        parts = {name: to_plain(getattr(world, name)) for name in world.KEPT}
        told = {name: part for name, part in parts.items() if part != self._parts.get(name)}
        self._members, self._parts = members, parts
        changes: dict[str, Plain] = {"version": world.version, "world": told, "members": changed}
        if committed:
            changes["crcs"] = _answers(world)
        return changes


def _kept(member: Member) -> tuple[Any, ...]:
    return tuple([getattr(member, name) for name in _KEPT_FIELDS])


def _named(kept: tuple[Any, ...]) -> dict[str, Plain]:
    return {name: to_plain(value) for name, value in zip(_KEPT_FIELDS, kept, strict=True)}


def _answers(world: World) -> dict[int, int]:
    """The CRC of what the last round said of each shard that it moved."""
    crcs: dict[int, int] = {}
    for shard in world.need_job().plan.due_shards(world.version - 1):
        frame = world.last_frames[shard][0]
        if len(frame) >= HEADER_BYTES:
            crcs[shard] = _BODY_CRC.unpack_from(frame)[0]
    return crcs


def merge(captured: MutableMapping[str, Plain], changes: Mapping[str, Plain]) -> None:
    """Bring what was captured up to date, in place."""
    captured["world"].update(changes["world"])
    for rank, kept in changes["members"].items():
        captured["members"].setdefault(rank, {}).update(kept)


def restore(
    world: World,
    captured: Mapping[str, Plain],
    shards: Mapping[int, int],
    frames: Mapping[int, tuple[Buffer, ...]],
    rest: Rest = NO_REST,
) -> None:
    """Make a new world what the captured one was, between two rounds.

    Args:
        world: as it was made.
        captured: see the module.
        shards: the version that moved each shard last.
        frames: what was broadcast last of each shard, sealed anew.
        rest: what else was on the disk.

    Raises:
        StateError: another version of psq wrote it.
    """
    if captured.get("format") != FORMAT:
        msg = (
            f"the saved state has format {captured.get('format')!r:.40}, this psq reads {FORMAT}: "
            "start the version that wrote it"
        )
        raise StateError(msg)
    joining.adopt(world, Plan.parse(captured["plan"]))
    for name in world.KEPT:
        if name in captured["world"]:
            _put_back(world, name, captured["world"][name])
    for rank, kept in captured["members"].items():
        named = {name: from_plain(kept[name]) for name in _KEPT_FIELDS if name in kept}
        named = _checked(Member, named)
        named.pop("rank", None)
        member = Member(rank=rank, incarnation=0, seen_s=world.now_s, peer=None, **named)
        world.members[rank] = member
    job = world.need_job()
    due = job.plan.due_shards(world.version)
    world.round = OpenRound(world.version, due, world.now_s, job.owed(due))
    world.has_weights = True
    world.versions, world.last_frames = dict(shards), dict(frames)
    for past in rest.owed:
        world.versions |= dict.fromkeys(past.shards, past.number + 1)
    if rest.owed:
        world.collection = Collection(rest.owed, rest.owed[0].number)
    world.start_version = world.checkpoint_version = world.version
    keeping.note_start(world)
    world.written_version = world.version if rest.checkpoint is None else rest.checkpoint
    _hand_back(world)
    world.note_opened()
    world.out, world.touched = [], False


def _hand_back(world: World) -> None:
    """Whoever is gone will not say again what it had said of the open round: its data go back."""
    for member in world.members.values():
        if member.evicted or member.gone:
            drawing.release(world, member, "was gone when this server came back")


def _put_back(world: World, name: str, plain: Plain) -> None:
    value = getattr(world, name)
    if hasattr(value, "restore"):
        value.restore(from_plain(plain))
    else:
        found = from_plain(plain)
        if type(found) is not type(value):
            msg = (
                f"the saved state has {found!r:.80} as {name}: it was written by another version "
                "of psq; start that one"
            )
            raise StateError(msg)
        setattr(world, name, found)
