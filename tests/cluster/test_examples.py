"""The examples, as a reader would run them: games of two players, and a recipe of one's own."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ROUNDS = 3


def psq(cluster, *words, **variables):
    return cluster.command(sys.executable, "-m", "psq_worker.cli", *words, **variables)


# ---- a game


@pytest.mark.parametrize(("recipe", "is_drawn_in"), [("dqgan", True), ("ef-sgd", False)])
def test_with_the_same_codecs_looking_ahead_ends_a_game_and_descent_runs_away(
    cluster, recipe, is_drawn_in
):
    server = cluster.server("--world-size", "2")
    asked = {
        "PSQ_WORLD_SIZE": "2",
        "PSQ_RECIPE": recipe,
        "PSQ_LR": "0.1",
        "PSQ_UPLINK": "log:k=2",
        "PSQ_DOWNLINK": "delta:log:k=2",
    }
    script = EXAMPLES / "gan" / "bilinear.py"
    workers = [
        cluster.worker(rank, server.endpoint, "--steps", "400", script=script, **asked)
        for rank in range(2)
    ]
    assert [worker.wait() for worker in workers] == [0, 0]
    first, second = (json.loads(worker.out().splitlines()[-1]) for worker in workers)
    assert first["end"] == second["end"]
    grown = first["end"] / first["start"]
    assert grown < 0.3 if is_drawn_in else grown > 3.0


def test_the_ring_is_scored_at_the_jobs_own_weights(cluster):
    out = cluster.folder / "ring.json"
    script = str(EXAMPLES / "gan" / "ring.py")
    words = ("-n", "2", "--recipe", "dqgan", "--lr", "0.1", script, "--")
    end = psq(cluster, "launch", *words, "--steps", "16", "--batch", "8", "--out", str(out))
    assert end.wait() == 0
    said = json.loads(out.read_text())
    assert [at["step"] for at in said["curve"]] == list(range(2, 17, 2))
    assert said["workers"] == 2
    assert 3.0 < said["bits"]["up"] < 8.0
    assert all(np.isfinite(at["gap"]) for at in said["curve"])
    assert said["curve"][0]["points"] != said["curve"][-1]["points"]


# ---- a recipe that another package brings


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The package examples/fedgen, built and installed by pip into a folder of its own."""
    pytest.importorskip("setuptools", reason="builds the example, without a network")
    folder = tmp_path_factory.mktemp("site")
    source = folder / "source"
    shutil.copytree(EXAMPLES / "fedgen", source)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    offline = ("--no-index", "--no-deps", "--no-build-isolation", "--no-compile")
    target = folder / "target"
    subprocess.run([*pip, *offline, "--target", str(target), str(source)], check=True, timeout=60)
    return str(target)


def test_an_installed_recipe_is_listed_with_who_brings_it(cluster, site):
    listing = psq(cluster, "recipes", "--json", PYTHONPATH=site)
    assert listing.wait() == 0
    found = next(each for each in json.loads(listing.out()) if each["name"] == "fedgen")
    assert (found["package"], found["fault"]) == ("psq-fedgen", "")
    assert found["parts"]["apply"]["kind"] == "teacher"
    assert 0.2 < found["bits"]["up"] < 0.3


def test_a_recipe_that_is_not_installed_is_refused_by_name(cluster):
    script = str(EXAMPLES / "fedgen" / "train.py")
    end = psq(cluster, "launch", "-n", "2", "--recipe", "fedgen", script)
    assert end.wait() == 78
    assert "no recipe 'fedgen'; there are: server-adam" in end.err()


def train(cluster, site, *words):
    """Train for some rounds with four workers; what the server saved."""
    saved = cluster.folder / "weights.safetensors"
    script = str(EXAMPLES / "fedgen" / "train.py")
    flags = ("-n", "4", "--recipe", "fedgen", "--local-steps", "4", "--save", str(saved))
    own = ("--rounds", str(ROUNDS), "--evaluate-every", "1", "--out", "measured.json")
    end = psq(cluster, "launch", *flags, *words, script, "--", *own, PYTHONPATH=site)
    assert end.wait() == 0
    measured = json.loads((cluster.folder / "measured.json").read_text())
    assert [each["round"] for each in measured] == list(range(1, ROUNDS + 1))
    return load_file(saved)


def is_told(weights):
    """Whether the classifier names each class by the teacher's mean feature of it."""
    scores = np.maximum(weights["means"], 0.0) @ weights["head.weight"].T + weights["head.bias"]
    return (scores.argmax(axis=1) == np.arange(len(scores))).all()


def test_a_server_step_with_a_model_of_its_own_trains_it_from_round_to_round(cluster, site):
    weights = train(cluster, site)
    assert is_told(weights)


def test_without_its_steps_the_teacher_rests_and_the_others_move(cluster, site):
    weights = train(cluster, site, "--with", "apply.steps=0")
    assert not is_told(weights)
    assert weights["means"].min() >= 0.0
    assert weights["means"].max() <= 0.1
