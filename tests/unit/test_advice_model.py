"""The model of a step: floors it cannot go below, what moves it and what does not."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psq.advice import LOOPBACK, Cluster, Link, Rates, Work, link_s, predict
from psq.advice.model import BACKWARD_SHARE, BOTTLENECKS, MESSAGE_S
from psq.errors import ConfigError

GBIT = Link(1e9, 1e9, 1e-4)
FREE = Rates(math.inf, math.inf, math.inf)
RATES = Rates(encode=2e9, server=1e9, decode=5e9, zero=8e9)
DENSE = Work(25_000_000, 100, 100_000_000, 100_000_000, Rates(2e9, 5e8, 2e9, 8e9))
FEW = Work(25_000_000, 25, 12_900_000, 9_500_000, RATES)

rates = st.floats(1e6, 1e11)
works = st.builds(
    Work,
    numel=st.integers(1_000, 10**9),
    shards=st.integers(1, 1000),
    up_bytes=st.integers(1_000, 10**9),
    down_bytes=st.integers(1_000, 10**9),
    rates=st.builds(Rates, rates, rates, rates, rates),
)
links = st.builds(Link, st.floats(1e6, 1e12), st.floats(1e6, 1e12), st.floats(0.0, 1.0))
clusters = st.builds(
    Cluster,
    workers=st.integers(1, 64),
    servers=st.just(1),
    link=links,
    beside=st.booleans(),
    one_machine=st.booleans(),
    cores=st.integers(1, 64),
    copy_s=st.floats(0.0, 1e-9),
)


def step_s(work, cluster, **how):
    return predict(work, cluster, **how).step_s


@given(works, clusters, st.floats(1.0, 100.0))
def test_a_faster_link_never_makes_a_step_slower(work, cluster, factor):
    link = cluster.link
    faster = replace(link, up_bit_s=link.up_bit_s * factor, down_bit_s=link.down_bit_s * factor)
    assert step_s(work, replace(cluster, link=faster)) <= step_s(work, cluster) * (1 + 1e-9)


@given(works, clusters, st.sampled_from(["encode", "server", "decode", "zero"]))
def test_a_faster_stage_never_makes_a_step_slower(work, cluster, stage):
    faster = replace(work.rates, **{stage: 2 * getattr(work.rates, stage)})
    assert step_s(replace(work, rates=faster), cluster) <= step_s(work, cluster) * (1 + 1e-9)


@given(works, clusters)
def test_fewer_bytes_never_make_a_step_slower(work, cluster):
    fewer = replace(work, up_bytes=work.up_bytes // 2, down_bytes=work.down_bytes // 2)
    assert step_s(fewer, cluster) <= step_s(work, cluster) * (1 + 1e-9)


@given(works, clusters)
def test_no_step_is_faster_than_its_slowest_stage(work, cluster):
    found = predict(work, cluster)
    floors = (found.encode_s, found.up_s, found.server_s, found.down_s, found.decode_s)
    assert found.step_s >= max(floors) * (1 - 1e-9)


@given(works, clusters, st.floats(0.0, 10.0))
def test_compute_is_added_to_what_communication_takes(work, cluster, compute_s):
    alone = step_s(work, cluster)
    assert step_s(work, cluster, compute_s=compute_s) == pytest.approx(alone + compute_s)


@given(works, clusters, st.floats(0.001, 10.0))
def test_overlap_hides_no_more_than_backward(work, cluster, compute_s):
    apart = step_s(work, cluster, compute_s=compute_s)
    together = step_s(work, cluster, compute_s=compute_s, overlap=True)
    # Where all cores are shared, backward and the rest get in each other's way: no gain then.
    if not cluster.one_machine:
        assert together <= apart * (1 + 1e-9)
    assert together >= apart - BACKWARD_SHARE * compute_s - 1e-9


@given(works, clusters)
def test_what_limits_a_step_has_a_name(work, cluster):
    assert predict(work, cluster).bottleneck in BOTTLENECKS


def test_with_nothing_but_a_link_a_step_is_all_workers_bytes_and_a_shard_on_its_way_back():
    work = Work(1_000, 10, 1_000_000, 500_000, FREE)
    found = predict(work, Cluster(4, 1, Link(8e6, 8e6, 0.25), cores=8))
    messages_s = (1 + 1 + 4 * 2) * MESSAGE_S  # of one shard: encode, decode, the server's
    # 4 MB through the server's way in at 1 MB/s, then a shard's answers, a twentieth of a MB each:
    # one's own and, on average, half of those to the three others
    assert found.step_s == pytest.approx(4.0 + 0.05 * 2.5 + 0.25 + messages_s)
    assert (found.up_s, found.down_s) == (4.0, 2.0)
    assert found.bottleneck == "up"


def test_one_shard_goes_through_all_stages_one_after_another():
    work = Work(1_000_000, 1, 1_000_000, 500_000, Rates(1e6, 5e5, 2e6))
    found = predict(work, Cluster(1, 1, Link(8e6, 8e6, 0.0), cores=8))
    assert found.step_s == pytest.approx(1.0 + 1.0 + 2.0 + 0.5 + 0.5 + 4 * MESSAGE_S)


def test_several_servers_share_the_bytes_until_the_workers_own_links_are_the_limit():
    times = [predict(FEW, Cluster(4, servers, GBIT, cores=8)).up_s for servers in (1, 2, 4, 8)]
    one = 8 * FEW.up_bytes / 1e9
    assert times == pytest.approx([4 * one, 2 * one, one, one])


def test_a_server_beside_each_of_two_workers_halves_what_a_link_carries():
    own = predict(FEW, Cluster(2, 2, GBIT, cores=8))
    beside = predict(FEW, Cluster(2, 2, GBIT, beside=True, cores=8))
    assert beside.up_s == pytest.approx(own.up_s / 2)
    # ... but pushes and answers leave by the same way
    assert beside.bottleneck == "link"
    assert beside.step_s >= beside.up_s + beside.down_s


def test_processes_that_share_cores_take_the_sum_of_their_work():
    apart = Cluster(8, 1, LOOPBACK, cores=2)
    together = replace(apart, one_machine=True)
    work_s = 8 * (FEW.numel / RATES.encode + FEW.numel / RATES.decode + FEW.numel / RATES.zero)
    assert step_s(FEW, together) >= (work_s + FEW.numel / RATES.server) / 2
    assert step_s(FEW, together) > step_s(FEW, apart)


def test_copying_is_the_limit_of_dense_gradients_on_loopback_and_not_of_few_bits():
    cluster = Cluster(2, 1, LOOPBACK, cores=64, one_machine=True, copy_s=1e-9)
    assert predict(DENSE, cluster).bottleneck == "copying"
    assert predict(FEW, cluster).bottleneck != "copying"


def test_there_is_one_link_rate_from_which_on_quantizing_costs_more_than_it_saves():
    slow = replace(FEW, rates=Rates(2e8, 1e8, 5e8))
    gains = []
    for exponent in range(70, 120):
        rate = 10 ** (exponent / 10)
        cluster = Cluster(1, 1, Link(rate, rate, 1e-4), cores=8)
        gains.append(step_s(DENSE, cluster) > step_s(slow, cluster))
    assert gains[0]
    assert not gains[-1]
    assert gains == sorted(gains, reverse=True)


def test_the_links_share_of_a_step_is_what_no_link_would_save():
    cluster = Cluster(2, 1, GBIT, cores=8)
    share = link_s(DENSE, cluster)
    without = step_s(DENSE, replace(cluster, link=Link(math.inf, math.inf, 0.0)))
    assert share == pytest.approx(step_s(DENSE, cluster) - without)
    assert link_s(DENSE, replace(cluster, link=Link(1e15, 1e15, 0.0))) < 1e-5


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan])
def test_a_link_without_a_rate_is_refused(rate):
    with pytest.raises(ConfigError, match="link: rates must be above 0"):
        Link(rate, 1e9, 0.0)


def test_servers_beside_workers_need_one_each():
    with pytest.raises(ConfigError, match="3 servers cannot be beside 2 workers"):
        Cluster(2, 3, GBIT, beside=True)
