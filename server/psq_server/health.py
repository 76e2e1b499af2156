"""`/metrics`, `/healthz` and `/status` over HTTP, on loopback unless told otherwise.

A scrape never touches the training thread: pages are made from numbers that it leaves lying. A
client has a few seconds altogether, and a few are served at once; the rest are closed. No client
can delay the end of the process: every thread is a daemon, and `close` waits for none of them.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Final

from psq.errors import ConfigError
from psq_server.page import OK, UNAVAILABLE, Page, Pages

__all__ = ["Health", "HealthServer", "by_rank", "health_page", "status_page"]

BACKLOG: Final = 16
POLL_S: Final = 0.25
JSON_TYPE: Final = "application/json"


@dataclass(frozen=True, slots=True)
class Health:
    """How the server is.

    Attributes:
        status: "waiting" (for workers to come), "running", "stalled" (a lost worker holds up the
            job), "blocked" (the disk refuses what has to be durable), "recovering" (workers say
            again what the server lacks), "stuck" (the server's own loop stands still) or
            "stopping".
        version: of the weights; -1 before the first.
        round: the open round.
        text: who is waited for, in words; empty when nobody is.
        waiting_s: for how long.
    """

    status: str
    version: int
    round: int
    text: str
    waiting_s: float


def health_page(health: Health) -> Page:
    """The health as JSON; 503 when nothing will happen before somebody comes back."""
    bad = health.status in {"stalled", "blocked", "stuck", "stopping"}
    return Page(json.dumps(asdict(health)).encode() + b"\n", JSON_TYPE, UNAVAILABLE if bad else OK)


def status_page(
    health: Health,
    workers: Mapping[str, int],
    pushes: Mapping[str, int],
    rejected: Mapping[tuple[int, str], int],
) -> Page:
    """The health, and what became of the workers' contributions, as JSON; always 200."""
    told = {
        **asdict(health),
        "workers": dict(workers),
        "pushes": dict(pushes),
        "rejected": by_rank(rejected),
    }
    return Page(json.dumps(told).encode() + b"\n", JSON_TYPE)


def by_rank(rejected: Mapping[tuple[int, str], int]) -> dict[str, dict[str, int]]:
    """What did not count: of each rank, as text, how often for which reason."""
    told: dict[str, dict[str, int]] = {}
    for (rank, kind), count in sorted(rejected.items()):
        told.setdefault(str(rank), {})[kind] = count
    return told


class HealthServer:
    """Serves pages until closed.

    Args:
        host: the address to bind, 127.0.0.1 by default everywhere in psq.
        port: 0 takes a free one, see `url`.
        pages: path to a callable that makes the page; it runs in another thread, must not block.

    Raises:
        ConfigError: the address cannot be bound; the message names it.
    """

    def __init__(self, host: str, port: int, pages: Pages) -> None:
        self._pages = pages
        self._closing = threading.Event()
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
        except OSError as error:
            msg = (
                f"cannot serve metrics on {host}:{port}: {error.strerror}; "
                "choose another port with --metrics-port (0 takes a free one)"
            )
            raise ConfigError(msg) from error
        bound_port: int = self._listener.getsockname()[1]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{bound_port}"
        self._thread = threading.Thread(target=self._serve, name="psq-health", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening, in about POLL_S; requests in progress end with the process."""
        self._closing.set()
        self._thread.join(2 * POLL_S)

    def _serve(self) -> None:
        from psq_server.pages import PageServer  # noqa: PLC0415 - see its docstring

        with PageServer(self._listener, self._pages) as server:
            server.timeout = POLL_S
            while not self._closing.is_set():
                server.handle_request()
                server.service_actions()
