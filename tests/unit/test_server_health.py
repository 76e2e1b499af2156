from __future__ import annotations

import json
import socket
import threading
import urllib.error
import urllib.request

import pytest

from psq.errors import ConfigError
from psq_server import pages
from psq_server.health import Health, HealthServer, health_page, status_page
from psq_server.page import Page

DEADLINE_S = 10.0


def get(url):
    try:
        with urllib.request.urlopen(url, timeout=DEADLINE_S) as answer:  # noqa: S310 - our own server
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


@pytest.fixture
def serve():
    servers = []

    def start(made):
        servers.append(HealthServer("127.0.0.1", 0, made))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def connect(server):
    host, port = server.url.removeprefix("http://").split(":")
    client = socket.create_connection((host, int(port)), timeout=DEADLINE_S)
    client.settimeout(DEADLINE_S)
    return client


def test_a_page_is_served_with_its_type(serve):
    server = serve({"/metrics": lambda: Page(b"x 1\n", "text/plain")})
    code, headers, body = get(server.url + "/metrics?a=b")
    assert (code, headers["Content-Type"], body) == (200, "text/plain", b"x 1\n")


def test_an_unknown_path_is_answered_with_what_there_is(serve):
    server = serve({"/metrics": lambda: Page(b"", "text/plain")})
    code, _, body = get(server.url + "/")
    assert code == 404
    assert b"/metrics" in body


def test_other_methods_are_refused(serve):
    server = serve({"/metrics": lambda: Page(b"", "text/plain")})
    with connect(server) as client:
        client.sendall(b"POST /metrics HTTP/1.0\r\n\r\n")
        assert b" 501 " in client.recv(1000)


@pytest.mark.parametrize(
    ("status", "code"),
    [("waiting", 200), ("running", 200), ("stalled", 503), ("stuck", 503), ("stopping", 503)],
)
def test_health_is_bad_when_nothing_will_happen_by_itself(status, code):
    page = health_page(Health(status, 3, 3, "waiting for rank 1 of 2", 4.5))
    assert page.code == code
    assert json.loads(page.body) == {
        "status": status,
        "version": 3,
        "round": 3,
        "text": "waiting for rank 1 of 2",
        "waiting_s": 4.5,
    }


def test_the_status_says_what_did_not_count_of_whom():
    health = Health("stalled", 3, 3, "waiting for rank 1 of 2", 4.5)
    page = status_page(health, {"joined": 2}, {"staged": 7}, {(1, "krum"): 2, (1, "late"): 1})
    assert page.code == 200, "whoever asks for the status wants to read it"
    told = json.loads(page.body)
    assert (told["status"], told["workers"], told["pushes"]) == (
        "stalled",
        {"joined": 2},
        {"staged": 7},
    )
    assert told["rejected"] == {"1": {"krum": 2, "late": 1}}


def test_a_port_in_use_is_named(serve):
    port = int(serve({}).url.rpartition(":")[2])
    with pytest.raises(ConfigError, match=f"cannot serve metrics on 127.0.0.1:{port}: .*in use"):
        HealthServer("127.0.0.1", port, {})


def test_a_client_that_says_nothing_is_hung_up_on(serve, monkeypatch):
    monkeypatch.setattr(pages, "CLIENT_S", 0.05)
    server = serve({})
    with connect(server) as client:
        client.sendall(b"GET /metr")
        assert client.recv(1) == b""


def test_slow_clients_are_bounded_and_the_next_one_is_closed(serve):
    server = serve({"/": lambda: Page(b"", "text/plain")})
    clients = [connect(server) for _ in range(pages.MAX_CLIENTS)]
    for client in clients:
        client.sendall(b"GET / HT")
    with connect(server) as late:
        assert late.recv(1) == b""
    for client in clients:
        client.close()


def test_no_client_delays_the_end(serve):
    stuck = threading.Event()
    server = serve({"/": lambda: (stuck.wait(DEADLINE_S), Page(b"", "text/plain"))[1]})
    silent, waiting = connect(server), connect(server)
    waiting.sendall(b"GET / HTTP/1.0\r\n\r\n")
    server.close()
    assert not server._thread.is_alive()
    stuck.set()
    for client in (silent, waiting):
        client.close()


def test_a_mistake_in_a_page_is_seen_and_the_next_page_served(serve, capfd):
    def fail():
        msg = "our own mistake"
        raise ValueError(msg)

    server = serve({"/bad": fail, "/good": lambda: Page(b"ok", "text/plain")})
    with connect(server) as client:
        client.sendall(b"GET /bad HTTP/1.0\r\n\r\n")
        assert client.recv(1) == b""
    assert get(server.url + "/good")[2] == b"ok"
    assert "our own mistake" in capfd.readouterr().err
