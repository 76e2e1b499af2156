"""codec="auto": rank 0 chooses from what it measures, the others adopt, nothing else is assumed."""

import functools
import logging
import threading

import numpy as np
import pytest
import torch
from torch import nn

import psq.torch
from psq.advice import LOOPBACK, Rates, candidates, measure_rates
from psq.client import LinkRates
from psq.config import WorkerConfig
from psq.errors import ConfigError, GaveUpError, RemotePlanError, UsageError
from psq.presets import preset
from psq.torch import auto

SLOW = LinkRates(round_trip_s=1e-3, up_mbit_s=100.0, down_mbit_s=90.0)
FAST = LinkRates(round_trip_s=1e-4, up_mbit_s=1e6, down_mbit_s=1e6)
SERVER = "tcp://10.0.0.1:5555"


def make_model(width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2))


def step_of(model: nn.Module, worker: psq.torch.Worker) -> psq.torch.StepReport:
    x = torch.linspace(-1, 1, 32).reshape(8, 4)
    model(x).square().mean().backward()
    return worker.step()


def rates_where(name: str):
    """Rates with which one candidate is much faster than all others."""

    def measured(choices, **_):
        return {c.name: Rates(*[1e9 if c.name == name else 1e3] * 3) for c in choices}

    return measured


@pytest.fixture
def quick(monkeypatch):
    """Measure for as short as can be."""
    monkeypatch.setattr(auto, "measure_rates", functools.partial(measure_rates, budget_s=0.0))


pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def settled(monkeypatch):
    """`settle` of a rank 0 that measured this link, with no job there yet."""

    def settling(rates: LinkRates, name: str = "", numel: int = 10_000_000, **told):
        monkeypatch.setattr(auto, "probe_link", lambda *_, **__: rates)
        monkeypatch.setattr(auto, "ask_job", nobody)
        if name:
            monkeypatch.setattr(auto, "measure_rates", rates_where(name))
        else:
            everyone = {c.name: Rates(2e9, 1e9, 5e9, 8e9) for c in candidates()}
            monkeypatch.setattr(auto, "measure_rates", lambda *_, **__: everyone)
        config = WorkerConfig(**{"codec": "auto", "world_size": 2, "connect": SERVER, **told})
        return auto.settle(config, [("w", (numel,))], preset("server-adam"))

    def nobody(*_, **__):
        msg = "no job"
        raise GaveUpError(msg)

    return settling


@pytest.mark.parametrize("candidate", candidates(), ids=lambda c: c.name)
def test_rank_0_takes_what_it_measured_to_be_the_fastest(join, monkeypatch, candidate):
    monkeypatch.setattr(auto, "measure_rates", rates_where(candidate.name))
    model = make_model()
    worker = join(model, codec="auto", recipe="server-adam")
    assert worker.plan.recipe == candidate.make()
    assert step_of(model, worker).applied


def test_a_slow_link_is_answered_with_few_bits_and_a_line_that_says_why(settled, caplog):
    with caplog.at_level(logging.INFO, logger="psq.torch"):
        choice = settled(SLOW)
    assert choice.recipe.uplink.codec.startswith("lloyd-max:bits=4")
    [line] = [r.getMessage() for r in caplog.records if "codec=auto" in r.getMessage()]
    assert line == f"codec=auto {choice.words}"
    assert "chosen at 100 Mbit/s up and 90 down" in line
    assert "where dense fp32 takes" in line


def test_a_link_that_costs_nothing_leaves_dense_gradients_where_they_are_as_fast(settled):
    choice = settled(FAST, name="fp32")
    assert choice.recipe == preset("fp32")
    assert "where dense fp32 takes" not in choice.words


def test_the_other_ranks_take_over_what_rank_0_chose(join, serve):
    server = serve()
    workers: dict[int, psq.torch.Worker] = {}
    models = [make_model(), make_model()]

    def be(rank):
        told = {"codec": "auto", "recipe": "server-adam", "connect": server.endpoint}
        workers[rank] = join(models[rank], rank=rank, world_size=2, **told)
        for _ in range(3):
            step_of(models[rank], workers[rank])

    threads = [threading.Thread(target=be, args=(rank,)) for rank in (1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert workers[1].plan.recipe == workers[0].plan.recipe
    assert workers[0].choice.startswith("chosen on one machine")
    assert workers[1].choice.startswith("as the job has it")
    for mine, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        np.testing.assert_array_equal(mine.detach(), theirs.detach())


def test_a_rank_0_that_comes_back_takes_over_the_job_s_codecs(join, serve, monkeypatch):
    server = serve()
    told = {"recipe": "server-adam", "connect": server.endpoint}
    monkeypatch.setattr(auto, "measure_rates", rates_where("bf16"))
    first = join(make_model(), codec="auto", **told)
    monkeypatch.setattr(auto, "measure_rates", rates_where("8 bits"))
    again = join(make_model(), codec="auto", **told)
    assert again.plan.recipe == first.plan.recipe
    assert again.plan.recipe.uplink.codec == "bf16"


def test_another_model_is_refused_with_the_first_difference(join, serve):
    server = serve()
    join(make_model(), connect=server.endpoint, world_size=2)
    with pytest.raises(RemotePlanError, match=r"trains another model.*\(9, 4\).*\(8, 4\)"):
        join(
            make_model(9),
            connect=server.endpoint,
            rank=1,
            world_size=2,
            codec="auto",
            recipe="server-adam",
        )


def test_a_rank_that_hears_of_no_job_gives_up(join, serve):
    told = {"codec": "auto", "recipe": "server-adam", "give_up_after_s": 0.2}
    with pytest.raises(GaveUpError, match="the job of server"):
        join(make_model(), connect=serve().endpoint, rank=1, world_size=2, **told)


def test_adams_settings_stay_this_worker_s(join, monkeypatch):
    monkeypatch.setattr(auto, "measure_rates", rates_where("fp32"))
    worker = join(make_model(), codec="auto", recipe="server-adam", adam="beta=0.8")
    assert worker.plan.recipe.adam.beta == 0.8


@pytest.mark.parametrize(
    ("told", "what"),
    [
        ({"uplink": "sign"}, "uplink, which is given as sign"),
        ({"downlink": "delta:sign"}, "downlink, which is given as delta:sign"),
        ({"recipe": "qadam"}, "recipe, which is given as qadam"),
    ],
)
def test_auto_beside_what_it_would_choose_is_refused(told, what):
    with pytest.raises(ConfigError, match=f"codec: auto chooses the {what}"):
        WorkerConfig(codec="auto", **told)


def test_auto_beside_a_recipe_given_as_a_value_is_refused(join):
    with pytest.raises(ConfigError, match="cannot be given as a value"):
        join(make_model(), codec="auto", recipe=preset("server-adam"))


def test_a_typed_codec_is_refused_where_the_script_gives_a_recipe_as_a_value():
    given = psq.config.Given({"codec": "auto"})
    with psq.config.use_given(given), pytest.raises(UsageError, match="--codec auto would have no"):
        psq.torch.Worker(make_model(), recipe=preset("fp32"), connect=SERVER)


@pytest.mark.parametrize(
    ("connect", "expected"),
    [
        ("tcp://127.0.0.1:1", {"one_machine": True, "beside": False, "servers": 1}),
        ("tcp://127.0.0.1:1,tcp://127.0.0.1:2", {"one_machine": True, "servers": 2}),
        (SERVER, {"one_machine": False, "beside": False}),
        (f"tcp://127.0.0.1:1,{SERVER}", {"one_machine": False, "beside": True, "servers": 2}),
    ],
)
def test_where_servers_are_is_told_by_their_addresses(connect, expected):
    config = WorkerConfig(codec="auto", world_size=2, connect=connect)
    cluster = auto.cluster_of(config, [(endpoint, SLOW) for endpoint in config.endpoints])
    assert {name: getattr(cluster, name) for name in expected} == expected
    assert (cluster.link is LOOPBACK) == expected["one_machine"]
    if not expected["one_machine"]:
        assert cluster.link.up_bit_s == 100e6
