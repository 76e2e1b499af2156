"""An aggregator: a server to its children and one worker to its parent, with no weights of its own.

    children  --PUSH-->  staged, as on every server  --all have spoken of a shard-->  Reduce
      Reduce:   the payloads become one (`tree_sum`)  --PUSH, weight W-->  parent
    parent  --WEIGHTS-->  own header, same body  -->  ShardReduced  --WEIGHTS-->  children
    parent  --VERDICT-->  what does not count goes back into the residual; then the round commits,
                          and the children have their verdicts

The state machine below is a server's own. For it a reduction that takes a while is all there is:
`take` begins what it asks for, `turn` tells it what has become of that. The last shard of a round
is held back until the parent's verdict is known and its rejections are in the residual, so no
message of the next round is made before.

A child is told "applied" when its message is in the aggregator's own. What becomes of that one
further up is between aggregator and parent: applied, or back in the residual and said again later.

Whole weights are nobody's here: the parent is asked for them, and its frames go on (`tree_whole`).
So while somebody joins, up to a model in f32 may lie in the queues. The initial weights that rank 0
sends are kept, in the place of the residual, until the parent has them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Final, Literal, TypeAlias

from psq.client import Hooks
from psq.errors import EXIT_GAVE_UP, PsqError, StateError
from psq.link import WorkerLink
from psq.plan import Plan
from psq_proto.frames import HEADER_BYTES, Header, seal
from psq_proto.messages import Flags, MessageType
from psq_server.state import (
    Action,
    Adopt,
    Broadcast,
    EndedAbove,
    Event,
    Initialize,
    Reduce,
    Save,
    SendFull,
    Settings,
    WaitsAbove,
    WeightsAbove,
)
from psq_server.tree_round import TreeRound
from psq_server.tree_uplink import Uplink

__all__ = ["Aggregator"]

NOTE_S: Final = 5.0
"""How old a wait for the server above is when it is first logged, and how often it is then."""

News: TypeAlias = Event | Broadcast


class Aggregator:
    """What a loop asks in the place of weights of its own.

    Args:
        uplink: the conversation with the server above.
        settings: the state machine's.
        clock: seconds, monotonic.
        note: takes what is worth a line in the log.
    """

    def __init__(
        self,
        uplink: Uplink,
        settings: Settings,
        *,
        clock: Callable[[], float],
        note: Callable[[str], None],
    ) -> None:
        self.uplink = uplink
        self.plan: Plan | None = None
        self._settings = settings
        self._clock = clock
        self._note = note
        self._job: TreeRound | None = None
        self._came: deque[tuple[Header, memoryview]] = deque()
        self._waits = ""
        self._noted_s = clock()

    # ---- what the state machine asks for

    def take(self, action: Action) -> bool:
        """Begin what an action asks for; False if it is not for an aggregator to do."""
        match action:
            case Adopt():
                self._adopt(action.plan)
            case Initialize():
                self._need().initialize(action)
            case Reduce():
                self._need().reduce(action)
                self._open()
            case SendFull():
                self._need().whole.want(action.peers, action.versions)
                self._open()
            case Save():
                pass  # the weights are the root's to save
            case _:
                return False
        return True

    def _adopt(self, plan: Plan) -> None:
        self.plan = plan
        try:
            self._job = TreeRound(plan, self.uplink, self._clock)
        except MemoryError as error:
            msg = f"there is no room for a residual of {plan.layout.numel} values: {error}"
            raise StateError(msg) from error
        if self.uplink.rank:
            self._open()  # else the initial weights come first, and they are asked for after them

    def _open(self) -> None:
        if self.uplink.is_open:
            return
        job = self._need()
        hooks = Hooks(
            initial=job.sums.vector,
            weights=self._keep,
            restore=job.restore,
            reset=job.forget,
            planes=job.planes,
            whole=self._keep,
        )
        self.uplink.open(job.plan, hooks)

    def _keep(self, header: Header, body: memoryview) -> None:
        self._came.append((header, body))

    @property
    def link(self) -> WorkerLink:
        """Wakes whoever drives this."""
        return self.uplink.link

    def _need(self) -> TreeRound:
        assert self._job is not None, "there is no job yet"  # noqa: S101 - a mistake of ours
        return self._job

    # ---- what has come of it

    def turn(self) -> Iterator[News]:
        """Look at the server above: what the loop is to do about it, one thing after another."""
        if not self.uplink.is_open:
            return
        try:
            self.uplink.turn()
        except PsqError as error:
            yield EndedAbove(getattr(error, "exit_code", EXIT_GAVE_UP), str(error))
            return
        while self.uplink.machine.notes:
            self._note(self.uplink.machine.notes.popleft())
        while self._came:
            yield from self._forward(*self._came.popleft())
        yield from self._need().finish_round()
        self._need().say()
        self._need().pull_whole()
        yield from self._wait(self.uplink.waits_for())

    def _wait(self, waits: str) -> Iterator[News]:
        """Tell the children what is waited for above, and now and then the log."""
        now_s = self._clock()
        if not waits:
            self._noted_s = now_s
        elif now_s - self._noted_s >= NOTE_S:
            self._noted_s = now_s
            self._note(waits)
        if waits != self._waits:
            self._waits = waits
            yield WaitsAbove(waits)

    def patience_s(self) -> float:
        """How long nothing has to be done here, unless something comes."""
        return self.uplink.patience_s()

    def leave(self, reason: Literal["done", "error", "interrupted"], text: str) -> None:
        """Say goodbye to the server above."""
        self.uplink.leave(reason, text)

    def _forward(self, header: Header, body: memoryview) -> Iterator[News]:
        """Send one frame of weights on, to whom it is for."""
        job, frame = self._need(), self._sealed(header, body)
        if not job.has_weights:
            job.has_weights = True
            yield WeightsAbove()
            job.whole.join_pull()
        if Flags.FULL in header.flags:
            receivers = job.whole.receivers(header.shard)
            complete = job.whole.took(header, job.part_count(header), self._clock())
            if receivers and not job.is_awaited(header):
                yield Broadcast(receivers, header.version, (frame,), (header.shard,))
            if not complete:
                job.keep_part(header, frame)
                return
        if job.is_awaited(header):
            yield from job.answer(header, frame)

    def _sealed(self, header: Header, body: memoryview) -> bytearray:
        frame = bytearray(HEADER_BYTES)
        frame += body
        mine = Header(
            type=MessageType.WEIGHTS,
            codec=header.codec,
            run_id=self._settings.run_id,
            epoch=self._settings.epoch,
            flags=header.flags,
            version=header.version,
            rate=header.rate,
            plan=header.plan,
            shard=header.shard,
            part=header.part,
        )
        seal(frame, mine)
        return frame
