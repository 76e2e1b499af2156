"""What of a server's state is kept, how it becomes plain values and comes back."""

from collections import Counter, deque
from dataclasses import dataclass, fields

import msgpack
import pytest
from durable_server import Server, Speaker, begun
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from psq.durable.checkpoint import list_checkpoints
from psq.durable.export import export_safetensors
from psq.errors import StateError
from psq.plan import Plan
from psq.presets import preset
from psq_proto.messages import NO_VERSION, NONE, Leave, MessageType, Verdict
from psq_server.gate import RecordKind
from psq_server.recovery import replay
from psq_server.state import Counts, StopRequested, Tick
from psq_server.state.durable import from_plain, merge, to_plain
from psq_server.state.members import TRANSIENT, Member, Resolved
from psq_server.state.world import World

PLAN = Plan.of([("x", (40, 30)), ("b", (7,))], preset("server-adam"), 2)

SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text() | st.binary()
KEYS = st.integers(0, 99) | st.tuples(st.integers(0, 9), st.text(max_size=3))
VALUES = st.recursive(
    SCALARS | st.floats(allow_nan=False),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=3)
        | st.frozensets(st.integers(0, 99), max_size=3)
        | st.sets(st.integers(0, 99), max_size=3)
    ),
    max_leaves=8,
)


@given(VALUES)
def test_a_value_comes_back_as_what_it_was(value):
    packed = msgpack.packb(to_plain(value))
    back = from_plain(msgpack.unpackb(packed, strict_map_key=False))
    assert back == value
    assert type(back) is type(value)


@pytest.mark.parametrize(
    "value",
    [
        Resolved(4, Verdict("applied", "late", 0.5, (1, 3)), 5),
        Leave("done", "bye"),
        Counts(rounds=3, pushes=Counter(staged=4), rejected=Counter({(1, "late"): 2})),
        deque([1.0, 2.0], maxlen=2),
    ],
    ids=lambda value: type(value).__name__,
)
def test_so_do_the_nouns_of_the_state(value):
    back = from_plain(msgpack.unpackb(msgpack.packb(to_plain(value)), strict_map_key=False))
    assert back == value
    assert getattr(back, "maxlen", None) == getattr(value, "maxlen", None)


def test_what_cannot_be_kept_is_refused_where_it_is_captured():
    @dataclass
    class Unknown:
        x: int = 1

    for value in (Unknown(), object(), lambda: None):
        with pytest.raises(TypeError, match="cannot be kept"):
            to_plain(value)


@pytest.mark.parametrize("plain", [["o", "Unknown", {}], ["z", []], [], [1, 2]])
def test_what_another_version_wrote_is_named(plain):
    with pytest.raises(StateError, match="another version"):
        from_plain(plain)


def test_every_field_of_a_member_is_kept_or_named_as_one_that_is_not():
    assert {each.name for each in fields(Member)} > TRANSIENT
    assert {"lineage", "last_applied", "resolved", "base", "left"}.isdisjoint(TRANSIENT)
    assert set(World.KEPT) >= {"version", "counts", "replicas"}


def test_changes_bring_an_older_capture_up_to_date(tmp_path):
    server, speakers = begun(tmp_path / "state", PLAN)
    captured = server.state.capture()
    for version in range(3):
        for speaker in speakers:
            speaker.push(version)
        server.settle()
    speakers[1].leave()
    server.settle()
    changed = server.state.changes(committed=False)
    assert changed["members"] == {}  # what was said of them is in the records
    later = server.state.capture()
    merge(captured, {"world": later["world"], "members": later["members"]})
    assert captured == later
    server.crash()


def test_a_rank_that_left_is_not_waited_for_after_a_restart(tmp_path):
    server, speakers = begun(tmp_path / "state", PLAN)
    speakers[1].leave()
    server.settle()
    server.crash()
    came_back = Server(tmp_path / "state", PLAN)
    first = Speaker(came_back, 0, lineage=100).join()
    first.send(MessageType.PULL, version=NO_VERSION)
    first.push(0)
    came_back.settle()
    assert came_back.version == 1
    came_back.crash()


def test_a_server_whose_job_was_done_ends_at_once(tmp_path):
    server, speakers = begun(tmp_path / "state", PLAN)
    for speaker in speakers:
        speaker.leave()
    server.crash()  # before it said so to anybody, or saved
    came_back = Server(tmp_path / "state", PLAN)
    came_back.happen(Tick())
    came_back.settle()
    assert came_back.stopped is not None
    assert (came_back.stopped.exit_code, came_back.stopped.reason) == (0, "done")
    came_back.crash()


def test_a_round_given_up_at_the_end_has_no_verdict(tmp_path):
    """Whoever waits for one says its contribution again to the server that comes back."""
    server, speakers = begun(tmp_path / "state", PLAN)
    speakers[0].push(0)
    server.happen(StopRequested("SIGTERM"))
    server.settle()
    assert server.stopped is not None
    assert speakers[0].verdicts == {}
    kinds = [message.header.type for message in speakers[0].heard]
    assert kinds[-2:] == [MessageType.CKPT, MessageType.BYE]
    server.crash()
    came_back = Server(tmp_path / "state", PLAN)
    speakers = [Speaker(came_back, 0).join(NONE, 0), Speaker(came_back, 1).join()]
    for speaker in speakers:
        speaker.push(0)
    came_back.settle()
    assert speakers[0].verdicts[0].outcome == "applied"
    came_back.crash()


def test_workers_hear_of_a_checkpoint_before_the_verdict_of_its_round(tmp_path):
    server, speakers = begun(tmp_path / "state", PLAN, checkpoint_every=2)
    for version in range(4):
        for speaker in speakers:
            speaker.push(version)
        server.settle()
    for speaker in speakers:
        told = [
            (message.header.type, message.header.version)
            for message in speaker.heard
            if message.header.type in {MessageType.CKPT, MessageType.VERDICT}
        ]
        verdict, ckpt = MessageType.VERDICT, MessageType.CKPT
        assert told == [
            (verdict, 1),
            (ckpt, 2),
            (verdict, 2),
            (verdict, 3),
            (ckpt, 4),
            (verdict, 4),
        ]
    server.crash()


def test_a_checkpoint_exports_what_the_server_would_have_saved(tmp_path):
    server, speakers = begun(tmp_path / "state", PLAN, checkpoint_every=2)
    for version in range(2):
        for speaker in speakers:
            speaker.push(version)
        server.settle()
    newest = list_checkpoints(server.directory.checkpoints)[0]
    assert newest.version == 2
    export_safetensors(newest.path, tmp_path / "out.safetensors")
    exported = load_file(tmp_path / "out.safetensors")
    weights = server.weights.reducer.weights()
    assert exported.keys() == weights.keys()
    assert all(exported[name].tobytes() == weights[name].tobytes() for name in weights)
    server.crash()


class Record:
    """A record of a journal."""

    def __init__(self, number, kind, **meta):
        self.number, self.kind, self.meta, self.buffers = number, kind, meta, ()


def test_a_journal_that_lacks_a_round_is_refused():
    captured = {"world": {"version": 3}, "members": {}}
    records = [Record(1, RecordKind.ROUND, version=5, crcs={}, world={}, members={})]
    with pytest.raises(StateError, match="from version 3 to 5"):
        replay(captured, records, None)


def test_a_replay_that_gives_other_bytes_is_refused(tmp_path, monkeypatch):
    server, speakers = begun(tmp_path / "state", PLAN)
    for speaker in speakers:
        speaker.push(0)
    server.settle()
    server.crash()
    real = Server.__init__.__globals__["Weights"].reduce

    def reduce(self, action):
        frame = real(self, action)
        frame[92] ^= 1
        return frame

    monkeypatch.setattr("psq_server.weights.Weights.reduce", reduce)
    with pytest.raises(StateError, match=r"round 0 gives other bytes .* of shards \[0\]"):
        Server(tmp_path / "state", PLAN)
