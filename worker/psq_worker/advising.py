"""`psq advise`: what a step would take with each codec, on a link that is given or measured.

Gathers what the model of `psq.advice` wants to know, asks it, and prints a table and one sentence.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from psq import kernels
from psq.advice import (
    DENSE,
    LOOPBACK,
    LOOPBACK_NAME,
    Advice,
    Cluster,
    Link,
    Option,
    Rates,
    Specs,
    Step,
    advise,
    candidates,
    copy_s,
    cores,
    link_of_mbit,
    measure_rates,
    parse_link,
)
from psq.config import DEFAULT_ROUND_TRIP_MS, AdviseConfig, is_loopback
from psq.errors import ConfigError
from psq.keys import load_worker_keys
from psq_worker.launch import server_count

if TYPE_CHECKING:  # torch: only with --task, and not before --help
    from torch import nn

    from psq_worker.tasks import Task

__all__ = ["Asked", "advice_table", "ask", "plain_advice", "run_advise"]

DEFAULT_NUMEL: Final = 25_000_000
"""Of a model that nobody describes: as many values as a ResNet-50 has."""
COMPUTE_STEPS: Final = 5
MS: Final = 1e3
MBIT: Final = 1e6
COLUMNS: Final = ("ms a step", "than fp32", "bits up", "down")
STAGES: Final = ("encode", "up", "server", "down", "decode")
WIDE: Final = 110  # a narrower terminal has no room for the stages
LIMITS: Final = {"up": "link up", "down": "link down"}


@dataclass(frozen=True, slots=True)
class Asked:
    """The question, complete.

    Attributes:
        step: for the model.
        about: the model that is trained, in words.
        measured: whether the link was measured.
    """

    step: Step
    about: str
    measured: bool


def run_advise(config: AdviseConfig) -> None:
    """`psq advise`.

    Raises:
        ConfigError: what was asked makes no sense; it says what.
        GaveUpError: no server answers at --connect.
    """
    asked = ask(config)
    choices = candidates(config.min_bits)
    if DENSE not in choices:
        choices = (DENSE, *choices)
    cluster = asked.step.cluster
    rates = measure_rates(
        choices,
        workers=cluster.workers,
        numel=_total(asked.step.specs),
        lanes=min(cluster.cores, cluster.workers + cluster.servers) if cluster.one_machine else 1,
    )
    advice = advise(asked.step, rates, choices)
    if config.json:
        click.echo(json.dumps(plain_advice(asked, advice, rates), indent=2))
        return
    console = Console()
    console.print(Text(f"{asked.about}; {_where(asked)}", style="bold"))
    console.print(advice_table(advice, stages=console.width >= WIDE))
    console.print(advice.sentence, soft_wrap=True, highlight=False)


def ask(config: AdviseConfig) -> Asked:
    """Everything about the job that is asked about, from what was said and what can be measured."""
    cluster = _cluster(config)
    specs, about, compute_s = _model(config)
    step = Step(specs, cluster, compute_s=compute_s, overlap=config.overlap)
    return Asked(step, about, measured=bool(config.endpoints))


def advice_table(advice: Advice, *, stages: bool) -> Table:
    """The candidates, the most exact first; the chosen one stands out."""
    table = Table(box=box.SIMPLE, header_style="bold")
    table.add_column("codecs", no_wrap=True)
    for column in (*COLUMNS, *(STAGES if stages else ())):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("limited by", no_wrap=True)
    for option in advice.options:
        style = "bold green" if option is advice.chosen else ""
        cells = _cells(option, advice.dense, stages=stages)
        table.add_row(option.candidate.name, *cells, style=style)
    return table


def plain_advice(asked: Asked, advice: Advice, rates: dict[str, Rates]) -> dict[str, Any]:
    """What --json prints."""
    cluster = asked.step.cluster
    link = cluster.link
    return {
        "numel": _total(asked.step.specs),
        "kernels": kernels.level(),
        "workers": cluster.workers,
        "servers": cluster.servers,
        "beside": cluster.beside,
        "one_machine": cluster.one_machine,
        "link": {
            "measured": asked.measured,
            "up_mbit_s": _finite(link.up_bit_s / MBIT),
            "down_mbit_s": _finite(link.down_bit_s / MBIT),
            "round_trip_s": link.round_trip_s,
        },
        "options": [
            {
                "name": option.candidate.name,
                "flags": option.candidate.flags,
                "bits_up": option.bits_up,
                "bits_down": option.bits_down,
                "link_s": option.link_s,
                **dataclasses.asdict(option.prediction),
                "rates": dataclasses.asdict(rates[option.candidate.name]),
            }
            for option in advice.options
        ],
        "chosen": advice.chosen.candidate.name,
        "flags": advice.chosen.candidate.flags,
        "pays": advice.pays,
        "advice": advice.sentence,
    }


# ---- what was asked


def _cluster(config: AdviseConfig) -> Cluster:
    link = _link(config)
    alone = link is LOOPBACK or config.one_machine
    if config.servers == "auto":
        servers = server_count("auto", config.workers) if alone else config.workers
    else:
        servers = max(int(config.servers), len(config.endpoints))
    return Cluster(
        workers=config.workers,
        servers=servers,
        link=link,
        beside=not alone and (config.beside or config.servers == "auto"),
        one_machine=alone,
        cores=cores(),
        copy_s=copy_s(),
    )


def _link(config: AdviseConfig) -> Link:
    """As given, or as measured: the slowest of the links to the servers."""
    if not config.endpoints:
        trip_ms = DEFAULT_ROUND_TRIP_MS if config.round_trip_ms is None else config.round_trip_ms
        return parse_link(config.link or LOOPBACK_NAME, trip_ms / MS)
    from psq.client import probe_link  # noqa: PLC0415 - zmq, for this alone

    away = [endpoint for endpoint in config.endpoints if not is_loopback(endpoint)]
    keys = load_worker_keys(Path(config.keys)) if config.keys is not None else None
    rank = keys.rank if keys is not None else 0
    found = [probe_link(endpoint, rank, keys=keys) for endpoint in away or config.endpoints]
    if not away:
        return LOOPBACK
    return link_of_mbit(
        min(rates.up_mbit_s for rates in found),
        min(rates.down_mbit_s for rates in found),
        max(rates.round_trip_s for rates in found),
    )


def _model(config: AdviseConfig) -> tuple[Specs, str, float]:
    """Names and shapes, the model in words, and seconds of forward and backward."""
    if config.task is None:
        numel = config.numel or DEFAULT_NUMEL
        specs: Specs = [("value", (numel,))]
        about, compute_s = f"{numel:,} values", 0.0
    else:
        from psq_worker.tasks import find_task  # noqa: PLC0415 - imports torch

        task = find_task(config.task)
        model = task.model(0)
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        specs = [(name, tuple(parameter.shape)) for name, parameter in named]
        about = f"{task.name}, {_total(specs):,} values"
        compute_s = 0.0 if config.compute_ms is not None else _compute_s(task, model, config)
    if config.compute_ms is not None:
        compute_s = config.compute_ms / MS
    return specs, about, compute_s


def _compute_s(task: Task, model: nn.Module, config: AdviseConfig) -> float:
    """Forward and backward of one batch, the best of a few: with the threads that a worker has."""
    from psq_worker.tasks import job_defaults  # noqa: PLC0415 - imports torch

    batches = task.batches(
        rank=0,
        world_size=config.workers,
        batch_size=job_defaults(task).batch_size,
        seed=0,
    )
    best_s = math.inf
    for batch in itertools.islice(batches, COMPUTE_STEPS):
        start_s = time.perf_counter()
        task.loss(model, batch).backward()  # type: ignore[no-untyped-call]
        best_s = min(best_s, time.perf_counter() - start_s)
    if not math.isfinite(best_s):
        msg = f"task {task.name!r} gives no batches: expected some without end"
        raise ConfigError(msg)
    return best_s


def _total(specs: Specs) -> int:
    return sum(math.prod(shape) for _, shape in specs)


# ---- words


def _where(asked: Asked) -> str:
    cluster, compute_s = asked.step.cluster, asked.step.compute_s
    words = [_count(cluster.workers, "worker"), _count(cluster.servers, "server")]
    words[1] += " beside them" if cluster.beside else ""
    link = cluster.link
    if math.isinf(link.up_bit_s):
        words.append("on one machine")
    else:
        how = "measured" if asked.measured else "as given"
        words.append(
            f"{link.up_bit_s / MBIT:,.0f} Mbit/s up, {link.down_bit_s / MBIT:,.0f} down, "
            f"{MS * link.round_trip_s:.2g} ms there and back ({how})"
        )
    words.append(f"compute {MS * compute_s:.1f} ms" if compute_s else "compute not counted")
    return ", ".join(words)


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _cells(option: Option, dense: Option, *, stages: bool) -> Sequence[str]:
    found = option.prediction
    each = [f"{MS * getattr(found, stage + '_s'):.1f}" for stage in STAGES] if stages else []
    return (
        f"{MS * found.step_s:.1f}",
        f"{dense.prediction.step_s / found.step_s:.2f}x",
        f"{option.bits_up:.2f}",
        f"{option.bits_down:.2f}",
        *each,
        LIMITS.get(found.bottleneck, found.bottleneck),
    )


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None
