from __future__ import annotations

from collections import defaultdict

import pytest

from psq.link import Sent
from psq_server.outbox import MAX_CONTROL, Outbox


class Link:
    """Takes `room` frames for each peer; peers in `gone` do not exist."""

    def __init__(self):
        self.room = defaultdict(lambda: 2)
        self.gone = set()
        self.sent = defaultdict(list)

    def send(self, peer, frame):
        if peer in self.gone:
            return Sent.GONE
        if not self.room[peer]:
            return Sent.FULL
        self.room[peer] -= 1
        self.sent[peer].append(frame)
        return Sent.QUEUED


@pytest.fixture
def link():
    return Link()


@pytest.fixture
def outbox(link):
    return Outbox(link)


def test_what_there_is_room_for_goes_at_once(link, outbox):
    outbox.send(b"a", b"1")
    assert link.sent[b"a"] == [b"1"]
    assert not outbox.waiting


def test_what_there_is_no_room_for_goes_later_and_in_order(link, outbox):
    outbox.send_weights(b"a", 1, (b"1", b"2", b"3", b"4"))
    outbox.send(b"a", b"5")
    assert outbox.waiting
    link.room[b"a"] = 9
    outbox.flush()
    assert link.sent[b"a"] == [b"1", b"2", b"3", b"4", b"5"]
    assert not outbox.waiting


def test_a_full_peer_holds_up_no_other(link, outbox):
    link.room[b"slow"] = 0
    for peer in (b"slow", b"fast"):
        assert outbox.send_weights(peer, 1, (b"1", b"2"))
    assert link.sent == {b"fast": [b"1", b"2"]}


def test_weights_still_waiting_when_newer_ones_come_are_dropped_with_them(link, outbox):
    link.room[b"a"] = 1
    outbox.send_weights(b"a", 1, (b"1", b"2", b"3"))
    outbox.send(b"a", b"control")
    assert not outbox.send_weights(b"a", 2, (b"4", b"5"))
    assert outbox.dropped_frames == 4
    link.room[b"a"] = 9
    outbox.flush()
    assert link.sent[b"a"] == [b"1", b"control"]


def test_after_a_drop_the_peer_may_be_sent_weights_again(link, outbox):
    link.room[b"a"] = 0
    outbox.send_weights(b"a", 1, (b"1",))
    outbox.send_weights(b"a", 2, (b"2",))
    assert outbox.send_weights(b"a", 2, (b"full",))
    link.room[b"a"] = 9
    outbox.flush()
    assert link.sent[b"a"] == [b"full"]


def test_asking_twice_for_the_same_frames_queues_them_once(link, outbox):
    frames = (b"1", b"2")
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
    outbox.send_weights(b"a", 1, (b"1", b"2", b"3"))
    assert outbox.gone == [b"a", b"a"]
    assert not outbox.waiting


def test_a_peer_that_goes_while_frames_wait_is_reported(link, outbox):
    link.room[b"a"] = 1
    outbox.send_weights(b"a", 1, (b"1", b"2"))
    link.gone.add(b"a")
    outbox.flush()
    assert outbox.gone == [b"a"]
    assert not outbox.waiting
