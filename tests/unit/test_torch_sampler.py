"""Batches as a script sees them, over a server that is made up."""

from __future__ import annotations

import pytest
from torch.utils.data import DataLoader

from psq.client.data import Terms
from psq.errors import ConfigError, UsageError
from psq.plan import Plan
from psq.presets import preset
from psq.shuffle import Shuffle
from psq.torch import ElasticSampler
from psq_proto.messages import Range

SPECS = [("weight", (4, 3))]
SIZE = 10


class Made:
    """A worker and its client: says what is written for it, and notes what is asked."""

    def __init__(self, *answers, recipe="server-adam", world_size=2, **settings):
        self.plan = Plan.of(SPECS, preset(recipe), world_size, **settings)
        self.answers = list(answers)
        self.asked = []
        self.sat_out = 0
        self.version = 0

    @property
    def _client(self):
        return self

    def draw(self, epoch, terms):
        self.asked.append((epoch, terms))
        state, ranges = self.answers.pop(0)
        at = epoch + 1 if state == "end" else epoch
        return Range(self.version, state, at, ranges, SIZE)

    def step(self):
        self.version += 1

    def sit_out(self):
        self.sat_out += 1
        self.version += 1


def sampler_of(worker, **settings):
    return ElasticSampler(worker, SIZE, **{"batch_size": 4, "seed": 5, **settings})


DRAWN = ("drawn", ((0, 2), (6, 8)))
WAIT, LATE, END = ("wait", ()), ("late", ()), ("end", ())


def test_a_batch_is_what_lies_at_the_positions_handed_out():
    worker = Made(DRAWN, END)
    sampler = sampler_of(worker)
    batches = []
    for batch in sampler:
        batches.append(batch)
        worker.step()
    order = Shuffle(5, 0, SIZE).indices(0, SIZE)
    assert batches == [[order[at] for at in (0, 1, 6, 7)]]
    assert worker.asked == [(0, Terms(SIZE, 4, 5))] * 2
    assert sampler.epoch == 1


@pytest.mark.parametrize(("answer", "sat_out"), [(WAIT, 1), (LATE, 1)])
def test_where_rounds_need_this_worker_it_sits_out_while_there_is_nothing_for_it(answer, sat_out):
    worker = Made(answer, END)
    assert list(sampler_of(worker)) == []
    assert worker.sat_out == sat_out


def test_in_asp_it_asks_again_without_a_round_of_nothing():
    worker = Made(WAIT, LATE, END, consistency="asp")
    assert list(sampler_of(worker)) == []
    assert worker.sat_out == 1, "what is late needs newer weights"


def test_each_epoch_has_an_order_and_a_latecomer_goes_to_the_present_one():
    worker = Made(END, DRAWN, END)
    seen = {}
    sampler = sampler_of(worker)
    for epoch in sampler.epochs(2):
        for batch in sampler:
            seen.setdefault(epoch, []).append(batch)
            worker.step()
    order = Shuffle(5, 1, SIZE).indices(0, SIZE)
    assert seen == {1: [[order[at] for at in (0, 1, 6, 7)]]}


def test_a_batch_without_a_step_for_the_one_before_is_refused():
    batches = iter(sampler_of(Made(DRAWN, DRAWN)))
    next(batches)
    with pytest.raises(UsageError, match="before the step with the one before it"):
        next(batches)


def test_a_data_loader_takes_it_for_batches():
    worker = Made(DRAWN, END)
    batches = []
    for batch in DataLoader(list(range(SIZE)), batch_sampler=sampler_of(worker)):
        batches.append(batch.tolist())
        worker.step()
    assert [len(batch) for batch in batches] == [4]


@pytest.mark.parametrize(
    ("job", "settings", "words"),
    [
        ({"recipe": "local-adam"}, {}, "local steps: split the data by rank"),
        ({"recipe": "coded"}, {}, "ranks compute the same"),
        ({}, {"batch_size": 0}, "batch_size must be 1 to"),
        ({}, {"seed": -1}, "seed must be 0 to"),
    ],
)
def test_what_cannot_be_handed_out_is_refused_by_name(job, settings, words):
    with pytest.raises(ConfigError, match=words):
        sampler_of(Made(**job), **settings)
