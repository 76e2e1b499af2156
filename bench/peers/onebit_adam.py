"""DeepSpeed's own 1-bit Adam over gloo, one rank: its optimizer and its compressed all-reduce.

What is replaced: DeepSpeed's bit packer is built for accelerators it knows, so NumPy packs here;
scales are gathered in the shape of their places, which gloo asks for and others do not.
The engine around it is not used: it would add a backward pass. The first steps are dense (they fix
the second moments, `freeze_step`); their gradients are averaged by a plain all-reduce, which in
DeepSpeed is the engine's part. As DeepSpeed does, each tensor is all-reduced by itself.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from given import Given
from job import Job, serve
from torch_ddp import join

WARM_UP_STEPS = 2  # dense; the first only makes its buffers


class Packer:
    """The face of DeepSpeed's packer: a bit a value, 1 where it is not negative."""

    def packbits(self, values: torch.Tensor, _numel: int, _rank: int) -> torch.Tensor:
        return torch.from_numpy(np.packbits(values.numpy().ravel() >= 0))

    def unpackbits(self, packed: torch.Tensor, _numel: int, _rank: int) -> torch.Tensor:
        bits = torch.from_numpy(np.unpackbits(packed.numpy().ravel()))
        return bits.float().mul_(2.0).sub_(1.0)


class Builder:
    """Stands where DeepSpeed compiles its packer."""

    def load(self) -> Packer:
        return Packer()


def no_shared_memory() -> None:
    """Instead of compiling an all-reduce in shared memory, which no link would see."""


def gather_in_shape(all_gather: Callable[..., Any]) -> Callable[..., Any]:
    def gather(places: list[torch.Tensor], own: torch.Tensor, **how: Any) -> Any:
        return all_gather(places, own.reshape(places[0].shape), **how)

    return gather


class OneBit(Job):
    """Gradients given, 1-bit Adam."""

    def __init__(self, options: argparse.Namespace) -> None:
        join(options)
        import deepspeed  # noqa: PLC0415 - its import wants a process group's environment
        from deepspeed.runtime.comm import compressed  # noqa: PLC0415
        from deepspeed.runtime.fp16.onebit.adam import OnebitAdam  # noqa: PLC0415

        self.versions = {"torch": torch.__version__, "deepspeed": deepspeed.__version__}
        importlib.import_module("deepspeed.comm.torch").build_shm_op = no_shared_memory
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
        compressed.PackbitsBuilder = Builder
        compressed.dist.all_gather = gather_in_shape(compressed.dist.all_gather)
        self.model = Given(options.size, options.rank)
        for tensor in self.model.tensors:
            dist.broadcast(tensor.detach(), 0)
        engine = SimpleNamespace(mpu=None, local_rank=0, enable_backward_allreduce=True)
        self.optimizer = OnebitAdam(
            self.model.parameters(),
            deepspeed=engine,
            lr=options.lr,
            freeze_step=WARM_UP_STEPS,
            comm_backend_name="compressed",
        )
        self.engine = engine

    def fill(self) -> None:
        self.model.fill()

    def step(self) -> None:
        if self.engine.enable_backward_allreduce:
            for tensor in self.model.tensors:
                dist.all_reduce(tensor.grad)
                tensor.grad.div_(dist.get_world_size())
        self.optimizer.step()

    def close(self) -> None:
        dist.destroy_process_group()


if __name__ == "__main__":
    serve(OneBit, {"store": "127.0.0.1:0"})
