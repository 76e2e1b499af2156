"""What a worker keeps of what it said, for a server that leaves payloads to it."""

import pytest

from psq.client import said as module
from psq.client.frames import PushFrames
from psq.client.round import Round
from psq.client.said import Said
from psq.plan import Plan
from psq.presets import preset
from psq_proto.frames import Header, decode_frame
from psq_proto.messages import (
    Flags,
    Hello,
    Join,
    MessageType,
    Recall,
    Verdict,
    Welcome,
)
from psq_proto.session import ServerSession, WorkerSession

PLAN = Plan.of([("a", (600,)), ("b", (1 << 20,))], preset("server-adam"), 2)
SHARDS = [shard.index for shard in PLAN.owned]


def joined():
    worker = WorkerSession(rank=1, plan_body=PLAN.body)
    server = ServerSession(run_id=b"r" * 16, epoch=1)
    server.receive(worker.send(MessageType.HELLO, Hello(1)))
    worker.receive(server.send_cookie(1))
    server.receive(worker.send(MessageType.PLAN, PLAN.body))
    server.receive(worker.send(MessageType.JOIN, Join(1)))
    welcome = Welcome("continue", -1, 10.0, init_wanted=False, world_size=2, has_weights=True)
    worker.receive(server.send(MessageType.WELCOME, welcome))
    return worker


class Worker:
    def __init__(self, mark=1):
        self.frames = PushFrames(PLAN, lambda _: False)
        self.said = Said(joined(), self.frames)
        self.told(mark)

    def told(self, mark, kind=MessageType.STATUS):
        self.said.hear(Header(kind, seq=mark), memoryview(b""))

    def open(self, number, shards=SHARDS):
        """A round of which these shards are pushed, with bytes that say which."""
        current = Round(number, 0.1, SHARDS)
        for shard in shards:
            current.push(shard)
            self.frames.payload(shard)[:] = (number + shard) % 256
        return current

    def ends(self, number, version=None, shards=SHARDS):
        current = self.open(number, shards)
        current.take(Verdict("applied"), number + 1 if version is None else version)
        self.said.note(current)

    def asks(self, seq, shards=SHARDS, current=None):
        """What is said again: shards, and a byte of each; None for a contribution that is lost."""
        self.said.hear(Header(MessageType.RECALL, seq=seq), Recall(tuple(shards)))
        told = []
        while (frame := self.said.next(current)) is not None:
            header, body = decode_frame(frame)
            assert header.seq == seq
            lost = header.flags & Flags.SKIP
            told.append(None if lost else (header.shard, body[0]))
        return told


def test_the_very_bytes_are_said_again_although_the_buffers_hold_others():
    worker = Worker()
    worker.ends(4)
    worker.ends(5)
    assert worker.asks(4) == [(shard, 4 + shard) for shard in SHARDS]


def test_asked_twice_is_said_once():
    worker = Worker()
    worker.ends(4)
    worker.said.hear(Header(MessageType.RECALL, seq=4), Recall((0,)))
    assert worker.asks(4, [0]) == [(0, 4)]


def test_what_a_new_conversation_did_not_ask_for_is_not_said():
    worker = Worker()
    worker.ends(4)
    worker.said.hear(Header(MessageType.RECALL, seq=4), Recall((0,)))
    worker.told(1, MessageType.WELCOME)
    assert worker.said.next(None) is None


def test_an_open_round_is_said_again_from_its_buffers():
    worker = Worker()
    current = worker.open(7, SHARDS[:1])
    assert worker.asks(7, SHARDS[:1], current) == [(SHARDS[0], 7 + SHARDS[0])]


def test_what_is_not_there_is_said_to_be_lost_once():
    worker = Worker()
    worker.ends(4, shards=SHARDS[:1])
    assert worker.asks(3) == [None]
    assert worker.asks(4, SHARDS[1:]) == [None]


def test_only_a_checkpoint_on_disk_lets_anything_go():
    worker = Worker()
    for number in range(4):
        worker.ends(number)
    before = worker.said.nbytes
    worker.told(1, MessageType.CKPT)  # whichever version it announces
    assert worker.said.nbytes == before
    worker.told(1 + 2)
    assert worker.said.nbytes == before // 2
    assert worker.asks(1) == [None]
    assert worker.asks(2) != [None]


def test_what_counted_in_a_later_round_is_kept_longer():
    worker = Worker()
    worker.ends(0, version=5)
    worker.told(1 + 4)
    assert worker.asks(0) != [None]
    worker.told(1 + 5)
    assert worker.asks(0) == [None]
    assert not worker.said.is_needed


def test_without_the_server_s_wish_nothing_is_kept():
    worker = Worker(mark=0)
    worker.ends(0)
    assert not worker.said.is_needed
    worker.told(1)
    worker.ends(1)
    worker.told(0)
    assert worker.said.nbytes == 0


def test_no_server_fills_this_machine(monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES", 1)
    worker = Worker()
    for number in range(9):
        worker.ends(number)
    assert worker.asks(9 - module.MIN_ROUNDS) != [None]
    assert worker.asks(8 - module.MIN_ROUNDS) == [None]


@pytest.mark.parametrize("kind", [MessageType.VERDICT, MessageType.HEARTBEAT])
def test_other_messages_say_nothing_of_the_disk(kind):
    worker = Worker()
    worker.ends(0)
    worker.told(100, kind)
    assert worker.said.is_needed
