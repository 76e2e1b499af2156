"""Simulated jobs: what they learn, how long they take, and what goes wrong in them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from psq.errors import ConfigError, GaveUpError
from psq.presets import PRESETS, preset
from psq.torch.asked import Asked
from psq_worker.simulate import Crash, Faults, Network, SimConfig, simulate
from psq_worker.simulate.attacks import Attack
from psq_worker.simulate.cluster import dense_usage
from psq_worker.simulate.data import Dirichlet, takes_part
from psq_worker.simulate.faults import speeds_of
from psq_worker.simulate.report import result_plain

BANDWIDTH = 1e8
LATENCY_S = 0.002
COMPUTE_S = 0.01


class Spots:
    """Tell apart four clouds of points in the plane."""

    name = "spots"
    metric = "accuracy"

    def __init__(self, width=24):
        self.width = width

    def model(self, seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return nn.Sequential(nn.Linear(2, self.width), nn.Tanh(), nn.Linear(self.width, 4))

    def loss(self, model, batch):
        places, labels = batch
        return functional.cross_entropy(model(places), labels)

    def batches(self, *, rank, world_size, batch_size, seed, start_step=0):
        step = start_step
        while True:
            rng = np.random.default_rng([seed, step])
            labels = rng.integers(0, 4, world_size * batch_size)
            noise = rng.standard_normal((len(labels), 2), np.float32)
            angle = labels * np.pi / 2
            places = 1.5 * np.stack([np.cos(angle), np.sin(angle)], 1) + 0.6 * noise
            mine = slice(rank * batch_size, (rank + 1) * batch_size)
            yield torch.from_numpy(places[mine].astype(np.float32)), torch.from_numpy(labels[mine])
            step += 1

    def evaluate(self, model):
        places, labels = next(self.batches(rank=0, world_size=1, batch_size=400, seed=99))
        with torch.no_grad():
            return {"accuracy": float((model(places).argmax(1) == labels).float().mean())}


def config(**changes) -> SimConfig:
    network = Network(BANDWIDTH, latency_s=LATENCY_S)
    made = SimConfig(
        task=Spots(),
        workers=4,
        steps=20,
        batch_size=8,
        lr=0.02,
        network=network,
        compute_s=COMPUTE_S,
    )
    return dataclasses.replace(made, **changes)


def losses(result) -> list[dict[int, float]]:
    return [dict(point.losses) for point in result.points]


def flat(result) -> bytes:
    return b"".join(values.tobytes() for values in result.weights.values())


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_recipe_runs(name):
    rule = "asp" if name == "kardam" else "bsp"
    result = simulate(config(recipe=name, consistency=rule, steps=24))
    assert len(result.points) == result.job.steps
    assert all(math.isfinite(point.loss) for point in result.points)
    if name != "dp-sign":  # so few steps are all noise
        assert result.points[-1].loss < result.points[0].loss


def test_a_run_is_a_function_of_its_arguments():
    noisy = config(
        network=Network(BANDWIDTH, latency_s=LATENCY_S, loss=0.05),
        faults=Faults(pause_chance=0.2, pause_s=0.1),
        consistency="ssp:2",
        recipe="server-adam",
    )
    first, second = simulate(noisy), simulate(noisy)
    assert first.points == second.points
    assert flat(first) == flat(second)
    assert first.lost_frames == second.lost_frames > 0


def test_a_round_of_one_worker_takes_computing_both_ways_and_two_latencies():
    result = simulate(config(workers=1, recipe="fp32", steps=10))
    usage = result.usage
    wire_s = 8 * (usage.up_bytes + usage.down_bytes) / BANDWIDTH
    assert usage.virtual_s == pytest.approx(10 * (COMPUTE_S + 2 * LATENCY_S) + wire_s, rel=1e-3)


def test_pushes_of_many_workers_queue_at_the_server():
    network = Network(BANDWIDTH, server_bit_s=1e6)
    alone, many = (
        simulate(config(workers=n, recipe="fp32", steps=5, network=network)) for n in (1, 8)
    )
    dense_s = 8 * 4 * alone.numel / 1e6
    wait_s = (many.usage.virtual_s - alone.usage.virtual_s) / 5
    # Seven more each way, but who has its answer pushes again while others wait for theirs.
    assert 7 * dense_s < wait_s < 1.1 * 2 * 7 * dense_s


def test_messages_of_fewer_bits_take_less_virtual_time_and_dense_ones_are_timed_beside():
    slow = config(network=Network(1e5), recipe="qadam-1bit", steps=6)
    result = simulate(slow)
    assert result.bits_up < 32
    assert 6 * dense_usage(slow).virtual_s > 1.5 * result.usage.virtual_s


def test_dense_fp32_beside_sends_for_those_that_take_part():
    half = config(participation=0.5, steps=12)
    usage = dense_usage(half)
    numel = simulate(half).numel
    assert usage.up_bytes == pytest.approx(4 * numel / 2, rel=0.4)  # and headers
    assert usage.down_bytes == pytest.approx(4 * numel, rel=0.4)


def test_under_bsp_all_wait_for_the_straggler_and_under_asp_nobody_does():
    faults = Faults(stragglers=(0.25, 5.0))
    assert sorted(speeds_of(faults, 4, 0).compute) == [1.0, 1.0, 1.0, 5.0]
    bsp = simulate(config(faults=faults))
    asp = simulate(config(faults=faults, consistency="asp", recipe="server-adam"))
    assert bsp.usage.virtual_s > 20 * 5 * COMPUTE_S
    assert bsp.rounds == 20
    assert asp.rounds > 20
    assert max(point.staleness for point in bsp.points) == 0
    assert max(point.staleness for point in asp.points) > 3


def test_a_coded_job_does_not_wait_for_a_straggler_whose_replica_has_spoken():
    faults = Faults(stragglers=(0.25, 5.0))
    coded = simulate(config(recipe="coded", faults=faults))
    slow = speeds_of(faults, 4, 0).compute.index(5.0)
    assert slow != 0
    assert coded.scores[-1].usage.virtual_s < 0.5 * coded.usage.virtual_s  # rank 0 is long done
    for point in coded.points[:3]:
        assert point.losses[0] == point.losses[1] != point.losses[2]


def test_staleness_stays_within_its_bound():
    faults = Faults(stragglers=(0.25, 6.0))
    result = simulate(config(faults=faults, consistency="ssp:2", recipe="server-adam"))
    assert max(point.staleness for point in result.points) == 2


def test_with_a_quorum_the_straggler_is_left_out_and_told():
    faults = Faults(stragglers=(0.25, 8.0))
    result = simulate(config(faults=faults, consistency="bsp,quorum=3,mads=2", steps=40))
    assert result.rejected > 0
    waiting = simulate(config(faults=faults, steps=40))
    assert waiting.rejected == 0
    assert result.usage.virtual_s < waiting.usage.virtual_s


def test_damaged_messages_are_sent_again_and_change_no_bit():
    calm = simulate(config(recipe="qadam-1bit"))
    lossy = simulate(
        config(recipe="qadam-1bit", network=Network(BANDWIDTH, latency_s=LATENCY_S, loss=0.1))
    )
    assert lossy.lost_frames > 0
    assert lossy.resent_frames > 0
    assert losses(lossy) == losses(calm)
    assert flat(lossy) == flat(calm)
    assert lossy.usage.virtual_s > calm.usage.virtual_s


def test_the_others_wait_for_a_worker_that_crashed_until_it_is_back():
    crash = Crash(2, 7, away_s=30.0)
    result = simulate(config(recipe="qadam-1bit", faults=Faults(crashes=(crash,))))
    calm = simulate(config(recipe="qadam-1bit"))
    assert result.usage.virtual_s > 30.0 > calm.usage.virtual_s
    assert len(result.points) == 20
    assert losses(result)[:7] == losses(calm)[:7]
    assert losses(result)[9:] != losses(calm)[9:]  # its residual and moments are new


def test_a_worker_that_never_comes_back_ends_the_job_by_name():
    stuck = config(faults=Faults(crashes=(Crash(3, 4),)), give_up_after_s=600.0)
    with pytest.raises(GaveUpError, match="rank 3"):
        simulate(stuck)


def test_the_job_goes_on_without_a_worker_that_left():
    result = simulate(config(faults=Faults(crashes=(Crash(1, 5, leaves=True),))))
    counts = [len(point.losses) for point in result.points]
    assert counts == [4] * 5 + [3] * 15


def test_half_of_the_workers_take_part_and_half_of_the_bits_are_sent():
    result = simulate(config(participation=0.5, recipe="qadam"))
    whole = simulate(config(recipe="qadam"))
    assert all(len(point.losses) == 2 for point in result.points)
    assert len({tuple(point.losses) for point in result.points}) > 1
    assert result.bits_up == pytest.approx(whole.bits_up / 2)
    assert result.bits_down == pytest.approx(whole.bits_down)
    for round_, point in enumerate(result.points):
        drawn = [r for r in range(4) if takes_part(r, round_, share=0.5, workers=4, seed=0)]
        assert list(point.losses) == drawn


def test_local_steps_push_at_the_end_of_each_round():
    result = simulate(config(recipe="local-adam", steps=16, participation=0.5))
    assert result.rounds == 2
    assert len(result.points) == 16


def test_several_servers_give_the_same_weights():
    wide = Spots(width=4096)
    one, three = (simulate(config(task=wide, recipe="fp32", servers=n, steps=5)) for n in (1, 3))
    assert losses(one) == losses(three)
    assert flat(one) == flat(three)


def test_classes_are_dealt_unevenly_and_every_sample_once():
    job = simulate(config(steps=1)).job
    skewed, even = (Dirichlet(Spots(), job, 5, alpha) for alpha in (0.05, 1000.0))
    for dealt in (skewed, even):
        together = np.sort(np.concatenate(dealt.parts))
        assert together.size >= 10_000
        assert np.array_equal(np.unique(together), np.arange(10_000))
    spread = [[len(part) for part in dealt.parts] for dealt in (skewed, even)]
    assert max(spread[0]) > 3 * min(spread[0])
    assert max(spread[1]) < 1.2 * min(spread[1])


def test_workers_with_other_classes_learn_other_losses():
    result = simulate(config(non_iid=0.05, recipe="fp32"))
    first = result.points[0].losses.values()
    assert max(first) > 1.2 * min(first)
    assert result.points[-1].loss < result.points[0].loss


def test_a_liar_spoils_the_mean_but_not_the_median():
    lie = Attack("scaled", 1, 50.0)
    hurt = simulate(config(recipe="fp32-sgd", lr=0.5, attack=lie, workers=5))
    recipe = preset("fp32-sgd").with_options("aggregate=median")
    robust = simulate(config(recipe=recipe, lr=0.5, attack=lie, workers=5))
    honest = [sum(list(p.losses.values())[:4]) / 4 for p in (hurt.points[-1], robust.points[-1])]
    assert honest[1] < 0.5 * honest[0]


@pytest.mark.parametrize(("kind", "strength"), [("sign-flip", None), ("random", 2), ("little", 1)])
def test_liars_say_something_else_than_they_computed(kind, strength):
    calm = simulate(config(recipe="fp32"))
    lied = simulate(config(recipe="fp32", attack=Attack(kind, 2, strength)))
    assert losses(lied)[0] == losses(calm)[0]
    assert losses(lied)[2] != losses(calm)[2]


def test_a_payload_of_nan_is_refused_every_time():
    result = simulate(config(attack=Attack("nan", 1)))
    assert result.rejected == 20
    assert result.points[-1].loss < result.points[0].loss


def test_silent_liars_are_never_heard():
    result = simulate(config(attack=Attack("silent", 1)))
    assert all(list(point.losses) == [0, 1, 2] for point in result.points)


def test_callbacks_hear_of_each_step_and_score_as_it_comes():
    points, scores = [], []
    result = simulate(config(eval_every=5), on_point=points.append, on_score=scores.append)
    assert tuple(points) == result.points
    assert [score.step for score in scores] == [5, 10, 15, 20]
    assert scores[-1].scores["accuracy"] == result.score
    assert [p.usage.virtual_s for p in points] == sorted(p.usage.virtual_s for p in points)


def test_what_cannot_be_simulated_is_refused_in_words():
    with pytest.raises(ConfigError, match=r"participation.*needs bsp"):
        config(participation=0.5, consistency="asp")
    with pytest.raises(ConfigError, match="nobody honest"):
        config(attack=Attack("silent", 4))
    with pytest.raises(ConfigError, match="little needs 2"):
        Attack("little", 1)
    with pytest.raises(ConfigError, match="no strength"):
        Attack("nan", 1, 3.0)
    with pytest.raises(ConfigError, match="rank 4 is outside"):
        simulate(config(faults=Faults(crashes=(Crash(4, 1),))))
    with pytest.raises(ConfigError, match="crash or leave once"):
        Faults(crashes=(Crash(1, 1), Crash(1, 2)))
    with pytest.raises(ConfigError, match=r"share 0\.\.1"):
        Faults(stragglers=(1.5, 2.0))
    with pytest.raises(ConfigError, match="share of lost frames"):
        Network(1e9, loss=0.9)
    with pytest.raises(ConfigError, match="no class labels"):
        simulate(config(task="char-lm", non_iid=0.5))


def test_weights_that_are_asked_for_again_at_the_start_are_no_traffic_of_the_training():
    """Two shards, and a link on which the first weights take seconds: some ask for them twice."""
    quick, slow = (
        simulate(
            config(
                task=Spots(180_000),
                recipe="qadam-1bit",
                steps=2,
                batch_size=1,
                network=Network(1e9, server_bit_s=rate, latency_s=LATENCY_S),
            )
        )
        for rate in (1e9, 2e7)
    )
    assert slow.usage.virtual_s > 3 * quick.usage.virtual_s, "the link was not slow"
    assert slow.bits_down == quick.bits_down
    assert slow.bits_up == quick.bits_up
    assert slow.usage.down_bytes == pytest.approx(quick.usage.down_bytes, rel=0.01)


def test_ranks_that_compute_the_same_take_part_together():
    """With the mean over groups, a job of four groups is one of four workers to the bit."""
    coded, plain = (
        simulate(config(recipe=name, workers=workers, participation=0.5, steps=16))
        for name, workers in (("coded", 8), ("server-adam", 4))
    )
    assert flat(coded) == flat(plain)


def test_the_bits_of_a_value_are_reported_by_step_where_workers_choose_them():
    result = simulate(config(recipe="dq-sgd", steps=30, lr=0.05))
    bits = [point.bits for point in result.points]
    assert len(set(bits)) > 1, "the choice did not change"
    assert sum(bits) / len(bits) == pytest.approx(result.bits_up, rel=1e-6)
    curve = result_plain(result, None)["bits_curve"]
    assert [part["step"] for part in curve] == list(range(1, 31))
    assert [part["bits"] for part in curve] == bits
    local = simulate(config(recipe="local-adam", steps=16))
    assert [point.bits is None for point in local.points] == [
        step % 8 != 0 for step in range(1, 17)
    ]


@pytest.mark.parametrize(
    ("rule", "recipe"), [("bsp", "fp32-sgd"), ("asp", "kardam"), ("ssp:2", "fp32-sgd")]
)
def test_a_schedule_ends_with_each_workers_last_step_under_every_rule(rule, recipe, monkeypatch):
    """Under asp four workers make four versions of a step each: the rate does not follow these."""
    rates = []

    def asked(rate):
        rates.append(rate)
        return Asked(rate)

    monkeypatch.setattr("psq_worker.simulate.worker.Asked", asked)
    made = config(recipe=recipe, consistency=rule, schedule="linear", steps=12, lr=0.12)
    assert simulate(made).rounds >= 12
    assert sorted(rates) == pytest.approx(sorted([0.12 * (1 - k / 12) for k in range(12)] * 4))
