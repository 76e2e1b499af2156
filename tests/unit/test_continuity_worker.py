"""A worker that dies anywhere in a round, and the one that comes after it: the same bytes.

The server is a real one, in a thread. A process cannot be killed here without killing the test, so
dying is an exception at the place where a process would be killed, and links that fall silent;
tests/cluster/test_restart_worker.py kills real ones.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import psq.durable.slots
import psq.torch
import psq.torch.exchange
import psq.torch.keeper
from psq.presets import preset
from psq.torch.groups import Group
from psq.torch.opened import opened

STEPS = 6
PLACES = {  # and when it is reached that the process dies there: the first rounds are special
    "keeper.copy": 11,
    "keeper.flip": 11,
    "keeper.sent": 5,
    "keeper.close": 3,
    "keeper.closed": 3,
    "keeper.weights": 14,
}
TWICE = list(
    itertools.product(["keeper.closed", "keeper.weights"], ["keeper.flip", "keeper.close"])
)


class DiedError(BaseException):
    """This process was killed, as far as the worker knows."""


class Faults:
    """Dies at a place, the nth time it is reached; counts how often it did."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.place, self.left, self.struck = "", 0, 0
        for module in (psq.durable.slots, psq.torch.exchange, psq.torch.keeper):
            monkeypatch.setattr(module, "reach", self.reach)

    def arm(self, place: str, nth: int) -> None:
        self.place, self.left = place, nth

    def reach(self, place: str) -> None:
        if place == self.place:
            self.left -= 1
            if self.left == 0:
                self.struck += 1
                raise DiedError


@pytest.fixture
def faults(monkeypatch) -> Faults:
    return Faults(monkeypatch)


def make_model(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 10), nn.BatchNorm1d(10), nn.Dropout(0.2), nn.Linear(10, 8), nn.Linear(8, 2)
    )


def make_groups() -> list[Group]:
    """So that there are several shards."""
    return [Group("0.*", lr_factor=0.5), Group("3.*", lr_factor=2.0)]


def be_killed(worker: psq.torch.Worker) -> None:
    """Let nothing be left of a worker but what a killed process leaves."""
    worker._client._pulse.stop()
    worker._client._links.close(0.0)
    worker._exchange.keeper._folder.close()
    opened.remove(worker)


def train(
    worker: psq.torch.Worker, model: nn.Module, steps: int, *, sits_out: int = -1, spoils: int = -1
) -> None:
    while worker.steps < steps:
        step = worker.steps
        rng = np.random.default_rng(step)
        x = torch.from_numpy(rng.standard_normal((8, 6), np.float32))
        x = x + 0.01 * torch.randn(8, 6)  # the global generator's numbers matter
        error = model(x) - torch.sin(x[:, :2])
        error.square().mean().backward()
        if step == spoils:
            model[3].weight.grad[0, 0] = float("nan")
        if step == sits_out:
            worker.sit_out()
        else:
            worker.step()


def state_of(worker: psq.torch.Worker, model: nn.Module) -> dict[str, bytes]:
    found = {f"state.{k}": v.tobytes() for k, v in worker._compressor.state_arrays().items()}
    found |= {f"shared.{k}": v.tobytes() for k, v in worker._exchange.decoder.shared.items()}
    for name, tensor in model.state_dict().items():
        found[f"model.{name}"] = tensor.numpy().tobytes()
    for shard in range(len(worker.plan.layout.shards)):
        found[f"counts.{shard}"] = repr(worker._compressor.counts(shard)).encode()
    found["random"] = torch.get_rng_state().numpy().tobytes()
    if worker._averaging is not None:
        for key, entry in worker._averaging.optimizer.state_dict()["state"].items():
            for name, value in entry.items():
                found[f"optimizer.{key}.{name}"] = torch.as_tensor(value).numpy().tobytes()
    return found


RECIPES: dict[str, dict] = {
    "server-adam": {"recipe": "server-adam"},
    "qadam-1bit": {"recipe": "qadam-1bit"},
    "bf16": {"recipe": "qadam-1bit", "residual": "bf16"},
    "overlap": {"recipe": "server-adam", "overlap": True},
    "shared-direction": {"recipe": "shared-direction"},
    "local": {"recipe": preset("local-adam").with_rhythm(local_steps=2)},
    "turns": {"recipe": preset("qadam-1bit").with_rhythm(every=2)},
    "bits that change": {
        "recipe": preset("server-adam").with_options("uplink.choice=dq"),
    },
    "ahead": {"recipe": "dqgan"},
    "average": {"recipe": "average"},
}


@pytest.fixture
def job(serve, tmp_path):
    """Train a job of one worker that dies and comes again, each time as another process would."""
    made: list[psq.torch.Worker] = []

    def run(
        *, deaths: Callable[[], bool], state_dir: str = "state", steps: int = STEPS, **given
    ) -> tuple[dict[str, bytes], list[psq.torch.Worker]]:
        endpoint = serve().endpoint
        odd = {name: given.pop(name) for name in ("sits_out", "spoils") if name in given}
        begun: list[psq.torch.Worker] = []
        for seed in itertools.count(100):
            model = make_model(seed if begun else 0)
            torch.manual_seed(7)  # as every start of a script does
            settings = {"lr": 0.02, "connect": endpoint, "rank": 0, "world_size": 1}
            settings |= {"groups": make_groups(), "state_dir": str(tmp_path / state_dir)}
            if given["recipe"] == "average":
                settings |= {"lr": None, "optimizer": torch.optim.Adam(model.parameters(), 0.02)}
            alive: list[psq.torch.Worker] = []
            try:
                worker = psq.torch.Worker(model, **settings, **given)
                alive.append(worker)
                begun.append(worker)
                train(worker, model, steps, **odd)
            except DiedError:
                assert deaths()
                for each in alive or list(opened):
                    be_killed(each)
                continue
            found = state_of(worker, model)
            made.append(worker)
            worker.close()
            return found, begun
        raise AssertionError

    yield run
    for worker in made:
        with contextlib.suppress(Exception):
            worker.close()


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, dict[str, bytes]]:
    """How each recipe's job ends if nobody dies; made when it is first asked for."""
    return {}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", RECIPES)
def test_a_worker_killed_at_any_place_of_a_round_goes_on_as_if_nothing_had_been(
    job, faults, uninterrupted, name, place
):
    if name not in uninterrupted:
        uninterrupted[name], _ = job(deaths=lambda: False, state_dir="whole", **RECIPES[name])
    expected = uninterrupted[name]
    faults.arm(place, PLACES[place])
    got, begun = job(deaths=lambda: True, **RECIPES[name])
    assert faults.struck == 1
    assert begun[-1].resumed
    assert [key for key in expected if got[key] != expected[key]] == []


@pytest.mark.parametrize("recipe", ["server-adam", "qadam-1bit"])
@pytest.mark.parametrize(("place", "nth"), [("keeper.copy", 12), ("keeper.flip", 11),
                                            ("keeper.sent", 7), ("keeper.close", 4)])  # fmt: skip
def test_a_worker_killed_in_a_round_that_it_leaves_a_shard_out_of_leaves_it_out_again(
    job, faults, recipe, place, nth
):
    given = {"recipe": recipe, "spoils": 2}
    expected, _ = job(deaths=lambda: False, state_dir="whole", **given)
    faults.arm(place, nth)
    got, begun = job(deaths=lambda: True, **given)
    assert faults.struck == 1
    assert begun[-1].resumed
    assert [key for key in expected if got[key] != expected[key]] == []


@pytest.mark.parametrize(("place", "nth"), [("keeper.settle", 2), ("keeper.copy", 11),
                                            ("keeper.copy", 12), ("keeper.flip", 11)])  # fmt: skip
def test_what_comes_back_to_a_shard_at_the_end_of_a_round_is_taken_once(job, faults, place, nth):
    """Units change in each of the first rounds of this recipe, and residuals follow."""
    given = {"recipe": "shared-direction"}
    expected, _ = job(deaths=lambda: False, state_dir="whole", **given)
    faults.arm(place, nth)
    got, begun = job(deaths=lambda: True, **given)
    assert faults.struck == 1
    assert begun[-1].resumed
    assert [key for key in expected if got[key] != expected[key]] == []


def test_without_room_in_memory_the_state_is_kept_on_the_disk(
    job, faults, monkeypatch, tmp_path, caplog
):
    name, reserve = "server-adam", os.posix_fallocate

    def full(fd: int, start: int, length: int) -> None:
        if Path(f"/proc/self/fd/{fd}").readlink().is_relative_to("/dev/shm"):  # noqa: S108
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(fd, start, length)

    monkeypatch.setattr(os, "posix_fallocate", full)
    expected, _ = job(deaths=lambda: False, state_dir="whole", **RECIPES[name])
    faults.arm("keeper.flip", 11)
    got, begun = job(deaths=lambda: True, state_dir="disk", **RECIPES[name])
    assert (faults.struck, begun[-1].resumed) == (1, True)
    assert [key for key in expected if got[key] != expected[key]] == []
    assert f"it is kept on the disk, in {tmp_path}/disk/worker-0/slots" in caplog.text


@pytest.mark.parametrize("nth", [1, 2, 4, 5])
def test_a_worker_killed_while_it_begins_begins_anew(job, faults, uninterrupted, nth):
    name = "server-adam"
    expected = uninterrupted.get(name) or job(deaths=lambda: False, **RECIPES[name])[0]
    faults.arm("keeper.copy", nth)
    got, _ = job(deaths=lambda: True, state_dir="killed", **RECIPES[name])
    assert faults.struck == 1
    assert [key for key in expected if got[key] != expected[key]] == []


def test_a_worker_killed_in_a_round_that_it_sits_out_sits_it_out(job, faults):
    given = {"recipe": "server-adam", "sits_out": 2}
    expected, _ = job(deaths=lambda: False, state_dir="whole", **given)
    faults.arm("keeper.close", 4)
    got, begun = job(deaths=lambda: True, **given)
    assert faults.struck == 1
    assert begun[-1].resumed
    assert [key for key in expected if got[key] != expected[key]] == []


@pytest.mark.parametrize("places", TWICE)
@pytest.mark.parametrize("name", ["server-adam", "shared-direction", "turns"])
def test_a_worker_killed_again_before_its_weights_were_kept_goes_on_all_the_same(
    job, faults, uninterrupted, name, places
):
    """The first kill leaves weights of the round before, the second one a round that was begun."""
    first, second = places
    if name not in uninterrupted:
        uninterrupted[name], _ = job(deaths=lambda: False, state_dir="whole", **RECIPES[name])
    expected = uninterrupted[name]

    def strike_again() -> bool:
        if faults.struck == 1:
            faults.arm(second, 1)
        return True

    faults.arm(first, PLACES[first])
    got, begun = job(deaths=strike_again, **RECIPES[name])
    assert faults.struck == 2
    assert begun[-1].resumed
    assert [key for key in expected if got[key] != expected[key]] == []


def test_so_does_one_whose_job_went_on_without_it_between_two_kills(serve, tmp_path, faults):
    endpoint = serve().endpoint

    def make(rank: int) -> psq.torch.Worker:
        given = {"recipe": "server-adam", "consistency": "asp", "lr": 0.02, "connect": endpoint}
        given |= {"rank": rank, "world_size": 2, "state_dir": str(tmp_path)}
        return psq.torch.Worker(make_model(0), **given)

    def step(worker: psq.torch.Worker) -> None:
        for parameter in worker._table.parameters:
            parameter.grad = torch.ones_like(parameter)
        worker.step()

    dying, other = make(0), make(1)
    faults.arm("keeper.closed", 1)
    with pytest.raises(DiedError):
        step(dying)
    be_killed(dying)
    before = other.version
    for _ in range(3):
        step(other)
    assert other.version > before
    dying = make(0)
    assert dying.resumed
    faults.arm("keeper.flip", 1)
    with pytest.raises(DiedError):
        step(dying)
    be_killed(dying)
    last = make(0)
    assert (faults.struck, last.resumed, last._client.resets) == (2, True, 0)
    step(last)
    for worker in (last, other):
        worker.close()
