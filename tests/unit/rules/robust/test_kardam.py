"""Kardam's filters, one message at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest

from psq.errors import ConfigError
from psq.rules.kardam import Kardam

NUMELS = (300, 20)
NUMEL = 320


class Server:
    """One weight vector that accepted gradients move, as an asynchronous server's."""

    def __init__(self, bench, workers, spec="fp32", **options):
        options = {"f": 1, "dampening": "none", "noise": False, "window": 25} | options
        self.rule = Kardam(options, layout=bench.layout, world_size=workers)
        self.bench, self.spec, self.lr = bench, spec, 0.1
        self.x = np.ones(NUMEL, np.float32)
        self.version = 0

    def gradient(self, size=1.0):
        """Of |x|^2 / 2: the true coefficient is 1."""
        return size * self.x

    def push(self, rank, gradient, *, staleness=0):
        payload = self.bench.say(gradient, self.spec)
        view = self.bench.round(
            {rank: {0: payload}},
            number=self.version + 1,
            staleness={rank: staleness},
            x={0: self.x},
        )
        verdict = self.rule.judge(view)[rank]
        out = np.zeros(NUMEL, np.float32)
        if not verdict.refused:
            self.rule.combine(0, self.bench.said([payload], [verdict.weight]), out)
        self.x = self.x - np.float32(self.lr) * out
        self.version += 1
        return verdict

    def warm_up(self, workers, turns=3):
        for _ in range(turns):
            for rank in range(workers):
                self.push(rank, self.gradient())
        for worker in self.rule._workers.values():
            worker.coefficients.append(
                (2.0, 0.0)
            )  # as after a steeper stretch: 1 is not at the limit
        self.rule._refusals = 0
        return self


@pytest.fixture
def serve(make_bench):
    def make(workers=4, **options):
        return Server(make_bench(NUMELS), workers, **options)

    return make


def test_honest_gradients_of_a_smooth_problem_pass(serve):
    server = serve().warm_up(4)
    start = float(np.linalg.norm(server.x))
    for turn in range(8):
        assert not server.push(turn % 4, server.gradient()).refused
    assert np.linalg.norm(server.x) < start / 2


def test_a_gradient_that_changes_faster_than_honest_ones_is_refused(serve):
    server = serve().warm_up(4)
    verdict = server.push(0, server.gradient(-5.0))
    assert verdict.refused.startswith("lipschitz: the gradient changed by ")
    assert not server.push(0, server.gradient()).refused


@pytest.mark.parametrize("spec", ["sign", "log:k=2", "uniform:bits=4", "lloyd-max:bits=2"])
def test_filters_work_on_payloads_of_any_codec(serve, spec):
    server = serve(spec=spec).warm_up(4)
    assert "lipschitz" in server.push(0, server.gradient(-50.0)).refused


def test_the_limit_is_the_coefficient_that_n_minus_f_workers_stay_within(serve):
    server = serve(workers=4).warm_up(4)
    for rank, coefficient in enumerate((0.5, 1.0, 2.0, 1e9)):
        server.rule._workers[rank].coefficients.clear()
        server.rule._workers[rank].coefficients.extend([(0.1, 0.0), (coefficient, 0.0)])
    assert server.rule._highest(moved=1.0) == 2.0


def test_a_worker_that_raises_its_own_coefficient_raises_no_limit(serve):
    server = serve().warm_up(4)
    for turn in range(20):
        server.push(3, server.gradient((-1.0) ** turn * 100.0))
    assert max(server.rule._workers[3].coefficients)[0] > 100.0
    assert server.rule._highest(moved=1.0) == 2.0
    assert "lipschitz" in server.push(0, server.gradient(-5.0)).refused


def test_a_sender_among_the_last_2f_accepted_is_refused(serve):
    server = serve(workers=7, f=2).warm_up(7)
    for rank in (0, 1, 2, 3):
        assert not server.push(rank, server.gradient()).refused
    for rank in (0, 1, 2, 3):
        assert "frequency: rank" in server.push(rank, server.gradient()).refused
    assert not server.push(4, server.gradient()).refused
    assert not server.push(0, server.gradient()).refused


def test_nobody_is_accepted_before_there_is_an_honest_median(serve):
    server = serve(workers=7, f=2)
    for rank in range(4):
        verdict = server.push(rank, server.gradient(100.0))
        assert verdict.refused == f"warm-up: {rank + 1} workers have spoken, it takes 5"
    assert (server.x == 1.0).all()
    assert not server.push(4, server.gradient()).refused


def test_what_the_filter_cannot_judge_yet_is_shortened_to_the_median(serve):
    server = serve(workers=4)
    for rank in range(2):
        server.push(rank, server.gradient())
    verdict = server.push(2, server.gradient(-100.0))
    assert verdict.weight == pytest.approx(0.01)
    assert np.linalg.norm(server.x) <= 1.11 * math.sqrt(NUMEL)


def test_after_as_many_refusals_as_workers_one_is_accepted_and_shortened(serve):
    server = serve().warm_up(4)
    honest = float(np.linalg.norm(server.gradient()))
    for _ in range(4):
        assert "lipschitz" in server.push(0, server.gradient(-1000.0)).refused
    verdict = server.push(0, server.gradient(-1000.0))
    assert not verdict.refused
    assert verdict.weight * 1000.0 * honest <= 1.5 * honest
    assert server.push(0, server.gradient(-1000.0)).refused


def test_the_count_of_refusals_starts_again_when_one_passes(serve):
    server = serve().warm_up(4)
    for _ in range(3):
        for _ in range(3):
            assert server.push(3, server.gradient(-1000.0)).refused
        rank = next(rank for rank in range(3) if rank not in server.rule._accepted)
        assert not server.push(rank, server.gradient()).refused


@pytest.mark.parametrize(
    ("dampening", "weight"), [("inverse", 1 / 4), ("exponential", math.exp(-0.6)), ("none", 1.0)]
)
def test_stale_gradients_are_dampened_and_the_weight_is_not_normalised_away(
    serve, dampening, weight
):
    server = serve(dampening=dampening).warm_up(4)
    before = server.x.copy()
    verdict = server.push(0, server.gradient(), staleness=3)
    assert verdict.weight == pytest.approx(weight)
    np.testing.assert_allclose(server.x, before - 0.1 * weight * before, rtol=1e-5)


def test_messages_of_one_round_are_compared_with_the_round_before(serve):
    server = serve().warm_up(4)
    messages = {
        rank: {0: server.bench.say(server.gradient(size), "fp32")}
        for rank, size in enumerate((1.0, 1.0, 1.0, -50.0))
    }
    view = server.bench.round(messages, number=server.version + 1, x={0: server.x})
    verdicts = server.rule.judge(view)
    assert [rank for rank, verdict in verdicts.items() if verdict.refused] == [3]
    assert "lipschitz" in verdicts[3].refused


def test_a_gradient_that_moves_nothing_does_not_open_the_filter(serve):
    server = serve().warm_up(4)
    server.lr, before = 0.0, server.x
    assert not server.push(0, server.gradient()).refused
    assert (server.x == before).all()
    assert "lipschitz" in server.push(1, server.gradient(-50.0)).refused


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_refused_even_at_the_way_out(serve, bad):
    server = serve().warm_up(4)
    for _ in range(12):
        assert server.push(0, np.full(NUMEL, bad)).refused.startswith("norm: ")
    assert np.isfinite(server.x).all()
    assert not server.push(1, server.gradient()).refused


def test_memory_is_the_last_versions_and_one_of_each_worker(serve):
    server = serve().warm_up(4, turns=30)
    kept = {id(w[0]) for w in server.rule._versions.values()}
    kept |= {id(worker.weights[0]) for worker in server.rule._workers.values()}
    assert len(server.rule._versions) == 8
    assert len(kept) <= 3 * 4 + 2
    assert all(len(worker.coefficients) <= 25 for worker in server.rule._workers.values())


def test_a_gradient_from_before_all_versions_kept_teaches_nothing(serve):
    server = serve().warm_up(4, turns=5)
    before = list(server.rule._workers[0].coefficients)
    server.push(0, server.gradient(), staleness=15)
    assert list(server.rule._workers[0].coefficients) == before


def test_payloads_are_copied_as_their_buffers_are_used_again(serve):
    server = serve().warm_up(4)
    said = server.bench.say(server.gradient(), "fp32")
    view = server.bench.round({0: {0: said}}, number=server.version + 1, x={0: server.x})
    assert not server.rule.judge(view)[0].refused
    kept = np.frombuffer(server.rule._accepted_last.gradient[0][1], np.uint8).copy()
    said[1].fill(0)
    np.testing.assert_array_equal(
        np.frombuffer(server.rule._accepted_last.gradient[0][1], np.uint8), kept
    )


def test_too_few_workers_for_f_are_refused_in_words(serve):
    with pytest.raises(ConfigError, match="kardam with f=2 needs 7 workers or more, there are 6"):
        serve(workers=6, f=2)


# ---- noise


class Noisy:
    """Gradients that are noise, all of about the same length, of workers that take turns."""

    def __init__(self, server, workers):
        self.server, self.workers = server, workers
        self.rng = np.random.default_rng(5)

    def gradient(self):
        return self.rng.standard_normal(NUMEL).astype(np.float32)

    def refused(self, turns):
        """How many of so many turns of all are refused, with the words."""
        found = []
        for turn in range(turns * self.workers):
            verdict = self.server.push(turn % self.workers, self.gradient())
            found += [verdict.refused] if verdict.refused else []
        return found


def test_noise_passes_where_a_step_is_shorter_than_a_workers_way(serve):
    """A worker's own two messages are as many steps apart as there are workers."""
    counts, workers = {}, 16
    for noise in (False, True):
        words = Noisy(serve(workers, noise=noise), workers).refused(6)
        counts[noise] = sum("lipschitz" in each for each in words)
    assert counts[False] > 10
    assert counts[True] <= 2, "but for the first, when the workers' changes are few"


@pytest.mark.parametrize("size", [4.0, 100.0])
def test_noise_is_no_excuse_for_what_is_longer_than_honest_messages(serve, size):
    server = serve(4, noise=True)
    honest = Noisy(server, 4)
    honest.refused(5)
    assert "lipschitz" in server.push(0, size * honest.gradient()).refused
    assert not server.push(0, honest.gradient()).refused


def test_f_loud_workers_do_not_raise_what_noise_may_be(serve):
    server = serve(4, noise=True)
    honest = Noisy(server, 4)
    honest.refused(3)
    for _ in range(10):
        assert server.push(3, 100.0 * honest.gradient()).refused
        for rank in range(3):
            server.push(rank, honest.gradient())
    changes = [max(change for _, change in w.coefficients) for w in server.rule._workers.values()]
    assert server.rule._highest(moved=0.0) == sorted(changes)[2] < 40.0 < changes[3]
