"""ZMTP 3.1 written by hand, so that a peer may break every rule of it. No libzmq."""

from __future__ import annotations

import socket
import struct
import time
from typing import Final

__all__ = [
    "LAST",
    "LONG",
    "MORE",
    "command",
    "connect",
    "frame",
    "greeting",
    "ready",
    "shake_hands",
    "spent",
]

LAST: Final = 0
MORE: Final = 1
LONG: Final = 2
COMMAND: Final = 4
CONNECT_S: Final = 5.0


def greeting(major: int = 3, minor: int = 1, mechanism: bytes = b"NULL") -> bytes:
    """The 64 bytes that begin a connection."""
    signature = b"\xff" + bytes(8) + b"\x7f"
    return signature + bytes([major, minor]) + mechanism.ljust(20, b"\0") + bytes(32)


def frame(body: bytes, flags: int = LAST) -> bytes:
    """A frame with its true length."""
    if len(body) > 255 or flags & LONG:
        return bytes([flags | LONG]) + struct.pack(">Q", len(body)) + body
    return bytes([flags, len(body)]) + body


def command(name: bytes, body: bytes) -> bytes:
    """A command, which is for the other side's ZMTP, not for whoever uses it."""
    return frame(bytes([len(name)]) + name + body, COMMAND)


def ready(identity: bytes = b"", kind: bytes = b"DEALER") -> bytes:
    """The end of a NULL handshake."""
    properties = ((b"Socket-Type", kind), (b"Identity", identity))
    return command(
        b"READY",
        b"".join(
            bytes([len(name)]) + name + struct.pack(">I", len(value)) + value
            for name, value in properties
        ),
    )


def connect(host: str, port: int) -> socket.socket:
    """A TCP connection; it is let go at once when it is closed."""
    made = socket.create_connection((host, port), timeout=CONNECT_S)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return made


def shake_hands(host: str, port: int, identity: bytes = b"") -> socket.socket:
    """A connection on which messages may be sent; a handshake takes turns, as libzmq's do."""
    made = connect(host, port)
    try:
        made.sendall(greeting())
        left = len(greeting())
        while left:
            got = made.recv(left)
            if not got:
                msg = "hung up on amid the handshake"
                raise ConnectionResetError(msg)
            left -= len(got)
        made.sendall(ready(identity))
    except OSError:
        made.close()
        raise
    return made


def spent(ends_s: float) -> bool:
    """Whether a time on the monotonic clock has come."""
    return time.monotonic() >= ends_s
