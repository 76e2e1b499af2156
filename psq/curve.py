"""CURVE for ZeroMQ: keys made and set, strangers turned away, and a look whether that works.

libzmq asks over an inproc socket (ZAP, RFC 27) whether a key may come in, and lets every key in if
nobody is there to answer. `Doorman` answers, from the files of `authorized_workers`, which it reads
again when they change. The socket's domain is enforced, so that libzmq refuses everybody should the
doorman be missing; and `canary` tries the door with a key that nobody has before anybody else may.
(zmq.auth does the same in a thread of its own with an event loop, lets unencrypted peers pass, and
writes secrets with whatever mode the umask leaves: hence these lines.)

A connection that was let in bears its key, as the User-Id of each frame. (A peer may name
properties of its own, this one too; libzmq 4.3.5 takes the door's word first and keeps it.) Nothing
here knows ranks.
"""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import zmq

from psq.errors import ConfigError
from psq.keys import AUTHORIZED, Authorized, SecretKey, ServerKeys, WorkerKeys, read_authorized

__all__ = [
    "CANARY_S",
    "CURVE_BYTES",
    "RELOAD_S",
    "Doorman",
    "canary",
    "decide",
    "new_pair",
    "use_server_keys",
    "use_worker_keys",
    "z85_encode",
]

CANARY_S: Final = 5.0
RELOAD_S: Final = 1.0
"""How often the folder of authorized keys is looked at."""
CURVE_BYTES: Final = 33
"""What encryption adds to each frame: a command's name, a nonce, flags and a checksum."""
ANSWERS_PER_TURN: Final = 64
RENEW_AFTER: Final = 64
HANDSHAKES_S: Final = 4.0
"""What a handshake may take (`HANDSHAKE_IVL`), and some more."""
_ZAP: Final = "inproc://zeromq.zap.01"
_VERSION: Final = b"1.0"
_DOMAIN: Final = b"psq"
_REQUEST_PARTS: Final = 7
_KEY_BYTES: Final = 32
_B85: Final = (
    b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;<=>?@^_`{|}~"
)
_Z85: Final = (
    b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
)
_TO_Z85: Final = bytes.maketrans(_B85, _Z85)
_POLL_MS: Final = 20

Socket = zmq.Socket[bytes]
Context = zmq.Context[Socket]


def z85_encode(data: bytes) -> str:
    """Bytes, four at a time, as ZeroMQ writes keys."""
    return base64.b85encode(data).translate(_TO_Z85).decode()


def new_pair() -> SecretKey:
    """A new pair of keys, from the system's randomness.

    Raises:
        ConfigError: this libzmq was built without encryption.
    """
    if not zmq.has("curve"):
        msg = "this libzmq was built without CURVE: install pyzmq's own wheel"
        raise ConfigError(msg)
    public, secret = zmq.curve_keypair()
    return SecretKey(public.decode(), secret.decode())


def use_server_keys(socket: Socket, keys: ServerKeys) -> None:
    """Let this socket take encrypted connections only, and none without a doorman."""
    _grow_frames(socket)
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.own.secret.encode())
    socket.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN)
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)


def use_worker_keys(socket: Socket, keys: WorkerKeys) -> None:
    """Let this socket connect encrypted, and to the server with this key only."""
    _grow_frames(socket)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.own.public.encode())
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.own.secret.encode())
    socket.setsockopt(zmq.CURVE_SERVERKEY, keys.server.encode())


def _grow_frames(socket: Socket) -> None:
    """The largest frame is to fit once it is encrypted: libzmq looks at what comes off the wire."""
    largest = int(socket.getsockopt(zmq.MAXMSGSIZE))
    if largest > 0:
        socket.setsockopt(zmq.MAXMSGSIZE, largest + CURVE_BYTES)


def decide(
    request: Sequence[bytes], authorized: Mapping[str, Authorized]
) -> tuple[list[bytes], str, str]:
    """(the reply to one ZAP request, the key that was refused or "", the address it came from)."""
    if len(request) < _REQUEST_PARTS or request[0] != _VERSION:
        number = request[1] if len(request) > 1 else b""
        return [_VERSION, number, b"500", b"no ZAP 1.0 request", b"", b""], "", ""
    _, number, domain, address, _, mechanism, key = request[:_REQUEST_PARTS]
    where = address.decode(errors="replace")[:64]
    is_key = mechanism == b"CURVE" and domain == _DOMAIN and len(key) == _KEY_BYTES
    public = z85_encode(key) if is_key else ""
    if is_key and public in authorized:
        return [_VERSION, number, b"200", b"OK", public.encode(), b""], "", where
    return [_VERSION, number, b"400", b"not authorized", b"", b""], public or "none", where


class Doorman:
    """Knows whose keys may come in, and answers libzmq.

    libzmq keeps, for as long as a connection lives, the line over which it once asked: 34 KB for
    each. So after some answers a new socket takes the place of the old one, which goes when every
    handshake that may have asked there is over, and the lines with it, and their memory at last.

    Args:
        context: of the socket that it stands before.
        poller: is told of the sockets at which there may be something to answer.
        folder: the authorized keys.
        note: takes a line for the log.

    Attributes:
        sockets: those.
        authorized: who is let in, by public key.
        refused: how many were not.
    """

    def __init__(
        self, context: Context, poller: zmq.Poller, folder: Path, note: Callable[[str], None]
    ) -> None:
        self._context = context
        self._poller = poller
        self._folder = folder
        self._note = note
        self.refused = 0
        self._touched_ns = _touched_ns(folder)
        self._seen = _signature(folder)
        self._changed = False
        self.authorized, _ = read_authorized(folder)
        self._due_s = time.monotonic() + RELOAD_S
        self.sockets: list[Socket] = []
        self._answered = 0
        self._close_s = 0.0
        self._is_held = False  # the memory of lines that have gone
        self._open()

    def answer(self) -> None:
        """Answer who is waiting, some at a time."""
        for socket in self.sockets:
            self._answer_at(socket)

    def renew(self, now_s: float) -> None:
        """Let libzmq forget the lines of those who have been answered, if there are many."""
        if now_s < self._close_s:
            return
        if len(self.sockets) > 1:
            self._close(self.sockets.pop(0))
            self._close_s, self._is_held = now_s + RELOAD_S, True
        elif self._is_held:
            self._is_held = False
            _give_back_memory()
        elif self._answered >= RENEW_AFTER:
            self._answered, self._close_s = 0, now_s + HANDSHAKES_S
            self.sockets[0].unbind(_ZAP)  # who asks between this and the next line tries again
            self._open()

    def _open(self) -> None:
        socket = self._context.socket(zmq.REP)
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(_ZAP)
        self._poller.register(socket, zmq.POLLIN)
        self.sockets.append(socket)

    def _close(self, socket: Socket) -> None:
        self._poller.unregister(socket)
        socket.close(0)

    def _answer_at(self, socket: Socket) -> None:
        for _ in range(ANSWERS_PER_TURN):
            try:
                request = socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            self._answered += 1
            reply, refused, where = decide(request, self.authorized)
            if refused and _touched_ns(self._folder) != self._touched_ns:
                self._look()  # the key may have been added this moment
                reply, refused, where = decide(request, self.authorized)
            socket.send_multipart(reply)
            if refused:
                self.refused += 1
                self._note(f"a key that is not in {AUTHORIZED} was refused, from {where}")

    def reload(self, now_s: float) -> bool:
        """Look at the folder again when it is time; whether who is let in has changed since."""
        if now_s >= self._due_s:
            self._due_s = now_s + RELOAD_S
            self._look()
        changed, self._changed = self._changed, False
        return changed

    def _look(self) -> None:
        self._touched_ns = _touched_ns(self._folder)
        seen = _signature(self._folder)
        if seen == self._seen:
            return
        self._seen = seen
        try:
            authorized, faults = read_authorized(self._folder)
        except ConfigError as error:
            self._note(f"who is let in stays as it was: {error}")
            return
        for fault in faults:
            self._note(fault)
        if authorized != self.authorized:
            self._note(_changes(self.authorized, authorized))
            self._changed = True
        self.authorized = authorized

    def close(self) -> None:
        """Go; whoever knocks from now on is refused."""
        while self.sockets:
            self._close(self.sockets.pop())


def _give_back_memory() -> None:
    """Let malloc return what lies free between what is used, where the libc can."""
    import ctypes  # noqa: PLC0415 - 10 ms, and only after many handshakes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _changes(before: Mapping[str, Authorized], after: Mapping[str, Authorized]) -> str:
    come = sorted(one.name for key, one in after.items() if before.get(key) != one)
    gone = sorted(one.name for key, one in before.items() if after.get(key) != one)
    return (
        f"{AUTHORIZED} has changed: in {', '.join(come) or 'none'}; out {', '.join(gone) or 'none'}"
    )


def _touched_ns(folder: Path) -> int:
    """When a file was last added or removed; cheap, for every stranger has it looked up."""
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return 0


def _signature(folder: Path) -> tuple[tuple[str, int, int, int], ...]:
    """What changes when a file does; empty when the folder cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return tuple(
                sorted(
                    (entry.name, found.st_ino, found.st_mtime_ns, found.st_size)
                    for entry in entries
                    for found in [entry.stat()]
                )
            )
    except OSError:
        return ()


def canary(endpoint: str, server_public: str, pump: Callable[[], object]) -> None:
    """Knock with a key that was made this moment; return once it was refused.

    Args:
        endpoint: of the server, from its own machine.
        server_public: its key.
        pump: lets the server answer; called again and again.

    Raises:
        ConfigError: it was let in, or nobody answered within `CANARY_S`.
    """
    context: Context = zmq.Context()
    socket, ears = context.socket(zmq.DEALER), context.socket(zmq.PAIR)
    try:
        stranger = new_pair()
        use_worker_keys(socket, WorkerKeys(stranger, server_public, Path()))
        socket.monitor(
            "inproc://canary", zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        )
        ears.connect("inproc://canary")
        socket.connect(endpoint)
        refused = _outcome(ears, pump)
    finally:
        socket.disable_monitor()
        for each in (ears, socket):
            each.close(0)
        context.term()
    if refused is None:
        msg = f"{endpoint} did not answer its own canary within {CANARY_S:g} s: not started"
        raise ConfigError(msg)
    if not refused:
        msg = (
            f"{endpoint} let in a key that was made up: whoever reaches it could join, so the "
            "server was not started; install pyzmq's own wheel, with libzmq 4.3.5"
        )
        raise ConfigError(msg)


def _outcome(ears: Socket, pump: Callable[[], object]) -> bool | None:
    """Whether the canary was refused; None if nothing was heard."""
    ends_s = time.monotonic() + CANARY_S
    while time.monotonic() < ends_s:
        pump()
        if ears.poll(_POLL_MS):
            event = int.from_bytes(ears.recv_multipart()[0][:2], "little")
            return event == int(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
    return None
