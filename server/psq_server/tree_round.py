"""What an aggregator knows of its job: the round under way, and what makes its messages.

    reduce(shard) ...  one message up for each shard that all children have spoken of
    answer(shard) ...  its next version has come down: the children may have it
    finish_round()     the verdict is known, every shard is there: rejections return to the
                       residual, and only then the last shard goes to the children

The initial weights that rank 0 sends are kept where the residual will be.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from psq.codec import ShardCodec, get_codec
from psq.layout import PART_NUMEL, part_count
from psq.plan import Plan
from psq.rules import Said, is_linear, make_apply
from psq_proto.frames import Header
from psq_proto.messages import NONE
from psq_server.state import Initialize, Reduce, ShardReduced
from psq_server.tree_sum import PartialSum
from psq_server.tree_uplink import Uplink
from psq_server.tree_whole import WholeWeights

__all__ = ["TreeRound"]


class TreeRound:
    """See the module's docstring.

    Args:
        plan: the job, as this server sees it.
        uplink: the conversation with the server above.
        clock: seconds, monotonic.

    Attributes:
        sums: the residual, and what makes one message of several.
        whole: who is to have whole weights.
        has_weights: some have come from above.
        planes: how many vectors whole weights are.
    """

    def __init__(self, plan: Plan, uplink: Uplink, clock: Callable[[], float]) -> None:
        self.plan = plan
        self.sums = PartialSum(plan, uplink.rank, rescales=is_linear(plan.recipe))
        self.whole = WholeWeights((shard.index for shard in plan.owned), clock())
        self.has_weights = False
        self.planes = 1
        if plan.recipe.downlink.kind == "mean":
            rule = make_apply(plan.recipe, layout=plan.layout, world_size=plan.world_size)
            self.planes += len(rule.state_names)
        self._uplink = uplink
        self._clock = clock
        self._shards = {shard.index: shard for shard in plan.owned}
        self._dense_id = get_codec("fp32").wire_id
        self._is_begun = False
        self._codecs: dict[int, ShardCodec] = {}
        self._parts: dict[int, list[bytearray]] = {}
        self._unsaid: deque[Reduce] = deque()
        self._awaited: dict[int, int] = {}
        self._answers: list[ShardReduced] = []
        self._answered = 0

    # ---- up

    def initialize(self, action: Initialize) -> None:
        """Keep a part of the initial weights, until the server above asks for them."""
        values = np.frombuffer(action.values, np.uint8).view("<f4")
        start = action.part * PART_NUMEL
        self.sums.vector(action.shard)[start : start + values.size] = values

    def reduce(self, action: Reduce) -> None:
        """Say a shard above, as soon as the weights that the round starts from have come down."""
        self._unsaid.append(action)
        self.say()

    def say(self) -> None:
        """Say what can be said now; children may be quicker than the weights from above."""
        while self._unsaid and self._may_say(self._unsaid[0].round):
            self._say(self._unsaid.popleft())

    def _may_say(self, number: int) -> bool:
        if not self._uplink.is_open:
            return False
        machine = self._uplink.machine
        return machine.round is not None or machine.replica.version == number

    def _say(self, action: Reduce) -> None:
        """One message for all that was said of a shard, or that nothing was."""
        machine, shard = self._uplink.machine, action.shard
        if not self._is_begun:
            self.sums.begin()
            self._is_begun = True
        self._awaited[shard] = action.round
        current = machine.round or machine.begin(action.rate)
        assert current.number == action.round, (current.number, action.round)  # noqa: S101
        if not action.said:
            if self.plan.pushes(shard):
                machine.skip(shard)
            return
        current.rate = action.rate  # a shard that all skipped, before this one, has named none
        said = [
            Said(one.rank, self._codec(shard, one.codec), one.payload, float(one.weight))
            for one in action.said
        ]
        codec = self._codecs[shard] = max((one.codec for one in said), key=lambda c: c.nbytes)
        payload = machine.frames.payload(shard)[: codec.nbytes]
        weight = self.sums.write(shard, said, action.rate, codec, payload)
        specs = self.plan.uplink_codecs(shard)
        machine.push(shard, specs.index(codec.codec.spec), weight)

    def restore(self, shard: int) -> None:
        """Take a message back that the server above did not apply."""
        self.sums.restore(shard, self._codecs[shard], self._uplink.machine.frames.said(shard))

    def forget(self, shards: Sequence[int]) -> None:
        """The server above does not know these residuals: they start from zero."""
        for shard in shards:
            self.sums.forget(shard)

    def pull_whole(self) -> None:
        """Ask the server above for whole weights, if somebody wants some."""
        machine, now_s = self._uplink.machine, self._clock()
        if machine.joined and machine.replica.version != NONE and self.whole.is_due(now_s):
            self.whole.begin(now_s)
            machine.pull_whole()

    # ---- down

    def part_count(self, header: Header) -> int:
        """How many frames make the shard that this frame of whole weights is of."""
        if header.codec != self._dense_id:
            return 1
        return self.planes * part_count(self._shards[header.shard].numel)

    def is_awaited(self, header: Header) -> bool:
        """Whether this frame belongs to the next version of a shard that was said above."""
        return self._awaited.get(header.shard) == header.version - 1

    def keep_part(self, header: Header, frame: bytearray) -> None:
        """Keep a part of a shard that comes whole although it was awaited as a change."""
        if self.is_awaited(header):
            self._parts.setdefault(header.shard, []).append(frame)

    def answer(self, header: Header, frame: bytearray) -> Iterator[ShardReduced]:
        """The next version of a shard is there; all but the last one may go on at once."""
        frames = [*self._parts.pop(header.shard, ()), frame]
        number = self._awaited.pop(header.shard)
        event = ShardReduced(number, header.shard, frames[0], 0.0, tuple(frames[1:]))
        self._answered += 1
        if self._answered == len(self.plan.due_shards(number)):
            self._answers.append(event)
        else:
            yield event

    def finish_round(self) -> Iterator[ShardReduced]:
        """End the round above if it is over, and let the children have its last shard."""
        machine = self._uplink.machine
        if not self._answers or not machine.settled:
            return
        machine.end_round()
        self._answered = 0
        last, self._answers = self._answers[0], []
        yield last

    def _codec(self, shard: int, wire_id: int) -> ShardCodec:
        for spec in self.plan.uplink_codecs(shard):
            codec = get_codec(spec)
            if codec.wire_id == wire_id:
                return ShardCodec(codec, self._shards[shard])
        msg = f"codec {wire_id:#06x} of shard {shard} has passed, and is none of the plan's"
        raise AssertionError(msg)
