"""Workers that keep the rules, and a server to keep them with: what hostile peers are measured by.

The workers speak through psq's own sessions over bare sockets and do no arithmetic, so that a round
costs what the server makes of it.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import numpy as np
import zmq

from psq.codec import get_codec
from psq.codec.shard import ShardCodec
from psq.layout import PART_NUMEL, part_count
from psq.plan import Plan
from psq.presets import preset
from psq_proto.errors import StaleFrameError
from psq_proto.messages import NO_VERSION, Hello, Join, MessageType
from psq_proto.session import Message, WorkerSession

__all__ = ["Job", "Peer", "descriptors", "resident_mb"]

ANSWER_S: Final = 60.0
END_S: Final = 20.0


def resident_mb(pid: int, part: str = "VmRSS") -> float:
    """Memory of a process, in MiB; RssAnon is the part of it that is no file's."""
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(part))
    return int(line.split()[1]) / 1024


def descriptors(pid: int) -> int:
    """How many files and sockets a process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


class Peer:
    """One worker's connection."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, plan: Plan, rank: int
    ) -> None:
        self.plan = plan
        self.session = WorkerSession(rank=rank, plan_body=plan.body)
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(endpoint)

    def send(self, kind: MessageType, body: object = b"", **fields: object) -> None:
        """Say something."""
        self.socket.send(self.session.send(kind, body, **fields))  # type: ignore[arg-type]

    def wait_for(self, kind: MessageType) -> Message:
        """The next message of this type, past all others."""
        while True:
            assert self.socket.poll(ANSWER_S * 1000), f"no {kind.name} within {ANSWER_S:.0f} s"
            try:
                message = self.session.receive(self.socket.recv())
            except StaleFrameError:
                continue
            if message.header.type is kind:
                return message

    def join(self, lineage: int) -> Self:
        """Take the rank."""
        self.send(MessageType.HELLO, Hello(1))
        self.wait_for(MessageType.COOKIE)
        self.send(MessageType.PLAN, self.plan.body)
        self.send(MessageType.JOIN, Join(lineage, pending=-1))
        self.wait_for(MessageType.WELCOME)
        return self

    def init(self) -> None:
        """Give the initial weights: zeros."""
        for shard in self.plan.layout.shards:
            for part in range(part_count(shard.numel)):
                numel = min(PART_NUMEL, shard.numel - part * PART_NUMEL)
                self.send(MessageType.INIT, bytes(4 * numel), shard=shard.index, part=part)

    def push(self, payloads: list[bytes], number: int) -> None:
        """Say a whole contribution."""
        codec = get_codec(self.plan.recipe.uplink.codec).wire_id
        named = {"seq": number, "round": number, "version": number}
        for shard, payload in enumerate(payloads):
            self.send(MessageType.PUSH, payload, codec=codec, shard=shard, rate=0.01, **named)


class Job:
    """A server process and two workers in this one; `round` is one round of theirs."""

    def __init__(
        self, folder: Path, *, numel: int = 1 << 21, options: tuple[str, ...] = ()
    ) -> None:
        self._err = (folder / "server.err").open("w")
        self.server = subprocess.Popen(
            [sys.executable, "-m", "psq_server", "--bind", "tcp://127.0.0.1:0", *options],
            stdout=subprocess.PIPE,
            stderr=self._err,
            text=True,
        )
        assert self.server.stdout is not None
        ready = self.server.stdout.readline()
        self.endpoint = ready.partition("endpoint=")[2].split()[0]
        host, _, port = self.endpoint.removeprefix("tcp://").rpartition(":")
        self.host, self.port = host, int(port)
        self.version = 0
        self._context = zmq.Context()
        plan = Plan.of([("w", (numel,))], preset("server-adam"), 2)
        self._payloads = _payloads(plan)
        self.peers = [Peer(self._context, self.endpoint, plan, r).join(5 + r) for r in range(2)]
        self.peers[0].init()
        for peer in self.peers:
            peer.send(MessageType.PULL, version=NO_VERSION)
            peer.wait_for(MessageType.WEIGHTS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for peer in self.peers:
            peer.socket.close()
        self._context.destroy(linger=0)
        self.server.terminate()
        self.server.wait(END_S)
        if self.server.stdout is not None:
            self.server.stdout.close()
        self._err.close()

    def round(self) -> float:
        """One round; how many seconds it took."""
        begun_s = time.perf_counter()
        for peer in self.peers:
            peer.push(self._payloads, self.version)
        for peer in self.peers:
            peer.wait_for(MessageType.VERDICT)
        self.version += 1
        return time.perf_counter() - begun_s


def _payloads(plan: Plan) -> list[bytes]:
    """Of each shard, some gradient."""
    rng, made = np.random.default_rng(0), []
    for shard in plan.layout.shards:
        codec = ShardCodec(get_codec(plan.recipe.uplink.codec), shard)
        payload = np.empty(codec.nbytes, np.uint8)
        codec.encode(rng.standard_normal(shard.numel).astype(np.float32), payload)
        made.append(payload.tobytes())
    return made
