"""A job of real processes that are killed and started again in place, and what it came to.

A server with a state directory and workers that keep their state (`cluster/train_kept.py`), all
forked from one zygote. Whoever dies is started again under the same address or rank by whoever
killed it. What is compared in the end is everything a worker has: weights, buffers, residual,
moments, counters, random numbers; and the weights that the server saved.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from cluster.conftest import Forked, Program, Zygote, environment, wait_until
from numpy.typing import NDArray
from safetensors.numpy import load_file

__all__ = ["SERVER", "Life", "Outcome"]

TESTS: Final = Path(__file__).resolve().parents[1]
SERVE: Final = TESTS / "faults" / "serve.py"
TRAIN: Final = TESTS / "cluster" / "train_kept.py"
FAST: Final = Path("/dev/shm")  # noqa: S108 - where psq.torch.folder, which imports torch, has it
SERVER: Final = -1
"""The server's place, among ranks."""
END_S: Final = 120.0

Outcome = dict[str, str]
"""What each process came to: the digest of all its arrays, by name."""


@dataclass(slots=True)
class Life:
    """One job; `start` it, disturb it, and ask for its `outcome`.

    Attributes:
        folder: everything of this job is in it.
        zygote: whom processes are forked from.
        steps: of the job.
        world_size: how many workers.
        recipe: of the job.
        options: of the server, besides those that every life has.
        through: what the workers connect to, given the server's endpoint.
        state: the server's state directory; None: one in the folder.
        starts: how often each place was filled.
    """

    folder: Path
    zygote: Zygote
    steps: int
    world_size: int = 2
    recipe: str = "server-adam"
    options: tuple[str, ...] = ("--checkpoint-every", "20")
    through: Callable[[str], str] = str
    state: Path | None = None
    starts: dict[int, int] = field(default_factory=dict)
    programs: dict[int, Program] = field(default_factory=dict)
    endpoint: str = "tcp://127.0.0.1:0"

    def start(self) -> Life:
        """Fill every place."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for place in self.places:
            self.fill(place)
        return self

    @property
    def places(self) -> tuple[int, ...]:
        """The server's, and every rank."""
        return (SERVER, *range(self.world_size))

    @property
    def saved(self) -> Path:
        """What the server saves in the end."""
        return self.folder / "server.safetensors"

    def fill(self, place: int, *, die: str = "", ready: bool = True) -> Program:
        """Start the process of a place, which is empty; a server's start is waited for."""
        number = self.starts[place] = self.starts.get(place, -1) + 1
        words = ["--die", die] if die else []
        if place == SERVER:
            program = self._server(f"server.{number}", words, ready=ready)
        else:
            program = self._worker(place, f"rank{place}.{number}", words)
        self.programs[place] = program
        return program

    def _server(self, name: str, words: list[str], *, ready: bool) -> Program:
        options = ["--bind", self.endpoint, "--save", str(self.saved), *self.options]
        state = self.state or self.folder / "server"
        argv = [str(SERVE), *words, *options, "--state-dir", str(state)]
        server = Forked(name, self.folder, self.zygote, {"argv": argv, "env": environment()})
        if ready:
            self.endpoint = server.wait_line(r"^psq-server ready endpoint=(\S+)")[1]
        return server

    def _worker(self, rank: int, name: str, words: list[str]) -> Program:
        variables = {
            "PSQ_CONNECT": self.through(self.endpoint),
            "PSQ_RANK": str(rank),
            "PSQ_WORLD_SIZE": str(self.world_size),
            "PSQ_STATE_DIR": str(self.folder / "workers"),
            "PSQ_RECIPE": self.recipe,
        }
        words = [*words, "--steps", str(self.steps), "--out", str(self.folder / f"rank{rank}.npz")]
        order = {"argv": [str(TRAIN), *words], "env": environment(**variables)}
        return Forked(name, self.folder, self.zygote, order)

    def kill(self, *places: int) -> tuple[int, ...]:
        """SIGKILL them all at once; returns those that it struck: the others had ended before."""
        for place in places:
            self.programs[place].signal(signal.SIGKILL)
        codes = {place: self.programs[place].wait() for place in places}
        return tuple(place for place, code in codes.items() if code == -signal.SIGKILL)

    def step(self, rank: int) -> int:
        """The last step that this rank's process has told of, -1 before the first."""
        found = re.findall(r"^step (\d+)$", self.programs[rank].out()[-400:], re.MULTILINE)
        return int(found[-1]) if found else -1

    def wait_step(self, rank: int, step: int) -> None:
        """Until this rank's process has told of so many steps, or has ended."""
        wait_until(
            lambda: self.step(rank) >= step or self.programs[rank].exit_code() is not None,
            f"step {step} of rank {rank}",
            END_S,
        )

    def wait_death(self, places: Collection[int]) -> int:
        """Which of these has ended, once one has."""
        ended: list[int] = []

        def look() -> bool:
            ended[:] = [p for p in sorted(places) if self.programs[p].exit_code() is not None]
            return bool(ended)

        wait_until(look, f"the end of one of {sorted(places)}", END_S)
        return ended[0]

    def wait_silence(self, seconds: float) -> None:
        """Until no worker has told of a step for so long."""
        seen, since_s = (-2,), time.monotonic()

        def look() -> bool:
            nonlocal seen, since_s
            now = tuple(self.step(rank) for rank in range(self.world_size))
            if now != seen:
                seen, since_s = now, time.monotonic()
            return time.monotonic() > since_s + seconds

        wait_until(look, f"{seconds} s without a step", END_S)

    def outcome(self) -> Outcome:
        """Wait for the end of all, which must be a good one, and say what each came to."""
        programs = list(self.programs.values())
        codes: list[int | None] = []

        def all_ended_or_one_badly() -> bool:
            codes[:] = [program.exit_code() for program in programs]
            return None not in codes or any(codes)

        wait_until(all_ended_or_one_badly, f"the end of {self.folder.name}", END_S)
        for program, code in zip(programs, codes, strict=True):
            assert not code, f"{program.name} ended with {code}:\n{program.err()[-3000:]}"
        found = {f"server.{name}": _digest(array) for name, array in load_file(self.saved).items()}
        for rank in range(self.world_size):
            with np.load(self.folder / f"rank{rank}.npz") as arrays:
                found |= {f"rank{rank}.{name}": _digest(arrays[name]) for name in arrays.files}
        return found

    def end(self) -> None:
        """Kill whoever is left."""
        for program in self.programs.values():
            program.signal(signal.SIGKILL)
            program.wait()
            if program.orphans():
                os.killpg(program.pid, signal.SIGKILL)
        for place in (self.folder / "workers").glob(
            "*"
        ):  # a worker that ends badly keeps its state
            name = hashlib.sha256(os.fsencode(place)).hexdigest()[:16]
            shutil.rmtree(FAST / f"psq-{os.getuid()}-{name}", ignore_errors=True)


def _digest(array: NDArray[Any]) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()
