"""What one step did and where its time went."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["LOCAL", "SAT_OUT", "StepReport"]

LOCAL: Final = "local"
"""The reason of a step that this worker took on its own weights: a later one says it."""
SAT_OUT: Final = "sat out"
"""The reason of a round that this worker asked to sit out."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """One call of `Worker.step`.

    Attributes:
        step: the round this step was, from 0: the version of the weights it started from.
        version: the version of the weights now.
        applied: this worker's gradient counted, all of it.
        reason: why it did not ("" when applied): some of the gradient was not finite, the server
            rejected some of it, it was only accumulated, LOCAL, or SAT_OUT.
        lr: the learning rate asked for.
        compute_s: the user's own time, since the step before had its weights; zeroing the gradients
            is in it.
        encode_s: from gradients to payloads handed to the link, in `step` and in backward.
        wire_s: waiting, for the network and for the other workers.
        server_s: the server's own work on the round, as it reports it, as far as it was waited for.
        decode_s: from payloads to weights.
        exposed_s: of these, what this process stood still in `step` for the network and others:
            communication that neither computing nor coding has hidden.
        left_out: the shards whose gradients were not finite, ascending; they were not pushed.
        rejected: the shards that the server did not take, ascending.
        staleness: how many rounds others were ahead when this gradient counted; 0 under bsp.
        sent_bytes: on the wire since the step before, headers and heartbeats included.
        received_bytes: likewise.
        payload_bytes: of the payloads said in this step, scales included, headers not.
        said_numel: how many values they say.
    """

    step: int
    version: int
    applied: bool
    reason: str = ""
    lr: float = 0.0
    compute_s: float = 0.0
    encode_s: float = 0.0
    wire_s: float = 0.0
    server_s: float = 0.0
    decode_s: float = 0.0
    exposed_s: float = 0.0
    left_out: tuple[int, ...] = ()
    rejected: tuple[int, ...] = ()
    staleness: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    payload_bytes: int = 0
    said_numel: int = 0

    @property
    def bits_per_value(self) -> float:
        """What a value took on average, scales included; 0 where nothing was said."""
        return 8 * self.payload_bytes / self.said_numel if self.said_numel else 0.0
