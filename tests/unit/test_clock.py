"""psq.clock: closing, staleness and deadlines as functions, and a job that keeps to them."""

from __future__ import annotations

import random
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psq.clock import (
    BSP,
    DEADLINE_SAMPLES,
    LEAST_MAD,
    MAX_MADS,
    MAX_QUORUM,
    MAX_STALENESS,
    MIN_SAMPLES,
    Consistency,
    closes,
    deadline,
    may_apply,
    members,
    parse_consistency,
)
from psq.errors import ConfigError

MADS = st.integers(0, 10**9).map(lambda millionths: millionths / 1e6)
QUORUM = st.integers(1, MAX_QUORUM)
CONSISTENCIES = st.one_of(
    st.just(BSP),
    st.just(Consistency("asp", None, 1)),
    st.builds(Consistency, st.just("bsp"), st.just(0), QUORUM, MADS),
    st.builds(Consistency, st.just("ssp"), st.integers(1, MAX_STALENESS), QUORUM, MADS),
)


# ---- the text


@given(CONSISTENCIES)
def test_every_consistency_is_read_back_from_its_text(consistency):
    assert parse_consistency(consistency.text) == consistency


@pytest.mark.parametrize(
    ("text", "canonical", "made"),
    [
        ("bsp", "bsp", BSP),
        ("asp", "asp", Consistency("asp", None, 1)),
        ("ssp:04", "ssp:4", Consistency("ssp", 4, 1)),
        ("ssp:1,quorum=1,mads=6.0", "ssp:1", Consistency("ssp", 1, 1)),
        ("ssp:1000,quorum=3", "ssp:1000,quorum=3", Consistency("ssp", 1000, 3)),
        ("bsp,quorum=4096", "bsp,quorum=4096", Consistency("bsp", 0, 4096)),
        ("bsp,quorum=3,mads=2.50", "bsp,quorum=3,mads=2.5", Consistency("bsp", 0, 3, 2.5)),
        ("ssp:2,mads=0", "ssp:2,mads=0", Consistency("ssp", 2, 1, 0.0)),
        ("ssp:2,mads=1000", "ssp:2,mads=1000", Consistency("ssp", 2, 1, MAX_MADS)),
    ],
)
def test_texts_mean_what_they_say(text, canonical, made):
    assert parse_consistency(text) == made
    assert made.text == canonical


@pytest.mark.parametrize(
    "text",
    [
        *("", "bsp ", "BSP", "sync", "bsp:0", "bsp:1"),
        *("asp:3", "asp,quorum=1", "asp,quorum=2", "asp,mads=6", "asp,mads=7"),
        *("ssp", "ssp:", "ssp:0", "ssp:1001", "ssp:-1", "ssp:1.5", "ssp:1_0", "ssp:²", "ssp:٣"),
        *("bsp,quorum=0", "bsp,quorum=00", "bsp,quorum=4097", "bsp,quorum=", "bsp,mads=7"),
        *("ssp:2,mads=", "ssp:2,mads=-1", "ssp:2,mads=1001", "ssp:2,mads=nan", "ssp:2,mads=1e2"),
        *("ssp:2,mads=6,quorum=2", "ssp:2,quorum=2,quorum=3", "ssp:2\n", "ssp:2,", "bsp,ssp:2"),
    ],
)
def test_a_text_that_names_no_consistency_is_answered_with_the_grammar(text):
    with pytest.raises(ConfigError, match=r"consistency must be bsp\[,quorum=Q\].*; got"):
        parse_consistency(text)


@given(st.text(max_size=40) | st.from_regex(r"\A(bsp|ssp|asp)[:,=a-z0-9.]{0,30}"))
def test_any_text_gives_a_consistency_or_a_config_error(text):
    try:
        made = parse_consistency(text)
    except ConfigError:
        return
    assert parse_consistency(made.text) == made


@pytest.mark.parametrize(
    "fields",
    [
        ("bsp", 1),
        ("bsp", None),
        ("ssp", 0, 1),
        ("ssp", None, 1),
        ("ssp", MAX_STALENESS + 1, 1),
        ("ssp", 1, 0),
        ("asp", 3, 1),
        ("asp", None, 0),
        ("asp", None, 2),
        ("bsp", 0, -1),
        ("bsp", 0, MAX_QUORUM + 1),
        ("bsp", 0, 1, float("nan")),
        ("bsp", 0, 1, -0.5),
        ("bsp", 0, 0, 7.0),
        ("asp", None, 1, 7.0),
        ("other", 0),
    ],
)
def test_a_consistency_that_no_job_can_run_cannot_be_made(fields):
    with pytest.raises(ConfigError):
        Consistency(*fields)


def test_only_plain_bsp_lets_a_shard_go_before_its_round_closes():
    eager = [parse_consistency(text).eager for text in ("bsp", "bsp,quorum=1", "ssp:1", "asp")]
    assert eager == [True, False, False, False]


# ---- members and staleness


def test_every_rank_is_a_member_until_it_has_finished():
    assert members(range(3), finished=(), contributed=()) == (0, 1, 2)
    assert members(range(3), finished={1}, contributed=()) == (0, 2)


def test_what_a_finished_rank_has_said_still_counts():
    assert members(range(3), finished={1, 2}, contributed={1}) == (0, 1)


@pytest.mark.parametrize(
    ("text", "base", "round_", "may"),
    [
        ("bsp", 5, 5, True),
        ("bsp", 4, 5, False),
        ("bsp,quorum=1", 4, 5, False),
        ("ssp:2", 3, 5, True),
        ("ssp:2", 2, 5, False),
        ("asp", 0, 10**9, True),
        ("asp", 6, 5, False),
        ("ssp:2", 6, 5, False),
    ],
)
def test_a_contribution_counts_up_to_the_bound_and_never_from_the_future(text, base, round_, may):
    assert may_apply(base, round_, parse_consistency(text)) is may


# ---- closing


def shut(text, complete, bases, *, round_=5, overdue=False):
    ranks = range(len(bases))
    known = {rank: base for rank, base in enumerate(bases) if base is not None}
    consistency = parse_consistency(text)
    return closes(ranks, complete, known, round=round_, consistency=consistency, overdue=overdue)


@pytest.mark.parametrize("text", ["bsp", "bsp,quorum=2", "ssp:3", "asp"])
def test_a_round_closes_when_every_member_is_complete(text):
    assert shut(text, {0, 1, 2, 9}, (5, 5, 5))


@pytest.mark.parametrize("text", ["bsp", "bsp,quorum=2", "ssp:3", "asp"])
@pytest.mark.parametrize("overdue", [False, True])
def test_a_round_never_closes_with_nobody_in_it(text, overdue):
    assert not closes((), (), round=5, consistency=parse_consistency(text), overdue=overdue)
    assert not shut(text, (), (5, 5), overdue=overdue)


def test_plain_bsp_waits_for_everybody_for_ever():
    assert not shut("bsp", {0}, (5, 5), overdue=True)
    assert not closes((0, 1), {0})
    assert closes((0, 1), {0, 1})


@pytest.mark.parametrize(
    ("text", "complete", "bases", "on_time", "overdue"),
    [
        ("bsp,quorum=2", {0}, (5, 5, 5), False, False),
        ("bsp,quorum=2", {0, 1}, (5, 5, 5), False, True),
        ("bsp,quorum=2", {0, 1}, (5, 5, 4), True, True),
        ("bsp,quorum=9", {0}, (5, 5), False, False),
        ("ssp:3", {0}, (5, 5, 5), False, True),
        ("ssp:3", {0}, (5, 3, 4), True, True),
        ("ssp:3", {0}, (5, 3, 5), False, True),
        ("ssp:3", {0}, (5, 2, 5), False, False),
        ("ssp:3,quorum=2", {0}, (5, 3, 4), False, False),
        ("ssp:1", {0}, (5, 4), False, False),
        ("ssp:3", {0}, (5, None), False, True),
        ("asp", {2}, (0, 0, 5), True, True),
    ],
)
def test_a_round_closes_without_those_it_need_not_wait_for(text, complete, bases, on_time, overdue):
    assert shut(text, complete, bases) is on_time
    assert shut(text, complete, bases, overdue=True) is overdue


@given(
    CONSISTENCIES,
    st.lists(st.integers(0, 20), min_size=1, max_size=5),
    st.sets(st.integers(0, 4)),
    st.booleans(),
)
def test_closing_never_makes_a_missing_contribution_too_stale_in_ssp(
    consistency, bases, complete, overdue
):
    now = dict(enumerate(bases))
    closed = closes(*(list(now), complete, now), round=20, consistency=consistency, overdue=overdue)
    if closed and consistency.kind == "ssp":
        missing = set(now) - complete
        assert all(may_apply(now[rank], 21, consistency) for rank in missing)
    if closed:
        assert complete & set(now)


def test_more_time_and_more_words_never_open_a_round_again():
    for text in ("bsp", "bsp,quorum=2", "ssp:2", "ssp:3,quorum=3", "asp"):
        rng = random.Random(text)  # noqa: S311 - a test
        for _ in range(300):
            bases = [rng.randint(2, 5) for _ in range(4)]
            complete = {rank for rank in range(4) if rng.random() < 0.5}
            if shut(text, complete, bases):
                assert shut(text, complete, bases, overdue=True)
                assert shut(text, complete | {rng.randrange(4)}, bases)


# ---- the deadline


def test_there_is_no_deadline_before_there_are_samples():
    assert deadline([1.0] * (MIN_SAMPLES - 1), 6.0) is None
    assert deadline([1.0] * MIN_SAMPLES, 6.0) == pytest.approx(1.0 + 6.0 * LEAST_MAD)


def test_only_the_last_samples_count():
    assert deadline([99.0] * 500 + [1.0] * DEADLINE_SAMPLES, 0.0) == 1.0


def test_one_straggler_does_not_move_the_deadline():
    usual = [1.0, 1.1, 0.9, 1.0, 1.05, 0.95, 1.0, 1.0, 1.1]
    assert deadline([*usual, 400.0], 6.0) < 2.0


@given(st.lists(st.floats(0, 1e6), min_size=MIN_SAMPLES, max_size=100), st.floats(0, MAX_MADS))
def test_the_deadline_is_the_median_and_some_deviations(durations, mads):
    lately = durations[-DEADLINE_SAMPLES:]
    typical = median(lately)
    spread = median(abs(value - typical) for value in lately)
    expected = typical + mads * max(spread, LEAST_MAD * typical)
    assert deadline(iter(durations), mads) == pytest.approx(expected)


# ---- a whole job, with random speeds


class Job:
    """Workers that push at random moments, and rounds that close by the rules and nothing else."""

    def __init__(self, text, world_size, seed):
        self.consistency = parse_consistency(text)
        self.rng = random.Random(seed)  # noqa: S311 - a test
        self.round, self.speed = 0, [self.rng.choice([1, 1, 1, 4, 9]) for _ in range(world_size)]
        self.bases = dict.fromkeys(range(world_size), 0)
        self.complete, self.applied, self.rejected = set(), [], []

    def run(self, moments):
        ranks = list(self.bases)
        for _ in range(moments):
            idle = [rank for rank in ranks if rank not in self.complete]
            if idle and self.rng.random() < 0.8:
                slowness = [1 / self.speed[rank] for rank in idle]
                self.complete.add(self.rng.choices(idle, slowness)[0])
            overdue = self.rng.random() < 0.3
            if closes(
                *(ranks, self.complete, self.bases),
                round=self.round,
                consistency=self.consistency,
                overdue=overdue,
            ):
                self.close()

    def close(self):
        for rank in sorted(self.complete):
            stale = self.round - self.bases[rank]
            fate = self.applied if self.may_apply(rank) else self.rejected
            fate.append((rank, stale))
            self.bases[rank] = self.round + 1
        self.complete.clear()
        self.round += 1

    def may_apply(self, rank):
        return may_apply(self.bases[rank], self.round, self.consistency)


@pytest.mark.parametrize("bound", [1, 2, 5])
@pytest.mark.parametrize("seed", range(20))
def test_staleness_never_exceeds_the_bound_under_a_random_scheduler(bound, seed):
    job = Job(f"ssp:{bound}", 4, seed)
    job.run(3000)
    assert job.round > 300
    assert max(stale for _, stale in job.applied) <= bound
    assert job.rejected == []  # the round waited for whoever would have come too late


def test_the_bound_is_reached_so_the_test_of_it_could_fail():
    jobs = [Job("ssp:2", 4, seed) for seed in range(5)]
    for job in jobs:
        job.run(3000)
    assert max(stale for job in jobs for _, stale in job.applied) == 2


def test_asp_goes_on_whatever_a_rank_does_and_rejects_nothing():
    job = Job("asp", 4, 1)
    job.run(3000)
    assert job.rejected == []
    assert max(stale for _, stale in job.applied) > 5


def test_a_quorum_under_bsp_rejects_what_comes_late_and_applies_nothing_stale():
    job = Job("bsp,quorum=2", 4, 1)
    job.run(3000)
    assert {stale for _, stale in job.applied} == {0}
    assert job.rejected


def test_plain_bsp_applies_everybody_in_every_round():
    job = Job("bsp", 3, 1)
    job.run(1000)
    assert job.rejected == []
    assert len(job.applied) == 3 * job.round > 300
