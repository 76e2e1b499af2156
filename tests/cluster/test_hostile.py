"""Five real workers, one of which lies: what it says is refused by name, and the others learn."""

import json
import os
import urllib.request

import numpy as np
import pytest

WORKERS, LIAR, STEPS = 5, 2, 40
KRUM = ("ef-sgd", "aggregate=krum", "aggregate.m=2", "uplink.error_feedback=false")
TRIMMED = ("ef-sgd", "aggregate=trimmed-mean")
MAJORITY = ("sign-majority",)
MEAN = ("ef-sgd",)


def train(cluster, recipe, *given, lie=-100.0, lr=0.1):
    """A job with one liar: the server's /status before the last step, its end, and the loss."""
    server = cluster.server("--json", "--world-size", str(WORKERS))
    gate, out = cluster.folder / "gate", cluster.folder / "replica.npz"
    os.mkfifo(gate)
    common = ["--steps", str(STEPS), "--world-size", str(WORKERS), "--lr", str(lr)]
    more = {
        0: ["--out", str(out), "--gate", str(gate), "--gate-step", str(STEPS - 1)],
        LIAR: ["--lie", str(lie)],
    }
    variables = {"PSQ_RECIPE": recipe, "PSQ_WITH": " ".join(given)}
    workers = [
        cluster.worker(rank, server.endpoint, *common, *more.get(rank, []), **variables)
        for rank in range(WORKERS)
    ]
    workers[0].wait_line("^gate$")
    url = server.metrics.removesuffix("/metrics") + "/status"
    with urllib.request.urlopen(url) as answer:  # noqa: S310 - loopback
        status = json.load(answer)
    gate.write_bytes(b"")
    assert [worker.wait() for worker in workers] == [0] * WORKERS
    assert server.wait() == 0
    return status, json.loads(server.out().splitlines()[-1]), loss(out)


def loss(path):
    """Of train_tiny's model, on samples that no step has seen."""
    with np.load(path) as w:
        x = np.random.default_rng((0, STEPS)).standard_normal((400, 16), np.float32)
        hidden = np.tanh(x @ w["0.weight"].T + w["0.bias"])
        hidden = np.tanh(hidden @ w["2.weight"].T + w["2.bias"])
        said = hidden @ w["4.weight"].T + w["4.bias"]
        return float(((said - np.tanh(x[:, :4] * 2.0)) ** 2).mean())


def test_krum_refuses_a_liar_by_name_and_the_others_learn(cluster):
    status, end, final = train(cluster, *KRUM)
    refused = status["rejected"]
    assert refused[str(LIAR)] == {"krum": STEPS - 1}
    assert sum(kinds["krum"] for kinds in refused.values()) == (WORKERS - 2) * (STEPS - 1)
    assert end["rejected"][str(LIAR)] == {"krum": STEPS}
    assert final < 0.6


@pytest.mark.parametrize(
    ("recipe", "lr"), [(MAJORITY, 0.003), (TRIMMED, 0.1)], ids=["majority", "trimmed-mean"]
)
def test_others_learn_beside_a_liar_that_is_outvoted(cluster, recipe, lr):
    status, _, final = train(cluster, *recipe, lr=lr)
    assert final < 0.6
    assert status["rejected"] == {}


def test_the_mean_does_not_learn_beside_a_liar(cluster):
    *_, final = train(cluster, *MEAN)
    assert not final < 1.0  # or NaN


def test_what_is_too_large_is_refused_before_any_rule_sees_it(cluster):
    status, _, final = train(cluster, *KRUM, lie=1e25)
    assert status["rejected"][str(LIAR)] == {"payload": STEPS - 1}
    assert final < 0.6
