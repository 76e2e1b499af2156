"""One rank of a real training run: psq's worker, or torch's DistributedDataParallel with a hook.

Model, initial weights, data order, batch, learning rate and schedule are the task's own and the
same for every system; `--system` says what takes gradients to new weights. Both run in the
environment of psq, so with the same torch. A step is all of it: batch, forward, backward, exchange,
optimizer. Between two runs of steps rank 0 scores the model, untimed.

PowerSGD keeps torch's settings but for its dense start, which is `DENSE_STEPS` steps here (torch's
own default, 1000, would be dense to the end), and has one bucket, for the reason in `torch_ddp`.
"""

from __future__ import annotations

import argparse
from abc import abstractmethod
from typing import Any

import torch
import torch.distributed as dist
from given import THREADS
from job import Job, serve
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as power_sgd
from torch.nn.parallel import DistributedDataParallel
from torch_ddp import ONE_BUCKET_MB, in_bf16, join

import psq
from psq import kernels
from psq.torch import Worker
from psq_worker.job import job_for
from psq_worker.tasks import get_task

DENSE_STEPS = 2  # the least that torch accepts: over this link each costs as much as ten others


class Training(Job):
    """A rank's model, its batches, and one step after another."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        torch.set_num_threads(THREADS)
        self.task = get_task(options.task, subset=True)
        self.job = job_for(self.task, steps=int(options.steps), seed=int(options.seed))
        self.model = self.task.model(self.job.seed)
        self.rank = options.rank
        self.done = 0
        self.batches = self.task.batches(
            rank=options.rank,
            world_size=options.world_size,
            batch_size=self.job.batch_size,
            seed=self.job.seed,
        )

    def step(self) -> None:
        self.forward(next(self.batches)).backward()
        self.update(self.job.lr_at(self.done))
        self.done += 1

    def forward(self, batch: Any) -> torch.Tensor:
        """The batch's loss."""
        return self.task.loss(self.model, batch)

    @abstractmethod
    def update(self, lr: float) -> None:
        """From gradients to new weights, and gradients of zero."""

    def notes(self) -> dict[str, Any]:
        """The score so far, of rank 0."""
        if self.rank:
            return {}
        return {"step": self.done, "score": self.task.evaluate(self.model)[self.task.metric]}


class Psq(Training):
    """What the environment's PSQ_* variables say."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.versions = {"psq": psq.__version__, "kernel": kernels.level()}
        self.worker = Worker(
            self.model,
            lr=self.job.lr_at,
            connect=options.connect,
            rank=options.rank,
            world_size=options.world_size,
            seed=self.job.seed,
        )

    def update(self, lr: float) -> None:
        report = self.worker.step()
        if report.lr != lr:
            msg = f"step {self.done}: the schedule says {lr}, the worker asked for {report.lr}"
            raise RuntimeError(msg)

    def close(self) -> None:
        self.worker.close()


class Ddp(Training):
    """Torch's own, with a hook of its own."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.versions = {"torch": torch.__version__}
        join(options)
        hook, *rank = options.system.split(":")
        self.ddp = DistributedDataParallel(
            self.model,
            gradient_as_bucket_view=True,
            bucket_cap_mb=ONE_BUCKET_MB if hook == "powersgd" else None,
        )
        if hook == "powersgd":
            state = power_sgd.PowerSGDState(
                None, matrix_approximation_rank=int(rank[0]), start_powerSGD_iter=DENSE_STEPS
            )
            self.ddp.register_comm_hook(state, power_sgd.powerSGD_hook)
        elif hook == "fp16":
            self.ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
        elif hook == "bf16":
            self.ddp.register_comm_hook(None, in_bf16)
        self.optimizer = torch.optim.Adam(self.ddp.parameters(), lr=self.job.lr, fused=True)

    def forward(self, batch: Any) -> torch.Tensor:
        return self.task.loss(self.ddp, batch)

    def update(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)

    def close(self) -> None:
        dist.destroy_process_group()


def make(options: argparse.Namespace) -> Job:
    return Psq(options) if options.system == "psq" else Ddp(options)


if __name__ == "__main__":
    more = {"system": "psq", "task": "fashion-mnist", "steps": "800", "seed": "0"}
    serve(make, {**more, "store": "127.0.0.1:0", "connect": "tcp://127.0.0.1:5555"})
