from __future__ import annotations

from collections import defaultdict

import pytest

from psq.link import Sent
from psq_server.outbox import MAX_CONTROL, MAX_ECHO_BYTES, Outbox


class Link:
    """Takes `room` frames for each peer; peers in `gone` do not exist."""

    def __init__(self):
        self.room = defaultdict(lambda: 2)
        self.gone = set()
        self.sent = defaultdict(list)
        self.lent = set()

    def send(self, peer, frame, *, lend=False):
        if peer in self.gone:
            return Sent.GONE
        if not self.room[peer]:
            return Sent.FULL
        self.room[peer] -= 1
        self.sent[peer].append(frame)
        if lend:
            self.lent.add(frame)
        return Sent.QUEUED

    def is_lent(self, frame):
        return frame in self.lent


def news(*frames):
    """Frames of shards 0, 1, ... by shard."""
    return tuple(enumerate(frames))


def whole(shard):
    """A shard in two parts, at version 7."""
    return 7, (b"%d.0" % shard, b"%d.1" % shard)


@pytest.fixture
def link():
    return Link()


@pytest.fixture
def outbox(link):
    box = Outbox(link, whole)
    box.max_versions = 1
    return box


def test_what_there_is_room_for_goes_at_once(link, outbox):
    outbox.send(b"a", b"1")
    assert link.sent[b"a"] == [b"1"]
    assert not outbox.waiting


def test_what_there_is_no_room_for_goes_later_and_in_order(link, outbox):
    outbox.send_weights(b"a", 1, news(b"1", b"2", b"3", b"4"))
    outbox.send(b"a", b"5")
    assert outbox.waiting
    link.room[b"a"] = 9
    outbox.flush()
    assert link.sent[b"a"] == [b"1", b"2", b"3", b"4", b"5"]
    assert not outbox.waiting


def test_a_full_peer_holds_up_no_other(link, outbox):
    link.room[b"slow"] = 0
    for peer in (b"slow", b"fast"):
        assert outbox.send_weights(peer, 1, news(b"1", b"2"))
    assert link.sent == {b"fast": [b"1", b"2"]}


def test_weights_still_waiting_when_newer_ones_come_are_dropped_with_them(link, outbox):
    link.room[b"a"] = 1
    outbox.send_weights(b"a", 1, news(b"1", b"2", b"3"))
    outbox.send(b"a", b"control")
    assert not outbox.send_weights(b"a", 2, news(b"4", b"5"))
    assert outbox.dropped_frames == 4
    link.room[b"a"] = 9
    outbox.flush()
    assert link.sent[b"a"] == [b"1", b"control"]


def test_after_a_drop_the_peer_may_be_sent_weights_again(link, outbox):
    link.room[b"a"] = 0
    outbox.send_weights(b"a", 1, news(b"1"))
    outbox.send_weights(b"a", 2, news(b"2"))
    assert outbox.send_weights(b"a", 2, news(b"full"))
    link.room[b"a"] = 9
    outbox.flush()
    assert link.sent[b"a"] == [b"full"]


def test_asking_twice_for_the_same_frames_queues_them_once(link, outbox):
    frames = news(b"1", b"2")
    link.room[b"a"] = 0
    for _ in range(5):
        assert outbox.send_weights(b"a", 1, frames)
    link.room[b"a"] = 99
    outbox.flush()
    assert link.sent[b"a"] == [b"1", b"2"]


def test_control_frames_for_a_full_peer_are_bounded(link, outbox):
    link.room[b"a"] = 0
    for _ in range(MAX_CONTROL + 10):
        outbox.send(b"a", b"status")
    assert outbox.dropped_frames == 10


def test_the_bound_on_control_frames_counts_those_that_wait_now(link, outbox):
    link.room[b"a"] = 0
    for _ in range(MAX_CONTROL):
        outbox.send(b"a", b"status")
    link.room[b"a"] = 1
    outbox.flush()
    outbox.send(b"a", b"last")
    assert outbox.dropped_frames == 0


def test_a_peer_that_does_not_exist_is_reported_and_forgotten(link, outbox):
    link.gone.add(b"a")
    outbox.send(b"a", b"1")
    outbox.send_weights(b"a", 1, news(b"1", b"2", b"3"))
    assert outbox.gone == [b"a", b"a"]
    assert not outbox.waiting


def test_a_peer_that_goes_while_frames_wait_is_reported(link, outbox):
    link.room[b"a"] = 1
    outbox.send_weights(b"a", 1, news(b"1", b"2"))
    link.gone.add(b"a")
    outbox.flush()
    assert outbox.gone == [b"a"]
    assert not outbox.waiting


def test_weights_of_as_many_versions_as_are_allowed_wait_and_one_more_drops_them(link, outbox):
    outbox.max_versions = 3
    link.room[b"a"] = 0
    for version in range(3):
        assert outbox.send_weights(b"a", version, news(b"%d" % version))
    assert not outbox.send_weights(b"a", 3, news(b"3"))
    assert outbox.dropped_frames == 4
    assert not outbox.waiting


def test_it_knows_which_buffers_wait_for_anybody(link, outbox):
    frame, other = bytearray(b"1"), bytearray(b"1")
    link.room[b"a"] = link.room[b"b"] = 0
    for peer in (b"a", b"b"):
        outbox.send_weights(peer, 1, news(frame))
    assert outbox.holds(frame)
    assert not outbox.holds(other)
    outbox.forget(b"a")
    assert outbox.holds(frame)
    link.room[b"b"] = 1
    outbox.flush()
    assert not outbox.holds(frame)


def test_whole_shards_are_made_one_at_a_time_as_the_peer_takes_them(link):
    made = []

    def make(shard):
        made.append(shard)
        return whole(shard)

    outbox = Outbox(link, make)
    link.room[b"a"] = 1
    outbox.send_full(b"a", (0, 1))
    assert made == [0]
    link.room[b"a"] = 9
    link.lent = {b"0.0"}
    outbox.flush()
    assert (made, outbox.waiting) == ([0], True), "the link still has the first"
    link.lent = set()
    outbox.flush()
    assert link.sent[b"a"] == [b"0.0", b"0.1", b"1.0", b"1.1"]
    assert not outbox.waiting


def test_weights_of_a_shard_that_is_to_be_sent_whole_are_not_sent_before(link, outbox):
    link.room[b"a"] = 1
    outbox.send_full(b"a", (0, 1))
    assert outbox.send_weights(b"a", 7, ((1, b"round"),))
    link.room[b"a"] = 9
    outbox.flush()
    assert link.sent[b"a"] == [b"0.0", b"0.1", b"1.0", b"1.1"]


def test_whoever_falls_behind_while_it_gets_whole_shards_gets_more_of_them(link, outbox):
    link.room[b"a"] = 1
    outbox.send_full(b"a", (0, 1))
    assert outbox.send_weights(b"a", 8, ((0, b"round"),)), "it need not pull"
    link.room[b"a"] = 9
    outbox.flush()
    assert link.sent[b"a"] == [b"0.0", b"1.0", b"1.1", b"0.0", b"0.1"]


def test_what_nobody_needs_is_sent_only_if_nothing_waits(link, outbox):
    outbox.send_if_idle(b"a", b"echo")
    link.room[b"a"] = 0
    outbox.send_if_idle(b"a", b"echo")
    outbox.send(b"a", b"status")
    outbox.send_if_idle(b"a", b"echo")
    link.room[b"a"] = 9
    outbox.flush()
    assert link.sent[b"a"] == [b"echo", b"status"]
    assert outbox.dropped_frames == 2


def test_echoes_that_nobody_reads_are_bounded_whoever_asks(link, outbox):
    size, most = 1 << 20, MAX_ECHO_BYTES >> 20
    for number in range(3 * most):
        link.room[b"%d" % number] = 1
        outbox.send_if_idle(b"%d" % number, number.to_bytes(4) + bytes(size - 4))
    assert sum(len(frames) for frames in link.sent.values()) == most
    assert outbox.dropped_frames == 2 * most
    link.lent.clear()  # they have left
    outbox.send_if_idle(b"1000", b"echo")
    assert link.sent[b"1000"] == [b"echo"]


def test_a_peer_that_stands_still_with_whole_shards_holds_up_no_other(link):
    def make(shard):
        frame = bytearray(b"%d" % shard)
        link.lent.append(frame)  # whoever does not read keeps it
        return 7, (frame,)

    link.lent = []
    link.is_lent = lambda frame: any(frame is lent for lent in link.lent)
    outbox = Outbox(link, make)
    link.room[b"slow"] = link.room[b"fast"] = 9
    outbox.send_full(b"slow", (0, 1))
    outbox.send_full(b"fast", (0, 1))
    link.lent = link.lent[:1]
    outbox.flush()
    assert len(link.sent[b"slow"]) == 1
    assert len(link.sent[b"fast"]) == 2


def test_a_slow_peer_that_always_has_something_waiting_gets_its_whole_shards_too(link, outbox):
    link.room[b"a"] = 0
    outbox.send_weights(b"a", 7, news(b"1"))
    outbox.send_full(b"a", [1, 2])
    for turn in range(40):
        outbox.send(b"a", b"status %d" % turn)  # so much comes as can go
        outbox.send_weights(b"a", 7, news(b"1"))
        link.room[b"a"] = 1
        outbox.flush()
    sent = link.sent[b"a"]
    assert outbox.waiting
    assert [frame for frame in sent if frame in {b"1.0", b"1.1", b"2.0", b"2.1"}] == [
        *(b"1.0", b"1.1"),
        *(b"2.0", b"2.1"),
    ]
