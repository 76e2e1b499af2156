"""`codec = "auto"`: rank 0 measures and chooses, the others take over what it chose.

    rank 0       link to the servers, rates of this machine -> the model of `psq.advice` -> a recipe
    rank 1, ...  ask the first server what the job is, and take its codecs

The time of forward and backward is not measured, and need not be: without overlap it is the same
number in every candidate's prediction and cancels. With overlap it hides some of the difference,
never turns it round.

Rank 0 speaks for all: its link and its cores are taken for everybody's. One whose servers are all
on loopback takes the whole job to be on this machine, so where it is not, rank 0 should be a worker
that reaches a server as the others do. A rank 0 that comes back to
a job that runs takes over that job's codecs like any other rank.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from psq.advice import (
    LOOPBACK,
    Advice,
    Cluster,
    Link,
    Specs,
    Step,
    advise,
    candidates,
    copy_s,
    cores,
    link_of_mbit,
    measure_rates,
)
from psq.client import LinkRates, Patience, ask_job, probe_link
from psq.config import WorkerConfig, is_loopback
from psq.errors import GaveUpError, RemotePlanError
from psq.plan import Plan
from psq.recipe import Recipe
from psq.torch.settings import keys_of

__all__ = ["Choice", "cluster_of", "settle"]

MAX_PROBED: Final = 4
"""Servers whose link is measured; the others are taken to be like them."""
JOB_WAIT_S: Final = 0.25
"""How long rank 0 waits to hear of a job that runs already, beside a few round trips."""
ROUND_TRIPS: Final = 10

_log = logging.getLogger("psq.torch")


@dataclass(frozen=True, slots=True)
class Choice:
    """The recipe of the job, and why it is this one: "reason: codecs"."""

    recipe: Recipe
    words: str


def settle(config: WorkerConfig, specs: Specs, recipe: Recipe) -> Choice:
    """The recipe with the codecs that suit this job.

    Args:
        config: of this worker.
        specs: name and shape of each parameter.
        recipe: what to choose codecs for: its Adam settings stay.

    Raises:
        GaveUpError: no server answers, or rank 0 has not chosen in time.
        RemotePlanError: the job is about another model.
        RemoteError: a server refuses, and says why.

    Cost: two or three seconds, and some 100 MB for that time.
    """
    patience = Patience(give_up_after_s=config.give_up_after_s)
    if config.rank > 0:
        choice = _adopt(config, specs, recipe, patience)
    else:
        choice = _lead(config, specs, recipe, patience)
    _log.info("codec=auto %s", choice.words)
    return choice


def cluster_of(config: WorkerConfig, found: Sequence[tuple[str, LinkRates]]) -> Cluster:
    """What is known of the job's machines from the addresses and what was measured of them.

    Servers that are all on loopback, with their workers, are this machine. One of several on
    loopback is the one beside this worker, and every machine is like this one.
    """
    away = [rates for endpoint, rates in found if not is_loopback(endpoint)]
    local = any(is_loopback(endpoint) for endpoint in config.endpoints)
    link = _slowest(away) if away else LOOPBACK
    servers = len(config.endpoints)
    return Cluster(
        workers=config.world_size,
        servers=servers,
        link=link,
        beside=bool(away) and local and servers <= config.world_size,
        one_machine=not away,
        cores=cores(),
        copy_s=copy_s(),
    )


def _lead(config: WorkerConfig, specs: Specs, recipe: Recipe, patience: Patience) -> Choice:
    """Rank 0's part."""
    found = [
        (endpoint, probe_link(endpoint, config.rank, patience=patience, keys=keys_of(config)))
        for endpoint in _probed(config.endpoints)
    ]
    trip_s = max(rates.round_trip_s for _, rates in found)
    try:
        brief = replace(patience, give_up_after_s=JOB_WAIT_S + ROUND_TRIPS * trip_s)
        return _adopt(config, specs, recipe, brief)
    except GaveUpError:
        pass  # there is no job yet: this worker's plan will be the job's
    cluster = cluster_of(config, found)
    choices = candidates()
    busy = config.world_size + len(config.endpoints) if cluster.one_machine else 1
    numel = sum(math.prod(shape) for _, shape in specs)
    rates = measure_rates(
        choices, workers=config.world_size, numel=numel, lanes=min(busy, cluster.cores)
    )
    advice = advise(Step(specs, cluster), rates, choices)
    return Choice(_with_codecs_of(recipe, advice.chosen.candidate.make()), _reason(advice, cluster))


def _adopt(config: WorkerConfig, specs: Specs, recipe: Recipe, patience: Patience) -> Choice:
    """What the job runs, said by the first server."""
    endpoint = config.endpoints[0]
    job = ask_job(endpoint, config.rank, patience, keys=keys_of(config))
    _check_same_model(job, specs, endpoint)
    taken = _with_codecs_of(recipe, job.recipe)
    return Choice(taken, f"as the job has it: {_codecs(taken)}")


def _check_same_model(job: Plan, specs: Specs, endpoint: str) -> None:
    """A job's codecs say nothing about another model."""
    own = tuple((name, tuple(shape)) for name, shape in specs)
    if own == job.tensors:
        return
    pairs = zip(own, job.tensors, strict=False)
    first = next((f"{mine}, the job has {theirs}" for mine, theirs in pairs if mine != theirs), "")
    counts = f"{len(own)} parameters, the job has {len(job.tensors)}"
    msg = (
        f"the job of server {endpoint} trains another model: this worker has {first or counts}: "
        "start every worker with the same model"
    )
    raise RemotePlanError(msg)


def _with_codecs_of(recipe: Recipe, chosen: Recipe) -> Recipe:
    """The chosen recipe's codecs in this worker's: if others ask for more, the server says so."""
    uplink = replace(chosen.uplink, every=recipe.uplink.every)
    return replace(chosen, direction=recipe.direction, uplink=uplink, apply=recipe.apply)


def _probed(endpoints: Sequence[str]) -> Sequence[str]:
    """Those on other machines first: theirs are links."""
    return sorted(endpoints, key=is_loopback)[:MAX_PROBED]


def _slowest(found: Sequence[LinkRates]) -> Link:
    return link_of_mbit(
        min(rates.up_mbit_s for rates in found),
        min(rates.down_mbit_s for rates in found),
        max(rates.round_trip_s for rates in found),
    )


def _reason(advice: Advice, cluster: Cluster) -> str:
    chosen, dense = advice.chosen, advice.dense.prediction.step_s
    if cluster.one_machine:
        where = "on one machine"
    else:
        up, down = (
            f"{rate / 1e6:,.0f}" for rate in (cluster.link.up_bit_s, cluster.link.down_bit_s)
        )
        where = f"at {up} Mbit/s up and {down} down"
    took = 1e3 * chosen.prediction.step_s
    against = "" if not advice.pays else f" where dense fp32 takes {1e3 * dense:.1f}"
    return (
        f"chosen {where}, predicted {took:.1f} ms of communication a step{against}: "
        f"{_codecs(chosen.candidate.make())}"
    )


def _codecs(recipe: Recipe) -> str:
    return f"{recipe.uplink.codec} up, {recipe.downlink.kind} {recipe.downlink.codec} down"
