"""The HTTP side of `health`: a thread per client, bounded in number and in time.

A module of its own because the standard library's server costs a server's start some 30 ms: it is
imported by the thread that serves, while the process is already ready.
"""

from __future__ import annotations

import contextlib
import socket
import socketserver
import sys
import time
from http.server import BaseHTTPRequestHandler
from typing import Any, Final

from psq_server.page import NOT_FOUND, Page, Pages

__all__ = ["CLIENT_S", "MAX_CLIENTS", "PageServer"]

CLIENT_S: Final = 5.0
MAX_CLIENTS: Final = 16


class PageServer(socketserver.ThreadingTCPServer):
    """Serves pages on a socket that listens already.

    Args:
        listener: the socket, which belongs to this server from now on.
        pages: path to a callable that makes the page.
    """

    daemon_threads = True

    def __init__(self, listener: socket.socket, pages: Pages) -> None:
        super().__init__(listener.getsockname()[:2], _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.pages = pages
        self._clients: dict[socket.socket, float] = {}

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
        """Say nothing about a client that went away; anything else is our own mistake."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """GET of the known pages."""

    server: PageServer
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
