"""What one worker says and hears in a step, in numbers: gradients -> payloads, payloads -> weights.

    begin -> say each shard once (from hooks or from `step`) -> finish -> publish
    begin -> say_nothing -> finish -> publish                          a round that is sat out

A shard is said by compressing it into its frame and pushing that. One whose gradient holds NaN or
Inf is left out, alone, and the server is told so at the end: moments stay as they were, so does the
residual of what was not finite, and what was finite in the shard waits in the residual for the next
step (without error feedback it is lost). How that is noticed:
- gradient recipes: by the payload, where such a block has a scale that is not finite (or the value
  itself). Checking the payload costs a hundredth of what reading the gradients a second time would.
- directions with state, such as Adam on the worker: by reading the shard's gradients first, since
  their moments must not take NaN.

Shards that are said from `step` have their gradients zeroed in the same pass, where these are read
in torch's own memory. What is not finite stays until `zero_gradients`, so that it can be named.

With local steps (`Direction.local_steps`) most steps say nothing: `step_locally` moves the weights
that the model computes with and leaves the replica alone. One whose gradients are not all finite is
left out whole. The last one says how far they have moved; of a shard whose gradient is not finite
then it says how far the steps before have. No weights are taken in before all of that is said: they
would move the place that the distance is measured from.

A shard that is not due in a round (`Plan.due`) says nothing in it and its weights stay as they are:
what it would have said waits in the residual.

A direction that looks ahead (optimistic mirror descent) takes its gradients at other weights than
the replica's: `publish` puts these into the model, and the replica is kept apart, as it is for
local steps.

Weights are written in `poll` and `finish`, which only `step` calls, and in `publish`.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from psq.client import Client, Hooks, Patience, RoundResult
from psq.clock import parse_consistency
from psq.config import WorkerConfig
from psq.durable.failpoints import reach
from psq.errors import UsageError
from psq.feedback import Compressor
from psq.kernels import Buffer, Floats
from psq.plan import Plan
from psq.timeline import NOWHERE, Phase, Timeline
from psq.torch.asked import Asked
from psq.torch.averaging import Averaging
from psq.torch.decoder import Decoder
from psq.torch.keeper import Keeper
from psq.torch.parameters import ParameterTable
from psq.torch.settings import keys_of
from psq_proto.frames import Header

__all__ = ["Exchange"]

_log = logging.getLogger("psq.torch")


class Exchange:
    """A worker's compressor, decoder and client.

    Attributes:
        client: the conversation.
        compressor: moments and residual.
        decoder: what weights come through.
        open: whether a step has begun that has not finished.
        asked: the learning rate and the weight of that step.
        is_silent: it says nothing.
        step: its number.
        left_out: its shards that were not finite, and what was wrong with each.
        encode_s: spent in `say` in that step.
        decode_s: spent in decoding in that step.
        payload_bytes: of what was said in that step.
        said_numel: how many values that says.
        keeper: what this process leaves to the next one, if it leaves anything.
    """

    def __init__(
        self,
        table: ParameterTable,
        plan: Plan,
        config: WorkerConfig,
        timeline: Timeline | None = None,
        averaging: Averaging | None = None,
    ) -> None:
        self._table = table
        self._averaging = averaging
        self._timeline = timeline
        self._say_at_s = 0.0
        self._shards = plan.layout.shards
        take_mean = None if averaging is None else averaging.take
        self.decoder = Decoder(plan, table, take_mean)
        rank = plan.data_rank(config.rank)  # replicas say the same bytes
        self.compressor = Compressor(plan, rank, seed=config.seed, residual_dtype=config.residual)
        self._plan = plan
        self._shared = tuple(self.decoder.shared)
        ahead = max(shard.numel for shard in self._shards) if self.compressor.looks_ahead else 0
        self._ahead = np.empty(ahead, np.float32)
        self._is_eager = parse_consistency(plan.consistency).eager
        self._rescaled: dict[int, Floats] = {}
        self._is_local = plan.recipe.direction.local_steps > 1
        self._said = [False] * len(self._shards)
        self.keeper: Keeper | None = None
        self.open = self.is_silent = False
        self.asked = Asked(0.0)
        self.step = 0
        self.left_out: dict[int, str] = {}
        self.encode_s = self.decode_s = 0.0
        self.payload_bytes = self.said_numel = 0
        hooks = Hooks(
            table.flat_weights,
            self.decode,
            self.restore,
            self.reset,
            self.decoder.planes,
            checkpoint=self._want_copy,
        )
        self.client = self._make_client(plan, config, hooks)

    def _make_client(self, plan: Plan, config: WorkerConfig, hooks: Hooks) -> Client:
        """The conversation that this worker's words go through; a simulated worker has another."""
        return Client(
            config.endpoints,
            plan,
            config.rank,
            hooks,
            patience=Patience(give_up_after_s=config.give_up_after_s),
            rng=random.Random(),  # noqa: S311 - jitter and names; must differ between processes
            timeline=self._timeline,
            keys=keys_of(config),
        )

    def join(self) -> None:
        """Join the job, as the process before this one if it has left what fits."""
        keeper = self.keeper
        attempts = keeper.attempts() if keeper is not None else ()
        self.client.join(attempts, lost=keeper is not None and bool(keeper.lost))
        self.publish_replica()
        if keeper is not None and not keeper.resumed:
            keeper.begin_anew(self.client.version, self.client.identities)

    def begin(self, asked: Asked) -> None:
        """Open a step, unless a hook of backward has done so.

        Raises:
            UsageError: it was opened with another learning rate or weight.
        """
        if self.open:
            self._check_same(asked)
            return
        self.step = self.client.begin(asked.rate, asked.weight)
        self.asked = asked
        self.open = True
        self.is_silent = False
        self.left_out.clear()
        self._rescaled.clear()
        self._said[:] = [False] * len(self._said)
        self.encode_s = self.decode_s = 0.0
        self.payload_bytes = self.said_numel = 0
        if self.keeper is not None:
            self._take_said(self.keeper)

    def _take_said(self, keeper: Keeper) -> None:
        """Take what the process before this one has said in this step as said."""
        keeper.take_said()
        for shard, with_payload in self.client.already_said():
            self._said[shard] = True
            if not with_payload:
                self.left_out[shard] = "left out by the process before this one"
        for shard in keeper.waiting:
            self._said[shard] = True

    def step_locally(self, asked: Asked) -> None:
        """Take a step on this worker's own weights, unless a gradient is not finite."""
        started_s = time.monotonic()
        self.asked = asked
        self.left_out.clear()
        self.decode_s = 0.0
        for shard in range(len(self._shards)):
            if not self.compressor.finite(self._table.gradients(shard)):
                self.left_out[shard] = self._fault_of(shard)
        if not self.left_out:
            for shard in range(len(self._shards)):
                gradients, own = self._table.gradients(shard), self._table.local(shard)
                self.compressor.descend(shard, gradients, self._rate_of(shard), own)
            self._table.publish_local()
            self._note_changed(range(len(self._shards)))
        self.encode_s = time.monotonic() - started_s

    def say(self, shard: int, *, clear: bool = False) -> None:
        """Compress and push a shard, or leave it out; or let it wait, where it is not due.

        One that the process before this one has said in this step is not said again.

        Args:
            shard: its index.
            clear: nobody looks at the gradients any more: they may be zeroed in the same pass.

        Cost: `Compressor.compress`, one CRC.
        """
        if self._said[shard]:
            return
        started_s = self._say_at_s = time.monotonic()
        self._said[shard] = True
        if self.client.takes_part(shard):
            if not self._pushed(shard, clear=clear):
                self.left_out[shard] = self._fault_of(shard)
                if self.keeper is not None:
                    self.keeper.left_out(shard, self.client.base(shard), self.asked)
        elif self.client.rests(shard):
            self._keep(shard)
            if self.keeper is not None:
                self.keeper.waits(shard, self.client.base(shard), self.asked)
        self.encode_s += time.monotonic() - started_s

    def say_rest(self) -> None:
        """Say what was not said yet, first shards first, taking in weights that come meanwhile."""
        if self.compressor.needs_all:
            self._prepare()
        for shard, said in enumerate(self._said):
            if not said:
                self.say(shard, clear=True)
                if not self._is_local:
                    self.client.poll()
        if self.left_out:
            self.client.skip()  # nothing for every shard that was not pushed

    def say_nothing(self) -> None:
        """Sit the round out: moments and residual stay as they are."""
        self.is_silent = True
        if self.keeper is not None and not any(self._said):
            self.keeper.silent(self.step, self.asked)
        self.client.skip()

    def finish(self) -> RoundResult:
        """Wait for the verdict and the weights after this step."""
        result = self.client.finish()
        self.open = False
        return result

    def load_script(self) -> None:
        """Put back what is not the exchange's own: random numbers, buffers, an optimizer."""
        if self.keeper is not None:
            self.keeper.load_script(self.client.version, self.client.identities)

    def close(self, *, done: bool) -> None:
        """Leave what is kept to the next process, or to nobody if the job is done."""
        if self.keeper is not None:
            self.keeper.close(done=done)

    def close_round(self) -> None:
        """All of a round is done: whoever comes after this process begins with the next one."""
        if self.keeper is not None:
            self.keeper.close_round(self.client.version, self.client.identities)
            self.keeper.copies.confirm(self.client.confirm)

    def publish(self) -> None:
        """Make the model compute with what has come.

        With a direction that looks ahead that is not the replica, which is kept apart.
        """
        if self._averaging is not None:
            self._averaging.land()
        else:
            self.publish_replica()

    def publish_replica(self) -> None:
        """Make the model compute with the replica's weights, or ahead of them."""
        self._table.publish()
        if self.compressor.looks_ahead:
            self.look_ahead()

    def look_ahead(self) -> None:
        """Move the model from the replica's weights to where the next gradients are to be taken."""
        for cut in self._shards:
            ahead = self._ahead[: cut.numel]
            self.compressor.look_ahead(cut.index, ahead)
            segments = zip(cut.segments, self._table.local(cut.index), strict=True)
            for segment, own in segments:
                np.subtract(own, ahead[segment.offset :][: segment.numel], out=own)
        self._table.publish_local()

    def _pushed(self, shard: int, *, clear: bool) -> bool:
        """Push the shard, if all of it is finite."""
        if self._is_local:
            return self._pushed_drift(shard)
        gradients = self._table.gradients(shard)
        if self.compressor.reads_first and not self.compressor.finite(gradients):
            return False
        payload = self.client.payload(shard)
        clear = clear and self._table.may_clear(shard)
        codec = self.compressor.compress(
            shard,
            gradients,
            self._rate_of(shard),
            payload,
            weights=self._table.weights(shard),
            clear=clear,
            t=self._round_of(shard),
            shared=self._shared_of(shard),
        )
        if not self.compressor.payload_finite(shard, payload):
            self.restore(shard)
            return False
        if clear:
            self._table.note_cleared(shard)
        self._push(shard, codec, payload)
        return True

    def _keep(self, shard: int) -> None:
        """Let what the shard has to say wait in the residual."""
        if self._is_local:
            self._write_drift(shard, None)
            return
        gradients = self._table.gradients(shard)
        is_finite = self._is_finite(shard)
        if is_finite or not self.compressor.reads_first:
            self.compressor.absorb(
                shard,
                gradients,
                self._rate_of(shard),
                self._table.weights(shard),
                t=self._round_of(shard),
                shared=self._shared_of(shard),
            )

    def _pushed_drift(self, shard: int) -> bool:
        """Push how far local steps have moved the shard, if that is finite."""
        payload = self.client.payload(shard)
        codec = self._write_drift(shard, payload)
        if not self.compressor.payload_finite(shard, payload):
            self.restore(shard)
            return False
        self._push(shard, codec, payload)
        return True

    def _push(self, shard: int, codec: int, payload: Buffer) -> None:
        timeline = self._timeline
        payload_bytes = self.compressor.codec(shard, codec).nbytes
        self.payload_bytes += payload_bytes
        self.said_numel += self._shards[shard].numel
        if self.keeper is not None:
            said = np.frombuffer(payload, np.uint8)[:payload_bytes]
            self.keeper.said(shard, self.client.base(shard), self.asked, said)
        if timeline is None:
            self.client.push(shard, codec)
            reach("keeper.sent")
            return
        step, encoded_s = self.step, time.monotonic()
        self.client.push(shard, codec)
        end_s = time.monotonic()
        timeline.add(Phase.ENCODE, self._say_at_s, encoded_s, shard, step, NOWHERE, payload_bytes)
        timeline.add(Phase.PUSH, encoded_s, end_s, shard, step, NOWHERE, payload_bytes)

    def _write_drift(self, shard: int, payload: Buffer | None) -> int:
        """Compress it, or let it wait where there is no payload to write; returns the codec."""
        gradients = self._table.gradients(shard) if self._is_finite(shard) else None
        return self.compressor.compress_drift(
            shard,
            gradients,
            self._rate_of(shard),
            payload,
            weights=self._table.local(shard),
            start=self._table.weights(shard),
            t=self._round_of(shard),
        )

    def _prepare(self) -> None:
        """Show the direction all gradients, zeros for those that will be left out."""
        shown: list[Sequence[Floats]] = []
        for shard in range(len(self._shards)):
            gradients = self._table.gradients(shard)
            is_finite = self.compressor.finite(gradients)
            shown.append(gradients if is_finite else [np.zeros_like(each) for each in gradients])
        self.compressor.prepare(shown, self.asked.rate, t=self._round_of(0))

    def _rate_of(self, shard: int) -> float:
        """What is asked for a shard, before its group's factor, which the compressor knows."""
        return self.asked.rate_of(self._shards[shard].group)

    def _round_of(self, shard: int) -> int:
        """The round of a shard that is said now, from 1, as the rules count."""
        return self._plan.turns(shard, self.client.base(shard) + 1)

    def _shared_of(self, shard: int) -> Mapping[str, Floats] | None:
        """The shard's views of the state that all replicas have alike."""
        rule = self.decoder.rule
        return None if rule is None else {name: rule.of(name, shard) for name in self._shared}

    def _check_same(self, asked: Asked) -> None:
        """After a step's first gradient was sent nothing about it may change."""
        if asked == self.asked:
            return
        what, before, now = "lr", self.asked.rate, asked.rate
        if asked.weight != self.asked.weight:
            what, before, now = "weight", self.asked.weight, asked.weight
        msg = (
            f"{what} changed from {before!r} to {now!r} after this step's first gradient was "
            f"sent with the old one (overlap=True sends gradients while backward runs): set {what} "
            "before backward"
        )
        raise UsageError(msg)

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

    def _has_settled(self, shard: int) -> bool:
        """Whether the process before this one has taken back what comes back in this round."""
        return self.keeper is not None and shard in self.keeper.settled

    def _note_changed(self, shards: Iterable[int]) -> None:
        if self.keeper is not None:
            self.keeper.changed(shards)

    # ---- what the client asks

    def decode(self, header: Header, body: memoryview) -> None:
        """Weights came: into the parameters with them (see `ReplicaVersions` for what comes)."""
        started_s = time.monotonic()
        shard = header.shard
        factor = self.decoder.decode(header, body)
        if factor is not None:
            self._rescale(shard, factor)
        end_s = time.monotonic()
        self.decode_s += end_s - started_s
        if self._timeline is not None:
            step, nbytes = header.version - 1, body.nbytes
            self._timeline.add(Phase.DECODE, started_s, end_s, shard, step, NOWHERE, nbytes)

    def restore(self, shard: int) -> None:
        """What was said of a shard in this step did not count: it is still to be said."""
        if self._has_settled(shard):
            return
        self._note_changed((shard,))
        factor = self._rescaled.pop(shard, None)
        if factor is not None:  # what was said is in units from before
            self.compressor.rescale(shard, 1.0 / factor)
        kept = self.compressor.restore(shard, self.client.said(shard))
        if factor is not None:
            self.compressor.rescale(shard, factor)
        if not kept:
            _log.warning(
                "step %d: shard %d of rank %d has exploded; its residual starts from zero",
                self.step,
                shard,
                self.client.rank,
            )

    def _rescale(self, shard: int, factor: Floats) -> None:
        """The units of a residual have changed, maybe those of what was said in this step too.

        The latter where rounds close without this worker: what it said may come back later. What
        it has not said yet will be in the new units.
        """
        if self._has_settled(shard):
            return
        self._note_changed((shard,))
        self.compressor.rescale(shard, factor)
        if self.open and self._said[shard] and not self._is_eager:
            self._rescaled[shard] = factor * self._rescaled.get(shard, np.float32(1.0))

    def _want_copy(self, server: int, version: int) -> None:
        """A server makes this version a checkpoint: keep what goes with it."""
        if self.keeper is not None:
            self.keeper.copies.want(server, version)

    def reset(self, shards: Sequence[int]) -> None:
        """Forget the residuals of these shards."""
        self._note_changed(shards)
        for shard in shards:
            self.compressor.forget(shard)
