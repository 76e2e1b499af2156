"""A worker's settings: arguments, variables, flags, and which of them win."""

import numpy as np
import pytest
import torch
from torch import nn

import psq.torch
from psq import kernels
from psq.config import Given, use_given
from psq.errors import ConfigError, UsageError
from psq.presets import preset
from psq.recipe import AdamConfig


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def test_adams_settings_may_be_a_text_or_a_variable(join, serve, monkeypatch):
    text = "beta=0.8,weight_decay=0.1"
    wanted = AdamConfig(beta=0.8, weight_decay=0.1)
    assert join(make_model(), adam=text).plan.recipe.adam == wanted
    monkeypatch.setenv("PSQ_ADAM", text)
    assert join(make_model()).plan.recipe.adam == wanted
    for settings in ("beta=0.7", AdamConfig(beta=0.7)):
        worker = join(make_model(), adam=settings, connect=serve().endpoint)
        assert worker.plan.recipe.adam == AdamConfig(beta=0.7)


def test_a_flag_for_adam_is_refused_where_the_script_settles_it():
    with (
        use_given(Given({"adam": "beta=0.8"})),
        pytest.raises(UsageError, match=r"--adam beta=0\.8 would have no effect"),
    ):
        psq.torch.Worker(make_model(), adam=AdamConfig())


def test_a_flag_for_the_rate_is_refused_where_the_scripts_own_optimizer_has_it():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        use_given(Given({"lr": "0.5"})),
        pytest.raises(UsageError, match=r"--lr 0\.5 would have no effect"),
    ):
        psq.torch.Worker(model, recipe="average", optimizer=optimizer)


def test_a_recipe_may_be_a_value_and_then_has_its_own_settings(join):
    recipe = preset("server-adam").with_codecs(uplink="sign", downlink="weights:bf16")
    assert join(make_model(), recipe=recipe).plan.recipe == recipe
    with pytest.raises(ConfigError, match=r"use recipe\.with_adam"):
        psq.torch.Worker(make_model(), recipe=recipe, adam=AdamConfig())


def test_settings_come_from_the_environment(serve, join, monkeypatch):
    server = serve()
    settings = {
        "PSQ_CONNECT": server.endpoint,
        "PSQ_RECIPE": "qadam",
        "PSQ_UPLINK": "sign",
        "PSQ_LR": "0.25",
        "PSQ_RANK": "0",
        "PSQ_WORLD_SIZE": "1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with psq.torch.Worker(make_model()) as worker:
        assert worker.plan.recipe.uplink.codec == "sign"
        assert worker.plan.recipe.name == "qadam"
        assert worker.lr == 0.25
    del join


def test_servers_and_how_to_talk_to_them_may_come_from_the_environment_too(
    serve, join, monkeypatch
):
    monkeypatch.setenv("PSQ_CONNECT", f"{serve().endpoint}, {serve().endpoint}")
    monkeypatch.setenv("PSQ_CONSISTENCY", "ssp:3")
    monkeypatch.setenv("PSQ_RESIDUAL", "bf16")
    monkeypatch.setenv("PSQ_OVERLAP", "1")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(500, 700), nn.Linear(700, 1))
    worker = join(model, recipe="server-adam", connect=None)
    assert (worker.plan.servers, worker.plan.consistency) == (2, "ssp:3")
    assert worker._compressor.state_arrays()["residual"].dtype == np.uint16
    sent_bytes = worker.sent_bytes
    model(torch.ones(1, 500)).sum().backward()
    assert worker.sent_bytes > sent_bytes + 300 * 700 // 2
    assert worker.step().applied


@pytest.mark.parametrize(
    "options",
    ["apply.momentum=0.5 apply.nesterov=true", ["apply.momentum=0.5", "apply.nesterov=true"]],
)
def test_options_of_the_recipes_parts_are_arguments_too(join, options):
    worker = join(make_model(), recipe="fp32-sgd", options=options)
    given = dict(worker.plan.recipe.apply.options)
    assert (given["momentum"], given["nesterov"]) == (0.5, True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 3, "world_size": 2}, "rank: expected 0 to 1"),
        ({"adam": "betta=0.9"}, "adam: no setting 'betta'; did you mean beta[?]"),
        ({"recipe": "adamw"}, "no recipe 'adamw'; there are: server-adam"),
        ({"connect": "nowhere"}, "connect"),
        ({"lr": -1.0}, "lr"),
        ({"consistency": "sps:3"}, "consistency must be bsp"),
        ({"consistency": "ssp:2,quorum=3", "world_size": 2}, "quorum of 3 is more than the 2"),
        ({"connect": ["tcp://127.0.0.1:9", "tcp://127.0.0.1:9"]}, "stands there twice"),
        ({"residual": "fp8"}, "residual"),
        ({"options": "apply.momentun=0.9"}, "momentun"),
        ({"recipe": preset("fp32"), "options": "aggregate=median"}, "use recipe.with_options"),
        ({"codec": "auto", "options": "aggregate=median"}, "auto chooses the recipe's options"),
    ],
)
def test_arguments_that_cannot_be_are_refused_by_name(options, words):
    with pytest.raises(ConfigError, match=words):
        psq.torch.Worker(make_model(), **options)


def test_kernels_that_cannot_run_here_are_refused_before_the_server_is_asked(monkeypatch):
    monkeypatch.setenv(kernels.ENVIRONMENT, "v9")
    monkeypatch.setattr(kernels, "_active", None)
    with pytest.raises(ConfigError, match="kernel level 'v9' cannot run here"):
        psq.torch.Worker(make_model(), connect="tcp://127.0.0.1:9", give_up_after_s=0.1)
