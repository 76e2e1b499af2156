"""`/metrics` and `/healthz` over HTTP, on loopback unless told otherwise.

A scrape never touches the training thread: pages are made from numbers that it leaves lying. A
client gets CLIENT_S seconds altogether, and MAX_CLIENTS are served at once; the rest are closed. No
client can delay the end of the process: every thread is a daemon and `close` waits for none of
them.
"""

from __future__ import annotations

import contextlib
import json
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler
from typing import Any, Final

from psq.errors import ConfigError

__all__ = ["Health", "HealthServer", "Page", "health_page"]

CLIENT_S: Final = 5.0
MAX_CLIENTS: Final = 16
POLL_S: Final = 0.25
JSON_TYPE: Final = "application/json"
OK: Final = 200
NOT_FOUND: Final = 404
UNAVAILABLE: Final = 503


@dataclass(frozen=True, slots=True)
class Health:
    """How the server is.

    Attributes:
        status: "waiting" (for workers to come), "running", "stalled" (a lost worker holds up the
            job), "stuck" (the
            server's own loop stands still) or "stopping".
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


@dataclass(frozen=True, slots=True)
class Page:
    """One answer."""

    body: bytes
    content_type: str
    code: int = OK


def health_page(health: Health) -> Page:
    """The health as JSON; 503 when nothing will happen before somebody comes back."""
    bad = health.status in {"stalled", "stuck", "stopping"}
    return Page(json.dumps(asdict(health)).encode() + b"\n", JSON_TYPE, UNAVAILABLE if bad else OK)


class HealthServer:
    """Serves `pages` by path until closed.

    Args:
        host: the address to bind, 127.0.0.1 by default everywhere in psq.
        port: 0 takes a free one, see `url`.
        pages: path to a callable that makes the page; it runs in a thread of its own and must not
            block.

    Raises:
        ConfigError: the address cannot be bound; the message names it.
    """

    def __init__(self, host: str, port: int, pages: Mapping[str, Callable[[], Page]]) -> None:
        try:
            self._server = _Server(host, port, pages)
        except OSError as error:
            msg = (
                f"cannot serve metrics on {host}:{port}: {error.strerror}; "
                "choose another port with --metrics-port (0 takes a free one)"
            )
            raise ConfigError(msg) from error
        bound_port: int = self._server.server_address[1]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{bound_port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(POLL_S,), name="psq-health", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop listening, within POLL_S; requests in progress are left to end with the process."""
        self._server.shutdown()
        self._server.server_close()


class _Server(socketserver.ThreadingTCPServer):
    """A thread per client, bounded in number and in time."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = MAX_CLIENTS

    def __init__(self, host: str, port: int, pages: Mapping[str, Callable[[], Page]]) -> None:
        self.pages = pages
        self._clients: dict[socket.socket, float] = {}
        if ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__((host, port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for this client, or close it when there are too many."""
        if len(self._clients) >= MAX_CLIENTS:
            self.shutdown_request(request)
            return
        self._clients[request] = time.monotonic()
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve one client, and forget it."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._clients.pop(request, None)

    def service_actions(self) -> None:
        """Hang up on clients that have had their time: their thread sees the end of input."""
        now_s = time.monotonic()
        for client, since_s in list(self._clients.items()):
            if now_s - since_s > CLIENT_S:
                _hang_up(client)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing about a client that went away; it is its own business."""


class _Handler(BaseHTTPRequestHandler):
    """GET of the known pages."""

    server: _Server
    server_version = "psq"
    sys_version = ""
    timeout = CLIENT_S

    def do_GET(self) -> None:
        """Answer with the page, or 404 with a list of what there is."""
        make = self.server.pages.get(self.path.partition("?")[0])
        if make is None:
            there = "\n".join(self.server.pages)
            self._answer(Page(f"there is only\n{there}\n".encode(), "text/plain", NOT_FOUND))
        else:
            self._answer(make())

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Log nothing: a scrape every few seconds is no event."""

    def _answer(self, page: Page) -> None:
        self.send_response(page.code)
        self.send_header("Content-Type", page.content_type)
        self.send_header("Content-Length", str(len(page.body)))
        self.end_headers()
        self.wfile.write(page.body)


def _hang_up(client: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it may be gone already
        client.shutdown(socket.SHUT_RDWR)
