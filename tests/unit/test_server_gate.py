"""The gate: what is written before what, and what waits for the disk."""

import pytest

from psq.plan import Plan
from psq.presets import preset
from psq_server.gate import (
    MAX_HELD_OF_A_PEER,
    MAX_HELD_OF_STRANGERS,
    Append,
    Gate,
    Keep,
    RecordKind,
    Sync,
)
from psq_server.state import (
    Adopt,
    Broadcast,
    Changed,
    Checkpoint,
    Committed,
    Echo,
    Judge,
    Log,
    Pushed,
    Reduce,
    Save,
    Send,
    SendFull,
    Started,
    Stop,
)

PLAN = Plan.of([("x", (10,))], preset("server-adam"), 2)
SAID = (Pushed(0, memoryview(b"zero"), 5), Pushed(1, memoryview(b"one"), 5, 2, 1))
REDUCE = Reduce(3, 0, SAID, 0.5)
HELLO, VERDICT, WEIGHTS = Send(b"a", b"cookie"), Send(b"a", b"verdict"), Broadcast((), 4, (), ())
STATUS = Send(b"a", b"status", early=True)


def changes(committed):
    return {"version": 4, "committed": committed}


def gate(level="journal", *, whole=False, version=3):
    return Gate(level, whole=whole, version=version)


def admitted(made, *actions):
    return made.admit(actions, changes)


def test_without_a_disk_everything_passes():
    made = gate("off")
    actions = [REDUCE, VERDICT, Committed(4, ()), WEIGHTS]
    assert made.admit(actions, changes) == actions
    assert not made.is_busy


def test_what_a_shard_is_made_of_is_written_before_it_is_reduced():
    record, action = admitted(gate(), REDUCE)
    assert action is REDUCE
    assert record.kind is RecordKind.SHARD
    assert record.meta == {
        "round": 3,
        "shard": 0,
        "rate": 0.5,
        "said": [[0, 5, 1, 0], [1, 5, 2, 1]],
    }
    assert [bytes(buffer) for buffer in record.buffers] == [b"zero", b"one"]


def test_payloads_of_a_judged_round_are_written_once():
    made = gate(whole=True)
    record, _ = admitted(made, Judge(3, {0: SAID}, 0.5))
    assert (record.kind, len(record.buffers)) == (RecordKind.JUDGE, 2)
    record, _ = admitted(made, REDUCE)
    assert (record.kind, record.buffers) == (RecordKind.SHARD, ())
    assert record.meta["said"] == [[0, 5, 1, 0], [1, 5, 2, 1]]


def test_a_verdict_waits_for_its_round_also_where_it_is_said_before_the_commit():
    made = gate()
    steps = admitted(made, VERDICT, Log("line"), Committed(4, (0,)), WEIGHTS)
    kinds = [type(step) for step in steps]
    assert kinds == [Append, Log, Sync, Committed]
    assert steps[0].kind is RecordKind.ROUND
    assert steps[0].meta == {"version": 4, "committed": True}
    assert (made.held, made.in_flight, made.durable_version) == (2, 1, 3)
    assert made.done(steps[2].ticket) == [VERDICT, WEIGHTS]
    assert (made.held, made.in_flight, made.durable_version) == (0, 0, 4)
    assert not made.is_busy


def test_single_shards_leave_before_their_round_where_that_is_safe():
    made = gate(whole=False)
    admitted(made, REDUCE)
    assert admitted(made, WEIGHTS) == [WEIGHTS]


def test_nothing_leaves_from_the_first_shard_on_where_it_is_not():
    made = gate(whole=True)
    admitted(made, REDUCE)
    assert made.is_busy
    assert admitted(made, WEIGHTS, HELLO) == []
    _, sync, _ = admitted(made, Committed(4, ()))
    assert admitted(made, VERDICT) == []
    assert made.done(sync.ticket) == [WEIGHTS, HELLO, VERDICT]


def test_what_needs_no_disk_still_keeps_its_place_behind_what_does():
    made = gate()
    admitted(made, VERDICT, Committed(4, ()))
    assert admitted(made, HELLO) == []
    assert made.done(1) == [VERDICT, HELLO]


def test_a_status_overtakes_what_waits():
    made = gate()
    admitted(made, VERDICT, Committed(4, ()))
    assert admitted(made, STATUS) == [STATUS]


def test_answers_in_another_order_let_nothing_out_too_soon():
    made = gate()
    admitted(made, VERDICT, Committed(4, ()))
    admitted(made, WEIGHTS, Committed(5, ()))
    assert made.done(2) == []
    assert made.durable_version == 3
    assert made.done(1) == [VERDICT, WEIGHTS]
    assert made.durable_version == 5


def test_a_round_after_the_commit_waits_for_its_own_ticket():
    made = gate(whole=True)
    admitted(made, REDUCE)
    steps = admitted(made, VERDICT, Committed(4, ()), Reduce(4, 0, SAID, 0.5), WEIGHTS)
    assert [step.kind for step in steps if isinstance(step, Append)] == [
        RecordKind.ROUND,
        RecordKind.SHARD,
    ]
    assert made.done(1) == [VERDICT]
    admitted(made, Committed(5, ()))
    assert made.done(2) == [WEIGHTS]


def test_a_change_of_the_ranks_is_written_and_waited_for():
    made = gate()
    record, sync = admitted(made, Changed(), HELLO)
    assert (record.kind, record.meta["committed"]) == (RecordKind.CHANGE, False)
    assert made.done(sync.ticket) == [HELLO]


def test_a_commit_says_of_the_ranks_what_a_change_would():
    steps = admitted(gate(), Changed(), Committed(4, ()))
    assert [step.kind for step in steps if isinstance(step, Append)] == [RecordKind.ROUND]


@pytest.mark.parametrize("level", ["journal", "checkpoint"])
def test_nothing_leaves_before_the_initial_weights_are_kept(level):
    made = Gate()
    admitted(made, Adopt(PLAN, level))
    assert admitted(made, Changed(), HELLO) == [HELLO]
    (keep,) = admitted(made, Started(), WEIGHTS)
    assert keep == Keep(0, 1)
    assert made.durable_version == -1
    assert made.done(1) == [WEIGHTS]
    assert made.durable_version == 0


def test_with_checkpoints_alone_only_the_ends_wait():
    made = gate("checkpoint")
    actions = [REDUCE, VERDICT, Committed(4, ()), Checkpoint(4), WEIGHTS]
    assert admitted(made, *actions) == [REDUCE, VERDICT, Committed(4, ()), Keep(4), WEIGHTS]
    stop = Stop(0, "stopped", "told so")
    steps = admitted(made, HELLO, Checkpoint(4, last=True), Save(4), VERDICT, stop)
    assert steps == [HELLO, Keep(4, 1)]
    assert made.holds_stop
    assert made.done(1) == [Save(4), VERDICT, stop]
    assert not made.holds_stop


def test_a_checkpoint_that_nobody_waits_for_holds_up_nobody():
    made = gate()
    steps = admitted(made, VERDICT, Committed(4, ()), Checkpoint(4))
    assert steps[-1] == Keep(4)
    assert made.done(1) == [VERDICT]
    assert not made.is_busy


@pytest.mark.parametrize("whole", [False, True])
def test_an_echo_is_never_held_so_that_strangers_cannot_fill_a_server_whose_disk_refuses(whole):
    made = gate(whole=whole)
    admitted(made, REDUCE, VERDICT, Committed(4, ()))
    held = made.held
    assert made.waiting
    echoes = [Echo(b"stranger", bytes(1 << 20))] * 3
    assert admitted(made, *echoes) == echoes
    assert admitted(made, HELLO) == []
    assert made.held == held + 1


def blocked():
    """A gate whose disk does not answer."""
    made = gate()
    admitted(made, VERDICT, Committed(4, ()))
    return made


def count(made, actions):
    """How many of these are held."""
    before = made.held
    assert admitted(made, *actions) == []
    return made.held - before


def test_strangers_have_a_room_together_whatever_they_call_themselves():
    made = blocked()
    flood = [Send(b"%d" % n, b"error", stranger=True) for n in range(2 * MAX_HELD_OF_STRANGERS)]
    assert count(made, flood) == MAX_HELD_OF_STRANGERS
    assert made.dropped == MAX_HELD_OF_STRANGERS
    assert count(made, [Send(b"rank", b"verdict")]) == 1


def test_what_one_rank_asks_for_again_and_again_takes_its_own_room():
    made = blocked()
    pulls = [SendFull((b"b",), {0: 4})] * 30 + [Send(b"b", b"again")] * MAX_HELD_OF_A_PEER
    assert count(made, pulls) == MAX_HELD_OF_A_PEER
    assert count(made, [Send(b"c", b"verdict"), SendFull((b"b", b"c"), {0: 4})]) == 2


def test_one_that_joins_under_ever_new_names_has_a_bound_too(monkeypatch):
    monkeypatch.setattr("psq_server.gate.MAX_HELD_ANSWERS", 100)
    made = blocked()
    assert count(made, [Send(b"%d" % n, b"welcome") for n in range(300)]) == 99
    assert made.dropped == 201


def test_rounds_and_the_end_are_held_whatever_is_full(monkeypatch):
    monkeypatch.setattr("psq_server.gate.MAX_HELD_ANSWERS", 1)
    made = blocked()
    assert count(made, [WEIGHTS, Save(4), Stop(0, "stopped", "told so")]) == 3


def test_there_is_room_again_when_the_disk_has_answered():
    made = blocked()
    flood = [Send(b"x", b"error", stranger=True)] * (2 * MAX_HELD_OF_STRANGERS)
    count(made, flood)
    assert len(made.done(1)) == 1 + MAX_HELD_OF_STRANGERS
    admitted(made, VERDICT, Committed(5, ()))
    assert count(made, flood) == MAX_HELD_OF_STRANGERS
