"""Key files: who this process is, whom it trusts, and which ranks a key may speak for.

    keys/                          what `psq keygen` makes; each folder in it is for one machine
        server/                    server.secret  server.pub  authorized_workers/rank0.pub ...
        aggregator0-3/             both: it is a server for rank 0 ... 3, a worker for above.pub
        rank0/                     worker.secret  worker.pub  server.pub

A server knows its workers by the files in `authorized_workers`: whoever has the secret of one may
speak for the ranks that the file names, and for nobody else. A worker knows its server by
`server.pub` and talks to no other. Files are TOML; keys are CURVE25519 in Z85, 40 characters.

Secrets are in files that nobody but their owner can read, and are refused otherwise. They are never
in a command line, a variable, a log line, an error or a `repr`. Nothing here encrypts or talks to a
network: `psq.curve` hands the keys to ZeroMQ.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from psq.errors import ConfigError

__all__ = [
    "AUTHORIZED",
    "MAX_AUTHORIZED",
    "PUBLIC",
    "SECRET",
    "Authorized",
    "Ranks",
    "SecretKey",
    "ServerKeys",
    "WorkerKeys",
    "check_key",
    "fingerprint",
    "load_server_keys",
    "load_worker_keys",
    "parse_ranks",
    "read_authorized",
    "read_public",
    "read_secret",
    "write_public",
    "write_secret",
]

AUTHORIZED: Final = "authorized_workers"
PUBLIC: Final = ".pub"
SECRET: Final = ".secret"  # noqa: S105 - a suffix
MAX_KEY_FILE_BYTES: Final = 4096
MAX_AUTHORIZED: Final = 16_384
"""Files in `authorized_workers`: several for each rank there can be."""
SECRET_MODE: Final = 0o600
PUBLIC_MODE: Final = 0o644
_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO
_WRITABLE: Final = stat.S_IWGRP | stat.S_IWOTH
_KEY: Final = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_RANKS: Final = re.compile(r"([0-9]{1,4})(?:-([0-9]{1,4}))?")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True, slots=True)
class Ranks:
    """The ranks first..last: one of a worker, all below it of an aggregator."""

    first: int
    last: int

    @property
    def text(self) -> str:
        """As a key file has it: "3" or "0-3"."""
        return f"{self.first}" if self.first == self.last else f"{self.first}-{self.last}"

    @property
    def words(self) -> str:
        """In a sentence: "rank 3" or "ranks 0-3"."""
        return f"rank{'' if self.first == self.last else 's'} {self.text}"

    def covers(self, first: int, last: int) -> bool:
        """Whether all of these are among them."""
        return self.first <= first <= last <= self.last


@dataclass(frozen=True, slots=True)
class Authorized:
    """A key that a server lets in.

    Attributes:
        name: of its file, without the suffix.
        public: the key.
        ranks: whom it may speak for.
    """

    name: str
    public: str
    ranks: Ranks


@dataclass(frozen=True, slots=True)
class SecretKey:
    """A pair of keys; `ranks` is what a worker's is for, as its owner believes."""

    public: str
    secret: str = field(repr=False)
    ranks: Ranks | None = None


@dataclass(frozen=True, slots=True)
class ServerKeys:
    """Who a server is, and where it finds whom it lets in."""

    own: SecretKey
    authorized: Path


@dataclass(frozen=True, slots=True)
class WorkerKeys:
    """Who a worker is, and the public key of the one server that it talks to.

    Attributes:
        own: its pair.
        server: the server's public key.
        path: of the secret's file, for messages.
    """

    own: SecretKey
    server: str
    path: Path

    @property
    def rank(self) -> int:
        """The lowest rank it may speak for."""
        return self.own.ranks.first if self.own.ranks is not None else 0


def fingerprint(public: str) -> str:
    """What people compare and logs show: 16 hexadecimal digits of the key's SHA-256."""
    import hashlib  # noqa: PLC0415 - 4 ms, which a server's start can do without

    return hashlib.sha256(public.encode()).hexdigest()[:16]


def parse_ranks(text: str) -> Ranks:
    """The ranks that "3" or "0-3" names.

    Raises:
        ConfigError: it is neither.
    """
    match = _RANKS.fullmatch(text)
    first = int(match[1]) if match else 0
    last = int(match[2] or first) if match else -1
    if last < first:
        msg = f"ranks: expected a rank such as 3, or 0-3 for an aggregator's, got {text!r:.60}"
        raise ConfigError(msg)
    return Ranks(first, last)


def check_key(text: object, path: Path, name: str) -> str:
    """A key as text, if it is one; what it is instead is not shown.

    Raises:
        ConfigError: it is none.
    """
    if not isinstance(text, str) or not _KEY.fullmatch(text):
        msg = (
            f"{path}: {name!r} is no key: expected 40 characters of Z85; make a new one with "
            "psq keygen"
        )
        raise ConfigError(msg)
    return text


def load_server_keys(folder: Path, below: str = "server") -> ServerKeys:
    """A server's keys, of `folder` or of the folder `below` in it.

    Raises:
        ConfigError: there are none, or others may read the secret or change who is let in.
    """
    place = _place(folder, below, "server" + SECRET)
    authorized = place / AUTHORIZED
    _check_folder(authorized)
    _, faults = read_authorized(authorized)
    if faults:
        raise ConfigError(faults[0])
    return ServerKeys(read_secret(place / ("server" + SECRET)), authorized)


def load_worker_keys(folder: Path, ranks: Ranks | None = None, below: str = "") -> WorkerKeys:
    """A worker's keys, of `folder` or of the folder `rankN` in it, or of another one there.

    Args:
        folder: where they are.
        ranks: whom the process speaks for; None: rank 0's will do, for a look at the server.
        below: that other one's name: an aggregator's.

    Raises:
        ConfigError: there are none, others may read the secret, or it is another rank's.
    """
    place = _place(folder, below or f"rank{ranks.first if ranks else 0}", "worker" + SECRET)
    path = place / ("worker" + SECRET)
    own = read_secret(path)
    if ranks and own.ranks and not own.ranks.covers(ranks.first, ranks.last):
        msg = (
            f"{path} is the key of {own.ranks.words}, and this process speaks for {ranks.words}: "
            "give it its own"
        )
        raise ConfigError(msg)
    # An aggregator has a server.pub of its own: whom it talks to is above.pub.
    pinned = "above" if below else "server"
    _, server, _ = read_public(place / (pinned + PUBLIC))
    return WorkerKeys(own, server, path)


def read_authorized(folder: Path) -> tuple[dict[str, Authorized], list[str]]:
    """Who is let in, by public key: all `.pub` files of a folder; and what is wrong with others.

    A file that is no such file lets nobody in. So does one with the key of a file before it.

    Raises:
        ConfigError: the folder cannot be read, or has more than `MAX_AUTHORIZED` files.
    """
    found: dict[str, Authorized] = {}
    faults: list[str] = []
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix == PUBLIC)
    except OSError as error:
        msg = f"cannot read {folder}: {error.strerror}; psq keygen makes such a folder"
        raise ConfigError(msg) from None
    if len(paths) > MAX_AUTHORIZED:
        msg = f"{folder}: {len(paths)} keys, at most {MAX_AUTHORIZED} are read"
        raise ConfigError(msg)
    for path in paths:
        try:
            one = _read_authorized(path)
        except ConfigError as error:
            faults.append(str(error))
            continue
        before = found.setdefault(one.public, one)
        if before is not one:
            faults.append(f"{path}: the same key as {before.name}{PUBLIC}: remove one of both")
    return found, faults


def _read_authorized(path: Path) -> Authorized:
    name, public, ranks = read_public(path)
    if ranks is None:
        msg = f'{path}: it says no ranks: expected a line such as ranks = "3"'
        raise ConfigError(msg)
    return Authorized(name, public, ranks)


def read_public(path: Path) -> tuple[str, str, Ranks | None]:
    """(name, key, ranks if it says any) of a `.pub` file.

    Raises:
        ConfigError: it cannot be read, or is no such file.
    """
    with _open(path) as fd:
        table = _parse(path, _contents(fd, path))
    if not _NAME.fullmatch(path.stem):
        msg = f"{path.name!r:.80}: a key's name has letters, digits, - and _ only"
        raise ConfigError(msg)
    ranks = parse_ranks(str(table["ranks"])) if "ranks" in table else None
    return path.stem, check_key(table.get("public"), path, "public"), ranks


def read_secret(path: Path) -> SecretKey:
    """The pair in a `.secret` file.

    Raises:
        ConfigError: it cannot be read, others could, or it is no such file.
    """
    with _open(path) as fd:
        _check_owned(path, os.fstat(fd))
        table = _parse(path, _contents(fd, path))
    ranks = parse_ranks(str(table["ranks"])) if "ranks" in table else None
    public = check_key(table.get("public"), path, "public")
    return SecretKey(public, check_key(table.get("secret"), path, "secret"), ranks)


def write_public(path: Path, public: str, whose: str, ranks: Ranks | None = None) -> None:
    """Write a `.pub` file; one that is there stays, and is an error.

    Raises:
        ConfigError: it cannot be written.
    """
    said = {"public": public} | ({"ranks": ranks.text} if ranks is not None else {})
    _write(path, f"the public key of {whose}; it is no secret", said, PUBLIC_MODE)


def write_secret(path: Path, key: SecretKey, whose: str) -> None:
    """Write a `.secret` file, readable by its owner alone; one that is there stays.

    Raises:
        ConfigError: it cannot be written.
    """
    said = {"secret": key.secret, "public": key.public}
    said |= {"ranks": key.ranks.text} if key.ranks is not None else {}
    _write(path, f"the SECRET key of {whose}: who has it can pass for it", said, SECRET_MODE)


def _place(folder: Path, below: str, name: str) -> Path:
    """The folder itself, or the one below it, whichever has the file."""
    for place in (folder, folder / below):
        with contextlib.suppress(OSError):
            if (place / name).is_file():
                return place
    msg = (
        f"keys: neither {folder} nor {folder / below} has a file {name} that this user can see: "
        "make keys with psq keygen, and name the folder"
    )
    raise ConfigError(msg)


@contextlib.contextmanager
def _open(path: Path) -> Any:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        msg = f"cannot read the key file {path}: {error.strerror}"
        raise ConfigError(msg) from None
    try:
        yield fd
    finally:
        os.close(fd)


def _contents(fd: int, path: Path) -> bytes:
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        msg = f"{path} is no file"
        raise ConfigError(msg)
    data = os.read(fd, MAX_KEY_FILE_BYTES + 1)
    if len(data) > MAX_KEY_FILE_BYTES:
        msg = f"{path}: a key file has at most {MAX_KEY_FILE_BYTES} bytes"
        raise ConfigError(msg)
    return data


def _parse(path: Path, data: bytes) -> Mapping[str, Any]:
    try:
        return tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        # Their own words may quote the file.
        msg = f"{path} is no key file: make a new one with psq keygen"
        raise ConfigError(msg) from None


def _check_owned(path: Path, found: os.stat_result) -> None:
    """A secret that others can read is none."""
    if found.st_mode & _OTHERS:
        mode = stat.S_IMODE(found.st_mode)
        msg = f"{path} holds a secret and others may use it (mode {mode:04o}): chmod 600 {path}"
        raise ConfigError(msg)
    if found.st_uid not in (os.geteuid(), 0):
        msg = f"{path} belongs to another user (uid {found.st_uid}): keep secrets in files of yours"
        raise ConfigError(msg)


def _check_folder(folder: Path) -> None:
    """Who may write to the folder lets in whom they like."""
    try:
        mode = folder.stat().st_mode
    except OSError as error:
        msg = f"cannot read {folder}: {error.strerror}; psq keygen makes such a folder"
        raise ConfigError(msg) from None
    if mode & _WRITABLE:
        msg = (
            f"{folder} says who is let in and others may change it (mode "
            f"{stat.S_IMODE(mode):04o}): chmod 700 {folder}"
        )
        raise ConfigError(msg)


def _write(path: Path, what: str, said: Mapping[str, str], mode: int) -> None:
    """A new file with this mode from its first byte on, whatever the umask."""
    lines = [f"# psq: {what}.", *(f'{name} = "{value}"' for name, value in said.items()), ""]
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, SECRET_MODE)
        with os.fdopen(fd, "w") as file:
            os.fchmod(fd, mode)
            file.write("\n".join(lines))
            file.flush()
            os.fsync(fd)
    except FileExistsError:
        msg = f"{path} is there already, and keys are never overwritten: move it away first"
        raise ConfigError(msg) from None
    except OSError as error:
        msg = f"cannot write {path}: {error.strerror}"
        raise ConfigError(msg) from None
