"""`psq simulate`: what is typed becomes a job, and what it came to is said and kept."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import textwrap

import pytest
from rich.console import Console

from psq.config import SimulateConfig, WorkerConfig
from psq.errors import ConfigError, StateError
from psq_worker.simulate import Crash
from psq_worker.simulate.attacks import Attack
from psq_worker.simulate.command import run_simulate
from psq_worker.simulate.report import _mark_dense, summary_table
from psq_worker.simulate.settings import config_of, parse_seconds
from psq_worker.tasks import get_task

TASK = """
    import torch
    from torch import nn


    class Line:
        name = "line"
        metric = "error"

        def model(self, seed):
            torch.manual_seed(seed)
            return nn.Linear(6, 2)

        def loss(self, model, batch):
            return (model(batch) - batch[:, :2]).square().mean()

        def batches(self, *, rank, world_size, batch_size, seed, start_step=0):
            step = start_step
            while True:
                whole = torch.Generator().manual_seed(seed * 1000 + step)
                batch = torch.randn(world_size * batch_size, 6, generator=whole)
                yield batch[rank * batch_size : (rank + 1) * batch_size]
                step += 1

        def evaluate(self, model):
            with torch.no_grad():
                return {"error": float(self.loss(model, torch.eye(6)))}
"""


@pytest.fixture
def task(tmp_path, monkeypatch):
    """A task's name; it lies in the folder where the command runs."""
    (tmp_path / "simulated_line.py").write_text(textwrap.dedent(TASK))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "simulated_line:Line"


def read(wanted: SimulateConfig, **told):
    return config_of(WorkerConfig(**told), wanted, get_task("char-lm"))


def test_texts_become_numbers():
    wanted = SimulateConfig(
        workers=30,
        servers=2,
        bandwidth="2.5gbit",
        server_bandwidth="loopback",
        latency="50us",
        compute="1.5ms",
        reduce="2ms",
        stragglers="0.1:4",
        slow_links="0.5:2",
        pauses="0.01:3s",
        crash="3@20+5s, 4@1",
        leave="7@40",
        attack="sign-flip:2:3",
    )
    made = read(wanted, consistency="ssp:3", seed=9, residual="bf16", lr=0.5)
    assert (made.workers, made.servers, made.seed, made.lr) == (30, 2, 9, 0.5)
    assert made.network.bandwidth_bit_s == pytest.approx(2.5e9, rel=0.1)
    assert made.network.server_bit_s == math.inf
    assert made.network.latency_s == pytest.approx(50e-6)
    assert (made.compute_s, made.reduce_s) == pytest.approx((1.5e-3, 2e-3))
    faults = made.faults
    assert (faults.stragglers, faults.slow_links) == ((0.1, 4.0), (0.5, 2.0))
    assert (faults.pause_chance, faults.pause_s) == (0.01, 3.0)
    assert faults.crashes == (Crash(3, 20, 5.0), Crash(4, 1), Crash(7, 40, leaves=True))
    assert made.attack == Attack("sign-flip", 2, 3.0)
    assert (made.consistency, made.residual) == ("ssp:3", "bf16")


@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        ("bandwidth", "fast", "bandwidth: .*100mbit"),
        ("latency", "3", "latency: expected a time"),
        ("compute", "-1ms", "compute: expected a time"),
        ("stragglers", "0.1", "stragglers: expected SHARE:FACTOR"),
        ("stragglers", "a:b", "stragglers: expected a number"),
        ("pauses", "0.1", "pauses: expected a time"),
        ("crash", "3", "crash: expected RANK@STEP"),
        ("leave", "3@4+5s", "leave: expected RANK@STEP"),
        ("attack", "sign-flip", "attack: expected KIND:N"),
        ("attack", "rumour:1", "attack: expected one of .*sign-flip"),
        ("attack", "silent:16", "nobody honest"),
    ],
)
def test_a_text_that_says_nothing_is_refused_by_name(key, text, words):
    with pytest.raises(ConfigError, match=words):
        read(SimulateConfig(**{key: text}))


def test_times_have_units():
    assert [parse_seconds("x", text) for text in ("2us", "1.5ms", "3s", "2min")] == pytest.approx(
        [2e-6, 1.5e-3, 3.0, 120.0]
    )


def run(task, **wanted) -> None:
    told = WorkerConfig(task=task, steps=12, batch_size=4, lr=0.05, eval_every=4, recipe="qadam")
    run_simulate(told, SimulateConfig(workers=3, bandwidth="1mbit", **wanted))


def test_the_report_has_every_step_score_and_the_result(task, tmp_path, capsys):
    run(task, save_report="out.json", json=True)
    lines = [json.loads(line) for line in (tmp_path / "out.json").read_text().splitlines()]
    kinds = [line["psq"] for line in lines]
    assert kinds[0] == "simulation"
    assert kinds[-1] == "result"
    assert kinds.count("step") == 12
    assert [line["step"] for line in lines if line["psq"] == "score"] == [4, 8, 12]
    assert lines[0]["recipe"]["name"] == "qadam"
    assert lines[0]["network"]["bandwidth_bit_s"] == pytest.approx(1e6, rel=0.1)
    result = json.loads(capsys.readouterr().out)
    assert result == lines[-1]
    assert result["steps"] == 12
    assert result["virtual_s"] == [line for line in lines if line["psq"] == "step"][-1]["virtual_s"]
    assert result["dense_per_step"]["virtual_s"] > 0
    assert (
        result["score"] == [line for line in lines if line["psq"] == "score"][-1]["scores"]["error"]
    )


@pytest.mark.parametrize(("lr", "warns"), [(None, True), (0.1, False)])
def test_a_recipe_without_adam_at_the_tasks_rate_is_warned_of_on_stderr(task, capsys, lr, warns):
    told = WorkerConfig(task=task, steps=1, batch_size=4, lr=lr, recipe="ef-sgd")
    run_simulate(told, SimulateConfig(workers=2, alone=True))
    said = capsys.readouterr().err
    assert ("what recipe ef-sgd wants: SGD's own learning rate" in said) is warns


def test_the_table_has_both_columns_or_dashes(task, capsys):
    run(task)
    shown = capsys.readouterr().out
    assert "dense fp32" in shown
    assert "virtual time of a step" in shown
    run(task, alone=True, json=True)
    plain = json.loads(capsys.readouterr().out)
    assert plain["dense_per_step"] is None
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(summary_table(plain))
    assert "dense" not in console.export_text()


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is optional")
@pytest.mark.parametrize(("dense_s", "lines"), [(12.0, 2), (500.0, 1)])
def test_the_end_of_dense_fp32_is_told_and_does_not_squeeze_what_is_to_be_seen(dense_s, lines):
    figure_module = pytest.importorskip("matplotlib.figure")
    axes = figure_module.Figure().subplots(2, 1, sharex="col")
    for axis in axes:
        axis.plot([0.0, 10.0], [1.0, 0.5])
    _mark_dense(axes, dense_s, 10.0)
    assert [len(axis.lines) for axis in axes] == [lines, lines]
    assert axes[0].get_xlim()[1] < 15.0
    told = axes[0].get_title(loc="right")
    assert told.startswith(f"dense fp32 ends at {dense_s:,.3g} s")
    assert ("50 times as late" in told) == (dense_s == 500.0)


def test_the_picture_is_drawn(task, tmp_path):
    run(task, picture="deep/picture.png")
    assert (tmp_path / "deep" / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_that_cannot_be_written_is_refused_before_anything_runs(task, capsys):
    with pytest.raises(StateError, match="save_report: cannot write"):
        run(task, save_report="no/such/folder/out.json")
    assert capsys.readouterr().out == ""
