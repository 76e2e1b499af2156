"""What this machine does with each candidate: encode, server step and decode, timed in place.

The very calls of a worker and of a server are timed, with their checks and checksums, on arrays
larger than most caches (a smaller model is measured at its own size). Candidates take turns until
the time is up, and the best turn of each stage counts: what else runs here comes and goes, the
hardware stays. Where several processes of a job share the machine, as many threads as would compute
at once do the same work side by side, since one core alone can use all of the memory's bandwidth.

Never here: the network, torch, a server process. Everything that is allocated is let go.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final, TypeAlias

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from psq import kernels
from psq.advice.candidates import Candidate, plan_of
from psq.advice.model import Rates
from psq.codec import ShardCodec, get_codec
from psq.feedback import Compressor
from psq.kernels import Floats, ServerStep
from psq.optim import Adam

__all__ = ["MEASURED_NUMEL", "MEASURE_S", "copy_s", "measure_rates"]

MEASURED_NUMEL: Final = 1 << 22
"""Values that a stage is timed on: 16 MiB a vector, and each stage uses two to four of them."""
REFERENCE_NUMEL: Final = 1 << 16  # without native kernels a pass takes a hundred times as long
MEASURE_S: Final = 1.0
MIN_TURNS, MAX_TURNS = 3, 50
MAX_PAYLOADS: Final = 16  # the sum over more workers takes proportionally longer
MAX_LANES: Final = 4
STEP_LR: Final = 1e-3
VECTORS: Final = ("gradient", "x", "m", "v", "residual")
COPIED_BYTES: Final = 1 << 24  # more than caches hold: a frame comes from memory and goes there
COPY_BYTES: Final = 1 << 16
COPY_TURNS: Final = 4

Clock: TypeAlias = Callable[[], float]
Lane: TypeAlias = dict[str, Floats]
Calls: TypeAlias = Sequence[Callable[[], None]]
Seconds: TypeAlias = NDArray[np.float64]


def measure_rates(  # noqa: PLR0913 - what is measured, and for how long
    choices: Sequence[Candidate],
    *,
    workers: int,
    numel: int,
    lanes: int = 1,
    budget_s: float = MEASURE_S,
    clock: Clock = time.perf_counter,
) -> dict[str, Rates]:
    """Values per second of each stage, by the candidates' names.

    Args:
        choices: what is timed.
        workers: whose payloads the server adds up.
        numel: values in the model.
        lanes: how many processes of the job compute at once on this machine.
        budget_s: about how long it may take.
        clock: seconds that only grow.

    Raises:
        ConfigError: a candidate cannot run.

    Cost: memory for about 7 vectors of up to MEASURED_NUMEL values a lane, and the payloads.
    """
    limit = REFERENCE_NUMEL if kernels.level() == "reference" else MEASURED_NUMEL
    numel, lanes = min(numel, limit), min(lanes, MAX_LANES)
    common = [_lane(numel, number) for number in range(lanes)]
    trials: dict[str, Sequence[_Trial | _Zeroing]] = {
        c.name: [_Trial(c, workers, lane) for lane in common] for c in choices
    }
    trials[""] = [_Zeroing(lane) for lane in common]
    best: dict[tuple[str, str], Seconds] = {}
    end_s = clock() + budget_s
    with ThreadPoolExecutor(lanes) as pool:
        for turn in range(MAX_TURNS):
            if turn >= MIN_TURNS and clock() > end_s:
                break
            for name, stage in ((name, s) for name, each in trials.items() for s in each[0].stages):
                calls = [trial.stages[stage] for trial in trials[name]]
                took = np.array(list(pool.map(lambda call: _sweep(call, clock), calls)))
                best[name, stage] = np.minimum(best.get((name, stage), np.inf), took)
            for lane in common:
                _refill(lane)
    counted = max(1.0, workers / MAX_PAYLOADS)

    def rate(name: str, stage: str) -> float:
        return float(numel * lanes / max(best[name, stage].sum(), 1e-9))

    return {
        c.name: Rates(
            encode=rate(c.name, "encode"),
            server=rate(c.name, "server") / counted,
            decode=rate(c.name, "decode"),
            zero=rate("", "zero"),
        )
        for c in choices
    }


def _sweep(calls: Sequence[Callable[[], None]], clock: Clock) -> list[float]:
    """Seconds of each shard: what another process takes away costs one of them, in one turn."""
    took = []
    for call in calls:
        start_s = clock()
        call()
        took.append(clock() - start_s)
    return took


def copy_s(clock: Clock = time.perf_counter) -> float:
    """Seconds that it takes to bring one byte through a socket of this machine, both ends' work."""
    data, into = (memoryview(bytearray(COPIED_BYTES)) for _ in range(2))
    best_s = np.inf
    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = socket.create_connection(server.getsockname())
        taker, _ = server.accept()
        with sender, taker:
            sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * COPY_BYTES)
            for _ in range(COPY_TURNS):
                start_s = clock()
                for at in range(0, COPIED_BYTES, COPY_BYTES):
                    sender.sendall(data[at : at + COPY_BYTES])
                    rest = into[at : at + COPY_BYTES]
                    while rest:
                        rest = rest[taker.recv_into(rest) :]
                best_s = min(best_s, clock() - start_s)
    return float(best_s) / COPIED_BYTES


class _Trial:
    """One candidate's stages on one lane's vectors."""

    def __init__(self, candidate: Candidate, workers: int, lane: Lane) -> None:
        plan = plan_of(candidate, [("value", (lane["x"].size,))], workers, 1)
        recipe = plan.recipe
        self._lane = lane
        self._shards = plan.layout.shards
        self._ups = [ShardCodec(get_codec(recipe.uplink.codec), s) for s in self._shards]
        self._downs = [ShardCodec(get_codec(recipe.downlink.codec), s) for s in self._shards]
        self._delta = recipe.downlink.kind == "delta"
        self._fed_back = self._delta and recipe.downlink.error_feedback
        self._reads_first = recipe.direction.adam is not None
        self._compressor = Compressor(plan, 0)
        self._adam = None
        if recipe.apply.adam is not None:
            self._adam = Adam(recipe.apply.adam, 0)
            self._adam.advance(STEP_LR)
        self._copies = min(workers, MAX_PAYLOADS)
        self._scratch = np.empty(max(s.numel for s in self._shards), np.float32)
        self._pushes = [np.zeros(codec.nbytes, np.uint8) for codec in self._ups]
        self._answers = [np.zeros(codec.nbytes, np.uint8) for codec in self._downs]
        each = range(len(self._shards))
        self.stages: dict[str, Calls] = {
            "encode": [partial(self._encode, shard) for shard in each],
            "server": [partial(self._serve, shard) for shard in each],
            "decode": [partial(self._decode, shard) for shard in each],
        }

    def _encode(self, shard: int) -> None:
        """A worker's part: `psq.torch.exchange` does the same."""
        gradients, weights = [self._of("gradient", shard)], [self._of("x", shard)]
        payload = self._pushes[shard]
        if self._reads_first:
            self._compressor.finite(gradients)
        self._compressor.compress(shard, gradients, STEP_LR, payload, weights=weights)
        self._compressor.payload_finite(shard, payload)
        crc32c(payload.data)

    def _serve(self, shard: int) -> None:
        """The server's part, for all workers: what it does when pushes come, and `server_step`."""
        payload, codec = self._pushes[shard], self._ups[shard]
        for _ in range(self._copies):
            crc32c(payload.data)
            codec.check(payload)
            codec.check_bound(payload)
        kernels.active().server_step(self._step(shard, payload))
        crc32c(self._answers[shard].data)

    def _decode(self, shard: int) -> None:
        """A worker's other part."""
        codec, answer, out = self._downs[shard], self._answers[shard], [self._of("x", shard)]
        crc32c(answer.data)
        codec.check(answer)
        if self._delta:
            codec.decode_add_segments(answer, out)
        else:
            codec.decode_segments(answer, out)

    def _step(self, shard: int, payload: NDArray[np.uint8]) -> ServerStep:
        names = [
            "x",
            *(["m", "v"] if self._adam else []),
            *(["residual"] if self._fed_back else []),
        ]
        return ServerStep(
            uplink=self._ups[shard].codec.format,
            downlink=self._downs[shard].codec.format,
            segments=[self._shards[shard].numel],
            payloads=[payload] * self._copies,
            scratch=self._scratch,
            answer=self._answers[shard],
            delta=self._delta,
            starts=self._downs[shard].starts(shard),
            adam=self._adam.coefficients if self._adam else None,
            **{name: self._of(name, shard) for name in names},
        )

    def _of(self, name: str, shard: int) -> Floats:
        cut = self._shards[shard]
        return self._lane[name][cut.offset : cut.offset + cut.numel]


class _Zeroing:
    """What a worker does to its gradients after a step."""

    def __init__(self, lane: Lane) -> None:
        self.stages: dict[str, Calls] = {"zero": [partial(lane["gradient"].fill, 0.0)]}


def _lane(numel: int, number: int) -> Lane:
    lane = {name: np.zeros(numel, np.float32) for name in VECTORS}
    rng = np.random.default_rng(number)
    lane["given"] = rng.standard_normal(min(numel, 1 << 16), dtype=np.float32)
    _refill(lane)
    return lane


def _refill(lane: Lane) -> None:
    """Gradients again, and weights and moments that have not run away."""
    gradient, given = lane["gradient"], lane["given"]
    for start in range(0, gradient.size, given.size):
        piece = gradient[start : start + given.size]
        piece[:] = given[: piece.size]
    for name in ("m", "v", "residual"):
        lane[name].fill(0.0)
