"""Replicas: ranks that compute the same, of whom a round needs one (aggregate "coded").

    group 0   rank 0   says round 5                    the group's word for round 5
              rank 1   says round 3, two rounds late   held against the word of round 3: the same

The word of a group for a shard is what its spokesman said of it: the lowest of its warm members
that had said it when all groups were covered. That alone goes to the reducer. A rank is warm as
long as it is known to hold the residual that belongs to its group's words:

- it is from the start, if it came before the first round ended (which waits for all ranks);
- it stays so by saying every round, in order, the bytes of its group's word, up to MAX_LAG rounds
  late: then it is told "applied", as its twin was, and goes on with the next version;
- it is cold from then on if it says other bytes, leaves a round out, is later than that, or is
  another process than before. It is told "applied" too, if it is not too late: the group's word
  stands for what it said.

A group waits for its warm members, however late; a cold one is no cover. If none of them is there
any more (they left, or were silent for a lease), the lowest cold member that has said a shard
speaks from then on, and is warm, and nobody else is: the residual of the others is lost, as with
any worker that is restarted. If nobody of a group is there, the job ends and names it.

In a tree a server knows the groups of its own leaves, whole ones, and an aggregator below it is a
group of one: of what that adds up each group has had its word already (`groups_of`).

Bookkeeping and rules; what is sent because of it is decided in `rounds` and `training`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, Final

from psq.rules.coded import MAX_LAG
from psq_server.state.branches import Branches
from psq_server.state.round import Contribution

__all__ = ["MAX_LAG", "NOTHING", "Replicas", "groups_of"]

NOTHING: Final = -1
"""The word of a group that skips a shard; others are checksums."""


class Replicas:
    """See the module's docstring.

    Args:
        groups: the ranks of each, see `groups_of`.

    Attributes:
        late: of ranks that are behind, what they have said of the round that they are at.
        cooled: ranks that were found cold, with the reason; the owner takes them out to log them.
    """

    def __init__(self, groups: Iterable[tuple[int, ...]]) -> None:
        self.groups = tuple(groups)
        self.late: dict[int, Contribution] = {}
        self.cooled: list[tuple[int, str]] = []
        self._group = {rank: at for at, ranks in enumerate(self.groups) for rank in ranks}
        self._next: dict[int, int] = {}
        self._words: dict[int, dict[tuple[int, int], int]] = {0: {}}

    def group(self, rank: int) -> int:
        """The group of a rank."""
        return self._group[rank]

    def is_warm(self, rank: int) -> bool:
        """Whether this rank holds its group's residual."""
        return rank in self._next

    def is_in_time(self, rank: int, number: int) -> bool:
        """Whether a warm rank is at this round."""
        return self._next.get(rank) == number

    def warm(self, rank: int) -> None:
        """This rank begins with the group's residual: nobody has one yet."""
        self._next[rank] = 0

    def cool(self, rank: int, reason: str) -> None:
        """This rank's residual is not its group's, from now on."""
        if self._next.pop(rank, None) is not None:
            self.cooled.append((rank, reason))

    def promote(self, rank: int, number: int) -> None:
        """This rank speaks for its group from this round on, with the residual it has."""
        for other in self.groups[self.group(rank)]:
            if other != rank:
                self.cool(other, f"rank {rank} speaks for the group with a residual of its own")
        self._next[rank] = number

    # ---- what outlives the server

    def capture(self) -> list[object]:
        """Who is warm, where, and the words that are kept. A late round is said again."""
        words = {
            number: [[*key, word] for key, word in kept.items()]
            for number, kept in self._words.items()
        }
        return [dict(self._next), words]

    def restore(self, plain: Sequence[Any]) -> None:
        """Take what was captured."""
        following, words = plain
        self._next = dict(following)
        self._words = {
            number: {(group, shard): word for group, shard, word in kept}
            for number, kept in words.items()
        }

    # ---- words

    def settle(self, rank: int, number: int, shard: int, word: int) -> None:
        """The spokesman's word stands for the group."""
        self._words[number][self.group(rank), shard] = word

    def knows(self, number: int) -> bool:
        """Whether a round is so recent that its words are kept."""
        return number in self._words

    def compare(self, rank: int, number: int, shard: int, word: int) -> None:
        """A rank says what its group's word is already; if it says another, it is cold."""
        known = self._words[number].get((self.group(rank), shard))
        if not self.is_in_time(rank, number):
            self.cool(rank, f"it said round {number} next, and not {self._next.get(rank)}")
        elif known is not None and known != word:
            self.cool(rank, f"it said other bytes of shard {shard} in round {number}")

    def said(self, rank: int, number: int) -> None:
        """A rank has said all of a round."""
        if self.is_in_time(rank, number):
            self._next[rank] = number + 1
        self.late.pop(rank, None)

    def begin_round(self, number: int) -> list[int]:
        """A new round; whoever is later than the words is cold. Returns who was saying such one."""
        self._words[number] = {}
        oldest = number - MAX_LAG
        for old in [known for known in self._words if known < oldest]:
            del self._words[old]
        for rank in [rank for rank, at in self._next.items() if at < oldest]:
            self.cool(rank, f"it is more than {MAX_LAG} rounds behind")
        return [rank for rank, mine in self.late.items() if mine.base < oldest]

    def forget(self, rank: int, reason: str) -> None:
        """Another process speaks for this rank."""
        self.cool(rank, reason)
        self.late.pop(rank, None)

    def spokesman(
        self, group: int, number: int, sayers: Collection[int], there: Collection[int]
    ) -> int | None:
        """Who speaks for a group of a shard in the open round; None while it is to be waited for.

        Args:
            group: which.
            number: the open round.
            sayers: the ranks that have said the shard.
            there: the ranks that are there.
        """
        members = self.groups[group]
        warm = [rank for rank in members if self.is_warm(rank) and rank in there]
        for rank in warm:
            if rank in sayers and self.is_in_time(rank, number):
                return rank
        if warm:
            return None
        return next((rank for rank in members if rank in sayers and rank in there), None)


def groups_of(
    world_size: int, replicas: int, branches: Branches | None
) -> Iterable[tuple[int, ...]]:
    """The groups of those that speak to a server, ascending; see the module's docstring.

    Args:
        world_size: how many leaves the job has.
        replicas: how many of them, one after another, make a group.
        branches: who speaks to this server, in a tree; None: every rank for itself.
    """
    if branches is None:
        speakers = [(rank, False) for rank in range(world_size)]
    else:
        speakers = [(branch.rank, branch.is_aggregator) for branch in branches.items]
    found: dict[tuple[bool, int], list[int]] = {}
    for rank, is_aggregator in speakers:
        key = rank if is_aggregator else rank // replicas
        found.setdefault((is_aggregator, key), []).append(rank)
    return [tuple(ranks) for ranks in found.values()]
