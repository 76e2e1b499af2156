"""Random lives of workers: they draw, push, skip, hang, die, come back and are replaced.

The machine's own invariants are checked after every event. Beside them stands an oracle that knows
nothing of the ledger: each process marks its payloads, so what is reduced says whose it is, and
from which data it was computed. No position counts twice in an epoch, and when an epoch is over,
every position has counted or was drawn for a contribution that was skipped as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from psq import layout
from psq.presets import preset
from psq_proto.errors import UsageError
from psq_proto.messages import MessageType
from psq_server.state import PeerGone, Reduce

SIZE, BATCH = 23, 4
SPECS = [("big", (layout.SPLIT_NUMEL,)), ("small", (10,))]
RECIPE = preset("server-adam").with_codecs(uplink="sign")
RANKS = st.integers(0, 2)
LEASE_S = 10.0
EXAMPLES = 40
STEPS = 60


@dataclass
class Process:
    """One worker process, whatever connections it has had."""

    number: int
    lineage: int
    line: object
    seq: int = -1
    said: bool = False
    resolved: int = -1
    epoch: int = 0
    drawn: dict = field(default_factory=dict)  # seq -> (epoch, positions)

    def hear(self):
        """What its connection has told it."""
        for message in self.line.heard:
            if message.header.type is MessageType.VERDICT:
                self.resolved = max(self.resolved, message.header.seq)
        self.line.heard.clear()

    @property
    def is_free(self):
        """Whether it may begin another contribution."""
        self.hear()
        return not self.said or self.resolved >= self.seq


def lives_of(cluster, plan_of, consistency, least, reached):  # noqa: C901 - one class of many small rules
    class Lives(RuleBasedStateMachine):
        """Three places."""

        @initialize()
        def begin(self):
            plan = plan_of(3, specs=SPECS, recipe=RECIPE, consistency=consistency)
            self.job = cluster(plan, min_workers=least, lease_s=LEASE_S, give_up_after_s=1e6)
            self.made, self.seen, self.counted, self.epoch = [], 0, {}, 0
            self.skipped = {}
            self.at = {r: self.process(line) for r, line in enumerate(self.job.started())}

        def process(self, line, lineage=None):
            lineage = 10 + len(self.made) if lineage is None else lineage
            self.made.append(Process(len(self.made), lineage, line))
            return self.made[-1]

        def act(self, deed):
            """Let something happen that a worker's own session may not allow now."""
            if self.job.stop_action is None:
                try:
                    deed()
                except (UsageError, IndexError):
                    return  # a worker would not have said it, or was not answered
                self.check()

        # ---- the oracle

        def check(self):
            for action in self.job.done[self.seen :]:
                if isinstance(action, Reduce):
                    for one in action.said:
                        self.count(self.made[one.payload[-1]], action.round - one.staleness)
            self.seen = len(self.job.done)
            ledger = self.job.world.ledger
            while self.epoch < ledger.epoch:
                self.end_epoch()

        def count(self, process, seq):
            epoch, positions = process.drawn.get(seq, (None, ()))
            for position in positions:
                by = self.counted.setdefault((epoch, position), (process.number, seq))
                assert by == (process.number, seq), f"position {position} of epoch {epoch} twice"

        def end_epoch(self):
            counted = {at for epoch, at in self.counted if epoch == self.epoch}
            counted |= {at for epoch, at in self.skipped if epoch == self.epoch}
            assert counted == set(range(SIZE)), (
                f"epoch {self.epoch} lost {set(range(SIZE)) - counted}"
            )
            self.epoch += 1
            reached["epoch"] = max(reached["epoch"], self.epoch)

        # ---- ordinary life

        @rule(rank=RANKS, draws=st.booleans())
        def computes(self, rank, draws):
            process = self.at[rank]
            if process is not None and process.is_free:
                process.seq, process.said = self.job.version, False
                if draws:
                    self.act(lambda: self.draw(process))

        def draw(self, process):
            answer = process.line.draw(process.seq, epoch=process.epoch, size=SIZE, batch=BATCH)
            if answer is not None and answer.state == "end":
                process.epoch = answer.epoch
            if answer is not None and answer.state == "drawn":
                positions = [at for low, high in answer.ranges for at in range(low, high)]
                held = process.drawn.setdefault(process.seq, (answer.epoch, positions))
                assert held == (answer.epoch, positions), "another answer to the same question"

        @rule(rank=RANKS)
        def pushes(self, rank):
            self.say(rank, lambda p: p.line.push_all(p.seq, variant=p.number))

        @rule(rank=RANKS, shard=st.integers(0, 1))
        def pushes_one(self, rank, shard):
            self.say(rank, lambda p: p.line.push(shard, p.seq, variant=p.number))

        @rule(rank=RANKS)
        def skips(self, rank):
            self.say(rank, self.skip)

        def skip(self, process):
            epoch, positions = process.drawn.get(process.seq, (None, ()))
            self.skipped |= dict.fromkeys([(epoch, at) for at in positions])
            process.line.skip(process.seq)

        def say(self, rank, words):
            process = self.at[rank]
            if process is not None and process.seq >= 0:
                process.said = True
                self.act(lambda: words(process))

        @rule(order=st.permutations([0, 1, 2]))
        def a_round_without_trouble(self, order):
            for rank in order:
                self.computes(rank, draws=True)
            for rank in order:
                self.pushes(rank)
            self.time_passes(0.5, silent=set())

        @rule(seconds=st.floats(0, 2 * LEASE_S), silent=st.sets(RANKS))
        def time_passes(self, seconds, silent):
            for rank, process in self.at.items():
                if process is not None and rank not in silent:
                    self.act(lambda process=process: process.line.beat(self.job.version))
            self.act(lambda: self.job.tick(seconds))

        # ---- trouble

        @rule(rank=RANKS)
        def dies(self, rank):
            process, self.at[rank] = self.at[rank], None
            if process is not None:
                self.act(lambda: self.job.handle(PeerGone(process.line.name)))

        @rule(rank=RANKS)
        def leaves(self, rank):
            process, self.at[rank] = self.at[rank], None
            if process is not None:
                self.act(lambda: process.line.leave("interrupted"))

        @rule(rank=RANKS)
        def another_takes_the_place(self, rank):
            line = self.job.connect(rank)
            self.at[rank] = self.process(line)
            self.act(lambda: line.join(lineage=self.at[rank].lineage))
            self.act(line.pull)

        @rule(rank=RANKS, told=st.booleans())
        def comes_back(self, rank, told):
            """The same process over another connection; the server may not know that yet."""
            process = self.at[rank]
            if process is None:
                return
            process.hear()
            if told:
                self.act(lambda: self.job.handle(PeerGone(process.line.name)))
            process.line = self.job.connect(rank)
            pending = process.seq if process.said and process.resolved < process.seq else -1
            known = {"last_resolved": process.resolved, "pending": pending}
            self.act(lambda: process.line.join(lineage=process.lineage, **known))
            self.act(process.line.pull)

        def teardown(self):
            if hasattr(self, "job"):
                reached["version"] = max(reached["version"], self.job.version)
                reached["evicted"] = max(reached["evicted"], self.job.state.counts.evicted)
                if self.job.stop_action is None:
                    self.recover()

        def recover(self):
            """Whatever has happened: three fresh workers make rounds and end the epoch."""
            for rank in range(3):
                self.another_takes_the_place(rank)
            before = (self.job.version, self.epoch)
            for _ in range(3 * (SIZE // BATCH + 2)):
                self.a_round_without_trouble([0, 1, 2])
            assert self.job.stop_action is None
            assert self.job.version >= before[0] + 3, "rounds go on"
            assert self.epoch > before[1], "the epoch ends"

    return Lives


@pytest.mark.parametrize("least", [1, 2])
@pytest.mark.parametrize("consistency", ["bsp", "bsp,quorum=2", "ssp:1", "asp"])
def test_whoever_comes_and_goes_no_data_are_lost_or_counted_twice(
    cluster, plan_of, consistency, least
):
    reached = {"version": 0, "epoch": 0, "evicted": 0}
    run_state_machine_as_test(
        lives_of(cluster, plan_of, consistency, least, reached),
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert reached["version"] >= 5, "the rules made some rounds"
    assert reached["epoch"] >= 2
    assert reached["evicted"] >= 1
