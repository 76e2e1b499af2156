"""Words about rejected rounds: the first, and then one in a hundred rounds with how many."""

from __future__ import annotations

from collections import deque

from psq.client.rejections import NOTE_ROUNDS, Rejections
from psq_proto.messages import Verdict


def test_a_worker_that_is_always_rejected_says_so_once_in_a_while_and_how_often():
    notes: deque[str] = deque()
    rejections = Rejections(notes)
    for number in range(2 * NOTE_ROUNDS + 1):
        rejections.note(number, [0], Verdict("rejected", "krum: far"))
    assert list(notes) == [
        "round 0 rejected: krum: far",
        "round 100 rejected: krum: far (100 times since this was said last, 101 in all)",
        "round 200 rejected: krum: far (100 times since this was said last, 201 in all)",
    ]


def test_shards_of_a_round_that_counts_otherwise_are_named():
    notes: deque[str] = deque()
    Rejections(notes).note(4, [1], Verdict("applied", "late", 0.0, (1,)))
    assert list(notes) == ["round 4: shard 1 rejected: late"]
