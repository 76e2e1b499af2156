"""A worker's machine against a session that says what the test wants it to hear."""

import dataclasses
import random

import numpy as np
import pytest

from psq.client.machine import ALONE_S, Hooks, Machine
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
from psq.plan import Plan
from psq.recipe import preset
from psq_proto.frames import Header, decode_control, decode_frame, encode_frame
from psq_proto.messages import (
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

PLAN = Plan.of([("w", (600,))], preset("server-adam"), 2)
NUMEL = 600
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

    def __init__(self, rank: int = 1) -> None:
        self.calls: list[str] = []
        hooks = Hooks(
            initial=lambda _: np.ones(NUMEL, np.float32),
            weights=lambda header, _: self.calls.append(f"weights {header.version}"),
            restore=lambda _: self.calls.append("restore"),
            reset=lambda _: self.calls.append("reset"),
        )
        self.machine = Machine(
            PLAN,
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

    def welcome(self, **changes) -> None:
        """HELLO to WELCOME."""
        self.flush()
        self.hear(self.server.send_cookie(1 + self.server.incarnation))
        self.flush()
        self.say(MessageType.WELCOME, dataclasses.replace(WELCOME, **changes))

    def weights(self, version: int) -> None:
        header = Header(
            MessageType.WEIGHTS,
            run_id=self.server.run_id,
            epoch=1,
            plan=PLAN.digest,
            codec=get_codec("fp32").wire_id,
            flags=Flags.FULL,
            version=version,
        )
        self.hear(encode_frame(header, bytes(4 * NUMEL)))

    def join(self, version: int = 0) -> "Talk":
        self.welcome()
        self.flush()
        self.say(MessageType.STATUS, Status(version, version))
        self.weights(version)
        return self

    def push(self) -> "Talk":
        self.machine.begin(0.1)
        self.machine.push(0)
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
    assert not talk.machine.round_over
    talk.say(MessageType.VERDICT, Verdict("applied", server_s=0.25), seq=4)
    assert not talk.machine.round_over
    talk.weights(5)
    assert talk.machine.round_over
    result = talk.machine.end_round()
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
    talk.say(MessageType.VERDICT, Verdict("applied"), seq=0)
    talk.beat()
    talk.say(MessageType.STATUS, Status(1, 1))
    assert talk.flush() == [MessageType.PULL]


def test_a_lost_verdict_is_known_from_the_next_round():
    talk = Talk().join().push()
    talk.weights(1)
    talk.beat()
    talk.say(MessageType.STATUS, Status(1, 1))
    assert talk.machine.round_over


def test_a_server_at_an_older_round_ends_the_worker_with_both_rounds_named():
    talk = Talk().join(version=7).push()
    talk.beat()
    with pytest.raises(RemoteProtocolError, match="server is at round 3, this worker at round 7"):
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
    assert talk.machine.round_over


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
    talk.say(MessageType.VERDICT, Verdict("applied"), seq=0)
    talk.weights(1)
    talk.machine.end_round()
    frame = ServerSession(run_id=b"r" * 16, epoch=1).answer(stale_of(talk))
    talk.hear(frame)
    talk.server = ServerSession(run_id=b"r" * 16, epoch=1)
    talk.server.incarnation = 5
    talk.welcome(mode="reset")
    assert talk.calls[-1] == "reset"
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


def test_a_rejected_push_is_restored_and_replaced_by_a_skip():
    talk = Talk().join().push()
    talk.say(MessageType.VERDICT, Verdict("rejected", "a scale is NaN"), seq=0)
    talk.say(MessageType.VERDICT, Verdict("rejected", "expected SKIP"), seq=0)
    assert talk.calls.count("restore") == 1
    assert talk.flush() == [MessageType.PUSH]
    talk.say(MessageType.VERDICT, Verdict("applied"), seq=0)
    talk.weights(1)
    result = talk.machine.end_round()
    assert (result.applied, result.reason) == (False, "a scale is NaN")


def test_a_rejected_skip_is_an_error():
    talk = Talk().join()
    talk.machine.begin(0.1)
    talk.machine.skip()
    talk.flush()
    with pytest.raises(RemoteProtocolError, match="rejected round 0: closed without it"):
        talk.say(MessageType.VERDICT, Verdict("rejected", "closed without it"), seq=0)


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
    assert talk.machine.waited_for() == "rank 0 (last seen 3.2 s ago)"
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
