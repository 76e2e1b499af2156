"""What a recipe costs, before anything runs: bits on the wire, bytes of state.

Bits count codes and scales of one large tensor, averaged over the first `LISTED_STEPS` steps, where
a choice of codecs changes with the step; headers are not counted. Bytes count what is kept beside
the model and its gradients, the residual in f32; the server's weights are counted. Both come from
the codecs and rules themselves, made for a small model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from numpy.typing import NDArray

from psq.codec import get_codec
from psq.layout import Layout, cut
from psq.recipe import Downlink, Recipe, Uplink
from psq.rules import make_aggregate, make_apply, make_choice, make_direction

__all__ = ["LISTED_STEPS", "LISTED_WORKERS", "Costs", "costs_of"]

LISTED_STEPS: Final = 1000
LISTED_WORKERS: Final = 8
_NUMEL: Final = 1 << 18  # full blocks only: scales are counted as a large tensor has them
_STATE_NUMEL: Final = 1 << 13
_F32_BYTES: Final = 4


@dataclass(frozen=True, slots=True)
class Costs:
    """Per parameter of the model.

    Attributes:
        up_bits: of a worker's pushes, per step.
        down_bits: of the server's answers to one worker, per step.
        worker_bytes: state on each worker beside model and gradients.
        server_bytes: state on the server, its weights included.
    """

    up_bits: float
    down_bits: float
    worker_bytes: float
    server_bytes: float


def costs_of(recipe: Recipe, workers: int = LISTED_WORKERS) -> Costs:
    """What a recipe costs.

    Raises:
        ConfigError: a rule of its cannot be imported, or cannot run with so many workers.

    Cost: some milliseconds.
    """
    layout = _layout(_STATE_NUMEL)
    direction = make_direction(recipe, layout=layout, world_size=workers, rank=0, seed=0)
    aggregate = make_aggregate(recipe, layout=layout, world_size=workers)
    apply = make_apply(recipe, layout=layout, world_size=workers)
    shared = _bytes_of(apply.state_arrays().values()) if recipe.downlink.kind == "mean" else 0.0
    worker = _bytes_of(direction.state_arrays().values()) + shared
    server = _bytes_of([*aggregate.state_arrays().values(), *apply.state_arrays().values()])
    server += _F32_BYTES * aggregate.copies(workers)
    apart = recipe.direction.local_steps > 1 or direction.looks_ahead
    rounds = 1.0 / (recipe.direction.local_steps * recipe.uplink.every)
    return Costs(
        up_bits=_bits(recipe.uplink) * rounds,
        down_bits=_bits(recipe.downlink) * rounds,
        worker_bytes=worker + _F32_BYTES * (recipe.uplink.error_feedback + apart),
        server_bytes=server + _F32_BYTES * (1 + recipe.downlink.error_feedback),
    )


def _bits(link: Uplink | Downlink) -> float:
    """Bits a value of its messages, scales counted, averaged over the steps."""
    codecs = [get_codec(spec) for spec in link.choice.codecs(link.codec)]
    bits = [8.0 * codec.nbytes(_NUMEL) / _NUMEL for codec in codecs]
    if not link.choice.part.clocked:
        budget = dict(link.choice.options).get("bits", codecs[0].bits)
        return float(budget) + bits[0] - codecs[0].bits
    choice = make_choice(link, _layout(_STATE_NUMEL))
    steps = range(1, LISTED_STEPS + 1)
    return sum(bits[choice.choose(0, t, lambda: 0.0)] for t in steps) / len(steps)


def _layout(numel: int) -> Layout:
    return cut([("w", (numel,))], [lambda _: 1])


def _bytes_of(arrays: Iterable[NDArray[Any]]) -> float:
    return sum(array.nbytes for array in arrays) / _STATE_NUMEL
