"""Peers that break the rules of ZMTP or of psq: rounds go on, memory stays bounded, nobody dies.

A second of each, and 2,000 connections; `make faults` makes 100,000 and measures for longer, see
hostile.py.
"""

import pytest

from faults import FULL
from faults.honest import Job, descriptors
from faults.hostile import MOST_GROWTH_MB, attack
from faults.peers import KINDS, storm

SECONDS = 1.0
STORM_CONNECTIONS = 100_000 if FULL else 2000


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    with Job(tmp_path_factory.mktemp("hostile")) as made:
        made.round()
        yield made


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"storm"}))
def test_rounds_go_on_and_memory_is_bounded_beside(job, kind):
    attacked = attack(job, kind, SECONDS, turns=1)
    assert job.server.poll() is None
    assert len(attacked.attacked_s) > 3
    assert attacked.peak_mb - attacked.before_mb < MOST_GROWTH_MB


def test_a_storm_of_connections_leaves_no_descriptor_behind(job):
    before = descriptors(job.server.pid)
    assert storm(job.host, job.port, float("inf"), most=STORM_CONNECTIONS) >= STORM_CONNECTIONS
    for _ in range(50):
        job.round()
    assert job.server.poll() is None
    assert descriptors(job.server.pid) < before + 200
