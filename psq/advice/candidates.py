"""What a job may run instead of dense gradients: recipes with codecs, and what is known of each.

By default only those are candidates that keep Adam on the server and say no less than server-adam
does, 4 bits up and 3 down: how little is lost with it is measured (docs/results.md), and the others
round more finely in both directions. Fewer bits have to be asked for. shared-adam, the default, is
not among them: its messages change with the round, and its cost is not modelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from psq.codec import ShardCodec, get_codec
from psq.plan import Plan
from psq.presets import preset
from psq.recipe import AdamConfig, Recipe
from psq_proto.frames import HEADER_BYTES

__all__ = [
    "CAUTION",
    "DEFAULT_MIN_BITS",
    "DENSE",
    "FRAMING_BYTES",
    "Candidate",
    "Specs",
    "candidates",
    "message_bytes",
    "plan_of",
]

Specs = Sequence[tuple[str, Sequence[int]]]

DEFAULT_MIN_BITS: Final = 3
FRAMING_BYTES: Final = HEADER_BYTES + 9  # of psq's frame, and of ZeroMQ's long one
CAUTION: Final = (
    "One bit showed no loss beyond noise on an image network and a clear one on a transformer: "
    "compare with server-adam on your model."
)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One choice.

    Attributes:
        name: in a table.
        recipe: by name.
        uplink: codec of the pushes; None: the recipe's.
        downlink: of the answers, with its kind; None: the recipe's.
    """

    name: str
    recipe: str
    uplink: str | None = None
    downlink: str | None = None

    @property
    def flags(self) -> str:
        """What to type for it."""
        words = [f"--recipe {self.recipe}"]
        words += [f"--uplink {self.uplink}"] if self.uplink else []
        words += [f"--downlink {self.downlink}"] if self.downlink else []
        return " ".join(words)

    @property
    def bits(self) -> tuple[int, int]:
        """Bits per value up and down, without scales."""
        recipe = self.make()
        return get_codec(recipe.uplink.codec).bits, get_codec(recipe.downlink.codec).bits

    def make(self, adam: AdamConfig | None = None) -> Recipe:
        """The recipe itself, exactly as its flags make it."""
        made = preset(self.recipe, adam)
        return made.with_codecs(uplink=self.uplink, downlink=self.downlink)


DENSE: Final = Candidate("fp32", "fp32")
_ALL: Final = (
    DENSE,
    Candidate("bf16", "fp32", "bf16", "delta:bf16"),
    Candidate("8 bits", "server-adam", "uniform:bits=8", "delta:uniform:bits=8"),
    Candidate("8 + 4 bits", "server-adam", "uniform:bits=8", "delta:uniform:bits=4"),
    Candidate("4 + 3 bits", "server-adam"),
    Candidate("4 + 1 bits", "server-adam", "log:k=6,block=256", "delta:sign"),
    Candidate("qadam-1bit", "qadam-1bit"),
)


def candidates(min_bits: int = DEFAULT_MIN_BITS) -> tuple[Candidate, ...]:
    """Those that say at least so many bits per value each way, the most exact first."""
    return tuple(each for each in _ALL if min(each.bits) >= min_bits)


def plan_of(candidate: Candidate, specs: Specs, workers: int, servers: int) -> Plan:
    """The job that a candidate would be.

    Raises:
        ConfigError: the model is too small for so many servers, or has nothing to train.
    """
    return Plan.of(specs, candidate.make(), workers, servers=servers)


def message_bytes(plan: Plan) -> tuple[int, int]:
    """Bytes of one worker's pushes of a step, and of the answers, headers included."""
    shards, recipe = plan.layout.shards, plan.recipe
    up, down = (
        sum(ShardCodec(get_codec(spec), shard).nbytes + FRAMING_BYTES for shard in shards)
        for spec in (recipe.uplink.codec, recipe.downlink.codec)
    )
    return up, down
