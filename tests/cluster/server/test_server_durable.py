"""A server that is killed and comes back: the job ends as if it had been left alone."""

import signal

import numpy as np
import pytest
from safetensors.numpy import load_file

STEPS = 12
JOB = ("--steps", str(STEPS), "--hidden", "24")


def weights(path):
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def same_bytes(a, b):
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


class Run:
    """One job of two workers, and its server, which may be started again on the same directory."""

    def __init__(self, cluster, name, *options, recipe="server-adam", **variables):
        self.cluster, self.name = cluster, name
        self.saved = cluster.folder / f"{name}.safetensors"
        self.outs = [cluster.folder / f"{name}.{rank}.npz" for rank in range(2)]
        self.options = ("--save", str(self.saved), *options)
        self.server = cluster.server(*self.options, **variables)
        self.workers = [
            cluster.worker(rank, self.server.endpoint, *JOB, "--out", str(out), PSQ_RECIPE=recipe)
            for rank, out in enumerate(self.outs)
        ]

    def again(self, **variables):
        """Start another server in the place of the one that died."""
        self.server = self.cluster.server(
            "--bind", self.server.endpoint, *self.options, **variables
        )

    def end(self):
        """Every process ends well; what the server saved, and what each worker has."""
        assert [worker.wait() for worker in self.workers] == [0, 0]
        assert self.server.wait() == 0
        return [load_file(self.saved), *map(weights, self.outs)]


def undisturbed(cluster, recipe):
    return Run(cluster, "plain", recipe=recipe).end()


def assert_same(one, other):
    assert all(same_bytes(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("recipe", ["server-adam", "qadam-1bit", "shared-direction"])
def test_a_killed_server_that_comes_back_ends_with_the_same_bytes(cluster, recipe):
    kept = ("--state-dir", str(cluster.folder / "state"))
    run = Run(cluster, "killed", *kept, recipe=recipe)
    run.workers[0].wait_line("^step 4")
    run.server.signal(signal.SIGKILL)
    assert run.server.wait() == -signal.SIGKILL
    assert all(worker.exit_code() is None for worker in run.workers)
    run.again()
    ended = run.end()
    assert "recovered" in run.server.err()
    assert_same(ended, undisturbed(cluster, recipe))
