"""Hostile peers, each a function of (host, port, when to end) that returns how often it attacked.

    python -m faults.peers KIND HOST PORT SECONDS        one kind, in a process of its own

It ends by itself and prints how many attacks it made, as a JSON line. What a server does about
them is its own affair: being hung up on is expected, and the peer comes again.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

from faults.zmtp import (
    LAST,
    LONG,
    MORE,
    command,
    connect,
    frame,
    greeting,
    ready,
    shake_hands,
    spent,
)
from psq_proto.frames import Header, encode_control, encode_frame
from psq_proto.messages import Heartbeat, Hello, MessageType

__all__ = ["KINDS"]

PAUSE_S: Final = 0.02
"""Between attacks of the kinds whose harm is not their number."""
SLOW_CONNECTIONS: Final = 200
STALLED_CONNECTIONS: Final = 100
MANY_CONNECTIONS: Final = 100
STORM_PIECE: Final = 64
RECEIVE_S: Final = 5.0

Attack = Callable[[str, int, float], int]
_PAUSE: Final = threading.Event()


@contextlib.contextmanager
def _hung_up_on() -> Iterator[None]:
    """To lose the connection is part of the game."""
    with contextlib.suppress(OSError):
        yield


def _again_and_again(host: str, port: int, ends_s: float, one: Callable[[str, int], None]) -> int:
    count = 0
    while not spent(ends_s):
        with _hung_up_on():
            one(host, port)
        count += 1
        _PAUSE.wait(PAUSE_S)
    return count


def endless_small(host: str, port: int, ends_s: float) -> int:
    """Messages of empty parts that never end: ZeroMQ keeps all parts until the last."""
    parts = frame(b"", MORE) * 4096

    def one(host: str, port: int) -> None:
        with shake_hands(host, port) as peer:
            while not spent(ends_s):
                peer.sendall(parts)

    return _again_and_again(host, port, ends_s, one)


def endless_large(host: str, port: int, ends_s: float) -> int:
    """The same with parts of the largest size that is let through."""
    part = frame(bytes(1 << 20), MORE)

    def one(host: str, port: int) -> None:
        with shake_hands(host, port) as peer:
            while not spent(ends_s):
                peer.sendall(part)

    return _again_and_again(host, port, ends_s, one)


def endless_many(host: str, port: int, ends_s: float) -> int:
    """Messages of empty parts that never end, on many connections at once."""
    parts = memoryview(frame(b"", MORE) * 65_536)
    return _on_many(host, port, ends_s, parts)


def flood(host: str, port: int, ends_s: float) -> int:
    """Frames of the largest size, whole, with nothing in them, on many connections at once."""
    return _on_many(host, port, ends_s, memoryview(frame(bytes(1 << 20))))


def _on_many(host: str, port: int, ends_s: float, said: memoryview) -> int:
    """Say one thing again and again on MANY_CONNECTIONS; whoever is hung up on comes again."""
    left: dict[socket.socket, memoryview] = {}
    count = 0
    while not spent(ends_s):
        with _hung_up_on():
            if len(left) < MANY_CONNECTIONS:
                peer = shake_hands(host, port)
                peer.settimeout(0)
                left[peer] = said
        for peer in list(left):
            try:
                left[peer] = left[peer][peer.send(left[peer]) :]
            except BlockingIOError:
                continue
            except OSError:
                peer.close()
                del left[peer]
                continue
            if not left[peer]:
                left[peer] = said
                count += 1
    for peer in left:
        peer.close()
    return count


def huge_claims(host: str, port: int, ends_s: float) -> int:
    """Frames that announce more than they have, up to 2^64 - 1 bytes."""
    sizes = itertools.cycle(
        [1 << 20, (1 << 20) + 5000, 1 << 31, 1 << 40, 1 << 62, (1 << 63) - 1, (1 << 64) - 1]
    )

    def one(host: str, port: int) -> None:
        with shake_hands(host, port) as peer:
            peer.sendall(bytes([LONG]) + struct.pack(">Q", next(sizes)) + b"x" * 65536)
            peer.settimeout(PAUSE_S)
            peer.recv(4096)

    return _again_and_again(host, port, ends_s, one)


def slowloris(host: str, port: int, ends_s: float) -> int:
    """Many handshakes, a byte at a time."""
    said = greeting() + ready()
    open_now: list[list] = []
    count = 0
    while not spent(ends_s):
        while len(open_now) < SLOW_CONNECTIONS:
            with _hung_up_on():
                open_now.append([connect(host, port), 0])
                count += 1
        for each in list(open_now):
            try:
                each[0].sendall(said[each[1] : each[1] + 1])
                each[1] += 1
            except OSError:
                each[0].close()
                open_now.remove(each)
            if each[1] >= len(said) - 1 and each in open_now:
                each[0].close()
                open_now.remove(each)
        _PAUSE.wait(0.1)
    for each in open_now:
        each[0].close()
    return count


def wrong_versions(host: str, port: int, ends_s: float) -> int:
    """Greetings of other protocols, other versions and other mechanisms."""
    rng = random.Random(7)  # noqa: S311 - no secret
    greetings = [
        greeting(1, 0),
        greeting(2, 0),
        greeting(99, 99),
        greeting(3, 1, b"PLAIN"),
        greeting(3, 1, b"CURVE"),
        greeting(3, 1, b"\xff" * 20),
        b"\x01\x00",
        b"\xff" + b"\xff" * 8 + b"\x7f\x03",
        b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        bytes(64),
    ]

    def one(host: str, port: int) -> None:
        with connect(host, port) as peer:
            peer.sendall(rng.choice(greetings))
            peer.sendall(ready() + rng.randbytes(200))

    return _again_and_again(host, port, ends_s, one)


def odd_commands(host: str, port: int, ends_s: float) -> int:
    """Commands that are none, that lie about lengths, and pings whose answers nobody reads."""
    rng = random.Random(8)  # noqa: S311 - no secret
    ping = command(b"PING", b"\0\1" + b"x" * 16)

    def one(host: str, port: int) -> None:
        with connect(host, port) as peer:
            peer.sendall(greeting())
            peer.sendall(
                rng.choice(
                    [
                        ready(b"i" * 255),
                        ready(b"i" * 256),
                        ready(b"\0" * 5),
                        ready(kind=b"SUB"),
                        ready(kind=b"ROUTER"),
                        command(b"READY", b"\xffSocket-Type" + b"\xff" * 8),
                        command(b"READY", b""),
                        command(b"", b""),
                        command(b"ERROR", b"\xff"),
                        frame(b"\xff" + b"x" * 3, 4),
                        ready() + ping * 2000,
                        ready() + command(b"SUBSCRIBE", b"x" * 100) * 200,
                        ready() + bytes([0xFF, 0xFF]) * 50,
                    ]
                )
            )

    return _again_and_again(host, port, ends_s, one)


def _bombs() -> list[bytes]:
    """Frames, sealed as they should be, whose bodies ask for far more than they hold."""
    nested = b"\x91" * 60_000
    claims = b"\xdd\xff\xff\xff\xff" * 12_000
    maps = b"\xdf\xff\xff\xff\xff" * 12_000
    wide = b"\xdc\xff\xff" + b"\xc0" * 65_535
    binary = b"\xc6\xff\xff\xff\xff" + b"x" * 60_000
    text = b"\xdb\xff\xff\xff\xff" + b"x" * 60_000
    zone = b"\xc9\x00\x00\xff\xff\x00" + b"x" * 60_000
    bodies = [nested, claims, maps, wide, binary, text, zone]
    bombs = [encode_frame(Header(MessageType.HELLO), body[:65_536]) for body in bodies]
    plan = Header(MessageType.PLAN)
    return [bytes(b) for b in bombs] + [
        bytes(encode_frame(plan, (body * 20)[: 1 << 20])) for body in bodies
    ]


def msgpack_bombs(host: str, port: int, ends_s: float) -> int:
    """Bodies that would cost many times their size, were they believed."""
    bombs = _bombs()

    def one(host: str, port: int) -> None:
        with shake_hands(host, port) as peer:
            for bomb in bombs:
                peer.sendall(frame(bomb, LAST))

    return _again_and_again(host, port, ends_s, one)


def storm(host: str, port: int, ends_s: float, *, most: int | None = None) -> int:
    """Connections as fast as they can be made, half of them with a handshake and a HELLO."""
    hello = frame(bytes(encode_control(Header(MessageType.HELLO), Hello(3))))
    count = 0
    while not spent(ends_s) and (most is None or count < most):
        open_now = []
        for number in range(STORM_PIECE):
            with _hung_up_on():
                peer = connect(host, port)
                open_now.append(peer)
                if number % 2:
                    peer.sendall(greeting() + ready() + hello)  # whether they take turns or not
                count += 1
        for peer in open_now:
            peer.close()
    return count


def stalled_readers(host: str, port: int, ends_s: float) -> int:
    """Peers that ask for the largest answers and never read one."""
    hello = frame(bytes(encode_control(Header(MessageType.HELLO), Hello(3))))
    open_now: list[socket.socket] = []
    count = 0
    for number in range(STALLED_CONNECTIONS):
        with _hung_up_on():
            peer = shake_hands(host, port, b"stalled-%d" % number)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            peer.settimeout(RECEIVE_S)
            peer.sendall(hello)
            open_now.append(peer)
            count += 1
    probes = [memoryview(frame(bytes(_probe_for(peer)))) for peer in open_now]
    left = list(probes)
    for peer in open_now:
        peer.settimeout(0)
    while not spent(ends_s):
        for number, peer in enumerate(open_now):
            with _hung_up_on():
                left[number] = left[number][peer.send(left[number]) :]
            if not left[number]:
                left[number] = probes[number]
                count += 1
        _PAUSE.wait(PAUSE_S / 4)
    for peer in open_now:
        peer.close()
    return count


def _probe_for(peer: socket.socket) -> bytearray:
    """A PROBE that wants 1 MiB back, as whoever the COOKIE on this connection made of it."""
    said = b""
    with _hung_up_on():
        while b"PSQW" not in said or len(said) - said.index(b"PSQW") < 100:
            got = peer.recv(4096)
            if not got:
                break
            said += got
    at = said.find(b"PSQW")
    if at < 0:
        return encode_control(Header(MessageType.HEARTBEAT), Heartbeat(0))
    epoch, incarnation = struct.unpack_from("<II", said, at + 24)
    body = bytes(1 << 20)
    header = Header(
        MessageType.PROBE,
        run_id=said[at + 8 : at + 24],
        epoch=epoch,
        incarnation=incarnation,
        part=len(body),
    )
    return encode_frame(header, body)


KINDS: Final[dict[str, Attack]] = {
    attack.__name__.replace("_", "-"): attack
    for attack in (
        endless_small,
        endless_large,
        endless_many,
        flood,
        huge_claims,
        slowloris,
        wrong_versions,
        odd_commands,
        msgpack_bombs,
        storm,
        stalled_readers,
    )
}


def main() -> None:
    """See the module's docstring."""
    kind, host, port, seconds = sys.argv[1:5]
    begun_s = time.monotonic()
    count = KINDS[kind](host, int(port), begun_s + float(seconds))
    took_s = round(time.monotonic() - begun_s, 3)
    sys.stdout.write(json.dumps({"kind": kind, "attacks": count, "seconds": took_s}) + "\n")


if __name__ == "__main__":
    main()
