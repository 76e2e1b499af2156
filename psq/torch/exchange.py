"""What one worker says and hears in a step, in numbers: gradients -> payloads, payloads -> weights.

    begin -> say each shard once (from hooks or from `step`) -> finish

A shard is said by compressing it into its frame and pushing that. One whose gradient holds NaN or
Inf is left out, alone, and the server is told so at the end: moments stay as they were, so does the
residual of what was not finite, and what was finite in the shard waits in the residual for the next
step (without error feedback it is lost). How that is noticed:
- gradient recipes: by the payload, where such a block has a scale that is not finite (or the value
  itself). Checking the payload costs a hundredth of what reading the gradients a second time would.
- Adam on the worker: by reading the shard's gradients first, since its moments must not take NaN.

Shards that are said from `step` have their gradients zeroed in the same pass, where these are read
in torch's own memory. What is not finite stays until `zero_gradients`, so that it can be named.

With local steps (`Direction.local_steps`) most steps say nothing: `step_locally` moves the weights
that the model computes with and leaves the replica alone. One whose gradients are not all finite is
left out whole. The last one says how far they have moved; of a shard whose gradient is not finite
then it says how far the steps before have. No weights are taken in before all of that is said: they
would move the place that the distance is measured from.

A shard that is not due in a round (`Plan.due`) says nothing in it and its weights stay as they are:
what it would have said waits in the residual.

Weights are written in `poll` and `finish`, which only `step` calls.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Sequence

import numpy as np

from psq.client import Client, Hooks, Patience, RoundResult
from psq.codec import ShardCodec, get_codec
from psq.config import WorkerConfig
from psq.feedback import Compressor
from psq.kernels import Buffer
from psq.plan import Plan
from psq.timeline import NOWHERE, Phase, Timeline
from psq.torch.parameters import ParameterTable
from psq_proto.frames import Header
from psq_proto.messages import Flags

__all__ = ["Exchange"]

_log = logging.getLogger("psq.torch")


class Exchange:
    """A worker's compressor, decoder and client.

    Attributes:
        client: the conversation.
        compressor: moments and residual.
        open: whether a step has begun that has not finished.
        rate: the learning rate of that step.
        step: its number.
        left_out: its shards that were not finite, and what was wrong with each.
        encode_s: spent in `say` in that step.
        decode_s: spent in decoding in that step.
    """

    def __init__(
        self,
        table: ParameterTable,
        plan: Plan,
        config: WorkerConfig,
        timeline: Timeline | None = None,
    ) -> None:
        self._table = table
        self._timeline = timeline
        self._say_at_s = 0.0
        self._shards = plan.layout.shards
        self.compressor = Compressor(
            plan, config.rank, seed=config.seed, residual_dtype=config.residual
        )
        downlink = get_codec(plan.recipe.downlink.codec)
        self._downlinks = [ShardCodec(downlink, shard) for shard in plan.layout.shards]
        self._dense = get_codec("fp32")
        self._reads_first = plan.recipe.direction.adam is not None
        self._is_local = plan.recipe.direction.local_steps > 1
        self._said = [False] * len(self._shards)
        self.open = False
        self.rate = 0.0
        self.step = 0
        self.left_out: dict[int, str] = {}
        self.encode_s = self.decode_s = 0.0
        self.client = Client(
            config.endpoints,
            plan,
            config.rank,
            Hooks(table.flat_weights, self.decode, self.restore, self.reset),
            patience=Patience(give_up_after_s=config.give_up_after_s),
            rng=random.Random(),  # noqa: S311 - jitter and names; must differ between processes
            timeline=timeline,
        )

    def begin(self, rate: float) -> None:
        """Open a step with this learning rate."""
        self.step = self.client.begin(rate)
        self.rate = rate
        self.open = True
        self.left_out.clear()
        self._said[:] = [False] * len(self._said)
        self.encode_s = self.decode_s = 0.0

    def step_locally(self, rate: float) -> None:
        """Take a step on this worker's own weights, unless a gradient is not finite."""
        started_s = time.monotonic()
        self.rate = rate
        self.left_out.clear()
        self.decode_s = 0.0
        for shard in range(len(self._shards)):
            if not self.compressor.finite(self._table.gradients(shard)):
                self.left_out[shard] = self._fault_of(shard)
        if not self.left_out:
            for shard in range(len(self._shards)):
                gradients, own = self._table.gradients(shard), self._table.local(shard)
                self.compressor.descend(shard, gradients, rate, own)
            self._table.publish_local()
        self.encode_s = time.monotonic() - started_s

    def say(self, shard: int, *, clear: bool = False) -> None:
        """Compress and push a shard, or leave it out; or let it wait, where it is not due.

        Args:
            shard: its index.
            clear: nobody looks at the gradients any more: they may be zeroed in the same pass.

        Cost: `Compressor.compress`, one CRC.
        """
        started_s = self._say_at_s = time.monotonic()
        self._said[shard] = True
        if self.client.takes_part(shard):
            if not self._pushed(shard, clear=clear):
                self.left_out[shard] = self._fault_of(shard)
        elif self.client.rests(shard):
            self._keep(shard)
        self.encode_s += time.monotonic() - started_s

    def say_rest(self) -> None:
        """Say what was not said yet, first shards first, taking in weights that come meanwhile."""
        for shard, said in enumerate(self._said):
            if not said:
                self.say(shard, clear=True)
                if not self._is_local:
                    self.client.poll()
        if self.left_out:
            self.client.skip()  # nothing for every shard that was not pushed

    def finish(self) -> RoundResult:
        """Wait for the verdict and the weights after this step."""
        result = self.client.finish()
        self.open = False
        return result

    def _pushed(self, shard: int, *, clear: bool) -> bool:
        """Push the shard, if all of it is finite."""
        if self._is_local:
            return self._pushed_drift(shard)
        gradients = self._table.gradients(shard)
        if self._reads_first and not self.compressor.finite(gradients):
            return False
        payload = self.client.payload(shard)
        weights = self._table.weights(shard)
        clear = clear and self._table.may_clear(shard)
        compress = self.compressor.compress
        compress(shard, gradients, self.rate, payload, weights=weights, clear=clear)
        if not self.compressor.payload_finite(shard, payload):
            self.restore(shard)
            return False
        if clear:
            self._table.note_cleared(shard)
        self._push(shard, payload.nbytes)
        return True

    def _keep(self, shard: int) -> None:
        """Let what the shard has to say wait in the residual."""
        if self._is_local:
            self._write_drift(shard, None)
            return
        gradients = self._table.gradients(shard)
        is_finite = self._is_finite(shard)
        if is_finite or not self._reads_first:
            weights = self._table.weights(shard)
            self.compressor.absorb(shard, gradients, self.rate, weights)

    def _pushed_drift(self, shard: int) -> bool:
        """Push how far local steps have moved the shard, if that is finite."""
        payload = self.client.payload(shard)
        self._write_drift(shard, payload)
        if not self.compressor.payload_finite(shard, payload):
            self.restore(shard)
            return False
        self._push(shard, payload.nbytes)
        return True

    def _push(self, shard: int, payload_bytes: int) -> None:
        timeline = self._timeline
        if timeline is None:
            self.client.push(shard)
            return
        step, encoded_s = self.step, time.monotonic()
        self.client.push(shard)
        end_s = time.monotonic()
        timeline.add(Phase.ENCODE, self._say_at_s, encoded_s, shard, step, NOWHERE, payload_bytes)
        timeline.add(Phase.PUSH, encoded_s, end_s, shard, step, NOWHERE, payload_bytes)

    def _write_drift(self, shard: int, payload: Buffer | None) -> None:
        """Compress it, or let it wait where there is no payload to write."""
        gradients = self._table.gradients(shard) if self._is_finite(shard) else None
        self.compressor.compress_drift(
            shard,
            gradients,
            self.rate,
            payload,
            weights=self._table.local(shard),
            start=self._table.weights(shard),
        )

    def _is_finite(self, shard: int) -> bool:
        """Whether all gradients of a shard are; if not it is noted."""
        if self.compressor.finite(self._table.gradients(shard)):
            return True
        self.left_out[shard] = self._fault_of(shard)
        return False

    def _fault_of(self, shard: int) -> str:
        tensors = [segment.tensor for segment in self._shards[shard].segments]
        if name := self._table.not_finite(tensors):
            return f"the gradient of {name!r} is not finite"
        return f"the gradients of shard {shard} are too large for float32"

    # ---- what the client asks

    def decode(self, header: Header, body: memoryview) -> None:
        """Weights came: into the parameters with them (see `ReplicaVersions` for what comes)."""
        started_s = time.monotonic()
        shard = header.shard
        codec, out = self._downlinks[shard], self._table.weights(shard)
        if Flags.DELTA in header.flags:
            codec.check(body)
            codec.decode_add_segments(body, out)
        elif header.codec == self._dense.wire_id:
            self._dense.check(body, body.nbytes // 4)
            values = np.frombuffer(body, "<f4").astype(np.float32, copy=False)
            self._table.write_part(shard, header.part, values)
        else:
            codec.check(body)
            codec.decode_segments(body, out)
        end_s = time.monotonic()
        self.decode_s += end_s - started_s
        if self._timeline is not None:
            step, nbytes = header.version - 1, body.nbytes
            self._timeline.add(Phase.DECODE, started_s, end_s, shard, step, NOWHERE, nbytes)

    def restore(self, shard: int) -> None:
        """What was said of a shard in this step did not count: it is still to be said."""
        if not self.compressor.restore(shard, self.client.said(shard)):
            _log.warning(
                "step %d: shard %d of rank %d has exploded; its residual starts from zero",
                self.step,
                shard,
                self.client.rank,
            )

    def reset(self, shards: Sequence[int]) -> None:
        """Forget the residuals of these shards."""
        for shard in shards:
            self.compressor.forget(shard)
