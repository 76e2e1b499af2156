"""Random schedules of pushes, losses, joins and leaves: what counts is what the verdicts say.

Every payload bears a number of its own, so it can be followed from the push into the `Reduce` that
counts it. Workers here keep the client's rules: one contribution at a time, named by the version it
was computed from, and the next one only after its verdict and the weights that it speaks of.
"""

from __future__ import annotations

import random
import struct

import pytest

from psq import layout
from psq.clock import may_apply, parse_consistency
from psq_proto.messages import NONE, MessageType, Welcome
from psq_server.state import Committed, PeerBehind, Reduce

SHARDS = 3
WORLD_SIZE = 4
STEPS = 400
SEEDS = range(20)
RULES = ("bsp", "bsp,quorum=2", "ssp:1", "ssp:3,quorum=2", "asp")
CALM_ROUNDS = 6
PACE = (8, 8, 8, 1)
"""How often each rank gets to do something: the last is a straggler."""


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(layout, "MAX_SHARD_NUMEL", 8)


class Process:
    """One worker process after another of one rank."""

    def __init__(self, game, rank):
        self.game, self.rank = game, rank
        self.resolved = NONE
        self.start()

    def start(self):
        """A process that knows of nothing takes the rank."""
        self.lineage = self.game.rng.getrandbits(64)
        self.resolved = NONE
        self.seq = None
        self.have = [NONE] * SHARDS
        self.connect(pending=NONE)

    def connect(self, *, pending):
        """A new connection; the weights that this process has stay its own."""
        self.line = self.game.job.connect(self.rank)
        self.line.join(self.lineage, self.resolved, pending)
        if self.line.take(Welcome)[0].mode == "reset":
            self.resolved, self.seq = NONE, None
        self.pull()

    def reconnect(self):
        self.absorb()
        self.connect(pending=NONE if self.seq is None else self.seq)

    def pull(self):
        self.absorb()
        if min(self.have) == NONE:
            self.line.pull()
        else:
            self.line.pull(min(self.have))
        self.absorb()

    def absorb(self):
        """Take in weights as a replica does: a delta only on top of the version before."""
        for kind, version, shard in self.line.weights:
            if version == self.have[shard] + 1 or (kind == "full" and version > self.have[shard]):
                self.have[shard] = version
        self.line.weights.clear()
        for message in self.line.heard:
            if message.header.type is MessageType.VERDICT:
                self.take_verdict(message.header, message.body)
        self.line.heard.clear()
        assert not self.line.errors, self.line.errors

    def take_verdict(self, header, verdict):
        if self.seq is None or header.seq != self.seq or self.verdict is not None:
            assert header.seq <= max(self.resolved, self.seq or 0)
            return
        if self.game.rng.random() < self.game.loss:
            return
        self.verdict = header.version
        self.resolved = self.seq
        assert header.version > self.seq or self.game.job.stop_action is not None
        self.game.check_verdict(self, verdict)
        self.game.verdicts += 1

    # ---- steps

    def step(self):
        """Do one thing that is next."""
        self.absorb()
        if self.seq is None:
            if min(self.have) > self.resolved:
                self.seq, self.verdict = min(self.have), None
                self.said, self.payloads, self.skipped = set(), {}, set()
            else:
                self.pull()
        elif self.verdict is not None:
            if min(self.have) >= self.verdict:
                self.seq = None
            else:
                self.pull()
        elif len(self.said) < SHARDS:
            self.say(self.game.rng.choice([s for s in range(SHARDS) if s not in self.said]))
        else:
            self.ask()

    def say(self, shard):
        chance = self.game.rng.random()
        if chance < self.game.trouble:
            self.line.push(shard, self.seq, body=b"misfit")
            self.payloads[shard] = None
            self.said.add(shard)
        elif chance < 2 * self.game.trouble:
            self.line.skip(self.seq, shard=shard)
            self.skipped.add(shard)
            self.said.add(shard)
        else:
            self.game.number += 1
            self.payloads[shard] = struct.pack("<Q", self.game.number)
            self.said.add(shard)
            self.push_again(shard)

    def push_again(self, shard):
        number = self.payloads[shard]
        body = b"misfit"
        if number is not None:
            body = self.line.payload(shard)
            body[-8:] = number
        self.line.push(shard, self.seq, body=body)

    def ask(self):
        """What a worker that waits does: believe STATUS, push again for a verdict that was lost."""
        self.line.beat(min(self.have))
        status = self.line.inbox[-1]
        assert not set(status.missing) & self.said or status.resolved >= self.seq
        if status.resolved >= self.seq and self.payloads:
            self.push_again(next(iter(self.payloads)))
        elif status.resolved >= self.seq:
            self.line.skip(self.seq)
        if status.version > min(self.have):
            self.pull()


class Game:
    """One job, its processes, and the ledger of what counted."""

    def __init__(self, cluster, plan_of, rule, seed):
        self.rng = random.Random(seed)  # noqa: S311 - a schedule
        self.rule = parse_consistency(rule)
        self.trouble, self.loss = 0.05, 0.1
        self.number = self.verdicts = 0
        specs = [(f"w{i}", (8,)) for i in range(SHARDS)]
        self.job = cluster(plan_of(WORLD_SIZE, specs=specs, consistency=rule), give_up_after_s=1e9)
        self.job.hold_reductions = True
        self.counted = {}
        self.seen = 0
        self.processes = [Process(self, rank) for rank in range(WORLD_SIZE)]
        self.processes[0].line.init()

    def reduce(self, at_most=1):
        for _ in range(at_most):
            if not self.job.held:
                return
            self.job.reduce(self.job.held.pop(0))

    def note_reductions(self):
        for action in self.job.done[self.seen :]:
            if isinstance(action, Reduce):
                for payload in action.payloads:
                    number = bytes(payload[-8:])
                    assert number not in self.counted, "a payload counts twice"
                    self.counted[number] = (action.round, action.shard)
            elif isinstance(action, Committed):
                for steps in action.staleness:
                    assert may_apply(0, steps, self.rule), steps
        self.seen = len(self.job.done)

    def check_verdict(self, process, verdict):
        """Each payload counts exactly as the verdict says, and in a round that it may count in."""
        self.note_reductions()
        if self.rule.kind != "bsp":
            assert "closed without it" not in verdict.reason, "who is near its bound is waited for"
        for shard, number in process.payloads.items():
            counts = verdict.outcome == "applied" and shard not in verdict.rejected
            assert (number in self.counted) == counts, (process.rank, process.seq, shard, verdict)
            if counts:
                round_, where = self.counted[number]
                assert where == shard
                assert may_apply(process.seq, round_, self.rule), (process.seq, round_)
        assert not process.skipped & set(verdict.rejected)

    def play(self):
        for _ in range(STEPS):
            (process,) = self.rng.choices(self.processes, PACE)
            chance = self.rng.random()
            if chance < 0.02:
                process.start()
            elif chance < 0.05:
                process.reconnect()
            elif chance < 0.07:
                self.job.handle(PeerBehind(process.line.name))
            elif chance < 0.08:
                process.line.leave("error", "went wrong")
                process.start()
            elif chance < 0.1 and process.seq is not None and process.payloads:
                process.push_again(self.rng.choice(list(process.payloads)))
            elif chance < 0.3:
                self.reduce()
            elif chance < 0.35:
                self.job.tick(self.rng.expovariate(1.0))
            else:
                process.step()
            self.note_reductions()

    def calm(self):
        """Without trouble everybody gets on, whatever has been."""
        self.trouble = self.loss = 0.0
        goal = self.job.version + CALM_ROUNDS
        for _ in range(200 * CALM_ROUNDS):
            for process in self.processes:
                process.step()
            self.reduce(SHARDS)
            self.job.tick(0.1)
            if self.job.version >= goal:
                return
        raise AssertionError(self.job.state.snapshot(self.job.now_s).text)


@pytest.mark.parametrize("rule", RULES)
def test_whatever_the_schedule_every_payload_counts_once_or_not_as_its_verdict_says(
    cluster, plan_of, rule
):
    verdicts, stale = 0, set()
    for seed in SEEDS:
        game = Game(cluster, plan_of, rule, seed)
        game.play()
        game.calm()
        verdicts += game.verdicts
        stale |= {steps for a in game.job.of(Committed) for steps in a.staleness}
        assert game.job.state.counts.rounds == game.job.version
    assert verdicts > len(SEEDS) * CALM_ROUNDS
    bound = parse_consistency(rule).max_staleness
    assert max(stale) == bound if bound is not None else max(stale) > 1, "the bound was not met"


def test_a_server_that_is_told_to_stop_says_of_everything_whether_it_counts(cluster, plan_of):
    stopped_within_a_round = 0
    for seed in SEEDS:
        game = Game(cluster, plan_of, "bsp", seed)
        game.loss = 0.0
        game.play()
        stopped_within_a_round += bool(game.job.world.round.closed)
        game.job.stop()
        game.job.held.clear()
        if game.job.stop_action is None:
            game.job.tick(5.0)
        assert game.job.stop_action is not None
        for process in game.processes:
            process.absorb()
            assert process.seq is None or process.verdict is not None or not process.said
    assert stopped_within_a_round
