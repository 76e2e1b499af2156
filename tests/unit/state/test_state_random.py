"""Random conversations: whatever workers, strangers, time and a slow reducer do, the rules hold."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from psq import layout
from psq.presets import preset
from psq.recipe import Aggregate
from psq_proto.errors import UsageError
from psq_proto.messages import NO_SHARD, NO_VERSION, Verdict
from psq_server.state import Judge, PeerBehind, PeerGone, Reduce, Stop

SPECS = [("big", (layout.SPLIT_NUMEL,)), ("small", (10,))]
RECIPE = preset("server-adam").with_codecs(uplink="sign")
JUDGED = dataclasses.replace(RECIPE, aggregate=Aggregate("clip"))
RANKS = st.integers(0, 2)
EXAMPLES = 60
STEPS = 50


def machine_of(cluster, plan_of, reached, recipe, consistency="bsp"):  # noqa: C901 - one class of many small rules
    """A class, because hypothesis wants one; `reached` takes the version each run got to."""

    class Conversation(RuleBasedStateMachine):
        """Three ranks; `cluster` checks every invariant after every event."""

        @initialize()
        def begin(self):
            plan = plan_of(3, specs=SPECS, recipe=recipe, consistency=consistency)
            self.job = cluster(plan, give_up_after_s=1e6)
            self.job.hold_reductions = self.job.hold_judgements = True
            self.workers = dict(enumerate(self.job.started()))

        def act(self, rank, name, *args, **fields):
            """Let a worker say something, if its own session allows it now."""
            if self.job.stop_action is not None:
                return
            try:
                getattr(self.workers[rank], name)(*args, **fields)
            except (UsageError, IndexError):
                return  # a worker would not have said it, or was not answered
            self.check_verdicts()

        def check_verdicts(self):
            for worker in self.workers.values():
                for verdict in worker.take(Verdict):
                    assert verdict.outcome == "rejected" or self.job.version > 0
                    assert verdict.rejected == () or verdict.reason

        # ---- ordinary life

        @rule(ranks=st.permutations([0, 1, 2]))
        def everybody_pushes(self, ranks):
            for rank in ranks:
                self.act(rank, "push_all")

        @rule(rank=RANKS)
        def one_pushes(self, rank):
            self.act(rank, "push_all")

        @rule(rank=RANKS, shard=st.integers(0, 1), late=st.integers(0, 2))
        def one_shard_is_pushed(self, rank, shard, late):
            self.act(rank, "push", shard, max(0, self.job.version - late))

        @rule(rank=RANKS, shard=st.sampled_from([0, 1, NO_SHARD]))
        def one_skips(self, rank, shard):
            self.act(rank, "skip", shard=shard)

        @precondition(lambda self: self.job.held)
        @rule(all_of_them=st.booleans())
        def the_reducer_works(self, all_of_them):
            self.reduce(10**6 if all_of_them else 1)

        @precondition(lambda self: self.job.unjudged)
        @rule(refused=st.sets(RANKS), weighed=st.sets(RANKS))
        def the_round_is_judged(self, refused, weighed):
            self.judge(refused, weighed)

        def judge(self, refused=(), weighed=()):
            while self.job.unjudged and self.job.stop_action is None:
                reasons = {rank: f"krum: {rank} is far" for rank in refused}
                self.job.judgement = (dict.fromkeys(weighed, 0.5), reasons)
                judge = self.job.unjudged.pop(0)
                assert judge.round == self.job.version
                assert judge.said.keys() == set(self.job.plan.due_shards(judge.round))
                self.job.judge(judge)
                self.check_judged(judge, refused, weighed)
            self.check_verdicts()

        def check_judged(self, judge, refused, weighed):
            for action in self.job.of(Reduce):
                if action.round == judge.round:
                    ranks = {one.rank for one in action.said}
                    assert not ranks & set(refused), "nothing of a refused rank is reduced"
                    assert ranks <= {one.rank for one in judge.said[action.shard]}
                    assert all(one.weight == 0.5 for one in action.said if one.rank in weighed)

        @rule(ranks=st.permutations([0, 1, 2]))
        def a_round_passes_without_trouble(self, ranks):
            for rank in ranks:
                self.act(rank, "push_all")
            self.judge()
            self.reduce(10**6)

        def reduce(self, at_most):
            for _ in range(at_most):
                if not self.job.held or self.job.stop_action is not None:
                    break
                action = self.job.held.pop(0)
                assert action.round == self.job.version
                self.job.reduce(action)
            self.check_verdicts()

        @rule(seconds=st.floats(0, 12))
        def time_passes(self, seconds):
            for rank in self.workers:
                self.act(rank, "beat", self.job.version)
            self.job.tick(seconds)

        @rule(lineage=st.integers(10, 12))
        def whoever_is_lost_comes_back(self, lineage):
            for rank, worker in self.workers.items():
                if not worker.session.joined and self.job.stop_action is None:
                    self.workers[rank] = self.job.connect(rank)
                    self.act(rank, "join", lineage, self.job.version - 1, self.job.version)
                    self.act(rank, "pull")

        # ---- trouble

        @rule(rank=RANKS, lineage=st.integers(9, 13), known=st.integers(-1, 3))
        def another_process_takes_a_rank(self, rank, lineage, known):
            if self.job.stop_action is None:
                self.workers[rank] = self.job.connect(rank)
                self.act(rank, "join", lineage, known, known)

        @rule(rank=RANKS, name=st.sampled_from(["hello", "join", "init", "leave"]))
        def one_says_something_odd(self, rank, name):
            self.act(rank, name)

        @rule(rank=RANKS, have=st.sampled_from([0, 1, 2, NO_VERSION]))
        def one_pulls(self, rank, have):
            self.act(rank, "pull", have)

        @rule(
            rank=RANKS,
            fields=st.sampled_from(
                [{"variant": 1}, {"rate": 0.2}, {"seq": 9}, {"body": b"x"}, {"round_": 99}]
            ),
        )
        def one_pushes_rubbish(self, rank, fields):
            self.act(rank, "push", 0, **fields)

        @rule(junk=st.binary(max_size=120), rank=RANKS)
        def junk_arrives(self, junk, rank):
            self.job.frame(self.workers[rank].name, junk)

        @rule(rank=RANKS, kind=st.sampled_from([PeerGone, PeerBehind]))
        def a_connection_fails(self, rank, kind):
            self.job.handle(kind(self.workers[rank].name))

        def teardown(self):
            if not hasattr(self, "job"):
                return
            reduced = [(action.round, action.shard) for action in self.job.of(Reduce)]
            assert len(reduced) == len(set(reduced)), "a shard was reduced twice in a round"
            assert all(self.job.plan.due(shard, round_) for round_, shard in reduced)
            for round_ in range(self.job.version):
                moved = {shard for r, shard in reduced if r == round_}
                assert moved == set(self.job.plan.due_shards(round_)), round_
            assert len(self.job.of(Stop)) <= 1
            judged = [action.round for action in self.job.of(Judge)]
            assert len(judged) == len(set(judged)), "a round was judged twice"
            assert bool(judged) <= recipe.whole
            if recipe.whole:
                assert {round_ for round_, _ in reduced} <= set(judged)
            reached.append(self.job.version)

    return Conversation


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(layout, "MAX_SHARD_NUMEL", layout.SPLIT_NUMEL)


def _converse(cluster, plan_of, recipe, consistency="bsp"):
    reached = []
    run_state_machine_as_test(
        machine_of(cluster, plan_of, reached, recipe, consistency),
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert max(reached) >= 2, "the conversations were too wild to get anywhere"


@pytest.mark.parametrize("every", [1, 2])
def test_no_conversation_breaks_an_invariant(cluster, plan_of, every):
    _converse(cluster, plan_of, RECIPE.with_rhythm(every=every))


@pytest.mark.parametrize("consistency", ["bsp", "bsp,quorum=2", "ssp:2,quorum=2", "asp"])
def test_no_conversation_about_judged_rounds_breaks_an_invariant(cluster, plan_of, consistency):
    _converse(cluster, plan_of, JUDGED, consistency)
