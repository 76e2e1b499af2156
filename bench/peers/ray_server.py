"""A parameter server of Ray actors: the driver, rank 0's clock; actors are processes of Ray's.

As in Ray's own example: every worker hands its gradients over as a list of arrays, the server's
actor takes their mean, makes a step of torch's fused Adam and returns the weights, every worker
loads them. Arrays travel through Ray's object store. On a star each machine is a Ray node, on
loopback one node has all actors.
"""

from __future__ import annotations

import argparse

import numpy as np
import ray
import torch
from given import Given
from job import Job, serve

Arrays = list[np.ndarray]


class Server:
    """The weights and their optimizer."""

    def __init__(self, size: str, lr: float) -> None:
        self.model = Given(size, 0)
        self.model.fill()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=lr, fused=True)

    @torch.no_grad()
    def step(self, first: Arrays, *others: Arrays) -> Arrays:
        """The new weights."""
        for index, tensor in enumerate(self.model.tensors):
            np.copyto(tensor.grad.numpy(), first[index])
            for other in others:
                np.add(tensor.grad.numpy(), other[index], out=tensor.grad.numpy())
            tensor.grad.div_(1 + len(others))
        self.optimizer.step()
        return [tensor.detach().numpy() for tensor in self.model.tensors]


class Worker:
    """A replica whose gradients are given."""

    def __init__(self, size: str, rank: int) -> None:
        self.model = Given(size, rank)

    def gradients(self) -> Arrays:
        """Handed over by copy into the object store."""
        return [given.numpy() for given in self.model.given]

    @torch.no_grad()
    def load(self, weights: Arrays) -> None:
        """Take the new weights."""
        for tensor, array in zip(self.model.tensors, weights, strict=True):
            np.copyto(tensor.numpy(), array)


class Driver(Job):
    """Starts the actors and asks them for steps."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.versions = {"ray": ray.__version__, "torch": torch.__version__}
        where = (
            {"address": options.address} if options.address else {"address": "local", "num_cpus": 2}
        )
        ray.init(**where, include_dashboard=None if options.address else False, log_to_driver=False)
        placed = bool(options.address)
        self.server = actor(Server, "server", placed=placed).remote(options.size, options.lr)
        self.workers = [
            actor(Worker, f"worker{rank}", placed=placed).remote(options.size, rank)
            for rank in range(options.world_size)
        ]

    def step(self) -> None:
        gradients = [worker.gradients.remote() for worker in self.workers]
        weights = self.server.step.remote(*gradients)
        ray.get([worker.load.remote(weights) for worker in self.workers])

    def close(self) -> None:
        ray.shutdown()


def actor(kind: type, machine: str, *, placed: bool) -> ray.actor.ActorClass:
    """The actor's class, bound to a machine by the resource of that name."""
    return ray.remote(num_cpus=0, resources={machine: 1} if placed else {})(kind)


if __name__ == "__main__":
    serve(Driver, {"address": ""})
