"""Two real workers and a real server, over TCP."""

import json
import os
import re
import signal

import numpy as np
import pytest
from safetensors.numpy import load_file

from psq.codec import ShardCodec, get_codec
from psq.errors import EXIT_FENCED
from psq.plan import Plan
from psq.presets import PRESETS, preset
from psq_server.saving import merge, part_path

FOR_TWO = {"kardam": "aggregate.f=0"}
"""What a recipe needs to run with two workers only."""


def weights(path) -> dict[str, np.ndarray]:
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files}


def same_bytes(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


def summary(worker) -> dict:
    return json.loads(worker.out().splitlines()[-1])


def train(cluster, recipe, *options, connect=None, world_size=2, tag="") -> dict:
    """Run a job to its end; returns its server, workers, replicas and saved weights."""
    saved = cluster.folder / f"saved{tag}.safetensors"
    host = cluster.server("--save", str(saved), "--world-size", str(world_size))
    endpoint = connect(host.endpoint) if connect else host.endpoint
    outs = [cluster.folder / f"replica{tag}{rank}.npz" for rank in range(world_size)]
    size = ("--world-size", str(world_size))
    workers = [
        cluster.worker(
            *(rank, endpoint, "--out", str(out), *size, *options),
            PSQ_RECIPE=recipe,
            PSQ_WITH=FOR_TWO.get(recipe, ""),
        )
        for rank, out in enumerate(outs)
    ]
    assert [worker.wait() for worker in workers] == [0] * world_size
    assert host.wait() == 0
    replicas = [weights(out) for out in outs]
    return {"server": host, "workers": workers, "replicas": replicas, "saved": load_file(saved)}


def image(saved: dict, recipe: str) -> dict:
    """What workers see of these weights: through the downlink's codec where it sends weights."""
    made = preset(recipe).with_options(*FOR_TWO.get(recipe, "").split())
    plan = Plan.of([(name, value.shape) for name, value in saved.items()], made, 2)
    if plan.recipe.downlink.kind != "weights":
        return saved
    flat = np.concatenate([saved[name].ravel() for name, _ in plan.tensors])
    for shard in plan.layout.shards:
        codec = ShardCodec(get_codec(plan.recipe.downlink.codec), shard)
        part = flat[shard.offset : shard.offset + shard.numel]
        payload = np.empty(codec.nbytes, np.uint8)
        codec.encode(part, payload)
        codec.decode(payload, part)
    sizes = np.cumsum([np.prod(shape) for _, shape in plan.tensors])[:-1]
    parts = np.split(flat, sizes)
    return {n: p.reshape(shape) for (n, shape), p in zip(plan.tensors, parts, strict=True)}


# What an optimizer of the worker's own needs is tested with `psq.torch`.
@pytest.mark.parametrize("recipe", [name for name in PRESETS if name != "average"])
def test_replicas_end_with_the_bytes_of_the_server(cluster, recipe):
    job = train(cluster, recipe)
    first, second = job["replicas"]
    assert same_bytes(first, second)
    order = {name: job["saved"][name] for name in first}
    assert same_bytes(first, image(order, recipe))


def test_two_runs_with_the_same_seed_give_the_same_bytes(cluster):
    first = train(cluster, "server-adam", "--seed", "3", tag="a")
    second = train(cluster, "server-adam", "--seed", "3", tag="b")
    assert same_bytes(first["saved"], second["saved"])
    assert same_bytes(first["replicas"][0], second["replicas"][0])


def test_pushing_while_backward_runs_changes_no_byte(cluster):
    """Two workers, two servers: with and without overlap."""
    replicas = []
    for overlap in ("0", "1"):
        servers = [cluster.server("--world-size", "2") for _ in range(2)]
        connect = ",".join(server.endpoint for server in servers)
        outs = [cluster.folder / f"overlap{overlap}.{rank}.npz" for rank in range(2)]
        workers = [
            cluster.worker(
                *(rank, connect, "--hidden", "300", "--steps", "6", "--out", str(out)),
                PSQ_RECIPE="server-adam",
                PSQ_OVERLAP=overlap,
            )
            for rank, out in enumerate(outs)
        ]
        assert [worker.wait() for worker in workers] == [0, 0]
        assert [server.wait() for server in servers] == [0, 0]
        assert all(report["applied"] for report in summary(workers[0])["reports"])
        replicas += [weights(out) for out in outs]
    assert all(same_bytes(replicas[0], replica) for replica in replicas[1:])


@pytest.mark.parametrize("rhythm", [{"LOCAL_STEPS": "3"}, {"EVERY": "2"}, {"RECIPE": "local-adam"}])
def test_workers_that_say_less_end_with_the_bytes_of_the_servers(cluster, rhythm):
    """Two workers, two servers; what each server saves is its part of the replicas."""
    saved = cluster.folder / "saved.safetensors"
    servers = [cluster.server("--world-size", "2", "--save", str(saved)) for _ in range(2)]
    connect = ",".join(server.endpoint for server in servers)
    outs = [cluster.folder / f"replica{rank}.npz" for rank in range(2)]
    env = {"PSQ_RECIPE": "qadam-1bit", **{f"PSQ_{name}": text for name, text in rhythm.items()}}
    workers = [
        cluster.worker(rank, connect, "--hidden", "300", "--out", str(out), **env)
        for rank, out in enumerate(outs)
    ]
    assert [worker.wait() for worker in workers] == [0, 0]
    assert [server.wait() for server in servers] == [0, 0]
    first, second = (weights(out) for out in outs)
    assert same_bytes(first, second)
    merge([part_path(saved, server, 2) for server in range(2)], saved)
    assert same_bytes(first, load_file(saved))


def reference(cluster, *options: str) -> dict:
    out = cluster.folder / "reference.npz"
    alone = cluster.worker(0, "tcp://127.0.0.1:1", "--reference", "--out", str(out), *options)
    assert alone.wait() == 0
    return weights(out)


def test_one_worker_without_compression_is_torch_adam(cluster):
    options = ("--steps", "20", "--world-size", "1")
    job = train(cluster, "fp32", "--steps", "20", world_size=1)
    for name, expected in reference(cluster, *options).items():
        np.testing.assert_allclose(job["replicas"][0][name], expected, rtol=2e-6, atol=2e-7)


def test_two_workers_are_one_with_twice_the_batch(cluster):
    job = train(cluster, "fp32", "--steps", "20")
    for name, expected in reference(cluster, "--steps", "20", "--world-size", "2").items():
        np.testing.assert_allclose(job["replicas"][0][name], expected, rtol=1e-4, atol=1e-5)


def test_a_gradient_that_is_not_finite_is_skipped_and_training_goes_on(cluster):
    server = cluster.server("--world-size", "2", "--save", str(cluster.folder / "w.safetensors"))
    sound = cluster.worker(0, server.endpoint, "--steps", "6", PSQ_RECIPE="server-adam")
    sick = cluster.worker(
        1, server.endpoint, "--steps", "6", "--nan-step", "2", PSQ_RECIPE="server-adam"
    )
    assert (sound.wait(), sick.wait(), server.wait()) == (0, 0, 0)
    told = summary(sick)
    assert told["skipped"] == 1
    assert [report["applied"] for report in told["reports"]] == [
        True,
        True,
        False,
        True,
        True,
        True,
    ]
    assert "'2.weight' is not finite" in told["reports"][2]["reason"]
    assert told["residual_finite"]
    assert told["residual_norm"] > 0
    assert re.search(r"step 2: the gradient of '2.weight' is not finite; rank 1", sick.err())
    assert all(report["applied"] for report in summary(sound)["reports"])
    assert all(
        np.isfinite(value).all() for value in load_file(cluster.folder / "w.safetensors").values()
    )


def test_a_killed_worker_is_replaced_by_a_new_process_with_its_rank(cluster):
    server = cluster.server("--world-size", "2")
    gate = cluster.folder / "gate"
    os.mkfifo(gate)
    outs = [str(cluster.folder / f"{name}.npz") for name in ("first", "second")]
    first = cluster.worker(0, server.endpoint, "--steps", "6", "--out", outs[0])
    doomed = cluster.worker(
        1, server.endpoint, "--steps", "6", "--gate", str(gate), "--gate-step", "3"
    )
    doomed.wait_line("^gate$")
    doomed.signal(signal.SIGKILL)
    assert doomed.wait() == -signal.SIGKILL
    fresh = cluster.worker(1, server.endpoint, "--steps", "6", "--out", outs[1])
    assert fresh.wait_line(r"joined version=(\d+)")[1] == "3"
    assert (first.wait(), fresh.wait(), server.wait()) == (0, 0, 0)
    assert same_bytes(*(weights(out) for out in outs))


def gated(cluster, server, name: str, step: int):
    """A lone worker that stands before `step` until its gate is written to."""
    gate = cluster.folder / name
    os.mkfifo(gate)
    worker = cluster.worker(
        0, server.endpoint, "--world-size", "1", "--gate", str(gate), "--gate-step", str(step)
    )
    worker.wait_line("^gate$")
    return worker, gate


def test_a_living_worker_whose_rank_is_taken_over_is_fenced(cluster):
    server = cluster.server("--world-size", "1")
    old, old_gate = gated(cluster, server, "old", 1)
    new, new_gate = gated(cluster, server, "new", 2)
    old_gate.write_bytes(b"")
    assert old.wait() == EXIT_FENCED
    assert "another process holds rank 0" in old.err()
    new_gate.write_bytes(b"")
    assert (new.wait(), server.wait()) == (0, 0)


def test_one_bit_each_way_takes_28_times_fewer_bytes_than_fp32_counted_at_the_socket(cluster):
    """The proxy sees everything: headers, framing, heartbeats."""
    steps, hidden = 4, 1024
    server = cluster.server("--world-size", "1")
    proxy = cluster.proxy(server.endpoint)
    gate = cluster.folder / "gate"
    os.mkfifo(gate)
    worker = cluster.worker(
        0, proxy.endpoint, "--world-size", "1", "--hidden", str(hidden), "--steps", str(steps),
        "--gate", str(gate), PSQ_RECIPE="qadam-1bit",
    )  # fmt: skip
    worker.wait_line("^gate$")
    before = (proxy.sent, proxy.received)
    gate.write_bytes(b"")
    assert worker.wait() == 0
    numel = 16 * hidden + hidden + hidden * hidden + hidden + hidden * 4 + 4
    assert numel >= 1_000_000
    dense = 4 * numel * steps
    for after, start, field in zip(
        (proxy.sent, proxy.received), before, ("sent_bytes", "received_bytes"), strict=True
    ):
        assert dense / (after - start) >= 28
        reported = sum(report[field] for report in summary(worker)["reports"])
        assert abs(reported - (after - start)) < 2000  # the goodbye, and heartbeats at the edges


def test_a_connection_reset_in_the_middle_of_a_round_loses_nothing(cluster):
    calm = train(cluster, "server-adam", "--hidden", "512", tag="calm")
    proxies = []

    def through_proxy(endpoint: str) -> str:
        proxies.append(cluster.proxy(endpoint))
        # Past the initial weights (1.1 MB of f32) and into the pushes (140 kB each round and rank).
        proxies[0].reset_after(1_500_000)
        return proxies[0].endpoint

    job = train(cluster, "server-adam", "--hidden", "512", connect=through_proxy, tag="reset")
    assert proxies[0].struck == 1
    told = [summary(worker) for worker in job["workers"]]
    assert sum(each["resent_frames"] for each in told) >= 1
    assert sum(each["resets"] for each in told) == 0
    assert same_bytes(calm["saved"], job["saved"])
    assert same_bytes(calm["replicas"][0], job["replicas"][0])
