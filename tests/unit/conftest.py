"""A real server in a thread, for tests of what talks to one."""

import contextlib
import io
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import psq.torch
from psq.link import ServerLink
from psq.timeline import Timeline
from psq_server.line_log import LineLog
from psq_server.loop import Loop
from psq_server.state import ServerState, Settings

END_S = 10.0


class Wishes:
    """Stands for the process's signals: the loop polls `fd` and takes what was wished."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self.fd = self._reader.fileno()
        self._wish: str | None = None

    def say(self, wish: str) -> None:
        self._wish = wish
        self._writer.send(b"!")

    def take(self) -> str | None:
        wish, self._wish = self._wish, None
        return wish

    def close(self) -> None:
        self._reader.close()
        self._writer.close()


class Deaf:
    """An observer that does not care how long things took."""

    def observe_step(self, duration_s: float) -> None:
        pass

    def observe_phase(self, phase: str, duration_s: float) -> None:
        pass

    def observe_staleness(self, steps: int) -> None:
        pass


class Served:
    """One psq-server, without its process: the loop runs in a thread."""

    def __init__(
        self,
        bind: str = "tcp://127.0.0.1:0",
        save: Path | None = None,
        *,
        observer: Deaf | None = None,
        clock: Callable[[], float] = time.monotonic,
        timeline: Timeline | None = None,
    ) -> None:
        self.link = ServerLink(bind)
        self.endpoint = self.link.endpoint
        self.state = ServerState(Settings(run_id=os.urandom(16)), clock())
        self._log = io.StringIO()
        self._wishes = Wishes()
        self.loop = Loop(
            self.link,
            self.state,
            log=LineLog(self._log),
            signals=self._wishes,
            observer=observer or Deaf(),
            save=save,
            clock=clock,
            timeline=timeline,
        )
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def log(self) -> str:
        """What it has logged so far."""
        return self._log.getvalue()

    def wait(self) -> None:
        """Until it has ended by itself."""
        self._thread.join(END_S)
        assert not self._thread.is_alive(), self.state.story()

    def vanish(self) -> None:
        """Stop serving; whoever is connected hears BYE at most."""
        if self._thread.is_alive():
            self._wishes.say("the test is over")
        self.wait()
        self._wishes.close()

    def _run(self) -> None:
        with self.link:
            self.loop.run()


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    """Make servers, as `serve()`; they end with the test."""
    made: list[Served] = []

    def start(**options) -> Served:
        made.append(Served(**options))
        return made[-1]

    yield start
    for served in made:
        served.vanish()


@pytest.fixture
def join(serve, monkeypatch):
    """Make workers that are closed when the test ends; one server for all of a test's."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    servers = []
    with contextlib.ExitStack() as stack:

        def start(model: nn.Module, **options) -> psq.torch.Worker:
            if not servers:
                servers.append(serve())
            settings = {"lr": 0.05, "recipe": "fp32", "connect": servers[0].endpoint, "rank": 0}
            worker = psq.torch.Worker(model, **{**settings, "world_size": 1, **options})
            stack.callback(worker.close, "error", "the test is over")
            return worker

        yield start


def eventually(condition: Callable[[], object], what: str) -> None:
    """Wait for something that another thread does."""
    pause = threading.Event()
    for _ in range(1000):
        if condition():
            return
        pause.wait(0.01)
    pytest.fail(f"{what} did not happen")


@pytest.fixture(name="eventually")
def _eventually() -> Callable[[Callable[[], object], str], None]:
    return eventually


@dataclass
class Trained:
    """What one worker of a job saw: its weights after each step, and its reports."""

    weights: list[np.ndarray] = field(default_factory=list)
    reports: list[psq.torch.StepReport] = field(default_factory=list)


@pytest.fixture
def join_many(serve):
    """Train a small model with several workers, each in a thread, on batches of their own."""

    def train(workers: int, *, steps: int, width: int = 16, **options) -> list[Trained]:
        endpoint, runs = serve().endpoint, [Trained() for _ in range(workers)]
        models = [_small_model(width) for _ in runs]

        def work(rank: int) -> None:
            settings = {"lr": 0.02, "connect": endpoint, "rank": rank, "world_size": workers}
            with psq.torch.Worker(models[rank], **{**settings, **options}) as worker:
                for step in range(steps):
                    rng = np.random.default_rng((step, rank))
                    x = torch.from_numpy(rng.standard_normal((8, 8), np.float32))
                    error = models[rank](x) - torch.sin(x[:, :2])
                    error.square().mean().backward()
                    runs[rank].reports.append(worker.step())
                    flat = [p.detach().reshape(-1) for p in models[rank].parameters()]
                    runs[rank].weights.append(torch.cat(flat).numpy().copy())

        with ThreadPoolExecutor(workers) as pool:
            for done in [pool.submit(work, rank) for rank in range(workers)]:
                done.result(10 * END_S)
        return runs

    return train


def _small_model(width: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 2))
