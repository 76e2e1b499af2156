"""Aggregates that a minority of hostile workers cannot move far: f of n are hostile, or absent.

    median         of each value over the messages                    any f < n / 2
    trimmed-mean   of each value, without its f largest and smallest  n >= 2 f + 1
    krum           the m messages with the smallest scores, averaged  n >= 2 f + 3
                   score_i = sum of |d_i - d_j|^2 over the n - f - 2 nearest j; m <= n - f - 2
    clip           mean of  d_i min(1, norm / |d_i|)                  bounds what one worker can do

After Yin 2018 (median, trimmed mean) and Blanchard 2017 (Krum; m > 1 is Multi-Krum). Median and
trimmed mean work on windows of a few thousand values that are decoded for every worker, sorted by a
network of minima and maxima, and forgotten: memory is n windows. Krum and clip look at whole
messages before anything is reduced; distances are those of `psq.rules.packed`, which sign payloads
give without being decoded. A shard that a worker left out counts as zeros in its distances.

Every worker counts once here, whatever weight it asks for: a weight is one more thing to lie about.
The result is a function of the messages, not of the order in which they came or of who sent which.
n is the job's workers. Who says nothing is one of the f: nothing is promised with more than f
absent, and trimmed mean and Krum refuse such a round, all of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from psq.errors import ConfigError
from psq.kernels import Floats
from psq.rules.base import AggregateRule, Judgement, RoundView, Said
from psq.rules.packed import distances
from psq.rules.windows import Windows

__all__ = ["Clip", "Krum", "Median", "TrimmedMean", "round_distances", "scaled_sum"]

Comparator = tuple[int, int]

HALF: Final = np.float32(0.5)


# ---- value by value ------------------------------------------------------------------------------


class Median(AggregateRule):
    """The middle value, or the mean of the two in the middle."""

    def combine(self, shard: int, said: Sequence[Said], out: Floats) -> None:
        """Write the median of each value to out, f32[shard.numel].

        Cost: one decode of each message, and about n log2(n)^2 / 4 passes over cached windows.
        """
        low, high = (len(said) - 1) // 2, len(said) // 2
        for at, rows in self._sorted(shard, said, low, high):
            if low == high:
                out[at] = rows[low]
            else:
                np.add(rows[low], rows[high], out=out[at])
                np.multiply(out[at], HALF, out=out[at])

    def _sorted(
        self, shard: int, said: Sequence[Said], low: int, high: int
    ) -> Iterator[tuple[slice, list[Floats]]]:
        """Windows of all messages; of each value the low-th to high-th smallest are in place."""
        messages = [(one.codec, one.payload) for one in said]
        network = _network(len(said), low, high)
        for at, table in Windows(self.cut(shard)).rows(messages):
            np.add(
                table, np.float32(0.0), out=table
            )  # no -0.0: which zero is less depends on order
            yield at, _sort_rows(table, network)


class TrimmedMean(Median):
    """The mean of what is left without the f largest and f smallest of each value."""

    whole: ClassVar[bool] = True  # only to count a round's messages before any shard is reduced

    def setup(self) -> None:  # noqa: D102 - as the base class
        self._hostile = int(self.options["f"])
        _check_count("trimmed-mean", self.world_size, self._hostile, 2 * self._hostile + 1)

    def judge(self, round: RoundView) -> Mapping[int, Judgement]:  # noqa: A002 - the field's word
        """Refuse a round with fewer than n - f messages; all weights are 1."""
        few = _too_few("trimmed-mean", round, self.world_size, self._hostile)
        return few or {rank: Judgement() for rank in round.ranks}

    def combine(self, shard: int, said: Sequence[Said], out: Floats) -> None:
        """Write the trimmed mean of each value to out, f32[shard.numel]; cost as the median.

        Of too few for f on each side it is the median: the absent are of the f.
        """
        cut = min(self._hostile, (len(said) - 1) // 2)
        low, high = cut, len(said) - 1 - cut
        for at, rows in self._sorted(shard, said, low, high):
            out[at] = rows[low]
            for row in rows[low + 1 : high + 1]:
                np.add(out[at], row, out=out[at])
            np.multiply(out[at], np.float32(1.0 / (high - low + 1)), out=out[at])


def _sort_rows(table: Floats, network: Sequence[Comparator]) -> list[Floats]:
    """Rows of a table after a network's comparisons: the table is written."""
    rows = list(table)
    spare = np.empty(table.shape[1], np.float32)
    for i, j in network:
        np.minimum(rows[i], rows[j], out=spare)
        np.maximum(rows[i], rows[j], out=rows[j])
        rows[i], spare = spare, rows[i]
    return rows


@cache
def _network(count: int, low: int, high: int) -> tuple[Comparator, ...]:
    """Comparisons that bring the low-th to high-th smallest of `count` in place.

    Batcher's merge exchange, for any count, without the comparisons that those places do not need.
    """
    needed, kept = set(range(low, high + 1)), []
    for i, j in reversed(list(_merge_exchange(count))):
        if i in needed or j in needed:
            needed |= {i, j}
            kept.append((i, j))
    return tuple(reversed(kept))


def _merge_exchange(count: int) -> Iterator[Comparator]:
    """Knuth's algorithm M (volume 3, 5.2.2)."""
    top = 1 << max(count - 1, 0).bit_length() >> 1
    p = top
    while p > 0:
        q, r, d = top, 0, p
        while True:
            yield from ((i, i + d) for i in range(count - d) if i & p == r)
            if q == p:
                break
            q, r, d = q >> 1, p, q - p
        p >>= 1


# ---- message by message --------------------------------------------------------------------------


class Krum(AggregateRule):
    """The mean of the m messages that lie closest to their n - f - 2 nearest."""

    whole: ClassVar[bool] = True

    def setup(self) -> None:  # noqa: D102 - as the base class
        self._hostile = int(self.options["f"])
        self._chosen = int(self.options["m"])
        self._neighbours = self.world_size - self._hostile - 2
        _check_count("krum", self.world_size, self._hostile, 2 * self._hostile + 3)
        if not 1 <= self._chosen <= self._neighbours:
            msg = (
                f"krum with f={self._hostile} cannot choose m={self._chosen} of {self.world_size} "
                f"workers: m is 1 to {self._neighbours}"
            )
            raise ConfigError(msg)

    def judge(self, round: RoundView) -> Mapping[int, Judgement]:  # noqa: A002 - the field's word
        """Refuse all but the m best of a round. Cost: `psq.rules.packed.distances`, each shard."""
        few = _too_few("krum", round, self.world_size, self._hostile)
        if few:
            return few
        scores = _krum_scores(round_distances(round), self._neighbours)
        order = sorted(range(len(scores)), key=lambda i: (scores[i], round.ranks[i]))
        taken, refused = order[: self._chosen], order[self._chosen :]
        verdicts = {round.ranks[i]: Judgement() for i in taken}
        for i in refused:
            reason = (
                f"krum: the message's score is {scores[i]:.4g}, the {self._chosen} smallest of "
                f"{len(order)} are taken, up to {scores[taken[-1]]:.4g}"
            )
            verdicts[round.ranks[i]] = Judgement(0.0, reason)
        return verdicts


class Clip(AggregateRule):
    """The mean of messages none of which is longer than `norm`; what is cut off is lost."""

    whole: ClassVar[bool] = True

    def setup(self) -> None:  # noqa: D102 - as the base class
        self._norm = float(self.options["norm"])
        if not (math.isfinite(self._norm) and self._norm > 0.0):
            msg = f"clip to a norm of {self._norm!r}: it must be finite and above 0"
            raise ConfigError(msg)

    def judge(self, round: RoundView) -> Mapping[int, Judgement]:  # noqa: A002 - the field's word
        """Weigh each message so that it is no longer than `norm`. Cost: a decode of all."""
        return {rank: self._judge(math.sqrt(_squared_norm(round, rank))) for rank in round.ranks}

    def _judge(self, norm: float) -> Judgement:
        if not math.isfinite(norm):
            return Judgement(0.0, f"clip: the message's norm is {norm}: it cannot be clipped")
        return Judgement(min(1.0, self._norm / norm) if norm else 1.0)

    def combine(self, shard: int, said: Sequence[Said], out: Floats) -> None:
        """Write the clipped messages' mean: weights shrink them, the count divides."""
        del shard
        scaled_sum(said, out)


def scaled_sum(said: Sequence[Said], out: Floats) -> None:
    """Write the sum of weight * message / number of messages, in their order, to out.

    Not the weighted mean, which would divide the weights away again. Scratch of one shard.
    """
    part = np.empty(out.size, np.float32)
    out.fill(0.0)
    for one in said:
        one.codec.decode(one.payload, part)
        np.multiply(part, np.float32(one.weight / len(said)), out=part)
        np.add(out, part, out=out)


def round_distances(round: RoundView) -> NDArray[np.float64]:  # noqa: A002 - the field's word
    """Squared distances between a round's whole messages, in the order of its ranks: f64[n, n]."""
    total = np.zeros((len(round.ranks), len(round.ranks)))
    for shard in round.shards:
        said = [round.payload(rank, shard) for rank in round.ranks]
        cut = next((one[0].shard for one in said if one is not None), None)
        if cut is not None:
            total += distances(cut, said)
    total[np.isnan(total)] = np.inf  # as far away as can be, and sorted like it
    return total


def _krum_scores(apart: NDArray[np.float64], neighbours: int) -> list[float]:
    """Sum of each one's squared distances to its nearest neighbours."""
    others = apart + np.diag(np.full(len(apart), np.inf))
    others.sort(axis=1)
    scores: list[float] = others[:, :neighbours].sum(axis=1).tolist()
    return scores


def _squared_norm(round: RoundView, rank: int) -> float:  # noqa: A002 - the field's word
    total = 0.0
    for shard in round.shards:
        said = round.payload(rank, shard)
        if said is not None:
            total += float(distances(said[0].shard, [said, None])[0, 1])
    return total


# ---- how many there must be ----------------------------------------------------------------------


def _check_count(name: str, workers: int, hostile: int, least: int) -> None:
    if hostile < 0 or workers < least:
        msg = (
            f"{name} with f={hostile} needs {least} workers or more, there are {workers}: "
            "lower f or start more"
        )
        raise ConfigError(msg)


def _too_few(name: str, round: RoundView, workers: int, hostile: int) -> dict[int, Judgement]:  # noqa: A002
    """All refused, if more than f are absent; else nothing."""
    if len(round.ranks) >= workers - hostile:
        return {}
    reason = (
        f"too-few: {name} with f={hostile} needs {workers - hostile} messages of {workers} "
        f"workers, this round has {len(round.ranks)}: raise the quorum, or f"
    )
    return {rank: Judgement(0.0, reason) for rank in round.ranks}
