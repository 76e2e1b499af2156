"""As many bits as a gradient's norm is worth within a budget: DQ-SGD (2107.14575 [read]).

    B = round(log2(k a^((N - t) / 2) ||c|| + 1) + 1)        of a shard's message c, at its turn t

k is one number for all shards of a worker: a layer of twice the norm gets a bit more, and so does a
step of twice the norm. It is found anew at the beginning of each step: with it, all values that are
still to be said would cost what is left of the budget, if the norms stayed what they have been on
average (`bit_budget`). N turns within the budget of `bits` N numel is exact: as much as the least
bits of all turns to come is never spent, so not a bit more goes out than the budget has. What the
scales cost (32 / block bits a value) is not counted.

With `steps` 0 there is no end: the budget is `bits` for each value that is said, and a step may
draw ahead what the next HORIZON steps can give back. Turns after the last of N are said in the
least bits.

A worker's messages alone decide, and nothing but them, so that a worker which resumes with its
state chooses as it would have. Cost: the norms (`norms`: one read of message and residual), and 31
evaluations of the closed form over all shards in a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from psq.codec import ShardCodec
from psq.errors import ConfigError
from psq.kernels import Floats, Residual
from psq.layout import Layout
from psq.rules.base import ChoiceRule, RuleOptions
from psq.rules.bit_budget import Doubles, bits_of, solve
from psq.rules.norms import ShardNorm

__all__ = ["HORIZON", "Dynamic"]

HORIZON: Final = 100.0  # steps
DECAY: Final = 0.95  # of a shard's norms: some twenty steps count
MOMENTS: Final = 32  # of the future at which a changing weight of norms is looked at
_SPENT, _SAID, _LOG_K, _SOLVED = range(4)


class Dynamic(ChoiceRule):
    """Bits by norms, within a budget.

    Args:
        options: bits, steps, norm ("l2" or "max"), contraction (a; 1 where nothing is forgotten),
            least and most.
        codecs: as of every choice.
        layout: the cut.

    Raises:
        ConfigError: the options do not go together.
    """

    def __init__(self, options: RuleOptions, *, codecs: Sequence[str], layout: Layout) -> None:
        super().__init__(options, codecs=codecs, layout=layout)
        self._bits, self._steps = float(options["bits"]), int(options["steps"])
        self._log_a = math.log2(float(options["contraction"])) / 2
        if self._log_a < 0.0 and self._steps == 0:
            msg = "choice=dq with contraction < 1 needs the number of steps: set choice.steps"
            raise ConfigError(msg)
        count = len(layout.shards)
        self._numels = np.array([shard.numel for shard in layout.shards], np.float64)
        self._least = np.zeros(count)
        self._widths: list[dict[int, int]] = [{}] * count  # bits -> number of the codec
        self._norms: list[ShardNorm] = []
        self._ledger = np.array([0.0, 0.0, np.nan, -1.0])  # bits, values, log2 k, the turn it is of
        self._turns, self._sums, self._weights = (np.zeros(count) for _ in range(3))

    def bind(self, codecs: Sequence[Sequence[ShardCodec]]) -> None:
        """Learn what each shard may be written in: several codecs of other bits."""
        kind, limits = str(self.options["norm"]), (self.options["least"], self.options["most"])
        for shard, each in enumerate(codecs):
            by_bits = {codec.codec.bits: index for index, codec in enumerate(each)}
            asked = range(int(limits[0]), int(limits[1]) + 1)
            self._widths[shard] = {bits: i for bits, i in by_bits.items() if bits in asked}
            self._least[shard] = min(self._widths[shard])
        if (self._least > self._bits).any():
            msg = (
                f"choice=dq with bits={self._bits:g}: {each[0].codec.spec!r} has at least "
                f"{self._least.max():g}; set choice.bits higher, or choice.least lower"
            )
            raise ConfigError(msg)
        self._norms = [ShardNorm(kind, each[0]) for each in codecs]

    def measure(self, shard: int, message: Floats, residual: Residual | None) -> float:  # noqa: D102
        return self._norms[shard].of(message, residual)

    def choose(self, shard: int, t: int, norm: Callable[[], float]) -> int:  # noqa: D102
        del t  # a worker that was away has not spent what others have
        widths, size = self._widths[shard], norm()
        turn = self._turns[shard] + 1
        if self._ledger[_SOLVED] < turn:
            self._ledger[_LOG_K], self._ledger[_SOLVED] = self._log_k(), turn
        wanted = self._wanted(size, turn)
        allowed = self._allowed(shard) / self._numels[shard]
        bits = min(
            (width for width in widths if width <= max(allowed, min(widths))),
            key=lambda width: (abs(width - wanted), -width),
        )
        self._take(shard, size, bits)
        return widths[bits]

    def state_arrays(self) -> dict[str, NDArray[Any]]:  # noqa: D102
        return {
            "ledger": self._ledger,
            "turns": self._turns,
            "sums": self._sums,
            "weights": self._weights,
        }

    def _wanted(self, size: float, turn: float) -> float:
        """Bits by the closed form; the budget's, where nothing is known yet."""
        log_k = float(self._ledger[_LOG_K])
        if math.isnan(log_k):
            return self._bits
        if not math.isfinite(size):  # will not be said, or refused
            return 0.0
        return float(bits_of(log_k + self._log_a * (self._steps - turn), np.array(size)))

    def _take(self, shard: int, size: float, bits: int) -> None:
        self._turns[shard] += 1
        self._ledger[_SPENT] += bits * self._numels[shard]
        self._ledger[_SAID] += self._numels[shard]
        if math.isfinite(size):
            self._sums[shard] = DECAY * self._sums[shard] + (1 - DECAY) * size
            self._weights[shard] = DECAY * self._weights[shard] + (1 - DECAY)

    # ---- the budget

    def _to_come(self) -> Doubles:
        """How many turns each shard has left to plan for."""
        if self._steps == 0:
            return np.full(self._numels.size, HORIZON)
        return np.maximum(self._steps - self._turns, 0.0)

    def _left(self) -> float:
        """Bits left for them."""
        if self._steps == 0:
            values = self._ledger[_SAID] + HORIZON * self._numels.sum()
        else:
            values = self._steps * self._numels.sum()
        return float(self._bits * values - self._ledger[_SPENT])

    def _allowed(self, shard: int) -> float:
        """Bits that a shard's turn may cost, if all the others to come had the least."""
        others = float(np.sum(self._to_come() * self._least * self._numels))
        own = (
            self._least[shard] if self._steps > 0 else self._bits
        )  # without an end it earns its own
        return self._left() - others + float(own * self._numels[shard])

    def _log_k(self) -> float:
        """K from what is left and the norms so far; NaN before there are any."""
        known = self._weights > 0.0
        values = self._numels * self._to_come()
        if not known.any():
            return math.nan
        budget = self._left() - self._bits * float(values[~known].sum())
        norms = self._sums[known] / self._weights[known]
        if self._log_a < 0.0:
            turns = np.linspace(self._turns.min() + 1, max(self._steps, 1), MOMENTS)
            norms = norms[:, None] * np.exp2(self._log_a * (self._steps - turns))
        limits = (float(self._least.min()), float(max(map(max, self._widths))))
        return solve(norms, values[known], budget, limits=limits)
