"""One rank of a PowerSGD job, see `powersgd`: rank 0 says where it listens, then how it went."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from evidence.powersgd import DENSE_STEPS, F32, PATIENCE_S
from evidence.subjects import task_of
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as power_sgd
from torch.nn.parallel import DistributedDataParallel

from psq_worker.job import Job

ONE_BUCKET_MB = 1 << 12


def run(told: dict[str, Any]) -> None:
    """Join, train, and as rank 0 tell."""
    torch.set_num_threads(1)
    _join(told)
    try:
        said = _train(told)
    finally:
        dist.destroy_process_group()
    if not told["rank"]:
        print(json.dumps(said), flush=True)


def _join(told: dict[str, Any]) -> None:
    host, _, port = told["store"].rpartition(":")
    patience, leads = timedelta(seconds=PATIENCE_S), told["rank"] == 0
    world_size = told["world_size"]
    store = dist.TCPStore(
        host, int(port), world_size, is_master=leads, timeout=patience, wait_for_workers=False
    )
    if leads:
        print(json.dumps({"at": f"{host}:{store.port}"}), flush=True)
    dist.init_process_group(
        "gloo", store=store, rank=told["rank"], world_size=world_size, timeout=patience
    )


def _train(told: dict[str, Any]) -> dict[str, Any]:
    task, job, rank = task_of(told["task"]), Job(**told["job"]), told["rank"]
    model = task.model(job.seed)
    ddp, state = _compressed(model, told["power"])
    optimizer = torch.optim.Adam(ddp.parameters(), lr=job.lr)
    numel = sum(parameter.numel() for parameter in model.parameters())
    batches = task.batches(
        rank=rank, world_size=told["world_size"], batch_size=job.batch_size, seed=job.seed
    )
    losses, sent, scores = torch.zeros(job.steps), [], []
    for step in range(job.steps):
        loss = task.loss(ddp, next(batches))
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = job.lr_at(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        losses[step] = loss.detach()
        dense = min(step + 1, DENSE_STEPS) * numel
        sent.append(F32 * (dense + state.total_numel_after_compression))
        if not rank and job.is_evaluated(step + 1):
            scores.append((step + 1, task.evaluate(model)[task.metric]))
    dist.all_reduce(losses)
    means = (losses / told["world_size"]).tolist()
    return {"numel": numel, "losses": means, "bytes": sent, "scores": scores}


def _compressed(
    model: torch.nn.Module, power: int
) -> tuple[DistributedDataParallel, power_sgd.PowerSGDState]:
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=ONE_BUCKET_MB)
    state = power_sgd.PowerSGDState(
        None, matrix_approximation_rank=power, start_powerSGD_iter=DENSE_STEPS
    )
    ddp.register_comm_hook(state, power_sgd.powerSGD_hook)
    return ddp, state
