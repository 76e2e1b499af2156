"""Real processes for the cluster tests: servers, workers, and a proxy that stands between them.

    def test_something(cluster):
        server = cluster.server("--world-size", "2")
        workers = [cluster.worker(rank, server.endpoint, "--steps", "5") for rank in range(2)]
        assert all(worker.wait() == 0 for worker in workers)

Every process has a session of its own, writes its streams to files, and is ended by pid when the
test is over; if the test failed, what they wrote is printed. A process (or a child of one) that
outlives this is an error. Nothing sleeps: every wait is for a line, an exit or a count, and bounded
by `WAIT_S`.
"""

import contextlib
import json
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
WAIT_S = 60.0
END_S = 5.0
TICK_S = 0.02
TRAINER = HERE / "train_tiny.py"
FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    item.stash[FAILED] = item.stash.get(FAILED, False) or report.failed
    return report


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = WAIT_S) -> None:
    """Look again and again until `condition` is true; `what` is said when it never is."""
    pause = threading.Event()
    for _ in range(int(timeout_s / TICK_S)):
        if condition():
            return
        pause.wait(TICK_S)
    pytest.fail(f"{what} did not happen within {timeout_s:.0f} s")


class Program:
    """A process under test; `name` is how the logs call it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.out_path = folder / f"{name}.out"
        self.err_path = folder / f"{name}.err"
        self.pid = 0

    def exit_code(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        raise NotImplementedError

    def out(self) -> str:
        """What it has written to stdout so far."""
        return self.out_path.read_text() if self.out_path.exists() else ""

    def err(self) -> str:
        """What it has written to stderr so far."""
        return self.err_path.read_text() if self.err_path.exists() else ""

    def wait(self, timeout_s: float = WAIT_S) -> int:
        """Its exit code, once it has ended."""
        wait_until(lambda: self.exit_code() is not None, f"the end of {self.name}", timeout_s)
        code = self.exit_code()
        assert code is not None
        return code

    def wait_line(self, pattern: str, *, err: bool = False) -> re.Match[str]:
        """The first match of `pattern` in what it writes, once it is there."""
        found: list[re.Match[str]] = []

        def look() -> bool:
            match = re.search(pattern, self.err() if err else self.out(), re.MULTILINE)
            found.extend([match] if match else [])
            assert match or self.exit_code() is None, f"{self.name} ended without {pattern!r}"
            return bool(match)

        wait_until(look, f"{pattern!r} from {self.name}")
        return found[0]

    def signal(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        if self.exit_code() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def orphans(self) -> bool:
        """Whether anything of its session still runs."""
        try:
            os.killpg(self.pid, 0)
        except ProcessLookupError:
            return False
        return True


class Command(Program):
    """A program started with its own interpreter."""

    def __init__(self, name: str, folder: Path, argv: list[str], env: dict[str, str]) -> None:
        super().__init__(name, folder)
        with self.out_path.open("wb") as out, self.err_path.open("wb") as err:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=env,
                cwd=folder,
                start_new_session=True,
            )
        self.pid = self._process.pid

    def exit_code(self) -> int | None:
        return self._process.poll()


class Server(Command):
    """psq-server, ready."""

    endpoint = ""
    metrics = ""

    def wait_ready(self) -> "Server":
        ready = self.wait_line(r"^psq-server ready endpoint=(\S+) metrics=(\S+)")
        self.endpoint, self.metrics = ready.groups()
        return self


class Forked(Program):
    """A program forked from the zygote."""

    def __init__(self, name: str, folder: Path, zygote: "Zygote", order: dict) -> None:
        super().__init__(name, folder)
        self._zygote = zygote
        streams = {"stdout": str(self.out_path), "stderr": str(self.err_path), "cwd": str(folder)}
        self.pid = zygote.start({**order, **streams})

    def exit_code(self) -> int | None:
        return self._zygote.code_of(self.pid)


class Zygote:
    """The process that workers are forked from; see zygote.py."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "zygote.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(),
            start_new_session=True,
        )
        self._codes: dict[int, int] = {}
        self._pids: dict[int, int] = {}
        self._pending = b""
        self._ready = False
        self._orders = 0
        wait_until(self._is_ready, "the zygote's start")

    def start(self, order: dict) -> int:
        """Fork a process; returns its pid."""
        self._orders += 1
        number = self._orders
        line = json.dumps({**order, "id": number}).encode() + b"\n"
        assert self._process.stdin is not None
        self._process.stdin.write(line)
        self._process.stdin.flush()
        wait_until(lambda: self._look() or number in self._pids, "a fork")
        return self._pids[number]

    def code_of(self, pid: int) -> int | None:
        """The exit code of a process it forked; None while that runs."""
        self._look()
        return self._codes.get(pid)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(END_S)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _is_ready(self) -> bool:
        self._look()
        return self._ready

    def _look(self) -> None:
        """Take in what it has said."""
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        while select.select([fd], [], [], 0)[0]:
            data = os.read(fd, 65536)
            assert data, "the zygote died"
            *lines, self._pending = (self._pending + data).split(b"\n")
            for line in lines:
                self._note(json.loads(line))

    def _note(self, said: dict) -> None:
        if "ready" in said:
            self._ready = True
        elif "code" in said:
            self._codes[said["pid"]] = said["code"]
        else:
            self._pids[said["id"]] = said["pid"]


class Cluster:
    """The processes of one test."""

    def __init__(self, folder: Path, zygote: Callable[[], Zygote]) -> None:
        self.folder = folder
        self.programs: list[Program] = []
        self.proxies: list[Proxy] = []
        self._zygote = zygote

    def server(self, *options: str, ready: bool = True, **variables: str) -> Server:
        """A psq-server on a free port of 127.0.0.1."""
        argv = [sys.executable, "-m", "psq_server", "--bind", "tcp://127.0.0.1:0", *options]
        server = Server(self._name("server"), self.folder, argv, environment(**variables))
        self.programs.append(server)
        return server.wait_ready() if ready else server

    def command(self, *argv: str, name: str = "command", **variables: str) -> Command:
        """Any other program, started as it would be from a shell."""
        made = Command(self._name(name), self.folder, list(argv), environment(**variables))
        self.programs.append(made)
        return made

    def worker(
        self, rank: int, connect: str, *options: str, script: Path = TRAINER, **variables: str
    ) -> Program:
        """A worker process that runs `script`, told by PSQ_* variables who it is."""
        env = environment(PSQ_RANK=str(rank), PSQ_CONNECT=connect, **variables)
        order = {"argv": [str(script), *options], "env": env}
        worker = Forked(self._name(f"rank{rank}"), self.folder, self._zygote(), order)
        self.programs.append(worker)
        return worker

    def proxy(self, target: str) -> "Proxy":
        """A TCP proxy to `target` that counts, and breaks connections when told."""
        proxy = Proxy(target)
        self.proxies.append(proxy)
        return proxy

    def end(self) -> list[str]:
        """End everything; returns what had to be said about it."""
        for proxy in self.proxies:
            proxy.close()
        complaints = []
        for program in reversed(self.programs):
            program.signal(signal.SIGTERM)
        for program in self.programs:
            try:
                program.wait(END_S)
            except pytest.fail.Exception:
                complaints.append(f"{program.name} did not end on SIGTERM")
                program.signal(signal.SIGKILL)
                program.wait(END_S)
            if program.orphans():
                complaints.append(f"{program.name} left orphans")
                os.killpg(program.pid, signal.SIGKILL)
        return complaints

    def show(self) -> None:
        """Print what everybody wrote."""
        for program in self.programs:
            for stream, text in (("stdout", program.out()), ("stderr", program.err())):
                print(f"---- {program.name} {stream} (code {program.exit_code()})\n{text[-8000:]}")  # noqa: T201

    def _name(self, base: str) -> str:
        count = sum(program.name.split(".")[0] == base for program in self.programs)
        return f"{base}.{count}" if count else base


class Proxy:
    """Forwards connections to a target; counts bytes each way; resets connections on demand.

    `sent` counts what clients sent, `received` what they got. `reset_after(n)` breaks every
    connection, with a RST, once n more bytes came from clients, in the middle of whatever that is;
    `struck` counts how often it did.
    """

    def __init__(self, target: str) -> None:
        host, port = target.removeprefix("tcp://").rsplit(":", 1)
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.sent = 0
        self.received = 0
        self.struck = 0
        self._fuse: int | None = None
        self._lock = threading.Lock()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._wake, self._waker = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def reset_after(self, count: int) -> None:
        """Arm: break all connections when this many more bytes came from clients."""
        with self._lock:
            self._fuse = count

    def close(self) -> None:
        self._waker.send(b"!")
        self._thread.join(END_S)
        for pair in self._pairs:
            self._cut(pair)
        for end in (self._listener, self._wake, self._waker):
            end.close()

    def _serve(self) -> None:
        while True:
            ends = [end for pair in self._pairs for end in pair]
            for end in select.select([self._listener, self._wake, *ends], [], [])[0]:
                if end is self._wake:
                    return
                if end is self._listener:
                    self._accept()
                else:
                    self._forward(end)

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        try:
            server = socket.create_connection(self._target)
        except OSError:
            client.close()
            return
        self._pairs.append((client, server))

    def _forward(self, source: socket.socket) -> None:
        pair = next((pair for pair in self._pairs if source in pair), None)
        if pair is None:
            return  # cut while we were looking
        from_client = source is pair[0]
        try:
            data = source.recv(16384)
            if data:
                self._count(len(data), from_client=from_client)
                if from_client and self._burnt(len(data)):
                    self.struck += 1
                    for each in list(self._pairs):
                        self._cut(each)
                    return
                pair[from_client].sendall(data)
        except OSError:
            data = b""
        if not data:
            self._cut(pair)

    def _count(self, nbytes: int, *, from_client: bool) -> None:
        if from_client:
            self.sent += nbytes
        else:
            self.received += nbytes

    def _burnt(self, nbytes: int) -> bool:
        with self._lock:
            if self._fuse is None:
                return False
            self._fuse -= nbytes
            if self._fuse > 0:
                return False
            self._fuse = None
            return True

    def _cut(self, pair: tuple[socket.socket, socket.socket]) -> None:
        if pair in self._pairs:
            self._pairs.remove(pair)
        for end in pair:
            # No lingering: the other side gets a RST, not an orderly end.
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            end.close()


def environment(**variables: str) -> dict[str, str]:
    """This process's environment without what would configure psq, on one thread."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PSQ_", "SLURM_"))
        and name not in {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    }
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return {**kept, **threads, **variables}


@pytest.fixture(scope="session")
def zygote() -> Iterator[Callable[[], Zygote]]:
    """Made when a test first wants a worker."""
    made: list[Zygote] = []

    def get() -> Zygote:
        if not made:
            made.append(Zygote())
        return made[0]

    yield get
    for each in made:
        each.close()


@pytest.fixture
def cluster(tmp_path, zygote, request) -> Iterator[Cluster]:
    """The processes of one test, ended when it is over."""
    made = Cluster(tmp_path, zygote)
    yield made
    failed = request.node.stash.get(FAILED, False)
    complaints = made.end()
    if failed or complaints:
        made.show()
    assert not complaints, complaints
