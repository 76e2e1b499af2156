"""Whole clients against several servers that keep books, in virtual time, on bad connections.

The servers are of two kinds: a small model of the rules in `proto/README.md`, which closes rounds
as it likes, and the real one's state machine (see `conftest`). Both write down what counted. A
payload begins with three numbers that name it; the others are whole and travel as f32, so every sum
is exact: what all workers gave is in the servers' weights or in a residual, or it was lost or
counted twice.
"""

import random
from collections import Counter, deque
from dataclasses import replace

import numpy as np
import pytest

from psq import layout
from psq.client import Client, Hooks, Patience, RoundResult
from psq.client import client as client_module
from psq.clock import parse_consistency
from psq.codec import get_codec
from psq.errors import FencedError, RemotePayloadError
from psq.plan import Plan
from psq.presets import preset
from psq_proto.frames import Header, decode_frame, encode_frame
from psq_proto.messages import Flags, MessageType

STEPS = 5
RUN_ID = b"r" * 16
FP32 = get_codec("fp32").wire_id
NAME = 3  # the first values of a payload: whose it is, of which step, which shard
MAX_MOVES = 60_000
MAX_FAULTS = 40
QUEUE_FRAMES = 6
LOSABLE = {
    MessageType.PUSH,
    MessageType.PULL,
    MessageType.HEARTBEAT,
    MessageType.VERDICT,
    MessageType.WEIGHTS,
    MessageType.STATUS,
}


@pytest.fixture(autouse=True)
def _small_world(monkeypatch):
    monkeypatch.setattr(layout, "SPLIT_NUMEL", 16)
    monkeypatch.setattr(layout, "MAX_SHARD_NUMEL", 16)

    class NoPulse:
        def __init__(self, *_) -> None: ...

        def start(self) -> None: ...

        def stop(self) -> None: ...

    monkeypatch.setattr(client_module, "Pulse", NoPulse)
    monkeypatch.setattr(client_module, "WorkerLinks", lambda wires, **_: wires[0].group)


def plan_of(servers: int, workers: int, consistency: str, every: int = 1) -> Plan:
    recipe = preset("fp32").with_codecs(downlink="delta:fp32")
    uplink = replace(recipe.uplink, every=every, error_feedback=every > 1)
    recipe = replace(recipe, uplink=uplink)
    specs = [(f"t{index}", (16,)) for index in range(12)]
    return Plan.of(specs, recipe, workers, servers=servers, consistency=consistency)


class Wire:
    """One worker's connection to one server, as a link: two queues, which a cut empties."""

    def __init__(self, world: "World", server: int) -> None:
        self.world, self.server = world, server
        self.endpoint = f"tcp://server:{server}"
        self.hint = ""
        self.sent_bytes = self.received_bytes = 0
        self.closed = False
        self.peer = b""
        self.cut()

    def cut(self) -> None:
        before = self.world.wires.pop(self.peer, None)
        if before is not None and self.world.rng.random() < 0.5:  # the server may hear of it
            getattr(self.world.books[self.server], "gone", lambda _: None)(self.peer)
        self.peer = len(self.world.names).to_bytes(4, "big")
        self.world.names.append(self.peer)
        self.world.wires[self.peer] = self
        self.up: deque[bytes] = deque()
        self.under_way: deque[bytes] = deque()
        self.arrived: deque[bytes] = deque()

    def send(self, frame) -> bool:
        if self.closed or len(self.up) >= QUEUE_FRAMES:
            return False
        self.up.append(bytes(frame))
        return True

    def drain(self, limit: int = 64):
        for _ in range(limit):
            if not self.arrived:
                return
            yield memoryview(self.arrived.popleft())

    def is_lent(self, _) -> bool:
        return False


class Group:
    """Stands for `WorkerLinks`; a wait lets the rest of the world go on."""

    def __init__(self, world: "World", servers: int) -> None:
        self.world = world
        self.links = [Wire(world, server) for server in range(servers)]
        for wire in self.links:
            wire.group = self
        self.closed = False

    def wait(self, timeout_s: float, room=()) -> list[int]:
        if timeout_s:
            self.world.move(self)
        del room
        return [index for index, wire in enumerate(self.links) if wire.arrived]

    def close(self, linger_s: float | None = None) -> None:
        del linger_s
        self.closed = True
        for wire in self.links:
            wire.closed = True


class Worker:
    """A process: steps of whole numbers, exact in f32, and a diary of what it said."""

    def __init__(self, world: "World", rank: int, seed: int) -> None:
        self.world, self.rank, self.rng = world, rank, random.Random(seed)  # noqa: S311 - a test
        self.name = world.next_incarnation()
        plan = world.plan
        self.x = {s.index: np.full(s.numel, np.nan, np.float32) for s in plan.layout.shards}
        self.residual = {s.index: np.zeros(s.numel, np.float32) for s in plan.layout.shards}
        self.given = {s.index: np.zeros(s.numel, np.float64) for s in plan.layout.shards}
        self.group = Group(world, plan.servers)
        self.client = Client(
            self.group.links,
            plan,
            rank,
            Hooks(self._initial, self._weights, self._restore, lambda _: pytest.fail("a reset")),
            patience=Patience(give_up_after_s=1e6, heartbeat_s=1.0, report_s=1e5),
            rng=random.Random(seed),  # noqa: S311 - a test
            clock=lambda: world.now_s,
        )
        self.phase, self.steps, self.first_step = "joining", 0, 0
        self.todo: deque[int] = deque()
        self.pushed: set[int] = set()
        self.diary: list[tuple[set[int], RoundResult]] = []
        self.restored: list[int] = []
        self.sat_out = 0

    def advance(self) -> None:
        getattr(self, f"_{self.phase}")()

    def _joining(self) -> None:
        if self.client._ready():
            self.client.join()
            self.phase = "idle"
        else:
            self.client.poll()

    def _idle(self) -> None:
        if self.steps == STEPS:
            self._end()
            return
        step = self.client.begin(0.5)
        assert step == min(self.client.versions)
        shards = range(len(self.client.plan.layout.shards))
        self.todo = deque(k for k in shards if self.client.takes_part(k))
        assert self.todo
        self.sat_out += len(self.todo) < len(shards)
        self.pushed = set()
        self.phase = "pushing"

    def _end(self) -> None:
        if parse_consistency(self.world.plan.consistency).eager:
            self.client.poll()  # all end with the same round
        else:
            self.phase = "gone"
            self.client.leave("done")

    def _gone(self) -> None:
        pass

    def _pushing(self) -> None:
        for _ in range(self.rng.randrange(4)):
            if not self.todo:
                break
            self._say(self.todo.popleft())
        if self.rng.random() < 0.5:
            self.client.poll()
        if not self.todo:
            self.phase = "waiting"

    def _say(self, shard: int) -> None:
        chance = self.rng.random()
        if chance < 0.1:
            self.client.skip(shard)
        elif chance < 0.12:
            self.client.skip()
            self.todo.clear()
        else:
            new = self.rng.randrange(1, 1000)
            self.given[shard] += new
            payload = self.client.payload(shard).view("<f4")
            payload[:] = self.residual[shard] + np.float32(new)
            payload[:NAME] = self.name, self.steps, shard
            self.residual[shard][:] = 0.0
            self.client.push(shard)
            self.pushed.add(shard)

    def _waiting(self) -> None:
        if not self.client._over():
            self.client.poll()
            return
        self.restored = []
        result = self.client.finish()
        assert tuple(sorted(self.restored)) == result.rejected
        assert set(result.rejected) <= self.pushed
        self.diary.append((self.pushed, result))
        self.steps += 1
        self.phase = "idle"

    def _initial(self, shard: int) -> np.ndarray:
        return np.zeros_like(self.x[shard])

    def _weights(self, header: Header, body: memoryview) -> None:
        values = np.frombuffer(body, "<f4")
        if Flags.DELTA in header.flags:
            self.x[header.shard] += values
        else:
            self.x[header.shard][:] = values

    def _restore(self, shard: int) -> None:
        self.restored.append(shard)
        self.residual[shard] += self.client.said(shard).view("<f4")


class World:
    """Servers, workers and a scheduler that draws everything from one seed."""

    def __init__(  # noqa: PLR0913, PLR0917 - what a world is made of
        self, servers: int, workers: int, consistency: str, seed: int, kind: type, every: int = 1
    ) -> None:
        self.rng = random.Random(seed)  # noqa: S311 - a test
        self.now_s = 0.0
        self.names: list[bytes] = []
        self.wires: dict[bytes, Wire] = {}
        self.refuse_chance = self.cut_chance = self.loss_chance = self.twice_chance = 0.0
        self.cuts = self.losses = self.twice = self.broken = self.incarnations = 0
        self.lost: Counter[MessageType] = Counter()
        self.max_faults = MAX_FAULTS
        self.fates: dict[tuple[float, ...], bool] = {}
        self.plan = plan_of(servers, workers, consistency, every)
        self.books = [kind(self.plan.for_server(index), self) for index in range(servers)]
        self.workers = [Worker(self, rank, 100 * seed + rank) for rank in range(workers)]

    def next_incarnation(self) -> int:
        self.incarnations += 1
        return self.incarnations

    def down(self, peer: bytes, frame: bytearray) -> None:
        if peer in self.wires:
            self.wires[peer].under_way.append(bytes(frame))

    def move(self, waiting: Group | None = None) -> None:
        """One thing happens somewhere; never inside the worker that waits."""
        self.now_s += self.rng.random() * 0.05
        wire = self.rng.choice(list(self.wires.values()))
        act = self.rng.random()
        if act < 0.35:
            self._carry_up(wire)
        elif act < 0.7:
            self._carry_down(wire)
        elif act < 0.75:
            self.rng.choice(self.books).tick()
        elif act < 0.76 and self.rng.random() < self.cut_chance and not self.calm:
            wire.cut()
            self.cuts += 1
        else:
            worker = self.rng.choice(self.workers)
            if worker.group is not waiting:
                worker.advance()

    @property
    def calm(self) -> bool:
        return self.cuts + self.losses + self.twice >= self.max_faults

    def _carry_up(self, wire: Wire) -> None:
        if wire.up:
            frame = self._break(wire.up.popleft())
            for _ in range(self._times(frame)):
                self.books[wire.server].hear(wire.peer, frame)

    def _break(self, frame: bytes) -> bytes:
        """Now and then a payload is what no worker should send, with a good checksum."""
        header, body = decode_frame(frame)
        if header.type is not MessageType.PUSH or not body.nbytes:
            return frame
        name = tuple(np.frombuffer(body, "<f4")[:NAME])
        if name not in self.fates:
            self.fates[name] = self.rng.random() < self.refuse_chance
        if not self.fates[name]:
            return frame
        self.broken += 1
        return bytes(encode_frame(header, body[:-4].tobytes() + np.float32(np.nan).tobytes()))

    def _carry_down(self, wire: Wire) -> None:
        if wire.under_way:
            frame = wire.under_way.popleft()
            wire.arrived.extend([frame] * self._times(frame))

    def _times(self, frame: bytes) -> int:
        """How often a frame arrives."""
        kind = decode_frame(frame).header.type
        if self.calm or kind not in LOSABLE:
            return 1
        chance = self.rng.random()
        if chance < self.loss_chance:
            self.losses += 1
            self.lost[kind] += 1
            return 0
        if chance > 1.0 - self.twice_chance and kind is not MessageType.STATUS:
            self.twice += 1
            return 2
        return 1

    def run(self, until=None) -> "World":
        """Until every worker has made its steps, and has what the servers have."""
        for _ in range(MAX_MOVES):
            if until(self) if until else self.at_rest():
                return self
            self.move()
        states = [(w.phase, w.steps, w.client.versions) for w in self.workers]
        books = [(b.round, b.versions, b.said, b.last) for b in self.books]
        pytest.fail(f"stuck: {states} {books}")

    def at_rest(self) -> bool:
        return all(worker.steps == STEPS for worker in self.workers) and all(
            worker.phase == "gone" or list(worker.client.versions) == self.versions()
            for worker in self.workers
        )

    def versions(self) -> list[int]:
        merged = {k: v for book in self.books for k, v in book.versions.items()}
        return [merged[k] for k in sorted(merged)]

    # ---- the laws

    def check(self) -> "World":
        self.check_replicas()
        self.check_diaries()
        self.check_sums()
        return self

    def check_replicas(self) -> None:
        """A shard has the bytes that its server had at that version."""
        for worker in self.workers:
            for shard, version in enumerate(worker.client.versions):
                book = self.books[self.plan.layout.owners[shard]]
                moved = max(v for k, v in book.history if k == shard and v <= version)
                assert self.plan.due_after(shard, moved) == version
                assert worker.x[shard].tobytes() == book.history[shard, moved]

    def check_diaries(self) -> None:
        """What a worker believes to count is what the servers counted, and once."""
        counted: Counter[tuple[int, ...]] = Counter()
        for book in self.books:
            counted += book.applied
        assert set(counted.values()) <= {1}
        believed = {
            (worker.name, step, shard)
            for worker in self.workers
            for step, (pushed, result) in enumerate(worker.diary, start=worker.first_step)
            for shard in pushed - set(result.rejected)
        }
        names = {worker.name for worker in self.workers}
        assert believed == {name for name in counted if name[0] in names}

    def check_sums(self) -> None:
        for book in self.books:
            for shard, values in book.x.items():
                given = sum(worker.given[shard] for worker in self.workers)
                kept = sum(worker.residual[shard].astype(np.float64) for worker in self.workers)
                assert (given == values + kept)[NAME:].all()


SHAPES = ((1, 1), (1, 3), (2, 2), (4, 2))
RULES = ("bsp", "bsp,quorum=1", "ssp:2", "asp")


KINDS = ("model", "real")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("servers", "workers"), SHAPES)
def test_without_faults_every_push_counts(servers, workers, rule, kind, books):
    world = World(servers, workers, rule, 1, books[kind]).run().check()
    assert not any(worker.client.resent_frames for worker in world.workers)
    if rule != "bsp,quorum=1":
        assert not any(result.rejected for w in world.workers for _, result in w.diary)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_every_push_is_accounted_for_once_whatever_breaks(shape, rule, seed, kind, books):
    world = World(*shape, rule, seed, books[kind])
    world.cut_chance, world.loss_chance, world.twice_chance = 0.5, 0.05, 0.05
    world.refuse_chance = 0.1
    world.run().check()
    assert world.cuts
    assert world.losses
    assert world.twice
    assert world.broken
    told = {shard for w in world.workers for _, result in w.diary for shard in result.rejected}
    assert told
    assert all(0 <= book.stalest <= (2 if rule == "ssp:2" else 10**9) for book in world.books)


@pytest.mark.parametrize("seed", [3, 4, 5, 16])
@pytest.mark.parametrize("shape", [(1, 2), (2, 2)])
@pytest.mark.parametrize("every", [2, 3])
def test_who_is_late_where_shards_take_turns_hears_so_whatever_was_lost(every, shape, seed, books):
    world = World(*shape, "bsp,quorum=1,mads=1", seed, books["real"], every)
    world.max_faults = 400
    world.cut_chance, world.loss_chance, world.twice_chance = 1.0, 0.15, 0.05
    world.refuse_chance = 0.1
    world.run().check()
    assert world.cuts
    assert world.lost[MessageType.PUSH]


def test_a_verdict_that_was_lost_is_asked_for_with_one_shard(books):
    world = World(1, 1, "bsp", 3, books["model"])
    [worker] = world.workers
    world.run(until=lambda _: worker.steps == 1 and worker.phase == "waiting")
    [wire] = worker.group.links

    def lose_the_verdict(_) -> bool:
        kept = [f for f in wire.under_way if f[5] != MessageType.VERDICT]
        lost = len(kept) < len(wire.under_way)
        wire.under_way = deque(kept)
        return lost

    world.run(until=lose_the_verdict)
    assert worker.steps == 1
    world.run().check()
    assert worker.client.resent_frames == 1


def test_a_server_that_is_ahead_after_a_crash_sits_one_step_out(books):
    world = World(2, 2, "bsp", 4, books["model"])
    first, second = world.workers
    owned = world.books[0].owned

    def only_half_said(_) -> bool:
        """The second worker dies with its word said to one server, and not to the other."""
        return second.steps == 2 and len(set(owned) - set(second.todo)) == len(owned) > 0

    # Only the shards of server 0 are said: the worker says them first, and stops there.
    world.run(until=lambda _: second.phase == "pushing" and second.steps == 2)
    for shard in [k for k in second.todo if k in owned]:
        second.todo.remove(shard)
        second.client.skip(shard)
    assert only_half_said(world)
    second.advance = second.client.poll  # it says no more
    world.run(until=lambda _: world.books[0].round == 3)
    assert world.books[1].round == 2
    for wire in second.group.links:
        wire.cut()
        world.wires.pop(wire.peer)
    fresh = world.workers[1] = Worker(world, 1, seed=99)
    fresh.steps = fresh.first_step = 2
    world.run()
    assert fresh.sat_out == 1
    world.check_replicas()
    world.check_diaries()
    assert [book.round for book in world.books] == [STEPS, STEPS]
    assert first.sat_out == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(8))
def test_a_process_that_takes_a_rank_over_counts_nothing_twice(seed, kind, books):
    world = World(2, 2, "bsp", seed, books[kind])
    world.cut_chance, world.loss_chance, world.refuse_chance = 0.5, 0.03, 0.05
    old = world.workers[1]
    moves = world.rng.randrange(10, 1500)

    def some_moves_later(_) -> bool:
        nonlocal moves
        moves -= 1
        return moves < 0 and old.phase == "pushing" and bool(old.pushed)

    world.run(until=some_moves_later)
    world.cut_chance = 0.0  # who loses FENCED with a connection comes back, and fences the other
    fresh = world.workers[1] = Worker(world, 1, seed=1000 + seed)
    fresh.steps = fresh.first_step = old.steps
    fenced: list[str] = []

    def old_one_goes_on(_) -> bool:
        if not fenced:
            try:
                old.client.poll()
            except FencedError as error:
                fenced.append(str(error))
        return world.at_rest()

    world.run(until=old_one_goes_on)
    world.check_replicas()
    world.check_diaries()
    assert "another process holds rank 1" in fenced[0]


def test_errors_and_waits_name_their_server(books):
    world = World(2, 1, "bsp", 5, books["model"])
    [worker] = world.workers
    assert worker.client._waited_for() == "server 0 at tcp://server:0; server 1 at tcp://server:1"
    world.run(until=lambda _: worker.phase == "idle" and worker.steps == 1)
    book = world.books[1]
    wire = worker.group.links[1]
    foreign = world.books[0].owned[0]
    book.versions[foreign] = 1
    wire.arrived.append(bytes(book.weights(foreign, np.zeros(16, np.float32), Flags.FULL)))
    with pytest.raises(RemotePayloadError, match=r"server 1 at tcp://server:1: weights of shard"):
        worker.client.poll()
