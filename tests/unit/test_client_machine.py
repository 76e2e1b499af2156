"""A worker's machine against a session that says what the test wants it to hear."""

import dataclasses
import math
import random

import numpy as np
import pytest

from psq.client.farewell import ALONE_S
from psq.client.hooks import Hooks
from psq.client.identity import Identity
from psq.client.initial import INITIAL_WINDOW
from psq.client.machine import Machine
from psq.client.round import merge
from psq.codec import get_codec
from psq.errors import (
    ConfigError,
    FencedError,
    GaveUpError,
    RefusedError,
    RemotePayloadError,
    RemotePlanError,
    RemoteProtocolError,
    UsageError,
)
from psq.layout import PART_NUMEL
from psq.plan import Plan
from psq.presets import preset
from psq_proto.frames import Header, decode_control, decode_frame, encode_frame
from psq_proto.messages import (
    NO_VERSION,
    NONE,
    Bye,
    Error,
    ErrorCode,
    Fenced,
    Flags,
    Leave,
    MessageType,
    Status,
    Verdict,
    Welcome,
)
from psq_proto.session import ServerSession

NUMEL = 600
PLAN = Plan.of([("w", (NUMEL,))], preset("server-adam"), 2)
THREE = Plan.of(  # an fp32 uplink keeps shards at one part of f32
    [(f"w{index}", (PART_NUMEL,)) for index in range(3)],
    preset("server-adam").with_codecs(uplink="fp32"),
    2,
)
LATE = Plan.of([("w", (NUMEL,))], preset("server-adam"), 2, consistency="ssp:4")
WELCOME = Welcome(
    mode="continue",
    last_applied=-1,
    lease_s=10.0,
    init_wanted=False,
    world_size=2,
    has_weights=True,
)


class Talk:
    """A machine, and a server's session that answers by hand."""

    def __init__(self, rank: int = 1, plan: Plan = PLAN) -> None:
        self.plan = plan
        self.calls: list[str] = []
        hooks = Hooks(
            initial=lambda _: np.ones(NUMEL, np.float32),
            weights=lambda header, _: self.calls.append(f"weights {header.version}"),
            restore=lambda shard: self.calls.append(f"restore {shard}"),
            reset=lambda shards: self.calls.append(f"reset {list(shards)}"),
        )
        self.machine = Machine(
            plan,
            rank,
            hooks,
            heartbeat_s=1.0,
            rng=random.Random(0),  # noqa: S311 - a test
            is_lent=lambda _: False,
        )
        self.server = ServerSession(run_id=b"r" * 16, epoch=1)
        self.now_s = 0.0
        self.sent: list[MessageType] = []

    def flush(self) -> list[MessageType]:
        """Let the machine send all it wants to; returns what it was."""
        self.sent = []
        while (frame := self.machine.next_frame(self.now_s)) is not None:
            message = self.server.receive(bytes(frame))
            self.sent.append(message.header.type)
            self.machine.sent(self.now_s)
        return self.sent

    def say(self, kind: MessageType, body, **fields) -> None:
        self.hear(self.server.send(kind, body, **fields))

    def hear(self, frame) -> None:
        self.machine.receive(memoryview(bytes(frame)), self.now_s)

    def welcome(self, version: int = 0, **changes) -> None:
        """HELLO to WELCOME."""
        self.flush()
        self.hear(self.server.send_cookie(1 + self.server.incarnation))
        self.flush()
        self.say(MessageType.WELCOME, dataclasses.replace(WELCOME, **changes), version=version)

    def weights(self, version: int, shard: int = 0) -> None:
        header = self.header(version, shard, get_codec("fp32").wire_id, Flags.FULL)
        self.hear(encode_frame(header, bytes(4 * self.plan.layout.shards[shard].numel)))

    def delta(self, version: int, shard: int = 0) -> None:
        codec = get_codec(self.plan.recipe.downlink.codec)
        header = self.header(version, shard, codec.wire_id, Flags.DELTA)
        self.hear(encode_frame(header, bytes(codec.nbytes(self.plan.layout.shards[shard].numel))))

    def header(self, version: int, shard: int, codec: int, flags: Flags) -> Header:
        return Header(
            MessageType.WEIGHTS,
            run_id=self.server.run_id,
            epoch=self.server.epoch,
            plan=self.plan.digest,
            codec=codec,
            flags=flags,
            version=version,
            shard=shard,
        )

    def join(self, version: int = 0) -> "Talk":
        self.welcome()
        self.flush()
        self.say(MessageType.STATUS, Status(version, version))
        for shard in self.plan.owned:
            self.weights(version, shard.index)
        return self

    def verdict(self, version: int, verdict: Verdict, seq: int = 0) -> None:
        self.say(MessageType.VERDICT, verdict, seq=seq, version=version)

    def push(self) -> "Talk":
        self.machine.begin(0.1)
        for shard in self.plan.owned:
            self.machine.push(shard.index)
        assert MessageType.PUSH in self.flush()
        return self

    def beat(self) -> None:
        """A second passes; a heartbeat goes out."""
        self.now_s += 1.0
        assert self.flush()[-1] is MessageType.HEARTBEAT


def test_joining_says_hello_then_plan_and_join_then_pulls_and_beats():
    talk = Talk()
    assert talk.flush() == [MessageType.HELLO]
    talk.hear(talk.server.send_cookie(1))
    assert talk.flush() == [MessageType.PLAN, MessageType.JOIN]
    assert talk.server.plan == PLAN.digest
    talk.say(MessageType.WELCOME, WELCOME)
    assert talk.flush() == [MessageType.PULL, MessageType.HEARTBEAT]


def test_a_server_without_weights_gets_them_before_anything_else():
    talk = Talk(rank=0)
    talk.welcome(init_wanted=True, has_weights=False)
    assert talk.flush() == [MessageType.INIT, MessageType.PULL, MessageType.HEARTBEAT]


def test_initial_weights_wait_while_the_link_still_reads_the_ones_before():
    """A link slower than memory would else hold the whole model a second time."""
    parts = 3 * INITIAL_WINDOW
    plan = Plan.of([(f"w{i}", (1 << 18,)) for i in range(parts)], preset("fp32"), 2)
    talk = Talk(rank=0, plan=plan)
    sizes = [shard.numel for shard in plan.layout.shards]
    talk.machine._initial._values = lambda shard: np.ones(sizes[shard], np.float32)
    lent: list[bytearray] = []
    talk.machine._initial._is_lent = lambda frame: any(frame is each for each in lent)
    taken = talk.machine.sent

    def lend(now_s: float) -> None:
        lent.extend(frame for frame in talk.machine._outbox if len(frame) > 1 << 20)
        taken(now_s)

    talk.machine.sent = lend
    talk.welcome(init_wanted=True, has_weights=False)
    assert talk.flush() == [*[MessageType.INIT] * INITIAL_WINDOW, MessageType.HEARTBEAT]
    assert talk.flush() == []
    assert talk.machine.due_s > talk.now_s
    seen = INITIAL_WINDOW
    while seen < parts:
        lent.pop(0)
        assert talk.flush() == [MessageType.INIT]
        seen += 1
    assert talk.flush() == []
    lent.clear()
    assert talk.flush() == [MessageType.PULL]


def test_hello_is_repeated_with_its_nonce_until_it_is_answered():
    talk = Talk()
    nonces = set()
    for _ in range(4):
        assert talk.flush() == [MessageType.HELLO]
        assert talk.flush() == []
        nonces.add(talk.server.hello.nonce)
        assert 0.0 < talk.machine.due_s - talk.now_s < 6.25
        talk.now_s = talk.machine.due_s
    assert len(nonces) == 1


def test_a_lost_welcome_begins_the_join_again():
    talk = Talk()
    talk.flush()
    talk.hear(talk.server.send_cookie(1))
    talk.flush()
    talk.now_s = talk.machine.due_s
    assert talk.flush() == [MessageType.HELLO]


def test_a_heartbeat_follows_every_second():
    talk = Talk().join()
    for _ in range(3):
        talk.beat()
        assert talk.flush() == []


def test_that_a_worker_is_held_is_said_at_once_and_that_it_is_not_any_more():
    talk = Talk().join()
    talk.beat()
    said = []
    for is_held in (True, True, False):
        talk.machine.hold(is_held)
        frame = talk.machine.next_frame(talk.now_s)
        if frame is not None:
            said.append(decode_control(decode_frame(bytes(frame))).held)
            talk.flush()
    assert said == [True, False]


def test_a_rank_outside_the_plan_is_refused_at_once():
    with pytest.raises(ConfigError, match=r"rank: expected 0\.\.1, got 2"):
        Talk(rank=2)


def test_a_round_needs_weights_and_a_beginning():
    talk = Talk()
    with pytest.raises(UsageError, match="after join"):
        talk.machine.begin(0.1)
    talk.join()
    with pytest.raises(UsageError, match="begin one first"):
        talk.machine.push(0)
    talk.machine.begin(0.1)
    with pytest.raises(UsageError, match="the round before has ended"):
        talk.machine.begin(0.1)


def test_a_round_is_over_with_its_verdict_and_its_weights():
    talk = Talk().join(version=4).push()
    assert not talk.machine.settled
    talk.verdict(5, Verdict("applied", server_s=0.25), seq=4)
    assert not talk.machine.settled
    talk.weights(5)
    assert talk.machine.settled
    result = merge([talk.machine.end_round()], talk.machine.replica.version)
    assert (result.applied, result.version, result.server_s) == (True, 5, 0.25)


def test_only_a_status_newer_than_the_push_makes_it_send_again():
    talk = Talk().join()
    talk.beat()  # answered after the push, by a server that had not seen it
    talk.push()
    talk.say(MessageType.STATUS, Status(0, 0, missing=(0,)))
    assert talk.flush() == []
    talk.beat()
    talk.say(MessageType.STATUS, Status(0, 0, missing=(0,)))
    assert talk.flush() == [MessageType.PUSH]
    assert talk.machine.resent_frames == 1


def test_what_is_sent_again_is_the_same_bytes():
    talk = Talk().join()
    talk.machine.begin(0.1)
    talk.machine.frames.payload(0)[:] = np.arange(talk.machine.frames.said(0).size) % 251
    talk.machine.push(0)
    first = bytes(talk.machine.next_frame(talk.now_s))
    talk.flush()
    talk.beat()
    talk.say(MessageType.STATUS, Status(0, 0, missing=(0,)))
    assert bytes(talk.machine.next_frame(talk.now_s)) == first


def test_a_skip_that_was_lost_is_said_again():
    talk = Talk().join()
    talk.machine.begin(0.1)
    talk.machine.skip()
    talk.flush()
    talk.beat()
    talk.say(MessageType.STATUS, Status(0, 0, missing=(0,)))
    assert talk.flush() == [MessageType.PUSH]


def test_weights_that_do_not_come_are_pulled():
    talk = Talk().join().push()
    talk.verdict(1, Verdict("applied"))
    talk.beat()
    talk.say(MessageType.STATUS, Status(1, 1))
    assert talk.flush() == [MessageType.PULL]


def test_first_weights_that_do_not_come_are_pulled_again():
    talk = Talk()
    talk.welcome()
    assert MessageType.PULL in talk.flush()
    for _ in range(2):  # the first may be older than the answer to PULL
        talk.beat()
        talk.say(MessageType.STATUS, Status(0, 0))
    assert MessageType.PULL in talk.flush()


def test_a_lost_verdict_is_asked_for_by_saying_one_shard_again():
    talk = Talk(plan=THREE).join().push()
    for shard in range(3):
        talk.delta(1, shard)
    talk.beat()
    talk.say(MessageType.STATUS, Status(1, 1, missing=(0, 1, 2), resolved=0))
    assert not talk.machine.settled
    assert talk.flush() == [MessageType.PUSH]
    talk.verdict(1, Verdict("applied", "shard 2 is odd", rejected=(2,)))
    assert talk.machine.settled
    assert talk.machine.end_round().rejected() == [2]
    assert talk.machine.resent_frames == 1


def test_a_lost_verdict_on_a_skip_is_asked_for_with_the_skip():
    talk = Talk(plan=THREE).join()
    talk.machine.begin(0.1)
    talk.machine.skip()
    assert talk.flush() == [MessageType.PUSH]
    talk.beat()
    talk.say(MessageType.STATUS, Status(1, 1, resolved=0))
    assert talk.flush() == [MessageType.PUSH, MessageType.PULL]


def test_what_a_status_knows_of_a_round_that_it_is_older_than_is_ignored():
    talk = Talk().join(version=4)
    talk.beat()
    talk.machine.begin(0.1)
    talk.say(MessageType.STATUS, Status(3, 3, missing=(0,)))  # answers from before the round
    talk.machine.push(0)
    assert talk.flush() == [MessageType.PUSH]
    assert talk.machine.resent_frames == 0


def test_a_server_that_has_resolved_what_was_never_said_is_named():
    talk = Talk().join().push()
    talk.beat()
    with pytest.raises(RemoteProtocolError, match="has resolved 5 of this rank, this worker is at"):
        talk.say(MessageType.STATUS, Status(9, 9, resolved=5))


def test_a_server_at_an_older_round_ends_the_worker_with_both_rounds_named():
    talk = Talk().join(version=7).push()
    talk.beat()
    with pytest.raises(RemoteProtocolError, match=r"server is at round 3 .* is at round 7"):
        talk.say(MessageType.STATUS, Status(3, 3))


def test_a_connection_without_a_join_is_joined_again_with_the_push_pending():
    talk = Talk().join().push()
    talk.server = ServerSession(run_id=b"r" * 16, epoch=1)  # another connection: it knows nobody
    talk.now_s += 1.0
    frame = talk.machine.next_frame(talk.now_s)
    talk.machine.sent(talk.now_s)
    with pytest.raises(RemoteProtocolError) as stale:
        talk.server.receive(bytes(frame))
    talk.hear(talk.server.answer(stale.value))
    assert not talk.machine.joined
    assert talk.flush() == [MessageType.HELLO]
    talk.hear(talk.server.send_cookie(9))
    assert talk.flush() == [MessageType.PLAN, MessageType.JOIN]
    assert talk.server.join.pending == 0
    talk.say(MessageType.WELCOME, dataclasses.replace(WELCOME, last_applied=0))
    talk.weights(1)
    assert not talk.machine.settled  # that it was applied does not say which shards counted
    assert talk.flush() == [MessageType.PULL, MessageType.HEARTBEAT]
    talk.say(MessageType.STATUS, Status(1, 1, resolved=0))
    assert talk.flush() == [MessageType.PUSH]
    talk.verdict(1, Verdict("applied"))
    assert talk.machine.settled


def test_a_server_that_came_back_as_another_run_is_named():
    talk = Talk().join().push()
    old = talk.server
    talk.server = ServerSession(run_id=b"s" * 16, epoch=1)
    talk.now_s += 1.0
    frame = talk.machine.next_frame(talk.now_s)
    talk.machine.sent(talk.now_s)
    with pytest.raises(RemoteProtocolError) as stale:
        talk.server.receive(bytes(frame))
    talk.hear(talk.server.answer(stale.value))
    talk.flush()
    with pytest.raises(RemoteProtocolError, match="came back without its state; start the job"):
        talk.hear(talk.server.send_cookie(2))
    assert old.joined


def test_a_reset_forgets_the_residual_of_a_worker_that_has_one():
    talk = Talk()
    talk.welcome(mode="reset")
    assert talk.calls == []  # it is new: there is nothing to forget
    talk = Talk().join().push()
    talk.verdict(1, Verdict("applied"))
    talk.weights(1)
    talk.machine.end_round()
    frame = ServerSession(run_id=b"r" * 16, epoch=1).answer(stale_of(talk))
    talk.hear(frame)
    talk.server = ServerSession(run_id=b"r" * 16, epoch=1)
    talk.server.incarnation = 5
    talk.welcome(version=1, mode="reset")
    assert talk.calls[-1] == "reset [0]"
    assert talk.machine.resets == 1


def stale_of(talk: Talk) -> RemoteProtocolError:
    """What a server that does not know this connection would raise."""
    stranger = ServerSession(run_id=b"r" * 16, epoch=1)
    talk.now_s += 1.0
    frame = bytes(talk.machine.next_frame(talk.now_s))
    talk.machine.sent(talk.now_s)
    with pytest.raises(RemoteProtocolError) as stale:
        stranger.receive(frame)
    return stale.value


def test_refused_shards_are_restored_once_when_the_round_ends():
    talk = Talk(plan=THREE).join().push()
    talk.verdict(1, Verdict("applied", "shard 1: a scale is NaN", rejected=(1,)))
    talk.verdict(1, Verdict("applied"))  # repeated, or forged: the first counts
    for shard in range(3):
        talk.delta(1, shard)
    assert "restore 1" not in talk.calls  # its payload may have to be said again until then
    ended = talk.machine.end_round()
    assert [call for call in talk.calls if call.startswith("restore")] == ["restore 1"]
    assert (ended.counts, ended.rejected()) == (True, [1])
    assert any("shard 1 rejected: shard 1: a scale is NaN" in note for note in talk.machine.notes)


def test_of_a_rejected_contribution_every_pushed_shard_is_restored_also_those_said_later():
    talk = Talk(plan=THREE).join()
    talk.machine.begin(0.1)
    talk.machine.push(0)
    talk.flush()
    talk.verdict(3, Verdict("rejected", "too stale"))
    talk.machine.push(1)
    talk.machine.skip(2)
    assert talk.flush() == []  # nobody takes them any more
    for shard in range(3):
        talk.weights(3, shard)
    assert talk.machine.settled
    ended = talk.machine.end_round()
    assert (ended.counts, ended.rejected(), ended.reason) == (False, [0, 1], "too stale")
    assert [call for call in talk.calls if call.startswith("restore")] == ["restore 0", "restore 1"]


def test_a_rejected_skip_leaves_nothing_to_restore():
    talk = Talk().join()
    talk.machine.begin(0.1)
    talk.machine.skip()
    talk.flush()
    talk.verdict(2, Verdict("rejected", "closed without it"))
    talk.weights(2)
    assert talk.machine.end_round().rejected() == []


def test_a_round_ends_at_the_version_that_its_verdict_names():
    talk = Talk(plan=LATE).join().push()
    talk.verdict(3, Verdict("applied"))  # the server was two rounds ahead of this worker
    for version in (1, 2):
        talk.delta(version)
        assert not talk.machine.settled
    talk.delta(3)
    assert talk.machine.settled


def test_a_delta_that_was_lost_is_noticed_and_the_weights_are_pulled_once():
    talk = Talk(plan=LATE).join().push()
    talk.delta(2)
    assert talk.flush() == [MessageType.PULL]
    talk.delta(3)
    assert talk.flush() == []
    talk.verdict(1, Verdict("applied"))
    assert not talk.machine.settled
    talk.weights(3)
    talk.delta(5)
    assert talk.machine.settled
    assert talk.flush() == [MessageType.PULL]  # another gap
    assert [call for call in talk.calls if call.startswith("weights")] == ["weights 0", "weights 3"]


def test_a_skip_beside_pushes_names_its_shards_because_a_push_may_be_lost():
    talk = Talk(plan=THREE).join()
    talk.machine.begin(0.1)
    talk.machine.push(1)
    talk.machine.skip()
    frames = []
    while (frame := talk.machine.next_frame(talk.now_s)) is not None:
        frames.append(decode_frame(bytes(frame)).header)
        talk.machine.sent(talk.now_s)
    assert [(header.shard, header.flags) for header in frames] == [
        (1, Flags.NONE),
        (0, Flags.SKIP),
        (2, Flags.SKIP),
    ]


def test_of_what_is_missing_only_what_was_said_is_said_again():
    talk = Talk(plan=THREE).join()
    talk.machine.begin(0.1)
    talk.machine.push(0)
    talk.machine.skip(1)
    talk.flush()
    talk.beat()
    talk.say(MessageType.STATUS, Status(0, 0, missing=(0, 1, 2)))
    assert talk.flush() == [MessageType.PUSH, MessageType.PUSH]
    assert talk.machine.resent_frames == 2


def test_a_shard_is_said_once_and_none_is_forgotten():
    talk = Talk(plan=THREE).join()
    talk.machine.begin(0.1)
    talk.machine.push(0)
    with pytest.raises(UsageError, match="shard 0 was pushed or skipped already"):
        talk.machine.skip(0)
    with pytest.raises(UsageError, match="shards 1, 2 of this step neither pushed nor skipped"):
        talk.machine.check_said()
    talk.machine.skip()
    talk.machine.check_said()


def test_copies_of_an_old_rounds_pushes_are_not_sent_and_other_frames_are():
    talk = Talk().join().push()
    talk.beat()
    talk.say(MessageType.STATUS, Status(0, 0, missing=(0,)))  # queues the push again
    talk.verdict(1, Verdict("applied"))
    talk.weights(1)
    talk.machine.end_round()
    talk.machine.begin(0.1)
    talk.now_s += 1.0
    assert talk.flush() == [MessageType.HEARTBEAT]


@pytest.mark.parametrize(
    ("code", "fatal", "kind"),
    [
        (ErrorCode.PAYLOAD, False, RemotePayloadError),
        (ErrorCode.PROTOCOL, False, RemoteProtocolError),
        (ErrorCode.PLAN, True, RemotePlanError),
        (ErrorCode.RANK, True, RefusedError),
    ],
)
def test_what_the_server_refuses_is_raised_with_its_words(code, fatal, kind):
    talk = Talk().join()
    with pytest.raises(kind, match="the reason given"):
        talk.say(MessageType.ERROR, Error(code, "the reason given", fatal))


def test_a_worker_whose_initial_weights_may_be_damaged_joins_again():
    talk = Talk(rank=0)
    talk.welcome(init_wanted=True, has_weights=False)
    assert MessageType.INIT in talk.flush()
    talk.say(MessageType.ERROR, Error(ErrorCode.WIRE, "checksum", fatal=False))
    assert talk.flush() == [MessageType.HELLO]


def test_a_goodbye_that_was_damaged_is_said_again():
    talk = Talk().join()
    talk.flush()
    talk.machine.leave(Leave("done"))
    assert MessageType.LEAVE in talk.flush()
    talk.say(MessageType.ERROR, Error(ErrorCode.WIRE, "checksum", fatal=False))
    talk.welcome()
    assert MessageType.LEAVE in talk.flush()
    assert not talk.machine.left


def test_a_goodbye_that_was_said_needs_no_answer_of_a_server_that_is_gone():
    talk = Talk().join()
    talk.machine.leave(Leave("done"))
    talk.flush()
    talk.say(MessageType.ERROR, Error(ErrorCode.WIRE, "checksum", fatal=False))
    assert talk.machine.next_frame(talk.now_s) is not None  # HELLO again, and there is nobody
    talk.machine.not_sent(talk.now_s)
    talk.machine.not_sent(talk.now_s + ALONE_S)
    assert talk.machine.left


def test_after_a_reset_the_residual_has_the_name_that_the_server_knows():
    talk = Talk().join().push()
    come_back(talk, version=0, epoch=1, mode="reset")
    assert talk.machine.identity().lineage == talk.server.fresh_lineage
    assert talk.calls[-1].startswith("reset")


def test_damaged_frames_are_counted_noted_and_dropped():
    talk = Talk().join()
    frame = bytearray(talk.server.send(MessageType.STATUS, Status(0, 0)))
    frame[-1] ^= 1
    talk.hear(frame)
    talk.say(MessageType.ERROR, Error(ErrorCode.WIRE, "checksum", fatal=False))
    assert talk.machine.damaged_frames == 2
    assert [note for note in talk.machine.notes if "damaged frame" in note]


def test_a_fenced_worker_says_so():
    talk = Talk().join()
    with pytest.raises(FencedError, match="rank 1"):
        talk.say(MessageType.FENCED, Fenced("a newer process"))


def test_the_servers_goodbye_ends_a_worker_that_is_at_work():
    talk = Talk().join().push()
    with pytest.raises(GaveUpError, match=r"ended the job \(stopped\): SIGTERM"):
        talk.say(MessageType.BYE, Bye("stopped", "SIGTERM"))
    assert talk.machine.next_frame(99.0) is None


def test_a_worker_has_left_when_something_sent_after_its_goodbye_is_answered():
    talk = Talk().join()
    talk.beat()
    talk.machine.leave(Leave("done"))
    assert talk.flush() == [MessageType.LEAVE, MessageType.HEARTBEAT]
    talk.say(MessageType.STATUS, Status(0, 0))  # answers the heartbeat before
    assert not talk.machine.left
    talk.say(MessageType.STATUS, Status(0, 0))
    assert talk.machine.left


def test_a_worker_has_left_when_the_server_says_goodbye_too():
    talk = Talk().join()
    talk.machine.leave(Leave("done"))
    talk.flush()
    talk.say(MessageType.BYE, Bye("done"))
    assert talk.machine.left
    assert talk.machine.due_s == math.inf  # a client of several servers waits for the others


def test_a_worker_has_left_when_the_server_is_gone_after_its_goodbye():
    talk = Talk().join()
    talk.machine.leave(Leave("done"))
    talk.flush()
    talk.now_s += 1.0
    assert talk.machine.next_frame(talk.now_s) is not None
    talk.machine.not_sent(talk.now_s)
    assert not talk.machine.left
    talk.now_s = talk.machine.due_s
    assert talk.machine.due_s == pytest.approx(1.0 + ALONE_S)
    talk.machine.not_sent(talk.now_s)
    assert talk.machine.left


def test_a_goodbye_lost_with_its_connection_is_said_again():
    talk = Talk().join()
    talk.machine.leave(Leave("done"))
    talk.flush()
    talk.hear(ServerSession(run_id=b"r" * 16, epoch=1).answer(stale_of(talk)))
    talk.server = ServerSession(run_id=b"r" * 16, epoch=1)
    talk.server.incarnation = 5
    talk.welcome()
    assert MessageType.LEAVE in talk.flush()


def test_the_wait_is_named_by_what_the_server_says():
    talk = Talk()
    assert talk.machine.waited_for() == ""
    talk.join()
    talk.say(MessageType.STATUS, Status(0, 0, waiting=((0, 3.2),), text="long words"))
    assert talk.machine.waited_for() == "rank 0 (not heard for 3.2 s)"
    talk.say(MessageType.STATUS, Status(0, 0, text="waiting for the first worker"))
    assert talk.machine.waited_for() == "waiting for the first worker"
    talk.machine.forget_status()
    assert talk.machine.waited_for() == ""


def test_a_buffer_that_is_still_being_read_is_replaced_not_written():
    lent: list[bytearray] = []
    talk = Talk()
    talk.machine.frames._is_lent = lambda frame: any(frame is each for each in lent)
    talk.join().push()
    frame = talk.machine.frames.to_seal(0)
    before = bytes(frame)
    lent.append(frame)
    talk.machine.frames.payload(0)[:] = 7
    assert bytes(frame) == before
    assert talk.machine.frames.to_seal(0) is not frame


def test_the_first_message_is_well_formed():
    frame = decode_frame(bytes(Talk().machine.next_frame(0.0)))
    assert decode_control(frame).software.startswith("psq ")


# ---- a server that comes back


def come_back(talk: Talk, version: int, epoch: int = 2, **changes) -> None:
    """The server is another process, in a later epoch, and at this version."""
    talk.hear(ServerSession(run_id=b"r" * 16, epoch=1).answer(stale_of(talk)))
    talk.server = ServerSession(run_id=b"r" * 16, epoch=epoch)
    talk.welcome(version=version, **changes)


def asked(talk: Talk) -> int:
    """The version that the next PULL says the worker has."""
    while (frame := talk.machine.next_frame(talk.now_s)) is not None:
        message = talk.server.receive(bytes(frame))
        talk.machine.sent(talk.now_s)
        if message.header.type is MessageType.PULL:
            return message.header.version
    pytest.fail("nothing was pulled")


def test_shards_of_a_round_that_never_happened_are_forgotten_and_taken_whole():
    talk = Talk(plan=THREE).join().push()
    talk.delta(1, shard=0)  # one shard of a round that was under way
    assert talk.machine.replica.versions == {0: 1, 1: 0, 2: 0}
    come_back(talk, version=0)
    assert talk.machine.replica.versions == {0: NONE, 1: 0, 2: 0}
    assert asked(talk) == NO_VERSION
    talk.weights(0, shard=0)
    assert talk.machine.replica.version == 0
    assert talk.machine.round is not None  # it is pending, and goes on
    assert any("above version 0" in note for note in talk.machine.notes)


def test_what_was_heard_to_be_committed_is_kept():
    talk = Talk(plan=THREE).join().push()
    for shard in (0, 1, 2):
        talk.delta(1, shard=shard)
    talk.verdict(1, Verdict("applied"))
    come_back(talk, version=1)
    assert talk.machine.replica.versions == {0: 1, 1: 1, 2: 1}
    assert asked(talk) == 1


def test_a_shard_of_a_round_that_may_have_been_made_again_is_taken_whole():
    talk = Talk(plan=THREE).join().push()
    talk.delta(1, shard=0)  # and then the server was lost, and came back, and made the round again
    come_back(talk, version=1)
    assert talk.machine.replica.versions == {0: NONE, 1: 0, 2: 0}
    assert asked(talk) == NO_VERSION


def test_joining_again_in_the_same_epoch_forgets_nothing():
    talk = Talk(plan=THREE).join().push()
    talk.delta(1, shard=0)
    come_back(talk, version=0, epoch=1)
    assert talk.machine.replica.versions == {0: 1, 1: 0, 2: 0}


def test_a_server_behind_what_it_committed_is_named_as_such():
    talk = Talk().join().push()
    talk.verdict(1, Verdict("applied"))
    talk.hear(ServerSession(run_id=b"r" * 16, epoch=1).answer(stale_of(talk)))
    talk.server = ServerSession(run_id=b"r" * 16, epoch=2)
    with pytest.raises(RemoteProtocolError, match=r"ROLLBACK: .* round 0, .* of round 1"):
        talk.welcome(version=0)


def test_weights_of_a_worker_that_goes_on_are_pulled_again_if_they_were_damaged_on_the_way():
    talk = Talk()
    talk.machine.offer(Identity(b"r" * 16, 7, resolved=3, version=4, versions={0: 4}, epoch=1))
    talk.welcome(6, last_applied=3)
    talk.machine.take_up()
    assert MessageType.PULL in talk.flush()
    talk.hear(b"damaged" * 20)
    for _ in range(2):
        talk.beat()
        talk.say(MessageType.STATUS, Status(6, 6, resolved=3))
    assert MessageType.PULL in talk.flush()
    talk.weights(6)
    assert talk.machine.ready


def test_who_computes_from_a_version_that_a_server_has_lost_stops_whatever_it_was_told():
    talk = Talk(plan=LATE).join()
    talk.weights(2)
    assert talk.machine.begin(0.1).number == 2
    with pytest.raises(RemoteProtocolError, match=r"ROLLBACK: .* from round 1 on\), .* round 2"):
        come_back(talk, 2, since=1)
