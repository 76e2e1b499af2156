"""Torch's DistributedDataParallel over gloo with fused Adam, one rank; `--hook` compresses.

The reducer, its 25 MB buckets and its communication hooks are the real ones. They are driven by a
backward pass that only hands over the given gradients: views, so that autograd takes them without
a copy, and `gradient_as_bucket_view` saves the copy back. `--hook plain` is no DDP but the least
that synchronous training can do with gloo: gradients that lie in 25 MB buckets already, all-reduced
asynchronously, then fused Adam. Compare with whichever fp32 row is faster.

PowerSGD gets one bucket for all: its hook starts all-reduces when earlier ones end, gloo needs them
in the same order on every rank, and with several buckets ranks differ and the job dies (seen).
"""

from __future__ import annotations

import argparse
from datetime import timedelta

import torch
import torch.distributed as dist
from given import Given
from job import Job, say, serve
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as power_sgd
from torch.nn.parallel import DistributedDataParallel

BUCKET_BYTES = 25 << 20  # DDP's default
PATIENCE = timedelta(minutes=10)
ONE_BUCKET_MB = 1 << 12
WARM_UP_STEPS = 2  # of PowerSGD's dense start; the least it accepts


class Hand(torch.autograd.Function):
    """A scalar of all parameters whose gradient is what was given."""

    @staticmethod
    def forward(ctx, given, *tensors):  # noqa: ANN001, ANN002, ANN205 - torch's signature
        ctx.given = given
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx, _):  # noqa: ANN001, ANN205 - torch's signature
        return (None, *(given.detach() for given in ctx.given))


class Handing(Given):
    """The model whose forward pass is that scalar."""

    def forward(self) -> torch.Tensor:
        return Hand.apply(self.given, *self.tensors)


class Ddp(Job):
    """DistributedDataParallel with one of torch's own hooks, or none."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.versions = {"torch": torch.__version__}
        join(options)
        module = Handing(options.size, options.rank)
        hook, *rank = options.hook.split(":")
        self.model = DistributedDataParallel(
            module,
            gradient_as_bucket_view=True,
            bucket_cap_mb=ONE_BUCKET_MB if hook == "powersgd" else None,
        )
        if hook == "powersgd":
            state = power_sgd.PowerSGDState(
                None,
                matrix_approximation_rank=int(rank[0]),
                start_powerSGD_iter=WARM_UP_STEPS,
            )
            self.model.register_comm_hook(state, power_sgd.powerSGD_hook)
        elif hook == "fp16":
            self.model.register_comm_hook(None, default_hooks.fp16_compress_hook)
        elif hook == "bf16":
            self.model.register_comm_hook(None, in_bf16)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=options.lr, fused=True)

    def step(self) -> None:
        self.model().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def close(self) -> None:
        dist.destroy_process_group()


class Plain(Job):
    """All-reduce of buckets in place."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.versions = {"torch": torch.__version__}
        join(options)
        self.model = Given(options.size, options.rank)
        self.buckets = lay_buckets(self.model)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=options.lr, fused=True)

    def fill(self) -> None:
        self.model.fill()

    def step(self) -> None:
        works = [dist.all_reduce(bucket, async_op=True) for bucket in self.buckets]
        for work, bucket in zip(works, self.buckets, strict=True):
            work.wait()
            bucket.div_(dist.get_world_size())
        self.optimizer.step()

    def close(self) -> None:
        dist.destroy_process_group()


def in_bf16(state, bucket):  # noqa: ANN001, ANN201 - DDP compares what is written here with types
    """Torch's own hook under another name: DDP refuses that one on gloo, which can do it."""
    return default_hooks.bf16_compress_hook(state, bucket)


def lay_buckets(model: Given) -> list[torch.Tensor]:
    """Lay the gradients into buckets, as DDP does: in reverse order, full ones of 25 MB."""
    groups: list[list[torch.nn.Parameter]] = [[]]
    for tensor in reversed(model.tensors):
        if sum(t.numel() for t in groups[-1]) * 4 >= BUCKET_BYTES:
            groups.append([])
        groups[-1].append(tensor)
    buckets = []
    for group in groups:
        bucket = torch.zeros(sum(t.numel() for t in group))
        for tensor, grad in zip(group, bucket.split([t.numel() for t in group]), strict=True):
            tensor.grad = grad.view(tensor.shape)
        buckets.append(bucket)
    return buckets


def join(options: argparse.Namespace) -> None:
    """Meet the others at rank 0's store, whose port is free and told to the parent."""
    leads = options.rank == 0
    host, _, port = options.store.rpartition(":")
    store = dist.TCPStore(
        host,
        int(port),
        options.world_size,
        is_master=leads,
        timeout=PATIENCE,
        wait_for_workers=False,
    )
    if leads:
        say(at=f"{host}:{store.port}")
    dist.init_process_group(
        "gloo", store=store, rank=options.rank, world_size=options.world_size, timeout=PATIENCE
    )


def make(options: argparse.Namespace) -> Job:
    return Plain(options) if options.hook == "plain" else Ddp(options)


if __name__ == "__main__":
    serve(make, {"store": "127.0.0.1:0", "hook": "none"})
