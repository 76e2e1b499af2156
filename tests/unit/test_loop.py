"""The training loop and the plain Adam baseline, on a task of three numbers."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch import nn

from psq.errors import ConfigError, UsageError
from psq.recipe import AdamConfig
from psq.torch import StepReport
from psq_worker.baseline import PlainAdam, train_baseline
from psq_worker.job import History, Job, LossMeter, Record, job_for
from psq_worker.loop import train
from psq_worker.tasks import JobDefaults, get_task

JOB = Job(steps=7, batch_size=4, lr=0.05, eval_every=3, seed=2)


class Slope:
    """Fits y = a x + b z + c: global batch g is a function of seed and g."""

    name = "slope"
    metric = "error"
    defaults = JobDefaults(steps=11, batch_size=5, lr=0.5, schedule="linear", eval_every=2)

    def model(self, seed):
        torch.manual_seed(seed)
        return nn.Linear(2, 1)

    def loss(self, model, batch):
        inputs, targets = batch
        return nn.functional.mse_loss(model(inputs), targets)

    def batches(self, *, rank, world_size, batch_size, seed, start_step=0):
        step = start_step
        while True:
            draw = torch.Generator().manual_seed(1000 * seed + step)
            inputs = torch.randn(world_size * batch_size, 2, generator=draw)
            mine = inputs[rank * batch_size : (rank + 1) * batch_size]
            yield mine, mine @ torch.tensor([[2.0], [-1.0]]) + 0.5
            step += 1

    def evaluate(self, model):
        return {"error": float((model.weight.detach() - torch.tensor([[2.0, -1.0]])).norm())}


def report(step, *, applied):
    sizes = {"sent_bytes": 10, "received_bytes": 20}
    times = dict(
        zip(
            ("compute_s", "encode_s", "wire_s", "server_s", "decode_s"),
            (1.0, 2.0, 3.0, 4.0, 5.0),
            strict=True,
        )
    )
    return StepReport(step, step + 1, applied=applied, **sizes, **times)


class FakeWorker:
    """Steps nowhere; remembers what it was told."""

    def __init__(self, rank=0, world_size=1, skip=()):
        self.rank, self.world_size, self.skip, self.calls = rank, world_size, skip, []
        self.data_rank, self.data_world_size = rank, world_size

    def replica(self):
        return nullcontext()

    def step(self, loss=None, samples=0):
        self.calls.append((loss, samples))
        return report(len(self.calls) - 1, applied=len(self.calls) not in self.skip)


def weights_of(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_records_come_every_so_often_and_after_the_last_step():
    worker = FakeWorker()
    seen = []
    history = train(Slope(), Slope().model(0), worker, JOB, seen.append)
    assert [record.step for record in history.records] == [3, 6, 7]
    assert list(history.records) == seen
    assert all(math.isfinite(record.loss) for record in seen)


def test_bytes_and_phases_are_summed_over_the_steps():
    history = train(Slope(), Slope().model(0), FakeWorker(), JOB)
    assert [record.sent_bytes for record in history.records] == [30, 60, 70]
    assert [record.received_bytes for record in history.records] == [60, 120, 140]
    assert history.phases_s == {
        "compute": 7.0,
        "encode": 14.0,
        "wire": 21.0,
        "server": 28.0,
        "decode": 35.0,
    }


def test_the_worker_hears_the_loss_and_the_number_of_samples_of_each_step():
    worker = FakeWorker()
    history = train(Slope(), Slope().model(0), worker, replace(JOB, steps=3))
    losses = [loss for loss, _ in worker.calls]
    assert [samples for _, samples in worker.calls] == [4, 4, 4]
    assert history.records[0].loss == pytest.approx(sum(losses) / 3)


def test_only_rank_0_evaluates():
    first = train(Slope(), Slope().model(0), FakeWorker(0, 2), JOB)
    second = train(Slope(), Slope().model(0), FakeWorker(1, 2), JOB)
    assert first.final is not None
    assert second.final is None
    assert all(not record.scores for record in second.records)


def test_skipped_steps_are_counted():
    assert train(Slope(), Slope().model(0), FakeWorker(skip={2, 5}), JOB).skipped == 2


def test_a_run_that_goes_on_makes_only_the_steps_that_are_left():
    worker = FakeWorker()
    history = train(Slope(), Slope().model(0), worker, replace(JOB, start_step=5))
    assert len(worker.calls) == 2
    assert [record.step for record in history.records] == [6, 7]


def test_gradients_reach_the_worker_before_it_steps():
    model = Slope().model(0)

    class Looking(FakeWorker):
        def step(self, loss=None, samples=0):
            assert model.weight.grad is not None
            model.weight.grad = None
            return super().step(loss, samples)

    train(Slope(), model, Looking(), JOB)


def test_a_model_with_nothing_to_train_is_refused_before_the_first_step():
    worker = FakeWorker()
    with pytest.raises(ConfigError, match="nothing to train"):
        train(Slope(), nn.ReLU(), worker, JOB)
    assert worker.calls == []


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_the_baseline_is_plain_adam_to_the_bit(schedule):
    job = replace(JOB, schedule=schedule)
    task, model = Slope(), Slope().model(job.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=job.lr)
    batches = task.batches(rank=0, world_size=1, batch_size=8, seed=job.seed)
    for step in range(job.steps):
        optimizer.param_groups[0]["lr"] = job.lr * (
            1.0 if schedule == "constant" else 1.0 - step / job.steps
        )
        optimizer.zero_grad()
        task.loss(model, next(batches)).backward()
        optimizer.step()
    history = train_baseline(task, job, world_size=2)
    assert history.final == task.evaluate(model)["error"]


def test_the_baseline_counts_the_bytes_of_dense_fp32():
    history = train_baseline(Slope(), JOB, world_size=3)
    assert history.numel == 3
    assert history.world_size == 3
    assert history.records[-1].sent_bytes == 4 * 3 * JOB.steps
    assert history.records[-1].received_bytes == 4 * 3 * JOB.steps


def test_workers_that_average_gradients_do_what_the_baseline_does():
    task, job = Slope(), replace(JOB, batch_size=3)
    model = task.model(job.seed)
    optimizer = PlainAdam(model, job)
    streams = [
        task.batches(rank=rank, world_size=2, batch_size=3, seed=job.seed) for rank in (0, 1)
    ]
    for _ in range(job.steps):
        for stream in streams:
            (task.loss(model, next(stream)) / 2).backward()
        optimizer.step()
    final = train_baseline(task, job, world_size=2).final
    assert final == pytest.approx(task.evaluate(model)["error"], rel=1e-5)


def test_the_baseline_lets_frozen_parameters_be():
    class Frozen(Slope):
        def model(self, seed):
            model = super().model(seed)
            model.bias.requires_grad_(requires_grad=False)
            return model

    assert train_baseline(Frozen(), JOB, world_size=1).numel == 2


@pytest.mark.parametrize(
    ("settings", "make"),
    [
        (AdamConfig(), torch.optim.Adam),
        (AdamConfig(weight_decay=0.1), torch.optim.AdamW),
        (AdamConfig(weight_decay=0.1, decoupled=False), torch.optim.Adam),
    ],
)
def test_the_baseline_is_torchs_adam_with_the_settings_of_the_job(settings, make):
    model, twin = Slope().model(0), Slope().model(0)
    ours = PlainAdam(model, JOB, replace(settings, beta=0.8, theta=0.95, eps=1e-6, amsgrad=True))
    theirs = make(
        twin.parameters(),
        lr=JOB.lr,
        betas=(0.8, 0.95),
        eps=1e-6,
        amsgrad=True,
        weight_decay=settings.weight_decay,
    )
    for batch in islice(Slope().batches(rank=0, world_size=1, batch_size=4, seed=0), 5):
        for each, optimizer in ((model, ours), (twin, theirs)):
            Slope().loss(each, batch).backward()
            optimizer.step()
        theirs.zero_grad()
    assert torch.equal(model.weight, twin.weight)


def test_the_baseline_refuses_what_torch_does_not_have():
    with pytest.raises(ConfigError, match=r"torch\.optim\.Adam has no bias_correction=false"):
        PlainAdam(Slope().model(0), JOB, AdamConfig(bias_correction=False))


def test_the_baseline_cannot_start_in_the_middle():
    with pytest.raises(UsageError, match="starts at step 0"):
        train_baseline(Slope(), replace(JOB, start_step=2), world_size=1)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"eval_every": 0},
        {"threads": 0},
        {"start_step": 8},
        {"start_step": -1},
        {"lr": 0.0},
        {"lr": math.nan},
        {"schedule": "sawtooth"},
    ],
)
def test_an_impossible_job_is_refused(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        replace(JOB, **change)


def test_a_linear_schedule_falls_to_zero_and_a_constant_one_stays():
    assert [JOB.lr_at(step) for step in (0, 6)] == [0.05, 0.05]
    linear = Job(steps=4, batch_size=1, lr=1.0, schedule="linear")
    assert [linear.lr_at(step) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_a_cosine_schedule_is_half_a_wave():
    job = Job(steps=1000, batch_size=1, lr=1.0, schedule="cosine")
    for step in range(1001):
        wanted = (1.0 + math.cos(math.pi * step / 1000)) / 2.0
        assert job.lr_at(step) == pytest.approx(wanted, abs=1e-15)
    assert job.lr_at(0) == 1.0
    rates = [job.lr_at(step) for step in range(1001)]
    assert rates == sorted(rates, reverse=True)


def test_a_job_takes_the_tasks_settings_where_none_was_chosen():
    chosen = job_for(Slope(), steps=None, lr=0.25, seed=9)
    assert chosen == Job(steps=11, batch_size=5, lr=0.25, schedule="linear", seed=9, eval_every=2)


def test_a_history_survives_json():
    history = train(Slope(), Slope().model(0), FakeWorker(), JOB)
    assert History.from_plain(json.loads(json.dumps(history.to_plain()))) == history


def test_a_history_without_records_has_no_final_score():
    assert History("t", "m", 1, 1, (), {}).final is None
    assert History("t", "m", 1, 1, (Record(1, 0.0, {}, 0, 0, 0.0),), {}).final is None


def test_a_meter_forgets_what_it_has_told():
    meter = LossMeter()
    assert math.isnan(meter.take())
    assert [meter.add(torch.tensor(value)) for value in (1.0, 3.0)] == [1.0, 3.0]
    assert meter.take() == 2.0
    assert math.isnan(meter.take())


def test_two_runs_of_a_real_task_are_equal():
    task = get_task("fashion-mnist", subset=True)
    job = Job(steps=2, batch_size=4, lr=1e-3, eval_every=2)
    first, second = (train_baseline(task, job, world_size=2) for _ in range(2))
    assert first.records[-1].scores == second.records[-1].scores
    assert first.records[-1].loss == second.records[-1].loss
